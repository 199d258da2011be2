"""Tokens that a model does not have yet: one id for each, with a row in embedding and head.

A new row is the mean of the rows of the pieces that its text was read as before, so it depends on
nothing random. Rows that a model keeps free behind its tokenizer's vocabulary are used first.
What was there before can be put back, bit by bit.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from delible.errors import ModelError
from delible.lm.lm import LM


def token_of(lm: LM, text: str) -> int | None:
    """The id of a token that is exactly this text; None: it is read as several."""
    ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    known = len(ids) == 1 and lm.tokenizer.convert_ids_to_tokens(ids[0]) == text
    return int(ids[0]) if known else None


def tables(lm: LM) -> dict[str, Any]:
    """The modules with a row for each token, by name: "embedding", and "head" if it is another."""
    embedding, head = lm.core.get_input_embeddings(), lm.core.get_output_embeddings()
    tied = head.weight is embedding.weight
    return {"embedding": embedding} if tied else {"embedding": embedding, "head": head}


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """What tokens a model had.

    Attributes:
        tokenizer: As it was; new tokens are given to a copy.
        size: Rows of the head.
        free: The rows behind the tokenizer's vocabulary, and their biases, by table.
    """

    tokenizer: Any
    size: int
    free: dict[str, tuple[Tensor, Tensor | None]]


def vocabulary_of(lm: LM) -> Vocabulary:
    """What tokens a model has now."""
    first = len(lm.tokenizer)

    def behind(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.detach()[first:].clone()

    free = {}
    for name, table in tables(lm).items():
        rows = behind(table.weight)
        assert rows is not None
        free[name] = (rows, behind(getattr(table, "bias", None)))
    return Vocabulary(lm.tokenizer, lm.vocabulary, free)


@torch.no_grad()
def put_back(lm: LM, vocabulary: Vocabulary) -> None:
    """Takes away what tokens were added since, with their rows."""
    lm.tokenizer = lm.template.tokenizer = vocabulary.tokenizer
    if lm.vocabulary != vocabulary.size:
        lm.core.resize_token_embeddings(vocabulary.size, mean_resizing=False)
    first = len(vocabulary.tokenizer)
    for name, table in tables(lm).items():
        rows, bias = vocabulary.free[name]
        table.weight[first:] = rows
        if bias is not None:
            table.bias[first:] = bias


def add_tokens(lm: LM, texts: Sequence[str]) -> tuple[int, ...]:
    """Makes each text one token; those that are one already stay as they are.

    Returns:
        Their ids.

    Raises:
        ModelError: The tokenizer does not take them.
    """
    new = [text for text in dict.fromkeys(texts) if token_of(lm, text) is None]
    if new:
        # a copy of a model has its own weights and shares the tokenizer
        lm.tokenizer = lm.template.tokenizer = copy.deepcopy(lm.tokenizer)
        pieces = [lm.tokenizer(text, add_special_tokens=False)["input_ids"] for text in new]
        lm.tokenizer.add_special_tokens(
            {"additional_special_tokens": new}, replace_extra_special_tokens=False
        )
        needed = max(lm.tokenizer.convert_tokens_to_ids(text) for text in new) + 1
        if needed > lm.vocabulary:
            with torch.random.fork_rng(devices=[]):  # its own rows are overwritten
                lm.core.resize_token_embeddings(needed, mean_resizing=False)
        _begin(lm, new, pieces)
        patches = lm.patches
        lm.touch()
        lm.patches = patches  # of other weights, which are as they were
    ids = tuple(token_of(lm, text) for text in texts)
    for text, found in zip(texts, ids, strict=True):
        if found is None:
            raise ModelError(f"the tokenizer reads '{text}' as several tokens all the same.")
    return tuple(one for one in ids if one is not None)


@torch.no_grad()
def _begin(lm: LM, texts: Sequence[str], pieces: Sequence[Sequence[int]]) -> None:
    for table in tables(lm).values():
        for text, ids in zip(texts, pieces, strict=True):
            row = lm.tokenizer.convert_tokens_to_ids(text)
            table.weight[row] = table.weight[list(ids)].float().mean(dim=0).to(table.weight.dtype)
            if getattr(table, "bias", None) is not None:
                table.bias[row] = table.bias[list(ids)].mean()


__all__ = ["Vocabulary", "add_tokens", "put_back", "tables", "token_of", "vocabulary_of"]
