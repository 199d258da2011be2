"""The tensors of one pass, on a model that has shapes and no numbers.

The model's own forward pass, the head, a loss and the backward pass run on fake tensors (PyTorch's
``FakeTensorMode``), with adapters, frozen parts, mixed precision, the shared beginning of rows, and
blocks that are computed again. Every tensor that is made is counted for as long as it lives, so
what autograd keeps is in it, and so are gradients of activations, copies of weights in bf16 and
what a cache holds. Nothing is allocated, so it works for any model from its settings alone.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from delible.lm.body import shared_prefix, widest
from delible.lm.forward import Batch, Forward, Inside, map_logits, target_logprobs
from delible.lm.lm import LM
from delible.lm.offload import goes, storage
from delible.lm.template import Encoded
from delible.precision import computing_in


@dataclass(frozen=True)
class Shape:
    """One pass: rows, padded to ``length`` tokens, that share ``prefix`` tokens.

    Attributes:
        answers: Answer tokens of all rows.
    """

    rows: int
    length: int
    prefix: int
    answers: int

    @classmethod
    def of(cls, rows: Sequence[Encoded]) -> Shape:
        """That of rows that go through the model together."""
        return cls(
            len(rows),
            max(len(row.ids) for row in rows),
            shared_prefix([row.ids[: row.start] for row in rows]),
            sum(row.answer_tokens for row in rows),
        )

    def times(self, rows: int) -> Shape:
        """As many rows of the same length, with as many answer tokens each."""
        return replace(self, rows=rows, answers=-(-self.answers * rows // self.rows))


@dataclass(frozen=True)
class Passing:
    """What one pass holds, in bytes.

    Attributes:
        kept: What autograd keeps of the forward pass.
        forward, backward: The most at one time in either half, gradients of weights not counted.
        with_gradients: The most at one time, those counted that are there already, from none on.
        products: Different matrix products in bf16.
        counted: False: a bound by sizes.
    """

    kept: int
    forward: int
    backward: int
    with_gradients: int
    products: int = 0
    counted: bool = True

    @property
    def peak(self) -> int:
        """The most at one time, gradients of weights not counted."""
        return max(self.forward, self.backward)


@dataclass(frozen=True)
class _Shapes(Batch):
    """A batch of which only the shape is known."""

    answers: int = 0

    def predicting(self, states: Tensor, offset: int | None = None) -> Tensor:
        flat = states.reshape(-1, states.shape[-1])
        return flat[torch.zeros(self.answers, dtype=torch.long)]


@contextmanager
def without_numbers(model: nn.Module) -> Iterator[set[int]]:
    """Within it all parameters and buffers are fake, on the CPU; yields the fakes' storages."""
    before: list[tuple[dict[str, Any], str, Any]] = []
    fakes: dict[int, Tensor] = {}

    def fake(value: Tensor) -> Any:
        if id(value) not in fakes:
            plain = torch.empty(value.shape, dtype=value.dtype)
            fakes[id(value)] = (
                nn.Parameter(plain, requires_grad=value.requires_grad)
                if isinstance(value, nn.Parameter)
                else plain
            )
        return fakes[id(value)]

    told = logging.getLogger("torch._subclasses.fake_tensor")  # of what is then tried otherwise
    before_level = told.level
    told.setLevel(logging.CRITICAL)
    with FakeTensorMode(allow_non_fake_inputs=True):
        try:
            for module in model.modules():
                for held in (module._parameters, module._buffers):
                    for name, value in list(held.items()):
                        if value is not None:
                            before.append((held, name, value))
                            held[name] = fake(value)
            yield {storage(one) for one in fakes.values()}
        finally:
            told.setLevel(before_level)
            for held, name, value in before:
                held[name] = value


class _Living(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside for as long as they live."""

    def __init__(self, own: set[int]) -> None:
        super().__init__()
        self.own, self.sizes = own, dict[int, tuple[int, Any]]()
        self.now = self.gradients = self.peak = self.with_gradients = 0
        self.products: set[Any] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, given: Any = (), named: Any = None
    ) -> Any:
        inputs = [one for one in tree_leaves((given, named)) if isinstance(one, Tensor)]
        found = function(*given, **(named or {}))
        before = {storage(one) for one in inputs}
        if function in _PRODUCTS and inputs[-1].dtype == torch.bfloat16:
            self.products.add(tuple((one.shape, one.stride()) for one in inputs))
        for one in tree_leaves(found):
            if isinstance(one, Tensor) and not self._known(storage(one), before):
                self._made(one.untyped_storage())
        return found

    def _known(self, key: int, before: set[int]) -> bool:
        return key in before or key in self.own or key in self.sizes

    def _made(self, made: Any) -> None:
        key = made._cdata
        self.sizes[key] = (made.nbytes(), weakref.ref(made, lambda _: self._gone(key)))
        self.now += made.nbytes()
        self.peak = max(self.peak, self.now)
        self.with_gradients = max(self.with_gradients, self.now + self.gradients)

    def _gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key)[0]

    def count_apart(self, parameter: Tensor) -> None:
        """A gradient of a weight is complete: from here on it is counted apart."""
        assert parameter.grad is not None
        self.gradients += parameter.grad.untyped_storage().nbytes()
        parameter.grad = None


#: Operations for which a processor compiles a kernel in bf16.
_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)


def passing(
    lm: LM,
    shape: Shape,
    inside: tuple[Inside, ...] = (),
    final: bool = True,
    distributions: int = 0,
) -> Passing:
    """What a pass holds over the rows of a shape, up to the gradients of the weights that move.

    Of blocks that are alike two and three are computed, and counted as often as they are.
    Models that look at numbers to decide what to compute (which expert gets which token) get an
    upper bound by sizes.

    Args:
        lm: The model, with the flags that say what moves; it may have no numbers itself.
        shape: Of the rows.
        inside, final: What a loss reads, as :class:`Forward` takes it.
        distributions: Of other models with which the model's own is compared at each token.
    """
    arguments = (shape, inside, final, distributions)
    try:
        layers = lm.anatomy.layers
        if inside or layers <= 3 or not _alike(lm):
            return _lived(lm, *arguments)
        found = []
        for count in (2, 3):
            with _first_blocks(lm, count):
                found.append(_lived(lm, *arguments))
    except Exception:  # whatever a model's code raises on tensors without numbers
        return rough(lm, shape)
    two, three = found

    def extended(name: str) -> int:
        second, third = getattr(two, name), getattr(three, name)
        return int(second + (layers - 2) * (third - second))

    first = 2 * two.peak - three.peak  # a model of one block, which is what is left at the end

    kept, forward, backward = (extended(name) for name in ("kept", "forward", "backward"))
    peak = max(forward, backward)
    # the most is there when the backward pass begins, or when it ends, in the first block
    with_gradients = max(peak + _head_gradient(lm), gradient_bytes(lm) + first)
    return Passing(kept, forward, backward, with_gradients, three.products)


def gradient_bytes(lm: LM) -> int:
    """Bytes of the gradients of all weights that move."""
    return 4 * sum(value.numel() for value in lm.model.parameters() if value.requires_grad)


def _head_gradient(lm: LM) -> int:
    """Bytes of the gradient that is complete first; one of a tied table is complete at the end."""
    head, table = lm.core.get_output_embeddings().weight, lm.core.get_input_embeddings().weight
    return 4 * head.numel() if head.requires_grad and head is not table else 0


def _lived(
    lm: LM, shape: Shape, inside: tuple[Inside, ...], final: bool, distributions: int
) -> Passing:
    """A pass of the model as it is."""
    with without_numbers(lm.model) as own:
        batch = _Shapes(
            torch.zeros(shape.rows, shape.length, dtype=torch.long),
            torch.zeros(shape.rows, dtype=torch.long),
            torch.zeros(shape.rows, dtype=torch.long),
            shape.prefix,
            shape.answers,
        )
        alive, saved = _Living(own), dict[int, Any]()

        def keep(value: Tensor) -> Any:
            if lm.offloads and goes(value, own):
                return value.shape, value.dtype
            if storage(value) not in own:  # the storage is kept, or its number would be reused
                saved[storage(value)] = value.untyped_storage()
            return value

        def bring(kept: Any) -> Tensor:
            return kept if isinstance(kept, Tensor) else torch.empty(kept[0], dtype=kept[1])

        for value in lm.model.parameters():
            if value.requires_grad:
                value.register_post_accumulate_grad_hook(alive.count_apart)
        with torch.enable_grad(), alive:
            with (
                torch.autograd.graph.saved_tensors_hooks(keep, bring),
                computing_in(lm.precision, "cpu"),
            ):
                states, seen = Forward(_on_cpu(lm))(batch, inside, final)
                results = list(seen.values())
                if states is not None:
                    results.append(_answers(lm, shape, states, distributions))
            kept = sum(one.nbytes() for one in saved.values())
            saved.clear()
            del states, seen
            forward, alive.peak = alive.peak, alive.now
            if any(one.requires_grad for one in results):
                loss = sum((one.float().square().mean() for one in results), torch.zeros(()))
                del results
                loss.backward()  # type: ignore[no-untyped-call]
    return Passing(kept, forward, alive.peak, alive.with_gradients, len(alive.products))


def _answers(lm: LM, shape: Shape, states: Tensor, distributions: int) -> Tensor:
    """Values of the answers' tokens, perhaps beside the distributions of other models."""
    targets = torch.zeros(shape.answers, dtype=torch.long)
    head, words = lm.head, lm.vocabulary
    if not distributions:
        return map_logits(head, states, targets, target_logprobs, words)
    frozen = torch.empty(words, states.shape[1], dtype=states.dtype)
    width = states.shape[1]
    beside = [torch.empty(shape.answers, width, dtype=states.dtype) for _ in range(distributions)]

    def heads(joined: Tensor) -> Tensor:
        own, *others = joined.split(width, dim=1)
        return torch.cat([head(own), *(one @ frozen.T for one in others)], dim=1)

    def apart(logits: Tensor, targets: Tensor) -> Tensor:
        own, *others = (one.log_softmax(1) for one in logits.chunk(1 + distributions, dim=1))
        return torch.stack([(other.exp() * (other - own)).sum(1) for other in others]).sum(0)

    joined = torch.cat([states, *beside], dim=1)
    return map_logits(heads, joined, targets, apart, (1 + distributions) * words)


def _alike(lm: LM) -> bool:
    """Whether all blocks have the same parts, of which the same move."""
    blocks: Any = lm.core.get_submodule(lm.anatomy.blocks)
    kinds = {
        tuple((name, one.shape, one.requires_grad) for name, one in block.named_parameters())
        for block in blocks
    }
    return len(kinds) == 1


@contextmanager
def _first_blocks(lm: LM, count: int) -> Iterator[None]:
    """Within it the model ends after so many blocks (and its last norm)."""
    parent, _, name = lm.anatomy.blocks.rpartition(".")
    owner = lm.core.get_submodule(parent)
    whole: Any = getattr(owner, name)
    setattr(owner, name, nn.ModuleList(list(whole)[:count]))
    try:
        yield
    finally:
        setattr(owner, name, whole)


def _on_cpu(lm: LM) -> LM:
    """The same model, bare of what looks at single tokens."""
    twin = copy.copy(lm)
    twin.interveners = None
    return twin


def rough_activation_bytes(lm: LM, shape: Shape) -> int:
    """An upper bound by sizes alone: some twenty numbers of hidden width a block, all in fp32."""
    widths = 24 * lm.anatomy.hidden_size + 6 * lm.inner_width
    tokens = shape.rows * shape.length
    scores = (
        shape.rows
        * shape.length**2
        * (widest(lm.core.config.get_text_config(), "num_attention_heads") or 1)
    )
    per_block = 4 * (tokens * widths + 2 * scores)
    return lm.anatomy.layers * per_block + 12 * shape.answers * lm.vocabulary


def rough(lm: LM, shape: Shape) -> Passing:
    """The same as an upper bound."""
    kept = rough_activation_bytes(lm, shape)
    return Passing(kept, kept, kept, kept + gradient_bytes(lm), counted=False)
