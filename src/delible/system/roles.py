"""Who plays what in a run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import Any
from weakref import WeakValueDictionary

from delible.errors import RecipeError, nearest
from delible.system.base import System
from delible.system.role import ROLES, Answers, Role, RoleName, RoleOptions

#: What may be given for a role: a system, its name, its options, or the role itself.
Player = System | str | Mapping[str, Any] | RoleOptions


#: Stands for the model that is worked on, where a system is named.
ITSELF = "self"


def _nobody_opens(name: str) -> System:
    raise RecipeError(f"there is nobody who opens '{name}'.", hint="Give the system itself.")


#: Systems in use, by name: a large model is not loaded once per metric.
_OPEN: WeakValueDictionary[str, System] = WeakValueDictionary()


@dataclass(frozen=True)
class Roles:
    """Who plays what in a run. Systems that are given by name are opened when they are wanted.

    Attributes:
        players: By role.
        opens: Opens a system by name.
        answers: Where a role's replies are kept; None keeps none.
    """

    players: Mapping[RoleName, Player] = dataclass_field(default_factory=dict)
    opens: Callable[[str], System] = _nobody_opens
    answers: Callable[[RoleName], Answers] | None = None
    _playing: dict[RoleName, Role] = dataclass_field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for part, player in self.players.items():
            if part not in ROLES:
                raise RecipeError(
                    f"unknown role '{part}'.", where="roles", hint=nearest(part, ROLES)
                )
            options_of(part, player)

    def given(self, part: RoleName) -> bool:
        """Whether somebody plays it."""
        return part in self.players

    def named(self) -> dict[str, Any]:
        """Who plays what, as plain data: names and options."""
        return {part: _described(player) for part, player in sorted(self.players.items())}

    def name_of(self, part: RoleName) -> str:
        """The name of who plays it, as it was given."""
        player = self.players[part]
        if isinstance(player, Mapping):
            return str(player.get("system", ""))
        if isinstance(player, RoleOptions):
            return player.system
        return player if isinstance(player, str) else player.name

    def role(self, part: RoleName) -> Role:
        """A role, opened now if it was not yet. Its budget is that of the run.

        Raises:
            RecipeError: Nobody plays it.
            ModelError: The system that its name stands for cannot be used.
        """
        if part not in self._playing:
            if part not in self.players:
                raise RecipeError(
                    f"nobody plays the {part}.",
                    where="roles",
                    hint=f"Give a model, or the address of a server with #MODEL at its end: "
                    f"--role {part}=MODEL.",
                )
            self._playing[part] = self.played(part, self.players[part])
        return self._playing[part]

    def played(self, part: RoleName, player: Player) -> Role:
        """The part, played by somebody who is named here; with a budget of its own."""
        if isinstance(player, Role):
            return player
        options = options_of(part, player)
        if isinstance(player, str | Mapping | RoleOptions):
            system = self._opened(options.system)
        else:
            system = player
        return Role(part, system, options, self.kept(part))

    def with_itself(self, system: System, parts: Collection[RoleName] = ()) -> Roles:
        """The roles with this system as :data:`ITSELF`.

        Args:
            parts: Parts that it plays too where nobody else was given.
        """
        players: dict[RoleName, Player] = dict(self.players)
        for part, player in self.players.items():
            if isinstance(player, str | Mapping | RoleOptions) and self.name_of(part) == ITSELF:
                players[part] = Role(part, system, options_of(part, player), self.kept(part))
        for part in parts:
            players.setdefault(part, Role(part, system, None, self.kept(part)))
        return self if players == self.players else Roles(players, self.opens, self.answers)

    def kept(self, part: RoleName) -> Answers | None:
        """Where the replies of who plays it are kept."""
        return None if self.answers is None else self.answers(part)

    def _opened(self, name: str) -> System:
        found = _OPEN.get(name)
        if found is None:
            found = _OPEN[name] = self.opens(name)
        return found


def options_of(part: RoleName, player: Player) -> RoleOptions:
    """How a part is played by somebody.

    Raises:
        RecipeError: An unknown option, or nobody is named.
    """
    if isinstance(player, RoleOptions):
        options = player
    elif isinstance(player, Mapping):
        options = RoleOptions.build(f"role '{part}'", **dict(player))
    elif isinstance(player, str):
        options = RoleOptions(system=player)
    else:
        return RoleOptions(system=player.name)
    if not options.system.strip():
        raise RecipeError(
            "it is not said who plays it.",
            where=f"role '{part}'",
            hint="Give 'system': a model's name or folder, or a server's address with #MODEL.",
        )
    return options


def _described(player: Player) -> Any:
    if isinstance(player, Mapping | RoleOptions):
        content = dict(player) if isinstance(player, Mapping) else player.model_dump()
        return {key: value for key, value in content.items() if value is not None}
    return player if isinstance(player, str) else player.name


__all__ = ["ITSELF", "Player", "Roles", "options_of"]
