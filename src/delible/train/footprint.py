"""Bytes of a training run by part, counted on tensors that have shapes and no numbers.

Weights, gradients, moments and reference values are sums over tensors. Activations are what
autograd keeps: the model's own forward pass runs on fake tensors (PyTorch's ``FakeTensorMode``),
adapters, frozen parts, mixed precision and the shared beginning of rows included, and what is
saved for the backward pass is added up. Nothing is allocated, so it works for any model from its
settings alone.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from delible.lm.body import shared_prefix, widest
from delible.lm.forward import Batch, Forward, Inside, map_logits, target_logprobs
from delible.lm.held import held_bytes, is_packed
from delible.lm.lm import LM
from delible.lm.template import Encoded
from delible.precision import computing_in
from delible.train.recipe import Recipe
from delible.train.row import Row


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
class Memory:
    """Bytes by part.

    Attributes:
        weights: The model with its adapter, and copies of it that a finisher needs.
        gradients: Of all that moves.
        optimiser: Moments.
        activations: What one pass keeps for its backward pass, weights in bf16 included where
            they are converted.
        reference: Values of the reference model, with a frozen head where one is needed.
        masks: One byte per weight that is masked.
        cache: Keys and values while answers are generated, before and after training.
        early: Gradients that are there while all activations still are.
        late: What is on top of all gradients at the end of a pass.
    """

    weights: int
    gradients: int
    optimiser: int
    activations: int
    reference: int
    masks: int
    cache: int
    early: int
    late: int

    @property
    def peak(self) -> int:
        """The most at one time: in the middle of a pass, at its end, or while answering."""
        kept = self.optimiser + self.reference + self.masks
        passing = max(self.activations + self.early, self.gradients + self.late)
        return self.weights + max(kept + passing, self.cache)

    def parts(self) -> dict[str, int]:
        """The parts that people are shown, by name."""
        shown = [one.name for one in fields(self) if one.name not in ("early", "late")]
        return {name: getattr(self, name) for name in shown}


# ---- activations


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
            yield {_storage(one) for one in fakes.values()}
        finally:
            told.setLevel(before_level)
            for held, name, value in before:
                held[name] = value


def _storage(value: Tensor) -> int:
    return int(value.untyped_storage()._cdata)


def activation_bytes(
    lm: LM, shape: Shape, inside: tuple[Inside, ...] = (), final: bool = True
) -> int:
    """Bytes that autograd keeps of one forward pass up to the answers' log-probabilities.

    Blocks that are alike are counted once: from the difference of two blocks and one.

    Args:
        lm: The model, with the flags that say what moves; it may have no numbers itself.
        shape: Of the rows.
        inside, final: What a loss reads, as :class:`Forward` takes it.
    """
    if not inside and lm.anatomy.layers > 3 and _alike(lm):
        with _first_blocks(lm, 1):
            one = _counted(lm, shape, inside, final)
        with _first_blocks(lm, 2):
            two = _counted(lm, shape, inside, final)
        return one + (lm.anatomy.layers - 1) * (two - one)
    return _counted(lm, shape, inside, final)


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


def _counted(lm: LM, shape: Shape, inside: tuple[Inside, ...], final: bool) -> int:
    saved: dict[int, tuple[int, Any]] = {}
    with without_numbers(lm.model) as own:
        batch = _Shapes(
            torch.zeros(shape.rows, shape.length, dtype=torch.long),
            torch.zeros(shape.rows, dtype=torch.long),
            torch.zeros(shape.rows, dtype=torch.long),
            shape.prefix,
            shape.answers,
        )

        def keep(value: Tensor) -> Tensor:
            storage = value.untyped_storage()
            if storage._cdata not in own:  # the storage is kept, or its number would be reused
                saved[storage._cdata] = (storage.nbytes(), storage)
            return value

        with (
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value),
            computing_in(lm.precision, "cpu"),
        ):
            states, seen = Forward(_on_cpu(lm))(batch, inside, final)
            results = list(seen.values())
            if states is not None:
                targets = torch.zeros(shape.answers, dtype=torch.long)
                head = lm.head
                results.append(map_logits(head, states, targets, target_logprobs, lm.vocabulary))
        del results
    return sum(size for size, _ in saved.values())


def _on_cpu(lm: LM) -> LM:
    """The same model, bare of what looks at single tokens."""
    twin = copy.copy(lm)
    twin.interveners = None
    return twin


def rough_activation_bytes(lm: LM, shape: Shape) -> int:
    """An upper bound by sizes alone: some twenty numbers of hidden width a block, all in fp32."""
    widths = 24 * lm.anatomy.hidden_size + 6 * lm.inner_width
    tokens = shape.rows * shape.length
    scores = shape.rows * shape.length**2 * (widest(_settings(lm), "num_attention_heads") or 1)
    per_block = 4 * (tokens * widths + 2 * scores)
    return lm.anatomy.layers * per_block + 12 * shape.answers * lm.vocabulary


def activations(
    lm: LM, shape: Shape, inside: tuple[Inside, ...] = (), final: bool = True
) -> tuple[int, bool]:
    """Bytes of a pass, and whether they were counted (or are a bound by sizes).

    Some models look at numbers to decide what to compute (which expert gets which token).
    """
    try:
        return activation_bytes(lm, shape, inside, final), True
    except Exception:  # whatever a model's code raises on tensors without numbers
        return rough_activation_bytes(lm, shape), False


# ---- the rest


def reference_bytes(lm: LM, rows: Mapping[str, Sequence[Row]], kinds: Mapping[str, Any]) -> int:
    """Bytes of the reference values of rows, by role, and of the frozen head.

    Args:
        kinds: Kinds of values by role, as a loss names them (:class:`Reference`).
    """
    sizes: dict[str, int] = {}
    head = False
    for role, wanted in kinds.items():
        for kind in set(wanted):
            plain, _, context = kind.partition("@")
            head |= plain == "answers"
            for row in rows.get(role, ()):
                read = row.behind(context)
                if read is not None:
                    sizes[f"{kind}/{row.key}"] = _value_bytes(lm, plain, read)
    frozen = lm.core.get_output_embeddings()
    own = sum(one.numel() * one.element_size() for one in frozen.parameters()) if head else 0
    return sum(sizes.values()) + own


def _value_bytes(lm: LM, kind: str, row: Encoded) -> int:
    tokens, width = len(row.ids), lm.anatomy.hidden_size
    if kind == "logprobs":
        return 4 * row.answer_tokens
    if kind == "answers":
        return 4 * row.answer_tokens * width
    if kind.startswith("attention."):
        heads = widest(_settings(lm), "num_attention_heads") or 1
        return 2 * heads * (tokens * (tokens + 1) // 2)
    return 4 * tokens * width


def cache_bytes(lm: LM, rows: int, tokens: int) -> int:
    """Bytes of keys and values of so many rows of so many tokens."""
    settings = _settings(lm)
    heads = widest(settings, "num_attention_heads") or 1
    key_heads = widest(settings, "num_key_value_heads") or heads
    width = widest(settings, "head_dim") or lm.anatomy.hidden_size // heads
    each = 2 if lm.precision == "bfloat16" else 4
    return 2 * each * lm.anatomy.layers * key_heads * width * rows * tokens


def optimiser_bytes(recipe: Recipe, moving: Iterable[Tensor]) -> int:
    """Bytes of the moments: two fp32 numbers for each that moves, and a count for each tensor."""
    if recipe.training.optimizer == "sgd":
        return 0
    return sum(8 * one.numel() + 4 for one in moving)


def weights_bytes(lm: LM, recipe: Recipe) -> int:
    """Bytes of the model as it is held, and of a second one where a finisher needs it."""
    held = recipe.training.base_precision
    packed = any(is_packed(one) for one in lm.model.parameters())
    own = held_bytes(lm.model, lm.core, lm.anatomy, "float32" if packed else held)
    if recipe.finish.needs_start:
        return 2 * own
    if recipe.finish.card.changes == "weights" and held != "float32":
        return 4 * sum(one.numel() for one in lm.core.parameters())  # merged in fp32
    return own


def early_bytes(lm: LM, moving: Mapping[int, Tensor], shape: Shape) -> int:
    """Bytes at the start of the backward pass: gradients of logits and of the head."""
    head = lm.core.get_output_embeddings().weight
    own = 4 * head.numel() if id(head) in moving else 0
    return own + 2 * 4 * lm.vocabulary * min(shape.answers, 64 * 1024 * 1024 // lm.vocabulary)


def late_bytes(lm: LM, moving: Mapping[int, Tensor]) -> int:
    """Bytes at its end: a tied table's second gradient, before both are added."""
    head, table = lm.core.get_output_embeddings().weight, lm.core.get_input_embeddings().weight
    return 4 * table.numel() if head is table and id(table) in moving else 0


def _settings(lm: LM) -> Any:
    return lm.core.config.get_text_config()
