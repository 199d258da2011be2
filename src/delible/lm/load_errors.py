"""What went wrong while a model was loaded, in the user's terms."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delible.errors import ModelError, nearest

if TYPE_CHECKING:
    pass


def nearest_path(path: Path) -> str:
    """A hint with the folder or file most like a path that does not exist."""
    parent = path.parent
    while not parent.is_dir() and parent != parent.parent:
        path, parent = parent, parent.parent
    try:
        known = [entry.name for entry in parent.iterdir() if not entry.name.startswith(".")]
    except OSError:
        known = []
    close = nearest(path.name, known) if known else ""
    if close.startswith("Did you mean"):
        found = re.sub(r"^Did you mean '(.*)'\?$", r"\1", close)
        return f"Did you mean '{parent / found}'?"
    return f"'{parent}' has no '{path.name}'."


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        ModelError: It cannot be read, or holds none.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ModelError(
            f"not valid JSON: {error.msg}.",
            where=f"{file}:{error.lineno}",
            hint="Copy the file again from where the model came.",
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"cannot be read: {error}.", where=str(file)) from error
    if not isinstance(values, dict):
        raise ModelError("it holds no JSON object.", where=str(file))
    return values


def only_pickled(where: str, file: str) -> ModelError:
    """The error of a checkpoint without safetensors."""
    return ModelError(
        f"its weights are pickled ({file}), and pickle can run code.",
        where=where,
        hint="Only safetensors are loaded. Convert it where you trust it: "
        "model.save_pretrained(folder) writes safetensors.",
    )


def first_line(error: BaseException) -> str:
    """What an error of a library says first; its kind when it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def told_of_loading(place: str, error: BaseException, likely_path: Path | None) -> ModelError:
    """What went wrong in ``from_pretrained``, in the user's terms."""
    kinds, cause = set(), error
    while cause is not None and type(cause).__name__ not in kinds:
        kinds.add(type(cause).__name__)
        cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
    text = str(error)
    if "cannot be loaded with `safetensors`" in text or "no file named model.safetensors" in text:
        return only_pickled(place, "no *.safetensors file")
    if "trust_remote_code" in text:
        return ModelError(
            "the model brings its own code, which is not run unless you ask for it.",
            where=place,
            hint="Choose a model that transformers knows without it; after reading that code, "
            "load it in Python with delible.lm.load.load_model(name, trust_remote_code=True).",
        )
    if likely_path is None:
        return ModelError(f"the model cannot be loaded: {first_line(error)}", where=place)
    near = nearest_path(likely_path)
    folder = f" If a folder was meant: {near}" if near.startswith("Did") else ""
    if "GatedRepoError" in kinds or "gated repo" in text:
        return ModelError(
            "access to this hub model must be granted first.",
            where=place,
            hint="Accept its terms on the hub, then run: hf auth login.",
        )
    if "RepositoryNotFoundError" in kinds or "is not a valid model identifier" in text:
        return ModelError(
            "there is no such model on the hub, and no such folder.",
            where=place,
            hint=f"Check the spelling; private models need: hf auth login.{folder}",
        )
    unreachable = {
        "LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError", "ConnectionError",
        "ConnectTimeout", "HfHubHTTPError", "MaxRetryError", "ProxyError",
    }  # fmt: skip
    if kinds & unreachable or "couldn't connect" in text.lower():
        return ModelError(
            "no such folder here, and the hub cannot be reached for it.",
            where=place,
            hint="Check the connection, HF_ENDPOINT and HF_HUB_OFFLINE, or use 'default', which "
            f"comes from the package index, or 'tiny', which needs no download.{folder}",
        )
    return ModelError(
        f"the model cannot be loaded: {first_line(error)}",
        where=place,
        hint=folder.strip() or None,
    )
