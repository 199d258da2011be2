"""Models that are made on this machine, once, and found again in the cache."""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from delible import kept
from delible.files import explain_disk
from delible.lm import embedded

logger = logging.getLogger(__name__)


def made_here(
    name: str, build: Callable[[Path], tuple[Any, Any]], *, telling: str, space: str
) -> Path:
    """Folder of a model; made when it is missing.

    Safe when several processes ask at once: one makes it, the others wait. Work that is killed goes
    on when the model is asked for again; a model whose files have changed since is made anew.

    Args:
        name: Of the folder, see :func:`folder_name`.
        build: Makes the model and its tokenizer or processor, or goes on from the file that it is
            given, in which it keeps its state meanwhile.
        telling: What is being made, for the log.
        space: What the disk needs for it, for people.

    Raises:
        ModelError: The cache cannot be written.
    """

    def work_in(work: Path) -> Path:
        began = time.perf_counter()
        logger.info(f"{telling}, once (how long that takes is said soon) …")
        result = work / "result"
        shutil.rmtree(result, ignore_errors=True)
        model, tokenizer = build(work / "checkpoint.pt")
        with embedded.quiet(), explain_disk(result):
            model.save_pretrained(result, safe_serialization=True)
            tokenizer.save_pretrained(result)
        logger.info(f"Done in {time.perf_counter() - began:.0f} seconds.")
        return result

    target = kept.cache_folder() / "models" / name
    return kept.folder(target, work_in, space=space, goes_on=True)


def folder_name(model: str, version: int, options: object, usual: object) -> str:
    """Name of a model's folder in the cache; other options, other name.

    Args:
        version: Raised whenever the same options give another model.
        usual: The options that the model's name stands for.
    """
    if options == usual:
        return f"{model}-{version}"
    return f"{model}-{version}-{hashlib.sha256(repr(options).encode()).hexdigest()[:12]}"


def is_folder_of(model: str, name: str) -> bool:
    """Whether a folder is that of the model with its usual options, in any version."""
    return re.fullmatch(rf"{re.escape(model)}-\d+", name) is not None
