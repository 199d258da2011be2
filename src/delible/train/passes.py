"""Gradient passes over one optimiser step, split into micro-batches that fit the memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import get_args

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from delible.errors import ModelError
from delible.lm.lm import LM
from delible.train.losses import Keep, Memory, Objective
from delible.train.randomness import generator
from delible.train.reference import Reference
from delible.train.row import Row, Unit
from delible.train.step import (
    Group,
    Reads,
    Step,
    make_step,
)

#: What surrounds the pass over one micro-batch, given its step before anything is computed.
Around = Callable[[Step], AbstractContextManager[object]]


@dataclass(frozen=True)
class MicroBatch:
    """Rows that go through the model together; aligned roles stay aligned."""

    forget: Mapping[str, Sequence[Row]]
    retain: Sequence[Row]
    forget_weights: Sequence[float]
    retain_weights: Sequence[float]


@dataclass
class Totals:
    """Sums over one optimiser step (losses already averaged as declared).

    Attributes:
        retain_nats: -log p of the retain answers, where the retain loss reads answers.
        retain_tokens: Their tokens.
    """

    forget: float = 0.0
    keep: float = 0.0
    retain_nats: float = 0.0
    retain_tokens: int = 0
    tokens: int = 0
    padding: list[float] = field(default_factory=list)


@dataclass
class Passes:
    """What balancers and hardeners work with: gradients of the two losses of one step.

    Each pass **adds** to ``.grad``. Losses are averaged over the whole step, across micro-batches
    and processes, as the loss declares.

    Attributes:
        parameters: The trainable parameters.
        weights: Weights of the forget and the retain loss at this step.
        forget_units, retain_units: The numbers the summed losses are divided by.
        world: Number of processes; gradients are averaged over them, so losses are scaled by it.
        memory: Tensors that a balancer or hardener keeps between steps. A step may be tried again
            when memory runs out, so write to it only once all passes of the step are done.
        seed, step: Of the run, and the step's number from 0; see :meth:`generator`.
        units: Units of the whole step by role, over all micro-batches and processes; None: those
            of the micro-batches.
    """

    lm: LM
    forward: torch.nn.Module
    objective: Objective | None
    keep_loss: Keep | None
    reads: Mapping[str, Sequence[Reads]]
    reference: Reference
    micro_batches: Sequence[MicroBatch]
    parameters: Sequence[torch.nn.Parameter]
    weights: tuple[float, float]
    forget_units: float
    retain_units: float
    world: int = 1
    accumulating: Callable[[bool], AbstractContextManager[object]] | None = None
    backward: Callable[[Tensor], None] = torch.Tensor.backward
    totals: Totals = field(default_factory=Totals)
    memory: Memory = field(default_factory=dict)
    seed: int = 0
    step: int = 0
    units: Mapping[str, Mapping[Unit, int]] | None = None

    def __post_init__(self) -> None:
        if self.units is None:
            of_steps = {
                role: [row for micro in self.micro_batches for row in micro.forget[role]]
                for role in {role for micro in self.micro_batches for role in micro.forget}
            }
            kept = [row for micro in self.micro_batches for row in micro.retain]
            self.units = units_of({**of_steps, "retain": kept})

    def generator(self, *purpose: object) -> torch.Generator:
        """A random generator of this step, the same whatever was drawn before."""
        return generator(self.seed, *purpose, self.step)

    def both(self) -> None:
        """Adds the gradient of the weighted sum of both losses."""
        self._run(forget=True, keep=True)

    def forget(self, around: Around | None = None) -> None:
        """Adds the gradient of the weighted forget loss.

        ``around`` is entered with each micro-batch's step before anything of it is computed, and
        left after the backward pass: what it changes in between, this gradient is taken under.
        """
        self._run(forget=True, keep=False, around=around)

    def keep(self) -> None:
        """Adds the gradient of the weighted retain loss."""
        self._run(forget=False, keep=True)

    def forget_curvature(self, direction: Sequence[Tensor | None], scale: float) -> None:
        """Adds ``scale`` times the Hessian of the weighted forget loss times ``direction``.

        By differentiating twice, so the graph of the gradient is in memory too: about twice that
        of a pass, with the plain attention kernel (the fused ones have no second derivative).

        Args:
            direction: One tensor per parameter; None stands for zeros.

        Raises:
            ModelError: A part of the model cannot be differentiated twice.
        """

        def product(loss: Tensor) -> Tensor:
            gradients = torch.autograd.grad(
                loss, list(self.parameters), create_graph=True, allow_unused=True
            )
            terms = [
                (gradient * along).sum()
                for gradient, along in zip(gradients, direction, strict=True)
                if gradient is not None and along is not None
            ]
            if self.world > 1:  # processes wait for a gradient of every parameter
                terms += [0.0 * parameter.sum() for parameter in self.parameters]
            return scale * torch.stack(terms).sum()

        reported = self.totals.forget
        try:
            with sdpa_kernel(SDPBackend.MATH):
                self._run(forget=True, keep=False, through=product)
        except RuntimeError as error:
            if "derivative for" not in str(error) and "differentiate twice" not in str(error):
                raise
            raise ModelError(
                "this model has no second derivative, which the hardener needs.",
                where=str(error).splitlines()[0],
                hint="Load it with attn_implementation='eager', or choose --harden sam.",
            ) from error
        self.totals.forget = reported

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Gradients start from nothing inside; at the end those of before are added."""
        before = [parameter.grad for parameter in self.parameters]
        self.clear()
        yield
        for parameter, earlier in zip(self.parameters, before, strict=True):
            if earlier is not None:
                parameter.grad = earlier if parameter.grad is None else parameter.grad.add_(earlier)

    @contextmanager
    def returning(self) -> Iterator[list[Tensor]]:
        """A copy of the weights, which are put back bit by bit at the end, whatever happens."""
        kept = [parameter.detach().clone() for parameter in self.parameters]
        try:
            yield kept
        finally:
            with torch.no_grad():
                for parameter, value in zip(self.parameters, kept, strict=True):
                    parameter.copy_(value)

    def clear(self) -> None:
        """Forgets all gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def _run(
        self,
        *,
        forget: bool,
        keep: bool,
        through: Callable[[Tensor], Tensor] = lambda loss: loss,
        around: Around | None = None,
    ) -> None:
        if not forget and self.keep_loss is None:
            return
        totals = Totals()
        last = len(self.micro_batches) - 1
        for index, micro in enumerate(self.micro_batches):
            rows: dict[str, Sequence[Row]] = {}
            if forget and self.objective is not None:
                rows.update(micro.forget)
            if keep and self.keep_loss is not None and micro.retain:
                rows["retain"] = micro.retain
            if not rows:
                continue
            step = make_step(
                self.lm,
                self.forward,
                rows,
                self.reads,
                self.reference,
                self.units,
                self.seed,
                self.step,
            )
            ready = self.accumulating(index < last) if self.accumulating else _nothing()
            with ready, around(step) if around else _nothing():
                loss = self._loss(step, micro, totals, forget=forget, keep=keep)
                totals.tokens += step.tokens
                totals.padding.append(step.padding_share)
                self.backward(through(loss))
        if forget:
            self.totals.forget = totals.forget
        if keep:
            self.totals.keep = totals.keep
            self.totals.retain_nats = totals.retain_nats
            self.totals.retain_tokens = totals.retain_tokens
        self.totals.tokens += totals.tokens
        self.totals.padding += totals.padding

    def _loss(
        self, step: Step, micro: MicroBatch, totals: Totals, *, forget: bool, keep: bool
    ) -> Tensor:
        parts: list[Tensor] = []
        if forget and self.objective is not None:
            value = _weighted(self.objective.loss(step), micro.forget_weights, self.forget_units)
            totals.forget += float(value.detach())
            parts.append(self.weights[0] * value)
        if keep and self.keep_loss is not None and "retain" in step.groups:
            value = _weighted(
                self.keep_loss.loss(step.retain), micro.retain_weights, self.retain_units
            )
            totals.keep += float(value.detach())
            parts.append(self.weights[1] * value)
            if "answers" in self.reads.get("retain", ()):
                nats, tokens = nats_of(step.retain, micro.retain_weights)
                totals.retain_nats += nats
                totals.retain_tokens += tokens
        return torch.stack(parts).sum() * self.world


@torch.no_grad()
def nats_of(group: Group, weights: Sequence[float]) -> tuple[float, int]:
    """-log p of a group's answers in nats and their tokens, summed; rows of weight 0 are none."""
    real = torch.tensor([weight != 0 for weight in weights], device=group.mask.device)
    return float(-group.logprob_sum[real].sum()), int(group.token_count[real].sum())


def units_of(rows: Mapping[str, Sequence[Row]]) -> dict[str, dict[Unit, int]]:
    """How many units of each kind the rows of each role have."""
    return {
        role: {unit: sum(row.units(unit) for row in part) for unit in get_args(Unit)}
        for role, part in rows.items()
    }


def _weighted(values: Tensor, weights: Sequence[float], units: float) -> Tensor:
    return (values.float() * values.new_tensor(weights, dtype=torch.float32)).sum() / units


class _nothing:  # noqa: N801 (reads like contextlib.nullcontext, but is reusable and free)
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def split(
    forget: Mapping[str, Sequence[Row]],
    retain: Sequence[Row],
    forget_weights: Sequence[float],
    retain_weights: Sequence[float],
    budget: int,
    at_least: int = 1,
    at_most: int | None = None,
) -> list[MicroBatch]:
    """Cuts the rows of one step into micro-batches of at most ``budget`` padded tokens.

    Rows are sorted by length first, so that a micro-batch holds rows of like length; the
    losses are sums per row, so their order means nothing. ``at_least`` and ``at_most`` bound
    the number of micro-batches (processes that train together need the same number).
    """
    names = list(forget)
    order = sorted(
        range(len(forget_weights)),
        key=lambda index: max((len(forget[name][index].encoded.ids) for name in names), default=0),
    )
    retain_order = sorted(range(len(retain)), key=lambda index: len(retain[index].encoded.ids))
    count = at_least
    limit = max(len(order), len(retain_order), at_least)
    limit = limit if at_most is None else max(min(limit, at_most), at_least)
    while True:
        pieces = [
            MicroBatch(
                {name: [forget[name][i] for i in mine] for name in names},
                [retain[i] for i in kept],
                [forget_weights[i] for i in mine],
                [retain_weights[i] for i in kept],
            )
            for mine, kept in zip(_pieces(order, count), _pieces(retain_order, count), strict=True)
        ]
        if count >= limit or all(_padded_tokens(piece) <= budget for piece in pieces):
            return [piece for piece in pieces if piece.forget_weights or piece.retain]
        count += 1


def _pieces(order: Sequence[int], count: int) -> Iterator[Sequence[int]]:
    size, extra = divmod(len(order), count)
    start = 0
    for index in range(count):
        end = start + size + (index < extra)
        yield order[start:end]
        start = end


def _padded_tokens(piece: MicroBatch) -> int:
    rows = [row for part in (*piece.forget.values(), piece.retain) for row in part]
    return len(rows) * max((len(row.encoded.ids) for row in rows), default=0)
