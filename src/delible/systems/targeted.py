"""A guard that goes by a file of targets, and follows it: ``delible serve --targets FILE``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, cast

from delible.component import build
from delible.context import NO_CONTEXT, Context
from delible.records import Record
from delible.system.asks import Decoding, Prompt
from delible.system.base import System
from delible.system.replies import Piece, Reply
from delible.systems.guarded import Guard, GuardedSystem
from delible.systems.mind import GuardMind
from delible.systems.targets import Reloading, Targets

#: Seconds between two looks at the file.
LOOK = 2.0


class TargetedSystem(GuardedSystem):
    """A guarded system whose guard is exchanged when its file of targets changes.

    The file is looked at when something is asked, at most every :data:`LOOK` seconds (a gateway
    looks whether or not something is asked), and read beside the requests under way, which keep
    the guard that they began with.

    Args:
        system: What is guarded.
        guard: The guard's options.
        path: The file of targets.
        context: Who judges or writes for the guard by talking.
        retain: Records to keep.

    Raises:
        DataError: The file cannot be used.
    """

    def __init__(
        self,
        system: System,
        guard: Guard,
        path: str | Path,
        context: Context = NO_CONTEXT,
        retain: Sequence[Record] = (),
    ) -> None:
        minds: list[GuardMind] = []
        context = guard.seated(system, context)

        def make(targets: Targets) -> GuardMind:
            aliases = guard.takes("aliases")
            able = guard.with_options({"aliases": targets.aliases()}) if aliases else guard
            return able.prepare(targets.request(names=not aliases, retain=retain), context)

        def use(mind: GuardMind) -> None:
            if minds:
                self.mind = mind
            minds[:] = [mind]

        self.reloading = Reloading(path, make, use)
        super().__init__(system, minds[0], guard.name, guard.timeout_seconds)
        self._looked = time.monotonic()
        self._looking: asyncio.Future[bool] | None = None

    async def respond(self, prompt: Prompt, decoding: Decoding) -> Reply:
        self._look()
        return await super().respond(prompt, decoding)

    async def stream(self, prompt: Prompt, decoding: Decoding) -> AsyncIterator[Piece]:
        self._look()
        async for piece in super().stream(prompt, decoding):
            yield piece

    async def look(self) -> None:
        """Reads the file again if it changed; the guard of before judges meanwhile."""
        self._looked = time.monotonic()
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, self.reloading.poll)

    async def change_targets(self, add: Sequence[str], remove: Sequence[str]) -> int:
        """Adds and removes names, in the file too; returns how many targets there are then.

        Raises:
            DelibleError: A name that cannot be guarded, or is not there; nothing is changed.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(None, self.reloading.change, add, remove)

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._looked < LOOK:
            return
        self._looked = now
        self._looking = asyncio.get_running_loop().run_in_executor(None, self.reloading.poll)


def guard_by_targets(
    system: System,
    path: str | Path,
    name: str = "target_detector",
    *,
    context: Context | None = None,
    retain: Sequence[Record] = (),
    **options: Any,
) -> TargetedSystem:
    """Puts a guard before a system that goes by a file of targets.

    Args:
        system: What is guarded.
        path: The file (``delible targets make``); it is read again when it changes.
        name: Name of the guard.
        context: Who judges or writes for it by talking.
        retain: Records to keep.
        **options: The guard's options.

    Raises:
        DataError: The file cannot be used.
        RecipeError: An unknown guard or option.
    """
    built = cast(Guard, build("guard", {"name": name, **options}))
    return TargetedSystem(system, built, path, context or NO_CONTEXT, retain)


__all__ = ["TargetedSystem", "guard_by_targets"]
