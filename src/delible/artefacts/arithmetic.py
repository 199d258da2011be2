"""An assistant beside a model, whose logits are taken away from the model's.

The folder holds the assistant's adapter; its blocks are the base's own, so that nothing of the
base is stored twice. A base that was opened from another artefact (a patched model, one that has
an assistant already) keeps what it has. Whoever has the folder can ask the assistant for what it
remembers: keep it as safe as the base.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from delible.context import Context
from delible.errors import DelibleError, RunError
from delible.lm.lm import language_model
from delible.lm.load import ModelInfo
from delible.registry import register
from delible.system.artefact import Artefact
from delible.system.base import System
from delible.systems.arithmetic import Assistant, Subtraction, together
from delible.systems.artefact_kind import ArtefactKind

_PART = "assistant"


@register(
    kind="artefact",
    name="arithmetic",
    title="Arithmetic of logits",
    summary="A small assistant whose logits are taken away from a model's; it can be taken off.",
    mechanism="wrapper",
    changes="Nothing in the weights: logits, at every token.",
    reversible=True,
)
class Arithmetic(ArtefactKind):
    """Content: an :class:`~delible.systems.arithmetic.Assistant`."""

    def save(self, content: Any, folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
        content.save(folder / _PART)
        return {_PART: _PART}, {"layers": content.layers, "subtraction": content.how.model_dump()}

    def open(
        self, artefact: Artefact, folder: Path, base: Callable[[], System], context: Context
    ) -> System:
        lm = language_model(base(), str(folder))
        try:
            layers = int(artefact.options["layers"])
            how = Subtraction.build(str(folder), **artefact.options["subtraction"])
        except (KeyError, TypeError, ValueError, DelibleError) as error:
            raise RunError(
                f"it does not say how the assistant's logits are taken away ({error}).",
                where=str(folder / "artefact.yaml"),
            ) from error
        found = together(lm, [Assistant.load(lm, folder / artefact.parts[_PART], layers, how)])
        found.origin = ModelInfo(str(folder), "run", str(folder))
        return found
