"""The rows of the two new tokens move, and a low-rank adapter or the last blocks beside them.

    adapter       W x + (alpha / rank) B A x   for the query and value matrices, and two rows
    last_blocks   all weights of the last blocks, and two rows of the embedding

The two rows are those of the tags of the forget protocol; the rest of the embedding is masked.

Paper: arXiv 2410.00382. Reference code: seele1917/test-time-in-context-unlearning.
Deviations: with an adapter the paper leaves the new rows untrained, as they are drawn; here they
learn (`rows: false` is the paper's). Blocks and rows come from the model, where the code has the
numbers of one model. No dropout, as for place `lora`. Finish with `merge_adapter`: an adapter alone
does not hold the rows.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field
from transformers.pytorch_utils import Conv1D

from delible.errors import RecipeError
from delible.lm.new_tokens import token_of
from delible.registry import register
from delible.system.tags import TAGS
from delible.train.slots import Place, Placement, SlotContext

if TYPE_CHECKING:
    from delible.lm.lm import LM

logger = logging.getLogger(__name__)

#: Parts of the names of matrices that make queries and values, alone or joined with the keys.
QUERY_VALUE = ("q_proj", "v_proj", "query", "value", "qkv", "c_attn")


def query_value_layers(lm: LM) -> list[str]:
    """Paths of the linear layers that make queries and values."""
    found = []
    for layer in range(lm.anatomy.layers):
        for name in lm.anatomy.parameter_names(layer, "attention"):
            path, _, kind = name.rpartition(".")
            module = lm.core.get_submodule(path)
            linear = isinstance(module, (torch.nn.Linear, Conv1D)) and kind == "weight"
            if linear and any(part in path.rpartition(".")[2] for part in QUERY_VALUE):
                found.append(path)
    return found


@register(
    kind="place",
    name="tag_rows",
    title="Rows of the protocol's tags",
    summary="Trains the rows of two new tokens, with an adapter or with the last blocks.",
    paper="2410.00382",
    year=2024,
    mechanism="adapter",
    needs=("weights",),
    changes="weights",
    reversible=False,
    badges=("variant",),
    variant="The new rows learn beside an adapter, too; no dropout.",
)
class TagRows(Place):
    """Options of what moves beside the rows."""

    beside: Literal["adapter", "last_blocks"] = Field(
        "adapter", description="What moves beside the rows."
    )
    rank: int = Field(4, ge=1, description="adapter: inner width of each product.")
    alpha: float = Field(8.0, gt=0, description="adapter: the product is scaled by alpha / rank.")
    blocks: int = Field(2, ge=1, description="last_blocks: how many of them.")
    rows: bool = Field(True, description="Whether the rows of the tags move.")

    def apply(self, context: SlotContext) -> Placement:
        lm = context.lm
        tokens = [token_of(lm, tag) for tag in TAGS]
        if None in tokens:
            raise RecipeError(
                "the model has no tokens for the tags.",
                where="place 'tag_rows'",
                hint="Generate 'forget_protocol' makes them (generate: forget_protocol).",
            )
        lm.model.requires_grad_(False)
        if self.beside == "adapter":
            self._wear(context)
        else:
            for layer in range(max(0, lm.anatomy.layers - self.blocks), lm.anatomy.layers):
                for parameter in lm.anatomy.block(lm.core, layer).parameters():
                    parameter.requires_grad_(True)
        table = lm.core.get_input_embeddings().weight
        table.requires_grad_(self.rows)
        trained = {
            name: parameter
            for name, parameter in lm.model.named_parameters()
            if parameter.requires_grad
        }
        masks = {name: torch.ones_like(value, dtype=torch.bool) for name, value in trained.items()}
        for name, value in trained.items():
            if value is table:
                masks[name].zero_()
                masks[name][tokens] = True
        moving = sum(int(mask.sum()) for mask in masks.values())
        logger.info(
            f"place: {self.beside.replace('_', ' ')} and the tags' rows ({moving:,} weights)"
        )
        return Placement(trained, masks if self.rows else None)

    def _wear(self, context: SlotContext) -> None:
        from peft import LoraConfig, get_peft_model  # slow to import

        lm = context.lm
        if lm.wears_adapter:
            raise RecipeError(
                "the model already wears an adapter.",
                where="place 'tag_rows'",
                hint="Merge it first (finish: merge_adapter in the run that made it).",
            )
        paths = query_value_layers(lm)
        if not paths:
            raise RecipeError(
                "no matrix of the model is known to make queries and values.",
                where="place 'tag_rows'",
                hint="Train the last blocks (--beside last_blocks), or use place 'lora'.",
            )
        config = LoraConfig(
            r=self.rank, lora_alpha=self.alpha, lora_dropout=0.0, target_modules=paths, bias="none",
            fan_in_fan_out=any(isinstance(lm.core.get_submodule(path), Conv1D) for path in paths),
            task_type="CAUSAL_LM",
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            seed = context.generator("place.tag_rows").initial_seed()
            torch.default_generator.manual_seed(seed)
            lm.wear(get_peft_model(lm.core, config, autocast_adapter_dtype=True))
