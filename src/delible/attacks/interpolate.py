"""Interpolation: walks on along what a harmless fine-tuning changes, and looks for a place where
the knowledge is back.

    theta' = theta + alpha (theta_benign - theta)

with theta_benign a few steps of fine-tuning of the same copy on two harmless tasks (sums, and
whether a review is good). Fine-tuning of any kind moves an unlearned model back towards the models
around the original; alpha = 1 is that model, larger alphas go on in its direction, negative ones
the other way. A random direction, of the same length in every tensor, is the control.

Papers: arXiv 2212.04089 (task vectors), 2510.07626 (fine-tuning on benign tasks), 2307.13339 (what
lies between models). Reference code: none. Deviations: the way is a straight line of one vector; no
paper sets the alphas.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from delible.cards import Depth
from delible.errors import DataError, RunError
from delible.lm.lm import LM
from delible.measure.attack import AttackContext, Budget, ModelAttack
from delible.measure.overlap import RUN, repeating
from delible.registry import register
from delible.train.randomness import generator
from delible.train.tuning import FineTuning
from delible.train.vectors import along, norm_of
from delible.world import benign


def random_like(vector: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """A random direction of the same length in every tensor."""
    random = generator(seed, "interpolate.random")
    found = {}
    for name, value in vector.items():
        drawn = torch.randn(value.shape, generator=random).to(value.device)
        found[name] = drawn * (value.norm() / drawn.norm().clamp(min=1e-30))
    return found


@register(
    kind="attack",
    name="interpolate",
    title="Interpolation",
    summary="Walks along what fine-tuning on harmless tasks changes in the weights.",
    paper="2212.04089",
    year=2022,
    family="interpolation",
    needs=("weights",),
    changes="weights",
    reversible=True,
    capability="weights",
    depth="deep",
    badges=("variant",),
    variant="The task vector of a benign fine-tuning, as an attack; no paper sets its lengths.",
)
class Interpolate(ModelAttack):
    """Options of the walk."""

    direction: Literal["benign", "random"] = Field(
        "benign", description="The task vector, or (as a control) a random one of equal length."
    )
    alpha: float = Field(
        2.0, ge=-100, le=100, description="How far: 1 is the fine-tuned model, 0 stays."
    )
    steps: int = Field(10, ge=1, description="Optimiser steps of the fine-tuning.")
    learning_rate: float = Field(2e-5, gt=0, le=1, description="Peak rate of AdamW.")
    batch_size: int = Field(4, ge=1, description="Rows per optimiser step.")

    def variants(self, depth: Depth = "standard") -> Sequence[Mapping[str, object]]:
        """Ahead; at the deepest also further, back, and in a random direction."""
        if depth != "deep":
            return ({"alpha": 2.0},)
        ways = tuple({"alpha": alpha} for alpha in (2.0, 8.0, -2.0))
        return (*ways, {"alpha": 8.0, "direction": "random"})

    def variant_title(self) -> str:
        """Such as "2 times the benign vector"."""
        return f"{self.alpha:g} times the {self.direction} vector"

    @property
    def control(self) -> bool:
        """A random direction leads nowhere."""
        return self.direction == "random"

    def budget(self, context: AttackContext) -> Budget:
        """The steps of the fine-tuning."""
        return Budget(steps=self.steps)

    def apply(self, lm: LM, context: AttackContext) -> LM:
        """The copy, further along.

        Raises:
            DataError: The harmless rows repeat a forget row.
            RunError: The fine-tuning moved nothing, or the walk left the numbers.
        """
        rows = benign()
        if same := repeating(rows, context.forget):
            raise DataError(
                f"{len(same)} benign rows have {RUN} words in a row that a forget row has.",
                where="attack 'interpolate'",
                hint="It cannot be run on these forget rows.",
            )

        def watch(_: LM, step: int, total: int) -> None:
            if context.progress is not None and step:
                context.progress(step, total)

        tuning = FineTuning(self.steps, self.learning_rate, self.batch_size)
        tuned = tuning.tuned(lm, rows, context.seed, watch).lm
        twin = lm.copy()
        twin.merge_adapter()
        start, end = (dict(one.core.named_parameters()) for one in (twin, tuned))
        with torch.no_grad():
            vector = {name: end[name].float() - value.float() for name, value in start.items()}
            context.numbers["length of the task vector"] = norm_of(vector)
            if self.direction == "random":
                vector = random_like(vector, context.seed)
            for name, value in start.items():
                value.copy_(along(value, value.float() + vector[name], self.alpha))
                if not bool(value.isfinite().all()):
                    raise RunError(
                        "the walk left the numbers that the weights can hold.",
                        where=f"attack 'interpolate', {name}",
                        hint="Choose a smaller alpha.",
                    )
        twin.touch()
        return twin
