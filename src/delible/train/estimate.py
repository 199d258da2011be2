"""What a run will cost, before it starts: memory and time from sizes and a measured rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from delible.lm.lm import LM
from delible.precision import matmul_rate
from delible.train.plan import Plan
from delible.train.recipe import Recipe
from delible.train.row import Row
from delible.train.slots import Placement

#: Share of the measured matrix-product rate that training is assumed to reach.
ASSUMED_UTILISATION = 0.6


@dataclass(frozen=True)
class Estimate:
    """Cost of a training run.

    Attributes:
        steps: Optimiser steps.
        tokens: Tokens of forget and retain rows over all steps.
        trainable: Parameters that move.
        memory_gib: Weights, gradients, moments and activations of one pass, in GiB.
        minutes: Training time in minutes, without loading and saving.
    """

    steps: int
    tokens: int
    trainable: int
    memory_gib: float
    minutes: float


def body_parameters(lm: LM) -> int:
    """Parameters that every token passes through: without embedding tables and head."""
    tables = {id(lm.core.get_input_embeddings().weight), id(lm.core.get_output_embeddings().weight)}
    return sum(value.numel() for value in lm.model.parameters() if id(value) not in tables)


def estimate(
    lm: LM,
    recipe: Recipe,
    plan: Plan,
    placement: Placement,
    forget: Sequence[Row],
    retain: Sequence[Row],
    micro_batch_tokens: int,
) -> Estimate:
    """Counts floating-point operations (2 forward, 4 backward per parameter and token)."""
    tokens = answers = 0
    for step in plan.steps:
        for index, kept in step:
            for row in (forget[index], *(() if kept is None or not retain else (retain[kept],))):
                tokens += len(row.encoded.ids)
                answers += row.encoded.answer_tokens
    trainable = sum(value.numel() for value in placement.parameters.values())
    body = body_parameters(lm)
    head = lm.vocabulary * lm.anatomy.hidden_size
    operations = 6.0 * (tokens * body + answers * head)
    if not recipe.harden.single_pass:
        operations *= 1.5
    weights = sum(value.numel() * value.element_size() for value in lm.model.parameters())
    activations = 4 * lm.anatomy.layers * (14 * lm.anatomy.hidden_size + 4 * lm.inner_width)
    memory = weights + 12 * trainable + micro_batch_tokens * activations
    rate = matmul_rate(lm.precision, lm.device.type)
    return Estimate(
        len(plan.steps),
        tokens,
        trainable,
        memory / 2**30,
        operations / (ASSUMED_UTILISATION * rate) / 60,
    )
