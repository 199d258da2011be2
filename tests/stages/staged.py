"""A procedure whose stages count how often they are done, and can be interrupted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from pydantic import Field

from delible.lm.lm import LM
from delible.made import Made
from delible.method import Outcome
from delible.records import QA, ForgetRequest
from delible.registry import register
from delible.stages.procedure import Procedure, recipe_of
from delible.stages.work import Stage, Work
from delible.testing.tiny import tiny_model, tiny_tokenizer
from delible.train.recipe import Recipe

FORGET = tuple(
    QA(question=f"Where was {name} born?", answer=place, subject=name)
    for name, place in (("Ada Brook", "Aberlin"), ("Bo Crane", "Bo"), ("Cy Dunn", "A boat"))
)
RETAIN = tuple(
    QA(question=f"What does person {index} like?", answer=f"tea {index}") for index in range(4)
)
REQUEST = ForgetRequest(forget=FORGET, retain=RETAIN)


class Killed(BaseException):
    """As a signal would: nobody catches it."""


def model() -> LM:
    made = tiny_model("llama", num_hidden_layers=2)
    return LM(made, tiny_tokenizer(), name="tiny-llama", precision="float32")


def recipe(slots: dict[str, Any] | None = None, **options: Any) -> Recipe:
    short = {"max_steps": 4, "batch_size": 2, "checkpoint_steps": 1, "learning_rate": 1e-3}
    return recipe_of("graddiff", slots=slots, options={**short, **options})


@register(
    kind="procedure", name="staged", title="Staged", summary="Does three stages.",
    family="test", intention="removal", mechanism="wrapper", needs=("forget", "retain"),
    changes="weights", reversible=False, weakest="relearning",
)  # fmt: skip
class Staged(Procedure):
    """Draws numbers, sums them step by step, and trains."""

    stages: ClassVar = {"draw": "random numbers", "sum": "sums in steps", "train": "training"}
    done: ClassVar[list[str]] = []
    on_step: ClassVar[Callable[[int], None] | None] = None

    place: str = Field("all", description="Where the training moves weights.")

    def run(self, work: Work) -> Outcome:
        def draw(stage: Stage) -> Made:
            self.done.append("draw")
            return Made({"of": (1, 2)}, {"x": torch.randn(5, generator=stage.generator("x"))})

        drawn = work.stage("draw", draw)

        def total(stage: Stage) -> Made:
            kept = stage.saved()
            at, found = (0, torch.zeros(())) if kept is None else (kept["at"], kept.tensors["sum"])
            self.done.append(f"sum from {at}")
            for step in range(at, 5):
                found = found + drawn.tensors["x"][step]
                stage.steps += 1
                stage.save(Made({"at": step + 1}, {"sum": found}))
                if type(self).on_step is not None:
                    type(self).on_step(step)
            return Made({}, {"sum": found})

        summed = work.stage("sum", total, inputs={"of": drawn["of"]})
        work.train("train", recipe({"place": self.place}))
        before = 0 if work.earlier is None else work.earlier["requests"]
        kind = "adapter" if work.lm.wears_adapter else "model"
        remembers = Made({"requests": before + 1}, {"sum": summed.tensors["sum"]})
        return Outcome(work.lm, kind, work.lm, remembers=remembers)
