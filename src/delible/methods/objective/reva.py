"""ReVa: hidden states of forget rows are pulled to the model's own state of not knowing.

    r    = mean over N declined questions of h_last           at the output of one block
    loss = sum over positions of mean over hidden dimensions of (h_t - scale * r)^2

r is found once, before the first step: questions that nobody can answer are asked with a system
prompt for honesty, and of those that the model declines the state at the prompt's last token is
taken. It is RMU with a target that means something: forgotten subjects end where refusals begin.

Order matters: start from a model that has unlearned (RMU and its like). On a model that still
knows, this teaches to refuse and removes little.

Paper: arXiv 2605.08765. Reference code: github.com/OPTML-Group/ReVa.
Deviations: questions and system prompt are our own; padding does not count, positions are averaged
over the whole step. Where the model declines fewer than ``least`` questions, the state is that
after all of them, which is said (the paper does not tell; its models decline enough).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from delible.lm.hooks import capture, truncated
from delible.prompts import read_lines, read_text
from delible.registry import register
from delible.system.asks import Decoding, Prompt
from delible.train.losses import Objective
from delible.train.reference import Reference
from delible.train.representation import squared_distance
from delible.train.row import Row, Unit
from delible.train.step import Reads, Step
from delible.watching import Stage, watched
from delible.world.filters import is_refusal

if TYPE_CHECKING:
    from delible.lm.lm import LM

logger = logging.getLogger(__name__)

VECTOR = "refusal"


def questions(count: int) -> list[Prompt]:
    """The first questions that nobody can answer, asked for honesty."""
    system = read_text("reva_system.txt").strip()
    return [Prompt.ask(line, system=system) for line in read_lines("reva_questions.txt")[:count]]


def declined(lm: LM, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Prompt]:
    """The prompts whose greedy answer is a refusal, in order."""
    answers = lm.generate(prompts, Decoding(max_new_tokens))
    return [
        prompt
        for prompt, answer in zip(prompts, answers, strict=True)
        if isinstance(answer, str) and is_refusal(answer)
    ]


@torch.no_grad()
def mean_last_state(
    lm: LM, prompts: Sequence[Prompt], layer: int, stage: Stage
) -> Float[Tensor, " hidden"]:
    """Mean output of a block at the prompts' last tokens, fp32 on the CPU."""
    path = lm.anatomy.block_path(layer)
    backbone = lm.core.get_submodule(lm.anatomy.backbone)
    found = []
    each = ([prompt] for prompt in prompts)
    with (
        lm.evaluating(), lm.computing(), truncated(lm.core, lm.anatomy, layer + 1),
        capture(lm.core, [path]) as seen,
    ):  # fmt: skip
        for (prompt,) in watched(each, f"states of {len(prompts)} prompts", len(prompts), stage):
            ids = torch.tensor([lm.template.prompt_ids(prompt)], device=lm.device)
            backbone(input_ids=ids, use_cache=False)
            found.append(seen[path].reshape(ids.shape[1], -1)[-1].double().cpu())
    return torch.stack(found).mean(dim=0).float()


@register(
    kind="objective",
    name="reva",
    title="Refusal vectors (ReVa)",
    summary="Pulls the forget rows' hidden states at one layer to the model's own state of not "
    "knowing.",
    paper="2605.08765",
    year=2026,
    family="representation",
    intention="removal",
    mechanism="PO-rep",
    needs=("forget",),
    changes="weights",
    reversible=False,
    retrain_goal=False,
    weakest="multiple choice, where it does not decline; on a model that still knows, relearning",
    badges=("parity", "variant"),
    variant="Own questions; all real positions count, padding does not.",
)
class ReVa(Objective):
    """Options of ReVa."""

    depth: float = Field(
        18 / 31, ge=0, le=1, description="Depth of the pulled block: 0 the first, 1 the last."
    )
    scale: float = Field(1.0, gt=0, description="Length of the target, in refusal vectors.")
    refusals: int = Field(20, ge=1, description="Declined questions that are averaged, at most.")
    least: int = Field(
        10, ge=1, description="Where fewer are declined, all questions are averaged."
    )
    questions: int = Field(62, ge=1, le=62, description="Questions that are asked.")
    max_new_tokens: int = Field(64, ge=1, description="Tokens of an answer, at most.")

    unit: ClassVar[Unit] = "position"

    def reads(self, lm: LM) -> tuple[Reads, ...]:
        return (lm.anatomy.layer_at(self.depth),)

    def learn(
        self,
        lm: LM,
        rows: Mapping[str, Sequence[Row]],
        reference: Reference,
        seed: int,
        stage: Stage,
    ) -> dict[str, Tensor]:
        asked = questions(self.questions)
        chosen = declined(lm, asked, self.max_new_tokens)[: self.refusals]
        if len(chosen) < min(self.least, self.refusals):
            logger.warning(
                f"reva: the model declines {len(chosen)} of {len(asked)} questions that nobody can "
                f"answer, fewer than {self.least}: its state after all of them stands for not "
                "knowing."
            )
            chosen = asked
        else:
            logger.info(f"reva: the refusal vector is a mean over {len(chosen)} declined questions")
        return {VECTOR: mean_last_state(lm, chosen, lm.anatomy.layer_at(self.depth), stage)}

    def loss(self, step: Step) -> Float[Tensor, " rows"]:
        forget = step.forget
        states = forget.hidden(forget.lm.anatomy.layer_at(self.depth))
        target = self.scale * forget.reference.learned(self.full_name, VECTOR)
        return squared_distance(states, target[None, None], forget.positions)
