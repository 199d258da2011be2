"""What is put on a model while it is asked, as a kind of artefact: saved, put on when opened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from delible.context import Context
from delible.intervene.base import Fitted
from delible.intervene.system import intervened
from delible.lm.lm import language_model
from delible.system.artefact import Artefact
from delible.system.base import System
from delible.systems.artefact_kind import ArtefactKind


class FittedKind(ArtefactKind):
    """Content: a :class:`delible.intervene.base.Fitted`, in a part with the kind's name."""

    def save(self, content: Any, folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
        content.save(folder / self.card.name)
        return {self.card.name: self.card.name}, {}

    def open(
        self, artefact: Artefact, folder: Path, base: Callable[[], System], context: Context
    ) -> System:
        lm = language_model(base(), str(folder))
        return intervened(lm, [self.fitted(artefact, folder)])

    def fitted(self, artefact: Artefact, folder: Path) -> Fitted:
        """What is put on."""
        return Fitted.load(folder / artefact.parts[self.card.name])


__all__ = ["FittedKind"]
