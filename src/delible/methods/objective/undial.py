"""UNDIAL: distils the reference model into itself, with the true token's logit lowered.

    q_t  = softmax(z_ref_t - beta * onehot(y_t))
    loss = - sum over answer tokens of sum_v q_t(v) * log p_t(v)

averaged over the answer tokens of the step; z_ref_t are the reference's logits that predict
answer token y_t, p_t the trained model's distribution. The target is fixed, so training converges
(to the reference minus its memorised tokens) instead of diverging, and without retain rows.
With ``focus: names`` beta is 0 at tokens outside names and numbers: those are only distilled.

Paper: arXiv 2402.10052. Reference: github.com/dong-river/LLM_unlearning,
github.com/locuslab/open-unlearning.
Deviations: open-unlearning averages over every position, prompt and padding included, and takes
the label -100 there for a token, so that vocabulary entry V - 100 is penalised; only answer
positions count here. There is no switch for that form: what a loss may read of the reference are
answer positions, and the prompt's positions are what it would need.
The paper's focused variant finds entities, or noun phrases, with a tagger (spaCy's small English
model). ``focus: names`` follows a written rule instead, which needs no download: capitals that no
sentence start explains, and digits (``train/keywords.py``), every occurrence, first tokens
included. So common nouns are missed. Released code lowers the logit at every token and gives the
others' loss less weight, or none; here their logits stay and hold the model to the reference.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from delible.registry import register
from delible.train.losses import Objective
from delible.train.row import Row, Unit
from delible.train.step import Step


def adjusted_target(
    reference_logits: Float[Tensor, "tokens vocab"],
    targets: Int[Tensor, " tokens"],
    beta: float,
    focus: Bool[Tensor, " tokens"] | None = None,
) -> Float[Tensor, "tokens vocab"]:
    """The reference's distribution with the logit of each target lowered by ``beta``.

    ``focus``: of these targets only.
    """
    reference_logits, true = reference_logits.float(), targets[:, None]
    lowered = reference_logits.gather(1, true) - (beta if focus is None else beta * focus[:, None])
    return reference_logits.scatter(1, true, lowered).softmax(dim=1)


def undial(
    logits: Float[Tensor, "tokens vocab"],
    reference_logits: Float[Tensor, "tokens vocab"],
    targets: Int[Tensor, " tokens"],
    beta: float,
    focus: Bool[Tensor, " tokens"] | None = None,
) -> Float[Tensor, " tokens"]:
    """UNDIAL loss per token in nats: the target's entropy at least, reached at the target."""
    target = adjusted_target(reference_logits, targets, beta, focus)
    return -(target * logits.float().log_softmax(dim=1)).sum(dim=1)


@register(
    kind="objective",
    name="undial",
    title="Self-distillation with adjusted logits (UNDIAL)",
    summary="Distils the start model into itself with the forget tokens' logits lowered.",
    paper="2402.10052",
    year=2024,
    family="divergence",
    intention="removal",
    mechanism="PO-out",
    needs=("forget", "reference"),
    changes="weights",
    reversible=False,
    retrain_goal=False,
    weakest="paraphrases; relearning",
    badges=("parity", "variant"),
    variant=(
        "Answer positions only; one published form also averages over prompts and padding. "
        "`focus: names` goes by capitals and digits, not by a tagger, and distils the other tokens."
    ),
)
class UNDIAL(Objective):
    """Options of UNDIAL."""

    beta: float = Field(
        10.0,
        ge=0,
        description="Nats by which the true token's logit is lowered; 0 changes nothing.",
    )

    focus: Literal["all", "names"] = Field(
        "all",
        description="Tokens whose logit is lowered: all, or those of names and numbers (capitals "
        "and digits; answers without any are then left as they are).",
    )

    unit: ClassVar[Unit] = "answer_token"
    reference: ClassVar[tuple[str, ...]] = ("answers",)

    def concerns(self, row: Row) -> bool:
        return self.focus == "all" or any(row.names)

    def loss(self, step: Step) -> Float[Tensor, " rows"]:
        def distil(
            logits: Tensor, targets: Tensor, reference_logits: Tensor, focus: Tensor | None = None
        ) -> Tensor:
            return undial(logits, reference_logits, targets, self.beta, focus)

        marks = step.forget.names if self.focus == "names" else None
        return step.forget.map_logits(distil, with_reference=True, marks=marks).sum(dim=1)
