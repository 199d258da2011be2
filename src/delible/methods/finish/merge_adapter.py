"""Adds a low-rank adapter to the weights it was trained beside, so that it cannot be taken off.

    W  becomes  W + (alpha / rank) B A

Paper: arXiv 2106.09685. Reference code: github.com/huggingface/peft, which does the work.
"""

from __future__ import annotations

from delible.errors import RecipeError, RunError
from delible.lm.anatomy import derive
from delible.lm.lm import LM
from delible.registry import register
from delible.train.slots import Finish, FinishContext


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
        merge = getattr(lm.model, "merge_and_unload", None)
        if merge is None:
            raise RecipeError(
                "the model wears no adapter.",
                where="finish 'merge_adapter'",
                hint="Train with place: lora, or leave finish out.",
            )
        try:
            lm.model = merge(safe_merge=True)
        except ValueError as error:  # what PEFT raises for values that are not finite
            raise RunError(
                f"the adapter cannot be merged: {error}", where="finish 'merge_adapter'"
            ) from error
        lm.anatomy = derive(lm.core)  # the matrices are back in their places
        lm.touch()
        context.say("finish: the adapter is merged into the weights")
        return lm
