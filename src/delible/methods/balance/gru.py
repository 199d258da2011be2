"""Gradient rectified unlearning (GRU): the update never climbs the retain loss.

    m <- momentum * g_r + (1 - momentum) * m          g_r: gradient of the retain loss
    if <g, m> < 0:   g <- g - (<g, m> / |m|^2) m      g: gradient of the forget objective
    update along     g + keep_weight * g_r

What is left of the forget gradient in a conflict is orthogonal to the (smoothed) retain gradient,
so to first order forgetting costs the retain rows nothing. ``keep_weight`` above 0 also descends
the retain loss: the paper's variant "+ce" with ``keep: nll``. With ``cosine_clip`` no more than
that much of a conflict is removed, as if the cosine of the angle had been -0.5.

Memory: the smoothed retain gradient is kept between steps and the forget gradient is held while
the retain gradient is taken, so two buffers of the size of the trained weights in fp32, on top of
the optimiser's two. One of them is written to checkpoints.

Paper: arXiv 2503.09117. Reference code: github.com/tmlr-group/GRU.
Deviations: inner products are summed in float64 where the gradients are, not on the CPU; the
retain loss is that of the slot, so with ``keep: kl`` ("+KL") the divergence both rectifies and is
descended, while the released code rectifies by the likelihood and adds the divergence; a retain
gradient of 0 (KL at the start) rectifies nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from delible.errors import RecipeError
from delible.registry import register
from delible.train.losses import State
from delible.train.passes import Passes
from delible.train.slots import Balance, Harden

#: Entries whose product is in memory in float64 at once.
_CHUNK = 1 << 22


def inner(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Inner product over all tensors, summed in float64."""
    return sum(
        float((one.double() * other.double()).sum())
        for mine, yours in zip(left, right, strict=True)
        for one, other in zip(
            mine.reshape(-1).split(_CHUNK), yours.reshape(-1).split(_CHUNK), strict=True
        )
    )


@torch.no_grad()
def smooth_(average: Sequence[Tensor], new: Sequence[Tensor], momentum: float) -> None:
    """average <- momentum * new + (1 - momentum) * average, in place."""
    for old, value in zip(average, new, strict=True):
        old.mul_(1 - momentum).add_(value, alpha=momentum)


@torch.no_grad()
def rectify_(
    gradient: Sequence[Tensor], retain: Sequence[Tensor], cosine_clip: float | None = None
) -> float:
    """Takes out of ``gradient``, in place, what climbs along ``retain``.

    Args:
        gradient: The gradient that is descended.
        retain: The gradient of the loss that must not rise.
        cosine_clip: The cosine is taken to be at least this one; None: as it is.

    Returns:
        The cosine of the angle before, in [-1, 1]; 0 if one of them is 0. Where it is not
        negative, nothing is changed.
    """
    product, length = inner(gradient, retain), inner(gradient, gradient) ** 0.5
    retain_length = inner(retain, retain) ** 0.5
    if length == 0 or retain_length == 0:
        return 0.0
    cosine = product / (length * retain_length)
    if cosine < 0:
        removed = cosine if cosine_clip is None else max(cosine, cosine_clip)
        for mine, other in zip(gradient, retain, strict=True):
            mine.add_(other, alpha=-removed * length / retain_length)
    return cosine


@register(
    kind="balance",
    name="gru",
    title="Gradient rectified unlearning (GRU)",
    summary="Removes from the forget gradient what climbs the retain loss; keeps two more buffers.",
    paper="2503.09117",
    year=2025,
    family="gradient surgery",
    needs=("retain", "weights"),
    badges=("parity", "variant"),
    variant="One retain loss both rectifies and, with a weight, is descended.",
)
class GRU(Balance):
    """Options of gradient rectification."""

    momentum: float = Field(
        0.8, gt=0, le=1, description="Share of the new retain gradient in the smoothed one."
    )
    cosine_clip: float | None = Field(
        None, ge=-1, lt=0, description="Treat sharper conflicts as this cosine (released: -0.5)."
    )
    keep_weight: float = Field(
        0.0, ge=0, description="Weight of the retain loss itself, added after rectifying."
    )
    forget_weight: float = Field(1.0, gt=0, description="Weight of the forget loss.")

    def weights(self, state: State, progress: float) -> tuple[float, float]:
        return self.forget_weight, 1.0

    @torch.no_grad()
    def gradient(self, passes: Passes, harden: Harden) -> None:
        if passes.keep_loss is None:
            raise RecipeError(
                "there is no retain loss whose gradient could be protected.",
                where="balance 'gru'",
                hint="Add a retain loss, such as --keep nll.",
            )
        with torch.enable_grad():
            harden.forget(passes)
            forget, moved = _taken(passes)
            passes.keep()
        retain, held = _taken(passes)
        # all passes are done: a step that runs out of memory has left the average as it was
        average = passes.memory.setdefault(
            "gru.retain_gradient", [torch.zeros_like(value) for value in passes.parameters]
        )
        smooth_(average, retain, self.momentum)
        rectify_(forget, average, self.cosine_clip)
        for index, parameter in enumerate(passes.parameters):
            if moved[index] or held[index]:  # the optimiser passes over what has no gradient
                parameter.grad = forget[index].add_(retain[index], alpha=self.keep_weight)


def _taken(passes: Passes) -> tuple[list[Tensor], list[bool]]:
    """The gradients, taken out of ``.grad``, and where there is one; zeros where there is none."""
    reached = [parameter.grad is not None for parameter in passes.parameters]
    found = [
        torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for parameter in passes.parameters
    ]
    passes.clear()
    return found, reached
