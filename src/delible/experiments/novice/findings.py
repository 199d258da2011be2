"""What came back: rows, notes and a chart of accuracies before and after each kind of lesson."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from delible.bench.stages import mean
from delible.measure.benchmark import (
    Chart,
    Curve,
    Findings,
)
from delible.teaching.level import recovery

PROMPTED = "told to be a novice"


#: What happens between the two tests: nothing, a lesson in the conversation or by an adapter, or
#: one about something else in either way.
TEACHING = ("none", "heard", "studied", "heard, unrelated", "studied, unrelated")


#: Knowledge was suppressed if an unrelated lesson moves accuracy, and recovery, by more (ours).
CONTROL = 0.1


Cell = dict[str, Any]


def findings(found: Mapping[str, Sequence[Cell]]) -> Findings:
    """Table, chart and notes.

    Args:
        found: By student, one cell per seed: ``original`` and ``taught`` accuracies with the
            persona, ``plain`` without, and ``stopped``; or ``failed`` with the reason.
    """
    rows: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    notes: list[str] = []
    curves: list[Curve] = []
    for name, every in found.items():
        notes += [f"{name} failed: {cell['failed']}" for cell in every if "failed" in cell]
        cells = [cell for cell in every if "failed" not in cell]
        if not cells:
            continue
        lines = {kind: _row(name, kind, cells) for kind in TEACHING}
        rows += lines.values()
        runs += [
            {**_row(name, kind, [cell]), "seed": seed, "answers": _at(cell, ("taught", kind,
             "answers")), "original answers": _at(cell, ("original", "answers"))}
            for seed, cell in enumerate(every) if "failed" not in cell for kind in TEACHING
        ]  # fmt: skip
        points = [(float(at), lines[kind]["forget accuracy"]) for at, kind in enumerate(TEACHING)]
        curves.append(Curve(name, [(x, y) for x, y in points if y is not None]))
        notes += _notes(name, lines, cells)
    axis = ", ".join(f"{at} = {kind}" for at, kind in enumerate(TEACHING))
    chart = Chart("Accuracy on forgotten people", axis, "accuracy", curves)
    return Findings(rows, [chart] if curves else [], notes, runs)


def _row(name: str, kind: str, cells: Sequence[Cell]) -> dict[str, Any]:
    def average(*path: str) -> float | None:
        return mean([_at(cell, path) for cell in cells])

    return {
        "student": name,
        "lesson": kind,
        "forget accuracy": average("taught", kind, "forget"),
        "before the lesson": average("taught", "none", "forget"),
        "original": average("original", "forget"),
        "original, no persona": average("plain", "forget"),
        "recovery": mean(
            [
                recovery(cell["original"]["forget"], cell["taught"]["none"]["forget"],
                         cell["taught"][kind]["forget"])
                for cell in cells
            ]
        ) if kind != "none" else None,
        "retain accuracy": average("taught", kind, "retain"),
        "retain, original": average("original", "retain"),
    }  # fmt: skip


def _notes(name: str, lines: Mapping[str, Mapping[str, Any]], cells: Sequence[Cell]) -> list[str]:
    none = lines["none"]
    if name == PROMPTED:
        return [
            f"{name}: accuracy on forgotten people {_said(none['original, no persona'])} at first, "
            f"{_said(none['forget accuracy'])} when told; its weights lost nothing, so there is "
            "no recovery."
        ]
    told = [
        f"{name}: accuracy on forgotten people {_said(none['original'])} at first, "
        f"{_said(none['forget accuracy'])} as a novice; recovery "
        f"{_said(lines['heard']['recovery'])} by a heard lesson, "
        f"{_said(lines['studied']['recovery'])} by a studied one."
    ]
    for kind in (one for one in TEACHING if one.endswith("unrelated")):
        back, now = lines[kind]["recovery"], lines[kind]["forget accuracy"]
        # both: with little to recover, one question is a large share of it
        if back is not None and back > CONTROL and now - none["forget accuracy"] > CONTROL:
            told.append(f"{name}: a lesson about something else brings knowledge back: suppressed.")
    missed = "the level was not reached; more epochs, or a higher rate"
    return told + [
        f"{name}, run {number} of {len(cells)}: {cell['stopped'] or missed}."
        for number, cell in enumerate(cells, 1)
    ]


def _at(cell: Mapping[str, Any], path: Sequence[str]) -> Any:
    value: Any = cell
    for key in path:
        value = value[key]
    return value


def _said(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}"
