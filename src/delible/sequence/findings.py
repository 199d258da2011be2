"""What a sequence shows: a table, curves, and sentences computed from them."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from delible.measure.benchmark import Chart, Curve, Findings
from delible.sequence.result import SequenceResult, Step
from delible.sequence.undoing import undone

#: A request with more of its probability left than this has come back, or was not forgotten.
BACK = 0.5
#: Requests with a curve of their own, at most; of more, the mean and the worst are drawn.
CURVES = 8
GIB = 2**30


def findings(result: SequenceResult) -> Findings:
    """Table, charts and notes of a sequence, as far as it went."""
    steps = result.steps[1:]
    rows = [_row(result, step) for step in steps]
    return Findings(rows, _charts(result), _notes(result), result.rows())


def _row(result: SequenceResult, step: Step) -> dict[str, Any]:
    last = len(result.steps) - 1
    return {
        "request": step.id,
        "what": step.what,
        "before": result.start_of(step.id),
        "left after it": result.left(step.number, step.id),
        "left at the end": result.left(last, step.id),
        "most left since": _most(result, step),
        "all earlier, left": _earlier(result, step.number),
        "retained, kept": result.kept(step.number),
        "steps": step.steps,
        "seconds": step.seconds,
        "peak GiB": None if step.peak_bytes is None else step.peak_bytes / GIB,
        "result": step.state,
    }


def _lefts(result: SequenceResult, number: int) -> list[float]:
    """What is left of every request so far, after so many requests."""
    found = [result.left(number, one.id) for one in result.steps[1 : number + 1]]
    return [one for one in found if one is not None]


def _earlier(result: SequenceResult, number: int) -> float | None:
    lefts = _lefts(result, number)
    return fmean(lefts) if lefts else None


def _most(result: SequenceResult, step: Step) -> float | None:
    since = [result.left(number, step.id) for number in range(step.number, len(result.steps))]
    known = [one for one in since if one is not None]
    return max(known) if known else None


def _charts(result: SequenceResult) -> list[Chart]:
    numbers = range(1, len(result.steps))
    kept = [(float(n), one) for n in (0, *numbers) if (one := result.kept(n)) is not None]
    means = [(float(n), fmean(lefts)) for n in numbers if (lefts := _lefts(result, n))]
    worst = [(float(n), max(lefts)) for n in numbers if (lefts := _lefts(result, n))]
    forgetting = [Curve("mean of all so far", means), Curve("worst of all so far", worst)]
    if len(result.steps) - 1 <= CURVES:
        forgetting += [
            Curve(
                f"request {step.id}",
                [
                    (float(n), one)
                    for n in range(step.number, len(result.steps))
                    if (one := result.left(n, step.id)) is not None
                ],
            )
            for step in result.steps[1:]
        ]
    done = [one for one in result.steps if one.what == "done"]
    seconds = [(float(one.number), one.seconds) for one in done]
    peaks = [(float(s.number), s.peak_bytes / GIB) for s in done if s.peak_bytes]
    charts = [
        Chart("What is left of the requests", "requests done", "share left", forgetting),
        Chart("What is kept", "requests done", "share of the start", [Curve("retained", kept)]),
        Chart("Time", "request", "seconds", [Curve("seconds", seconds)]),
        Chart("Memory", "request", "peak GiB", [Curve("peak", peaks)]),
    ]
    filled = [[one for one in chart.curves if one.points] for chart in charts]
    return [
        Chart(chart.title, chart.x_label, chart.y_label, curves)
        for chart, curves in zip(charts, filled, strict=True)
        if curves
    ]


def _notes(result: SequenceResult) -> list[str]:
    steps, last = result.steps[1:], len(result.steps) - 1
    if not steps:
        return ["No request was carried out yet."]
    count = {what: [one.id for one in steps if one.what == what] for what in ("done", "covered")}
    skipped = [one for one in steps if one.what == "skipped"]
    notes = [f"{len(count['done'])} of {len(result.ids)} requests were carried out."]
    if len(steps) < len(result.ids):
        notes.append(f"It was interrupted before request {result.ids[len(steps)]}.")
    notes += [f"Request {one.id}: {one.told}" for one in steps if one.what == "covered"]
    notes += [f"Request {one.id} was skipped: {one.told}" for one in skipped]
    lefts = {one.id: result.left(last, one.id) for one in steps}
    known = {name: value for name, value in lefts.items() if value is not None}
    if known:
        worst = max(known, key=lambda name: known[name])
        notes.append(
            f"At the end {fmean(known.values()):.0%} of the probability of the answers to forget "
            f"is left on average, and {known[worst]:.0%} of request {worst}, the most."
        )
    back = [name for name, value in known.items() if _came_back(result, name, value)]
    if back:
        notes.append(f"Forgotten, and back after later requests: {', '.join(back)}.")
    never = [name for name, value in known.items() if value > BACK and name not in back]
    if never:
        notes.append(f"Not forgotten, more than half of it is left: {', '.join(never)}.")
    new = [one.id for one in steps if result.start_of(one.id) == 0]
    if new:
        notes.append(
            f"Not known before, so that nothing of it could be forgotten: {', '.join(new)}."
        )
    silent = [name for name, value in lefts.items() if value is None and name not in new]
    if silent:
        notes.append(f"Not measured, since its records cannot be asked: {', '.join(silent)}.")
    if since := undone(result):
        notes.append(f"Undone since, so that it is known again: {', '.join(since)}.")
    kept = result.kept(last)
    if kept is None:
        notes.append(
            "What else the model knows was not measured (there are no records to keep that it knew "
            "before): a model that lost everything would look the same."
        )
    else:
        ruined = ": the model lost most of what it should keep, so its forgetting shows little"
        told = f"Of the retained answers' probability {min(kept, 1.0):.0%} is kept"
        notes.append(f"{told}{ruined if kept < BACK else ''}.")
    measured = [one for one in steps if one.what == "done"]
    if len(measured) > 1:
        first, end = measured[0], measured[-1]
        notes.append(f"The first request took {first.seconds:g} s, the last {end.seconds:g} s.")
    return notes


def _came_back(result: SequenceResult, name: str, now: float) -> bool:
    step = next(one for one in result.steps if one.id == name)
    own = result.left(step.number, name)
    return own is not None and own <= BACK < now


__all__ = ["findings"]
