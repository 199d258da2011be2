"""Several PEFT adapters side by side: a question says which one answers it.

Questions of a batch that name different adapters are computed adapter by adapter, so that each is
packed as usual. Rows that speak together, one token at a time, go through PEFT's own forward with
an adapter per row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from delible.errors import ModelError
from delible.lm.body import Body
from delible.lm.layout import turn

#: What PEFT calls the model without an adapter.
_BASE = "__base__"


def names_of(lm: Body) -> tuple[str, ...]:
    """The adapters that a model has, whether they are on or not; of a router its requests."""
    if lm.routes is not None:
        return lm.routes
    return tuple(getattr(lm.model, "peft_config", None) or ())


def check_name(lm: Body, name: str) -> None:
    """Refuses a name that no adapter has; the empty one means none of them.

    Raises:
        ModelError: The model has no such adapter; names those it has.
    """
    known = names_of(lm)
    if name and name not in known:
        raise ModelError(
            f"the model has no adapter '{name}'.",
            where=getattr(lm, "name", None),
            hint=f"It has: {', '.join(known)}." if known else "It has none.",
        )


@contextmanager
def wearing(lm: Body, name: str | None) -> Iterator[None]:
    """Within it one of the adapters is on: by name, none (""), or whichever is on (None)."""
    if name is None or not names_of(lm):
        yield
        return
    if lm.routes is not None:
        with lm.routing(name):
            yield
        return
    with turn(lm.core):
        if name:
            with _switched(lm.model, name):
                yield
        else:
            with lm.model.disable_adapter():
                yield


@contextmanager
def _switched(model: Any, name: str) -> Iterator[None]:
    before, trains = model.active_adapter, [one.requires_grad for one in model.parameters()]
    model.set_adapter(name)
    try:
        yield
    finally:
        model.set_adapter(before)
        for one, flag in zip(model.parameters(), trains, strict=True):
            one.requires_grad_(flag)  # PEFT turns on those of the adapter that is set


def each_its_own(lm: Body, names: Sequence[str | None]) -> Any:
    """A context within which each row of a batch has the adapter that is named for it.

    The rows are those of one call of the backbone, in order; None is the adapter that is on.
    """
    if all(name is None for name in names):
        return nullcontext()
    if lm.routes is not None:
        return lm.routing(names)
    if len(set(names)) == 1:
        return wearing(lm, names[0])
    own = [lm.model.active_adapter if name is None else name or _BASE for name in names]
    return lm.model.base_model._enable_peft_forward_hooks(adapter_names=own)
