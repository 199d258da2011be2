"""Which forget rows help something else, and how much each should count: bi-level selection.

    inner   theta*(w) = argmin sum_i w_i u_i(theta) + R(theta)      u_i: the host's forget loss
    outer   min over w of J(theta*(w)),   w_i >= 0, sum w = 1, few w_i above 0
    gain    G_i = grad J' H^-1 grad u_i                             -dJ / d(mass on row i)

By implicit differentiation mass e on row i changes J by -e G_i. Rows with the largest positive
gain join the support, round by round; exponentiated gradient moves the weights on the simplex;
in between the model is trained a little on the weighted rows, so that gains do not grow stale.
Afterwards the model is as it was. What a method makes of support and weights is its own affair.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn.functional import softplus

from delible.component import Config
from delible.errors import RecipeError
from delible.lm.forward import Forward
from delible.lm.lm import LM
from delible.records import QA, RecordBase
from delible.system.questions import ask
from delible.train.coreset import coreset_size
from delible.train.gradient_space import Space
from delible.train.gradients import Gradients
from delible.train.reference import Reference
from delible.train.row import Row
from delible.train.row_losses import ObjectiveLoss, RowLoss, answer_loss
from delible.train.rows import make_row
from delible.train.slots import SlotContext
from delible.train.step import Reads, make_step
from delible.train.vectors import Vector, conjugate_gradient, norm_of

logger = logging.getLogger(__name__)


def standardised(gains: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """Mean 0 and spread 1; zeros when the gains do not differ."""
    spread = gains.std(correction=0)
    return (gains - gains.mean()) / spread if float(spread) > 0 else torch.zeros_like(gains)


def mirror_step(
    weights: Float[Tensor, " rows"], gains: Float[Tensor, " rows"], rate: float
) -> Float[Tensor, " rows"]:
    """w exp(rate x standardised gain), normalised: stays on the simplex, rate 0 changes nothing."""
    return torch.softmax(weights.log() + rate * standardised(gains), dim=0)


def most_helpful(gains: Float[Tensor, " rows"], taken: Sequence[int], count: int) -> list[int]:
    """At most ``count`` rows with the largest positive gain that are not yet taken."""
    order = torch.sort(gains, descending=True, stable=True).indices.tolist()
    known = set(taken)
    return [row for row in order if row not in known and float(gains[row]) > 0][:count]


class PreferenceLoss:
    """-log sigmoid(beta (log ratio of the preferred - log ratio of the other answer)) per pair.

    Args:
        rejected: The other answers' rows, aligned with the preferred ones by ``row.index``.
        reference: Values of the start model, both answers.
    """

    def __init__(self, rejected: Sequence[Row], reference: Reference, beta: float) -> None:
        self.rejected = {row.index: row for row in rejected}
        self.reference, self.beta = reference, beta

    def __call__(self, lm: LM, rows: Sequence[Row]) -> Float[Tensor, " rows"]:
        pairs = {"preferred": rows, "rejected": [self.rejected[row.index] for row in rows]}
        reads: dict[str, Sequence[Reads]] = dict.fromkeys(pairs, ("answers",))
        step = make_step(lm, Forward(lm), pairs, reads, self.reference)
        ratios = [
            step.groups[role].logprob_sum - step.groups[role].reference.logprob_sum
            for role in pairs
        ]
        return softplus(-self.beta * (ratios[0] - ratios[1]))


@dataclass(frozen=True)
class Outer:
    """The outer objective: a loss over rows that serve the selection, and over others that do not.

    Attributes:
        rows: Their mean loss is J; its gradient decides.
        held: Rows apart; when their mean loss rises, the rounds end.
    """

    loss: RowLoss
    rows: Sequence[Row]
    held: Sequence[Row]


@dataclass
class Solution:
    """What the rounds found.

    Attributes:
        support: Indices of the chosen rows, ascending.
        weights: Theirs, on the simplex, aligned with ``support``.
        gains: The gains of all rows in each round.
        outer: Mean outer loss of the held-out rows (or of all) at the start of each round.
    """

    support: list[int]
    weights: Float[Tensor, " support"]
    gains: list[Float[Tensor, " rows"]]
    outer: list[float]


class Bilevel(Config):
    """Options of the bi-level selection."""

    rounds: int = Field(5, ge=1, description="Rounds of scoring, choosing and training.")
    mirror_steps: int = Field(1, ge=0, description="Steps of the weights per round.")
    mirror_rate: float = Field(
        1.0, ge=0, description="Of exponentiated gradient on standardised gains; 0: equal weights."
    )
    score: Literal["dot", "cos"] = Field(
        "dot", description="Gain as a product, or as a cosine, which spares long and rare answers."
    )
    hessian: Literal["identity", "conjugate_gradient"] = Field(
        "identity", description="What stands for the inner Hessian."
    )
    iterations: int = Field(10, ge=1, description="Of conjugate gradients.")
    damping: float = Field(1e-2, ge=0, description="Added to the Hessian's diagonal.")
    outer: Literal["auto", "preference", "likelihood"] = Field(
        "auto",
        description="What should improve on the retain records: the preference of the answer over "
        "the first wrong one, or the answer's likelihood; auto: the former where there are pairs.",
    )
    outer_group: str | None = Field(
        None, description="Only retain records of this group make the outer objective."
    )
    outer_rows: int = Field(300, ge=1, description="At most this many of them, at random.")
    outer_beta: float = Field(0.1, gt=0, description="Inverse temperature of the preference.")
    held_out: float = Field(
        0.2, ge=0, lt=1, description="Share of them that only watches when to stop."
    )
    inner_epochs: int = Field(1, ge=0, description="Passes over the chosen rows per round.")
    inner_learning_rate: float = Field(1e-5, gt=0, description="Of AdamW in these passes.")
    retain_weight: float = Field(
        1.0, ge=0, description="Of the retain likelihood in these passes and in the Hessian."
    )
    how: Literal["difference", "jvp"] = Field(
        "difference", description="Gains by a difference of losses, or exactly in forward mode."
    )
    space: Literal["all", "layers", "head", "lora"] = Field(
        "all", description="Parameters of the gradients: all, blocks, the head, low-rank factors."
    )
    layers: tuple[int, ...] = Field(
        (-1,), min_length=1, description="Blocks for space: layers; negative from the end."
    )

    def solve(self, context: SlotContext, share: float, where: str) -> Solution:
        """Runs the rounds and puts the model back.

        Args:
            share: Of the forget rows that may be chosen; 1 keeps all and only weighs them.
            where: Names the component in an error.

        Raises:
            RecipeError: There is nothing to make the outer objective of.
        """
        rows = context.rows["forget"]
        budget = coreset_size(len(rows), share)
        outer = self.outer_objective(context, where)
        space = Space(self.space, self.layers, seed=context.seed)
        host = ObjectiveLoss.at_start(context.objective, context.rows, context.lm)
        unlearning = context.gradients.of(host).within(space)
        aligning = context.gradients.of(outer.loss).within(space)
        every = budget == len(rows)
        support = list(range(len(rows))) if every else []
        weights = torch.full((len(support),), 1 / max(1, len(support)), dtype=torch.float64)
        found = Solution(support, weights, [], [])
        trains = self.rounds > 1 and self.inner_epochs > 0
        with context.gradients.borrowed() if trains else nullcontext():
            for number in range(self.rounds):
                found.outer.append(float(aligning.losses(outer.held or outer.rows).mean()))
                if number and found.outer[-1] > min(found.outer[:-1]):
                    logger.info(f"u2a: the outer loss rises after round {number}; no more rounds.")
                    break
                direction = self.direction(context, aligning, unlearning, outer, found)
                gains = self.gains(unlearning, rows, direction)
                found.gains.append(gains)
                if not every:
                    size = min(-(-budget // self.rounds), budget - len(found.support))
                    if not self._grow(context, found, gains, size):
                        break
                for _ in range(self.mirror_steps):
                    mine = gains[found.support]
                    found.weights = mirror_step(found.weights, mine, self.mirror_rate)
                if trains and number < self.rounds - 1:
                    self._train(context, host, found, number)
        order = sorted(range(len(found.support)), key=found.support.__getitem__)
        found.support = [found.support[place] for place in order]
        found.weights = found.weights[order]
        return found

    def gains(
        self, unlearning: Gradients, rows: Sequence[Row], direction: Vector
    ) -> Float[Tensor, " rows"]:
        """<direction, gradient of the forget loss> of each row, or the cosine; float64."""
        if self.score == "dot":
            return unlearning.products(rows, direction, how=self.how, consume=True)
        length = norm_of(direction)
        products = unlearning.products(rows, direction, how=self.how, consume=True)
        scale = length * unlearning.norms(rows)
        return torch.where(scale > 0, products / scale.clamp(min=1e-30), 0.0)

    def direction(
        self,
        context: SlotContext,
        aligning: Gradients,
        unlearning: Gradients,
        outer: Outer,
        found: Solution,
    ) -> Vector:
        """H^-1 grad J, with the inner objective's Hessian or the identity for H."""
        share = [1 / len(outer.rows)] * len(outer.rows)
        gradient = aligning.total(outer.rows, share, lean=False)  # it trains as well
        if self.hessian == "identity":
            return gradient
        rows = context.rows["forget"]
        support = found.support or list(range(len(rows)))
        mass = found.weights.tolist() or [1 / len(rows)] * len(rows)
        kept = self._anchors(context)
        answers = unlearning.of(answer_loss)

        def product(vector: Vector) -> Vector:
            mine = [rows[index] for index in support]
            curved = unlearning.hessian_product(mine, vector, weights=mass)
            if kept and self.retain_weight:
                each = [self.retain_weight / len(kept)] * len(kept)
                for name, value in answers.hessian_product(kept, vector, weights=each).items():
                    curved[name].add_(value)
            return curved

        return conjugate_gradient(product, gradient, self.iterations, self.damping)

    def outer_objective(self, context: SlotContext, where: str) -> Outer:
        """The outer objective of the retain records, part of them held out."""
        pairs = [
            (record, row)
            for record, row in zip(
                context.records.get("retain", ()), context.rows.get("retain", ()), strict=True
            )
            if self.outer_group in (None, record.group)
        ]
        wrong = [(record, row) for record, row in pairs if _wrong(record)]
        prefers = self.outer == "preference" or (self.outer == "auto" and bool(wrong))
        pairs = wrong if prefers else pairs
        if not pairs:
            lacking = "has wrong answers ('perturbed')" if prefers else "is there"
            group = "" if self.outer_group is None else f" of group '{self.outer_group}'"
            raise RecipeError(
                f"no retain record{group} {lacking}, so nothing says what should improve.",
                where=where,
                hint="Give --retain FILE with such records.",
            )
        order = torch.randperm(len(pairs), generator=context.generator("u2a.outer")).tolist()
        chosen = [pairs[place] for place in order[: self.outer_rows]]
        apart = int(self.held_out * len(chosen))
        loss: RowLoss = answer_loss
        if prefers:
            loss = self._preference(context, chosen)
        asked = {row.encoded.ids[: row.encoded.start] for row in context.rows["forget"]}
        both = sum(row.encoded.ids[: row.encoded.start] in asked for _, row in chosen)
        if both:
            logger.warning(f"u2a: {both} prompts of the outer objective are forget prompts too.")
        kept = [row for _, row in chosen]
        return Outer(loss, kept[apart:], kept[:apart])

    def _preference(
        self, context: SlotContext, pairs: Sequence[tuple[RecordBase, Row]]
    ) -> PreferenceLoss:
        rejected = []
        for record, row in pairs:
            prompt, answer = ask(record), _wrong(record)
            if prompt is not None and answer is not None:
                rejected.append(make_row(context.lm.template, prompt, answer, row.index, record))
        reference = Reference()
        both = [*rejected, *(row for _, row in pairs)]
        reference.prepare(context.lm, both, ("logprobs",), context.stage)
        return PreferenceLoss(rejected, reference, self.outer_beta)

    def _grow(self, context: SlotContext, found: Solution, gains: Tensor, size: int) -> bool:
        """Adds the rows that help most, each with the mean weight; False when none does."""
        added = most_helpful(gains, found.support, size)
        if not added and not found.support:
            added = [int(gains.argmax())]
            logger.warning(
                "u2a: unlearning no forget row is expected to help the outer objective; taking "
                "the least harmful one alone."
            )
        if not added:
            return False
        mean = 1.0 if not found.support else float(found.weights.mean())
        joined = torch.cat([found.weights, torch.full((len(added),), mean, dtype=torch.float64)])
        found.support = [*found.support, *added]
        found.weights = joined / joined.sum()
        return True

    def _train(
        self, context: SlotContext, host: ObjectiveLoss, found: Solution, number: int
    ) -> None:
        rows = [context.rows["forget"][index] for index in found.support]
        weights = (found.weights * len(rows)).tolist()
        for epoch in range(self.inner_epochs):
            context.gradients.of(host).descend(
                rows,
                self.inner_learning_rate,
                context.generator(f"u2a.inner/{number}/{epoch}"),
                weights=weights,
                anchors=self._anchors(context) if self.retain_weight else (),
                anchor_weight=self.retain_weight,
            )

    def _anchors(self, context: SlotContext) -> Sequence[Row]:
        """Retain rows of the regulariser: those outside the outer objective, or all."""
        rows = context.rows.get("retain", ())
        records = context.records.get("retain", ())
        if self.outer_group is None:
            return rows
        return [
            row
            for record, row in zip(records, rows, strict=True)
            if record.group != self.outer_group
        ]


def _wrong(record: RecordBase) -> str | None:
    return record.perturbed[0] if isinstance(record, QA) and record.perturbed else None


__all__ = [
    "Bilevel",
    "Outer",
    "PreferenceLoss",
    "Solution",
    "mirror_step",
    "most_helpful",
    "standardised",
]
