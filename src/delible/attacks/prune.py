"""Pruning: cuts weights of a copy; a thin layer that hides knowledge may go before the knowledge.

By weight times activation, with X the inputs of a linear layer on generic text (never on forget
rows):

    s_ij = |W_ij| ||X_j||_2;      in every output channel i the smallest ``share`` becomes 0

Or only what the model needs to answer forget questions as it does, and nothing else: with s^F from
its own answers to them and s^G from generic rows,

    cut = {top ``share`` of s^F in a matrix} without {top ``utility_share`` of s^G in it}

where s may also be |W_ij dL/dW_ij|, the mean over rows of the loss of the answer. Of a system that
refuses, its own answers are the refusals; of the original they are the knowledge, so that the
original loses it too and the audit says that the attack has no power.

Embeddings, head, norms, biases and routers stay; so do experts that are kept in one tensor, whose
inputs cannot be told apart.

Papers: arXiv 2306.11695 (weight times activation), 2402.05162 and 2409.18025 (set differences).
Reference code: github.com/locuslab/wanda, github.com/ethz-spylab/unlearning-vs-safety.
Deviations: the generic text is built in (general knowledge, plain sentences) instead of C4; a few
points instead of a grid of 45; set differences are taken by matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from delible.cards import Depth
from delible.errors import DataError
from delible.lm.lm import LM
from delible.lm.matrices import linear_weights
from delible.measure.attack import AttackContext, Budget, ModelAttack
from delible.records import RecordBase
from delible.registry import register
from delible.system.asks import Decoding
from delible.system.questions import ask
from delible.train.activations import input_norms
from delible.train.gradients import Gradients
from delible.train.randomness import generator
from delible.train.row import Row
from delible.train.rows import make_row, make_rows
from delible.world import general, unrelated

#: Tokens of the model's own answers.
ANSWER_TOKENS = 24


def smallest(scores: Float[Tensor, "output input"], share: float) -> Bool[Tensor, "output input"]:
    """True for the given share of each output channel's smallest scores."""
    places = scores.topk(round(share * scores.shape[1]), dim=1, largest=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, places, True)


def largest(scores: Float[Tensor, "output input"], share: float) -> Bool[Tensor, "output input"]:
    """True for the given share of a matrix's largest scores."""
    flat = scores.reshape(-1)
    places = flat.topk(round(share * flat.numel())).indices
    return torch.zeros_like(flat, dtype=torch.bool).scatter_(0, places, True).reshape(scores.shape)


@register(
    kind="attack",
    name="prune",
    title="Pruning",
    summary="Cuts weights that matter least, or that only forget questions need.",
    paper="2306.11695",
    year=2023,
    family="pruning",
    needs=("forget", "weights"),
    changes="weights",
    reversible=True,
    capability="weights",
    depth="standard",
    badges=("variant",),
    variant="Built-in generic text instead of C4, and a few points instead of a grid.",
)
class Prune(ModelAttack):
    """Options of pruning."""

    select: Literal["least", "forget_only", "random"] = Field(
        "least",
        description="Cut what matters least, what only forget questions need, or (as a control) "
        "as many weights at random.",
    )
    importance: Literal["activation", "gradient"] = Field(
        "activation",
        description="Score of a weight: its magnitude times its inputs', or times its gradient.",
    )
    share: float = Field(
        0.3,
        gt=0,
        lt=1,
        description="Share of each output channel that is cut; of forget_only the share of each "
        "matrix that matters most for forget questions.",
    )
    utility_share: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="Share of each matrix that matters most elsewhere and is spared (forget_only).",
    )
    rows: int = Field(16, ge=1, description="Generic rows, and forget rows, that are read.")

    def variants(self, depth: Depth = "standard") -> Sequence[Mapping[str, object]]:
        """One share and its control; then more shares, and set differences."""
        standard = ({"share": 0.3},)
        if depth != "deep":
            return standard
        sets = {"select": "forget_only", "share": 0.05}
        return (
            {"share": 0.1},
            *standard,
            {"share": 0.5},
            {"select": "random", "share": 0.3},
            sets,
            {**sets, "importance": "gradient", "rows": 8},
        )

    def variant_title(self) -> str:
        """Such as "30 % of the weights"."""
        if self.select == "random":
            return f"{self.share:.0%} at random"
        by = ", by gradients" if self.importance == "gradient" else ""
        if self.select == "least":
            return f"{self.share:.0%} that matter least{by}"
        return f"{self.share:.0%} for forget questions, without {self.utility_share:.0%}{by}"

    @property
    def control(self) -> bool:
        """Cutting at random finds nothing in particular."""
        return self.select == "random"

    def budget(self, context: AttackContext) -> Budget:
        """A pass per row that is read, and a short answer per forget row of forget_only."""
        if self.select == "random":
            return Budget()
        asked = min(self.rows, len(context.forget)) if self.select == "forget_only" else 0
        return Budget(queries=asked, tokens=asked * ANSWER_TOKENS, steps=self.rows + asked)

    def apply(self, lm: LM, context: AttackContext) -> LM:
        """The copy without these weights.

        Raises:
            DataError: No forget question is answered (forget_only).
        """
        twin = lm.copy()
        twin.merge_adapter()  # or an adapter would escape the attack
        weights = {name: one for name, one in linear_weights(twin).items() if one.ndim == 2}
        cut, count = 0, sum(weight.numel() for weight in linear_weights(twin).values())
        masks = self._masks(twin, weights, context)
        with torch.no_grad():
            for name, mask in masks.items():
                weights[name].masked_fill_(mask, 0.0)
                cut += int(mask.sum())
        twin.touch()
        context.numbers["share of the weights that were cut"] = cut / count
        return twin

    def _masks(
        self, lm: LM, weights: Mapping[str, Tensor], context: AttackContext
    ) -> dict[str, Tensor]:
        if self.select == "random":
            random = generator(context.seed, "prune.random")
            return {
                name: smallest(torch.rand(weight.shape, generator=random), self.share).to(
                    weight.device
                )
                for name, weight in weights.items()
            }
        texts = (*general(), *unrelated())
        generic = self._scores(lm, weights, make_rows(lm.template, _spaced(texts, self.rows)))
        if self.select == "least":
            return {name: smallest(score, self.share) for name, score in generic.items()}
        needed = self._scores(lm, weights, self._own_answers(lm, context))
        return {
            name: largest(score, self.share) & ~largest(generic[name], self.utility_share)
            for name, score in needed.items()
            if name in generic
        }

    def _scores(
        self, lm: LM, weights: Mapping[str, Tensor], rows: Sequence[Row]
    ) -> dict[str, Float[Tensor, "output input"]]:
        """How much each weight matters for rows, by matrix."""
        if self.importance == "activation":
            norms = input_norms(lm, rows)
            return {
                name: weight.float().abs() * norms[name]
                for name, weight in weights.items()
                if name in norms
            }
        transposed = {
            name for name, weight in weights.items() if not _same_layout(lm, name, weight)
        }
        found = {
            name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()
        }
        gradients = Gradients(lm)
        for row in rows:
            each = gradients.total([row])
            for name, weight in weights.items():
                mine = each[name].mT if name in transposed else each[name]
                found[name] += (weight * mine).abs().float() / len(rows)
        return found

    def _own_answers(self, lm: LM, context: AttackContext) -> list[Row]:
        """The model's own greedy answers to forget questions.

        Raises:
            DataError: It gives none.
        """
        asked = [
            (record, prompt)
            for record in _spaced(context.forget, self.rows)
            if (prompt := ask(record)) is not None
        ]
        answers = lm.generate([prompt for _, prompt in asked], Decoding(ANSWER_TOKENS))
        rows = [
            make_row(lm.template, prompt, answer, index, record)
            for index, ((record, prompt), answer) in enumerate(zip(asked, answers, strict=True))
            if isinstance(answer, str) and answer.strip()
        ]
        if not rows:
            raise DataError(
                "the model answers no forget question, so nothing says which weights do.",
                where="attack 'prune'",
                hint="Cut what matters least instead (select: least).",
            )
        return rows


def _same_layout(lm: LM, name: str, weight: Tensor) -> bool:
    """Whether a matrix with outputs as rows is the parameter itself, not its transpose."""
    return weight.stride() == lm.core.get_parameter(name).stride()


def _spaced(records: Sequence[RecordBase], count: int) -> list[RecordBase]:
    """At most so many records, evenly spaced."""
    step = max(1.0, len(records) / count)
    return [records[int(place * step)] for place in range(min(count, len(records)))]
