"""U2A weights: a forget row counts as much as unlearning it helps something else.

    G_i = grad J' H^-1 grad u_i       gain of row i; u_i the host's forget loss, to be minimised
    w_i <- w_i exp(rate x G_i)        standardised gains, normalised to the simplex
    weight of row i = n w_i           mean 1 over the n rows

J is what should improve while bad answers are unlearned: the preference of good answers over bad
ones, or the likelihood of good answers, on retain records kept for it (``outer_group``). Rows
whose gradient points the way of J's count more, rows that work against it less. Between rounds
the model is trained on the weighted rows, scored anew, and put back in the end.

With ``share`` below 1 the support is chosen as well (greedily, as ``select: u2a`` does) and the
other rows get weight 0; they still cost their passes, so use ``select: u2a`` to drop them.

Paper: arXiv 2504.06659; its code is not public. Deviations: symbols and schedule are ours, since
the paper's constants are not known: 5 rounds, one mirror step each, the identity for H
(``hessian: conjugate_gradient`` uses the curvature of the forget losses and the retain loss). An
expected reward as J is not offered: it needs a reward model with a gradient.

Under gradient ascent as host every measure improves for a while by degenerate text: watch
fluency, and keep retain records.
"""

from __future__ import annotations

import logging

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from delible.registry import register
from delible.train.bilevel import Bilevel
from delible.train.slots import SlotContext, Weigh

logger = logging.getLogger(__name__)


@register(
    kind="weigh",
    name="u2a",
    title="Weights for alignment (U2A)",
    summary="Forget rows count more, the more unlearning them helps an outer objective.",
    paper="2504.06659",
    year=2025,
    family="data weighting",
    intention="as host",
    mechanism="wrapper",
    needs=("forget", "retain", "weights"),
    changes="weights",
    reversible=False,
    weakest="the forget rows with the smallest weights",
    badges=("parity", "variant"),
    variant="Rounds, rates and the default Hessian are ours; the paper's are not published.",
)
class U2AWeights(Bilevel, Weigh):
    """Options of the weights."""

    share: float = Field(
        1.0, gt=0, le=1, description="Share of the rows with weight; below 1 the best are chosen."
    )

    def weights(self, context: SlotContext) -> Float[Tensor, " rows"]:
        found = self.solve(context, self.share, "weigh 'u2a'")
        count = len(context.rows["forget"])
        weights = torch.zeros(count, dtype=torch.float64)
        weights[found.support] = found.weights * count
        logger.info(
            f"weigh: {len(found.support)} of {count} forget rows have weight, "
            f"{float(weights[found.support].min()):.2f} to {float(weights.max()):.2f}"
        )
        return weights.float()
