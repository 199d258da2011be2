"""A sentence encoder: a text becomes one unit vector, so that a dot product is a cosine.

    v = normalise( sum_t mask_t h_t / sum_t mask_t ),   h = last hidden states of the encoder

That is mean pooling over the attention mask, as all-MiniLM-L6-v2 was trained with (Reimers and
Gurevych 2019, arXiv 1908.10084). Any local folder of a BERT-type encoder works; transformers
reads it, the package sentence-transformers is not needed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from delible.errors import ModelError

POOLING_FILE = "1_Pooling/config.json"
LENGTH_FILE = "sentence_bert_config.json"
#: Everything that a vector depends on.
IDENTITY_FILES = ("config.json", "tokenizer.json", "vocab.txt", LENGTH_FILE, POOLING_FILE)


@runtime_checkable
class Encoder(Protocol):
    """Anything that turns texts into vectors."""

    @property
    def identity(self) -> str:
        """Changes whenever a vector could change."""
        ...

    def encode(self, texts: Sequence[str]) -> Float[np.ndarray, "text hidden"]:
        """Unit vectors, float32, in the order of the texts."""
        ...


class SentenceEncoder:
    """A local BERT-type encoder with mean pooling and L2 normalisation.

    The model is read at the first :meth:`encode`, not before.

    Args:
        folder: Holds ``config.json``, a tokenizer and ``*.safetensors``.
        batch_size: Texts per forward pass.
    """

    def __init__(self, folder: str | Path, *, batch_size: int = 32) -> None:
        self.folder, self.batch_size = Path(folder), batch_size

    @cached_property
    def identity(self) -> str:
        """SHA-256 over the weights, the tokenizer and the settings (hexadecimal)."""
        self._check_folder()
        names = [name for name in IDENTITY_FILES if (self.folder / name).is_file()]
        names += sorted(path.name for path in self.folder.glob("*.safetensors"))
        joined = hashlib.sha256()
        for name in names:
            with (self.folder / name).open("rb") as file:
                joined.update(f"{name}:{hashlib.file_digest(file, 'sha256').hexdigest()};".encode())
        return joined.hexdigest()

    def encode(self, texts: Sequence[str]) -> Float[np.ndarray, "text hidden"]:
        """Unit vectors, float32, in the order of the texts.

        Texts of similar length share a batch, so that little is padded; a text longer than the
        encoder reads (256 tokens for all-MiniLM-L6-v2) is cut there.

        Raises:
            ModelError: The folder holds no such encoder.
        """
        import torch

        tokenizer, model, max_tokens = self.parts
        vectors = np.zeros((len(texts), model.config.hidden_size), dtype=np.float32)
        if not texts:
            return vectors
        ids = tokenizer(list(texts), truncation=True, max_length=max_tokens)["input_ids"]
        order = sorted(range(len(texts)), key=lambda index: len(ids[index]))
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            batch = tokenizer.pad({"input_ids": [ids[i] for i in chosen]}, return_tensors="pt")
            with torch.inference_mode():
                hidden = model(**batch).last_hidden_state.float()
            mask = batch["attention_mask"].unsqueeze(-1)
            mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
            vectors[chosen] = torch.nn.functional.normalize(mean, dim=-1).numpy()
        return vectors

    @cached_property
    def parts(self) -> tuple[Any, Any, int]:
        """Tokenizer, model (in evaluation mode) and the most tokens that it reads of a text.

        Raises:
            ModelError: The folder holds no such encoder.
        """
        import torch
        from transformers import AutoModel, AutoTokenizer

        from delible.lm.embedded import quiet

        self._check_folder()
        try:
            with quiet():
                tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
                model = AutoModel.from_pretrained(
                    self.folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
                )
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(
                f"no sentence encoder could be read: {error}", where=str(self.folder)
            ) from error
        longest = getattr(model.config, "max_position_embeddings", tokenizer.model_max_length)
        stated = self._settings(LENGTH_FILE).get("max_seq_length") or longest
        return tokenizer, model.eval(), min(int(stated), int(longest))

    def _check_folder(self) -> None:
        if not (self.folder / "config.json").is_file() or not any(
            self.folder.glob("*.safetensors")
        ):
            raise ModelError(
                "this folder holds no sentence encoder (config.json and *.safetensors).",
                where=str(self.folder),
                hint="Name the folder of an encoder such as all-MiniLM-L6-v2.",
            )
        pooling = self._settings(POOLING_FILE)
        if not pooling.get("pooling_mode_mean_tokens", True):
            raise ModelError(
                "this encoder does not pool by the mean, which is the only pooling known here.",
                where=str(self.folder / POOLING_FILE),
                hint="Name the folder of a mean-pooling encoder such as all-MiniLM-L6-v2.",
            )

    def _settings(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        if not path.is_file():
            return {}
        settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return settings


def unit(vectors: Float[np.ndarray, "text hidden"]) -> Float[np.ndarray, "text hidden"]:
    """Vectors of length 1, float32; one of length 0 stays as it is.

    Raises:
        ModelError: A value is not finite.
    """
    vectors = np.asarray(vectors, dtype=np.float32)
    if not np.isfinite(vectors).all():  # NaN is below every threshold: that would be a pass
        raise ModelError("the sentence encoder gave a value that is not finite.")
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    found: Float[np.ndarray, "text hidden"] = vectors / np.maximum(lengths, np.float32(1e-12))
    return found


@lru_cache(maxsize=4)
def _cached(folder: Path) -> SentenceEncoder:
    return SentenceEncoder(folder)


def sentence_encoder(folder: str | Path | None = None) -> SentenceEncoder:
    """The encoder in a folder, one instance per folder and process.

    Args:
        folder: A local folder; ``None`` takes the built-in all-MiniLM-L6-v2, which is fetched
            once and says so.

    Raises:
        ModelError: The built-in encoder cannot be fetched.
    """
    if folder is None:
        from delible.lm.embedded import default_encoder

        folder = default_encoder()
    return _cached(Path(folder).resolve())
