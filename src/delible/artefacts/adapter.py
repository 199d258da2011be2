"""An adapter beside a model, as PEFT writes and reads it.

PEFT alone loads it too where its base is a plain model. On another artefact (a patched model) it
is opened with that. Several adapters side by side are one artefact: a question says which of them
answers it (:attr:`delible.system.asks.Prompt.adapter`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from delible.context import Context
from delible.lm.adapters import names_of
from delible.lm.lm import language_model
from delible.registry import register
from delible.system.artefact import Artefact
from delible.system.base import System
from delible.systems.artefact_kind import ArtefactKind

_PART, _SETTINGS = "adapter", "adapter_config.json"


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
    """Content: an :class:`~delible.lm.lm.LM` that wears one, or several."""

    def save(self, content: Any, folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
        content.save(folder / _PART)
        names = names_of(content)
        if len(names) == 1 and (folder / _PART / _SETTINGS).is_file():
            return {_PART: _PART}, {}
        # PEFT writes the one that it calls default into the folder, the others below it
        places = {name: _PART if name == "default" else f"{_PART}/{name}" for name in names}
        return places, {"active": content.model.active_adapter}

    def open(
        self, artefact: Artefact, folder: Path, base: Callable[[], System], context: Context
    ) -> System:
        lm = language_model(base(), str(folder))
        active = artefact.options.get("active")
        for name, part in artefact.parts.items():
            lm.put_on(folder / part, None if active is None else name)
        if active is not None:
            lm.switch(str(active))
        return lm
