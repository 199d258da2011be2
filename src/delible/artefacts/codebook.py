"""A codebook beside a model: its edits can be taken out one by one, or all together.

``without`` in ``artefact.yaml`` names those that are out: subjects, or ids of edits or requests.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from delible.context import Context
from delible.edit.codebook import without
from delible.intervene.base import Fitted
from delible.intervene.system import intervened
from delible.lm.lm import language_model
from delible.registry import register
from delible.system.artefact import Artefact
from delible.system.base import System
from delible.systems.artefact_kind import ArtefactKind

_PART = "codebook"


@register(
    kind="artefact",
    name="codebook",
    title="Codebook",
    summary="Keys, radii and values beside one matrix; each edit in it can be taken out exactly.",
    mechanism="activation",
    changes="Nothing in the weights: what one matrix gives at questions that the book knows.",
    reversible=True,
)
class Codebook(ArtefactKind):
    """Content: a :class:`delible.intervene.base.Fitted` whose tensors are a book."""

    def save(self, content: Any, folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
        content.save(folder / _PART)
        return {_PART: _PART}, {}

    def open(
        self, artefact: Artefact, folder: Path, base: Callable[[], System], context: Context
    ) -> System:
        lm = language_model(base(), str(folder))
        return intervened(lm, [self._book(artefact, folder)])

    def check_without(self, artefact: Artefact, folder: Path) -> None:
        self._book(artefact, folder)

    def _book(self, artefact: Artefact, folder: Path) -> Fitted:
        found = Fitted.load(folder / artefact.parts[_PART])
        return without(found, artefact.without) if artefact.without else found
