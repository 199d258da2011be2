"""A model without its weights: its modules on the meta device, made from its settings alone.

It says what a model is made of and how large everything is, and answers nothing.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from delible.errors import ModelError
from delible.lm import embedded
from delible.lm.lm import LM
from delible.lm.load_errors import nearest_path, read_json, told_of_loading
from delible.lm.named import folder_of, is_named
from delible.lm.parts import class_of
from delible.lm.pretrained import fitting_tokenizer, has_tokenizer, pretrained_tokenizer
from delible.precision import BasePrecision
from delible.system import artefact as artefacts

logger = logging.getLogger(__name__)


def outline(name: str, base_precision: BasePrecision = "float32") -> LM:
    """The outline of a model.

    Args:
        name: As for :meth:`LM.load`; a folder need hold no more than a ``config.json``, and of a
            hub model only settings and tokenizer are fetched. Of an adapter or a patch it is the
            model below.
        base_precision: That the weights would be held in.

    Raises:
        ModelError: There are no settings, or none of a causal language model.
    """
    place = settings_place(name)
    try:
        with embedded.quiet(), torch.device("meta"):
            from transformers import AutoConfig

            kind: Any = class_of(place, {})
            config: Any = AutoConfig.from_pretrained(place)
            make = getattr(kind, "from_config", None) or kind._from_config
            model = make(config, dtype=torch.float32)
    except ModelError:
        raise
    except Exception as error:  # transformers raises many kinds
        raise told_of_loading(place, error, None) from error
    for value in model.buffers():
        value.data = value.data.to("meta")
    lm = LM(model.eval(), _tokenizer(place, model), name=name, outline=True)
    lm.hold(base_precision)
    return lm


def settings_place(name: str) -> str:
    """The folder with a model's settings, or its name on the hub.

    Raises:
        ModelError: There is no such place.
    """
    if is_named(name):
        return str(folder_of(name))
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if folder.suffix == ".gguf" or folder.is_file() or name.count("/") > 1:
            raise ModelError(
                "a model's settings are read from a folder or the hub.",
                where=name,
                hint=nearest_path(folder) if not folder.exists() else None,
            )
        return name
    for inside in (folder, folder / "model", folder / "base"):
        if (inside / "config.json").is_file():
            return str(inside)
    if artefacts.is_artefact(folder):
        base = artefacts.read(folder).base
        if base is not None:
            beside = folder / base.name
            return settings_place(str(beside) if beside.is_dir() else base.name)
    if (folder / "adapter_config.json").is_file():
        below = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        return settings_place(str(below))
    raise ModelError("the folder has no config.json.", where=name)


def _tokenizer(place: str, model: Any) -> Any:
    if Path(place).is_dir() and not has_tokenizer(Path(place)):
        logger.warning(
            f"{place} has no tokenizer: tokens are counted as the default model's tokenizer would."
        )
        return pretrained_tokenizer(str(embedded.default_model()), {}, local_files_only=True)
    return fitting_tokenizer(pretrained_tokenizer(place, {}), model, place)
