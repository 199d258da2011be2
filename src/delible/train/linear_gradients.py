"""What linear layers read and what comes back to them, row by row, in one pass over many rows.

Inputs x and output gradients d of a layer hold the gradient of its matrix (the sum over tokens of
d x^T), of a part of the rows too, and that of anything low-rank beside it. No parameter needs a
gradient of its own, so packed and frozen weights will do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from delible.lm.forward import Forward, collate, map_logits, target_logprobs
from delible.lm.lm import LM
from delible.train.row import Row

#: Padded tokens per pass: all inputs of linear layers are kept at once.
PASS_TOKENS = {"cpu": 512, "cuda": 8192}


class Taker(Protocol):
    """Who is told of every layer of a pass."""

    def beside(self, path: str, inputs: Tensor) -> Tensor | None:
        """What is added to the layer's output, if anything; inputs [..., in]."""

    def take(
        self,
        path: str,
        inputs: Float[Tensor, "rows sequence in"],
        gradients: Float[Tensor, "rows sequence out"],
    ) -> None:
        """Inputs, and gradients of the rows' summed losses by the layer's output; fp32."""


def run_pass(
    lm: LM,
    rows: Sequence[Row],
    layers: Sequence[tuple[str, Any]],
    taker: Taker,
    *,
    back: bool = True,
) -> float:
    """One pass forth and back; returns the negative log-likelihood of all answer tokens, in nats.

    Padding has gradients of 0. Layers that read some tokens only (experts of their own) are left
    out: what they read belongs to no row.

    Args:
        back: Without, nothing is taken.
    """
    batch = replace(collate([row.encoded for row in rows], lm.pad_id, lm.device), prefix=0)
    shape = tuple(batch.ids.shape)
    with lm.evaluating(), _frozen(lm, back), _tapped(lm, layers, taker, shape):
        with lm.computing():
            states = Forward(lm)(batch)[0]
            values = map_logits(lm.head, states, batch.targets, target_logprobs, lm.vocabulary)
        if back:
            (-values.sum()).backward()  # type: ignore[no-untyped-call]
    return -float(values.detach().sum())


def passes(lm: LM, rows: Sequence[Row], parts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Places of parts of rows that go through together: as many as the budget allows, or one."""
    budget = PASS_TOKENS.get(lm.device.type, PASS_TOKENS["cuda"])
    longest = [max(len(rows[place].encoded.ids) for place in part) for part in parts]
    together: list[int] = []
    for one in sorted(range(len(parts)), key=longest.__getitem__):
        count = sum(len(parts[other]) for other in (*together, one))
        if together and count * longest[one] > budget:
            yield together
            together = []
        together.append(one)
    if together:
        yield together


@contextmanager
def _frozen(lm: LM, back: bool) -> Iterator[None]:
    """No parameter takes a gradient; what the embedding gives does, for a pass back."""

    def wants(module: torch.nn.Module, arguments: Any, output: Tensor) -> None:
        output.requires_grad_(back)

    before = [(value, value.requires_grad) for value in lm.model.parameters()]
    hook = lm.core.get_input_embeddings().register_forward_hook(wants)
    try:
        for value, _ in before:
            value.requires_grad_(False)
        with torch.set_grad_enabled(back):
            yield
    finally:
        hook.remove()
        for value, flag in before:
            value.requires_grad_(flag)


@contextmanager
def _tapped(
    lm: LM, layers: Sequence[tuple[str, Any]], taker: Taker, shape: tuple[int, ...]
) -> Iterator[None]:
    def hook_of(path: str) -> Any:
        def hook(module: torch.nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Any:
            inputs = arguments[0].detach()
            if inputs.numel() != shape[0] * shape[1] * inputs.shape[-1]:
                return None
            more = taker.beside(path, arguments[0])
            given = output if more is None else output + more.to(output.dtype)

            def taken(gradient: Tensor) -> None:
                whole = (shape[0], shape[1], -1)
                taker.take(path, inputs.reshape(whole).float(), gradient.reshape(whole).float())

            if given.requires_grad:
                given.register_hook(taken)
            return given

        return hook

    with ExitStack() as stack:
        for path, module in layers:
            stack.callback(module.register_forward_hook(hook_of(path), prepend=True).remove)
        yield
