"""Low-rank adapters: the weights stay, a small product is learned beside each matrix.

    W x  becomes  W x + (alpha / rank) B A x

with A random and B zero at the start, so that training starts from the model as it is. Every
linear layer of the blocks gets one, or those between two depths, or only some of attention; the
head and the embedding do not. The model wears the adapter (PEFT) and is saved as an adapter;
``finish: merge_adapter`` adds it to the weights.

Paper: arXiv 2106.09685. Reference code: github.com/huggingface/peft, which does the work.
Deviations: A is drawn from the run's seed; adapter weights are fp32 whatever the model's are; and
there is no dropout, since cached values of the reference model need the same model in every pass.
A mixture of experts that fuses its experts into one tensor gets no adapter there, and says so.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn
from transformers.pytorch_utils import Conv1D

from delible.errors import RecipeError
from delible.lm.anatomy import Anatomy
from delible.lm.lm import LM
from delible.registry import register
from delible.train.slots import Place, Placement, SlotContext

logger = logging.getLogger(__name__)

#: Which linear layers get an adapter.
On = Literal["all", "query_key", "value"]


def linear_layers(core: nn.Module, anatomy: Anatomy, blocks: Sequence[int]) -> list[str]:
    """Paths of every linear layer inside the given blocks, in the order of the modules."""
    inside = tuple(f"{anatomy.block_path(block)}." for block in blocks)
    return [
        path
        for path, module in core.named_modules()
        if path.startswith(inside) and isinstance(module, (nn.Linear, Conv1D))
    ]


def chosen_layers(core: nn.Module, anatomy: Anatomy, blocks: Sequence[int], on: On) -> list[str]:
    """Paths of the linear layers that get an adapter.

    Raises:
        RecipeError: There is none.
    """
    every = linear_layers(core, anatomy, blocks)
    if on == "all":
        return every
    parts = anatomy.attention_in
    if len(parts) == 3:
        parts = parts[:2] if on == "query_key" else parts[2:]
    else:
        logger.warning(
            f"place: queries, keys and values come from {' and '.join(parts)}; '{on}' cannot be "
            "taken apart, so that gets the adapter as a whole."
        )
    found = [path for path in every if path.endswith(tuple(f".{part}" for part in parts))]
    if not found:
        raise RecipeError(
            "the model has no such linear layers.",
            where=f"place 'lora', on {on}",
            hint="Choose --on all.",
        )
    return found


@register(
    kind="place",
    name="lora",
    title="Low-rank adapters (LoRA)",
    summary="Trains a small low-rank product beside every linear layer of the blocks.",
    paper="2106.09685",
    year=2021,
    mechanism="adapter",
    needs=("weights",),
    changes="adapter",
    reversible=True,
    weakest="removal of the adapter, unless it is merged",
    badges=("parity",),
)
class LoRA(Place):
    """Options of the adapters."""

    rank: int = Field(8, ge=1, description="Inner width of each product.")
    alpha: float = Field(16.0, gt=0, description="The product is scaled by alpha / rank.")
    first: float = Field(
        0.0, ge=0, le=1, description="Depth of the first block with adapters: 0 the first, 1 the "
        "last.",
    )  # fmt: skip
    last: float = Field(1.0, ge=0, le=1, description="Depth of the last block with adapters.")
    on: On = Field(
        "all", description="Which matrices get one: all linear layers, or those of attention that "
        "make queries and keys, or values (where one matrix makes all three: that one).",
    )  # fmt: skip

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.first > self.last:
            raise ValueError("first must not lie behind last")
        return self

    def moving_blocks(self, lm: LM) -> range:
        return range(lm.anatomy.layer_at(self.first), lm.anatomy.layer_at(self.last) + 1)

    def apply(self, context: SlotContext) -> Placement:
        from peft import LoraConfig, get_peft_model  # slow to import

        lm = context.lm
        if lm.wears_adapter:
            raise RecipeError(
                "the model already wears an adapter.",
                where="place 'lora'",
                hint="Merge it first (finish: merge_adapter in the run that made it).",
            )
        blocks = self.moving_blocks(lm)
        paths = chosen_layers(lm.core, lm.anatomy, blocks, self.on)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=0.0,
            target_modules=paths,
            # Conv1D keeps its matrix as [in, out]
            fan_in_fan_out=any(isinstance(lm.core.get_submodule(path), Conv1D) for path in paths),
            bias="none",
            task_type="CAUSAL_LM",
        )
        fused = _fused_experts(lm.core, lm.anatomy, blocks)
        with torch.random.fork_rng(devices=[]):
            seed = context.generator("place.lora").initial_seed()
            torch.default_generator.manual_seed(seed)
            lm.wear(get_peft_model(lm.core, config, autocast_adapter_dtype=True))
        trained = {
            name: parameter
            for name, parameter in lm.model.named_parameters()
            if parameter.requires_grad
        }
        logger.info(
            f"place: LoRA of rank {self.rank} on {len(paths)} linear layers "
            f"({sum(parameter.numel() for parameter in trained.values()):,} weights)"
        )
        if fused:
            logger.warning(
                f"place: {len(fused)} fused expert tensors get no adapter and stay frozen; "
                "use place 'layers' to train experts."
            )
        return Placement(trained)


def _fused_experts(core: nn.Module, anatomy: Anatomy, blocks: Sequence[int]) -> list[str]:
    """Names of expert weights of three dimensions, which are no linear layers."""
    inside = tuple(f"{anatomy.block_path(block)}." for block in blocks)
    return [
        name
        for name, parameter in core.named_parameters()
        if name.startswith(inside) and parameter.dim() == 3
    ]
