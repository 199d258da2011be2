"""Targeted reasoning unlearning: teach a reasoned refusal, and lower the original answer.

    loss = mean over target tokens of - log p(target | x)
           + ascent_weight * ascent(forget rows)

The target is a trace that explains why the question falls into the removed scope, and a refusal
that offers something else. The ascent term (gradient ascent, or any forget loss by name) removes
what is stored; what it breaks, the supervised term holds. Each term has its own mean over the
optimiser step. The paper's retain term is ``keep: nll`` with weight ascent_weight * lambda.

Paper: arXiv 2603.09980 (no public code). Deviations: token means instead of the formula's sums,
which let long traces dominate; ``stop_ascent_at`` (an extension, off by default) leaves rows alone
whose token-mean loss has passed it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, cast

from jaxtyping import Float
from pydantic import Field, field_validator
from torch import Tensor

from delible.component import build
from delible.errors import DelibleError
from delible.registry import register
from delible.train.losses import Objective, Role
from delible.train.row import Unit
from delible.train.step import Reads, Step

if TYPE_CHECKING:
    from delible.lm.lm import LM


@register(
    kind="objective",
    name="tru",
    title="Targeted reasoning unlearning",
    summary="Teaches a reasoned refusal and descends from the original answer at the same time.",
    paper="2603.09980",
    year=2026,
    family="relabelling",
    intention="suppression",
    mechanism="PO-out",
    needs=("forget",),
    changes="weights",
    reversible=False,
    retrain_goal=False,
    weakest="the reasoning trace may tell the secret; refusals spread to retain questions",
    badges=("experimental", "variant"),
    variant="Token means per term instead of sums over sequences.",
)
class TRU(Objective):
    """Options of TRU."""

    ascent_weight: float = Field(1.0, ge=0, description="Weight of the ascent term; 0: only teach.")
    target_weight: float = Field(1.0, ge=0, description="Weight of the taught target.")
    ascent: str | dict[str, Any] = Field(
        "gradient_ascent", description="Forget loss of the ascent term: a name or a mapping."
    )
    stop_ascent_at: float | None = Field(
        None, gt=0, description="Leave rows alone from this mean loss in nats per token on."
    )

    unit: ClassVar[Unit] = "answer_token"
    roles: ClassVar[tuple[Role, ...]] = ("target", "forget")

    @field_validator("ascent")
    @classmethod
    def _reads_forget_rows_only(cls, value: str | dict[str, Any]) -> str | dict[str, Any]:
        try:
            part = build("objective", value)
        except DelibleError as error:
            raise ValueError(str(error)) from None
        if part.roles != ("forget",) or part.instructed:
            raise ValueError(f"'{part.card.name}' reads more than the forget rows")
        return value

    @property
    def part(self) -> Objective:
        """The ascent term."""
        return cast(Objective, build("objective", self.ascent))

    def reads(self, lm: LM) -> tuple[Reads, ...]:
        return tuple(dict.fromkeys(("answers", *self.part.reads(lm))))

    def reference_kinds(self, lm: LM) -> tuple[str, ...]:
        return self.part.reference_kinds(lm) if self.ascent_weight else ()

    def loss(self, step: Step) -> Float[Tensor, " rows"]:
        values = self.target_weight * -step.target.logprob_sum
        if not self.ascent_weight:
            return values
        part, forget = self.part, step.forget
        lowered = part.loss(step)
        if self.stop_ascent_at is not None:
            mean = -forget.logprob_sum.detach() / forget.token_count
            lowered = lowered * (mean < self.stop_ascent_at)
        # The engine divides by the target's tokens: the ascent term gets a mean of its own.
        mine = step.units("target", "answer_token") / step.units("forget", part.unit)
        return values + self.ascent_weight * mine * lowered
