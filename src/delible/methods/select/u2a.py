"""U2A selection: forget rows whose unlearning helps something else, chosen round by round.

    G_i = grad J' H^-1 grad u_i       gain of row i; u_i the host's forget loss, to be minimised
    support <- support + the rows with the largest gains above 0       at most ``share`` of all

Mass e on row i changes the outer objective J by -e G_i (implicit differentiation), so a row with
a positive gain helps. J is the preference of good answers over bad ones, or the likelihood of
good answers, on retain records kept for it (``outer_group``). Between rounds weights are tuned
on the simplex and the model is trained on the support, so that gains do not grow stale; in the
end the model is put back, and the host unlearns the support from the start. ``weigh: u2a`` beside
it tunes the weights of the chosen rows.

Paper: arXiv 2504.06659; its code is not public. Deviations: symbols and schedule are ours, since
the paper's constants are not known; fewer rows than the share are chosen when no other row has a
positive gain.

A gain grows with the length of the gradient: long and rare answers win. ``score: cos`` looks at
the angle alone.
"""

from __future__ import annotations

import logging

from pydantic import Field

from delible.registry import register
from delible.train.bilevel import Bilevel
from delible.train.slots import Select, SlotContext

logger = logging.getLogger(__name__)


@register(
    kind="select",
    name="u2a",
    title="Selection for alignment (U2A)",
    summary="Uses the forget rows whose unlearning helps an outer objective most.",
    paper="2504.06659",
    year=2025,
    family="data selection",
    intention="as host",
    mechanism="wrapper",
    needs=("forget", "retain", "weights"),
    changes="nothing",
    weakest="the forget rows that were not chosen",
    badges=("parity", "variant"),
    variant="Rounds, rates and the default Hessian are ours; the paper's are not published.",
)
class U2ASelection(Bilevel, Select):
    """Options of the selection."""

    share: float = Field(0.3, gt=0, le=1, description="At most this share of the forget rows.")

    def choose(self, context: SlotContext) -> list[int]:
        available = len(context.rows["forget"])
        if self.share == 1:  # nothing to decide
            return list(range(available))
        found = self.solve(context, self.share, "select 'u2a'")
        logger.info(
            f"select: {len(found.support)} of {available} forget rows help the outer objective "
            f"most; equal updates take {available / len(found.support):.3g} times the epochs"
        )
        return found.support
