"""Model utility: what is left of everything that should be kept, as one harmonic mean.

    over the splits retain, neighbours and general that are there, and for each of them
    - probability: plain; on general, normalised by the perturbed answers
    - ROUGE-L recall of the greedy answer
    - truth ratio: mean of max(0, 1 - TR)

Paper: TOFU (arXiv 2401.06121), whose nine parts are {retain, real authors, world facts} times
these three; reference code: locuslab/tofu, locuslab/open-unlearning. Deviation: the splits are
those of the forget request, so the value compares systems on the same records only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field

from delible.errors import RecipeError
from delible.measure.metric import SummaryMetric, SystemValues
from delible.registry import register


def harmonic_mean(parts: Sequence[float]) -> float | None:
    """Harmonic mean of non-negative numbers: 0 as soon as one is 0; ``None`` of nothing."""
    if not parts:
        return None
    if min(parts) <= 0:
        return 0.0
    return len(parts) / float(sum(1 / part for part in parts))


def _truth_preference(values: SystemValues, split: str) -> float | None:
    items = values.items.get("truth_ratio", {}).get(split, ())
    ratios = [item.value for item in items if item.value is not None]
    return float(np.mean([max(0.0, 1 - ratio) for ratio in ratios])) if ratios else None


@register(
    kind="metric",
    name="model_utility",
    title="Model utility",
    summary="Harmonic mean of probability, ROUGE-L recall and truth ratio over what is kept.",
    paper="2401.06121",
    year=2024,
    family="utility",
    capability="score",
    changes="nothing",
    range="[0, 1]",
    direction="High: retained, neighbouring and general knowledge is intact.",
    misleads="0 as soon as one part is 0. Depends on which splits and measures are there: compare "
    "systems measured alike (the parts and their number are given), on the same records.",
    badges=("parity",),
)
class ModelUtility(SummaryMetric):
    """Keys: ``model_utility``, ``model_utility_parts`` (how many parts there are) and
    ``model_utility/SPLIT/PART``; a part that could not be measured is ``None`` and left out of
    the mean.
    """

    splits: tuple[str, ...] = Field(
        ("retain", "neighbours", "general"), description="Splits that count, where present."
    )
    normalised: tuple[str, ...] = Field(
        ("general",), description="Splits whose probability is set against the wrong answers'."
    )

    def uses(self) -> tuple[str, ...]:
        return ("answer_probability", "normalised_probability", "rouge_l_recall", "truth_ratio")

    def parts(self, values: SystemValues) -> dict[str, float | None]:
        """The parts by ``SPLIT/PART``, for the splits that were measured.

        Raises:
            RecipeError: The truth ratios are not raw.
        """
        if values.options.get("truth_ratio", {}).get("form", "raw") != "raw":
            raise RecipeError(
                "model utility needs raw truth ratios, but the values have another form.",
                where=f"truth_ratio of '{values.system}'",
                hint="Measure truth_ratio with form: raw.",
            )
        measured = {split for by_split in values.items.values() for split in by_split}
        found: dict[str, float | None] = {}
        for split in self.splits:
            if split not in measured:
                continue
            probability = (
                "normalised_probability" if split in self.normalised else "answer_probability"
            )
            found[f"{split}/{probability}"] = values.means.get(probability, {}).get(split)
            found[f"{split}/rouge_l_recall"] = values.means.get("rouge_l_recall", {}).get(split)
            found[f"{split}/truth_ratio"] = _truth_preference(values, split)
        return found

    def summarise(
        self, values: SystemValues, reference: SystemValues | None
    ) -> dict[str, float | None]:
        parts = self.parts(values)
        there = [part for part in parts.values() if part is not None]
        return {
            "model_utility": harmonic_mean(there),
            "model_utility_parts": float(len(there)),
            **{f"model_utility/{name}": part for name, part in parts.items()},
        }

    def relative(self, values: SystemValues, before: SystemValues) -> float | None:
        """Utility as a share of another system's, over the parts that both have.

        A guarded system gives no probabilities, so its plain utility has fewer parts than that
        of the model behind it; this is the number to compare them by.

        Returns:
            A value in [0, inf); ``None`` without common parts or when ``before`` has utility 0.
        """
        ours, theirs = self.parts(values), self.parts(before)
        pairs = [
            (part, theirs[name])
            for name, part in ours.items()
            if part is not None and theirs.get(name) is not None
        ]
        now = harmonic_mean([part for part, _ in pairs])
        then = harmonic_mean([part for _, part in pairs if part is not None])
        return now / then if now is not None and then else None
