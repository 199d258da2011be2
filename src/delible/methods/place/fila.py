"""FILA: adapters start as what matters for the forget rows and not for the retain rows.

    I(W) = sum over batches of n (dL/dW)^2 / sum of n        L: mean loss of n answer tokens
    M    = I_f / (I_r + eps)

entry by entry; :mod:`delible.train.importance` makes adapters of it. The squared gradient is the
Fisher information only where the mean gradient is 0, as it is not on forget rows: see ``vila``.
It takes a gradient and two maps of the size of all linear layers.

Paper: arXiv 2408.06621 (LoKU). Reference code: github.com/kyj93790/VILA (``TOFU/fila.py``,
``TOFU/forget.py``).
Deviations: (1) eps is in units of the mean of I_r instead of 1e-5, and rows of hardly any
importance count as a thousandth of the median; both, and dividing by the tokens twice, are as
released with ``compat``; (2) what is taken out of the weights is the frozen half of an adapter of
twice the rank; (3) retain rows are drawn so that each comes once before any comes again; (4) layers
inside the blocks only, as everywhere here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from delible.lm.lm import LM
from delible.registry import register
from delible.train.importance import ImportanceStart, in_batches
from delible.train.linear_gradients import passes, run_pass
from delible.train.row import Row
from delible.train.slots import SlotContext
from delible.watching import watched


class Squares:
    """Token-weighted mean of the squared gradient of batch means, by layer, fp32."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.tokens = 0
        self.spans: list[tuple[slice, int]] = []

    def beside(self, path: str, inputs: Tensor) -> None:
        return None

    def next_pass(self, counts: Sequence[Sequence[int]]) -> None:
        """What comes next: for each batch its rows' answer tokens."""
        self.spans, at = [], 0
        for batch in counts:
            self.spans.append((slice(at, at + len(batch)), sum(batch)))
            at += len(batch)
        self.tokens += sum(tokens for _, tokens in self.spans)

    @torch.no_grad()
    def take(
        self,
        path: str,
        inputs: Float[Tensor, "rows sequence in"],
        gradients: Float[Tensor, "rows sequence out"],
    ) -> None:
        for span, tokens in self.spans:
            found = gradients[span].flatten(0, 1).T @ inputs[span].flatten(0, 1) / tokens
            if path not in self.sums:
                self.sums[path] = torch.zeros_like(found)
            self.sums[path].addcmul_(found, found, value=tokens)

    def mean(self, path: str) -> Float[Tensor, "out in"]:
        """The importance of a layer's weights, 0 or more."""
        return self.sums[path] / self.tokens


def squares(
    lm: LM, layers: Sequence[tuple[str, Any]], rows: Sequence[Row], size: int, found: Squares
) -> None:
    """Adds the squared gradients of the rows in batches of ``size``."""
    batches = in_batches(range(len(rows)), size)
    for together in passes(lm, rows, batches):
        mine = [batches[one] for one in together]
        found.next_pass([[rows[place].encoded.answer_tokens for place in one] for one in mine])
        run_pass(lm, [rows[place] for one in mine for place in one], layers, found)


@register(
    kind="place",
    name="fila",
    title="Adapters from Fisher information (FILA)",
    summary="Starts adapters as the part of each matrix that forget rows need and others do not.",
    paper="2408.06621",
    year=2024,
    family="weight selection",
    intention="as host",
    mechanism="adapter",
    needs=("forget", "retain", "weights"),
    changes="adapter",
    reversible=True,
    weakest="removal of the adapter, unless it is merged",
    badges=("parity", "variant"),
    variant="eps is relative, tokens are divided by once, and the weights below stay as they are.",
)
class FILA(ImportanceStart):
    """It has the options of adapters that start as what is important."""

    def importance(
        self, context: SlotContext, layers: Sequence[tuple[str, Any]]
    ) -> Iterator[tuple[str, Float[Tensor, "out in"]]]:
        forget, retain = Squares(), Squares()
        epochs = [[epoch] for epoch in range(self.importance_epochs)]
        for (epoch,) in watched(
            epochs, "importance of weights", self.importance_epochs, context.stage
        ):
            for rows, found in zip(self.rows_of(context, epoch), (forget, retain), strict=True):
                squares(context.lm, layers, rows, self.importance_batch_size, found)
        for path, _ in layers:
            if path not in forget.sums:
                continue
            tokens = (forget.tokens, retain.tokens)
            yield path, self.compared(forget.mean(path), retain.mean(path), tokens)
            del forget.sums[path], retain.sums[path]
