"""Uniform numbers for the elements of a state, which do not depend on who is beside it in a batch.

Each is a function of a seed, the layer, the neuron, and the token: of the tokens of its prompt up
to it, or, in an answer, of the whole prompt and the place. So a beginning that texts share is drawn
alike in all of them, and a token keeps its numbers in the key-value cache.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from delible.intervene.taps import Where

_WORD, _HALF = 1 << 64, 1 << 63
_STEP, _MULTIPLIER = 0x9E3779B97F4A7C15, 0x5851F42D4C957F2D


def uniform(
    seed: int, where: Where, neurons: Int[Tensor, " neuron"]
) -> Float[Tensor, "token neuron"]:
    """Numbers in [0, 1), float64, for some neurons of each state's token."""
    tokens = _tokens(where).to(neurons.device)
    own = int.from_bytes(hashlib.sha256(f"{seed}/{where.layer}".encode()).digest()[:8], "big")
    columns = mixed(neurons.long() * _signed(_STEP) + _signed(own))
    bits = mixed(tokens[:, None] ^ columns[None])
    return ((bits >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


def mixed(values: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Bits well mixed (the finaliser of splitmix64), modulo 2^64."""
    values = values + _signed(_STEP)
    values = (values ^ _right(values, 30)) * _signed(0xBF58476D1CE4E5B9)
    values = (values ^ _right(values, 27)) * _signed(0x94D049BB133111EB)
    return values ^ _right(values, 31)


def _tokens(where: Where) -> Int[Tensor, " token"]:
    """A number for each token, of what stands before it in its prompt and of its place."""
    layout = where.layout
    if "draws" not in layout.known:
        rows = [_beginnings(tuple(prompt)) for prompt in layout.prompts]
        width = max(len(row) for row in rows)
        table = torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in rows])
        ends = torch.tensor([len(row) for row in rows]) - 1
        layout.known["draws"] = table, ends
    table, ends = layout.known["draws"]
    text, place = where.text.cpu(), where.place.cpu().clamp(min=0)
    found = table[text, torch.minimum(place, ends[text])]
    return mixed(found ^ mixed(place))


@lru_cache(maxsize=512)
def _beginnings(ids: tuple[int, ...]) -> Int[Tensor, " token"]:
    """A number for each beginning of a prompt."""
    found, value = [], _STEP
    for token in ids:
        value = ((value ^ (token + 1)) * _MULTIPLIER + _STEP) % _WORD
        found.append(_signed(value))
    return torch.tensor(found or [_signed(value)])


def _signed(value: int) -> int:
    return value - _WORD if value >= _HALF else value


def _right(values: Tensor, by: int) -> Tensor:
    """A shift without the sign."""
    return (values >> by) & ((1 << (64 - by)) - 1)
