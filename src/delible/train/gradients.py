"""One service for questions about gradients of the answer loss at the start model.

Used by weight masks, data attribution and coreset scores. Gradients are accumulated in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from delible.lm.forward import Forward
from delible.lm.lm import LM
from delible.train.reference import Reference
from delible.train.step import Reads, Row, make_step

#: Padded tokens per pass.
_BUDGET = 1024


class Gradients:
    """Gradients of the token-mean negative log-likelihood of rows, at the model as it is."""

    def __init__(self, lm: LM, budget: int = _BUDGET) -> None:
        self.lm, self.budget = lm, budget

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Every floating-point parameter by name (tied ones once)."""
        return {
            name: value
            for name, value in self.lm.model.named_parameters()
            if value.is_floating_point()
        }

    def total(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Sum over rows of the gradient of each row's token-mean loss, by parameter name."""
        parameters = self.parameters()
        with self._ready(parameters):
            for part in self._batches(rows):
                self._losses(part).sum().backward()
            return {
                name: torch.zeros_like(value) if value.grad is None else value.grad
                for name, value in parameters.items()
            }

    @torch.no_grad()
    def losses(self, rows: Sequence[Row]) -> Tensor:
        """Token-mean loss of each row, in order, shape [rows], float64."""
        found: dict[int, float] = {}
        positions = {id(row): place for place, row in enumerate(rows)}
        with self._evaluating():
            for part in self._batches(rows):
                for row, value in zip(part, self._losses(part).tolist(), strict=True):
                    found[positions[id(row)]] = value
        return torch.tensor([found[place] for place in range(len(rows))], dtype=torch.float64)

    @torch.no_grad()
    def products(
        self, rows: Sequence[Row], direction: dict[str, Tensor], step: float = 1e-2
    ) -> Tensor:
        """Inner product of each row's gradient with ``direction``, shape [rows], float64.

        A central difference along the unit direction: two forward passes over the rows
        instead of one backward pass each. ``step`` is the length of the move in weight space.
        """
        norm = torch.sqrt(sum(value.double().pow(2).sum() for value in direction.values()))  # type: ignore[arg-type]
        if float(norm) == 0.0:
            return torch.zeros(len(rows), dtype=torch.float64)
        parameters = self.parameters()
        kept = {name: parameters[name].detach().clone() for name in direction}
        ahead_and_behind = []
        for sign in (1.0, -1.0):
            for name, value in direction.items():
                parameters[name].copy_(kept[name] + value * (sign * step / float(norm)))
            ahead_and_behind.append(self.losses(rows))
        for name, value in kept.items():
            parameters[name].copy_(value)
        return (ahead_and_behind[0] - ahead_and_behind[1]) * norm / (2 * step)

    def _losses(self, rows: Sequence[Row]) -> Tensor:
        reads: dict[str, Sequence[Reads]] = {"forget": ("answers",)}
        step = make_step(self.lm, Forward(self.lm), {"forget": rows}, reads, Reference())
        return -step.forget.logprob_sum / step.forget.token_count

    def _batches(self, rows: Sequence[Row]) -> Iterator[list[Row]]:
        batch: list[Row] = []
        for row in sorted(rows, key=lambda one: len(one.encoded.ids)):
            if batch and len(row.encoded.ids) * (len(batch) + 1) > self.budget:
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    @contextmanager
    def _ready(self, parameters: dict[str, torch.nn.Parameter]) -> Iterator[None]:
        """Every parameter wants a gradient, and none has one; afterwards as before."""
        wanted = {name: value.requires_grad for name, value in parameters.items()}
        with self._evaluating():
            for value in parameters.values():
                value.requires_grad_(True)
                value.grad = None
            try:
                yield
            finally:
                for name, value in parameters.items():
                    value.grad = None
                    value.requires_grad_(wanted[name])

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        was_training = self.lm.model.training
        self.lm.model.eval()
        try:
            yield
        finally:
            self.lm.model.train(was_training)
