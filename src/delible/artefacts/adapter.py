"""An adapter beside a model, as PEFT writes and reads it.

PEFT alone loads it too where its base is a plain model. On another artefact (a patched model) it
is opened with that.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from delible.lm.lm import language_model
from delible.registry import register
from delible.system.artefact import Artefact, ArtefactKind
from delible.system.base import System

_PART = "adapter"


@register(
    kind="artefact",
    name="adapter",
    title="Adapter",
    summary="A small product beside some matrices (LoRA and its like), which can be taken off.",
    mechanism="adapter",
    changes="Nothing in the model: what it adds lies beside it.",
    reversible=True,
)
class Adapter(ArtefactKind):
    """Content: an :class:`~delible.lm.lm.LM` that wears one."""

    def save(self, content: Any, folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
        content.save(folder / _PART)
        return {_PART: _PART}, {}

    def open(self, artefact: Artefact, folder: Path, base: Callable[[], System]) -> System:
        lm = language_model(base(), str(folder))
        lm.put_on(folder / artefact.parts[_PART])
        return lm
