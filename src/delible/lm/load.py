"""From a name to a model and its tokenizer: default, tiny, moe, folder, run, adapter, GGUF, hub."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from delible import kept
from delible.errors import ModelError
from delible.lm import embedded
from delible.lm.load_errors import (
    nearest_path,
    only_pickled,
    read_json,
)
from delible.lm.named import Named, folder_of, is_named, name_of
from delible.lm.parts import companions
from delible.lm.pretrained import (
    fitting_tokenizer,
    has_tokenizer,
    no_conversion_requests,
    pretrained_model,
    pretrained_tokenizer,
    require_tokenizer,
)
from delible.lm.saved_adapter import with_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Source = Named | Literal["folder", "run", "adapter", "gguf", "hub"]

_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class ModelInfo:
    """Where a model came from.

    Attributes:
        name: What the caller asked for.
        source: Kind of the place.
        path: Folder or file of the weights; ``None`` for the hub.
        base: What an adapter sits on, otherwise ``None``.
        revision: Commit of a hub model, if it is known.
        companions: Small files beside a model of several parts (settings of an image processor),
            by name.
    """

    name: str
    source: Source
    path: str | None = None
    base: str | None = None
    revision: str | None = None
    companions: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    @property
    def place(self) -> str:
        """What the weights below any adapter are loaded from, wherever one stands."""
        return self.base or self.path or self.name


class Loaded(NamedTuple):
    """A model in evaluation mode, its tokenizer, and where they came from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    info: ModelInfo


def load_model(
    name: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Loaded:
    """Loads a causal language model and its tokenizer.

    Args:
        name: ``default`` (SmolLM2-135M-Instruct from the package index), ``tiny`` (1.4 million
            weights, trained here on first use), ``moe`` (the default model with four experts a
            block, made here on first use), a folder with a ``config.json``, a run directory,
            a folder of a PEFT adapter, a ``.gguf`` file (dequantised), or the name of a model on
            the Hugging Face hub.
        dtype: Data type of the weights; fp32 is what training wants.
        revision: Branch, tag or commit of a hub model.
        trust_remote_code: Run the code a model brings along. Off unless asked for.

    Returns:
        The model on the CPU, the tokenizer and where they came from. A tokenizer without a
        padding token pads with its end token: masks are explicit everywhere in delible.

    Raises:
        ModelError: Nothing is there, it is damaged, it has only pickled weights, weights or a
            tokenizer are missing, the hub cannot be reached. Says what to do.
    """
    name = os.fspath(name)
    options = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if is_named(name):
        return _load_folder(name, folder_of(name), name, options)
    path = Path(name).expanduser().absolute()
    if path.is_dir():
        kept.use(path)  # if it is one that benchmarks taught
        for folder, in_run in ((path, False), (path / "model", True), (path / "adapter", True)):
            if (folder / "adapter_config.json").is_file():
                return _load_adapter(name, folder, options)
            if (folder / "config.json").is_file():
                return _load_folder(name, folder, "run" if in_run else "folder", options)
        raise ModelError(
            "the folder has no config.json and no adapter_config.json, nor has a model/ or "
            "adapter/ folder in it.",
            where=name,
            hint="Give the folder that save_pretrained wrote, or a run directory of delible.",
        )
    if path.suffix == ".gguf" and path.is_file():
        model, tokenizer = embedded.load_gguf(path, dtype)
        info = ModelInfo(name, "gguf", str(path))
        return Loaded(model, fitting_tokenizer(tokenizer, model, name), info)
    path = Path(name).expanduser()
    if path.is_file():
        raise ModelError(
            f"a {path.suffix or 'plain'} file is not a model.",
            where=name,
            hint="Give the folder that holds it, or a .gguf file.",
        )
    if _means_a_path(name):
        raise ModelError("there is no such folder or file.", where=name, hint=nearest_path(path))
    return _load_hub(name, path, revision, options)


def _means_a_path(name: str) -> bool:
    """Whether a name cannot be one of the hub: ``./x``, ``a/b/c``, ``x.gguf``."""
    return not _HUB_NAME.match(name) or name.endswith(".gguf")


def _load_folder(name: str, folder: Path, source: Source, options: dict[str, Any]) -> Loaded:
    read_json(folder / "config.json")
    if not list(folder.glob("*.safetensors")):
        pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
        if pickles:
            raise only_pickled(str(folder), pickles[0])
        raise ModelError(
            "the folder has a config.json but no weights (*.safetensors).",
            where=str(folder),
            hint="Copy the whole folder that save_pretrained wrote.",
        )
    require_tokenizer(folder)
    model = pretrained_model(str(folder), {**options, "local_files_only": True})
    tokenizer = pretrained_tokenizer(str(folder), options, local_files_only=True)
    info = ModelInfo(name, source, str(folder), companions=companions(model, str(folder)))
    return Loaded(model, fitting_tokenizer(tokenizer, model, name), info)


def _load_hub(name: str, path: Path, revision: str | None, options: dict[str, Any]) -> Loaded:
    logger.info(
        f"Loading {name} from the Hugging Face hub; what is not in its cache yet is downloaded."
    )
    where = {"revision": revision} if revision else {}
    with no_conversion_requests():
        model = pretrained_model(name, {**options, **where}, likely_path=path)
    tokenizer = pretrained_tokenizer(name, {**options, **where})
    commit = getattr(model.config, "_commit_hash", None)
    info = ModelInfo(
        name, "hub", revision=commit or revision, companions=companions(model, name, commit)
    )
    return Loaded(model, fitting_tokenizer(tokenizer, model, name), info)


def _load_adapter(name: str, folder: Path, options: dict[str, Any]) -> Loaded:
    """The base model that the adapter names, wearing the adapter."""
    settings = read_json(folder / "adapter_config.json")
    if not (folder / "adapter_model.safetensors").is_file():
        if (folder / "adapter_model.bin").is_file():
            raise only_pickled(str(folder), "adapter_model.bin")
        raise ModelError("the adapter has no adapter_model.safetensors.", where=str(folder))
    base = settings.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ModelError(
            "it does not name its base model.",
            where=str(folder / "adapter_config.json"),
            hint="Set base_model_name_or_path to the folder or hub name of the base model.",
        )
    inside = folder / base
    base = str(inside) if inside.is_dir() else name_of(Path(base).name) or base
    try:
        below = load_model(base, revision=settings.get("revision"), **options)
    except ModelError as error:
        raise ModelError(
            f"the base model of the adapter cannot be loaded: {error.problem}",
            where=f"{folder} (base {base})",
            hint=error.hint,
        ) from error
    model = with_adapter(below.model, folder, base)
    tokenizer = below.tokenizer
    if has_tokenizer(folder):
        tokenizer = fitting_tokenizer(
            pretrained_tokenizer(str(folder), options, local_files_only=True), below.model, name
        )
    info = replace(below.info, name=name, source="adapter", path=str(folder), base=below.info.place)
    return Loaded(model.eval(), tokenizer, info)
