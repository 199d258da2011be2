"""Pictures of rows: paths are relative to the file that names them; bytes are taken as they are.

Known are the columns ``images`` and ``image`` and the parts of turns. An entry is a path, a data
URL, an object with a ``source``, what ``datasets`` gives (``{"bytes": …, "path": …}``), or a
picture of Pillow. Nothing is fetched.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from delible.errors import DataError
from delible.loaders.formats import Row, describe
from delible.messages import ImagePart

#: Columns with pictures of a question.
COLUMNS = ("images", "image")


def with_pictures(row: Row, folder: Path | None) -> Row:
    """The row with its pictures in one column ``images``, where it has some.

    Args:
        folder: Of the file that it stands in; None: paths are from the working directory.

    Raises:
        DataError: Something there is no picture.
    """
    if not isinstance(row.content, Mapping):
        return row
    content = dict(row.content)
    changed = False
    for name in ("messages", "conversations"):
        if isinstance(content.get(name), list | tuple):
            content[name] = [_turn(turn, folder, row.where) for turn in content[name]]
            changed = True
    if any(content.get(name) is not None for name in COLUMNS):
        found: list[Any] = []
        for name in COLUMNS:
            value = content.pop(name, None)
            if isinstance(value, str) and row.is_text and not value.strip():
                continue
            if value is not None:
                items = value if isinstance(value, list | tuple) else [value]
                found += [_picture(one, name, folder, row.where) for one in items]
        if found:
            content["images"] = found
        changed = True
    return Row(row.where, content, row.is_text) if changed else row


def _turn(turn: Any, folder: Path | None, where: str) -> Any:
    if not isinstance(turn, Mapping):
        return turn
    key = "content" if "content" in turn else "value"
    parts = turn.get(key)
    if not isinstance(parts, list | tuple):
        return turn
    return {**turn, key: [
        _picture(part, f"{key}.image", folder, where)
        if isinstance(part, Mapping) and part.get("type") == "image" else part
        for part in parts
    ]}  # fmt: skip


def _picture(value: Any, name: str, folder: Path | None, where: str) -> Any:
    """One picture as the fields of an :class:`~delible.messages.ImagePart`."""
    if isinstance(value, ImagePart):
        return value
    kept: dict[str, Any] = {"type": "image"}
    if isinstance(value, Mapping):
        kept |= {key: value[key] for key in ("media_type", "sha256") if value.get(key)}
        source = next((value[key] for key in ("source", "bytes", "path") if value.get(key)), None)
        value = source if source is not None else value.get("image", value.get("url"))
    elif hasattr(value, "save") and hasattr(value, "mode"):  # of Pillow, as datasets decodes them
        written = io.BytesIO()
        value.save(written, format="PNG")
        value = written.getvalue()
    if not isinstance(value, bytes | str | Path) or not value:
        raise DataError(
            f"'{name}' must name pictures, not {describe(value)}.",
            where=where,
            hint="Give paths relative to this file, or data URLs.",
        )
    if isinstance(value, bytes):
        return {**kept, "source": value}
    text = str(value)
    if folder is not None and not text.startswith(("data:", "http://", "https://")):
        text = str(folder / Path(text).expanduser())  # an absolute path stays what it is
    return {**kept, "source": text}
