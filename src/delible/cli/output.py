"""What people see: messages, tables, progress bars, errors. Rich is imported when it is used."""

from __future__ import annotations

import codecs
import logging
import os
import sys
import unicodedata
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Protocol

from delible.watching import Pace, shown

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from delible.audit.result import AuditResult, Leak
    from delible.bench.table import Table
    from delible.finishing import BeforeAfter


class Training(Protocol):
    """What training reports to."""

    def __call__(self, step: int, total: int, numbers: Mapping[str, float]) -> None: ...


#: Where there is no terminal, progress is told in about so many lines.
LINES_WITHOUT_TERMINAL = 10
#: Characters of a shown answer.
ANSWER_CHARACTERS = 240
#: Columns whose words are names to be typed: never broken.
WHOLE = ("kind", "name", "option", "slot", "component")
#: Characters of our own texts as ASCII shows them; what decomposes into ASCII needs no row.
_PLAIN = {
    "–": "-", "—": "-", "−": "-", "×": "x", "±": "+-", "≥": ">=", "≤": "<=", "→": "->",
    "‘": "'", "’": "'", "“": '"', "”": '"', "·": ".", "•": "*",
    **dict.fromkeys("─━═╌╴╶╸╺", "-"), **dict.fromkeys("│┃║", "|"),
    **dict.fromkeys("┌┐└┘├┤┬┴┼╭╮╯╰╞╡╪", "+"),
}  # fmt: skip
#: Width where there is no terminal that says its own.
WIDTH = 100


def console(error: bool = False) -> Console:
    """The terminal; of several processes (``accelerate launch``) only the first one speaks."""
    from rich.console import Console

    stream = sys.stderr if error else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else WIDTH
    quiet = os.environ.get("RANK", "0") != "0"
    return Console(stderr=error, width=width, quiet=quiet, highlight=False)


def complain(problem: str, *, where: str | None = None, hint: str | None = None) -> None:
    """One red message on stderr: what is wrong, where, and what to do."""
    from rich.text import Text

    message = Text.assemble(
        ("error: ", "bold red"),
        (f"{where}: " if where else "", "bold"),
        " ".join(problem.split()),
        (f" {' '.join(hint.split())}" if hint else "", "cyan"),
    )
    console(error=True).print(message, soft_wrap=True)


def quiet_libraries() -> None:
    """Silences warnings and bars of the libraries below; they mean nothing to our users."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def plain_where_needed() -> None:
    """Lets output that knows few characters (ASCII, Latin-1) show like ones instead of failing."""
    codecs.register_error("delible-plain", _plain)
    for stream in (sys.stdout, sys.stderr):
        encoding = (getattr(stream, "encoding", None) or "").lower().replace("-", "")
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None and not encoding.startswith("utf"):
            reconfigure(errors="delible-plain")


def _plain(error: UnicodeError) -> tuple[str, int]:
    """What to write instead of characters that the output does not know."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    shown = []
    for character in error.object[error.start : error.end]:
        like = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
        shown.append(_PLAIN.get(character) or like or "?")
    return "".join(shown), error.end


class Reporter:
    """Prints sentences and draws progress bars on one terminal, without mixing them up.

    While it is open, it also shows what delible logs.

    Args:
        error: Speak on stderr, because stdout is for a program to read.
    """

    def __init__(self, error: bool = False) -> None:
        self.console = console(error)
        self._bar: Progress | None = None
        self._stage = self._drawn_title = ""
        self._pace = Pace()
        self._open = ExitStack()

    def __enter__(self) -> Reporter:
        self._open.enter_context(shown(self.say))
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()
        self.finish_bar()

    def say(self, sentence: str) -> None:
        """One sentence on a line of its own."""
        self.console.print(sentence, markup=False, soft_wrap=True)

    def heading(self, title: str) -> None:
        """The title of a step."""
        self.finish_bar()
        self.console.print(title, style="bold", markup=False, soft_wrap=True)

    def field(self, name: str, value: str) -> None:
        """A name and its value, aligned."""
        from rich.text import Text

        self.console.print(Text.assemble((f"{name:<12}", "dim"), value), soft_wrap=True)

    def finish_bar(self) -> None:
        """Leaves the last state of the bar on the screen."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def progress(self, title: str = "unlearning") -> Training:
        """A new bar, as what training reports to: ``(step, total, numbers)``."""
        self.finish_bar()
        return self._drawn(title) if self.console.is_terminal else self._told(title)

    def stage(self, title: str, done: int, total: int) -> None:
        """Progress of one of several stages; a new title is a new bar.

        A stage that counts from the beginning again (an attack that trains, then measures) is
        timed anew.
        """
        new = self._stage != title
        if new or not self._pace.goes_on(done):
            self._stage, self._pace = title, Pace(done)
            self.finish_bar()
        if self.console.is_terminal:
            self._draw(f"  {title}", done, total, "")
            if done >= total:
                self.finish_bar()
        elif new:
            self.say(f"  {title}")
        elif self._pace.due() and done < total:
            self._pace.told()
            left = self._pace.left(done, total)
            self.say("  ".join(filter(None, (f"  {title}", f"{done:,}/{total:,}", left))))

    def _draw(self, title: str, done: int, total: int, numbers: str) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining

        if self._drawn_title != title:
            self.finish_bar()  # of other work, which was not told to its end
        if self._bar is None:
            self._drawn_title = title
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}", style="cyan"),
                Remaining(compact=True),
                TextColumn("left", style="dim"),
                console=self.console,
            )
            # a resumed run starts in the middle: the steps before took no time here
            self._bar.add_task(title, total=total, completed=max(0, done - 1), numbers="")
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=done, total=total, numbers=numbers)

    def _drawn(self, title: str) -> Training:
        def report(step: int, total: int, numbers: Mapping[str, float]) -> None:
            self._draw(title, step, total, _numbers(numbers))
            if step == total:
                self.finish_bar()

        return report

    def _told(self, title: str) -> Training:
        pace: Pace | None = None

        def report(step: int, total: int, numbers: Mapping[str, float]) -> None:
            nonlocal pace
            first = pace is None
            pace = pace or Pace(step)  # the first step's own time is not known
            often = step % max(1, total // LINES_WITHOUT_TERMINAL) == 0
            if not (first or step == total or often or pace.due()):
                return
            pace.told()
            parts = (f"{title}  step {step}/{total}", _numbers(numbers), pace.left(step, total))
            self.say("  ".join(filter(None, parts)))

        return report


def _numbers(numbers: Mapping[str, float]) -> str:
    words = (("forget_loss", "forget {:.3f}"), ("keep_loss", "keep {:.3f}"))
    parts = [form.format(numbers[key]) for key, form in words if key in numbers]
    if "tokens_per_second" in numbers:
        parts.append(f"{numbers['tokens_per_second']:,.0f} tokens/s")
    return "  ".join(parts)


def count(number: float) -> str:
    """A large number in words, such as "134.5 million"."""
    for size, word in ((1e9, " billion"), (1e6, " million")):
        if number >= size:
            return f"{number / size:.1f}{word}"
    return f"{number:,.0f}"


def plural(number: int, noun: str) -> str:
    """``1 row``, ``2 rows``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> Any:
    """A plain table of texts; what they hold is never read as markup."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        made.add_column(column, overflow="fold", no_wrap=column in WHOLE)
    for row in rows:
        made.add_row(*(Text(value) for value in row))
    return made


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
