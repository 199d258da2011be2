"""The lower half of a language model: its parts, and what each computation over it needs.

What reads, scores, decodes or looks inside works on a :class:`Body`; the :class:`~delible.lm.lm.LM`
on top of it answers with them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from delible.lm.anatomy import Anatomy
from delible.lm.ends import context_tokens
from delible.lm.offload import offloaded
from delible.lm.pictures import Pictures
from delible.lm.template import Template
from delible.precision import Resolved, computing_in

#: How prompts are read and rows go on: packed without padding; in batches that share a beginning;
#: in batches whose rows stay to the end; each row alone, by the library's own ``generate``.
Road = Literal["trees", "prefix", "padded", "plain"]
#: From the fastest to the one that every model can take.
ROADS: tuple[Road, ...] = get_args(Road)
#: A shared prefix shorter than this is not worth a second call of the model.
SHORTEST_SHARED_PREFIX = 8
#: On a processor the fp32 product of at most so many tokens with a head is faster in pieces of so
#: many vocabulary entries: 350 instead of 490 microseconds a token (160 tokens, 49,152 x 576).
FEW_TOKENS, PIECE = 256, 1024


@dataclass(frozen=True)
class Budget:
    """What fits.

    Attributes:
        tokens: Padded tokens per forward pass.
        cached_tokens: Tokens whose keys and values may be alive while generating.
        rows: Rows that generate together.
    """

    tokens: int
    cached_tokens: int
    rows: int


@dataclass(frozen=True)
class AfterHead:
    """A function of single logits, strictly increasing.

    Attributes:
        scale: Factor of every logit, above 0.
        cap: Soft limit of the scaled logits' size, or None.
    """

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """The model's logits, in the shape and data type of the head's."""
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


class Body:
    """A model's parts.

    Attributes:
        model: The Hugging Face model, perhaps with a PEFT adapter.
        anatomy: Where its parts are.
        precision: Of the computation, see :mod:`delible.precision`.
        shares_prefix: A beginning can be computed once for several rows.
        grows_trees: Answers to one question can be computed as a tree.
        road: How answers can be generated.
    """

    model: Any
    tokenizer: Any
    template: Template
    anatomy: Anatomy
    precision: Resolved
    shares_prefix: bool
    grows_trees: bool
    after_head: AfterHead
    road: Road

    @property
    def budget(self) -> Budget:
        """How many tokens go through the model at once."""
        raise NotImplementedError

    @property
    def core(self) -> Any:
        """The Hugging Face model below any adapter."""
        inner = getattr(self.model, "get_base_model", None)
        return inner() if callable(inner) else self.model

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def device_type(self) -> str:
        """Where it computes; a model without numbers: where it would."""
        kind = self.device.type
        return kind if kind != "meta" else "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else self.template.end_of_turn[0])

    @property
    def vocabulary(self) -> int:
        """Rows of the head (may exceed the tokenizer's vocabulary)."""
        return int(self.core.get_output_embeddings().weight.shape[0])

    @property
    def inner_width(self) -> int:
        """Width inside the MLP of the widest block."""
        width = widest(self.core.config.get_text_config(), "intermediate_size")
        return width or 4 * self.anatomy.hidden_size

    @property
    def leading(self) -> Body:
        """The model whose hidden states are read: itself, or the first of several as one."""
        return self

    def settle(self) -> None:
        """Due before weights are changed or looked at: what was gathered for computing is no copy
        of them any more then. Of a model that every process has whole nothing is gathered.
        """
        if self.sharded is not None:
            self.sharded.settle()

    def head(self, states: Tensor) -> Tensor:
        """Logits of final hidden states: the head and whatever the model does after it."""
        return self.after_head(head_logits(self.core.get_output_embeddings(), states))

    def computing(self) -> Any:
        """Context in which the model computes (see ``precision``)."""
        computing = computing_in(self.precision, self.device.type)
        return _both(computing, offloaded(self.model)) if self.offloads else computing

    @property
    def context(self) -> int:
        """Tokens of a prompt and its answer together; where the model sets no bound, very many."""
        return context_tokens(self.core.config) or sys.maxsize

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that end an answer."""
        return self.template.ends

    #: All that answers lies in its weights, so that it can be saved as a model.
    in_weights: ClassVar[bool] = True
    #: Whose interventions act when this model is asked; a bare model has none.
    interveners: object | None = None
    #: Ids of the requests whose adapters a router chooses among; None: there is no router.
    routes: tuple[str, ...] | None = None

    def spoken(self, rows: Sequence[Any], logits: Tensor) -> None:
        """The logits from which the next token of rows that go on is chosen."""

    def about_to_call(self, make: Callable[[int], Any]) -> None:
        """A call of the backbone will follow, with this layout: the time to ask it other things."""

    #: Whether blocks keep their inputs alone and are computed again for a gradient.
    recomputes: bool = False
    #: Whether what is kept for a gradient waits in the memory of the processor.
    offloads: bool = False

    #: How its weights are spread over processes (:class:`delible.lm.sharded.Sharded`), if they are.
    sharded: Any = None
    #: Adapters of earlier requests that do not act while another one is trained.
    earlier_adapters: Sequence[Any] = ()

    def routing(self, names: Sequence[str | None] | str | None) -> AbstractContextManager[None]:
        """Within it a router is told whose adapter answers: for all rows, or for each of them."""
        return nullcontext()

    def intervening(self) -> AbstractContextManager[None]:
        """Context of a call of the backbone, in which interventions are in their places."""
        return nullcontext()

    #: What it can be shown; None: it reads texts alone.
    pictures: Pictures | None = None

    def seeing(self) -> AbstractContextManager[None]:
        """Context of a call of the backbone, in which tokens of pictures are taken."""
        return nullcontext()

    def alike(self, shared: int, prompts: Callable[[], Sequence[Sequence[int]]]) -> int:
        """How much of a beginning that prompts share may be computed once for all of them.

        Args:
            shared: Tokens that are the same.
            prompts: Gives the prompts' token ids.
        """
        return shared

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within it the model is in evaluation mode."""
        was_training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(was_training)

    def padded(
        self, rows: Sequence[Sequence[int]], sharing: bool = True
    ) -> tuple[Tensor, Tensor, int]:
        """Ids and mask [batch, sequence], padded between the shared prefix and the rest."""
        shared = shared_prefix(rows) if sharing and self.shares_prefix else 0
        shared = self.alike(shared, lambda: rows)
        longest = max(len(row) for row in rows)
        padded = torch.full((len(rows), longest), self.pad_id)
        mask = torch.zeros_like(padded)
        for place, row in enumerate(rows):
            padded[place, :shared] = torch.tensor(row[:shared])
            padded[place, shared + longest - len(row) :] = torch.tensor(row[shared:])
            mask[place, :shared] = 1
            mask[place, shared + longest - len(row) :] = 1
        return padded.to(self.device), mask.to(self.device), shared

    def batches(
        self,
        order: Sequence[int],
        lengths: Sequence[int],
        tokens: int | None = None,
        rows: int | None = None,
    ) -> Iterator[list[int]]:
        """Cuts an order into batches of at most so many padded tokens, and rows."""
        budget = self.budget.tokens if tokens is None else tokens
        batch: list[int] = []
        longest = 0
        for index in order:
            longest = max(longest, lengths[index])
            full = longest * (len(batch) + 1) > budget or len(batch) == rows
            if batch and full:
                yield batch
                batch, longest = [], lengths[index]
            batch.append(index)
        if batch:
            yield batch

    def filled(self, sizes: Sequence[int]) -> Iterator[list[int]]:
        """Places of texts that stand in one row: as many as fit the budget of tokens."""
        places, total = list[int](), 0
        for place, size in enumerate(sizes):
            if places and total + size > self.budget.tokens:
                yield places
                places, total = [], 0
            places.append(place)
            total += size
        if places:
            yield places


@contextmanager
def _both(outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]) -> Iterator[None]:
    with outer, inner:
        yield


def shared_prefix(rows: Sequence[Sequence[int]]) -> int:
    """Tokens that all rows start with, less than any row has; 0 if it is not worth sharing."""
    if len(rows) < 2:
        return 0
    limit, prefix = min(len(row) for row in rows) - 1, 0
    while prefix < limit and all(row[prefix] == rows[0][prefix] for row in rows[1:]):
        prefix += 1
    return prefix if prefix >= SHORTEST_SHARED_PREFIX else 0


def head_logits(head: nn.Module, states: Float[Tensor, "tokens hidden"]) -> Tensor:
    """The head's logits [tokens, vocab]; those of few tokens piece by piece of the vocabulary."""
    if not (
        type(head) is nn.Linear
        and head.bias is None
        and not (head._forward_hooks or head._forward_pre_hooks)
        and torch.is_inference_mode_enabled()
        and not torch.is_autocast_enabled("cpu")
        and states.device.type == "cpu"
        and states.dtype == head.weight.dtype == torch.float32
        and states.ndim == 2
        and len(states) <= FEW_TOKENS
    ):
        return head(states)  # type: ignore[no-any-return]
    logits = states.new_empty(len(states), head.out_features)
    for rows, piece in zip(head.weight.split(PIECE), logits.split(PIECE, dim=1), strict=True):
        torch.mm(states, rows.T, out=piece)
    return logits


def widest(config: Any, name: str) -> int | None:
    """A number of a model's settings; the largest, where each block has its own."""
    return max(numbers(config, name), default=None)


def numbers(config: Any, name: str) -> list[int]:
    """A number of a model's settings, or those that its blocks have of their own; zeros not."""
    value: Any
    if name in (getattr(config, "per_layer_attributes", None) or ()):  # it has no value as a whole
        value = [getattr(block, name, None) for block in config.per_layer_config]
    else:
        value = getattr(config, name, None)
    return [int(one) for one in (value if isinstance(value, Sequence) else [value]) if one]
