"""What goes through the model while it reads rows: inputs of its linear layers, and the states
that its head would read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from delible.lm.forward import collate
from delible.lm.identity import only_reads
from delible.lm.layout import padded_rows, told
from delible.lm.lm import LM
from delible.train.batches import FORWARD_BUDGET, batches
from delible.train.gradient_space import linear_layers
from delible.train.randomness import generator
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


@dataclass
class Inputs:
    """What a weight matrix reads.

    Attributes:
        moment: Mean of k k^T over its inputs k, float64.
        tokens: Inputs behind it.
        inputs_first: The matrix is [inputs, outputs] (``Conv1D``).
    """

    moment: Float[Tensor, "inputs inputs"]
    tokens: int
    inputs_first: bool


@torch.no_grad()
def input_moments(
    lm: LM,
    rows: Sequence[Row],
    parameters: Iterable[nn.Parameter],
    *,
    share: float = 1.0,
    seed: int = 0,
    stage: Stage = unwatched,
) -> dict[int, Inputs]:
    """Second moments of the inputs of linear layers, by the identity of their weight.

    Over all real positions but the first of each row. Weights of other modules are left out.

    Args:
        share: Of the positions, at random, but at least three for each input while there are any.
    """
    wanted = {id(value) for value in parameters}
    found: dict[int, Inputs] = {}
    modules = [
        (id(module.weight), module)
        for module in lm.core.modules()
        if isinstance(module, (nn.Linear, Conv1D)) and id(module.weight) in wanted
    ]
    positions = sum(len(row.encoded.ids) - 1 for row in rows)
    kept: list[Tensor] = []

    def reading(key: int, transposed: bool) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            values = arguments[0].reshape(-1, arguments[0].shape[-1])[1:]
            width = values.shape[1]
            if key not in found:
                empty = torch.zeros(width, width, dtype=torch.float64, device=values.device)
                found[key] = Inputs(empty, 0, transposed)
            least = max(share, min(1.0, 3 * width / max(1, positions)))
            chosen = values[kept[0].to(values.device) < least].double()
            found[key].moment += chosen.T @ chosen
            found[key].tokens += len(chosen)

        return hook

    backbone = lm.core.get_submodule(lm.anatomy.backbone)
    with lm.evaluating(), lm.computing(), ExitStack() as stack:
        for key, module in modules:
            seen_by = only_reads(reading(key, isinstance(module, Conv1D)))
            stack.callback(module.register_forward_pre_hook(seen_by).remove)
        each = ([row] for row in (rows if modules else ()))
        for (row,) in watched(each, f"inputs of {len(modules)} matrices", len(rows), stage):
            draws = torch.rand(len(row.encoded.ids) - 1, generator=generator(seed, row.key))
            kept[:] = [draws]
            batch = collate([row.encoded], lm.pad_id, lm.device)
            with told(lm, padded_rows(batch.ids, batch.lengths, batch.starts)):
                backbone(input_ids=batch.ids, use_cache=False)
    for inputs in found.values():
        inputs.moment /= max(1, inputs.tokens)
    return found
