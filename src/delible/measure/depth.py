"""How deep a fact is erased: layer by layer, where the original's layers hold it.

With s the log-probability of a fact when it is read from layer l's states of the original M, the
reference R and the unlearned model U:

    d_R = s_M - s_R        how much of the fact layer l of the original holds
    d_U = s_M - s_U        how much of that is gone
    depth = sum_l d_R clip(d_U / d_R, 0, 1) / sum_l d_R        over the layers with d_R > threshold

0: everything is there, 1: as little as in a model that never saw it. Paper: arXiv 2605.24614.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from delible.errors import DataError, ModelError
from delible.lm.lm import LM

#: Log-probabilities below this are as good as none: states of unusual size give extreme ones.
FLOOR = -20.0


@dataclass(frozen=True)
class Depth:
    """One fact's depth.

    Attributes:
        value: In [0, 1]; None where no layer holds the fact.
        layers: The share that is gone, by layer; None where the layer does not hold it.
    """

    value: float | None
    layers: tuple[float | None, ...]


def depth(held: Sequence[float], gone: Sequence[float], threshold: float) -> Depth:
    """The weighted mean over the layers that hold a fact.

    Args:
        held: d_R of each layer.
        gone: d_U of each layer.
        threshold: A layer holds the fact if its d_R is above this.
    """
    layers = tuple(
        min(1.0, max(0.0, u / r)) if r > threshold else None
        for r, u in zip(held, gone, strict=True)
    )
    weight = sum(r for r, share in zip(held, layers, strict=True) if share is not None)
    if not weight:
        return Depth(None, layers)
    total = sum(r * share for r, share in zip(held, layers, strict=True) if share is not None)
    return Depth(total / weight, layers)


def known_by_layer(depths: Sequence[Depth]) -> tuple[float | None, ...]:
    """What is still there in each layer, in [0, 1]: the mean over the facts that it holds."""
    found = []
    for shares in zip(*(one.layers for one in depths), strict=True):
        there = [1.0 - share for share in shares if share is not None]
        found.append(sum(there) / len(there) if there else None)
    return tuple(found)


def clipped_mean(logprobs: Tensor) -> Tensor:
    """Mean over the last axis of log-probabilities that are at least :data:`FLOOR`.

    What is no number counts as the floor: such a state says nothing.
    """
    return torch.nan_to_num(logprobs.double(), nan=FLOOR).clamp(min=FLOOR).mean(dim=-1)


def compared(lm: LM, original: LM | None, reference: LM | None, where: str) -> tuple[LM, LM]:
    """The original and the reference, with which a model can be compared layer by layer.

    Raises:
        DataError: One of them was not given.
        ModelError: They are of another architecture, or have another tokenizer.
    """
    for name, flag, given in (
        ("the model before unlearning", "--before", original),
        ("a model that never saw the records", "--reference", reference),
    ):
        if given is None:
            raise DataError(
                f"it compares hidden states with those of {name}, which was not given.",
                where=where,
                hint=f"Add {flag} MODEL.",
            )
        same = (
            (lm.anatomy.layers, lm.anatomy.hidden_size, lm.vocabulary)
            == (given.anatomy.layers, given.anatomy.hidden_size, given.vocabulary)
            and type(lm.core) is type(given.core)
            and lm.template.fingerprint == given.template.fingerprint
        )  # fmt: skip
        if not same:
            raise ModelError(
                f"'{lm.name}' and '{given.name}' have other layers or another tokenizer, so their "
                "hidden states cannot be compared.",
                where=where,
                hint="Compare models of one architecture.",
            )
    assert original is not None
    assert reference is not None
    return original, reference
