"""``--role PART=MODEL``: who plays a part by talking."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from delible.errors import RecipeError


def read_roles(given: Sequence[str] | None) -> dict[str, Any]:
    """Who plays what, from flags: ``PART=MODEL``, or YAML files that map parts to who plays them.

    Raises:
        RecipeError: No such part, an unknown option, a part that is given twice, or a file that
            cannot be read.
    """
    from delible.system.roles import Roles

    found: dict[str, Any] = {}
    for text in given or ():
        part, sign, player = text.partition("=")
        if not sign and text.endswith((".yaml", ".yml")):
            more = _of_file(Path(text))
        elif sign and player.strip():
            more = {part.strip(): player.strip()}
        else:
            raise RecipeError(
                f"'{text}' does not say who plays what.",
                where="--role",
                hint="Such as --role judge=https://host/v1#MODEL, or a YAML file.",
            )
        for name in more:
            if name in found:
                raise RecipeError(f"the {name} is given twice.", where="--role")
        found |= more
    Roles(cast(Any, found))  # what makes no sense is told before any work
    return found


def _of_file(path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RecipeError(f"cannot be read ({error}).", where=str(path)) from None
    if not isinstance(content, dict):
        raise RecipeError(
            "it maps no parts to who plays them.", where=str(path), hint="Such as 'judge: MODEL'."
        )
    return {str(part): player for part, player in content.items()}
