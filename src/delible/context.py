"""What a run brings along: made once by whoever starts it, and handed down whole."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from delible.rundir import RunDirectory
from delible.system.base import System
from delible.system.role import Role, RoleName
from delible.system.roles import Roles
from delible.watching import Stage, Steps, unwatched


@dataclass(frozen=True)
class Context:
    """What a run brings along.

    Attributes:
        seed: Of every random choice.
        run: Where checkpoints, events and results go; None keeps nothing.
        steps: Called after every step of training as ``steps(step, total, numbers)``.
        stage: Called as ``stage(title, done, total)`` by everything else that takes long.
        roles: Who judges, writes, attacks … by talking.
        cache: Folder where answers are kept; None: none are read, and none kept.
        itself: The system that a guard is put before, for guards that look into it.
    """

    seed: int = 0
    run: RunDirectory | None = None
    steps: Steps | None = None
    stage: Stage = unwatched
    roles: Roles = field(default_factory=Roles)
    cache: Path | None = None
    itself: System | None = None

    def role(self, part: RoleName) -> Role:
        """Who plays a part.

        Raises:
            RecipeError: Nobody does; names the flag.
            ModelError: The system that was named for it cannot be used.
        """
        return self.roles.role(part)

    def plays(self, part: RoleName) -> Role | None:
        """Who plays a part, or None: for parts that can be done without."""
        return self.roles.role(part) if self.roles.given(part) else None


#: Nobody plays a part, and nothing is kept.
NO_CONTEXT = Context()

__all__ = ["NO_CONTEXT", "Context"]
