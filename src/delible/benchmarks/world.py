"""World: forget people of a made-up world whose every fact, alias and link is known exactly.

Target and reference learn the world with and without the people to forget. Besides the questions
that were trained, the same facts are asked in other words, as a choice, as a cloze, in reverse,
and through chains of two facts; neighbours are people who share a place, a work or a relation
with the forgotten.

Ours; the data is made by :mod:`delible.world`. The metric suite is that of TOFU
(arXiv 2401.06121) with extraction strength, exact memorisation and membership
(arXiv 2506.12618) and classes of outcome.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from delible.component import build
from delible.measure.benchmark import (
    Benchmark,
    Column,
    Data,
    Learning,
    Task,
)
from delible.measure.evaluate import Ask
from delible.records import ForgetRequest, RecordBase
from delible.registry import register
from delible.world import World, general

#: One fact of each kind per person.
RELATIONS = ("birthplace", "occupation", "employer", "award", "instrument")
#: Splits of the forgotten facts in other forms than the trained one.
FORMS = ("choice", "cloze", "reverse", "multi_hop")
TRAINED = ("forget", "retain", "neighbours")
GENERATED = {"max_new_tokens": 16}


@register(
    kind="benchmark",
    name="world",
    title="World",
    summary="Forget people of a made-up world; every form of every fact has exact ground truth.",
    year=2026,
    family="fictional",
    needs=("forget", "retain"),
    capability="score",
    misleads="Short answers in few wordings: a small world is easier to forget, and easier to "
    "relearn, than what a model read a thousand times. Model utility is over retained and "
    "neighbouring people only: read the general questions beside it.",
)
class WorldBenchmark(Benchmark):
    """One world, one set of people to forget; target and reference are cached."""

    people: int = Field(20, ge=4, description="People in the world.")
    forget: int = Field(2, ge=1, description="People to forget.")
    world_seed: int = Field(0, ge=0, description="Seed of the world.")
    limit: int | None = Field(None, ge=1, description="Measure at most so many rows per split.")

    def tasks(self, data: Data) -> list[Task]:
        world = World(people=self.people, seed=self.world_seed, relations=RELATIONS)
        split = world.split(forget=self.forget, holdout=max(self.forget, self.people // 5))
        forget = tuple(split.records("forget"))
        retain, neighbours = tuple(split.records("retain")), tuple(split.records("neighbours"))
        known = tuple(split.records("known"))
        forms = {f"forget_{form}": split.records("forget", form) for form in FORMS}  # type: ignore[arg-type]
        splits: dict[str, Sequence[RecordBase]] = {
            "forget": forget,
            "retain": retain,
            "neighbours": neighbours,
            "holdout": split.records("holdout"),
            "general": general(),
            **{name: records for name, records in forms.items() if records},
        }
        limited = {name: records[: self.limit] for name, records in splits.items() if records}
        names = tuple(person.name for person in split.forget)
        return [
            Task(
                f"people{self.people}-forget{self.forget}-seed{self.world_seed}",
                ForgetRequest(forget=forget, subjects=names, retain=retain, neighbours=neighbours),
                limited,
                learn=known,
                relearned=tuple(split.records("kept")),
            )
        ]

    def asks(self) -> list[Ask]:
        asked = (*TRAINED, "forget_reverse", "forget_multi_hop")
        return [
            Ask(build("metric", "answer_probability"), (*TRAINED, "holdout", "general")),
            Ask(build("metric", "paraphrase_probability"), ("forget", "retain")),
            Ask(build("metric", "normalised_probability"), ("general",)),
            Ask(build("metric", {"name": "rouge_l_recall", **GENERATED}), (*asked, "general")),
            Ask(build("metric", "truth_ratio"), (*TRAINED, "general")),
            Ask(build("metric", "extraction_strength"), ("forget", "retain")),
            Ask(build("metric", "exact_memorisation"), ("forget", "retain")),
            Ask(build("metric", {"name": "outcome", **GENERATED}), asked),
            Ask(build("metric", {"name": "choice_accuracy", "form": "cloze"}), ("forget_choice",)),
            Ask(build("metric", "min_k"), ("forget", "holdout")),
            Ask(build("metric", "loss_attack"), ("forget", "holdout")),
            Ask(build("metric", {"name": "membership", "attacks": ("loss_attack", "min_k")})),
            Ask(build("metric", "forget_quality")),
            # without the general truth ratios, of which a model of a small world has none below 1
            Ask(build("metric", {"name": "model_utility", "splits": ("retain", "neighbours")})),
            Ask(build("metric", "outcome_shares")),
        ]

    def columns(self) -> list[Column]:
        return [
            # of what is said, so that guarded systems, which give no scores, are in the plot
            Column("forget ROUGE-L", "rouge_l_recall/forget", "reference", axis="forget"),
            Column("retain ROUGE-L", "rouge_l_recall/retain", "higher", axis="utility"),
            Column("forget probability", "answer_probability/forget", "reference"),
            Column("model utility", "model_utility", "higher"),
            Column("forget paraphrased", "paraphrase_probability/forget", "reference"),
            Column("extraction strength", "extraction_strength/forget", "reference"),
            Column("forget choice", "choice_accuracy/forget_choice", "reference"),
            Column("reverse", "rouge_l_recall/forget_reverse", "reference"),
            Column("multi-hop", "rouge_l_recall/forget_multi_hop", "reference"),
            Column("forget quality (log10 p)", "forget_quality_log10", "higher"),
            Column("membership (min-k)", "membership/min_k/auc", "reference"),
            Column("retain probability", "answer_probability/retain", "higher"),
            Column("neighbour probability", "answer_probability/neighbours", "higher"),
            Column("general probability", "answer_probability/general", "higher"),
            Column("garbage", "outcome_shares/forget/garbage", "lower"),
        ]

    def learning(self, model: str) -> Learning:
        if model == "tiny":
            return Learning(
                {"learning_rate": 1e-3, "epochs": 24, "batch_size": 8, "schedule": "cosine"}
            )
        return Learning({"learning_rate": 3e-4, "epochs": 6, "batch_size": 8, "schedule": "cosine"})

    def budget(self, model: str) -> dict[str, object]:
        # Two people are some ten rows, one step an epoch: recipes made for thousands of rows
        # would end before they began. A small model learns, and forgets, at a higher rate.
        return {"learning_rate": 2e-4 if model == "tiny" else 5e-5, "max_steps": 20}
