"""A whole model, as transformers writes and reads it.

It stands alone; its base is only where it came from.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from delible.context import Context
from delible.lm.lm import LM
from delible.registry import register
from delible.system.artefact import Artefact
from delible.system.base import System
from delible.systems.artefact_kind import ArtefactKind

_PART = "model"


@register(
    kind="artefact",
    name="model",
    title="Model",
    summary="A whole model: safetensors and tokenizer, which transformers loads as it is.",
    changes="Everything: the weights are its own.",
    reversible=False,
)
class Model(ArtefactKind):
    """Content: an :class:`LM` without an adapter."""

    def save(self, content: Any, folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
        content.save(folder / _PART)
        return {_PART: _PART}, {}

    def open(
        self, artefact: Artefact, folder: Path, base: Callable[[], System], context: Context
    ) -> System:
        return LM.load(str(folder / artefact.parts[_PART]))
