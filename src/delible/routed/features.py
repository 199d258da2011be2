"""Features of a text, layer by layer: of a sentence encoder, or of the model that is asked."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from jaxtyping import Float

from delible.lm.encoder import SentenceEncoder, sentence_encoder
from delible.lm.lm import LM
from delible.lm.states import Span, read_states
from delible.routed.tuning import Tensors, pooled, wearing
from delible.system.asks import Prompt

Backbone = Literal["encoder", "states"]
#: Texts that go through an encoder at once.
BATCH = 32


class Features(Protocol):
    """Turns texts into one vector per layer.

    Attributes:
        identity: Changes whenever a vector could change.
    """

    @property
    def identity(self) -> str: ...

    def __call__(
        self, texts: Sequence[str], tuned: Tensors | None = None, scale: float = 1.0
    ) -> Float[np.ndarray, "text layer hidden"]:
        """float64, in the order of the texts.

        Args:
            tuned: Low-rank products that the encoder wears (:mod:`delible.routed.tuning`).
            scale: Of them.
        """
        ...


class EncoderFeatures:
    """Mean states behind each layer of a sentence encoder, without the embedding.

    Args:
        encoder: Of a local folder.
    """

    def __init__(self, encoder: SentenceEncoder) -> None:
        self.encoder = encoder

    @classmethod
    def of(cls, folder: str | Path | None) -> EncoderFeatures:
        """Of the encoder in a folder; None: the built-in one."""
        return cls(sentence_encoder(folder))

    @property
    def identity(self) -> str:
        return self.encoder.identity

    def __call__(
        self, texts: Sequence[str], tuned: Tensors | None = None, scale: float = 1.0
    ) -> Float[np.ndarray, "text layer hidden"]:
        tokenizer, model, longest = self.encoder.parts
        found: list[np.ndarray] = [np.zeros(0)] * len(texts)
        ids = tokenizer(list(texts), truncation=True, max_length=longest)["input_ids"]
        order = sorted(range(len(texts)), key=lambda place: len(ids[place]))
        with torch.inference_mode(), wearing(model, tuned, scale) if tuned else nullcontext():
            for start in range(0, len(order), BATCH):
                chosen = order[start : start + BATCH]
                batch = tokenizer.pad(
                    {"input_ids": [ids[place] for place in chosen]}, return_tensors="pt"
                )
                states = model(**batch, output_hidden_states=True).hidden_states[1:]
                means = pooled(states, batch["attention_mask"]).transpose(0, 1)
                for place, one in zip(chosen, means.double().numpy(), strict=True):
                    found[place] = one
        return np.stack(found)


class StateFeatures:
    """Mean states of some blocks of the model that is asked, over the question's tokens.

    No second model is needed; a question goes through this one once more before it is answered.

    Args:
        lm: The bare model.
        depths: Of the blocks that are read.
    """

    def __init__(self, lm: LM, depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0)) -> None:
        self.lm = lm
        self.layers = sorted({lm.anatomy.layer_at(depth) for depth in depths})

    @property
    def identity(self) -> str:
        return f"states {self.layers} {self.lm.identity}"

    def __call__(
        self, texts: Sequence[str], tuned: Tensors | None = None, scale: float = 1.0
    ) -> Float[np.ndarray, "text layer hidden"]:
        rows = [self.lm.template.encode(Prompt(text=text), "") for text in texts]
        spans = [Span(row, 0, max(row.start, len(row.ids))) for row in rows]
        found: list[np.ndarray] = [np.zeros(0)] * len(texts)
        for place, states in read_states(self.lm, spans):
            found[place] = states["block"][self.layers].double().mean(dim=1).numpy()
        return np.stack(found)


__all__ = ["Backbone", "EncoderFeatures", "Features", "StateFeatures"]
