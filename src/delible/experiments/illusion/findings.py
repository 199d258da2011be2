"""What came back: gaps by method and number, illusions, and what decides how to read them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from delible.bench.stages import mean
from delible.experiments.illusion.readings import METRICS
from delible.measure.benchmark import Chart, Curve, Findings
from delible.search.illusion import FALSE, FORGOTTEN, Story, scaled, share

ORIGINAL, RETRAINED = "original", "retrained"
FORGET, SURROGATE, PARAPHRASE, UNRELATED, UNSEEN = (
    "forget", "surrogate", "paraphrase", "unrelated", "unseen",
)  # fmt: skip
SETS = (FORGET, SURROGATE, PARAPHRASE, UNRELATED)
RAW = "values (in this order)"
#: Two ends of a scale that are nearer than that tell nothing apart.
LEAST = 0.05
#: A surrogate set and its limits, and what models say: set -> metric -> one value per text.
Cell = Mapping[str, Any]
Read = Mapping[str, Mapping[str, Sequence[float | None]]]


def level(read: Read, texts: str, metric: str) -> float | None:
    """Mean of a number over a set of texts."""
    return mean(read[texts][metric])


def ends(
    models: Mapping[str, Read], reference: str, texts: str, metric: str
) -> tuple[float, float] | None:
    """Where a scale is 0 and where it is 1; None where either is not known.

    Args:
        reference: ``"retrained"``: that model on the same texts; ``"unseen"``: what the original
            says of texts that nobody saw.
    """
    first = level(models[ORIGINAL], texts, metric)
    if reference == RETRAINED:
        last = level(models[RETRAINED], texts, metric)
    else:
        last = level(models[ORIGINAL], UNSEEN, metric)
    return None if first is None or last is None else (first, last)


def story(models: Mapping[str, Read], reference: str, read: Read, metric: str) -> dict[str, Any]:
    """What a number says of a model, scaled, on every set; the gaps; whether it is an illusion.

    On unrelated texts the two ends may well be alike, so there the scale of the forget texts says
    how far the number moved.
    """
    told: dict[str, float | None] = {
        texts: _on(ends(models, reference, texts, metric), level(read, texts, metric), scaled)
        for texts in (FORGET, SURROGATE, PARAPHRASE)
    }
    found = Story(told[FORGET], told[SURROGATE])
    near = Story(told[FORGET], told[PARAPHRASE])
    moved = _moved(models, reference, read, metric)
    own = told[FORGET]
    beyond = None if own is None or moved is None else own - moved
    return {
        **told, UNRELATED: moved, "gap": found.gap, "gap to paraphrases": near.gap,
        "gap to unrelated": beyond, "illusion": None if found.gap is None else found.false,
    }  # fmt: skip


def _on(
    scale: tuple[float, float] | None,
    value: float | None,
    how: Callable[[float, float, float, float], float | None],
) -> float | None:
    return None if scale is None or value is None else how(value, *scale, LEAST)


def _moved(models: Mapping[str, Read], reference: str, read: Read, metric: str) -> float | None:
    scale = ends(models, reference, FORGET, metric)
    before, after = (level(one, UNRELATED, metric) for one in (models[ORIGINAL], read))
    if scale is None or before is None or after is None:
        return None
    return share(scale[0] + after - before, *scale, LEAST)


def rank_correlation(one: Sequence[float | None], other: Sequence[float | None]) -> float | None:
    """Spearman's, over what both have; None for fewer than three, or where one is constant."""
    from scipy.stats import spearmanr

    both = [(x, y) for x, y in zip(one, other, strict=True) if x is not None and y is not None]
    columns = np.asarray(both, float).reshape(-1, 2)
    if len(both) < 3 or np.ptp(columns, axis=0).min() < 1e-9:
        return None
    return float(spearmanr(columns[:, 0], columns[:, 1]).statistic)


def rates(runs: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, int]]:
    """By number: illusions, and the runs that could be one."""
    found = {}
    for metric in METRICS:
        marks = [run["illusion"] for run in runs
                 if run["metric"] == metric and run["illusion"] is not None]  # fmt: skip
        found[metric] = (sum(marks), len(marks))
    return found


def correlations(
    found: Mapping[str, Sequence[Read]], models: Mapping[str, Read], reference: str
) -> dict[str, float | None]:
    """By number: do methods stand in the same order on forget texts and on surrogates?"""

    def along(metric: str, texts: str) -> list[float | None]:
        scale = ends(models, reference, texts, metric)
        means = [mean([level(read, texts, metric) for read in reads]) for reads in found.values()]
        return [_on(scale, value, share) for value in means]

    return {
        metric: rank_correlation(along(metric, FORGET), along(metric, SURROGATE))
        for metric in METRICS
    }


def findings(
    texts: Cell, models: Mapping[str, Read], found: Mapping[str, Sequence[Cell]], reference: str
) -> Findings:
    """The gap table, illusion rates, rank correlations, and what the sets are like.

    Args:
        texts: What the search made (see the experiment).
        models: What the original and the retrained model say.
        found: By method, one cell per seed.
    """
    done = {name: [cell for cell in cells if "failed" not in cell] for name, cells in found.items()}
    reads: dict[str, list[Read]] = {name: [dict(cell) for cell in cells]
                                    for name, cells in done.items() if cells}  # fmt: skip
    every = {**{name: [read] for name, read in models.items()}, **reads}
    runs = [
        {
            "method": name, "seed": seed, "metric": metric,
            **story(models, reference, read, metric),
            **{f"{texts_of}, values": list(read[texts_of][metric]) for texts_of in SETS},
        }
        for name, group in every.items() for seed, read in enumerate(group) for metric in METRICS
    ]  # fmt: skip
    rows = [_row(name, metric, runs) for name in every for metric in METRICS]
    own = [run for run in runs if run["method"] in reads]
    notes = [*_about(texts), *_control(models), *_told(rates(own))]
    for metric, value in correlations(reads, models, reference).items():
        if value is not None:
            notes.append(f"{metric}: methods' ranks on forget texts and surrogates correlate "
                         f"by {value:.2f}.")  # fmt: skip
    notes += [f"{name}: {cell['failed']}" for name, cells in found.items() for cell in cells
              if "failed" in cell]  # fmt: skip
    notes += [f"{name} takes questions only: each forget text was given as a question for its "
              "second half." for name, cells in done.items()
              if any(cell.get("as questions") for cell in cells)]  # fmt: skip
    sizes = [
        Curve(name, [(float(at), run["gap"]) for at, metric in enumerate(METRICS)
                     for run in rows if run["method"] == name and run["metric"] == metric
                     and run["gap"] is not None])
        for name in reads
    ]  # fmt: skip
    axis = ", ".join(f"{at} = {metric}" for at, metric in enumerate(METRICS))
    chart = Chart("How much more is forgotten of the forget texts", axis, "gap", sizes)
    known = ("gains", "distances", "losses")
    shown = [
        {"title": "surrogate", "text": text, **{key: texts[key][at] for key in known}}
        for at, text in enumerate(texts["sets"][SURROGATE][:20])
    ]
    return Findings(
        rows, [chart] if sizes else [], notes, [*runs, *shown], (FORGET, SURROGATE, PARAPHRASE)
    )


def rows_of(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Runs as cells of a table that is kept as Parquet: scaled numbers, and values by text."""
    found = []
    for run in runs:
        if "metric" not in run:
            continue
        keys = (FORGET, SURROGATE, PARAPHRASE, UNRELATED, "gap", "illusion")
        sizes = {
            f"{run['metric']}/{key}": None if run[key] is None else float(run[key]) for key in keys
        }
        values = {texts: [(value, None, None) for value in run[f"{texts}, values"]]
                  for texts in SETS}  # fmt: skip
        found.append({
            "task": "illusion", "method": run["method"], "seed": run["seed"], "numbers": sizes,
            "values": {"items": {run["metric"]: values}},
        })  # fmt: skip
    return found


def _row(name: str, metric: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    mine = [run for run in runs if run["method"] == name and run["metric"] == metric]
    marks = [run["illusion"] for run in mine if run["illusion"] is not None]
    raw = {texts: mean([mean(run[f"{texts}, values"]) for run in mine]) for texts in SETS}
    return {
        "method": name,
        "metric": metric,
        **{key: mean([run[key] for run in mine]) for key in (*SETS, "gap")},
        "illusion": f"{sum(marks)} of {len(marks)}" if marks else "cannot be told",
        RAW: " ".join("–" if value is None else f"{value:.2f}" for value in raw.values()),
    }


def _about(texts: Cell) -> list[str]:
    """What the sets are like, and what the search threw away."""
    found = []
    for name, numbers in texts["about"].items():
        found.append(
            f"{numbers['texts']} {name} texts: gain {numbers['gain']:.3f} nats by token, loss "
            f"{numbers['loss']:.2f}, distance to the nearest forget text {numbers['distance']:.2f}."
        )
    if texts["limits"]:
        limit = texts["limits"]
        found.append(
            f"Surrogates lie at least {limit['distance']:.3f} away, gain more than "
            f"{limit['gain']:.3f} and lose at most {limit['loss']:.2f} nats by token."
        )
    if texts["dropped"]:
        said = ", ".join(f"{reason}: {count}" for reason, count in texts["dropped"].items())
        found.append(f"Thrown away: {said}.")
    if abs(texts["about"][UNRELATED]["gain"]) >= 0.05:
        found.append("Fine-tuning on the forget texts also changed the loss of unrelated ones, so "
                     "part of a surrogate's gain is style.")  # fmt: skip
    if texts["about"][SURROGATE]["gain"] > texts["about"][FORGET]["gain"]:
        found.append(
            "Surrogates gain more than the forget texts, which the original knows too well to gain "
            "from them: fewer epochs of learning leave them more."
        )
    found += [f"Surrogate: {text}" for text in texts["sets"][SURROGATE][:5]]
    return found


def _control(models: Mapping[str, Read]) -> list[str]:
    """Whether a model that never saw the forget texts tells the surrogates from what it knows."""
    if RETRAINED not in models:
        return []
    found = []
    for metric in METRICS:
        before, after = (level(models[name], SURROGATE, metric) for name in (ORIGINAL, RETRAINED))
        if before is not None and after is not None and abs(before - after) < LEAST:
            found.append(metric)
    if not found:
        return []
    return [f"The retrained model knows the surrogates as well as the original by "
            f"{', '.join(found)}: nothing of them could be forgotten there."]  # fmt: skip


def _told(found: Mapping[str, tuple[int, int]]) -> list[str]:
    told = [f"{metric} in {count} of {of} runs" for metric, (count, of) in found.items() if of]
    if not told:
        return ["No number can tell an illusion: its two ends are alike on one of the sets."]
    return [f"Illusions (at least {FORGOTTEN} forgotten, gap at least {FALSE}): "
            f"{', '.join(told)}."]  # fmt: skip


__all__ = ["ORIGINAL", "RETRAINED", "correlations", "ends", "findings", "level",
           "rank_correlation", "rates", "story"]  # fmt: skip
