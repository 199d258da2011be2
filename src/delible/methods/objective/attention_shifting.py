"""Attention shifting (AS): forget rows' attention leaves the tokens that carry facts.

    A'_ij = (1 - strength * I_j) A_ij / sum_k (1 - strength * I_k) A_ik      A: of the reference
    loss  = mean over layers, heads and queries i of KL(A_i || A'_i)         A: of the model

I marks important tokens of question and answer: content words, or those whose absence makes the
model least sure of the answer. No answer becomes more or less likely by itself, so nothing is made
up and nothing breaks down: what the fact would be recalled by is not looked at.

Paper: arXiv 2510.17210. Reference code: none was found.
Deviations: no tagger is used; content words are all but a list of English function words, names
and numbers first, up to ``share`` of a row's own tokens. The chat template's tokens and the first
position are never important: attention needs somewhere to go. Averages are over all queries of a
step, not per sample first.

Memory: the plain attention's weights of all layers, with gradient, and the reference's for every
row (layers x heads x sequence^2 bytes); keep rows short (``max_length``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from delible.registry import register
from delible.train.attending import Importance, important, shift_loss
from delible.train.losses import Objective
from delible.train.reference import Reference
from delible.train.row import Row, Unit
from delible.train.step import Reads, Step
from delible.watching import Stage

if TYPE_CHECKING:
    from delible.lm.lm import LM


@register(
    kind="objective",
    name="attention_shifting",
    title="Attention shifting (AS)",
    summary="Moves the forget rows' attention away from the tokens that carry their facts.",
    paper="2510.17210",
    year=2025,
    family="representation",
    intention="removal",
    mechanism="PO-rep",
    needs=("forget", "reference"),
    changes="weights",
    reversible=False,
    retrain_goal=False,
    weakest="relearning, and whatever looks inside: facts are not read, but still there",
    badges=("parity", "variant"),
    variant="Content words by a list instead of a tagger.",
)
class AttentionShifting(Objective):
    """Options of the shift."""

    strength: float = Field(
        0.99, ge=0, le=1, description="Share of the weight that important tokens lose."
    )
    importance: Importance = Field(
        "content", description="Important tokens: content words, or by the change of entropy when "
        "a token is left out (one pass per token).",
    )  # fmt: skip
    share: float = Field(
        0.6, gt=0, lt=1, description="Important tokens among those of question and answer, at most."
    )

    unit: ClassVar[Unit] = "position"

    def reads(self, lm: LM) -> tuple[Reads, ...]:
        return tuple(f"attention.{layer}" for layer in range(lm.anatomy.layers))

    def reference_kinds(self, lm: LM) -> tuple[str, ...]:
        return tuple(f"attention.{layer}" for layer in range(lm.anatomy.layers))

    def learn(
        self,
        lm: LM,
        rows: Mapping[str, Sequence[Row]],
        reference: Reference,
        seed: int,
        stage: Stage,
    ) -> dict[str, Tensor]:
        return important(lm, rows["forget"], self.share, self.importance, stage)

    def loss(self, step: Step) -> Float[Tensor, " rows"]:
        layers = range(step.forget.lm.anatomy.layers)
        return shift_loss(step.forget, self.full_name, -self.strength, layers)
