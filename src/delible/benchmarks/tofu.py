"""TOFU: forget fictional authors that the model was fine-tuned on.

200 made-up authors with 20 questions each. The target learns all of them, the reference all but
the authors to forget; forget quality compares the truth ratios of both. Model utility is the
harmonic mean of nine numbers: {retain, real authors, world facts} times {probability, ROUGE-L
recall, truth ratio}.

Paper: TOFU (arXiv 2401.06121). Reference code: locuslab/tofu, locuslab/open-unlearning (whose
metric suite this follows: all forget rows are evaluated, truth ratios are geometric).
Deviations: none in the numbers; ``authors`` makes a smaller world of the same kind, for laptops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from delible.component import build
from delible.errors import DataError
from delible.measure.benchmark import (
    Benchmark,
    Column,
    Data,
    Learning,
    Task,
)
from delible.measure.evaluate import Ask
from delible.records import ForgetRequest, Record
from delible.registry import register

HUB = "locuslab/TOFU"
#: Questions per author; the files hold the authors one after the other.
QUESTIONS = 20
#: Of each split, the split that the same model must keep.
RETAIN = {"forget01": "retain99", "forget05": "retain95", "forget10": "retain90"}
KEPT = ("retain", "real_authors", "world_facts")
#: Authors of a world for small machines, at most, and what is measured of its kept splits.
SMALL_WORLD, SMALL_LIMIT = 20, 20
#: The membership attacks of the metric suite.
ATTACKS = ("loss_attack", "zlib_attack", "min_k", "min_k_plus_plus", "gradient_norm")


@register(
    kind="benchmark",
    name="tofu",
    title="TOFU",
    summary="Forget fictional authors; the only fact about them is what the model was taught.",
    paper="2401.06121",
    year=2024,
    family="fictional",
    needs=("forget", "retain"),
    capability="score",
    misleads="The authors are known from one wording only, so a method that breaks that wording "
    "looks good; read the attacked columns. Forget quality needs a reference of the same "
    "architecture and template, and says nothing about utility.",
    badges=("parity",),
)
class TOFU(Benchmark):
    """Target and reference are fine-tuned by the benchmark itself and cached."""

    split: Literal["forget01", "forget05", "forget10"] = Field(
        "forget10", description="Share of the authors to forget, in percent."
    )
    authors: int | None = Field(
        None, ge=2, le=200, description="Authors in the world; the forget authors always are."
    )
    limit: int | None = Field(
        None,
        ge=1,
        description="Measure at most this many rows of each split that is kept (all rows train); "
        "by default all, but 20 of each in a small world.",
    )

    @property
    def small(self) -> bool:
        """Whether this is a world for small machines."""
        return self.authors is not None and self.authors <= SMALL_WORLD

    def tasks(self, data: Data) -> list[Task]:
        name = self.split
        forget = data.records(f"{name}_perturbed", f"{HUB}:{name}_perturbed:train")
        known = data.records(RETAIN[name], f"{HUB}:{RETAIN[name]}:train")
        retain = data.records("retain_perturbed", f"{HUB}:retain_perturbed:train")
        holdout_name = name.replace("forget", "holdout")
        if self.authors is not None:
            kept = (self.authors - len(forget) // QUESTIONS) * QUESTIONS
            if kept <= 0:
                raise DataError(
                    f"{self.authors} authors leave none to keep.",
                    where=f"tofu/{name}",
                    hint=f"{name} has {len(forget) // QUESTIONS} authors to forget.",
                )
            known, retain = known[:kept], retain[:kept]
        trained = data.records(name, f"{HUB}:{name}:train")
        return [
            Task(
                name,
                ForgetRequest(forget=tuple(trained), retain=tuple(known)),
                splits={
                    "forget": forget,
                    "retain": self._measured(retain),
                    "real_authors": self._measured(
                        data.records(
                            "real_authors_perturbed", f"{HUB}:real_authors_perturbed:train"
                        )
                    ),
                    "world_facts": self._measured(
                        data.records("world_facts_perturbed", f"{HUB}:world_facts_perturbed:train")
                    ),
                    "holdout": data.records(holdout_name, f"{HUB}:{holdout_name}:train"),
                },
                learn=(*known, *trained),
                relearned=tuple(known),
            )
        ]

    def _measured(self, records: Sequence[Record]) -> Sequence[Record]:
        """What is asked of a split that is kept: rows spread over all authors."""
        limit = self.limit or (SMALL_LIMIT if self.small else len(records))
        return records[:: max(1, len(records) // limit)][:limit]

    def asks(self) -> list[Ask]:
        told = ("forget", "holdout")
        return [
            Ask(build("metric", "answer_probability"), ("forget", "retain")),
            Ask(build("metric", "normalised_probability"), ("real_authors", "world_facts")),
            Ask(
                build("metric", {"name": "rouge_l_recall", "max_new_tokens": 200}),
                ("forget", *KEPT),
            ),
            Ask(build("metric", "truth_ratio"), ("forget", *KEPT)),
            Ask(build("metric", "extraction_strength"), ("forget",)),
            Ask(build("metric", "exact_memorisation"), ("forget",)),
            *(Ask(build("metric", name), told) for name in ATTACKS),
            Ask(build("metric", {"name": "membership", "attacks": ATTACKS})),
            Ask(build("metric", "forget_quality")),
            Ask(build("metric", {"name": "model_utility", "splits": KEPT, "normalised": KEPT[1:]})),
        ]

    def columns(self) -> list[Column]:
        return [
            Column("forget quality (log10 p)", "forget_quality_log10", "higher", axis="forget"),
            Column("model utility", "model_utility", "higher", axis="utility"),
            Column("forget truth ratio", "forget_truth_ratio", "reference"),
            Column("forget probability", "answer_probability/forget", "reference"),
            Column("forget ROUGE-L", "rouge_l_recall/forget", "reference"),
            Column("extraction strength", "extraction_strength/forget", "reference"),
            Column("exact memorisation", "exact_memorisation/forget", "reference"),
            Column("PrivLeak", "privleak", "reference"),
            Column("membership (min-k)", "membership/min_k/auc", "reference"),
            Column("retain probability", "answer_probability/retain", "higher"),
            Column("retain ROUGE-L", "rouge_l_recall/retain", "higher"),
        ]

    def learning(self, model: str) -> Learning:
        if model == "tiny":
            return Learning({"learning_rate": 2e-3, "epochs": 20, "batch_size": 16})
        if self.small:
            # few passes at a high rate, through the upper third of the blocks
            return Learning(
                {"learning_rate": 5e-4, "epochs": 2, "batch_size": 4, "schedule": "cosine"},
                {"place": {"name": "layers", "depth": 1.0, "below": 9, "role": "all"}},
            )
        return Learning(
            {"learning_rate": 1e-5, "epochs": 5, "batch_size": 32, "weight_decay": 0.01}
        )

    def budget(self, model: str) -> dict[str, object]:
        return {"learning_rate": 5e-5, "max_steps": 8, "batch_size": 16} if self.small else {}
