"""Adds a low-rank adapter to the weights it was trained beside, so that it cannot be taken off.

    W  becomes  W + (alpha / rank) B A

Paper: arXiv 2106.09685. Reference code: github.com/huggingface/peft, which does the work.
"""

from __future__ import annotations

import logging

from delible.errors import RecipeError
from delible.lm.lm import LM
from delible.precision import short_types
from delible.registry import register
from delible.train.slots import Finish, FinishContext

logger = logging.getLogger(__name__)


@register(
    kind="finish",
    name="merge_adapter",
    title="Merge the adapter",
    summary="Adds the trained adapter to the weights and saves an ordinary model.",
    paper="2106.09685",
    year=2021,
    intention="as host",
    mechanism="wrapper",
    needs=("weights",),
    changes="weights",
    reversible=False,
    weakest="as host",
    badges=("parity",),
)
class MergeAdapter(Finish):
    """Has no options."""

    def apply(self, context: FinishContext) -> LM:
        lm = context.lm
        if not lm.wears_adapter:
            raise RecipeError(
                "the model wears no adapter.",
                where="finish 'merge_adapter'",
                hint="Train with place: lora, or leave finish out.",
            )
        if short := short_types(lm.core.parameters()):
            lm.model.float()
            logger.info(
                f"finish: the weights are converted from {' and '.join(short)} to float32, or most "
                "of what the adapter adds would round away"
            )
        lm.merge_adapter()
        logger.info("finish: the adapter is merged into the weights")
        return lm
