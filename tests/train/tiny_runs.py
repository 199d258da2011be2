"""A tiny language model for the engine's tests."""

from __future__ import annotations

from delible.lm.lm import LM
from delible.testing.tiny import tiny_model, tiny_tokenizer


def make(family: str = "llama", seed: int = 0) -> LM:
    return LM(tiny_model(family, seed=seed), tiny_tokenizer(), name=f"tiny-{family}")
