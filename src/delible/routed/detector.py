"""A request's detector: whether a text looks like what the request forgets, and how much.

Made of the request's texts alone (no others are needed), and kept as tensors; the texts may be
deleted then. What is kept still says something of them: the bank holds one vector for each.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Self

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from delible.component import Config
from delible.errors import DataError
from delible.routed.features import Backbone, EncoderFeatures, Features
from delible.routed.glocal import Array, Layer, one_class, soft_weight
from delible.routed.tuning import Contrast, TunedBy, tune

#: Weights are given to so many digits: who else is in a batch must not show in them.
DIGITS = 3


class DetectorOptions(Config):
    """How a detector is made, and how its distance becomes a weight."""

    backbone: Backbone = Field(
        "encoder", description="What features are of: a sentence encoder, or the states of the "
        "model itself, through which every question then goes once more.",
    )  # fmt: skip
    encoder_folder: str | None = Field(
        None, description="Folder of a sentence encoder; by default all-MiniLM-L6-v2."
    )
    encoder_epochs: int = Field(
        0, ge=0, description="Passes over the request's texts that tune the encoder to it (paper: "
        "2). A tuned encoder reads each question once per request; one that is left as it is reads "
        "it once for all of them.",
    )  # fmt: skip
    encoder_learning_rate: float = Field(1e-4, gt=0, description="Of the encoder's adapter.")
    encoder_rank: int = Field(8, ge=1, description="Inner width of the encoder's adapter.")
    encoder_alpha: float = Field(32.0, gt=0, description="It is scaled by alpha / rank.")
    encoder_batch_size: int = Field(8, ge=1, description="Texts that are contrasted at once.")
    contrast: Contrast = Field(
        "entropy", description="What tunes it: entropy (the paper's), or positives (InfoNCE)."
    )
    shrinkage: float = Field(
        0.1, gt=0, le=1, description="How far covariances are drawn to a multiple of the identity."
    )
    gamma: float = Field(1000.0, ge=0, description="Weight of the cosine beside the distance.")
    sign_consistent: bool = Field(
        True, description="Both parts of a score rise for texts that are far away; false: as "
        "published, where they partly cancel.",
    )  # fmt: skip
    nu: float = Field(
        0.1, gt=0, le=1, description="Share of the request's texts that may lie outside."
    )
    held_out: Literal["folds", "split"] = Field(
        "folds", description="Which texts say how others of the request will look: each in turn, "
        "in five parts, or one in five, which is then in no statistics (as published).",
    )  # fmt: skip
    zeta: float = Field(10.0, gt=0, description="How sharply a weight falls with the distance.")
    offset: float = Field(2.0, description="And how low: far away it is sigmoid(-offset).")
    floor: float = Field(
        0.2, ge=0, lt=1, description="A smaller weight is none: the gate is closed."
    )
    hard: bool = Field(
        False, description="A weight is 1 or 0: whether the distance is among the request's own."
    )


@dataclass(frozen=True)
class Detector:
    """What is known of a request's texts; as tensors it is saved and loaded again.

    Attributes:
        options: How it was made.
        tensors: ``features`` [text, layer, hidden], ``svm`` [layer], ``numbers`` (rho, m1, m2,
            standard deviation, least and largest distance of the request's own texts), float64;
            ``encoder.PATH.A`` and ``.B`` of a tuned encoder.
        features_of: Identity of what made the features.
    """

    options: DetectorOptions
    tensors: Mapping[str, Tensor]
    features_of: str

    @classmethod
    def fit(
        cls, texts: Sequence[str], features: Features, options: DetectorOptions,
        generator: torch.Generator,
    ) -> Self:  # fmt: skip
        """A detector of what texts like these ask for.

        Args:
            texts: Of the request: questions, other wordings of them.
            generator: Of the choice of what is held out and of the tuning.

        Raises:
            DataError: There are fewer than two different ones.
        """
        texts = list(dict.fromkeys(text.strip() for text in texts if text.strip()))
        if len(texts) < 2:
            raise DataError(
                "a detector needs at least two different questions of a request.",
                hint="Add questions about it, or other wordings of them (paraphrases).",
            )
        order = torch.randperm(len(texts), generator=generator).tolist()
        parts = [order[part::5] for part in range(5) if order[part::5]]
        held = parts[0] if options.held_out == "split" else []
        used = [place for place in range(len(texts)) if place not in held]
        tuned = dict[str, Tensor]()
        if options.encoder_epochs and isinstance(features, EncoderFeatures):
            tokenizer, encoder, longest = features.encoder.parts
            how = TunedBy(
                options.encoder_epochs, options.encoder_learning_rate, options.encoder_rank,
                options.encoder_alpha / options.encoder_rank, options.encoder_batch_size,
                options.contrast,
            )  # fmt: skip
            tuned = tune(tokenizer, encoder, [texts[i] for i in used], longest, how, generator)
        vectors = features(texts, tuned or None, options.encoder_alpha / options.encoder_rank)
        own = scores(layers_of(vectors[used], options), vectors[used], options)
        weights, rho = one_class(own, options.nu)
        if options.held_out == "split":
            others = scores(layers_of(vectors[used], options), vectors[held], options)
        else:
            found = np.zeros((len(texts), vectors.shape[1]))
            for part in parts:
                rest = [place for place in range(len(texts)) if place not in part]
                found[part] = scores(layers_of(vectors[rest], options), vectors[part], options)
            others = found
        mine, theirs = own @ weights - rho, others @ weights - rho
        numbers = [rho, mine.mean(), theirs.mean(), theirs.std(), mine.min(), mine.max()]
        kept = {
            "features": torch.from_numpy(vectors[used].copy()),
            "svm": torch.from_numpy(np.asarray(weights, dtype=np.float64)),
            "numbers": torch.tensor(numbers, dtype=torch.float64),
            **{f"encoder.{name}": one for name, one in tuned.items()},
        }
        return cls(options, kept, features.identity)

    @cached_property
    def identity(self) -> str:
        """SHA-256 over options and tensors."""
        plain = json.dumps(self.options.model_dump(mode="json"), sort_keys=True)
        whole = hashlib.sha256(f"{plain} {self.features_of}".encode())
        for name, tensor in sorted(self.tensors.items()):
            whole.update(f"{name} {list(tensor.shape)} {tensor.dtype} ".encode())
            whole.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        return whole.hexdigest()

    @property
    def tuned(self) -> Mapping[str, Tensor]:
        """Low-rank products of the encoder; none where it is used as it is."""
        marked = "encoder."
        return {
            name.removeprefix(marked): one
            for name, one in self.tensors.items()
            if name.startswith(marked)
        }

    def features(self, texts: Sequence[str], source: Features) -> Float[np.ndarray, "t l h"]:
        """Features of texts as this detector takes them."""
        options = self.options
        return source(texts, self.tuned or None, options.encoder_alpha / options.encoder_rank)

    def distances(self, vectors: Float[np.ndarray, "text layer hidden"]) -> Float[Array, " text"]:
        """d of texts from their features; the request's own lie around 0."""
        rho = float(self.tensors["numbers"][0])
        found: Array = scores(self._layers, vectors, self.options) @ self.tensors["svm"].numpy()
        return found - rho

    def weights(self, vectors: Float[np.ndarray, "text layer hidden"]) -> Float[Array, " text"]:
        """How much of the request's adapter texts get, in [0, 1]; 0: the gate is closed."""
        distance, options = self.distances(vectors), self.options
        _, used, held, spread, least, largest = self.tensors["numbers"].tolist()
        if options.hard:
            return ((distance >= least) & (distance <= largest)).astype(np.float64)
        found = soft_weight(
            distance, used, held, spread, zeta=options.zeta, offset=options.offset
        ).round(DIGITS)
        return np.where(found < options.floor, 0.0, found)

    @cached_property
    def _layers(self) -> list[Layer]:
        return layers_of(self.tensors["features"].numpy(), self.options)


def layers_of(vectors: Any, options: DetectorOptions) -> list[Layer]:
    """Statistics of features [text, layer, hidden], layer by layer."""
    return [Layer.of(vectors[:, layer], options.shrinkage) for layer in range(vectors.shape[1])]


def scores(
    layers: Sequence[Layer], vectors: Any, options: DetectorOptions
) -> Float[Array, "text layer"]:
    """Glocal scores of texts."""
    sign = 1.0 if options.sign_consistent else -1.0
    found: Array = np.stack(
        [one.scores(vectors[:, place], options.gamma, sign) for place, one in enumerate(layers)],
        axis=1,
    )
    return found


__all__ = ["Detector", "DetectorOptions"]
