"""Which text, and which place in it, each token of a call of the backbone is.

The engine computes texts in many forms: padded rows, trees of answers, a shared beginning, one
new token per row of a batch. Whatever changes or reads states at some positions only (see
``intervene/``) has to know what it sees, so every call of a backbone is made within :func:`told`.
The description is made when somebody asks for it, and costs nothing otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from threading import RLock
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from delible.lm.cores import cores_of

if TYPE_CHECKING:
    from delible.lm.body import Body


@dataclass(frozen=True)
class Layout:
    """The tokens of one call of the backbone.

    Attributes:
        prompts: Token ids of the prompt of each text, as far as the answer has not begun.
        text: Which text each token belongs to, -1 for padding. A token that several texts share
            (a beginning, a node of a tree) names one of them; their prompts agree up to there.
        place: Where in its text each token stands, from 0.
        predicts: Whether a token's final state predicts a token of an answer.
        doubts: What a router noted of the newest token of each row; empty where nobody does.
        known: Room for what is derived from it, for the time of the call.
    """

    prompts: Sequence[Sequence[int]]
    text: Int[Tensor, "rows new"]
    place: Int[Tensor, "rows new"]
    predicts: Bool[Tensor, "rows new"]
    doubts: Sequence[float | None] = ()
    known: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def real(self) -> Bool[Tensor, "rows new"]:
        """Which tokens are none of the padding."""
        return self.text >= 0

    @property
    def ends_prompt(self) -> Bool[Tensor, "rows new"]:
        """Which tokens are the last of their prompt."""
        lengths = torch.tensor([len(one) for one in self.prompts], device=self.text.device)
        return self.real & (self.place == lengths[self.text] - 1)


#: Makes the layout of a call, given how many tokens go through the backbone.
Make = Callable[[int], Layout]


class _Told:
    """A layout that is made once per call of the backbone."""

    def __init__(self, make: Make, step: Callable[[], int]) -> None:
        self.make, self.step = make, step
        self._key: tuple[int, int] | None = None
        self._made: Layout | None = None

    def __call__(self, tokens: int) -> Layout:
        key = (self.step(), tokens)
        if self._made is None or self._key != key:
            self._made, self._key = self.make(tokens), key
        return self._made


_CURRENT: ContextVar[_Told | None] = ContextVar("delible_layout", default=None)
#: Whose interventions act: those of the model that is being asked in this thread, if any.
_ASKED: ContextVar[object | None] = ContextVar("delible_asked", default=None)
_TURNS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_MAKING = RLock()


def turn(core: nn.Module) -> Any:
    """A lock, one per model: its attention and its hooks are set for one call at a time.

    Several models that are asked as one take the first one's.
    """
    with _MAKING:
        return _TURNS.setdefault(cores_of(core)[0], RLock())


@contextmanager
def told(lm: Body, make: Make, step: Callable[[], int] = lambda: 0) -> Iterator[None]:
    """Within it the backbone of a model is called: nobody else calls it, and its layout is known.

    Args:
        lm: The model.
        make: Makes the layout; called at most once for each value of ``step``.
        step: Counts the calls of the backbone, where there are several.
    """
    with turn(lm.core), lm.intervening(), asked(lm.interveners), lm.seeing():
        lm.about_to_call(make)
        before = _CURRENT.set(_Told(make, step))
        try:
            yield
        finally:
            _CURRENT.reset(before)


@contextmanager
def asked(whose: object | None) -> Iterator[None]:
    """Within it the interventions of this owner act, in this thread; of None: nobody's."""
    before = _ASKED.set(whose)
    try:
        yield
    finally:
        _ASKED.reset(before)


def is_asked(whose: object) -> bool:
    """Whether the interventions of this owner act now."""
    return _ASKED.get() is whose


def current_layout(tokens: int) -> Layout | None:
    """The layout of the call under way; None outside of :func:`told`."""
    now = _CURRENT.get()
    return None if now is None else now(tokens)


# ---- the forms that calls have


def padded_rows(
    ids: Int[Tensor, "batch sequence"],
    lengths: Int[Tensor, " batch"],
    starts: Int[Tensor, " batch"],
    first: int = 0,
) -> Make:
    """Prompts with answers, padded on the right; the columns from ``first`` on.

    Args:
        ids: Token ids.
        lengths: Real tokens per row.
        starts: Where each row's answer begins.
        first: Columns before it went through the backbone already.
    """

    def make(tokens: int) -> Layout:
        rows = zip(ids.tolist(), starts.tolist(), strict=True)
        place = torch.arange(first, ids.shape[1], device=ids.device)[None].expand(len(ids), -1)
        real = place < lengths[:, None]
        predicts = (place >= starts[:, None] - 1) & (place < lengths[:, None] - 1)
        return Layout([row[:start] for row, start in rows], _texts(real), place, predicts)

    return make


def beginning(prompt: Callable[[], Sequence[int]], device: torch.device | str) -> Make:
    """The beginning that all texts share; it ends before any prompt does.

    Args:
        prompt: One of the prompts, whole.
        device: Where the row is.
    """

    def make(tokens: int) -> Layout:
        place = torch.arange(tokens, device=device)[None]
        nothing = torch.zeros_like(place, dtype=torch.bool)
        return Layout([prompt()], torch.zeros_like(place), place, nothing)

    return make


def packed(
    prompts: Sequence[Sequence[int]],
    depths: Sequence[Sequence[int]],
    before: int,
    device: torch.device | str,
) -> Make:
    """Texts (or trees of answers to one prompt) one after the other in one row.

    Args:
        prompts: The prompt of each, whole.
        depths: How deep each node stands, from 0, without what stands before.
        before: Tokens that stand before each of them.
        device: Where the row is.
    """

    def make(tokens: int) -> Layout:
        text = [owner for owner, one in enumerate(depths) for _ in one]
        place = torch.tensor([[depth + before for one in depths for depth in one]], device=device)
        lengths = torch.tensor([len(prompts[owner]) for owner in text], device=device)
        texts = torch.tensor([text], device=device)
        return Layout(prompts, texts, place, place >= lengths - 1)

    return make


def beside_padding(
    prompts: Sequence[Sequence[int]], mask: Int[Tensor, "batch sequence"], new: int
) -> Make:
    """Prompts as a padded batch; the last ``new`` columns.

    Args:
        prompts: Token ids.
        mask: Where each prompt's tokens are, 1 or 0.
        new: Columns that go through the backbone now.
    """

    def make(tokens: int) -> Layout:
        place = (mask.cumsum(1) - 1)[:, -new:]
        real = mask[:, -new:] > 0
        lengths = torch.tensor([len(one) for one in prompts], device=mask.device)
        return Layout(prompts, _texts(real), place, real & (place == lengths[:, None] - 1))

    return make


def one_more(
    prompts: Callable[[], Sequence[Sequence[int]]],
    said: Callable[[], Sequence[int]],
    device: torch.device | str,
    doubts: Callable[[], Sequence[float | None]] = lambda: (),
) -> Make:
    """The newest tokens of rows that are being continued; of one row also its whole prompt.

    Args:
        prompts: The rows' prompts.
        said: How many tokens each row has said.
        device: Where the rows are.
        doubts: See :class:`Layout`.
    """

    def make(tokens: int) -> Layout:
        texts = prompts()
        new = tokens // len(texts)
        lengths = torch.tensor([len(one) for one in texts], device=device)
        ends = lengths + torch.tensor(list(said()), device=device)
        place = ends[:, None] - new + torch.arange(new, device=device)[None]
        owner = torch.arange(len(texts), device=device)[:, None].expand_as(place)
        return Layout(texts, owner, place, place >= lengths[:, None] - 1, doubts())

    return make


def _texts(real: Bool[Tensor, "batch sequence"]) -> Int[Tensor, "batch sequence"]:
    owner = torch.arange(len(real), device=real.device)[:, None].expand_as(real)
    return torch.where(real, owner, -1)
