"""What was forgotten and what was used: rows by system, a chart over hint levels, sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from delible.bench.stages import mean
from delible.experiments.reinvent.knowing import share
from delible.measure.benchmark import Chart, Curve, Findings

BEFORE, NEVER = "model before", "never learned"
#: Denial from here on is called denial, and use that far below the model before is called harm.
DENIED, HARMED = 0.8, 0.2

Cell = dict[str, Any]


def reinvented(solved: Sequence[bool | None]) -> bool:
    """Whether what was forgotten counts as found again: solved in any wording."""
    return any(bool(one) for one in solved)


def findings(found: Mapping[str, Sequence[Cell]], hints: Sequence[int]) -> Findings:
    """Table, chart and notes.

    Args:
        found: By system, a cell for everything that was asked about, and seed: ``hints`` (by
            level, one truth value per wording or fact), ``denies``, ``denies, forced``,
            ``names it``; or ``failed`` with the reason.
    """
    notes: list[str] = []
    rows: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    curves: list[Curve] = []
    for system, every in found.items():
        notes += [f"{system} failed on {one['about']}: {one['failed']}"
                  for one in every if "failed" in one]  # fmt: skip
        cells = [one for one in every if "failed" not in one]
        if not cells:
            continue
        row = _row(system, cells, hints)
        rows.append(row)
        runs += [
            {**_row(system, [one], hints), "about": one["about"], "seed": one["seed"],
             **{f"hint {hint}, each": one["hints"][str(hint)] for hint in hints},
             "ended": ", ".join(one.get("ended", []))}
            for one in cells
        ]  # fmt: skip
        points = [(float(hint), row[f"hint {hint}"]) for hint in hints]
        curves.append(Curve(system, [(x, y) for x, y in points if y is not None]))
    by_name = {row["system"]: row for row in rows}
    # who never learned the facts can only read them; of an algorithm there is no such model
    bar = by_name.get(NEVER, by_name.get(BEFORE))
    last = f"hint {max(hints)}"
    if bar is not None and bar[last] == 0:
        notes.append(
            f"At {last} '{bar['system']}' uses nothing of what is handed back: a model that cannot "
            "do it tells nothing about what was lost."
        )
    for row in rows:
        if bar is not None and row["system"] not in (BEFORE, NEVER):
            notes += _notes(row, bar, hints)
    told = [key for key in (rows[0] if rows else {}) if any(row[key] is not None for row in rows)]
    rows = [{key: row[key] for key in told} for row in rows]
    chart = Chart("Used when it is handed back", "hint level", "share", curves)
    return Findings(rows, [chart] if curves else [], notes, runs)


def _row(system: str, cells: Sequence[Cell], hints: Sequence[int]) -> dict[str, Any]:
    def average(key: str) -> float | None:
        return mean([one.get(key) for one in cells])

    row: dict[str, Any] = {"system": system}
    for hint in hints:
        row[f"hint {hint}"] = mean([share(one["hints"][str(hint)]) for one in cells])
    if any("ended" in one for one in cells):
        for hint in hints:
            every = [float(reinvented(one["hints"][str(hint)])) for one in cells]
            row[f"reinvented {hint}"] = mean(every)
    for key in ("denies", "denies, forced", "names it", "kept", "kept denied"):
        row[key] = average(key)
    repeated = [value for one in cells for value in one.get("repeated", []) if value is not None]
    row["repeated replies"] = mean(repeated) if repeated else None
    return row


def _notes(row: Mapping[str, Any], bar: Mapping[str, Any], hints: Sequence[int]) -> list[str]:
    """Sentences about one system, against another that uses what is handed back as it can."""
    name, told, other = row["system"], list[str](), bar["system"]
    plain, forced = row["denies"], row["denies, forced"]
    if plain is not None and forced is not None:
        if plain >= DENIED and forced < DENIED:
            told.append(
                f"{name} denies by name ({plain:.0%}), and not when its answer is forced to begin "
                f"as if it knew ({forced:.0%}): suppressed."
            )
        elif plain >= DENIED:
            told.append(f"{name} denies by name ({plain:.0%}) and when forced ({forced:.0%}).")
    last = f"hint {max(hints)}"
    now, then = row[last], bar[last]
    if now is not None and then is not None:
        if then - now > HARMED:
            told.append(
                f"{name} uses what is handed back less than '{other}' ({now:.0%} against "
                f"{then:.0%} at {last}): more was lost than was asked for."
            )
        elif then > 0:
            told.append(
                f"{name} uses what is handed back: {now:.0%} at {last}, '{other}' {then:.0%}."
            )
    return told


__all__ = ["BEFORE", "NEVER", "Cell", "findings", "reinvented"]
