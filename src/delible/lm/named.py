"""The models that have a name of their own: the default one, and those that are made here."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeGuard, get_args

from delible.lm import embedded, moe, tiny, tiny_vlm
from delible.lm.made_here import is_folder_of

Named = Literal["default", "tiny", "tiny-vlm", "tiny-vlm-emoji", "moe"]


def is_named(name: str) -> TypeGuard[Named]:
    """Whether a model is known by its name alone."""
    return name in get_args(Named)


def folder_of(name: Named) -> Path:
    """The folder of weights and tokenizer; unpacked, or made, when it is missing.

    Raises:
        ModelError: It cannot be had, or the cache cannot be written.
        MissingExtraError: It sees pictures, and nothing is installed that opens them.
        DelibleError: What its pictures are drawn from is not on this machine.
    """
    match name:
        case "default":
            return embedded.default_model()
        case "tiny":
            return tiny.tiny_model()
        case "tiny-vlm":
            return tiny_vlm.tiny_vlm()
        case "tiny-vlm-emoji":
            return tiny_vlm.tiny_vlm(tiny_vlm.TINY_VLM_EMOJI)
        case "moe":
            return moe.moe_model()


def name_of(folder: str) -> Named | None:
    """The name of the model that such a folder in a cache, perhaps of another machine, holds."""
    if folder == embedded.DEFAULT_MODEL.folder:
        return "default"
    return next((name for name in get_args(Named) if is_folder_of(name, folder)), None)
