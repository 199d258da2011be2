"""What the meta-evaluation finds: a metric's numbers, its verdict, its row and chart, and notes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from delible.experiments.meta.readings import READINGS
from delible.experiments.meta.scores import Tested, Verdict, counted, judge, kept_utility, knowledge
from delible.measure.benchmark import Chart, Curve

#: One model: its title and its values by stage, or why it failed.
Model = dict[str, Any]
#: A fall of the model before by so much after relearning is damage.
DAMAGE = 0.05


def value(name: str, model: Model, stage: str, rows: Sequence[int] | None = None) -> float | None:
    """A model's number of one metric at a stage, of all forget records or of some."""
    seen = model.get(stage, {}).get(name)
    if seen is None:
        return None
    forget = seen["forget"] if rows is None else [seen["forget"][place] for place in rows]
    return knowledge(READINGS[name].how, forget, seen.get("holdout", ()))


def pooled(name: str, models: Mapping[str, Sequence[Model]]) -> dict[str, list[float | None]]:
    """The numbers of all models of P and of N."""
    return {pool: [value(name, one, "before") for one in models[pool]] for pool in ("P", "N")}


def verdict(
    name: str,
    models: Mapping[str, Sequence[Model]],
    rows: Sequence[int] | None,
    least_utility: float,
) -> Verdict:
    """What one metric is worth.

    Args:
        models: By what they are: P, N, original, reference, unlearned.
        rows: Places of the forget records that are asked after relearning; None: all.
        least_utility: Share of the utility that an unlearned model must keep.
    """
    (original,), (reference,) = models["original"], models["reference"]

    def relearned(model: Model) -> tuple[float | None, float | None]:
        before, after = (value(name, model, s, rows) for s in ("before", "relearned"))
        return before, after

    tested = [
        Tested(
            value(name, model, "before"),
            relearned(model),
            value(name, model, "quantized"),
            kept_utility(model.get("utility", {}), original.get("utility", {})),
        )
        for model in models["unlearned"]
    ]
    pools = pooled(name, models)
    return judge(pools["P"], pools["N"], relearned(reference), tested, least_utility)


def row(name: str, verdict: Verdict) -> dict[str, Any]:
    """A metric's row of the table; a stroke marks the symmetric forms."""
    return {
        "metric": name,
        "faithfulness": verdict.faithfulness,
        "threshold": verdict.threshold,
        "models": verdict.passed,
        "R": verdict.published.relearning,
        "Q": verdict.published.quantization,
        "robustness": verdict.published.both,
        "overall": verdict.overall,
        "R'": verdict.symmetric.relearning,
        "Q'": verdict.symmetric.quantization,
        "robustness'": verdict.symmetric.both,
        "overall'": verdict.symmetric_overall,
        "missing": "; ".join(verdict.missing),
    }


def chart(name: str, pools: Mapping[str, Sequence[float | None]]) -> Chart:
    """Share of the models of P and of N that have at most a value."""
    titles = {"P": "P: knows", "N": "N: never saw"}
    curves = []
    for pool, values in pools.items():
        told = sorted(value for value in values if value is not None)
        points = {value: place / len(told) for place, value in enumerate(told, 1)}
        curves.append(Curve(titles[pool], list(points.items())))
    return Chart(f"{name} over P and N", "value (larger = knows more)", "share of models", curves)


def notes(
    verdicts: Mapping[str, Verdict],
    models: Mapping[str, Sequence[Model]],
    least_utility: float,
    attacked: str,
) -> list[str]:
    """What a reader of the table must know.

    Args:
        attacked: A sentence on what was done to the models.
    """
    found: list[str] = []
    for title, told in (
        ("Faithfulness", {name: one.faithfulness for name, one in verdicts.items()}),
        ("Overall", {name: one.overall for name, one in verdicts.items()}),
    ):
        ranked = sorted(
            ((value, name) for name, value in told.items() if value is not None), reverse=True
        )
        if ranked:
            (high, best), (low, worst) = ranked[0], ranked[-1]
            found.append(f"{title}: from {best} ({high:.3f}) down to {worst} ({low:.3f}).")
    unlearned = models["unlearned"]
    useful = max(one.useful for one in verdicts.values())
    found.append(
        f"{useful} of {len(unlearned)} unlearned models kept at least "
        f"{least_utility:.0%} of the utility."
    )
    (original,) = models["original"]
    parts = original.get("utility", {})
    if few := [name for name in parts if name not in counted(parts)]:
        found.append(f"Not counted, since the model before has next to none: {', '.join(few)}.")
    found.append(attacked)
    if damaged := [name for name, verdict in verdicts.items() if _damaged(name, verdict, original)]:
        found.append(
            "Relearning costs even the model before some of its knowledge, in the eyes of "
            f"{', '.join(damaged)}: lower its rate (relearning_rate)."
        )
    found += [
        f"{model['title']} is missing: {model['failed']}"
        for group in models.values()
        for model in group
        if "failed" in model
    ]
    return found


def _damaged(name: str, verdict: Verdict, original: Model) -> bool:
    """Whether the model before knows less after relearning, as far as the metric can tell."""
    before, after = (value(name, original, stage) for stage in ("before", "relearned"))
    if before is None or after is None or (verdict.faithfulness or 0) <= 0.5:
        return False
    return after < before - DAMAGE
