"""Invariant unlearning (ILU): later fine-tuning on something else should have nothing to correct.

    loss = host loss + lambda * ( d/dw CE(w * z) at w = 1 )^2

CE is the mean answer loss on rows of an unrelated task, z their logits. The factor w is the dummy
classifier of invariant risk minimisation: where the derivative is 0, fine-tuning on the task has
no first-order reason to rescale what the model says, and unlearning survives it. In closed form

    d/dw CE(w * z) at w = 1  =  mean over answer tokens of ( sum_v p_v z_v  -  z_y )

so one ordinary pass over a few rows is all it costs; no second derivative, no further buffer.

The unrelated task is arithmetic: word problems that are made afresh for every step, from the run's
seed, so that nothing is downloaded and no row of an audit or of a utility measure is trained on.

Paper: arXiv 2506.01339 (on GSM8K). Reference code: github.com/OPTML-Group/Unlearn-ILU holds no
penalty; the form is that of the paper's equation and of IRMv1 (arXiv 1907.02893).
Deviations: generated problems instead of GSM8K; the weight of the penalty is a guess.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from delible.records import QA
from delible.registry import register
from delible.train.passes import Passes
from delible.train.reference import Reference
from delible.train.row import Row
from delible.train.rows import make_rows
from delible.train.slots import Harden
from delible.train.step import make_step

_NAMES = ("Anna", "Bilal", "Carla", "Dmitri", "Emeka", "Farah", "Goran", "Hana")
_THINGS = ("apples", "pencils", "stamps", "marbles", "cards", "shells", "tickets", "buttons")
#: Question, worked answer, and the operation behind it.
_PROBLEMS = (
    (
        "{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?",
        "{a} + {b} = {c}. {name} has {c} {things}.",
        int.__add__,
    ),
    (
        "{name} had {c} {things} and gave {b} of them away. How many {things} are left?",
        "{c} - {b} = {a}. {a} {things} are left.",
        int.__add__,
    ),
    (
        "There are {a} boxes with {b} {things} each. How many {things} does {name} count?",
        "{a} * {b} = {c}. {name} counts {c} {things}.",
        int.__mul__,
    ),
    (
        "{name} shares {c} {things} equally among {a} friends. How many does each friend get?",
        "{c} / {a} = {b}. Each friend gets {b} {things}.",
        int.__mul__,
    ),
)


def word_problems(count: int, generator: torch.Generator) -> list[QA]:
    """Arithmetic word problems with their worked answers."""

    def draw(size: int) -> int:
        return int(torch.randint(size, (), generator=generator))

    made = []
    for _ in range(count):
        question, answer, operation = _PROBLEMS[draw(len(_PROBLEMS))]
        a, b = 2 + draw(18), 2 + draw(18)
        words = {"name": _NAMES[draw(len(_NAMES))], "things": _THINGS[draw(len(_THINGS))]}
        numbers = {"a": a, "b": b, "c": operation(a, b)}
        made.append(
            QA(
                question=question.format(**words, **numbers),
                answer=answer.format(**words, **numbers),
            )
        )
    return made


def scale_derivative(
    logits: Float[Tensor, "tokens vocab"], targets: Int[Tensor, " tokens"]
) -> Float[Tensor, " tokens"]:
    """d/dw of each token's loss -log softmax(w * logits)[target] at w = 1, in nats."""
    logits = logits.float()
    expected = (logits.softmax(dim=1) * logits).sum(dim=1)
    return expected - logits.gather(1, targets[:, None])[:, 0]


@register(
    kind="harden",
    name="ilu",
    title="Invariant unlearning (ILU)",
    summary="Makes the answer loss on arithmetic stationary, to hold against later fine-tuning.",
    paper="2506.01339",
    year=2025,
    family="invariance",
    intention="as host",
    mechanism="wrapper",
    needs=("forget", "weights"),
    changes="weights",
    reversible=False,
    weakest="relearning on the forgotten data",
    badges=("variant", "experimental"),
    variant="Generated arithmetic instead of GSM8K; the published code lacks the penalty.",
)
class ILU(Harden):
    """Options of invariant unlearning."""

    penalty: float = Field(1.0, ge=0, description="Weight of the squared derivative (lambda).")
    problems: int = Field(4, ge=1, description="Word problems per step, new ones each time.")

    def forget(self, passes: Passes) -> None:
        passes.forget()
        if self.penalty > 0:
            self._penalise(passes)

    def _penalise(self, passes: Passes) -> None:
        problems = word_problems(self.problems, passes.generator("harden.ilu"))
        rows: list[Row] = make_rows(passes.lm.template, problems)
        step = make_step(
            passes.lm, passes.forward, {"unrelated": rows}, {"unrelated": ("answers",)}, Reference()
        )
        group = step.groups["unrelated"]
        # every process takes all of these few rows, so the mean over processes is the value itself
        derivative = group.map_logits(scale_derivative).sum() / group.mask.sum()
        passes.backward(self.penalty * derivative.square())
        passes.totals.tokens += step.tokens
