"""A model before whose matrices adapters stand, each behind its gate: asked like any model.

The weights are shared with the bare model and never touched. While nothing acts, nothing stands in
the way: the products are put beside the matrices only for a call of the backbone in which a gate
is open. One call may hold rows with different adapters, scales and experts; a question may also say
itself which request's adapter answers it (:attr:`Prompt.adapter`, the request's id; empty: none).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from threading import Lock
from typing import Any, ClassVar

from torch import Tensor, nn

from delible.errors import ModelError
from delible.lm.beside import Beside
from delible.lm.identity import only_reads
from delible.lm.layout import Make, asked, current_layout, is_asked, turn
from delible.lm.lm import LM
from delible.routed.router import Router


class Routed(Beside):
    """A model with a router; see :func:`routed`.

    Attributes:
        bare: The model without the router; it shares its weights.
        router: Which adapters act, and when.
    """

    what: ClassVar[str] = "a router"
    unmerged_hint: ClassVar[str] = (
        "Serve it as it is, or merge the adapter of one request ('delible merge' of its folder "
        "below the run)."
    )
    unsaved_hint: ClassVar[str] = (
        "Save the model (lm.bare.save); a run of 'delible unlearn' keeps its router."
    )

    def __init__(self, bare: LM, router: Router) -> None:
        acting = router.acting(bare)
        super().__init__(bare, f"router of {len(router.members)}", own_rows=not acting.shares)
        self.router, self.acting = router, acting
        self._forced: Sequence[str | None] | str | None = None
        self._hooks = _Hooks(self)

    @property
    def unmerged(self) -> str:
        """Why it cannot be merged."""
        return "a router decides question by question, so it cannot be merged into weights"

    def on(self, bare: LM) -> Routed:
        """The same router on another model's weights."""
        return Routed(bare, self.router)

    @property
    def besides(self) -> Sequence[str]:
        """The router's identity."""
        return (self.router.identity,)

    def taken_off(self) -> tuple[str, LM]:
        """The router, and the bare model."""
        return "router", self.bare

    def wear(self, model: Any) -> None:
        """Takes another form of the same model; the router stays."""
        super().wear(model)
        self._hooks = _Hooks(self)  # those of the twin belong to the twin

    # ---- how it acts

    @property
    def routes(self) -> tuple[str, ...]:  # type: ignore[override]
        """Ids of the requests that a question may name."""
        return self.router.members

    @contextmanager
    def routing(self, names: Sequence[str | None] | str | None) -> Iterator[None]:
        """Within it questions are answered by named members: one for all, or one for each row."""
        with turn(self.core):
            before, self._forced = self._forced, names
            try:
                yield
            finally:
                self._forced = before

    def forced(self, rows: int) -> Sequence[str | None] | None:
        """The members that rows are told to use; None: the gate decides for all of them."""
        if self._forced is None or isinstance(self._forced, str):
            return None if self._forced is None else [self._forced] * rows
        return self._forced

    @contextmanager
    def intervening(self) -> Iterator[None]:
        """Within it the router sees calls of the backbone."""
        with self._hooks.on():
            yield

    def spoken(self, rows: Sequence[Any], logits: Tensor) -> None:
        """Lets a router that goes by how sure the model is note that."""
        self.acting.spoken(rows, logits)

    def about_to_call(self, make: Make) -> None:
        """Lets a gate that reads the model's own states do so before the call is set up."""
        if self.acting.asks_the_model:
            self.acting.prepare(make(0).prompts)

    def alike(self, shared: int, prompts: Callable[[], Sequence[Sequence[int]]]) -> int:
        """What is computed once must be changed alike in all prompts."""
        if not shared:
            return 0
        forced = self._forced if isinstance(self._forced, str) else None
        return self.acting.alike(shared, prompts(), forced)


class _BackboneCall:
    """See :class:`delible.routed.router.Call`."""

    def __init__(
        self, hooks: _Hooks, backbone: nn.Module, given: tuple[Any, ...], named: dict[str, Any]
    ) -> None:
        self._hooks, self._backbone = hooks, backbone
        self.given, self.named = given, named

    def bare(self, **changes: Any) -> Any:
        with asked(None):
            return self._backbone(*self.given, **{**self.named, **changes})


class _Hooks:
    """Sees calls of the backbone, and puts the products beside the matrices while some act."""

    def __init__(self, owner: Routed) -> None:
        self.owner = owner
        self._count, self._lock = 0, Lock()
        self._before: Any = None
        self._beside: list[Any] = []

    @contextmanager
    def on(self) -> Iterator[None]:
        with self._lock:
            if not self._count:
                backbone = self.owner.core.get_submodule(self.owner.anatomy.backbone)
                self._before = backbone.register_forward_pre_hook(
                    only_reads(partial(self._begins)), prepend=True, with_kwargs=True
                )
            self._count += 1
        try:
            yield
        finally:
            with self._lock:
                self._count -= 1
                if not self._count:
                    self._before.remove()
                    self._stand_aside()

    def _begins(self, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        owner = self.owner
        acts = False
        if is_asked(owner.interveners):
            call = _BackboneCall(self, module, given, named)
            layout = _layout(given, named)
            acts = owner.acting.begins(layout, owner.forced(len(layout.prompts)), call)
        if acts and not self._beside:
            self._stand_beside()
        elif not acts and self._beside:
            self._stand_aside()

    def _stand_beside(self) -> None:
        core, acting = self.owner.core, self.owner.acting
        for path in acting.watched:
            module = core.get_submodule(path)
            put = module.register_forward_pre_hook
            self._beside.append(put(only_reads(self._sees(path)), prepend=True, with_kwargs=True))
        for path in acting.paths:
            put = core.get_submodule(path).register_forward_hook
            self._beside.append(put(only_reads(self._adds(path)), prepend=True))

    def _stand_aside(self) -> None:
        while self._beside:
            self._beside.pop().remove()

    def _sees(self, path: str) -> Callable[..., None]:
        owner = self.owner

        def hook(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            if is_asked(owner.interveners):
                states = given[0] if given else named["hidden_states"]
                owner.acting.sees(path, states.reshape(-1, states.shape[-1]))

        return hook

    def _adds(self, path: str) -> Callable[..., Tensor | None]:
        owner = self.owner

        def hook(module: nn.Module, given: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if not is_asked(owner.interveners):
                return None
            received = given[0].reshape(-1, given[0].shape[-1])
            more = owner.acting.added(path, received)
            if more is None:
                return None
            return output + more.reshape(output.shape).to(output.dtype)

        return hook


def _layout(given: tuple[Any, ...], named: dict[str, Any]) -> Any:
    ids = named.get("input_ids", given[0] if given else None)
    if ids is None:
        ids = named["inputs_embeds"][..., 0]
    layout = current_layout(ids.numel())
    if layout is None or layout.text.numel() != ids.numel():
        raise ModelError(
            "whose tokens go through the model is not known here, so they cannot be routed.",
            hint="Ask the model through generate, score or inspect.",
        )
    return layout


def routed(lm: LM, router: Router) -> Routed:
    """A model with a router; a router that it has already is replaced.

    Args:
        lm: The model; its weights are shared, not copied, and stay as they are.

    Raises:
        ModelError: The router was made on another model, or does not fit; or interventions are on
            the model.
    """
    bare = lm.bare if isinstance(lm, Routed) else lm
    if bare.interveners is not None:
        raise ModelError(
            "interventions are on the model, and a router cannot stand on them.",
            where=lm.name,
            hint="Take them off first, or put the router on the bare model.",
        )
    if router.learned_on is not None and router.learned_on != bare.identity:
        raise ModelError(
            "the router was made on another model, or with other weights.",
            where=lm.name,
            hint="Open it on the model that it was made on.",
        )
    return Routed(bare, router)


__all__ = ["Routed", "routed"]
