"""Tamper-resistant unlearning (TAR): the update after which an attacker's fine-tuning fails.

    theta_0 = theta;  theta_j = Adam step of the attacker from theta_(j-1),  j = 1 ... K
    gradient = sum over every k-th j of w_j * gradient of -H(held-out answers) at theta_j
    w_j = weight * exp(decay * (j - K) / K)

H is the mean entropy of the predictions of held-out forget answers' tokens. First-order: what is
found at the attacked weights moves the weights as they are. The attacker fine-tunes on a share of
the step's forget rows, with a rate drawn anew for each step; in half of the attacks it begins with
retained rows, and goes over to forget rows after a share of its steps drawn from Beta(6, 3). For
the first ``after_steps`` steps only the host's gradient is taken (a safeguard to start from); then
only this one, unless ``host``.

Memory: besides the optimiser's two, five buffers of the size of what is trained (the saved weights,
the attacker's two moments, its gradient, the accumulated gradient). Time: K + K / k passes a step.

Paper: arXiv 2408.00761. Reference code: github.com/rishub-tamirisa/tamper-resistance.
Deviations: far fewer inner and outer steps by default, and a decay by the share of K instead of
1/16 per step, which is the same for K = 64; the attacker moves what the recipe moves; attacked and
held-out rows are halves of a step's rows (both are all of them where there is but one), and weights
of rows are the host's only; one process only, as an attacker needs the whole step's rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from delible.errors import RecipeError
from delible.registry import register
from delible.train.passes import Passes
from delible.train.randomness import shuffled
from delible.train.reference import Reference
from delible.train.row import Row
from delible.train.slots import Harden
from delible.train.step import Group, make_step

#: Beta(6, 3) is the sixth smallest of eight uniform numbers.
SWITCH_ORDER, SWITCH_DRAWS = 6, 8
#: Of the attacker's Adam.
BETAS, EPSILON = (0.9, 0.999), 1e-8
Rate = Annotated[float, Field(gt=0)]


def negative_entropy(logits: Float[Tensor, "tokens vocab"], targets: Tensor) -> Tensor:
    """-H of each token's prediction in nats, from -log(vocabulary) to 0."""
    logprobs = logits.float().log_softmax(dim=1)
    return (logprobs.exp() * logprobs).sum(dim=1)


def step_weight(step: int, steps: int, weight: float, decay: float) -> float:
    """w_j of inner step j (from 1): ``weight`` at the last one, less before."""
    return weight * math.exp(decay * (step - steps) / steps)


def switch_step(steps: int, generator: torch.Generator) -> int:
    """How many of an attacker's steps are on retained rows: a share drawn from Beta(6, 3)."""
    drawn = torch.rand(SWITCH_DRAWS, generator=generator).sort().values
    return int(steps * float(drawn[SWITCH_ORDER - 1]))


@torch.no_grad()
def adam_(
    weights: Sequence[Tensor], gradients: Sequence[Tensor | None], moments: list[list[Tensor]],
    step: int, rate: float,
) -> None:  # fmt: skip
    """One Adam step in place; ``moments`` are first and second, and change, too."""
    (one, two), (first, second) = BETAS, moments
    for weight, gradient, m, v in zip(weights, gradients, first, second, strict=True):
        if gradient is None:
            continue
        m.mul_(one).add_(gradient, alpha=1 - one)
        v.mul_(two).addcmul_(gradient, gradient, value=1 - two)
        denominator = (v / (1 - two**step)).sqrt_().add_(EPSILON)
        weight.addcdiv_(m, denominator, value=-rate / (1 - one**step))


def attacked(passes: Passes) -> str:
    """The rows that hold what is to be forgotten."""
    assert passes.objective is not None
    roles = passes.objective.roles
    return "forget" if "forget" in roles else roles[0]


def mean_gradient(
    passes: Passes, rows: Sequence[Row], values: Callable[[Group], Float[Tensor, "rows answer"]]
) -> tuple[list[Tensor | None], float]:
    """Gradient of the mean of per-token values over rows, in pieces as large as a micro-batch."""
    count = max(len(micro.forget_weights) or len(micro.retain) for micro in passes.micro_batches)
    tokens = sum(row.encoded.answer_tokens for row in rows)
    total: list[Tensor | None] = [None] * len(passes.parameters)
    mean = 0.0
    for start in range(0, len(rows), count):
        part = {"rows": rows[start : start + count]}
        step = make_step(passes.lm, passes.forward, part, {"rows": ("answers",)}, Reference())
        loss = values(step.groups["rows"]).sum() / tokens
        found = torch.autograd.grad(loss, list(passes.parameters), allow_unused=True)
        total = added(total, found, 1.0)
        mean += float(loss.detach())
        passes.totals.tokens += step.tokens
    return total, mean


@torch.no_grad()
def added(
    total: Sequence[Tensor | None], more: Sequence[Tensor | None], scale: float
) -> list[Tensor | None]:
    """total + scale * more, where None is nothing; ``total`` is changed in place."""
    found: list[Tensor | None] = []
    for one, other in zip(total, more, strict=True):
        if other is None:
            found.append(one)
        else:
            found.append(scale * other if one is None else one.add_(other, alpha=scale))
    return found


@register(
    kind="harden",
    name="tar",
    title="Tamper-resistant unlearning (TAR)",
    summary="Makes simulated fine-tuning attacks fail; five more buffers and many passes a step.",
    paper="2408.00761",
    year=2024,
    family="meta-learning",
    intention="as host",
    mechanism="wrapper",
    needs=("forget", "weights"),
    changes="weights",
    reversible=False,
    weakest="attacks unlike the simulated ones: other rates, longer ones, adapters",
    badges=("variant",),
    variant="Fewer inner steps; halves of a step's rows attack and are held out; one process.",
)
class TAR(Harden):
    """Options of tamper resistance."""

    inner_steps: int = Field(4, ge=1, description="Steps of a simulated attack (K).")
    every: int = Field(2, ge=1, description="Inner steps between two looks at the held-out rows.")
    rates: Annotated[tuple[Rate, ...], Field(min_length=1)] = Field(
        (1e-4, 3e-4), description="The attacker's learning rates, of which one is drawn per step."
    )
    retain_first: float = Field(
        0.5, ge=0, le=1, description="Share of attacks that begin with retained rows."
    )
    weight: float = Field(4.0, gt=0, description="Weight of the last look's entropy.")
    decay: float = Field(4.0, ge=0, description="How much less earlier looks weigh, as exponent.")
    after_steps: int = Field(0, ge=0, description="First steps with the host's gradient alone.")
    host: bool = Field(False, description="Go on with the host's forget loss beside it.")

    def needs_whole(self) -> str | None:
        return "a simulated attack needs all rows of a step, which processes share"

    def forget(self, passes: Passes) -> None:
        if passes.world > 1:
            raise RecipeError(
                "an attack needs all rows of a step, and they are shared by "
                f"{passes.world} processes.",
                where="harden 'tar'",
                hint="Train in one process.",
            )
        early = passes.objective is None or passes.step < self.after_steps
        if early or self.host:
            passes.forget()
        if early:
            return
        found, entropy_loss = self.resistance(passes)
        if not self.host:
            passes.totals.forget = entropy_loss
        with torch.no_grad():
            for parameter, gradient in zip(passes.parameters, found, strict=True):
                if gradient is not None:
                    gradient.mul_(passes.weights[0])
                    parameter.grad = (
                        gradient if parameter.grad is None else parameter.grad.add_(gradient)
                    )

    def resistance(self, passes: Passes) -> tuple[list[Tensor | None], float]:
        """The accumulated gradient, and -H after the whole attack; weights end as they were."""
        random = passes.generator("harden.tar")
        forget = [row for micro in passes.micro_batches for row in micro.forget[attacked(passes)]]
        retain = [row for micro in passes.micro_batches for row in micro.retain]
        order = shuffled(sorted(forget, key=lambda row: row.index), random)
        attacking, held_out = order[: (len(order) + 1) // 2], order[len(order) // 2 :]
        rate = self.rates[int(torch.randint(len(self.rates), (), generator=random))]
        first = float(torch.rand((), generator=random)) < self.retain_first
        switch = switch_step(self.inner_steps, random) if first and retain else 0
        total: list[Tensor | None] = [None] * len(passes.parameters)
        value = math.nan
        with passes.returning() as kept:
            moments = [[torch.zeros_like(weight) for weight in kept] for _ in range(2)]
            for step in range(1, self.inner_steps + 1):
                rows = retain if step <= switch else attacking
                gradients, _ = mean_gradient(passes, rows, lambda group: -group.token_logprobs)
                adam_(passes.parameters, gradients, moments, step, rate)
                if step % self.every and step != self.inner_steps:
                    continue
                scale = step_weight(step, self.inner_steps, self.weight, self.decay)
                gradients, value = mean_gradient(
                    passes, held_out, lambda group: group.map_logits(negative_entropy)
                )
                total = added(total, gradients, scale)
        return total, value
