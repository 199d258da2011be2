"""Prompts and sentence lists, as text files beside this one."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from delible.errors import DataError, nearest


@cache
def read_text(name: str) -> str:
    """The text of a file of this folder, such as ``"refusals.txt"``.

    Raises:
        DataError: There is no such file; offers the nearest name.
    """
    known = {
        item.name: item
        for item in files(__name__).iterdir()
        if item.is_file() and not item.name.endswith((".py", ".pyc"))
    }
    if name not in known:
        raise DataError(f"there is no prompt file '{name}'.", hint=nearest(name, known))
    return known[name].read_text(encoding="utf-8")


def read_lines(name: str) -> tuple[str, ...]:
    """The lines of a file of this folder, without blank lines and ``#`` comments."""
    stripped = (line.strip() for line in read_text(name).splitlines())
    return tuple(line for line in stripped if line and not line.startswith("#"))


def read_named(name: str) -> dict[str, str]:
    """The lines of a file of this folder that are written ``key: text``, in order."""
    pairs = (line.partition(":") for line in read_lines(name))
    return {key.strip(): text.strip() for key, _, text in pairs}
