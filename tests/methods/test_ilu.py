"""Invariant unlearning: the derivative in closed form, its square's gradient, and the problems."""

from __future__ import annotations

import re
from typing import Any

import losses_by_hand as by_hand
import pytest
import torch
from torch import Tensor

from delible.component import build
from delible.errors import RecipeError
from delible.lm.lm import LM
from delible.methods.harden.ilu import ILU, scale_derivative, word_problems
from delible.methods.keep.nll import NLL
from delible.methods.objective.gradient_ascent import GradientAscent
from delible.records import QA
from delible.train.engine import Trainer
from delible.train.passes import Passes
from delible.train.randomness import generator
from delible.train.recipe import Recipe
from delible.train.rows import make_rows
from delible.world import general, unrelated


def test_the_derivative_is_that_of_finite_differences() -> None:
    logits = by_hand.fixed_logits(0.4).reshape(-1, 7)
    targets = torch.arange(len(logits)) % 7

    def loss(w: float) -> Tensor:
        return -(w * logits).log_softmax(dim=1).gather(1, targets[:, None])[:, 0]

    found = scale_derivative(logits, targets).double()
    expected = (loss(1 + 1e-5) - loss(1 - 1e-5)) / 2e-5
    assert torch.allclose(found, expected, atol=1e-4)
    # the penalty: the mean over tokens, squared, to 1e-3
    assert float(found.mean() ** 2) == pytest.approx(float(expected.mean() ** 2), rel=1e-3)
    assert float(found.abs().min()) < float(found.abs().max())


def test_equal_logits_leave_nothing_to_rescale() -> None:
    logits = torch.full((3, 5), 2.0)
    assert torch.allclose(scale_derivative(logits, torch.tensor([0, 3, 4])), torch.zeros(3))


# ---- the problems


def test_every_answer_is_right() -> None:
    seen = set()
    for record in word_problems(300, generator(0, "problems")):
        left, operator, right, result = re.findall(
            r"^(\d+) ([-+*/]) (\d+) = (\d+)\.", record.answer
        )[0]
        a, b = int(left), int(right)
        value = {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[operator]
        assert value == int(result)
        shown = {int(number) for number in re.findall(r"\d+", record.question)}
        assert shown == {a, b}
        seen.add(operator)
    assert seen == set("+-*/")


def test_problems_belong_to_seed_and_step() -> None:
    assert word_problems(5, generator(0, 1)) == word_problems(5, generator(0, 1))
    assert word_problems(5, generator(0, 1)) != word_problems(5, generator(0, 2))


def test_no_row_of_a_measurement_is_trained_on() -> None:
    asked = {record.question for record in (*general(), *unrelated()) if isinstance(record, QA)}
    made = {record.question for record in word_problems(500, generator(1, "x"))}
    assert asked
    assert not asked & made


# ---- on a model


def made(lm: LM, step: int = 0) -> Passes:
    lm.model.requires_grad_(True)
    passes = by_hand.passes_of(lm, GradientAscent(), NLL(), by_hand.Reference())
    passes.seed, passes.step = 5, step
    return passes


def flat(passes: Passes) -> Tensor:
    return torch.cat(
        [
            (torch.zeros_like(value) if value.grad is None else value.grad).double().flatten()
            for value in passes.parameters
        ]
    )


def derivative_of(lm: LM, problems: list[QA], twin: Any) -> Tensor:
    """d/dw of the mean answer loss with w on the logits, by autograd through w, in float64."""
    w = torch.ones((), dtype=torch.float64, requires_grad=True)
    total: Any = 0.0
    count = 0
    for row in make_rows(lm.template, problems):
        ids = torch.tensor(row.encoded.ids)[None]
        logprobs = (w * twin(input_ids=ids).logits[0, :-1]).log_softmax(dim=1)
        total = total - logprobs.gather(1, ids[0, 1:, None])[row.encoded.start - 1 :].sum()
        count += row.encoded.answer_tokens
    return torch.autograd.grad(total / count, w, create_graph=True)[0]


def test_the_penalty_against_float64() -> None:
    lm = by_hand.tiny_lm()
    host, passes = made(lm.copy()), made(lm)
    host.forget()
    ILU(penalty=0.7, problems=3).forget(passes)
    problems = word_problems(3, generator(5, "harden.ilu", 0))
    twin: Any = lm.copy().model.double()
    twin.set_attn_implementation("eager")
    derivative = derivative_of(lm, problems, twin)
    parameters = list(twin.parameters())
    parts = torch.autograd.grad(0.7 * derivative.square(), parameters)
    expected = torch.cat([part.flatten() for part in parts])
    found = flat(passes) - flat(host)
    assert float(expected.norm()) > 1e-2
    assert float((found - expected).norm()) < 1e-3 * float(expected.norm())
    assert passes.totals.forget == host.totals.forget


def test_without_penalty_it_is_the_host_bit_by_bit() -> None:
    host, passes, other = made(by_hand.tiny_lm()), made(by_hand.tiny_lm()), made(by_hand.tiny_lm())
    host.forget()
    ILU(penalty=0.0).forget(passes)
    assert torch.equal(flat(host), flat(passes))
    ILU().forget(other)
    assert not torch.allclose(flat(host), flat(other))


def test_each_step_has_problems_of_its_own() -> None:
    first, again, second = (
        made(by_hand.tiny_lm()),
        made(by_hand.tiny_lm()),
        made(by_hand.tiny_lm(), 1),
    )
    for passes in (first, again, second):
        ILU().forget(passes)
    assert torch.equal(flat(first), flat(again))
    assert not torch.equal(flat(first), flat(second))


def test_a_run_makes_fine_tuning_stationary() -> None:
    held_out = word_problems(20, generator(99, "held out"))
    ends = []
    for penalty in (0.0, 10.0):
        lm = by_hand.tiny_lm()
        recipe = Recipe.named("ilu").changed(
            {},
            {"penalty": penalty, "epochs": 8, "batch_size": 3, "learning_rate": 1e-3,
             "precision": "float32"},
        )  # fmt: skip
        records = {
            "forget": [QA(question=q, answer=a) for q, a in by_hand.FORGET],
            "retain": [QA(question=q, answer=a) for q, a in by_hand.RETAIN],
        }
        Trainer(lm, recipe, records).train()
        twin: Any = lm.copy().model.double()
        ends.append(abs(float(derivative_of(lm, held_out, twin).detach())))
    assert ends[1] < 0.5 * ends[0]


def test_wrong_options_are_refused() -> None:
    for options in ({"penalty": -1}, {"problems": 0}, {"lambda": 1}):
        with pytest.raises(RecipeError):
            build("harden", {"name": "ilu", **options})
