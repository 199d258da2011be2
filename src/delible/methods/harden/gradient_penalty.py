"""Gradient penalty (GP): the forget loss should end where its own gradient is short.

    loss = forget loss + rho * ||gradient of the forget loss||_2

With u the unit vector along the gradient, the penalty's gradient is rho * H u: the Hessian times
u, computed by differentiating twice. Costs a second pass over the forget rows with about twice
the memory of an ordinary one and without fused attention, and one more gradient-sized buffer.

Paper: arXiv 2502.05374 (a smoothness baseline beside SAM). Reference code:
github.com/OPTML-Group/Unlearn-Smooth.
Deviations: the released code takes the number out of the graph (``.item()``), so that no gradient
of the penalty reaches the weights and the method is its host; here it does. The norm is that of
the gradient of the whole optimiser step, not of each micro-batch. The loss that is reported is
the host's.
"""

from __future__ import annotations

import torch
from pydantic import Field

from delible.registry import register
from delible.train.passes import Passes
from delible.train.slots import Harden


@register(
    kind="harden",
    name="gradient_penalty",
    title="Gradient penalty (GP)",
    summary="Adds the norm of the forget gradient to the loss; differentiates twice.",
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
    variant="The penalty has a gradient; in the released code it is a constant.",
)
class GradientPenalty(Harden):
    """Options of the gradient penalty."""

    rho: float = Field(0.01, ge=0, description="Weight of the norm of the forget gradient.")

    def needs_whole(self) -> str | None:
        return "it differentiates twice, and shares are gathered for one backward pass"

    def forget(self, passes: Passes) -> None:
        with passes.apart():
            passes.forget()
            found = [parameter.grad for parameter in passes.parameters]
            norm = float(torch.nn.utils.get_total_norm([one for one in found if one is not None]))
            if self.rho > 0 and 0 < norm < float("inf"):
                along = [None if one is None else one / norm for one in found]
                passes.forget_curvature(along, self.rho)
