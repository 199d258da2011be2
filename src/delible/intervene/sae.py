"""A sparse autoencoder of the states at one site: what it says of them, and its files.

    a(x) = (x - b_dec) W_enc + b_enc        pre-activations
    z = act(a)                              latents: ReLU, JumpReLU, or ReLU of the k largest
    x^ = z W_dec + b_dec

Files are in the layout of SAE Lens (github.com/decoderesearch/SAELens): ``cfg.json`` and
``sae_weights.safetensors`` with W_enc [width, latent], W_dec [latent, width], b_enc, b_dec and, for
JumpReLU, threshold.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from delible.errors import DataError
from delible.files import atomic_folder

Activation = Literal["relu", "jumprelu", "topk"]
_CONFIG, _WEIGHTS = "cfg.json", "sae_weights.safetensors"
#: What SAE Lens calls the activations.
_ARCHITECTURES: dict[str, Activation] = {"standard": "relu", "jumprelu": "jumprelu", "topk": "topk"}


@dataclass(frozen=True)
class SAE:
    """A sparse autoencoder; its tensors must not be written to.

    Attributes:
        encoder: W_enc.
        encoder_bias: b_enc.
        decoder: W_dec.
        decoder_bias: b_dec.
        activation: How latents come from pre-activations.
        active: For ``topk``: how many latents of a state may speak.
        threshold: For ``jumprelu``: what each latent must exceed.
        centred: Whether b_dec is taken off the states first.
        about: What is known of it: model, site, how well it does.
    """

    encoder: Float[Tensor, "width latent"]
    encoder_bias: Float[Tensor, " latent"]
    decoder: Float[Tensor, "latent width"]
    decoder_bias: Float[Tensor, " width"]
    activation: Activation = "relu"
    active: int = 0
    threshold: Float[Tensor, " latent"] | None = None
    centred: bool = True
    about: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def width(self) -> int:
        """How wide the states are."""
        return int(self.encoder.shape[0])

    @property
    def latents(self) -> int:
        """How many latents there are."""
        return int(self.encoder.shape[1])

    def pre(self, states: Float[Tensor, "token width"]) -> Float[Tensor, "token latent"]:
        """Pre-activations, in the data type of the autoencoder; they always have a gradient."""
        states = states.to(self.encoder.dtype)
        centred = states - self.decoder_bias if self.centred else states
        return centred @ self.encoder + self.encoder_bias

    def encode(self, states: Float[Tensor, "token width"]) -> Float[Tensor, "token latent"]:
        """Latents, 0 or more."""
        return self.act(self.pre(states))

    def act(self, pre: Float[Tensor, "token latent"]) -> Float[Tensor, "token latent"]:
        """From pre-activations to latents."""
        if self.activation == "topk":
            top = pre.topk(min(self.active, pre.shape[-1]), dim=-1, sorted=False)
            return torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())
        found = pre.relu()
        if self.threshold is not None:
            found = found * (pre > self.threshold.relu())
        return found

    def decode(self, latents: Float[Tensor, "token latent"]) -> Float[Tensor, "token width"]:
        """States from latents."""
        return latents @ self.decoder + self.decoder_bias

    def unexplained(self, states: Float[Tensor, "token width"]) -> float:
        """Share of the states' variance that is not in what is decoded: 0 is perfect, 1 useless."""
        states = states.to(self.encoder)
        left, spread = 0.0, float((states - states.mean(dim=0)).double().pow(2).sum())
        for part in states.split(4096):
            left += float((part - self.decode(self.encode(part))).double().pow(2).sum())
        return left / max(spread, 1e-12)

    def checked(self, width: int, where: str) -> SAE:
        """Itself, if it reads states of this width.

        Raises:
            DataError: It reads others.
        """
        if self.width != width:
            raise DataError(
                f"the sparse autoencoder reads states of {self.width} values, and the model gives "
                f"{width} there.",
                where=where,
                hint="Give one that was trained on this model and this site, or none: then one "
                "is trained.",
            )
        return self

    # ---- as tensors alone, for what is saved with an intervention

    def tensors(self) -> dict[str, Tensor]:
        """All that it does, as tensors."""
        found = {
            "W_enc": self.encoder, "b_enc": self.encoder_bias, "W_dec": self.decoder,
            "b_dec": self.decoder_bias, "active": torch.tensor(self.active),
            "centred": torch.tensor(self.centred),
        }  # fmt: skip
        return found if self.threshold is None else {**found, "threshold": self.threshold}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], about: Mapping[str, Any] | None = None) -> SAE:
        """From what :meth:`tensors` gave."""
        active, threshold = int(tensors["active"]), tensors.get("threshold")
        kind: Activation = "topk" if active else "relu" if threshold is None else "jumprelu"
        return cls(
            tensors["W_enc"], tensors["b_enc"], tensors["W_dec"], tensors["b_dec"], kind, active,
            threshold, bool(tensors["centred"]), about or {},
        )  # fmt: skip

    # ---- files

    def save(self, folder: Path) -> None:
        """Writes it as SAE Lens does, atomically."""
        names = {kind: name for name, kind in _ARCHITECTURES.items()}
        config: dict[str, Any] = {
            "architecture": names[self.activation],
            "d_in": self.width,
            "d_sae": self.latents,
            "dtype": str(self.encoder.dtype).removeprefix("torch."),
            "device": "cpu",
            "apply_b_dec_to_input": self.centred,
            "normalize_activations": "none",
            "reshape_activations": "none",
            "metadata": dict(self.about),
        }
        if self.activation == "topk":
            config |= {"k": self.active, "rescale_acts_by_decoder_norm": False}
        weights = {
            name: value.detach().cpu().contiguous()
            for name, value in self.tensors().items()
            if name not in ("active", "centred")
        }
        with atomic_folder(folder) as target:
            (target / _CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
            save_file(weights, target / _WEIGHTS)

    @classmethod
    def load(cls, folder: Path) -> SAE:
        """Reads a folder that SAE Lens or :meth:`save` wrote, in fp32.

        Raises:
            DataError: It cannot be read, or is of a kind that is not known here.
        """
        try:
            config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
            raw = load_file(folder / _WEIGHTS)
            found = {name: value.float() for name, value in raw.items()}
            encoder, decoder = found["W_enc"], found["W_dec"]
            biases = found["b_enc"], found["b_dec"]
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise DataError(
                f"no sparse autoencoder can be read: {error}",
                where=str(folder),
                hint=f"Give a folder with {_CONFIG} and {_WEIGHTS}, as SAE Lens writes them.",
            ) from error
        kind = _activation(config, folder)
        shapes = {tuple(encoder.shape), tuple(decoder.shape)[::-1]}
        if len(shapes) != 1 or (len(biases[1]), len(biases[0])) not in shapes:
            raise DataError("its matrices do not fit together.", where=str(folder))
        threshold = found.get("threshold")
        if kind == "jumprelu" and threshold is None:
            raise DataError("a JumpReLU autoencoder has a 'threshold'.", where=str(folder))
        bias = biases[0]
        if config.get("rescale_acts_by_decoder_norm"):  # the same, with unit decoder rows
            norms = decoder.norm(dim=1)
            encoder, bias, decoder = encoder * norms, bias * norms, decoder / norms[:, None]
        about = {**(config.get("metadata") or {})}
        if "hook_name" in config:
            about.setdefault("hook_name", config["hook_name"])
        return cls(
            encoder, bias, decoder, biases[1], kind, _active(config, kind, folder),
            threshold if kind == "jumprelu" else None,
            bool(config.get("apply_b_dec_to_input", True)), about,
        )  # fmt: skip


def _activation(config: Mapping[str, Any], folder: Path) -> Activation:
    name = config.get("architecture", "standard")
    said = config.get("activation_fn_str", config.get("activation_fn"))  # of older versions
    if name == "standard" and said == "topk":
        name = "topk"
    normed = config.get("normalize_activations", "none")
    odd = normed not in ("none", None) and f"states that are normed ('{normed}')"
    odd = odd or (config.get("reshape_activations") == "hook_z" and "states of attention heads")
    if name not in _ARCHITECTURES or odd:
        raise DataError(
            f"a sparse autoencoder of {odd or f'the kind {name!r}'} is not known here.",
            where=str(folder),
            hint=f"Known kinds: {', '.join(_ARCHITECTURES)}, on states as they are.",
        )
    return _ARCHITECTURES[name]


def _active(config: Mapping[str, Any], kind: Activation, folder: Path) -> int:
    if kind != "topk":
        return 0
    found = config.get("k", (config.get("activation_fn_kwargs") or {}).get("k"))
    if not isinstance(found, int) or found < 1:
        raise DataError("a top-k autoencoder says its 'k'.", where=str(folder))
    return found
