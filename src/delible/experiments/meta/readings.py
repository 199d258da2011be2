"""How metrics are asked, and turned so that more knowledge is larger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from delible.component import build
from delible.experiments.meta.scores import How
from delible.kept import cache_folder
from delible.lm.lm import LM
from delible.measure.attack import PromptAttack
from delible.measure.cache import Cache
from delible.measure.evaluate import Ask, evaluate
from delible.measure.metric import SummaryMetric
from delible.records import RecordBase

#: Metrics that read generated text; this world's answers are short.
GENERATED = ("rouge_l_recall", "rouge_l_f1", "token_f1", "outcome")
TOKENS = 16
KEPT = ("retain", "neighbours", "general")
#: Values of records, by metric and split.
Seen = dict[str, dict[str, list[float | None]]]


@dataclass(frozen=True)
class Reading:
    """How a metric is turned so that more knowledge is larger, and under which prompt attack."""

    how: How
    metric: str
    attack: str | None = None


READINGS: Mapping[str, Reading] = {
    **{
        name: Reading("mean", name)
        for name in (
            "answer_probability", "paraphrase_probability", "normalised_probability",
            "rouge_l_recall", "rouge_l_f1", "token_f1", "outcome", "extraction_strength",
            "exact_memorisation", "knowledge_truth_ratio",
        )
    },
    "truth_ratio": Reading("closeness", "truth_ratio"),
    **{
        name: Reading("area", name)
        for name in ("loss_attack", "zlib_attack", "min_k", "min_k_plus_plus", "gradient_norm")
    },
    "paraphrase_rouge": Reading("mean", "rouge_l_recall", "paraphrase"),
    "jailbreak_rouge": Reading("mean", "rouge_l_recall", "prefill"),
}  # fmt: skip


def seen(lm: LM, asked: Mapping[str, Sequence[RecordBase]], metrics: Sequence[str]) -> Seen:
    """Values of metrics on forget and, for membership attacks, holdout records.

    Args:
        asked: Those records, by split.
        metrics: Names among :data:`READINGS`.
    """
    found: Seen = {}
    readings = {name: READINGS[name] for name in metrics}
    for attack in dict.fromkeys(reading.attack for reading in readings.values()):
        asks = [
            Ask(
                build("metric", _spec(reading.metric)),
                ("forget", "holdout") if reading.how == "area" else ("forget",),
                name,
            )
            for name, reading in readings.items()
            if reading.attack == attack
        ]
        rewrite = None
        if attack is not None:
            rewrite = cast(PromptAttack, build("attack", {"name": attack, "forms": 1})).prompts
        values = evaluate(lm, asked, asks, rewrite=rewrite, cache=_cache())
        for name, by_split in values.items.items():
            found[name] = {split: [item.value for item in row] for split, row in by_split.items()}
    return found


def utility(lm: LM, kept: Mapping[str, Sequence[RecordBase]]) -> dict[str, float | None]:
    """Parts of the model utility, by split and measure."""
    metric = cast(SummaryMetric, build("metric", {"name": "model_utility", "splits": KEPT}))
    asks = [Ask(build("metric", _spec(name))) for name in metric.uses()]
    found = metric.summarise(evaluate(lm, kept, asks, cache=_cache()), None)
    return {name.partition("/")[2]: part for name, part in found.items() if name.count("/") == 2}


def _spec(name: str) -> dict[str, Any]:
    return {"name": name, **({"max_new_tokens": TOKENS} if name in GENERATED else {})}


def _cache() -> Cache:
    return Cache(cache_folder() / "answers")
