"""Sharpness-aware unlearning: descend from the worst place nearby.

    delta = rho * g / ||g||,  g = gradient of the forget loss
    gradient = (gradient of the forget loss at theta + delta) + (retain gradient at theta)

The norm is over all trainable weights. A minimum that is flat in this sense takes more
relearning steps to leave. Costs one more pass over the forget rows and one copy of the weights.

Paper: arXiv 2502.05374. Reference code: github.com/OPTML-Group/Unlearn-Smooth.
Deviations: the perturbation is that of the whole optimiser step, not of each micro-batch; weights
are kept and put back bit by bit instead of subtracting what was added; gradients that were there
before (of the retain loss) are added to, not overwritten; the loss that is reported and balanced
is the one at the unperturbed weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from delible.registry import register
from delible.train.passes import Passes
from delible.train.slots import Harden


@torch.no_grad()
def ascend_(weights: Sequence[Tensor], gradients: Sequence[Tensor], rho: float) -> float:
    """Moves the weights by ``rho`` (Euclidean length) along their common gradient, in place.

    Returns:
        The norm of the gradient; where it is 0 or not finite, nothing moves.
    """
    total = torch.nn.utils.get_total_norm(gradients)
    norm = float(total.full_tensor() if hasattr(total, "full_tensor") else total)
    if 0 < norm < float("inf"):
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.add_(gradient, alpha=rho / norm)
    return norm


@register(
    kind="harden",
    name="sam",
    title="Sharpness-aware minimisation (SAM)",
    summary="Takes the forget gradient at the worst point near the weights.",
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
    variant="One perturbation per optimiser step, whatever the micro-batches.",
)
class SAM(Harden):
    """Options of SAM."""

    rho: float = Field(0.01, ge=0, description="Length of the perturbation; 0 is no hardening.")

    def forget(self, passes: Passes) -> None:
        with passes.apart():
            passes.forget()
            if self.rho > 0:
                self._at_worst_point(passes)

    def _at_worst_point(self, passes: Passes) -> None:
        """Replaces the gradient in ``.grad`` by the one at the perturbed weights."""
        moving = [parameter for parameter in passes.parameters if parameter.grad is not None]
        gradients = [parameter.grad for parameter in moving if parameter.grad is not None]
        if not gradients:
            return
        loss = passes.totals.forget
        with passes.returning():
            norm = ascend_([parameter.detach() for parameter in moving], gradients, self.rho)
            if 0 < norm < float("inf"):  # else nothing moved: the gradient there is is the one
                del gradients
                passes.clear()
                passes.forget()
                passes.totals.forget = loss
