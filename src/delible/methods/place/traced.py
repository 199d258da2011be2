"""Only the MLPs that carry the facts move: a window of blocks, found by causal tracing.

    window = argmax over s of sum over blocks s ... s + width - 1 of CE_l

with CE_l the causal effect of the MLP of block l: how much of an answer's probability comes back
when noise is on the subject and this MLP alone is as it was (``train/tracing.py``).

Paper: arXiv 2602.19275 (KUDA); tracing: arXiv 2202.05262. Reference code: none was found.
Deviations: the forget rows are the facts, with their subjects, or the first name of a running text
and what follows it; few of them and few draws of the noise, since each costs a pass per block.
"""

from __future__ import annotations

import logging

from pydantic import Field

from delible.errors import RecipeError
from delible.registry import register
from delible.train.placing import Part, placed_in
from delible.train.slots import Place, Placement, SlotContext
from delible.train.tracing import best_window, causal_effects

logger = logging.getLogger(__name__)


@register(
    kind="place",
    name="traced",
    title="Traced layers",
    summary="Trains the MLPs of the consecutive layers that carry most of the forget rows' facts.",
    paper="2602.19275",
    year=2026,
    needs=("forget", "weights"),
    changes="weights",
    reversible=False,
    badges=("variant",),
    variant="Facts are the forget rows; probabilities are means over the answer's tokens.",
)
class Traced(Place):
    """Options of the traced window."""

    width: int = Field(3, ge=1, description="Consecutive layers that move.")
    role: Part = Field("mlp_out", description="Part of each layer that moves.")
    facts: int = Field(8, ge=1, description="Forget rows that are traced, at most.")
    draws: int = Field(2, ge=1, description="Draws of the noise per traced row.")
    spread: float = Field(
        3.0, gt=0, description="Noise in standard deviations of the embedding's entries."
    )

    def apply(self, context: SlotContext) -> Placement:
        effects = causal_effects(
            context.lm, context.rows["forget"], facts=self.facts, draws=self.draws,
            spread=self.spread, seed=context.seed, stage=context.stage,
        )  # fmt: skip
        if effects is None:
            raise RecipeError(
                "no forget row names what it is about, so nothing can be traced.",
                where="place 'traced'",
                hint="Give records with a subject, or say where: --place layers.",
            )
        window = best_window(effects, self.width)
        told = ", ".join(f"{layer}: {float(effects[layer]):.3f}" for layer in window)
        logger.info(f"place: causal effects by layer are largest at {told}")
        return placed_in(context.lm, window, self.role, "traced")
