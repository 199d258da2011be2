"""What the path experiment's curves show: its table, charts and notes (arXiv 2510.16629).

No benchmark lives here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from delible.bench.stages import at, curve_distance, first_crossing, mean, spread
from delible.errors import RunError
from delible.experiments.path.linear import Example, divergence
from delible.experiments.path.rows import FORGOTTEN
from delible.measure.benchmark import Chart, Curve, Findings

#: Places of the refusals among the four stages.
ORDINALS = ("1st", "2nd", "3rd", "last")


def findings(
    found: Mapping[str, Sequence[Mapping[str, Any]]], failed: Mapping[str, str]
) -> Findings:
    """Table, charts and notes.

    Args:
        found: By method, one mapping per seed: ``seed``, ``paths`` (curves by position) and
            ``apart`` (divergence by pair of positions).
        failed: Why a method has no run, by its name.
    """
    rows: list[dict[str, Any]] = []
    charts: list[Chart] = []
    notes: list[str] = []
    runs: list[dict[str, Any]] = []
    done = {method: seeds for method, seeds in found.items() if seeds}
    for method, seeds in done.items():
        by_seed = [path_numbers(one["paths"]) for one in seeds]
        places = sorted(by_seed[0])
        runs += [
            {"method": method, "refusals learned": ORDINALS[int(place) - 1], "seed": one["seed"],
             **numbers, **_divergence(place, one["apart"])}
            for one, by_place in zip(seeds, by_seed, strict=True)
            for place, numbers in sorted(by_place.items())
        ]  # fmt: skip
        table = [
            {
                "method": method,
                "refusals learned": ORDINALS[int(place) - 1],
                **{
                    title: mean([numbers[place][title] for numbers in by_seed])
                    for title in by_seed[0][place]
                },
            }
            for place in places
        ]
        differing = {
            title: mean([spread([one[place][title] for place in places]) for one in by_seed])
            for title in by_seed[0][places[0]]
        }
        rows += [*table, {"method": method, "refusals learned": "spread", **differing}]
        charts += _charts(method, seeds)
        notes += _notes(method, by_seed, seeds, differing)
    if done:
        charts.append(_between(done))
    notes += [f"{method} failed: {reason}" for method, reason in failed.items()]
    chart, note = linear_theorem()
    return Findings(rows, [*charts, chart], [*notes, note], runs)


def _divergence(place: str, pairs: Mapping[str, Sequence[float | None]]) -> dict[str, float | None]:
    """How far a path is from the others before and after unlearning, in nats."""
    mine = [curve for pair, curve in pairs.items() if place in pair.split()]
    return {
        "KL to the other paths before": mean([curve[0] for curve in mine]),
        "KL to the other paths after": mean([curve[-1] for curve in mine]),
    }


def forget_scores(curve: Sequence[float | None]) -> list[float | None]:
    """How far a curve has fallen since its first point."""
    start = curve[0]
    return [None if value is None or start is None else start - value for value in curve]


def utilities(curve: Sequence[float | None]) -> list[float | None]:
    """1 - |change since the first point|."""
    return [None if fall is None else 1 - abs(fall) for fall in forget_scores(curve)]


def path_numbers(paths: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """The numbers of every path of one method and seed, by position.

    The equal score is the highest that every path reaches; None where one never forgets.
    """
    scores = {p: forget_scores(one["curves"][f"{FORGOTTEN} all"]) for p, one in paths.items()}
    tops = [max((v for v in curve if v is not None), default=0.0) for curve in scores.values()]
    level = min(tops)
    ends = {place: curve[-1] for place, curve in scores.items()}
    found: dict[str, dict[str, float | None]] = {}
    for place, one in paths.items():
        curves, steps = one["curves"], one["steps"]
        people = utilities(curves["people"])
        where = first_crossing(scores[place], level) if level > 0 else None
        others = [other for other in paths if other != place]
        before, after = one["sums"]
        mine = ends[place]
        found[place] = {
            "opening before": curves[f"{FORGOTTEN} opening"][0],
            "opening after": curves[f"{FORGOTTEN} opening"][-1],
            "forget score": mine,
            "forget score, unseen questions": forget_scores(curves["unseen all"])[-1],
            "slowness (1 = fastest)": None if mine is None or None in ends.values() else float(
                1 + sum(score > mine for score in ends.values() if score is not None)
            ),
            "steps to equal score": None if where is None else at(steps, where),
            "people before": curves["people"][0],
            "people utility": people[-1],
            "people utility at equal score": None if where is None else at(people, where),
            "sums before": before,
            "sums change": None if before is None or after is None else after - before,
            "KL to retrained before": curves["retrained"][0],
            "KL to retrained after": curves["retrained"][-1],
            "distance of curves": mean(
                [curve_distance(scores[place], scores[other]) for other in others]
            ),
        }  # fmt: skip
    return found


def linear_theorem(seed: int = 0, strength: float = 1.0, rate: float = 0.02, steps: int = 25) -> (
    tuple[Chart, str]
):  # fmt: skip
    """The theorem on one drawn example: the measured distance and what it is at least."""
    example = Example.drawn(seed)
    one, two = example.histories(strength)
    known = divergence(one - two, example.forget[0], example.tests, rate)
    if known is None:
        raise RunError("the drawn example has no path dependence.", where=f"seed {seed}")
    measured = example.curve(strength, rate, steps)
    start = known.holds_from
    lines = [
        Curve("measured", [(float(t), float(np.log10(d))) for t, d in enumerate(measured)]),
        Curve(
            "at least",
            [(float(t), float(np.log10(known.bound(t)))) for t in range(start, steps + 1)],
        ),
    ]
    note = (
        f"Linear regression: the distance of two orders grows from {measured[0]:.3g} to "
        f"{measured[-1]:.3g} in {steps} steps of ascent; from step {start} on it is at least "
        f"{known.bound(start):.3g}, growing by {100 * ((1 + known.rate) ** 2 - 1):.1f} % a step."
    )
    return Chart("Linear regression: distance of two orders", "step", "log10 distance", lines), note


def _line(name: str, steps: Sequence[int], by_seed: Sequence[Sequence[float | None]]) -> Curve:
    points = [(float(s), mean(values)) for s, *values in zip(steps, *by_seed, strict=False)]
    return Curve(name, [(x, y) for x, y in points if y is not None])


def _charts(method: str, seeds: Sequence[Mapping[str, Any]]) -> list[Chart]:
    places = sorted(seeds[0]["paths"])
    drawn = {
        ("Forgetting", "forget score"): lambda c: forget_scores(c[f"{FORGOTTEN} all"]),
        ("People", "mean log-likelihood"): lambda c: c["people"],
        ("Distance to the retrained model", "KL, nats"): lambda c: c["retrained"],
    }
    return [
        Chart(
            f"{title}: {method}",
            "step",
            label,
            [
                _line(
                    f"refusals {ORDINALS[int(place) - 1]}",
                    seeds[0]["paths"][place]["steps"],
                    [value(one["paths"][place]["curves"]) for one in seeds],
                )
                for place in places
            ],
        )
        for (title, label), value in drawn.items()
    ]


def _between(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> Chart:
    """How far apart the paths are, on average over pairs, by method."""
    lines = []
    for method, seeds in found.items():
        steps = next(iter(seeds[0]["paths"].values()))["steps"]
        rows = [row for one in seeds for row in one["apart"].values()]
        lines.append(_line(method, steps, rows))
    return Chart("Divergence between paths", "step", "mean of both KL, nats", lines)


def _notes(
    method: str,
    by_seed: Sequence[Mapping[str, Mapping[str, float | None]]],
    seeds: Sequence[Mapping[str, Any]],
    differing: Mapping[str, float | None],
) -> list[str]:
    rank, last = "slowness (1 = fastest)", str(len(ORDINALS))
    notes = []
    gap = differing["forget score"]
    if gap is not None:
        notes.append(f"{method}: forget scores of the paths lie {gap:.3g} nats apart.")
    ranks = [numbers[last][rank] for numbers in by_seed if last in numbers]
    if ranks and None not in ranks:
        slowest = sum(value == len(by_seed[0]) for value in ranks)
        notes.append(
            f"{method}: refusals learned last are forgotten slowest in {slowest} of {len(ranks)} "
            f"{'run' if len(ranks) == 1 else 'runs'}."
        )
    if any(numbers[p]["steps to equal score"] is None for numbers in by_seed for p in numbers):
        notes.append(f"{method}: one path never forgets, so there is no equal score to compare at.")
    notes += sorted(
        f"{method}, refusals {ORDINALS[int(place) - 1]}: {cell['stopped']}"
        for one in seeds for place, cell in one["paths"].items() if cell["stopped"]
    )  # fmt: skip
    return notes
