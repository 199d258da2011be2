"""Whether the modules of a model do what their places in its anatomy say: tried, not read."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from delible.errors import ModelError
from delible.lm.anatomy import Anatomy, unwrapped
from delible.lm.hooks import capture, steer, truncated


def verify(model: nn.Module, anatomy: Anatomy) -> None:
    """Checks an anatomy against what the modules do with three tokens; costs one block.

    A change of the first token must reach the last position through attention, and must not reach
    it once attention is silenced; attention, MLP and block must write the hidden size; the head
    must read what the backbone gives.

    Raises:
        ModelError: The module that does something else than its place in the anatomy says.
    """
    model = unwrapped(model)
    device = next(model.get_submodule(anatomy.embedding).parameters()).device
    attention, mlp = anatomy.path(0, anatomy.attention), anatomy.path(0, anatomy.mlp)
    block = anatomy.block_path(0)

    def run(first_token: int) -> dict[str, torch.Tensor]:
        with (
            capture(model, [attention, mlp, block, anatomy.backbone]) as outputs,
            capture(model, [anatomy.head], which="input") as inputs,
        ):
            model(input_ids=torch.tensor([[first_token, 5, 6]], device=device), use_cache=False)
        return {**outputs, anatomy.head: inputs[anatomy.head]}

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), truncated(model, anatomy, 1):
            heard = [run(3), run(4)]
            with steer(model, attention, torch.zeros_like):
                silenced = [run(3), run(4)]
    finally:
        model.train(was_training)

    def fail(problem: str) -> ModelError:
        return ModelError(
            problem,
            where=anatomy.class_name,
            hint="This architecture is not understood; please report it with print(model).",
        )

    def last(values: Mapping[str, torch.Tensor], path: str) -> torch.Tensor:
        return values[path].reshape(-1, values[path].shape[-1])[-1]

    for path in (attention, mlp, block):
        if heard[0][path].shape[-1] != anatomy.hidden_size:
            raise fail(f"'{path}' writes {heard[0][path].shape[-1]} values per token.")
    if torch.equal(last(heard[0], attention), last(heard[1], attention)):
        raise fail(f"'{attention}' does not move information between positions.")
    for path in (mlp, block):
        one, other = last(silenced[0], path), last(silenced[1], path)
        if not torch.allclose(one, other, rtol=1e-4, atol=1e-5):
            raise fail(f"'{path}' moves information between positions without '{attention}'.")
    if not torch.equal(heard[0][anatomy.head], heard[0][anatomy.backbone]):
        raise fail(f"'{anatomy.head}' does not read the output of '{anatomy.backbone}'.")
