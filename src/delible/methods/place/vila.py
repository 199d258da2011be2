"""VILA: adapters start as what matters for forgetting, measured on small random adapters.

    F_A, F_B = variance of dL/dA and dL/dB over batches          A, B drawn from N(0, sigma^2)
    I_f      = F_B F_A,   I_r = R_B R_A                            [out, in] from [out, r] [r, in]
    M        = I_f / (I_r + eps)

with L the mean loss of a batch and batches weighted by their answer tokens;
:mod:`delible.train.importance` makes adapters of M. Two repairs of ``fila``: the variance is the
Fisher information where the mean gradient is not 0, as on forget rows; and low-rank gradients are
a hundredth of the size of full ones.

Paper: arXiv 2508.21300. Reference code: github.com/kyj93790/VILA (``TOFU/vila.py``,
``TOFU/forget.py``).
Deviations: (1) the released code divides by the tokens once when it saves and once more when it
loads, so that with 1e-5 beside it the importance for retain rows hardly counts; here once, and eps
is in units of the mean of I_r (``compat``: as released); (2) gradients of single rows are small
enough to be kept for a pass, so that each row goes through the model once, and is put into new
batches with the rows of its pass ``importance_epochs`` times; retain rows are drawn once, and
batches are smaller where there would be a single one, which has no variance; (3)
moments are updated batch by batch: the mean of squares minus the square of the mean loses all its
digits; (4) sigma is halved until the small adapters raise the loss by a tenth at most; (5) what is
taken out of the weights is the frozen half of an adapter of twice the rank.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from delible.errors import DataError
from delible.lm.lm import LM
from delible.registry import register
from delible.train.importance import ImportanceStart, in_batches, plain_shape
from delible.train.linear_gradients import PASS_TOKENS, passes, run_pass
from delible.train.randomness import generator, shuffled
from delible.train.row import Row
from delible.train.slots import SlotContext
from delible.watching import watched

logger = logging.getLogger(__name__)

#: The loss may rise by this share, or by so many nats per token where there is hardly any.
RISE = 0.1
HALVINGS = 12


class Moments:
    """Weighted mean and variance of tensors that come in groups; stable in fp32."""

    def __init__(self) -> None:
        self.weight = 0.0
        self.mean: Tensor | None = None
        self.squares: Tensor | None = None

    def add(
        self, values: Float[Tensor, "batches size"], weights: Float[Tensor, " batches"]
    ) -> None:
        """Takes further values, each with a weight above 0."""
        more, column = float(weights.sum()), weights[:, None]
        mean = (values * column).sum(dim=0) / more
        squares = ((values - mean).square() * column).sum(dim=0)
        if self.mean is None or self.squares is None:
            self.weight, self.mean, self.squares = more, mean, squares
            return
        total, apart = self.weight + more, mean - self.mean
        self.mean += apart * (more / total)
        self.squares += squares + apart.square() * (self.weight * more / total)
        self.weight = total

    def variance(self) -> Float[Tensor, " size"]:
        """Weighted by nothing but the weights; 0 or more."""
        if self.squares is None:
            raise ValueError("no values were taken")
        return self.squares / self.weight


class Probes:
    """Random low-rank products beside linear layers, and moments of their gradients.

    Args:
        scale: Of the products, alpha / rank.
    """

    def __init__(
        self, layers: Sequence[tuple[str, Any]], rank: int, sigma: float, scale: float, seed: int
    ) -> None:
        self.rank, self.scale = rank, scale
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}
        for path, module in layers:
            out, wide = plain_shape(module)
            random, device = generator(seed, "place.vila", "probes", path), module.weight.device
            first = torch.randn(rank, wide, generator=random) * sigma
            second = torch.randn(out, rank, generator=random) * sigma
            self.factors[path] = (first.to(device), second.to(device))
        self.moments: dict[str, tuple[Moments, Moments]] = {}
        self.means = self.counts = torch.zeros(0)

    def halve(self) -> None:
        """Half the spread of the random numbers."""
        for first, second in self.factors.values():
            first.mul_(0.5)
            second.mul_(0.5)

    def beside(self, path: str, inputs: Tensor) -> Tensor:
        first, second = (one.to(inputs.dtype) for one in self.factors[path])
        return (inputs @ first.T) @ second.T * self.scale

    def next_pass(self, batches: Sequence[Sequence[int]], tokens: Sequence[int]) -> None:
        """What comes next: batches of places in the pass, and each row's answer tokens."""
        counts = [sum(tokens[place] for place in batch) for batch in batches]
        self.means = torch.zeros(len(batches), len(tokens))
        for row, (batch, count) in enumerate(zip(batches, counts, strict=True)):
            self.means[row, list(batch)] = 1 / count
        self.counts = torch.tensor(counts, dtype=torch.float32)

    @torch.no_grad()
    def take(
        self,
        path: str,
        inputs: Float[Tensor, "rows sequence in"],
        gradients: Float[Tensor, "rows sequence out"],
    ) -> None:
        first, second = self.factors[path]
        of_first = ((gradients @ second).mT @ inputs).flatten(1) * self.scale
        of_second = (gradients.mT @ (inputs @ first.T)).flatten(1) * self.scale
        both = self.moments.setdefault(path, (Moments(), Moments()))
        for moments, rows in zip(both, (of_first, of_second), strict=True):
            moments.add(self.means.to(rows) @ rows, self.counts.to(rows))

    def variances(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Variances of the gradients of A [rank, in] and B [out, rank] by layer."""
        found = {}
        for path, (of_first, of_second) in self.moments.items():
            first, second = self.factors[path]
            found[path] = (
                of_first.variance().view_as(first), of_second.variance().view_as(second)
            )  # fmt: skip
        self.moments = {}
        return found


def lifted(
    first: Float[Tensor, "rank in"], second: Float[Tensor, "out rank"]
) -> Float[Tensor, "out in"]:
    """Importance of a matrix from that of its factors."""
    return second @ first


def measured(
    lm: LM, layers: Sequence[tuple[str, Any]], rows: Sequence[Row], probes: Probes,
    size: int, epochs: int, random: torch.Generator,
) -> tuple[Mapping[str, tuple[Tensor, Tensor]], int]:  # fmt: skip
    """Variances over batches, and the answer tokens that they were measured on.

    Args:
        size: Rows of a batch; fewer where there would be one batch only.
    """
    tokens, size = 0, min(size, max(1, len(rows) // 2))
    for together in passes(lm, rows, [[place] for place in range(len(rows))]):
        counts = [rows[place].encoded.answer_tokens for place in together]
        batches = [
            batch
            for _ in range(epochs)
            for batch in in_batches(shuffled(range(len(together)), random), size)
        ]
        probes.next_pass(batches, counts)
        run_pass(lm, [rows[place] for place in together], layers, probes)
        tokens += epochs * sum(counts)
    return probes.variances(), tokens


@register(
    kind="place",
    name="vila",
    title="Adapters from the variance of gradients (VILA)",
    summary="Starts adapters as what forget rows need and others do not, measured cheaply.",
    paper="2508.21300",
    year=2025,
    family="weight selection",
    intention="as host",
    mechanism="adapter",
    needs=("forget", "retain", "weights"),
    changes="adapter",
    reversible=True,
    weakest="removal of the adapter, unless it is merged",
    badges=("parity", "variant"),
    variant="Tokens are divided by once, eps is relative, each row goes through the model once, "
    "and the weights below stay as they are.",
)
class VILA(ImportanceStart):
    """Options of VILA."""

    sigma: float = Field(0.05, gt=0, description="Spread of the small random adapters at first.")

    def importance(
        self, context: SlotContext, layers: Sequence[tuple[str, Any]]
    ) -> Iterator[tuple[str, Float[Tensor, "out in"]]]:
        lm = context.lm
        for role in ("forget", "retain"):
            if len(context.rows[role]) < 2:
                raise DataError(
                    f"one {role} record has no variance.",
                    where="place 'vila'",
                    hint="Give two at least, or choose --place fila.",
                )
        probes = Probes(layers, self.rank, self.sigma, self.alpha / self.rank, context.seed)
        parts = self.rows_of(context, 0)
        for rows in parts:
            self._quieten(lm, layers, rows, probes)
        found, tokens = [], []
        for (place,) in watched([[0], [1]], "importance of weights", 2, context.stage):
            random = generator(context.seed, "place.vila", "batches", place)
            variances, count = measured(
                lm,
                layers,
                parts[place],
                probes,
                self.importance_batch_size,
                self.importance_epochs,
                random,
            )
            found.append(variances)
            tokens.append(count)
        for path, own in found[0].items():
            yield path, self.compared(lifted(*own), lifted(*found[1][path]), (tokens[0], tokens[1]))

    def _quieten(
        self, lm: LM, layers: Sequence[tuple[str, Any]], rows: Sequence[Row], probes: Probes
    ) -> None:
        """Lowers the spread until the model with the products is nearly the model."""
        longest = max(len(row.encoded.ids) for row in rows)
        some = rows[: max(1, PASS_TOKENS["cpu"] // longest)]
        tokens = sum(row.encoded.answer_tokens for row in some)
        before = run_pass(lm, some, (), probes, back=False) / tokens
        limit, halvings = before + RISE * max(1.0, before), 0
        while halvings < HALVINGS:
            if run_pass(lm, some, layers, probes, back=False) / tokens <= limit:
                break
            probes.halve()
            halvings += 1
        if halvings:
            logger.info(
                f"place: sigma is lowered by {2**halvings}, since random adapters of a larger one "
                "disturb this model"
            )
