"""A guard before a system: its options and the request that it goes by.

The guard is made ready anew when it is opened, from the same names and records.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from delible.component import build
from delible.context import Context
from delible.errors import RunError
from delible.files import atomic_file
from delible.records import ForgetRequest
from delible.registry import register
from delible.system.artefact import Artefact
from delible.system.base import System
from delible.system.roles import Roles
from delible.systems.artefact_kind import ArtefactKind
from delible.systems.guarded import Guard as GuardOptions
from delible.systems.opening import open_system

_PART = "request"


@register(
    kind="artefact",
    name="guard",
    title="Guard",
    summary="A guard before a system, made from a forget request, which can be taken away.",
    mechanism="output-guard",
    changes="Nothing in the model: what comes in and out is judged.",
    reversible=True,
)
class Guard(ArtefactKind):
    """Content: a :class:`delible.systems.guarded.Guarding`."""

    def save(self, content: Any, folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
        name = f"{_PART}.json"
        with atomic_file(folder / name) as handle:
            handle.write(content.request.model_dump_json(indent=2))
        options = {"guard": content.guard.spec()}
        return {_PART: name}, options | ({"roles": dict(content.roles)} if content.roles else {})

    def open(
        self, artefact: Artefact, folder: Path, base: Callable[[], System], context: Context
    ) -> System:
        path = folder / artefact.parts[_PART]
        try:
            request = ForgetRequest.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:  # pydantic's errors are ValueErrors
            raise RunError("the guard's request cannot be read.", where=str(path)) from error
        guard: GuardOptions = build("guard", artefact.options["guard"])
        players = {**artefact.options.get("roles", {}), **context.roles.players}
        roles = Roles(players, open_system, context.roles.answers)
        return guard.put_before(base(), request, replace(context, roles=roles))
