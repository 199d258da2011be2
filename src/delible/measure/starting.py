"""The context of a run, for whoever starts one: roles are opened by name, answers are kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

from delible.context import Context
from delible.errors import RecipeError
from delible.kept import cache_folder
from delible.measure.cache import Cache
from delible.rundir import RunDirectory
from delible.system.role import RoleName
from delible.system.roles import Player, Roles
from delible.systems.opening import open_system
from delible.watching import Stage, Steps, unwatched


def roles_of(players: Mapping[str, Player] | Roles | None = None) -> Roles:
    """Roles whose systems are opened by name (see :func:`open_system`).

    Args:
        players: A system, a name, or options (``{"system": NAME, "calls": 500}``) by role.

    Raises:
        RecipeError: An unknown role; offers the nearest.
    """
    if isinstance(players, Roles):
        return players
    # an unknown name among them is told there
    return Roles(cast(Mapping[RoleName, Player], dict(players or {})), open_system, _answers)


def with_writer(players: Mapping[str, Player] | None, writer: Player | None) -> dict[str, Player]:
    """Roles with a writer that was given apart.

    Raises:
        RecipeError: Another one is among the roles.
    """
    found = dict(players or {})
    if writer is not None and found.setdefault("writer", writer) is not writer:
        raise RecipeError(
            "the writer is given twice.",
            where="roles",
            hint="Leave out the generator, or the role 'writer'.",
        )
    return found


def _answers(part: RoleName) -> Cache:
    return Cache(cache_folder() / "roles" / part)


def started(
    context: Context | None,
    *,
    seed: int = 0,
    run: RunDirectory | None = None,
    steps: Steps | None = None,
    stage: Stage | None = None,
    roles: Mapping[str, Player] | Roles | None = None,
    cache: bool = True,
) -> Context:
    """The context that was given, or one made of single arguments.

    Raises:
        RecipeError: Both were given, or a role is unknown.
    """
    if context is None:
        folder: Path | None = cache_folder() if cache else None
        return Context(seed, run, steps, stage or unwatched, roles_of(roles), folder)
    for name, given in (
        ("seed", seed), ("out", run), ("progress", steps), ("stage", stage), ("roles", roles),
        ("cache", not cache),
    ):  # fmt: skip
        if given and not (name == "out" and context.run is None):
            raise RecipeError(
                f"'{name}' and 'context' are both given.",
                hint="The context holds it: say it there.",
            )
    return context if run is None else replace(context, run=run)


__all__ = ["roles_of", "started", "with_writer"]
