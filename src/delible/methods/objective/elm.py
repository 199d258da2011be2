"""Erasure of language memory (ELM): teach what a novice would say, by the model's own judgement.

    log p*(v) = log p_T(v) + eta_t * (log p_T(v | novice) - log p_T(v | expert)) + const
    loss = erase * - sum over answer tokens t of sum_v p*_t(v) * log p(v)
           + consistency * - log p(continuation, token by token)

p_T is the reference at a temperature, behind nothing, behind "written by somebody who knows nothing
about the topic", and behind "written by a specialist in it". Only the ``top`` likeliest entries of
p* are kept and renormalised. eta rises from 1 at an answer's first token to ``eta`` at its last, so
that an answer departs more and more. The first term is averaged over the forget answers' tokens,
the second over those of the role ``target``: fluent continuations that keep the model from falling
apart where it no longer knows (``generate: diversions``).

Paper: arXiv 2410.02760. Reference code: github.com/rohitgandikota/erasing-llm.
Deviations: answer tokens only, where released code takes every position of a plain text; a passage
is an answer as a whole. The topic is a record's subject instead of one list of keywords.
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from delible.prompts import read_lines
from delible.records import RecordBase
from delible.registry import register
from delible.train.losses import Objective, Role
from delible.train.row import Unit
from delible.train.step import Step

if TYPE_CHECKING:
    from delible.lm.lm import LM

#: What a record is about that names no subject.
UNNAMED = "the subject of the text below"


def novice_target(
    reference: Float[Tensor, "tokens vocab"],
    expert: Float[Tensor, "tokens vocab"],
    novice: Float[Tensor, "tokens vocab"],
    eta: Float[Tensor, " tokens"],
    temperature: float,
    top: int,
) -> Float[Tensor, "tokens vocab"]:
    """p* per token: 0 outside its ``top`` likeliest entries; sums to 1.

    Args:
        reference, expert, novice: Logits of the reference model behind nothing and behind the two
            prefixes.
        eta: How far towards the novice, per token; 0 is the reference itself.
    """
    plain, knows, lacks = (
        (logits.float() / temperature).log_softmax(dim=1) for logits in (reference, expert, novice)
    )
    moved = plain + eta[:, None] * (lacks - knows)
    best, where = moved.topk(min(top, moved.shape[1]), dim=1)
    return torch.zeros_like(moved).scatter_(1, where, best.softmax(dim=1))


def ramp(mask: Tensor, eta: float) -> Float[Tensor, "rows answer"]:
    """From 1 at each row's first answer token to ``eta`` at its last; 1 where there is but one."""
    last = (mask.sum(dim=1, keepdim=True) - 1).clamp_min(1)
    share = torch.arange(mask.shape[1], device=mask.device)[None] / last
    return 1 + (eta - 1) * share.clamp(max=1.0)


@register(
    kind="objective",
    name="elm",
    title="Erasure of language memory (ELM)",
    summary="Teaches the answers' tokens as the start model thinks a novice would write them.",
    paper="2410.02760",
    year=2024,
    family="distillation",
    intention="removal",
    mechanism="PO-out",
    needs=("forget", "reference"),
    changes="weights",
    reversible=False,
    retrain_goal=False,
    weakest="relearning; facts that the prefixes do not tell apart",
    badges=("parity", "variant"),
    variant="Answer tokens only; the topic is each record's subject.",
)
class ELM(Objective):
    """Options of ELM."""

    topic: str | None = Field(
        None, description="What expert and novice differ in; default: each record's own subject."
    )
    eta: float = Field(1000.0, ge=1, description="How far the last token goes towards the novice.")
    temperature: float = Field(1.2, gt=0, description="Of the reference's three readings.")
    top: int = Field(50, ge=1, description="Likeliest entries of the target that are kept.")
    erase: float = Field(1.0, ge=0, description="Weight of the novice's distribution.")
    consistency: float = Field(1.0, ge=0, description="Weight of the fluent continuations.")

    unit: ClassVar[Unit] = "answer_token"
    roles: ClassVar[tuple[Role, ...]] = ("forget", "target")

    def reference_kinds(self, lm: LM) -> tuple[str, ...]:
        return ("answers", "answers@expert", "answers@novice")

    def contexts(self, record: RecordBase) -> Mapping[str, str]:
        random = Random(f"elm/{record.digest}")
        topic = self.topic or record.subject or UNNAMED
        return {
            name: random.choice(read_lines(f"elm_{name}.txt")).replace("{topic}", topic)
            for name in ("expert", "novice")
        }

    def loss(self, step: Step) -> Float[Tensor, " rows"]:
        forget, target = step.forget, step.target

        def erased(
            logits: Tensor, targets: Int[Tensor, " tokens"], reference: Tensor, expert: Tensor,
            novice: Tensor, eta: Tensor,
        ) -> Tensor:  # fmt: skip
            wanted = novice_target(reference, expert, novice, eta, self.temperature, self.top)
            return -(wanted * logits.float().log_softmax(dim=1)).sum(dim=1)

        values = forget.map_logits(
            erased, with_reference=True, contexts=("expert", "novice"),
            marks=ramp(forget.mask, self.eta),
        ).sum(dim=1)  # fmt: skip
        # the engine divides by the forget answers' tokens, and this term is a mean over others
        share = forget.units("answer_token") / target.units("answer_token")
        return self.erase * values - self.consistency * share * target.logprob_sum
