"""An intervention on a model: its options and what it has learned, put on when it is opened."""

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

_PART = "intervention"


@register(
    kind="artefact",
    name="intervention",
    title="Intervention",
    summary="A change of activations while a model is asked, which can be taken off exactly.",
    mechanism="activation",
    changes="Nothing in the weights: activations, while it is asked.",
    reversible=True,
)
class Intervention(ArtefactKind):
    """Content: a :class:`delible.intervene.base.Fitted`."""

    def save(self, content: Any, folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
        content.save(folder / _PART)
        return {_PART: _PART}, {}

    def open(
        self, artefact: Artefact, folder: Path, base: Callable[[], System], context: Context
    ) -> System:
        lm = language_model(base(), str(folder))
        return intervened(lm, [Fitted.load(folder / artefact.parts[_PART])])
