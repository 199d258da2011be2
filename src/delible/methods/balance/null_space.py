"""Null-space projection: weights change only in directions that retain rows hardly use.

    C = 1/n sum_t k_t k_t^T over retain tokens,  C = U diag(s) U^T,   k: input of a weight matrix M
    P = U_N U_N^T,   N = {i: s_i <= threshold * s_max}
    change of M  <-  change of M times P        (or, ``of: gradient``, the forget gradient alone)

P stands on the input side, so (change of M) k is nearly 0 for retain inputs k. An optimiser that
scales coordinates (AdamW) leaves the null space again; so by default what is projected is the
change that the optimiser has made, weight decay included. With plain descent the forget gradient
alone can be projected, as in the paper, and the retain loss moves weights freely.

Memory: two matrices of the size of M's inputs squared while they are made, and the directions
that are taken out afterwards. Weights that are no matrix of a linear layer, and mixtures of
experts, are not protected.

Paper: arXiv 2602.19275 (KUDA). Reference code: none was found. Deviations: the shares of tokens
and the threshold are not published; first positions of rows do not count, whose inputs are huge.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from delible.errors import RecipeError
from delible.lm.sharded import spread, whole
from delible.registry import register
from delible.train.activations import input_moments
from delible.train.losses import Memory, State
from delible.train.passes import Passes
from delible.train.slots import Balance, Harden, Placement, SlotContext

logger = logging.getLogger(__name__)

#: Where what is taken out is remembered: by parameter, [inputs, directions].
USED = "null_space.used"
#: And which parameters have their inputs first: 1 (the transposed ones) or 0, one number each.
INPUTS_FIRST = "null_space.inputs_first"


def used_directions(
    moment: Float[Tensor, "inputs inputs"], threshold: float
) -> Float[Tensor, "inputs directions"]:
    """Orthonormal directions with second moments above ``threshold`` times the largest."""
    values, vectors = torch.linalg.eigh(moment.double())
    return vectors[:, values > threshold * values[-1]].float().contiguous()


def projected(
    change: Float[Tensor, "outputs inputs"], used: Float[Tensor, "inputs directions"]
) -> Float[Tensor, "outputs inputs"]:
    """What is left of a matrix without the directions of its inputs."""
    return change - (change @ used) @ used.T


@register(
    kind="balance",
    name="null_space",
    title="Null space of retained inputs",
    summary="Projects each change of a weight matrix away from what retain rows put into it.",
    paper="2602.19275",
    year=2026,
    family="gradient surgery",
    needs=("retain", "weights"),
    badges=("parity", "variant"),
    variant="By default the change that the optimiser made is projected, retain loss included.",
)
class NullSpace(Balance):
    """Options of the projection."""

    threshold: float = Field(
        0.01, gt=0, description="Directions count as used above this share of the largest second "
        "moment; 1 or more: nothing is projected.",
    )  # fmt: skip
    of: Literal["change", "gradient"] = Field(
        "change", description="What is projected: the change of the weights, or the gradient of "
        "the forget loss before the optimiser (which must then be sgd to hold).",
    )  # fmt: skip
    share: float = Field(1.0, gt=0, le=1, description="Share of the retain tokens that is looked "
                         "at, at random; at least three per input.")  # fmt: skip
    forget_weight: float = Field(1.0, ge=0, description="Weight of the forget loss.")
    retain_weight: float = Field(1.0, ge=0, description="Weight of the retain loss.")

    def weights(self, state: State, progress: float) -> tuple[float, float]:
        return self.forget_weight, self.retain_weight

    def prepare(self, context: SlotContext, placement: Placement) -> Memory:
        moments = input_moments(
            context.lm, context.rows["retain"], placement.parameters.values(),
            share=self.share, seed=context.seed, stage=context.stage,
        )  # fmt: skip
        if not moments:
            raise RecipeError(
                "no matrix of a linear layer moves, so there is nothing to protect.",
                where="balance 'null_space'",
                hint="Use place traced or layers, on a dense model.",
            )
        used, first = [], []
        for parameter in placement.parameters.values():
            seen = moments.get(id(parameter))
            if seen is None:
                used.append(parameter.new_zeros(0, 0))
                first.append(parameter.new_zeros(1))
                continue
            directions = used_directions(seen.moment, self.threshold)
            width = len(seen.moment)
            if directions.shape[1] == width:
                raise RecipeError(
                    f"retain rows use all {width} inputs of a weight matrix: nothing could change.",
                    where="balance 'null_space'",
                    hint="Raise balance.threshold.",
                )
            if seen.tokens < width:
                logger.warning(
                    f"null space: {seen.tokens:,} retain tokens are few for {width:,} inputs; "
                    "directions that they do not reach count as free (give more retain records)"
                )
            logger.info(f"null space: {width - directions.shape[1]:,} of {width:,} inputs are free")
            used.append(directions)
            first.append(parameter.new_full((1,), float(seen.inputs_first)))
        return {USED: used, INPUTS_FIRST: first}

    def gradient(self, passes: Passes, harden: Harden) -> None:
        if self.of == "change":
            return super().gradient(passes, harden)
        harden.forget(passes)
        for parameter, project in _projections(passes.parameters, passes.memory):
            if parameter.grad is not None:
                parameter.grad = project(parameter.grad)
        passes.keep()
        return None

    @contextmanager
    def updating(self, parameters: Sequence[torch.nn.Parameter], memory: Memory) -> Iterator[None]:
        held = _projections(parameters, memory) if self.of == "change" else []
        before = [parameter.detach().clone() for parameter, _ in held]
        yield
        with torch.no_grad():
            for (parameter, project), old in zip(held, before, strict=True):
                parameter.copy_(old + project(parameter - old))


class _Projection:
    """Takes the used directions out of a matrix of either layout."""

    def __init__(self, used: Tensor, inputs_first: bool) -> None:
        self.used, self.inputs_first = used, inputs_first

    def __call__(self, value: Tensor) -> Tensor:
        every = whole(value)
        wide = every.T if self.inputs_first else every
        found = projected(wide.float(), self.used)
        return spread((found.T if self.inputs_first else found).to(value.dtype), like=value)


def _projections(
    parameters: Sequence[torch.nn.Parameter], memory: Memory
) -> list[tuple[torch.nn.Parameter, _Projection]]:
    """The parameters that something is taken out of, and how."""
    if USED not in memory:
        raise RuntimeError("the null space was not prepared")
    return [
        (parameter, _Projection(used, bool(first)))
        for parameter, used, first in zip(
            parameters, memory[USED], memory[INPUTS_FIRST], strict=True
        )
        if used.shape[1:] and used.shape[1]
    ]
