"""Gradient passes over one optimiser step, split into micro-batches that fit the memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from delible.lm.lm import LM
from delible.train.reference import Reference
from delible.train.slots import Keep, Objective
from delible.train.step import Reads, Row, Step, make_step


@dataclass(frozen=True)
class MicroBatch:
    """Rows that go through the model together; aligned roles stay aligned."""

    forget: Mapping[str, Sequence[Row]]
    retain: Sequence[Row]
    forget_weights: Sequence[float]
    retain_weights: Sequence[float]


@dataclass
class Totals:
    """Sums over one optimiser step (losses already averaged as declared)."""

    forget: float = 0.0
    keep: float = 0.0
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

    def both(self) -> None:
        """Adds the gradient of the weighted sum of both losses."""
        self._run(forget=True, keep=True)

    def forget(self) -> None:
        """Adds the gradient of the weighted forget loss."""
        self._run(forget=True, keep=False)

    def keep(self) -> None:
        """Adds the gradient of the weighted retain loss."""
        self._run(forget=False, keep=True)

    def clear(self) -> None:
        """Forgets all gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def _run(self, *, forget: bool, keep: bool) -> None:
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
            step = make_step(self.lm, self.forward, rows, self.reads, self.reference)
            ready = self.accumulating(index < last) if self.accumulating else _nothing()
            with ready:
                loss = self._loss(step, micro, totals, forget=forget, keep=keep)
                totals.tokens += step.tokens
                totals.padding.append(step.padding_share)
                self.backward(loss)
        if forget:
            self.totals.forget = totals.forget
        if keep:
            self.totals.keep = totals.keep
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
        return torch.stack(parts).sum() * self.world


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
