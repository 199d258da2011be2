"""What a server does with the adapters that come back: pure functions of their change.

    Delta = sum_i p_i (phi_i - phi),   p_i = n_i / sum_j n_j

    FedAvg, FedProx   phi + Delta                              (= sum_i p_i phi_i)
    FedAvgM           m <- mu m + Delta                        phi + m
    FedAdagrad        v <- v + Delta^2                         phi + eta Delta / (sqrt(v) + tau)
    FedAdam           v <- b2 v + (1 - b2) m^2                 phi + eta m / (sqrt(v) + tau)
    FedYogi           v <- v - (1 - b2) m^2 sign(v - m^2)      phi + eta m / (sqrt(v) + tau)

with m = Delta in the first round and b1 m + (1 - b1) Delta after it; v starts from tau^2.
FedProx differs at the clients alone (:mod:`delible.federated.local`).

Papers: arXiv 1602.05629 (FedAvg), 1909.06335 (FedAvgM), 1812.06127 (FedProx), 2003.00295 (the
adaptive ones). Reference code: fyzhang1/Oblivionis, after OpenFedLLM.
Deviations: sums are float64; nothing is changed in place. As in the reference code the adaptive
servers square m, where 2003.00295 squares Delta (``squared``), and the first m is Delta itself,
not (1 - b1) Delta. An adaptive server's step is at most about eta / sqrt(1 - b2) per weight, and
half of Delta where that is as small as tau: with few rounds the model hardly learns, or hardly
changes, whatever the clients did. Look at FedAvg beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from delible.component import Config
from delible.errors import RecipeError, RunError
from delible.federated.adapter import Adapter

Aggregation = Literal["fedavg", "fedprox", "fedavgm", "fedadagrad", "fedadam", "fedyogi"]
#: Those that keep nothing from round to round.
PLAIN: tuple[Aggregation, ...] = ("fedavg", "fedprox")
#: Those whose step depends on a second moment.
ADAPTIVE: tuple[Aggregation, ...] = ("fedadagrad", "fedadam", "fedyogi")
Combine = Literal["factors", "product"]
#: Parts of the names of the two factors of a low-rank product B A.
_A, _B = ".lora_A.", ".lora_B."


class Server(Config):
    """How a server makes one adapter of many."""

    aggregation: Aggregation = Field("fedavg", description="Server algorithm.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Of FedAvgM.")
    beta1: float = Field(0.9, ge=0, lt=1, description="Of FedAdam and FedYogi: first moment.")
    beta2: float = Field(0.99, ge=0, lt=1, description="Of FedAdam and FedYogi: second moment.")
    tau: float = Field(1e-3, gt=0, description="Of the adaptive servers: added to the root.")
    server_learning_rate: float = Field(1e-3, gt=0, description="Of the adaptive servers: eta.")
    squared: Literal["momentum", "delta"] = Field(
        "momentum", description="What the second moment of FedAdam and FedYogi is of: 'momentum' "
        "as in the reference code, 'delta' as in arXiv 2003.00295.",
    )  # fmt: skip
    combine: Combine = Field(
        "factors", description="What is averaged: the 'factors' A and B apart, or the 'product' "
        "B A, cut to its rank again (FedAvg and FedProx).",
    )  # fmt: skip

    def check_combine(self) -> None:
        """Refuses what has no meaning.

        Raises:
            RecipeError: Products under a server with moments.
        """
        if self.combine == "product" and self.aggregation not in PLAIN:
            raise RecipeError(
                f"{self.aggregation} keeps moments of factors, and those of a product are other "
                "ones in each round.",
                where="combine 'product'",
                hint="Choose --aggregation fedavg or fedprox, or --combine factors.",
            )


@dataclass(frozen=True)
class Moments:
    """What a server remembers between the rounds of a phase: float64 tensors by name.

    Attributes:
        rounds: That it has seen.
    """

    rounds: int = 0
    first: Adapter = field(default_factory=dict)
    second: Adapter = field(default_factory=dict)


def shares(counts: Mapping[str, int]) -> dict[str, float]:
    """The weight of each client: its rows among those of all.

    Raises:
        RunError: Nobody has any.
    """
    total = sum(counts.values())
    if total <= 0 or min(counts.values()) < 0:
        raise RunError("the clients of a round hold no rows, so nothing can be weighed.")
    return {client: count / total for client, count in counts.items()}


def mean_change(
    start: Adapter, adapters: Mapping[str, Adapter], weights: Mapping[str, float]
) -> dict[str, Tensor]:
    """Delta in float64, over clients in the order of their names, so that no other order matters.

    A tensor that a client lacks counts as unchanged there.
    """
    found = {}
    for name, value in start.items():
        before = value.double()
        total = torch.zeros_like(before)
        for client in sorted(adapters):
            mine = adapters[client].get(name)
            if mine is not None:
                total += weights[client] * (mine.double() - before)
        found[name] = total
    return found


def mean_product(
    start: Adapter, adapters: Mapping[str, Adapter], weights: Mapping[str, float]
) -> dict[str, Tensor]:
    """The change to factors whose product is the mean of the clients' products, in float64.

    sum_i p_i B_i A_i = U S V^T is cut to the adapter's rank: B = U sqrt(S), A = sqrt(S) V^T.
    What belongs to no pair of factors is averaged as it is.
    """
    found = mean_change(start, adapters, weights)
    for name in start:
        if _A not in name:
            continue
        partner = name.replace(_A, _B)
        if partner not in start:
            continue
        rank = start[name].shape[0]
        left, right = [], []
        for client in sorted(adapters):
            mine = {**start, **adapters[client]}
            left.append(weights[client] * mine[partner].double())
            right.append(mine[name].double())
        u, s, v = _cut(torch.cat(left, dim=1), torch.cat(right, dim=0), rank)
        root = s.sqrt()
        found[partner] = u * root - start[partner].double()
        found[name] = root[:, None] * v - start[name].double()
    return found


def _cut(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular parts of left @ right, without making the product."""
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, s, v = torch.linalg.svd(r_left @ r_right.T)
    return q_left @ u[:, :rank], s[:rank], v[:rank] @ q_right.T


def averaged(change: Tensor, before: Tensor | None, momentum: float) -> Tensor:
    """m of FedAvgM."""
    return change if before is None else momentum * before + change


def smoothed(change: Tensor, before: Tensor | None, beta1: float) -> Tensor:
    """m of FedAdam and FedYogi."""
    return change if before is None else beta1 * before + (1 - beta1) * change


def adagrad(second: Tensor, change: Tensor) -> Tensor:
    """v of FedAdagrad."""
    return second + change**2


def adam(second: Tensor, of: Tensor, beta2: float) -> Tensor:
    """v of FedAdam."""
    return beta2 * second + (1 - beta2) * of**2


def yogi(second: Tensor, of: Tensor, beta2: float) -> Tensor:
    """v of FedYogi: it moves by a share of the square, whatever it is itself."""
    square = of**2
    return second - (1 - beta2) * square * torch.sign(second - square)


def scaled(direction: Tensor, second: Tensor, server: Server) -> Tensor:
    """The step of an adaptive server."""
    return server.server_learning_rate * direction / (second.sqrt() + server.tau)


def step(server: Server, change: Adapter, moments: Moments) -> tuple[dict[str, Tensor], Moments]:
    """What is added to the adapter, in float64, and what the server remembers then.

    Args:
        change: Delta, in float64.
        moments: Of the rounds of this phase before.
    """
    steps: dict[str, Tensor] = {}
    first: dict[str, Tensor] = {}
    second: dict[str, Tensor] = {}
    for name, delta in change.items():
        before = moments.first.get(name)
        square = moments.second.get(name)
        if square is None:
            square = torch.full_like(delta, server.tau**2)
        if server.aggregation in PLAIN:
            steps[name] = delta
        elif server.aggregation == "fedavgm":
            steps[name] = first[name] = averaged(delta, before, server.momentum)
        elif server.aggregation == "fedadagrad":
            second[name] = adagrad(square, delta)
            steps[name] = scaled(delta, second[name], server)
        else:
            first[name] = smoothed(delta, before, server.beta1)
            of = first[name] if server.squared == "momentum" else delta
            rule = adam if server.aggregation == "fedadam" else yogi
            second[name] = rule(square, of, server.beta2)
            steps[name] = scaled(first[name], second[name], server)
    return steps, Moments(moments.rounds + 1, first, second)


def update(
    server: Server,
    start: Adapter,
    adapters: Mapping[str, Adapter],
    weights: Mapping[str, float],
    moments: Moments,
) -> tuple[dict[str, Tensor], Moments]:
    """The server's next adapter, in the precision of the last, and what it remembers then.

    Args:
        adapters: What came back, by client.
        weights: Of the same clients, of sum 1.
    """
    combine = mean_change if server.combine == "factors" else mean_product
    steps, after = step(server, combine(start, adapters, weights), moments)
    return {
        name: (value.double() + steps[name]).to(value.dtype) for name, value in start.items()
    }, after
