"""Where an answer ends: at a token that a model's settings name, or where its context is full."""

from __future__ import annotations

from typing import Any


def declared_ends(generation: Any, config: Any) -> frozenset[int]:
    """Ends of an answer that a model's settings name: one token, a list of them, or none.

    Args:
        generation: The settings for generation, or None; they win if they name any.
        config: The settings of the model.
    """
    for one in (generation, config, config.get_text_config()):
        named = getattr(one, "eos_token_id", None)
        if named is not None:
            return frozenset({named} if isinstance(named, int) else named)
    return frozenset()


def context_tokens(config: Any) -> int | None:
    """Tokens of a prompt and its answer together that a model is made for; None: it names none."""
    named = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(named) if named else None
