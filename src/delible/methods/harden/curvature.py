"""Curvature regularisation (CR): the forget gradient should not change along itself.

    u = g / ||g||,  g = gradient of the forget loss at theta
    d = (gradient at theta + mu * u) - g
    loss = forget loss + rho * ||d||_2

A small d means little curvature in the direction in which the loss changes most. With v the unit
vector along d and u held fixed, the penalty's gradient is rho * (H(theta + mu u) v - H(theta) v),
two Hessian products. Costs four passes over the forget rows instead of one, two of them twice
differentiated (about twice the memory, no fused attention), one copy of the trained weights and
two more gradient-sized buffers.

Paper: arXiv 2502.05374 (a smoothness baseline beside SAM). Reference code:
github.com/OPTML-Group/Unlearn-Smooth.
Deviations: the released code takes the number out of the graph (``.item()``), so that the penalty
has no gradient, and leaves the gradient of its first pass behind, which counts the forget loss
twice; neither is done here. One perturbation per optimiser step, whatever the micro-batches. The
loss that is reported is the host's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from delible.registry import register
from delible.train.passes import Passes
from delible.train.slots import Harden


@register(
    kind="harden",
    name="curvature",
    title="Curvature regularisation (CR)",
    summary="Penalises how the forget gradient changes along itself; differentiates twice.",
    paper="2502.05374",
    year=2025,
    family="smoothness",
    intention="as host",
    mechanism="wrapper",
    needs=("forget", "weights"),
    changes="weights",
    reversible=False,
    weakest="the attack it was not trained for",
    badges=("parity", "variant"),
    variant="The penalty has a gradient and the forget loss counts once, unlike in released code.",
)
class Curvature(Harden):
    """Options of curvature regularisation."""

    rho: float = Field(0.01, ge=0, description="Weight of the norm of the gradient's change.")
    mu: float = Field(0.01, gt=0, description="Length of the step along the gradient.")

    def needs_whole(self) -> str | None:
        return "it differentiates twice, and shares are gathered for one backward pass"

    def forget(self, passes: Passes) -> None:
        with passes.apart():
            passes.forget()
            loss = passes.totals.forget
            here = [parameter.grad for parameter in passes.parameters]
            norm = _norm(here)
            if self.rho > 0 and 0 < norm < float("inf"):
                self._penalise(passes, here, norm)
            passes.totals.forget = loss

    def _penalise(self, passes: Passes, here: Sequence[Tensor | None], norm: float) -> None:
        """Adds the gradient of the penalty to ``here``, which is the gradient at the weights."""
        with passes.returning():
            passes.clear()
            with torch.no_grad():
                for parameter, gradient in zip(passes.parameters, here, strict=True):
                    if gradient is not None:
                        parameter.add_(gradient, alpha=self.mu / norm)
            passes.forget()
            change = [parameter.grad for parameter in passes.parameters]
            for moved, gradient in zip(change, here, strict=True):
                if moved is not None and gradient is not None:
                    moved.sub_(gradient)
            for parameter, gradient in zip(passes.parameters, here, strict=True):
                parameter.grad = gradient
            length = _norm(change)
            if not 0 < length < float("inf"):
                return
            along = [None if one is None else one.div_(length) for one in change]
            passes.forget_curvature(along, self.rho)
        passes.forget_curvature(along, -self.rho)


def _norm(gradients: Sequence[Tensor | None]) -> float:
    return float(torch.nn.utils.get_total_norm([one for one in gradients if one is not None]))
