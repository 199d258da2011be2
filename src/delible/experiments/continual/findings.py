"""What the continual experiment shows: a table, curves over the requests, and sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from delible.bench.stages import mean
from delible.measure.benchmark import Chart, Curve, Findings
from delible.measure.scoring.closeness import closeness
from delible.sequence.result import SequenceResult

START, REFERENCE = "original", "reference"
GIB = 2**30


@dataclass(frozen=True)
class Point:
    """Scores of a system after so many requests.

    Attributes:
        scores: Of ``forget`` and ``retain``, in [0, 100]; None where it was not measured.
    """

    requests: int
    scores: Mapping[str, Any]
    seed: int = 0


def degree(score: float | None, reference: float | None) -> float | None:
    """Closeness to the reference's score: 1 at it, lower on both sides, None where it is 0."""
    return None if score is None or reference is None else closeness(score, reference)


def findings(
    found: Mapping[str, Sequence[Point]],
    sequences: Mapping[str, Sequence[SequenceResult]],
    failed: Mapping[str, str],
) -> Findings:
    """Table, charts and notes.

    Args:
        found: Points by method, those of the original and the reference among them.
        sequences: By method, one per seed.
        failed: Why a method's sequence ended early, by method and seed.
    """
    reference = {point.requests: point.scores for point in found[REFERENCE]}
    rows = [
        _row(name, number, found[name], reference[number], sequences.get(name, ()))
        for number in sorted(reference)
        for name in found
    ]
    runs = [
        {
            "method": name, "requests": one.requests, "seed": one.seed,
            **{f"{split} score": one.scores.get(split) for split in ("forget", "retain")},
        }
        for name, points in found.items()
        for one in points
    ]  # fmt: skip
    charts = [*_degrees(rows, [name for name in found if name != REFERENCE]), *_along(sequences)]
    return Findings(rows, charts, _notes(rows, sequences, failed), runs)


def _row(
    name: str, number: int, points: Sequence[Point], reference: Mapping[str, Any],
    sequences: Sequence[SequenceResult],
) -> dict[str, Any]:  # fmt: skip
    mine = [point.scores for point in points if point.requests == number]
    upto = [one for one in sequences if len(one.steps) > number]
    steps = [step for one in upto for step in one.steps[1 : number + 1] if step.what == "done"]
    peaks = [step.peak_bytes / GIB for step in steps if step.peak_bytes is not None]
    return {
        "method": name,
        "requests": number,
        "forget degree": mean([degree(one.get("forget"), reference["forget"]) for one in mine]),
        "retain utility": mean([degree(one.get("retain"), reference["retain"]) for one in mine]),
        "forget score": mean([one.get("forget") for one in mine]),
        "retain score": mean([one.get("retain") for one in mine]),
        "seconds per request": fmean(step.seconds for step in steps) if steps else None,
        "peak GiB": max(peaks) if peaks else None,
        "skipped": sum(one.what == "skipped" for r in upto for one in r.steps[: number + 1]),
    }


def _degrees(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[Chart]:
    charts = []
    for column in ("forget degree", "retain utility"):
        curves = [
            Curve(
                name,
                [
                    (float(row["requests"]), row[column])
                    for row in rows
                    if row["method"] == name and row[column] is not None
                ],
            )
            for name in names
        ]
        title = column.capitalize()
        charts.append(Chart(title, "requests", column, [one for one in curves if one.points]))
    return [chart for chart in charts if chart.curves]


def _along(sequences: Mapping[str, Sequence[SequenceResult]]) -> list[Chart]:
    """What is measured after every request, of the first seed."""
    first = {name: ones[0] for name, ones in sequences.items() if ones}
    left, kept, seconds = [], [], []
    for name, one in first.items():
        numbers = range(1, len(one.steps))
        means = [
            (float(number), mean([one.left(number, step.id) for step in one.steps[1 : number + 1]]))
            for number in numbers
        ]
        left.append(Curve(name, [(x, y) for x, y in means if y is not None]))
        shares = [(float(number), one.kept(number)) for number in (0, *numbers)]
        kept.append(Curve(name, [(x, y) for x, y in shares if y is not None]))
        seconds.append(Curve(name, [(float(s.number), s.seconds) for s in one.steps[1:]]))
    charts = [
        Chart("What is left of everything deleted so far", "requests", "share left", left),
        Chart("What is kept", "requests", "share of the start", kept),
        Chart("Time", "request", "seconds", seconds),
    ]
    filled = [[one for one in chart.curves if one.points] for chart in charts]
    return [
        Chart(chart.title, chart.x_label, chart.y_label, curves)
        for chart, curves in zip(charts, filled, strict=True)
        if curves
    ]


def _notes(
    rows: Sequence[Mapping[str, Any]],
    sequences: Mapping[str, Sequence[SequenceResult]],
    failed: Mapping[str, str],
) -> list[str]:
    last = max(row["requests"] for row in rows)
    end = [row for row in rows if row["requests"] == last and row["method"] in sequences]
    notes = []
    for column in ("forget degree", "retain utility"):
        known = [row for row in end if row[column] is not None]
        if known:
            order = sorted(known, key=lambda row: -row[column])
            told = ", ".join(f"{row['method']} {row[column]:.2f}" for row in order)
            notes.append(f"{column.capitalize()} after {last} requests: {told}.")
    worn = [
        (row["method"], row["requests"])
        for row in rows
        if row["method"] in sequences and row["retain utility"] is not None
        and row["retain utility"] < 0.5
    ]  # fmt: skip
    for name in dict.fromkeys(name for name, _ in worn):
        first = min(number for method, number in worn if method == name)
        notes.append(f"{name}: retain utility is below 0.5 after {first} requests.")
    skipped = {row["method"]: row["skipped"] for row in end if row["skipped"]}
    notes += [f"{name} skipped {count} requests as redundant." for name, count in skipped.items()]
    notes += [f"{name} ended early: {reason}" for name, reason in failed.items()]
    return notes


__all__ = ["REFERENCE", "START", "Point", "degree", "findings"]
