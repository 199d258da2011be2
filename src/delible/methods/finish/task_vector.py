"""Task vector: the way to knowing the forget rows is walked in the opposite direction.

    theta_new = theta_start - scale * (theta_trained - theta_start)       for every float tensor

The trained model has been fine-tuned on the forget rows (``objective: finetune``); the
difference to its start is what it learned there, and is subtracted from the start.

Paper: arXiv 2212.04089; as an unlearning baseline arXiv 2407.06460. Reference code:
github.com/jaechan-repo/muse_bench. Deviations: none. Large scales ruin the model: try several.
"""

from __future__ import annotations

import logging
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from delible.errors import RunError
from delible.lm.lm import LM
from delible.lm.sharded import spread
from delible.registry import register
from delible.train.slots import Finish, FinishContext
from delible.train.vectors import along

logger = logging.getLogger(__name__)


def negated(start: Tensor, trained: Tensor, scale: float) -> Tensor:
    """start - scale * (trained - start), computed in fp32; exactly the start for scale 0."""
    return along(start, trained, -scale)


@register(
    kind="finish",
    name="task_vector",
    title="Negated task vector",
    summary="Subtracts from the start model what fine-tuning on the forget rows added.",
    paper="2212.04089",
    year=2022,
    family="task arithmetic",
    intention="removal",
    mechanism="merge/edit",
    needs=("forget", "weights"),
    changes="weights",
    reversible=False,
    weakest="utility",
    badges=("parity",),
)
class TaskVector(Finish):
    """Options of the task vector."""

    needs_start: ClassVar[bool] = True

    scale: float = Field(
        1.0, ge=0, description="How far to go back; 0 is the start model, larger forgets more."
    )

    @torch.no_grad()
    def apply(self, context: FinishContext) -> LM:
        lm = context.lm
        lm.settle()
        if lm.wears_adapter:
            lm.merge_adapter()
            logger.info("finish: the adapter is merged before its vector is subtracted")
        start = context.start()
        before = dict(start.core.named_parameters())
        squares = 0.0
        for name, value in lm.core.named_parameters():
            if name not in before or before[name].shape != value.shape:
                raise RunError(
                    f"the start model has no tensor '{name}' of shape {tuple(value.shape)}.",
                    where="finish 'task_vector'",
                    hint="Both models must have the same architecture; merge adapters first.",
                )
            if value.is_floating_point():
                origin = spread(before[name].to(value.device, value.dtype), like=value)
                squares += float((value.float() - origin.float()).pow(2).sum())
                value.copy_(negated(origin, value, self.scale))
        lm.touch()
        context.notes["task_vector"] = {"scale": self.scale, "norm": squares**0.5}
        logger.info(
            f"finish: task vector of norm {squares**0.5:.3g} subtracted {self.scale:g} times"
        )
        return lm
