"""SURE: only the neurons that matter most for forgetting move, so that they can move far.

    s_i = || gradient of the forget loss over the weights of neuron i ||_2
    neuron i moves if s_i is at least the percentile of all s

A neuron is one output of a weight matrix (a row of its [out, in] layout) or one entry of a vector.
With few neurons moving, utility survives a larger learning rate, and changes larger than half a
bin of a 4-bit quantizer are not rounded away again. The mask is made once, at the start model;
with ``every_step`` it is made anew from each step's forget loss, which costs one more forget pass
per step and a copy of the trained weights. Otherwise the mask costs nothing after the start.

Paper: arXiv 2410.16454. Reference code: github.com/zzwjames/FailureLLMUnlearning.
Deviations: (1) the released mask sits in a method that the trainer never calls, and the gradient
of its saliency pass is never cleared, so that no mask acts and the forget gradient counts twice;
``compat`` does just that. (2) The start mask takes the gradient of the answer loss over all forget
rows, each averaged over its tokens: that of gradient ascent, and of NPO at its start up to how
rows of different length weigh. (3) Neurons without any gradient never move, and neurons that may
not move are spared weight decay and momentum. (4) In fused experts and in transposed matrices,
where the first dimension is not the output, outputs are counted all the same.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from delible.errors import RunError
from delible.lm.lm import LM
from delible.registry import register
from delible.train.passes import Passes
from delible.train.slots import Place, Placement, SlotContext

logger = logging.getLogger(__name__)


def saliency(gradient: Tensor, inputs: int | None) -> Tensor:
    """L2 norm of the gradient per neuron, in fp32.

    Args:
        gradient: Of one parameter.
        inputs: The dimension that runs over a neuron's inputs; None: every entry is one.

    Returns:
        The gradient's shape, with size 1 in that dimension.
    """
    if inputs is None:
        return gradient.float().abs()
    return torch.linalg.vector_norm(gradient.float(), dim=inputs, keepdim=True)


@torch.no_grad()
def salient(saliencies: Mapping[str, Tensor], percentile: float) -> dict[str, Tensor]:
    """Which neurons reach the percentile of all of them; those of saliency 0 do not.

    Between two values the percentile is interpolated linearly, so that of n different saliencies
    about n * (1 - percentile / 100) reach it.

    Raises:
        RunError: A saliency is infinite or not a number.
    """
    joined = torch.cat([value.flatten().cpu() for value in saliencies.values()]).double().numpy()
    if not np.isfinite(joined).all():
        raise RunError(
            "the saliency of some neurons is not finite.",
            where="place 'sure'",
            hint="Check the model's loss on the forget rows.",
        )
    threshold = float(np.percentile(joined, percentile))
    return {name: (value.double() >= threshold) & (value > 0) for name, value in saliencies.items()}


def input_dimensions(lm: LM, parameters: Mapping[str, Tensor]) -> dict[str, int | None]:
    """For each parameter the dimension over a neuron's inputs; None for vectors."""
    modules = dict(lm.model.named_modules())
    found: dict[str, int | None] = {}
    for name, value in parameters.items():
        transposed = isinstance(modules.get(name.rpartition(".")[0]), Conv1D)
        if value.ndim >= 3:
            transposed = lm.anatomy.experts_transposed
        found[name] = None if value.ndim < 2 else value.ndim - 1 - transposed
    return found


@register(
    kind="place",
    name="sure",
    title="Salient neurons (SURE)",
    summary="Lets only the neurons with the largest forget gradients move, at a large rate.",
    paper="2410.16454",
    year=2024,
    family="weight selection",
    intention="as host",
    mechanism="wrapper",
    needs=("forget", "weights"),
    changes="weights",
    reversible=False,
    weakest="relearning",
    badges=("parity", "variant"),
    variant="The mask acts, and frozen neurons do not drift; in the released code none does.",
)
class Sure(Place):
    """Options of the neuron mask."""

    percentile: float = Field(
        90.0, ge=0, lt=100, description="Neurons from this percentile of saliency on may move."
    )
    every_step: bool = Field(
        False, description="Make the mask anew at each step, from that step's forget rows."
    )
    compat: bool = Field(
        False, description="As released: no mask acts, and the forget gradient counts twice."
    )

    def needs_whole(self) -> str | None:
        reason = "with every_step or compat each step begins with a look at whole gradients"
        return reason if self.every_step or self.compat else None

    def apply(self, context: SlotContext) -> Placement:
        parameters = context.gradients.parameters()
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        if self.compat:
            logger.info("place: as released, no mask acts and the forget gradient counts twice")
            return Placement(parameters, each_step=_count_twice)
        inputs = input_dimensions(context.lm, parameters)

        def masks(gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
            chosen = salient(
                {name: saliency(value, inputs[name]) for name, value in gradients.items()},
                self.percentile,
            )
            return {name: mask.expand(parameters[name].shape) for name, mask in chosen.items()}

        if self.every_step:

            def each_step(passes: Passes) -> dict[str, Tensor]:
                passes.forget()
                found = {
                    name: torch.zeros_like(value) if value.grad is None else value.grad
                    for name, value in parameters.items()
                }
                passes.clear()
                return masks(found)

            everything = {
                name: torch.ones((), dtype=torch.bool, device=value.device).expand(value.shape)
                for name, value in parameters.items()
            }
            return Placement(parameters, everything, each_step=each_step)
        # the rows that the host's forget loss is about: the refusals for a refusal objective
        once = masks(context.gradients.total(context.rows[context.objective.roles[0]]))
        moving = sum(int(mask.sum()) for mask in once.values())
        total = sum(mask.numel() for mask in once.values())
        logger.info(f"place: {moving:,} of {total:,} weights may move (salient neurons)")
        return Placement(parameters, once)


def _count_twice(passes: Passes) -> None:
    """The released saliency pass: its gradient stays, and its mask goes nowhere."""
    passes.forget()
