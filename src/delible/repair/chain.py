"""The edits of a conversation, one patch on the other, in a folder that anybody can open.

    OUT/requests.json        what was asked for, with plans and rows, in order
    OUT/001-ada-brook/       a patch on the model; 002-… is one on 001-…
    OUT/artefact.yaml        the last one: delible.open(OUT) is the model with all of them

The folder has one writer. An earlier edit is taken back by taking off all later ones, and making
them again without it: bit by bit what they would have been.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from delible.context import NO_CONTEXT, Context
from delible.edit.base import Patch
from delible.errors import DelibleError, RecipeError, RunError
from delible.files import write_json
from delible.lm.lm import LM, language_model
from delible.records import ForgetRequest
from delible.repair.entries import STATE, Entry, State, is_chain, next_folder, read_state
from delible.repair.surgeon import Plan, editor
from delible.rundir import RunDirectory
from delible.system import artefact as artefacts
from delible.system.artefact import Artefact, Base
from delible.system.base import identity_of
from delible.systems import opening

logger = logging.getLogger(__name__)

#: Folder of a model below the edits that lies nowhere else.
BELOW = "base"
_OWN = re.compile(r"^\d{3,}-")


@dataclass
class Chain:
    """A model with its edits.

    Attributes:
        lm: The model as it answers now.
        base: What it stands on.
        run: Where edits are kept; None: in memory only.
        settings: Options of the editor that no plan sets.
        entries: All requests; those taken back are not enabled.
        patches: By the number of the request.
        identity: Of the model as it is now.
    """

    lm: LM
    base: Base
    run: RunDirectory | None
    settings: dict[str, object] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    patches: dict[int, Patch] = field(default_factory=dict)
    identity: str | None = None
    seed: int = 0

    @classmethod
    def begin(
        cls,
        target: str | LM,
        out: Path | str | None,
        *,
        settings: dict[str, object] | None = None,
        seed: int = 0,
        context: Context = NO_CONTEXT,
    ) -> Chain:
        """A new chain on a model, or the one that a folder holds.

        Args:
            target: A model, its name, or the folder of a chain.
            out: Where edits are kept; for the folder of a chain that folder.

        Raises:
            ModelError: It has no weights to edit.
            RunError: The folder holds the edits of another model, is damaged, or another process
                writes it.
        """
        folder = None if out is None else Path(out).expanduser()
        if isinstance(target, str) and is_chain(Path(target).expanduser()):
            own = Path(target).expanduser()
            if folder is not None and folder.resolve() != own.resolve():
                raise RecipeError(
                    "the edits of a conversation go on in their own folder.",
                    where=str(folder),
                    hint="Leave out --out, or talk to the model below.",
                )
            folder = own
        state = read_state(folder) if folder is not None and is_chain(folder) else None
        run = None if folder is None else RunDirectory(folder)
        if run is not None:
            run.lock()
        try:
            return cls._begun(target, state, run, settings or {}, seed, context)
        except BaseException:
            if run is not None:
                run.release()
            raise

    @classmethod
    def _begun(
        cls,
        target: str | LM,
        state: State | None,
        run: RunDirectory | None,
        settings: dict[str, object],
        seed: int,
        context: Context,
    ) -> Chain:
        if isinstance(target, str):
            name = target
            if state is not None and run is not None and Path(target).expanduser() == run.path:
                beside = run.path / state.base.name
                name = str(beside) if beside.is_dir() else state.base.name
            system = opening.open_system(name, context=context)
        else:
            system, name = target, target.name
        lm = language_model(system, "repair")
        if lm.wears_adapter:
            lm.merge_adapter()
        base = opening.described(lm)
        if not opening.opens_again(lm):
            base = base.model_copy(update={"name": BELOW})
        if state is not None:
            if state.base.identity != base.identity:
                raise RunError(
                    "this folder holds edits of another model.",
                    where=str(run.path if run else ""),
                    hint=f"It is {state.base.name}; choose another --out folder for this one.",
                )
            base = state.base
        chain = cls(lm, base, run, settings, identity=base.identity, seed=seed)
        if run is not None:
            run.begin({"command": "repair", "base": base.model_dump(mode="json")})
            chain._resume(state)
        return chain

    @property
    def enabled(self) -> list[Entry]:
        """What is forgotten now, in order."""
        return [entry for entry in self.entries if entry.enabled]

    def close(self) -> None:
        """Lets another process write."""
        if self.run is not None:
            self.run.release()

    # ---- changing

    def edit(self, plan: Plan, request: ForgetRequest) -> Patch:
        """Edits the model; nothing is kept yet.

        Raises:
            DelibleError: The model is as before.
        """
        method = editor(plan, self.settings)
        patch: Patch = method.apply(self.lm, request, Context(seed=self.seed)).content
        return patch

    def commit(
        self, patch: Patch, plan: Plan, request: ForgetRequest, asked: str, subject: str
    ) -> Entry:
        """Keeps an edit that was made; if the disk refuses it, the edit is taken back.

        Raises:
            RunError: The disk refuses it.
        """
        number = max((one.number for one in self.entries), default=0) + 1
        slug = re.sub(r"[^a-z0-9]+", "-", (subject or "request").lower()).strip("-")[:32]
        entry = Entry(
            number=number, folder=f"{number:03d}-{slug or 'request'}", asked=asked,
            subject=subject, request=request, plan=plan, notes=dict(patch.notes),
        )  # fmt: skip
        try:
            self._keep(entry, patch)
        except BaseException:
            patch.undo(self.lm)
            raise
        self.entries.append(entry)
        self._write()
        return entry

    def undo(self, entry: Entry) -> list[Entry]:
        """Takes a request back; later ones are made again.

        Returns:
            Later requests that could not be made again, and are taken back as well.
        """
        later = [one for one in self.enabled if one.number > entry.number]
        start, patches = list(self.entries), dict(self.patches)
        try:
            for one in reversed([entry, *later]):
                self.patches.pop(one.number).undo(self.lm)
            self._set(entry.model_copy(update={"enabled": False}))
            self.identity = identity_of(self.lm)
            lost = self._again(later)
        except BaseException:
            self._as_before(start, patches)
            raise
        self._write()
        return lost

    def _again(self, later: Sequence[Entry]) -> list[Entry]:
        """Makes edits again on the model as it is; those that cannot be are taken back.

        Each gets a new folder: what ``requests.json`` names stays until another is written.
        """
        lost = []
        for one in later:
            try:
                patch = self.edit(one.plan, one.request)
            except DelibleError as error:
                logger.warning(f"Request {one.number} ({one.title}) is taken back, too: {error}")
                self._set(one.model_copy(update={"enabled": False}))
                lost.append(one)
                continue
            made = one.model_copy(
                update={"notes": dict(patch.notes), "folder": next_folder(one.folder)}
            )
            self._keep(made, patch)
            self._set(made)
        return lost

    def _as_before(self, entries: list[Entry], patches: dict[int, Patch]) -> None:
        """Puts the model and the list back where an undoing was broken off."""
        ours = {id(patch): patch for patch in (*patches.values(), *self.patches.values())}
        for patch in reversed(self.lm.patches):
            if id(patch) in ours:
                patch.undo(self.lm)
        self.entries, self.patches = entries, patches
        for entry in self.enabled:
            patches[entry.number].apply(self.lm)
        self.identity = identity_of(self.lm)

    # ---- keeping

    def _set(self, entry: Entry) -> None:
        self.entries = [entry if one.number == entry.number else one for one in self.entries]

    def _below(self, entry: Entry) -> Base:
        """What an entry's patch stands on, as its folder names it."""
        before = [one for one in self.enabled if one.number < entry.number]
        if before:
            return Base(name=f"../{before[-1].folder}", identity=self.identity)
        name = f"../{BELOW}" if self.base.name == BELOW else self.base.name
        return Base(name=name, identity=self.identity, precision=self.base.precision)

    def _keep(self, entry: Entry, patch: Patch) -> None:
        patch.title = f"patch of request {entry.number}"
        if self.run is not None:
            if self.base.name == BELOW and not (self.run.path / BELOW).is_dir():
                self._save_below(patch)
            folder = self.run.path / entry.folder
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            opening.keep("patch", patch, folder, self._below(entry), self.lm)
        self.patches[entry.number] = patch
        self.identity = identity_of(self.lm)

    def _save_below(self, patch: Patch) -> None:
        """Writes the model below the first edit, which lies nowhere else."""
        assert self.run is not None
        bare = self.lm.copy()
        patch.undo(bare)
        bare.save(self.run.path / BELOW)
        logger.info(f"The model below lies nowhere else, so it is written: {self.run.path / BELOW}")

    def _write(self) -> None:
        if self.run is None:
            return
        state = State(base=self.base, entries=tuple(self.entries))
        write_json(self.run.path / STATE, state.model_dump(mode="json"))
        top = self._top()
        if top is not None:
            artefacts.write(top, self.run.path)
        self._clear()
        self.run.update(
            requests=[
                {"number": one.number, "subject": one.subject, "enabled": one.enabled}
                for one in self.entries
            ]
        )

    def _clear(self) -> None:
        """Deletes folders of edits that nothing names: half-made ones, and those made again."""
        assert self.run is not None
        known = {one.folder for one in self.entries}
        for path in self.run.path.iterdir():
            if path.is_dir() and _OWN.match(path.name) and path.name not in known:
                shutil.rmtree(path, ignore_errors=True)

    def _top(self) -> Artefact | None:
        """The last edit as the whole folder's artefact; taken off where none is left."""
        if not self.entries or self.run is None:
            return None
        entry = self.enabled[-1] if self.enabled else self.entries[0]
        own = artefacts.read(self.run.path / entry.folder)
        base = own.base
        if base is not None:
            base = base.model_copy(update={"name": base.name.removeprefix("../")})
        parts = {name: f"{entry.folder}/{part}" for name, part in own.parts.items()}
        return own.model_copy(update={"base": base, "parts": parts, "enabled": bool(self.enabled)})

    # ---- opening

    def _resume(self, state: State | None) -> None:
        """Puts the edits that are kept on the model again.

        Raises:
            RunError: One is damaged, or belongs to another model.
        """
        assert self.run is not None
        folder = self.run.path
        self.entries = list(state.entries) if state else []
        self._clear()
        if state is None:
            return
        off = self._taken_off(folder)
        for entry in self.enabled:
            if off is not None and entry.number >= off.number:
                continue
            patch = Patch.load(folder / entry.folder / "patch")
            patch.title = f"patch of request {entry.number}"
            patch.apply(self.lm)
            self.patches[entry.number] = patch
        self.identity = identity_of(self.lm)
        if off is not None:
            logger.info(f"Request {off.number} ({off.title}) was taken off ('delible undo').")
            later = [one for one in self.enabled if one.number > off.number]
            self._set(off.model_copy(update={"enabled": False}))
            self._again(later)
        self._write()

    def _taken_off(self, folder: Path) -> Entry | None:
        """The first enabled entry that ``delible undo`` has taken off since."""
        for entry in self.enabled:
            if not artefacts.read(folder / entry.folder).enabled:
                return entry
        if self.enabled and artefacts.is_artefact(folder) and not artefacts.read(folder).enabled:
            return self.enabled[-1]
        return None


__all__ = ["Chain"]
