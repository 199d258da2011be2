"""A forget step of fixed length, then a retain step from where it has led.

    W' = W - forget_norm * g_f(W) / |g_f(W)|        over all weights that move, as one vector
    W  = W' - retain_rate * g_r(W')

Both are one update of plain descent with rate 1 (``optimizer: sgd``, ``learning_rate: 1``, no
clipping). The forget loss decides where to go and not how far; the retain loss answers to what the
step has done, not to what was before it. With AdamW the lengths mean nothing.

Memory: a copy of the weights and one of the gradient while the retain gradient is taken.

Paper: arXiv 2605.11685 (the constrained optimiser of MCU). Reference code:
github.com/sustech-nlp/MCU. Deviations: with ``relative`` the length is in lengths of the weights
that move, as a constant fits one model only (the published 0.2 is about 2e-4 of an 8B model's).
"""

from __future__ import annotations

import torch
from pydantic import Field

from delible.registry import register
from delible.train.losses import State
from delible.train.passes import Passes
from delible.train.slots import Balance, Harden


@register(
    kind="balance",
    name="two_steps",
    title="Forget step, then retain step",
    summary="A forget step of fixed length, and a retain step from there; for plain descent.",
    paper="2605.11685",
    year=2026,
    family="gradient surgery",
    needs=("weights",),
    badges=("parity", "variant"),
    variant="The length may be in lengths of the weights.",
)
class TwoSteps(Balance):
    """Options of the two steps."""

    forget_norm: float = Field(2e-4, gt=0, description="Length of the forget step.")
    relative: bool = Field(True, description="It is in lengths of the weights that move.")
    retain_rate: float = Field(3e-4, ge=0, description="Rate of the retain step.")

    def weights(self, state: State, progress: float) -> tuple[float, float]:
        return 1.0, 1.0

    @torch.no_grad()
    def gradient(self, passes: Passes, harden: Harden) -> None:
        with torch.enable_grad():
            harden.forget(passes)
        forget = [parameter.grad for parameter in passes.parameters]
        passes.clear()
        taken = [one for one in forget if one is not None]
        length = torch.stack([one.double().norm() for one in taken]).norm() if taken else None
        if length is not None and length > 0:
            wanted = self.forget_norm
            if self.relative:
                own = [parameter.double().norm() for parameter in passes.parameters]
                wanted *= float(torch.stack(own).norm())
            for gradient in taken:
                gradient.mul_(wanted / float(length))
        if passes.keep_loss is not None and self.retain_rate > 0:
            with passes.returning():
                for parameter, one in zip(passes.parameters, forget, strict=True):
                    if one is not None:
                        parameter.sub_(one)
                with torch.enable_grad():
                    passes.keep()
        for parameter, one in zip(passes.parameters, forget, strict=True):
            if parameter.grad is not None:
                parameter.grad.mul_(self.retain_rate)
                if one is not None:
                    parameter.grad.add_(one)
            else:
                parameter.grad = one
