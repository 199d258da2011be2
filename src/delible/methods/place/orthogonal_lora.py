"""Orthogonal LoRA: an adapter whose inputs are other directions than those of earlier adapters.

    loss + lambda sum_p sum_m || A_p,m A_m^T ||_F^2

over the matrices m and all earlier adapters p, whose A are fixed; B is free. So what a later
request writes is not read where an earlier one reads. Any objective, balance and hardener trains
it, with or without retain rows: the penalty's gradient, 2 lambda A sum_p A_p^T A_p, is added.

Paper: arXiv 2407.10223 (O3), after O-LoRA (2310.14152). Reference code:
github.com/GCYZSL/O3-LLM-UNLEARNING (all earlier adapters, as here; the paper's formula has the last
one only). Deviations: a new adapter starts anew by default; one that starts from the last one first
has to unlearn its own A, since that is not orthogonal to itself.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from delible.component import build
from delible.errors import RecipeError
from delible.lm.lm import LM
from delible.registry import register
from delible.routed.low_rank import LowRank
from delible.train.passes import Passes
from delible.train.slots import Place, Placement, SlotContext

logger = logging.getLogger(__name__)


def overlap(
    down: Float[Tensor, "rank inner"], earlier: Sequence[Float[Tensor, "other inner"]]
) -> Float[Tensor, ""]:
    """Sum over earlier A_p of the squared entries of A_p A^T; 0: all rows are orthogonal."""
    return torch.stack([(one @ down.T).square().sum() for one in earlier]).sum()


def overlap_gradient(
    down: Float[Tensor, "rank inner"], earlier: Float[Tensor, "ranks inner"]
) -> Float[Tensor, "rank inner"]:
    """The gradient of :func:`overlap` by A, for the rows of all earlier A_p together."""
    return 2 * (down @ earlier.T) @ earlier


@register(
    kind="place",
    name="orthogonal_lora",
    title="Orthogonal low-rank adapters",
    summary="A LoRA whose inputs stay orthogonal to those of earlier adapters.",
    paper="2407.10223",
    year=2025,
    mechanism="adapter",
    needs=("weights",),
    changes="adapter",
    reversible=True,
    weakest="removal of the adapter, unless it is merged",
    badges=("parity", "variant"),
    variant="Starts anew instead of from the last adapter, unless it is told to.",
)
class OrthogonalLoRA(Place):
    """Options of the adapters and of the penalty."""

    rank: int = Field(8, ge=1, description="Inner width of each product.")
    alpha: float = Field(16.0, gt=0, description="The product is scaled by alpha / rank.")
    first: float = Field(
        0.0, ge=0, le=1, description="Depth of the first block with adapters: 0 the first, 1 the "
        "last.",
    )  # fmt: skip
    last: float = Field(1.0, ge=0, le=1, description="Depth of the last block with adapters.")
    on: Literal["all", "query_key", "value"] = Field(
        "all", description="Which matrices get one: all linear layers, or those of attention that "
        "make queries and keys, or values.",
    )  # fmt: skip
    orthogonality: float = Field(
        0.1, ge=0, description="Weight of the penalty on rows that earlier adapters read, too."
    )
    earlier: tuple[str, ...] = Field(
        (), description="Folders of earlier adapters (PEFT), the first one first; a procedure that "
        "keeps adapters knows its own.",
    )  # fmt: skip
    start: Literal["fresh", "last"] = Field(
        "fresh", description="Where it starts: fresh, or from the last of the earlier adapters."
    )

    def moving_blocks(self, lm: LM) -> range:
        return range(lm.anatomy.layer_at(self.first), lm.anatomy.layer_at(self.last) + 1)

    def needs_whole(self) -> str | None:
        return "what it adds to each step's gradient is made of whole matrices"

    def apply(self, context: SlotContext) -> Placement:
        own = {name: getattr(self, name) for name in ("rank", "alpha", "first", "last", "on")}
        inner: Place = build("place", {"name": "lora", **own})
        lm = context.lm
        known = [LowRank.load(Path(one)) for one in self.earlier] + list(lm.earlier_adapters)
        # other draws than those of the adapters before it, which had the same seed
        draws = context.generator(f"place.orthogonal_lora/{len(known)}").initial_seed()
        placement = inner.apply(replace(context, seed=draws))
        downs = _downs(lm.core)
        if self.start == "last" and known:
            _copy(lm.core, known[-1])
        read = {
            path: torch.cat([one.pairs[path][0] for one in known if path in one.pairs])
            for path in downs
            if any(path in one.pairs for one in known)
        }
        if not read or not self.orthogonality:
            return placement
        fixed = {path: value.to(lm.device) for path, value in read.items()}
        logger.info(f"place: orthogonal to {len(known)} earlier adapters on {len(fixed)} matrices")

        def each_step(passes: Passes) -> None:
            for path, earlier in fixed.items():
                down = downs[path]
                with torch.no_grad():
                    more = self.orthogonality * overlap_gradient(down, earlier)
                    down.grad = more if down.grad is None else down.grad + more

        placement.each_step = each_step
        return placement


def _downs(core: nn.Module) -> dict[str, nn.Parameter]:
    """A of every matrix that has an adapter."""
    return {
        path: module.lora_A["default"].weight
        for path, module in core.named_modules()
        if "default" in getattr(module, "lora_A", {})
    }


def _copy(core: nn.Module, adapter: LowRank) -> None:
    """Puts an adapter's matrices where the new one's stand.

    Raises:
        RecipeError: It has another rank or other matrices.
    """
    for path, down in _downs(core).items():
        module: Any = core.get_submodule(path)
        pair = adapter.pairs.get(path)
        if (
            pair is None
            or pair[0].shape != down.shape
            or module.scaling["default"] != adapter.scale
        ):
            raise RecipeError(
                "it cannot start from the last adapter, which has another rank or scale, or other "
                "matrices.",
                where="place 'orthogonal_lora'",
                hint="Give the same rank, alpha and depths as before, or start='fresh'.",
            )
        with torch.no_grad():
            down.copy_(pair[0])
            module.lora_B["default"].weight.copy_(pair[1])
