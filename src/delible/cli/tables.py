"""Tables and sentences of results: answers before and after, audits, leaderboards, experiments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from delible.cli.output import console, plural, table

if TYPE_CHECKING:
    from delible.audit.result import AuditResult, Leak
    from delible.bench.table import Table
    from delible.finishing import BeforeAfter

#: Characters of a shown answer.
ANSWER_CHARACTERS = 240


def before_after(examples: Sequence[BeforeAfter]) -> Any:
    """The answers before and after, forget rows first."""
    return table(
        ("set", "question", "before", "after"),
        [
            (example.split, *map(_short, (example.question, example.before, example.after)))
            for example in examples
        ],
    )


def _short(text: str) -> str:
    # a random model may well say an escape sequence that a terminal would obey
    flat = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return flat if len(flat) <= ANSWER_CHARACTERS else flat[: ANSWER_CHARACTERS - 1] + "…"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def matrix(result: AuditResult) -> Any:
    """The attack x leak matrix: how much of each leak is known, by system, and what is erased.

    With the 95 % interval where there is one.
    """
    roles = list(result.systems)
    rows = []
    for leak in result.leaks:
        for index, measure in enumerate(leak.knowledge):
            values = [_number(leak.knowledge[measure].get(role)) for role in roles]
            rows.append(
                (leak.name if index == 0 else "", _words(measure), *values, _erased(leak, measure))
            )
    return table(("attack", "leak", *roles, "erased"), rows)


def _erased(leak: Leak, measure: str) -> str:
    value = leak.erased.get(measure)
    if value is None:
        powerless = leak.no_power.get(measure, "").startswith("no power")
        return "no power" if powerless else "cannot be said"
    low, high = leak.intervals.get(measure, (None, None))
    return f"{value:.0%}" if low is None or high is None else f"{value:.0%} ({low:.0%}-{high:.0%})"


def worst_places(result: AuditResult) -> list[str]:
    """The form, the subject and the facts that leak most, in sentences."""
    lines = []
    for leak in result.leaks:
        form, subject, left = leak.worst_form, leak.worst_subject, leak.facts_left
        if form is not None:
            lines.append(
                f"{leak.name}: form {form.form} of the question brings out most "
                f"({_words(form.measure)}, {form.erased:.0%} erased)."
            )
        if subject is not None and subject.erased < 1:
            lines.append(
                f"{leak.name}: {subject.subject} is forgotten least ({_words(subject.measure)}, "
                f"{subject.erased:.0%} erased, {subject.untouched} of {subject.records} facts as "
                "before)."
            )
        if left is not None and left.count:
            lines.append(
                f"{leak.name}: {left.count} of {left.comparable} facts as before "
                f"({_words(left.measure)}), such as '{_short(' '.join(left.questions[:1]))}'."
            )
    return lines


def recovered(result: AuditResult) -> Any:
    """What attacks got the unlearned system to say; one per attack."""
    rows = [
        (leak.name, *map(_short, (one.asked, one.expected, one.answer)))
        for leak in result.leaks
        for one in leak.recovered[:1]
    ]
    return table(("attack", "asked", "expected", "answer"), rows) if rows else None


def utility(result: AuditResult) -> Any:
    """What is left of everything that should be kept: one row per part."""
    parts = result.utility.parts if result.utility else []
    rows = []
    for part in parts:
        values = (part.original, part.unlearned, part.reference)
        said = "not comparable"
        if part.kept is not None:
            said = f"{part.kept:.0%} ({part.low or 0:.0%}-{part.high or 0:.0%})"
        rows.append((part.split, _words(part.measure), *map(_number, values), said))
    return table(("set", "measure", "original", "unlearned", "reference", "kept"), rows)


def measurements(result: AuditResult) -> Any:
    """The plain questions: one row per metric and split, one column per system."""
    roles = list(result.systems)
    found: dict[tuple[str, str], dict[str, str]] = {}
    for item in result.measurements:
        if item.attack == "none":
            row = found.setdefault((item.metric, item.split), {})
            row[item.system] = _number(item.value)
    return table(
        ("metric", "set", *roles),
        [
            (_words(metric), split, *(row.get(role, "-") for role in roles))
            for (metric, split), row in found.items()
        ],
    )


def leaderboard(result: Table, width: int | None = None) -> Any:
    """The leaderboard: as many columns as the terminal has room for, the most important ones.

    The axes of the forget-versus-utility plot come first, then the others in their order, then
    the cost. The best method of a column is bold with a ``*``; what is left out is said below.

    Args:
        width: Characters there are; ``None``: those of the terminal.
    """
    from rich import box
    from rich.table import Table as Drawn
    from rich.text import Text

    from delible.bench.table import COST, shown
    from delible.report.ranking import places

    marks = places(result)
    texts = {
        column.key: [
            ("* " if marks.get((row.method, column.key)) == "best" else "")
            + shown(row.numbers[column.key], column)
            for row in result.rows
        ]
        for column in result.columns
    }
    costs = {column.key for column in COST}
    titles = {
        column.key: f"{column.title}, %" if column.percent else column.title
        for column in result.columns
    }
    important = sorted(
        result.columns, key=lambda column: 2 if column.key in costs else int(column.axis is None)
    )
    room = console().width if width is None else width
    room -= max((len(row.method) for row in result.rows), default=6) + 2
    kept: set[str] = set()
    for column in important:
        words = (len(word) for word in titles[column.key].split())
        need = max(*words, *map(len, texts[column.key]), 1) + 2
        if kept and need > room:
            break  # a less important column that happens to be narrow would be a riddle
        kept.add(column.key)
        room -= need
    made = Drawn(box=box.SIMPLE_HEAD, pad_edge=False, caption_justify="left")
    made.add_column("method", overflow="fold")
    chosen = [column for column in result.columns if column.key in kept]
    for column in chosen:
        made.add_column(titles[column.key], justify="right", overflow="fold")
    for index, row in enumerate(result.rows):
        cells = [Text(texts[column.key][index]) for column in chosen]
        for text in cells:
            if text.plain.startswith("* "):
                text.stylize("bold")
        made.add_row(Text(row.method), *cells)
    left = len(result.columns) - len(chosen)
    told = ["* best"] if any(place == "best" for place in marks.values()) else []
    if left:
        told.append(f"{plural(left, 'more column')} in the leaderboard's page")
    made.caption = Text("; ".join(told)) if told else None
    return made


def cell(value: Any) -> str:
    """A value of an experiment's table as text; ``–`` where there is none."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if value and not 1e-3 <= abs(value) < 1e4:  # 0.000 would hide it
            return f"{value:.3g}"
        return f"{value:.3f}"
    if isinstance(value, list | tuple):
        return ", ".join(map(cell, value))
    return str(value)


def _words(name: str) -> str:
    return name.replace("_", " ")
