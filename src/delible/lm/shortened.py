"""A model's first blocks, its final norm and its head as a model of their own.

Modules are its own, weights are those of the whole model: none is copied, so it costs no memory,
and whoever trains beside them freezes them.
"""

from __future__ import annotations

import copy
from typing import Any

from delible.errors import ModelError
from delible.lm.derive import derive
from delible.lm.hooks import truncated
from delible.lm.identity import Identity
from delible.lm.lm import LM


def shortened(lm: LM, layers: int, name: str) -> LM:
    """A model of the first blocks. What is found out about the whole one is taken to hold.

    Args:
        lm: The whole model. One that wears an adapter is merged first, into weights of their own.
        layers: Blocks that stay, from 1 to all.
        name: Of the new one.

    Raises:
        ModelError: The model has fewer blocks.
    """
    whole = lm.merged()
    if not 1 <= layers <= whole.anatomy.layers:
        raise ModelError(
            f"the first {layers} blocks are wanted of a model that has {whole.anatomy.layers}.",
            where=lm.name,
            hint=f"Choose from 1 to {whole.anatomy.layers}.",
        )
    core = whole.core
    kept: dict[int, Any] = {id(one): one for one in core.parameters()}
    with truncated(core, whole.anatomy, layers):
        twin = copy.deepcopy(core, kept)
    settings = twin.config.get_text_config()
    if (kinds := getattr(settings, "layer_types", None)) is not None:
        settings.layer_types = list(kinds)[:layers]
    settings.num_hidden_layers = layers
    found = copy.copy(whole)
    found.model, found.name, found.origin = twin, name, None
    found.template, found.patches = copy.copy(whole.template), []
    found.anatomy, found._identity = derive(twin), Identity(twin)
    vars(found).pop("budget", None)
    return found


__all__ = ["shortened"]
