"""Retain loss of attention shifting: retain rows look a little more at what carries their facts.

    A'_ij = (1 + strength * I_j) A_ij / sum_k (1 + strength * I_k) A_ik      A: of the reference
    loss  = mean over layers, heads and queries i of KL(A_i || A'_i)         A: of the model

I marks important tokens as the objective does. With strength 0 attention is held where it was.

Paper: arXiv 2510.17210. Reference code: none was found. Deviations: as the objective; the paper
says "slightly enhanced", so 0.2 and the form, which mirrors the objective's, are assumptions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from delible.registry import register
from delible.train.attending import Importance, important, shift_loss
from delible.train.losses import Keep
from delible.train.reference import Reference
from delible.train.row import Row, Unit
from delible.train.step import Group, Reads
from delible.watching import Stage

if TYPE_CHECKING:
    from delible.lm.lm import LM


@register(
    kind="keep",
    name="attention_strengthening",
    title="Attention of retain rows",
    summary="Holds the retain rows' attention, a little stronger on the tokens that carry facts.",
    paper="2510.17210",
    year=2025,
    family="retain",
    needs=("retain", "reference"),
    changes="weights",
    badges=("parity", "variant"),
    variant="Content words by a list instead of a tagger.",
)
class AttentionStrengthening(Keep):
    """Options of the retained attention."""

    strength: float = Field(
        0.2, ge=0, description="Share of their weight that important tokens gain."
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
        return important(lm, rows["retain"], self.share, self.importance, stage)

    def loss(self, retain: Group) -> Float[Tensor, " rows"]:
        layers = range(retain.lm.anatomy.layers)
        return shift_loss(retain, self.full_name, self.strength, layers)
