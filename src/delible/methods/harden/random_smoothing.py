"""Randomised smoothing (RS): the forget gradient, averaged over noisy copies of the weights.

    gradient = mean over draws of [gradient of the forget loss at theta + sigma * xi],  xi ~ N(0, I)

plus the retain gradient at theta: gradient descent on a smoothed forget loss, whose minima are
flat on the scale of sigma. The loss that is reported is the mean over the noisy copies. Costs one
pass over the forget rows per draw and one copy of the trained weights.

Paper: arXiv 2502.05374 (a smoothness baseline beside SAM). Reference code:
github.com/OPTML-Group/Unlearn-Smooth.
Deviations: one set of draws per optimiser step, whatever the micro-batches; weights are kept and
put back bit by bit instead of subtracting the noise; the noise depends on the run's seed and the
step only, so that a resumed run draws the same.
"""

from __future__ import annotations

import torch
from pydantic import Field

from delible.lm.sharded import spread
from delible.registry import register
from delible.train.passes import Passes
from delible.train.slots import Harden


@register(
    kind="harden",
    name="random_smoothing",
    title="Randomised smoothing (RS)",
    summary="Averages the forget gradient over random perturbations; keeps one copy of weights.",
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
    variant="One set of draws per optimiser step, whatever the micro-batches.",
)
class RandomSmoothing(Harden):
    """Options of randomised smoothing."""

    sigma: float = Field(1e-4, ge=0, description="Standard deviation of the noise; 0 is none.")
    draws: int = Field(3, ge=1, description="Noisy copies per step, one forget pass each.")

    def forget(self, passes: Passes) -> None:
        if self.sigma == 0:
            passes.forget()
            return
        losses = []
        with passes.apart():
            with passes.returning() as kept:
                for draw in range(self.draws):
                    self._perturb(passes, kept, draw)
                    passes.forget()
                    losses.append(passes.totals.forget)
            for parameter in passes.parameters:
                if parameter.grad is not None:
                    parameter.grad.div_(self.draws)
        passes.totals.forget = sum(losses) / self.draws

    @torch.no_grad()
    def _perturb(self, passes: Passes, kept: list[torch.Tensor], draw: int) -> None:
        seed = passes.generator("harden.random_smoothing", draw).initial_seed()
        device = passes.parameters[0].device
        generator = torch.Generator(device).manual_seed(seed)
        for parameter, value in zip(passes.parameters, kept, strict=True):
            noise = torch.empty(value.shape, dtype=value.dtype, device=device)
            noise = spread(noise.normal_(generator=generator), like=value)
            parameter.copy_(noise.mul_(self.sigma).add_(value))
