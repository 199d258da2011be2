"""What goes through the model while it reads rows: inputs of its linear layers, and the states
that its head would read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from jaxtyping import Float
from torch import Tensor, nn

from delible.lm.forward import collate
from delible.lm.identity import only_reads
from delible.lm.layout import padded_rows, told
from delible.lm.lm import LM
from delible.train.batches import FORWARD_BUDGET, batches
from delible.train.gradient_space import linear_layers
from delible.train.row import Row
from delible.train.row_losses import answer_loss
from delible.watching import Stage, unwatched, watched


@torch.no_grad()
def input_norms(
    lm: LM, rows: Sequence[Row], stage: Stage = unwatched
) -> dict[str, Float[Tensor, " inputs"]]:
    """Root of the summed squares of each input of the blocks' linear layers, by weight name.

    Over all real positions that are computed for the answers' losses.
    """
    names = {id(value): name for name, value in lm.model.named_parameters()}
    squares: dict[str, Tensor] = {}

    def seeing(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            seen = arguments[0].float().reshape(-1, arguments[0].shape[-1]).pow(2).sum(dim=0)
            squares[name] = squares.get(name, 0) + seen

        return hook

    with lm.evaluating(), ExitStack() as stack:
        for _, module in linear_layers(lm):
            seen_by = only_reads(seeing(names[id(module.weight)]))
            hook = module.register_forward_pre_hook(seen_by)
            stack.callback(hook.remove)
        each = ([row] for row in rows)  # one at a time: padding must not count
        for alone in watched(each, f"inputs of the layers of {len(rows)} rows", len(rows), stage):
            answer_loss(lm, alone)
    return {name: value.sqrt() for name, value in squares.items()}


@torch.no_grad()
def mean_states(
    lm: LM, rows: Sequence[Row], stage: Stage = unwatched
) -> Float[Tensor, "rows hidden"]:
    """Mean over each row's real positions of the last hidden states (normed), float64."""
    found: dict[int, Tensor] = {}
    backbone = lm.core.get_submodule(lm.anatomy.backbone)
    parts = batches(lm, rows, FORWARD_BUDGET)
    with lm.evaluating(), lm.computing():
        for part in watched(parts, f"hidden states of {len(rows)} rows", len(rows), stage):
            encoded = [rows[place].encoded for place in part]
            batch = collate(encoded, lm.pad_id, lm.device)
            with told(lm, padded_rows(batch.ids, batch.lengths, batch.starts)):
                states = backbone(input_ids=batch.ids, use_cache=False).last_hidden_state
            mask = batch.position_mask[..., None]
            # where, not times: padding may hold anything
            sums = torch.where(mask, states.double(), 0.0).sum(dim=1)
            found |= zip(part, (sums / batch.lengths[:, None]).cpu(), strict=True)
    return torch.stack([found[place] for place in range(len(rows))])
