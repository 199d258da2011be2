"""From a name to a system: a model, an artefact of any kind on any base, vLLM, or an endpoint."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from delible import registry
from delible.context import NO_CONTEXT, Context
from delible.errors import DelibleError, ModelError, RunError, nearest
from delible.lm.lm import LM, language_model
from delible.lm.merging import can_stream, merge_files
from delible.made import Made
from delible.precision import BasePrecision
from delible.system import artefact as artefacts
from delible.system.artefact import Artefact, Base
from delible.system.base import System, identity_of
from delible.systems.artefact_kind import ArtefactKind

VLLM_PREFIX = "vllm:"
#: Folder, in an artefact's, of what the next request is to know.
REMEMBERS = "remembers"
logger = logging.getLogger(__name__)

_ADDRESSES = ("http://", "https://")


def is_address(name: str) -> bool:
    """Whether a name is that of an endpoint."""
    return name.startswith(_ADDRESSES)


def open_system(
    name: str,
    *,
    model: str | None = None,
    context: Context = NO_CONTEXT,
    serving: bool = False,
    base_precision: BasePrecision = "float32",
) -> System:
    """A system by name.

    Args:
        name: What :meth:`LM.load` takes; the folder of an artefact (of a run), of any kind; a
            model's name after ``vllm:``, for a GPU with vLLM; or the address of an
            OpenAI-compatible server, perhaps with ``#MODEL`` at its end. A server is asked for
            one token.
        model: Name of the model at an address.
        context: Who judges or writes by talking, for the guards among them.
        serving: It is to answer many at once: a model in vLLM then answers as they come, and
            gives no scores. Every other system does so anyway.
        base_precision: That a model's weights are held in, see :meth:`LM.load`.

    Raises:
        ModelError: What the name stands for cannot be used; says what to do.
        RunError: An artefact that is damaged, of an unknown kind, or on another base than it
            was made on.
        MissingExtraError: It needs an extra that is not installed.
    """
    if serving and model is None and name.startswith(VLLM_PREFIX):
        from delible.systems.vllm_serving import ServingVLLM

        return ServingVLLM.load(name.removeprefix(VLLM_PREFIX))
    return _open(name, model, (), context, base_precision)


def open_lm(name: str, base_precision: BasePrecision = "float32") -> LM:
    """A system by name whose weights can be worked on, held in a precision (:meth:`LM.load`).

    Raises:
        ModelError: There are none: a guarded system, a server.
        DelibleError: As for :func:`open_system`.
    """
    return language_model(open_system(name, base_precision=base_precision), name)


def _open(
    name: str,
    model: str | None,
    above: tuple[Path, ...],
    context: Context,
    base_precision: BasePrecision = "float32",
) -> System:
    if is_address(name):
        from delible.systems.endpoint import Endpoint

        address, _, fragment = name.partition("#")
        endpoint = Endpoint(address, model or fragment or None)
        endpoint.check()
        key = f"the key in ${endpoint.key_name}" if endpoint.key_name else "no key"
        logger.info(f"Asking {endpoint.name} with {key}.")
        return endpoint
    if model is not None:
        raise ModelError(
            f"a model name ('{model}') belongs to an address, and this is none.",
            where=name,
            hint="Leave out --model, or give a URL such as https://host/v1.",
        )
    if name.startswith(VLLM_PREFIX):
        from delible.systems.vllm import VLLM

        return VLLM.load(name.removeprefix(VLLM_PREFIX))
    folder = Path(name).expanduser()
    if artefacts.is_artefact(folder):
        found = _open_artefact(name, folder.resolve(), above, context)
        if isinstance(found, LM) and not found.wears_adapter:
            found.hold(base_precision)
        return found
    return LM.load(name, base_precision=base_precision)


def _open_artefact(name: str, folder: Path, above: tuple[Path, ...], context: Context) -> System:
    if folder in above:
        circle = " on ".join(path.name for path in (*above[above.index(folder) :], folder))
        raise RunError(
            f"these artefacts stand on each other in a circle: {circle}.",
            where=str(folder / artefacts.FILE),
            hint="Set the base of one of them to the model that it was made on.",
        )
    artefact = artefacts.read(folder)
    kind = kind_of(artefact, folder)
    base = partial(_open_base, artefact, folder, (*above, folder), context)
    if not artefact.enabled:
        logger.warning(
            f"The {artefact.kind} in {name} is taken off ('delible undo'): its base answers alone."
        )
        return base()
    system = kind.open(artefact, folder, base, context)
    system.name = name
    if artefact.remembers is not None:
        system.remembers = Made.load(folder / artefact.remembers)  # type: ignore[attr-defined]
    return system


def kind_of(artefact: Artefact, folder: Path) -> ArtefactKind:
    """How an artefact is written and opened.

    Raises:
        RunError: The kind is not known here.
    """
    known = [card.name for card in registry.cards("artefact")]
    if artefact.kind not in known:
        raise RunError(
            f"an artefact of the unknown kind '{artefact.kind}'.",
            where=str(folder / artefacts.FILE),
            hint=f"{nearest(artefact.kind, known)} A newer delible, or a plug-in, may know it.",
        )
    return kind_named(artefact.kind)


def kind_named(name: str) -> ArtefactKind:
    """A kind of artefact by name."""
    found: ArtefactKind = registry.load("artefact", name)()
    return found


def stands_on_base(folder: Path) -> bool:
    """Whether a folder's artefact needs another one, or a model elsewhere, to be opened."""
    return bool(kind_of(artefacts.read(folder), folder).card.reversible)


def opens_again(system: System) -> bool:
    """Whether a system's name opens this very system again."""
    if isinstance(system, LM):
        return system.origin is not None
    return is_address(system.name) or artefacts.is_artefact(Path(system.name).expanduser())


def open_base(folder: Path, context: Context = NO_CONTEXT) -> System:
    """What an artefact stands on, or was made from.

    Raises:
        RunError: There is no artefact, or its base is gone or another one.
    """
    return _open_base(artefacts.read(folder), folder, (), context)


def _open_base(
    artefact: Artefact, folder: Path, above: tuple[Path, ...], context: Context
) -> System:
    """What an artefact stands on, if it is still what it was.

    Raises:
        RunError: It is not there, or its weights are others.
    """
    where = str(folder / artefacts.FILE)
    if artefact.base is None:
        raise RunError("it names no base, and cannot be used without one.", where=where)
    name = artefact.base.name
    beside = folder / name
    if not is_address(name) and beside.is_dir() and beside != folder:
        name = str(beside)
    try:
        base = _open(name, None, above, context, artefact.base.precision or "float32")
    except ModelError as error:
        raise RunError(
            f"its base cannot be opened: {error.problem}",
            where=f"{where} (base {artefact.base.name})",
            hint="Put the base back, or set base.name to where it is now.",
        ) from error
    known, found = artefact.base.identity, identity_of(base)
    if known is not None and found is not None and known != found:
        raise RunError(
            f"its base is another one than it was made on (now {found[:12]}, then {known[:12]}).",
            where=f"{where} (base {artefact.base.name})",
            hint="Give it the same weights and chat template again; on others it means nothing.",
        )
    return base


def described(system: System) -> Base:
    """How an artefact names the system that it stands on."""
    held = system.base_precision if isinstance(system, LM) else None
    return Base(
        name=_lasting(system.name),
        identity=identity_of(system),
        precision=None if held == "float32" else held,
    )


def _lasting(name: str) -> str:
    """A name that means the same from everywhere: folders by their whole path."""
    folder = Path(name).expanduser()
    return str(folder.resolve()) if not is_address(name) and folder.is_dir() else name


def keep(
    kind: str,
    content: object,
    folder: Path,
    base: Base | None,
    system: System,
    remembers: Made | None = None,
) -> Artefact:
    """Writes what a method made into a folder: its parts, then ``artefact.yaml``.

    Args:
        kind: Of the artefact.
        content: As the kind's ``save`` takes it.
        base: What it stands on, or was made from.
        system: The whole, as it answers now.
        remembers: What the next request is to know.

    Raises:
        RunError: The disk refuses it.
    """
    parts, options = kind_named(kind).save(content, folder)
    if remembers is not None:
        remembers.save(folder / REMEMBERS)
    artefact = Artefact(
        kind=kind, base=base, parts=parts, options=options, identity=identity_of(system),
        remembers=None if remembers is None else REMEMBERS,
    )  # fmt: skip
    artefacts.write(artefact, folder)
    return artefact


def undo(folder: Path | str, *, back: bool = False, only: Sequence[str] = ()) -> Artefact:
    """Takes an artefact off: it answers as its base, bit by bit. Nothing is deleted.

    Args:
        folder: Of the artefact.
        back: Put it on again instead, with all that was taken out of it.
        only: Take only this out of it, bit by bit: of a codebook subjects, or ids of
            edits or requests.

    Raises:
        RunError: There is no artefact, it is a whole model, of which nothing can be taken off, or
            it holds nothing of the names in ``only``.
    """
    folder = Path(folder).expanduser()
    if not artefacts.is_artefact(folder):
        raise RunError(
            "there is no artefact in this folder.",
            where=str(folder),
            hint="Give the folder that 'delible unlearn --out' wrote.",
        )
    artefact = artefacts.read(folder)
    if not kind_of(artefact, folder).card.reversible:
        made_from = f" It was made from {artefact.base.name}." if artefact.base else ""
        raise RunError(
            f"the {artefact.kind} is whole: there is nothing that could be taken off.",
            where=str(folder),
            hint=f"Open the model before instead.{made_from}",
        )
    if only:
        named = tuple(dict.fromkeys((*(artefact.without or ()), *only)))
        changed = artefact.model_copy(update={"without": named})
        kind_of(artefact, folder).check_without(changed, folder)
    else:
        without = None if back else artefact.without
        changed = artefact.model_copy(update={"enabled": back, "without": without})
    if changed != artefact:
        artefacts.write(changed, folder)
    return changed


def merge(folder: str, out: Path) -> LM:
    """Writes one plain model of a whole stack.

    An adapter on weights that are held short is merged into the files of its base, tensor by
    tensor (:mod:`delible.lm.merging`).

    Args:
        folder: An artefact, or anything that :func:`open_lm` takes.
        out: A folder that transformers loads afterwards; it is made, or is empty.

    Raises:
        RunError: A part cannot be expressed in weights (a guard, a hook), and which; or there is
            something in ``out``.
    """
    out = Path(out).expanduser()
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise RunError(
            "there is something already, and it would be replaced.",
            where=str(out),
            hint="Choose another --out folder, or delete this one.",
        )
    system = open_system(folder)
    if isinstance(system, LM) and system.base_precision != "float32" and can_stream(system):
        merge_files(system, out)
        del system  # of two models in memory one is enough
        return LM.load(str(out), base_precision="bfloat16")
    if isinstance(system, LM) and system.base_precision in ("int8", "int4"):
        system = _unpacked(Path(folder).expanduser().resolve())
    lm = _in_weights(system, folder)
    lm.save(out)
    return lm


def _unpacked(folder: Path) -> System:
    """An adapter that was made above packed weights, above the same weights in bf16.

    To be called when it was opened: its base is known to be the one that it was made on.
    """
    artefact = artefacts.read(folder)
    if artefact.base is not None:
        short = artefact.base.model_copy(update={"precision": "bfloat16", "identity": None})
        artefact = artefact.model_copy(update={"base": short})
    below = partial(_open_base, artefact, folder, (folder,), NO_CONTEXT)
    return kind_of(artefact, folder).open(artefact, folder, below, NO_CONTEXT)


def merged_model(folder: str) -> LM:
    """One plain model of a whole stack, in memory.

    Raises:
        RunError: A part cannot be expressed in weights (a guard, a hook); says which.
    """
    return _in_weights(open_system(folder), folder)


def _in_weights(system: System, folder: str) -> LM:
    merged = getattr(system, "merged", None)
    if merged is None:
        raise RunError(
            f"'{system.name}' cannot be written as one model.",
            where=folder,
            hint="Only what is in weights can be: models, adapters and patches.",
        )
    try:
        lm: LM = merged()
    except DelibleError as error:
        raise RunError(error.problem, where=folder, hint=error.hint) from error
    return lm
