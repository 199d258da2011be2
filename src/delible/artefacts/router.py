"""A router before a model's matrices: adapters and their gates, request by request.

``without`` in ``artefact.yaml`` names the requests that are taken out. The adapters of requests lie
below ``members/`` as PEFT writes them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from delible.context import Context
from delible.errors import RunError
from delible.lm.lm import language_model
from delible.registry import register
from delible.routed.requests import RequestRouter
from delible.routed.router import Router as Routing
from delible.routed.system import Routed, routed
from delible.routed.tokens import TokenRouter
from delible.system.artefact import Artefact
from delible.system.base import System
from delible.systems.artefact_kind import ArtefactKind

#: By the form that ``artefact.yaml`` names.
_FORMS: dict[str, type[Routing]] = {one.form: one for one in (RequestRouter, TokenRouter)}


@register(
    kind="artefact",
    name="router",
    title="Router of adapters",
    summary="Adapters of requests beside a model's matrices, each behind its gate.",
    mechanism="adapter",
    changes="Nothing in the weights: what matrices give at questions for which a gate is open.",
    reversible=True,
)
class Router(ArtefactKind):
    """Content: a :class:`~delible.routed.system.Routed`."""

    def save(self, content: Any, folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
        assert isinstance(content, Routed)
        origin = content.bare.origin
        place = content.bare.name if origin is None else origin.place
        return content.router.save(folder, place), {"form": content.router.form}

    def open(
        self, artefact: Artefact, folder: Path, base: Callable[[], System], context: Context
    ) -> System:
        router = self._router(artefact, folder)
        return routed(language_model(base(), str(folder)), router)

    def check_without(self, artefact: Artefact, folder: Path) -> None:
        self._router(artefact, folder)

    def _router(self, artefact: Artefact, folder: Path) -> Routing:
        form = artefact.options.get("form")
        if form not in _FORMS:
            raise RunError(
                f"a router of the unknown form '{form}'.",
                where=str(folder),
                hint=f"Known are: {', '.join(_FORMS)}. A newer delible may know it.",
            )
        router = _FORMS[form].load(folder, artefact.parts)
        return router.without(artefact.without) if artefact.without else router
