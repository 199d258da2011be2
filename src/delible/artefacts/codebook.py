"""A codebook beside a model: its edits can be taken out one by one, or all together.

``without`` in ``artefact.yaml`` names those that are out: subjects, or ids of edits or requests.
"""

from __future__ import annotations

from pathlib import Path

from delible.edit.codebook import without
from delible.intervene.artefact import FittedKind
from delible.intervene.base import Fitted
from delible.registry import register
from delible.system.artefact import Artefact


@register(
    kind="artefact",
    name="codebook",
    title="Codebook",
    summary="Keys, radii and values beside one matrix; each edit in it can be taken out exactly.",
    mechanism="activation",
    changes="Nothing in the weights: what one matrix gives at questions that the book knows.",
    reversible=True,
)
class Codebook(FittedKind):
    """A book of edits."""

    def fitted(self, artefact: Artefact, folder: Path) -> Fitted:
        book = super().fitted(artefact, folder)
        return without(book, artefact.without) if artefact.without else book

    def check_without(self, artefact: Artefact, folder: Path) -> None:
        self.fitted(artefact, folder)
