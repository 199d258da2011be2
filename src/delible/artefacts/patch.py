"""A low-rank change of a few matrices, added when it is opened and taken off bit by bit.

    W = round(W_base + left @ right)        the sum in float64, rounded to the weight's own type

The file holds the factors and a hash of each matrix that they belong to.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from delible.context import Context
from delible.edit.base import Patch as PatchOfWeights
from delible.lm.lm import language_model
from delible.lm.load import ModelInfo
from delible.registry import register
from delible.system.artefact import Artefact
from delible.system.base import System
from delible.systems.artefact_kind import ArtefactKind

_PART = "patch"


@register(
    kind="artefact",
    name="patch",
    title="Patch",
    summary="A low-rank change of a few matrices of a model, which can be taken off exactly.",
    mechanism="merge/edit",
    changes="A few matrices, when it is opened.",
    reversible=True,
)
class Patch(ArtefactKind):
    """Content: a :class:`delible.edit.base.Patch`."""

    def save(self, content: Any, folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
        content.save(folder / _PART)
        return {_PART: _PART}, {"title": content.title}

    def open(
        self, artefact: Artefact, folder: Path, base: Callable[[], System], context: Context
    ) -> System:
        lm = language_model(base(), str(folder))
        patch = PatchOfWeights.load(folder / artefact.parts[_PART])
        patch.title = str(artefact.options.get("title", patch.title))
        patch.apply(lm)
        lm.origin = ModelInfo(str(folder), "run", str(folder))
        return lm
