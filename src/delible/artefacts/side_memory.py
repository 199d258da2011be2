"""A side memory of a model: changed copies of one matrix, and when they are used instead of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from delible.context import Context
from delible.intervene.base import Fitted
from delible.intervene.system import intervened
from delible.lm.lm import language_model
from delible.registry import register
from delible.system.artefact import Artefact
from delible.system.base import System
from delible.systems.artefact_kind import ArtefactKind

_PART = "side_memory"


@register(
    kind="artefact",
    name="side_memory",
    title="Side memory",
    summary="Copies of one matrix that some questions are routed to, which can be taken off.",
    mechanism="activation",
    changes="Nothing in the weights: what one matrix gives at questions that are routed away.",
    reversible=True,
)
class SideMemory(ArtefactKind):
    """Content: a :class:`delible.intervene.base.Fitted` whose tensors are copies."""

    def save(self, content: Any, folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
        content.save(folder / _PART)
        return {_PART: _PART}, {}

    def open(
        self, artefact: Artefact, folder: Path, base: Callable[[], System], context: Context
    ) -> System:
        lm = language_model(base(), str(folder))
        return intervened(lm, [Fitted.load(folder / artefact.parts[_PART])])
