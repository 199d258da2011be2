"""Tokens that a model does not have yet: one id for each, with a row in embedding and head.

A new row is the mean of the rows of the pieces that its text was read as before, so it depends on
nothing random. Rows that a model keeps free behind its tokenizer's vocabulary are used first.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch

from delible.errors import ModelError
from delible.lm.lm import LM


def token_of(lm: LM, text: str) -> int | None:
    """The id of a token that is exactly this text; None: it is read as several."""
    ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    known = len(ids) == 1 and lm.tokenizer.convert_ids_to_tokens(ids[0]) == text
    return int(ids[0]) if known else None


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
        lm.touch()
    ids = tuple(token_of(lm, text) for text in texts)
    for text, found in zip(texts, ids, strict=True):
        if found is None:
            raise ModelError(f"the tokenizer reads '{text}' as several tokens all the same.")
    return tuple(one for one in ids if one is not None)


@torch.no_grad()
def _begin(lm: LM, texts: Sequence[str], pieces: Sequence[Sequence[int]]) -> None:
    tables = {id(part.weight): part for part in (
        lm.core.get_input_embeddings(), lm.core.get_output_embeddings()
    )}  # fmt: skip
    for table in tables.values():
        for text, ids in zip(texts, pieces, strict=True):
            row = lm.tokenizer.convert_tokens_to_ids(text)
            table.weight[row] = table.weight[list(ids)].float().mean(dim=0).to(table.weight.dtype)
            if getattr(table, "bias", None) is not None:
                table.bias[row] = table.bias[list(ids)].mean()


__all__ = ["add_tokens", "token_of"]
