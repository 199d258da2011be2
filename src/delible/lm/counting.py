"""How many tokens go through a model: what a look at it takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from delible.lm.identity import only_reads
from delible.lm.layout import current_layout, is_asked

if TYPE_CHECKING:
    from delible.lm.lm import LM
    from delible.lm.states import StateStore


@dataclass
class Read:
    """Tokens that went through a model so far, padding left out."""

    tokens: int = 0


@contextmanager
def tokens_read(lm: LM | None, states: StateStore | None = None) -> Iterator[Read]:
    """Within it every token that goes through the model is counted, whoever asks.

    What the store of states remembers counts too: a look takes what it would take alone. What
    another model that shares its weights is asked does not count, nor do the few tokens that are
    tried to find out how its blocks are put together. Of no model nothing is counted.
    """
    count = Read()
    if lm is None:
        yield count
        return
    reader, known = lm, states.remembered[lm.fingerprint] if states is not None else 0

    def hook(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        ids = next(
            (one for one in (*given, named.get("input_ids")) if isinstance(one, Tensor)),
            named.get("inputs_embeds"),
        )
        if ids is None or not is_asked(reader.interveners):
            return
        layout = current_layout(ids.shape[0] * ids.shape[1])
        if layout is not None:
            count.tokens += int(layout.real.sum())

    backbone = lm.core.get_submodule(lm.anatomy.backbone)
    handle = backbone.register_forward_pre_hook(only_reads(hook), with_kwargs=True)
    try:
        yield count
    finally:
        handle.remove()
        if states is not None:
            count.tokens += states.remembered[lm.fingerprint] - known


__all__ = ["Read", "tokens_read"]
