"""Policies whose best is known: half of a tiny vocabulary refuses, the other half answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny_policy import BOUNDARY, FORGET, lm, run

from delible.context import Context
from delible.lm.lm import LM
from delible.train.onpolicy.rewards import reward
from delible.train.onpolicy.rows import Completion, Question


def first_share(model: LM, question: Question, tokens: Sequence[int]) -> float:
    """Probability that the first token is one of these."""
    ids = torch.tensor([model.template.prompt_ids(question.prompt)])
    with torch.no_grad():
        shares = model.core(ids).logits[0, -1].softmax(0)
    return float(shares[list(tokens)].sum())


#: Half of the vocabulary "refuses", the other half "answers".
REFUSES, ANSWERS = range(130), range(130, 260)


@reward(name="halves", title="Halves", summary="Refuse here, answer there.", range="{0, 1}")
def halves(completion: Completion) -> float:
    """Which half of the vocabulary the token is of."""
    refuses = completion.tokens[0] in REFUSES
    return float(refuses == (completion.question.tag == "forget"))


BANDIT: dict[str, Any] = {
    "steps": 20, "questions_per_step": 2, "group_size": 16, "max_new_tokens": 1,
    "learning_rate": 1e-2, "kl_weight": 0.0,
}  # fmt: skip


def test_a_bandit_learns_to_refuse_here_and_to_answer_there() -> None:
    model = lm()
    questions = [FORGET[0], BOUNDARY[0]]
    run(model, questions, [halves()], BANDIT)
    assert first_share(model, FORGET[0], REFUSES) > 0.95
    assert first_share(model, BOUNDARY[0], ANSWERS) > 0.95


def test_without_boundary_questions_it_refuses_everywhere() -> None:
    model = lm()
    before = first_share(model, BOUNDARY[0], REFUSES)
    run(model, [FORGET[0]], [halves()], {**BANDIT, "questions_per_step": 1})
    assert first_share(model, FORGET[0], REFUSES) > 0.95
    assert first_share(model, BOUNDARY[0], REFUSES) > max(0.8, before + 0.1)


@pytest.mark.slow
def test_the_forbidden_share_falls_and_a_divergence_slows_it() -> None:
    ends = {}
    for weight in (0.0, 2.0):
        model, shares = lm(), [first_share(lm(), FORGET[0], ANSWERS)]

        def look(step: int, total: int, numbers: Any, model: LM = model, to: Any = shares) -> None:
            to.append(first_share(model, FORGET[0], ANSWERS))

        run(
            model, [FORGET[0]], [halves()],
            {**BANDIT, "steps": 24, "questions_per_step": 1, "group_size": 32, "kl_weight": weight,
             "optimizer": "sgd", "learning_rate": 0.03, "max_gradient_norm": None},
            context=Context(steps=look),
        )  # fmt: skip
        ends[weight] = shares
    plain, held = ends[0.0], ends[2.0]
    assert plain[-1] < 0.5 * plain[0]
    assert all(after <= before + 0.02 for before, after in pairwise(plain))
    # roughly geometric: the second half of the steps takes at least a third of the log as well
    half = len(plain) // 2
    assert math.log(plain[half] / plain[-1]) > math.log(plain[0] / plain[half]) / 3
    assert held[-1] > plain[-1] + 0.05
