"""Functions at sites of a model: they read or change what flows through, and leave nothing behind.

One hook per module calls its functions in order. It stands before all other hooks of the module:
transformers collects outputs with hooks of its own, and what is changed behind them would reach
neither the collected states nor, in some models, the next module. A hook acts only while its owner
is asked in this thread, so the same weights can be asked bare at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from delible.errors import ModelError
from delible.intervene.sites import Place, Positions, Site
from delible.lm.body import Body
from delible.lm.identity import only_reads
from delible.lm.layout import Layout, current_layout, is_asked


@dataclass(frozen=True)
class Where:
    """What is known of the states that a function sees.

    Attributes:
        what: Of the site.
        layer: Index of the layer; None for what a model has once.
        received: What the module received at the same tokens, if the states are what it gives.
        shape: Rows and tokens in which the states came, before they were put one after the other.
    """

    what: str
    layer: int | None
    _tokens: int
    _chosen: Int[Tensor, " token"] | None
    received: Float[Tensor, "token inner"] | None = None
    shape: tuple[int, ...] = ()

    @property
    def layout(self) -> Layout:
        """The call of the backbone that is under way.

        Raises:
            ModelError: Whoever calls the backbone does not tell.
        """
        return _layout(self._tokens, self.what)

    @property
    def text(self) -> Int[Tensor, " token"]:
        """Which text of the call each state belongs to, -1 for padding."""
        return self._of(self.layout.text)

    @property
    def place(self) -> Int[Tensor, " token"]:
        """Where in its text each state's token stands, from 0."""
        return self._of(self.layout.place)

    def _of(self, values: Tensor) -> Tensor:
        flat = values.reshape(-1)
        return flat if self._chosen is None else flat[self._chosen]


#: (states [token, width], where) -> states of the same shape; None: it only reads.
Function = Callable[[Float[Tensor, "token width"], Where], Float[Tensor, "token width"] | None]


@dataclass(frozen=True)
class Tap:
    """A function at a site."""

    site: Site
    positions: Positions
    function: Function


class Taps:
    """Functions at sites of one model, in order; they can be put on and taken off.

    Args:
        lm: The model.
        taps: First the ones that act first.
        owner: Acts only while this is asked (see ``lm/layout.py``); None: always.

    Raises:
        ModelError: The model lacks a site or a layer.
    """

    def __init__(self, lm: Body, taps: Sequence[Tap], owner: object | None = None) -> None:
        self.lm, self.owner = lm, owner
        self._at: dict[tuple[str, bool], list[tuple[Place, Tap]]] = {}
        for tap in taps:
            for place in tap.site.places(lm):
                if place.what == "vision" and tap.positions.kind != "all":
                    raise ModelError(
                        f"a picture has no tokens of the kind '{tap.positions.kind}'.",
                        where=place.path,
                        hint="Use all positions.",
                    )
                self._at.setdefault((place.path, place.at_input), []).append((place, tap))
        self._handles: list[Any] = []
        self._count, self._lock = 0, Lock()

    @contextmanager
    def on(self, *, first: bool = True) -> Iterator[None]:
        """Within it the functions are in their places; may be entered again, by other threads too.

        Args:
            first: Before all other hooks of a module; else behind them, to read what they made.
        """
        with self._lock:
            if not self._count:
                self._put(first)
            self._count += 1
        try:
            yield
        finally:
            with self._lock:
                self._count -= 1
                if not self._count:
                    while self._handles:
                        self._handles.pop().remove()

    def _put(self, first: bool) -> None:
        for (path, at_input), mine in self._at.items():
            module: nn.Module = self.lm.core.get_submodule(path)
            put = module.register_forward_pre_hook if at_input else module.register_forward_hook
            hook = self._before(mine) if at_input else self._behind(mine)
            # whoever owns it names it: the bare model's answers do not depend on it
            self._handles.append(put(only_reads(hook), prepend=first, with_kwargs=True))  # type: ignore[operator]

    def _before(self, mine: Sequence[tuple[Place, Tap]]) -> Callable[..., Any]:
        def hook(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
            if self.owner is not None and not is_asked(self.owner):
                return None
            for place, value in enumerate(given):
                if torch.is_tensor(value):
                    new = self._through(value, mine)
                    return (*given[:place], new, *given[place + 1 :]), named
            tensors = [name for name, value in named.items() if torch.is_tensor(value)]
            if not tensors:
                raise ModelError("the module received no tensor.", where=mine[0][0].path)
            name = "hidden_states" if "hidden_states" in tensors else tensors[0]
            return given, {**named, name: self._through(named[name], mine)}

        return hook

    def _behind(self, mine: Sequence[tuple[Place, Tap]]) -> Callable[..., Any]:
        def hook(module: nn.Module, given: Any, named: Any, output: Any) -> Any:
            if self.owner is not None and not is_asked(self.owner):
                return None
            received = next(
                (
                    one for one in (*given, *named.values())
                    if torch.is_tensor(one) and one.is_floating_point()  # and not the ids
                ),
                None,
            )  # fmt: skip
            if torch.is_tensor(output):
                return self._through(output, mine, received)
            if isinstance(output, (tuple, list)) and output and torch.is_tensor(output[0]):
                new = self._through(output[0], mine, received)
                return type(output)((new, *output[1:]))
            if isinstance(output, Mapping) and output:
                name = next(iter(output))
                changed: Any = output
                changed[name] = self._through(output[name], mine, received)
                return changed
            raise ModelError(
                f"the module gave no tensor but {type(output).__name__}.", where=mine[0][0].path
            )

        return hook

    def _through(
        self, states: Tensor, mine: Sequence[tuple[Place, Tap]], received: Tensor | None = None
    ) -> Tensor:
        for place, tap in mine:
            states = self._one(states, place, tap, received)
        return states

    def _one(
        self, states: Tensor, place: Place, tap: Tap, received: Tensor | None = None
    ) -> Tensor:
        if place.columns is not None:
            first, width = place.columns
            if width < states.shape[-1]:
                mine = states[..., first : first + width]
                changed = self._one(mine, replace(place, columns=None), tap, received)
                if changed is mine:
                    return states
                behind = states[..., first + width :]
                return torch.cat([states[..., :first], changed, behind], dim=-1)
        flat = states.reshape(-1, states.shape[-1])
        chosen = None if tap.positions.kind == "all" else self._chosen(tap, place, len(flat))
        if chosen is not None and not len(chosen):
            return states
        part = flat if chosen is None else flat[chosen]
        if received is not None:
            received = received.reshape(-1, received.shape[-1])
            received = received if chosen is None else received[chosen]
        shape = tuple(states.shape[:-1])
        where = Where(place.what, place.layer, len(flat), chosen, received, shape)
        new = tap.function(part, where)
        if new is None:
            return states
        if new.shape != part.shape:
            raise ModelError(
                f"the intervention gave shape {tuple(new.shape)} for {tuple(part.shape)}.",
                where=place.path,
            )
        new = new.to(states.dtype)
        if chosen is not None:
            new = flat.index_copy(0, chosen, new)
        return new.reshape(states.shape)

    def _chosen(self, tap: Tap, place: Place, tokens: int) -> Int[Tensor, " token"] | None:
        """Which of all tokens are meant, found once per call of the backbone; None: all are."""
        layout = _layout(tokens, place.what)
        key = ("flat", tap.positions)
        if key not in layout.known:
            flat = tap.positions.chosen(self.lm, layout).reshape(-1).nonzero()[:, 0]
            layout.known[key] = None if len(flat) == tokens else flat
        return layout.known[key]  # type: ignore[no-any-return]


def _layout(tokens: int, what: str) -> Layout:
    layout = current_layout(tokens)
    if layout is None or layout.text.numel() != tokens:
        raise ModelError(
            f"which tokens pass '{what}' is not known here.",
            hint="Ask the model through generate, score or inspect, or intervene at all positions.",
        )
    return layout
