"""What an intervention is: a change of activations that stays, and what it has learned."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from delible.component import build
from delible.context import Context
from delible.errors import RunError
from delible.files import atomic_folder
from delible.intervene.sites import Positions, Site
from delible.intervene.system import intervened
from delible.intervene.taps import Where
from delible.lm.lm import LM, language_model
from delible.method import ComponentMethod, Outcome
from delible.records import ForgetRequest
from delible.system.base import System

_SETTINGS, _TENSORS = "intervention.json", "tensors.safetensors"


class Intervention(ComponentMethod):
    """Options of an intervention: where it acts, what it learns, what it does.

    It acts on every road of the engine as on one plain row after the other, as long as what it
    does to a state depends on the state, its site, its token's place and its prompt alone. What
    depends on more (the answer so far) sets ``needs_own_rows``: then no computation is shared
    between texts, which is slower.
    """

    needs_own_rows: ClassVar[bool] = False
    #: The kind of artefact that it is kept as.
    artefact: ClassVar[str] = "intervention"

    @property
    def sites(self) -> Sequence[Site]:
        """Where it acts."""
        raise NotImplementedError

    @property
    def positions(self) -> Positions:
        """At which tokens; the default: at all."""
        return Positions()

    def learn(self, lm: LM, request: ForgetRequest, *, seed: int) -> Mapping[str, Tensor]:
        """What it needs to act on this model, as tensors; the default: nothing.

        Raises:
            DataError: The request lacks what it learns from.
            ModelError: The model has not what it acts on.
        """
        return {}

    def ready(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What :meth:`change` works with, made once from what was learned."""
        return tensors

    def change(
        self, states: Float[Tensor, "token width"], where: Where, tensors: Mapping[str, Tensor]
    ) -> Float[Tensor, "token width"]:
        """The states as they go on. A pure function: the states given must stay as they are.

        Args:
            states: At the tokens meant, of all texts that are computed now, in the data type in
                which the model computes. With all positions, padding is among them.
            where: Site, layer, and on demand text and place of each token.
            tensors: What :meth:`ready` gave, on the model's device.
        """
        raise NotImplementedError

    def apply(self, system: System, request: ForgetRequest, context: Context) -> Outcome:
        """Learns what it needs, and acts from then on."""
        lm = language_model(system, f"intervention '{self.name}'")
        fitted = self.fit(lm, request, seed=context.seed)
        return Outcome(intervened(lm, [fitted]), self.artefact, fitted, dict(fitted.notes))

    def fit(self, lm: LM, request: ForgetRequest, *, seed: int = 0) -> Fitted:
        """Learns what it needs; see :meth:`learn`."""
        return Fitted(self, dict(self.learn(lm, request, seed=seed)), lm.identity)


@dataclass(frozen=True)
class Fitted:
    """An intervention with what it has learned: ready to be put on, saved and loaded.

    Attributes:
        intervention: Its options.
        tensors: What it has learned; must not be written to.
        learned_on: Identity of the model that it has learned on, if there is one.
        extends: Identity of an earlier one on the same model that it holds too, and that acts no
            more beside it.
        notes: What there is to be said of it, as plain data; no part of its identity.
    """

    intervention: Intervention
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    learned_on: str | None = None
    extends: str | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def identity(self) -> str:
        """SHA-256 over its options and tensors: equal ones do the same to the same model."""
        whole = hashlib.sha256(_plain(self.intervention).encode())
        for name, tensor in sorted(self.tensors.items()):
            value = tensor.detach().cpu().contiguous()
            whole.update(f"{name} {list(value.shape)} {value.dtype} ".encode())
            whole.update(value.flatten().view(torch.uint8).numpy().data)
        return whole.hexdigest()

    def save(self, folder: Path) -> None:
        """Writes options (JSON) and tensors (safetensors), atomically."""
        settings = {
            "intervention": self.intervention.spec(),
            "identity": self.identity,
            "learned_on": self.learned_on,
            "extends": self.extends,
            "notes": dict(self.notes),
        }
        with atomic_folder(folder) as target:
            (target / _SETTINGS).write_text(json.dumps(settings, indent=2), encoding="utf-8")
            tensors = {name: one.detach().cpu().contiguous() for name, one in self.tensors.items()}
            save_file(tensors, target / _TENSORS)

    @classmethod
    def load(cls, folder: Path) -> Fitted:
        """Reads what :meth:`save` wrote.

        Raises:
            RunError: It cannot be read, or is not what was saved.
            RecipeError: The intervention or an option of it is unknown here.
        """
        try:
            settings = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
            tensors = load_file(folder / _TENSORS)
            spec, identity = settings["intervention"], settings["identity"]
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise RunError(
                f"no intervention can be read: {error}",
                where=str(folder),
                hint="Give the folder that an intervention was saved to.",
            ) from error
        found = cls(
            build("intervention", spec), tensors, settings.get("learned_on"),
            settings.get("extends"), settings.get("notes", {}),
        )  # fmt: skip
        if found.identity != identity:
            raise RunError(
                "the intervention is not the one that was saved: its files were changed.",
                where=str(folder),
            )
        return found


def _plain(intervention: Intervention) -> str:
    return json.dumps(intervention.spec(), sort_keys=True)
