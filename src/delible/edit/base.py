"""A closed-form change of a few weights, and the patch that undoes it."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from delible.context import Context
from delible.edit.earlier import Earlier, Forgotten
from delible.errors import DataError, ModelError, RunError
from delible.files import atomic_folder
from delible.lm.lm import LM, language_model
from delible.lm.new_tokens import Vocabulary, add_tokens, put_back, tables, token_of, vocabulary_of
from delible.method import ComponentMethod, Outcome
from delible.records import ForgetRequest, images_of
from delible.system.base import System

logger = logging.getLogger(__name__)

#: Key, in a patch's file, of the texts of the tokens that it adds; no parameter is called so.
ADDED = "added tokens"


@dataclass(eq=False)
class Added:
    """Tokens that a patch brings along, with their rows.

    Attributes:
        texts: Of the tokens.
        rows: [tokens, hidden] by table, see :func:`delible.lm.new_tokens.tables`.
        before: What tokens the model had; None while the patch is on no model.
    """

    texts: tuple[str, ...]
    rows: dict[str, Tensor]
    before: Vocabulary | None = None

    @classmethod
    def of(cls, lm: LM, texts: tuple[str, ...], before: Vocabulary) -> Added:
        """What a model has now for tokens that it did not have before."""
        ids = [token_of(lm, text) for text in texts]
        rows = {name: table.weight.detach()[ids].clone() for name, table in tables(lm).items()}
        return cls(texts, rows, before)

    @torch.no_grad()
    def apply(self, lm: LM) -> None:
        """Gives the tokens to a model.

        Raises:
            ModelError: It has them already, or other tables.
        """
        known = [text for text in self.texts if token_of(lm, text) is not None]
        if known or set(tables(lm)) != set(self.rows):
            raise ModelError(
                "the patch does not belong to this model: "
                + (f"it has the token '{known[0]}' already." if known else "it has other tables."),
                hint="Put it on the model that it was made on.",
            )
        self.before = vocabulary_of(lm)
        ids = list(add_tokens(lm, self.texts))
        for name, table in tables(lm).items():
            table.weight[ids] = self.rows[name].to(table.weight)


@dataclass(eq=False)
class Patch:
    """A removable edit of weights.

    Attributes:
        factors: For each parameter (left [rows, rank], right [rank, columns]): the change is
            left @ right, in the parameter's own layout.
        before: The parameters' values before the edit, so that undoing is exact; empty while the
            patch is on no model.
        hashes: SHA-256 of the values before, so that it is put on the same ones only.
        keys: For each parameter the keys that were written to, [width, edits], fp32: what later
            edits leave alone. Empty where an editor does not say.
        added: Tokens that it brings along, if any.
        forgotten: Questions that it was about, to be asked again after later edits, if any.
    """

    factors: dict[str, tuple[Tensor, Tensor]]
    before: dict[str, Tensor]
    notes: dict[str, object] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    title: str = "patch"
    keys: dict[str, Tensor] = field(default_factory=dict)
    added: Added | None = None
    forgotten: Forgotten | None = None

    def save(self, folder: Path) -> None:
        """Writes factors, keys, rows of tokens and hashes as safetensors, atomically.

        Questions are written beside them (:meth:`Forgotten.save`): no text is in a patch.
        """
        tensors: dict[str, Tensor] = {}
        hashes = dict(self.hashes)
        for name, (left, right) in self.factors.items():
            tensors |= {f"left/{name}": left, f"right/{name}": right}
        tensors |= {f"keys/{name}": value for name, value in self.keys.items()}
        for name, value in self.before.items():
            hashes[name] = _digest(value)
        if self.added is not None:
            tensors |= {f"rows/{name}": value for name, value in self.added.rows.items()}
            hashes[ADDED] = json.dumps(self.added.texts)
        if self.forgotten is not None:
            self.forgotten.save(folder)
        with atomic_folder(folder) as target:
            save_file(
                {name: value.detach().cpu().contiguous() for name, value in tensors.items()},
                target / "patch.safetensors",
                metadata=hashes,
            )

    @classmethod
    def load(cls, folder: Path) -> Patch:
        """Reads what :meth:`save` wrote.

        Raises:
            RunError: The file is missing or damaged.
        """
        path = folder / "patch.safetensors"
        try:
            with safe_open(path, framework="pt") as kept:
                hashes = dict(kept.metadata() or {})
                texts = hashes.pop(ADDED, None)
                factors = {
                    name: (kept.get_tensor(f"left/{name}"), kept.get_tensor(f"right/{name}"))
                    for name in hashes
                }
                known = set(kept.keys())
                keys = {
                    name: kept.get_tensor(f"keys/{name}")
                    for name in hashes
                    if f"keys/{name}" in known
                }
                rows = {
                    name.removeprefix("rows/"): kept.get_tensor(name)
                    for name in sorted(known)
                    if name.startswith("rows/")
                }
            forgotten = Forgotten.load(folder)
        except (OSError, SafetensorError, ValidationError) as error:
            raise RunError(f"the patch cannot be read ({error}).", where=str(path)) from error
        added = None if texts is None else Added(tuple(json.loads(texts)), rows)
        return cls(factors, {}, hashes=hashes, keys=keys, added=added, forgotten=forgotten)

    @torch.no_grad()
    def apply(self, lm: LM) -> None:
        """Adds the change to a model: the sum in float64, rounded to the weight's own type.

        Raises:
            ModelError: A parameter is missing, or has other values than when the patch was made,
                or the model has a token already that the patch brings along.
        """
        parameters = dict(lm.core.named_parameters())
        for name, known in self.hashes.items():
            found = parameters.get(name)
            if found is None or _digest(found) != known:
                raise ModelError(
                    f"the patch does not belong to this model: '{name}' is "
                    f"{'missing' if found is None else 'another one'}.",
                    hint="Put it on the model that it was made on.",
                )
        if self.added is not None:
            self.added.apply(lm)
        self.before = {name: parameters[name].detach().clone() for name in self.factors}
        for name, (left, right) in self.factors.items():
            weight = parameters[name]
            changed = weight.double() + (left.double() @ right.double()).to(weight.device)
            weight.copy_(changed.to(weight.dtype))
        self.put_on(lm)

    def put_on(self, lm: LM) -> None:
        """Says that the model has other weights now, and that this patch takes them off again."""
        patches = [patch for patch in lm.patches if patch is not self]
        lm.touch()
        lm.patches = [*patches, self]

    def undo(self, lm: LM) -> None:
        """Puts the edited parameters and the vocabulary back, bit by bit.

        Of several patches on the same parameters the last one is undone first: in that order every
        step is exact. Those on others may stay. A model that does not wear it stays as it is.

        Raises:
            ModelError: A later patch is on the same parameters, or may need the tokens of this one.
        """
        if all(one is not self for one in lm.patches):
            return
        self._require_top(lm)
        self.put_back(lm)
        patches = [patch for patch in lm.patches if patch is not self]
        lm.touch()
        lm.patches = patches

    @torch.no_grad()
    def put_back(self, lm: LM) -> None:
        """The parameters and the vocabulary as they were; nobody is told that they are others."""
        parameters = dict(lm.core.named_parameters())
        for name, value in self.before.items():
            parameters[name].copy_(value)
        if self.added is not None and self.added.before is not None:
            put_back(lm, self.added.before)

    def _require_top(self, lm: LM) -> None:
        """A later patch's weights hold this one, which would be back once that is undone."""
        place = next((at for at, one in enumerate(lm.patches) if one is self), len(lm.patches))
        for later in lm.patches[place + 1 :]:
            shared = not self.before.keys().isdisjoint(getattr(later, "before", ()))
            if shared or self.added is not None:
                raise ModelError(
                    f"the {self.title} cannot be undone alone: a later edit ({later.title}) "
                    + ("is on the same weights." if shared else "may need its tokens."),
                    hint="Undo the later one first.",
                )


@contextmanager
def unpatched(lm: LM) -> Iterator[None]:
    """Within it the weights are those below all patches, bit by bit; afterwards as before.

    What is known of a model (statistics of its keys) then serves every later edit of it.
    """
    parameters = dict(lm.core.named_parameters())
    patches = [patch for patch in lm.patches if isinstance(patch, Patch)]
    names = {name for patch in patches for name in patch.before}
    now = {name: parameters[name].detach().clone() for name in names}
    with torch.no_grad():
        for patch in reversed(patches):
            for name, value in patch.before.items():
                parameters[name].copy_(value)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in now.items():
                parameters[name].copy_(value)


def earlier_keys(lm: LM, parameter: str) -> list[Tensor]:
    """Keys of the edits that a model wears, [width] each, float64, the first edit first."""
    kept = [patch.keys for patch in lm.patches if isinstance(patch, Patch)]
    found = [keys[parameter] for keys in kept if parameter in keys]
    return [key for keys in found for key in keys.to(lm.device).double().T]


def earlier_questions(lm: LM) -> list[Forgotten]:
    """What the edits that a model wears were about, the first edit first."""
    kept = [patch.forgotten for patch in lm.patches if isinstance(patch, Patch)]
    return [one for one in kept if one is not None]


def _digest(value: Tensor) -> str:
    flat = value.detach().to("cpu").contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()


class Editor(ComponentMethod):
    """A closed-form change of a few weights; one that brings earlier requests back is refused."""

    most_returned: float = Field(
        0.1,
        ge=0,
        le=1,
        description="An edit after which a token of an earlier request's answers is likelier by "
        "more than this than right after that request is refused.",
    )

    def edit(self, lm: LM, request: ForgetRequest, *, seed: int) -> Patch:
        """Edits the model in place and returns the patch that undoes it.

        The model is as it was if anything fails. Patches that it wears stay below the new one.
        """
        raise NotImplementedError

    def apply(self, system: System, request: ForgetRequest, context: Context) -> Outcome:
        lm = language_model(system, f"editor '{self.name}'")
        if any(images_of(record) for record in request.forget):
            raise DataError(
                "forget records have pictures, and an editor reads where words name a subject.",
                where=f"editor '{self.name}'",
                hint="Take a recipe ('npo') or an intervention ('sauce').",
            )
        origin, told, earlier = lm.origin, "", Earlier(lm, earlier_questions(lm))
        patch = self.edit(lm, request, seed=context.seed)
        patch.title = f"patch of {self.name}"
        if patch not in lm.patches:
            patch.put_on(lm)
        try:
            returned = earlier.after(lm)
            if returned is not None:
                patch.notes["earlier"] = returned.notes()
                told = str(returned)
                logger.info(f"{self.name}: {told}")
                returned.require(self.most_returned, f"editor '{self.name}'")
            patch.forgotten = Forgotten.of(lm, request.forget)
        except BaseException:
            patch.undo(lm)
            lm.origin = origin
            raise
        return Outcome(lm, "patch", patch, dict(patch.notes), earlier=told)
