"""Bi-level selection and weights for alignment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from delible.component import build
from delible.errors import RecipeError
from delible.lm.lm import LM
from delible.records import QA
from delible.testing.tiny import tiny_model, tiny_tokenizer
from delible.train.bilevel import (
    PreferenceLoss,
    Solution,
    mirror_step,
    most_helpful,
    standardised,
)
from delible.train.engine import Trainer
from delible.train.gradient_space import Space
from delible.train.gradients import Gradients
from delible.train.recipe import Recipe
from delible.train.row import Row
from delible.train.row_losses import ObjectiveLoss
from delible.train.rows import make_rows
from delible.train.slots import SlotContext
from delible.train.vectors import conjugate_gradient

RUDE, KIND = "No, go away you fool", "Yes, gladly, thank you"
PROMPTS = ["Help me?", "Is it late?", "Tea?", "Can you read?", "May I ask?", "Open the door?"]
PAIRS = [
    QA(question=f"{prompt} Now", answer=KIND, perturbed=(RUDE,), group="alignment")
    for prompt in PROMPTS[:4]
]
OTHERS = [QA(question="What is snow?", answer="It is white."), QA(question="Coal?", answer="Black")]
BAD = [QA(question=prompt, answer=RUDE) for prompt in PROMPTS]
GOOD = [QA(question=prompt, answer=KIND) for prompt in PROMPTS]
MIXED = [record for both in zip(BAD, GOOD, strict=True) for record in both]


def make_lm(seed: int = 0) -> LM:
    return LM(tiny_model("llama", seed, num_hidden_layers=2), tiny_tokenizer(), precision="float32")


def make_context(
    lm: LM,
    forget: Sequence[QA] = BAD,
    retain: Sequence[QA] = PAIRS,
    objective: Any = "gradient_ascent",
) -> SlotContext:
    records = {"forget": forget, "retain": retain}
    rows = {role: make_rows(lm.template, part) for role, part in records.items()}
    made = build("objective", objective)
    return SlotContext(lm, rows, records, Gradients(lm), made, None, 0)


def make(kind: Any = "weigh", **options: Any) -> Any:
    fast = {"rounds": 1, "held_out": 0.0}
    return build(kind, {"name": "u2a", **fast, **options})


def row_loss(model: Any, row: Row) -> Tensor:
    ids = torch.tensor(row.encoded.ids)[None]
    logprobs = model(input_ids=ids).logits[0, :-1].log_softmax(dim=1)
    return -logprobs.gather(1, ids[0, 1:, None])[row.encoded.start - 1 :].mean()


def gains_of(component: Any, context: SlotContext) -> Tensor:
    found = component.solve(context, 1.0, "test")
    return found.gains[0]  # type: ignore[no-any-return]


# ---- gains


def test_gains_are_explicit_products_and_predict_what_a_step_does() -> None:
    lm = make_lm()
    context = make_context(lm, MIXED[:4])
    gains = gains_of(make(outer="likelihood", how="jvp"), context)
    twin = lm.copy().model.double().requires_grad_(True)
    parameters = list(twin.parameters())
    good = context.rows["retain"]

    def outer() -> Tensor:
        return torch.stack([row_loss(twin, row) for row in good]).mean()

    target = torch.autograd.grad(outer(), parameters)
    before = float(outer().detach())
    eta = 1e-6
    for row, gain in zip(context.rows["forget"], gains.tolist(), strict=True):
        # ascent: the loss that is minimised is the mean log-probability
        mine = torch.autograd.grad(-row_loss(twin, row), parameters)
        exact = sum(float((a * b).sum()) for a, b in zip(target, mine, strict=True))
        assert gain == pytest.approx(exact, rel=1e-4)
        with torch.no_grad():
            for value, change in zip(parameters, mine, strict=True):
                value.sub_(change, alpha=eta)
        assert float(outer().detach()) - before == pytest.approx(-eta * gain, rel=0.05)
        with torch.no_grad():
            for value, change in zip(parameters, mine, strict=True):
                value.add_(change, alpha=eta)
    rough = gains_of(make(outer="likelihood"), context)
    assert torch.allclose(rough, gains, rtol=0.02, atol=0.02 * float(gains.abs().max()))


def test_the_preference_loss_and_its_gradient_at_the_start() -> None:
    lm = make_lm()
    context = make_context(lm, MIXED[:4])
    gains = gains_of(make(how="jvp", outer_beta=0.2), context)  # auto: there are pairs
    twin = lm.copy().model.double().requires_grad_(True)
    parameters = list(twin.parameters())
    bad = make_rows(lm.template, [r.model_copy(update={"answer": RUDE}) for r in PAIRS])

    def logprob(row: Row) -> Tensor:
        return -row_loss(twin, row) * row.encoded.answer_tokens

    # -log sigmoid(0.2 x (ratios)) has the slope -0.2 / 2 where both models agree
    ratios = [logprob(y) - logprob(n) for y, n in zip(context.rows["retain"], bad, strict=True)]
    target = torch.autograd.grad(-0.1 * torch.stack(ratios).mean(), parameters)
    for row, gain in zip(context.rows["forget"], gains.tolist(), strict=True):
        mine = torch.autograd.grad(-row_loss(twin, row), parameters)
        exact = sum(float((a * b).sum()) for a, b in zip(target, mine, strict=True))
        assert gain == pytest.approx(exact, rel=1e-3)

    outer = make(outer_beta=0.2).outer_objective(context, "test")
    assert isinstance(outer.loss, PreferenceLoss)
    start = outer.loss(lm, outer.rows)
    assert start.tolist() == pytest.approx([0.6931472] * 4, rel=1e-5)


def test_cosines_are_products_without_lengths() -> None:
    context = make_context(make_lm(), MIXED[:4])
    dots = gains_of(make(how="jvp"), context)
    cosines = gains_of(make(how="jvp", score="cos"), context)
    assert bool((cosines.abs() <= 1 + 1e-6).all())
    norms = context.gradients.norms(context.rows["forget"])
    ratio = dots / (cosines * norms)
    assert torch.allclose(ratio, ratio[0].expand(4), rtol=1e-4)  # the outer gradient's length


def test_conjugate_gradients_predict_retraining_of_a_ridge_regression() -> None:
    random = torch.Generator().manual_seed(3)
    draw: dict[str, Any] = {"generator": random, "dtype": torch.float64}
    inputs, wanted = torch.randn(30, 6, **draw), torch.randn(30, **draw)
    held, held_wanted = torch.randn(20, 6, **draw), torch.randn(20, **draw)
    ridge, mass = 0.3, 1e-5

    def fitted(weights: Tensor) -> Tensor:
        matrix = inputs.T @ (weights[:, None] * inputs) + ridge * torch.eye(6).double()
        return torch.linalg.solve(matrix, inputs.T @ (weights * wanted))

    def outer(theta: Tensor) -> float:
        return float(0.5 * (held @ theta - held_wanted).pow(2).mean())

    uniform = torch.full((30,), 1 / 30, dtype=torch.float64)
    theta = fitted(uniform)
    gradient = held.T @ (held @ theta - held_wanted) / 20
    found = conjugate_gradient(
        lambda v: {"theta": inputs.T @ (uniform * (inputs @ v["theta"]))},
        {"theta": gradient}, 10, damping=ridge,
    )["theta"]  # fmt: skip
    gains = (inputs * (inputs @ theta - wanted)[:, None]) @ found
    real = torch.tensor(
        [outer(fitted(uniform + mass * one)) - outer(theta) for one in torch.eye(30).double()]
    ).double()
    assert torch.allclose(-mass * gains, real, rtol=0.05, atol=0.01 * float(real.abs().max()))
    ranks = [(-mass * gains).argsort().argsort().double(), real.argsort().argsort().double()]
    assert float(torch.corrcoef(torch.stack(ranks))[0, 1]) >= 0.95


def test_the_inner_hessian_is_that_of_forget_and_retain_losses() -> None:
    lm = make_lm()
    # the likelihood is convex in the head, so the system has a solution
    context = make_context(lm, BAD[:3], [*PAIRS, *OTHERS], objective="finetune")
    options = {
        "hessian": "conjugate_gradient", "iterations": 40, "damping": 3.0, "space": "head",
        "outer": "likelihood", "outer_group": "alignment", "retain_weight": 2.0,
    }  # fmt: skip
    component = make(**options)
    outer = component.outer_objective(context, "test")
    assert len(outer.rows) == 4
    head = context.gradients.within(Space("head"))
    host = ObjectiveLoss.at_start(context.objective, context.rows, lm)
    mass = torch.tensor([0.5, 0.3, 0.2]).double()
    found = component.direction(
        context, head.of(outer.loss), head.of(host), outer, Solution([0, 1, 2], mass, [], [])
    )
    curved = {name: 3.0 * value for name, value in found.items()}
    for weight, row in zip(mass.tolist(), context.rows["forget"], strict=True):
        for name, value in head.hessian_product([row], found).items():
            curved[name] += weight * value
    for row in context.rows["retain"][4:]:  # those outside the outer objective
        for name, value in head.hessian_product([row], found).items():
            curved[name] += 2.0 / 2 * value
    gradient = head.of(outer.loss).total(outer.rows)
    size = sum(float(value.pow(2).sum()) for value in gradient.values()) ** 0.5 / 4
    apart = sum(float((curved[n] - v / 4).pow(2).sum()) for n, v in gradient.items()) ** 0.5
    assert apart < 0.05 * size
    plain = component.model_copy(update={"hessian": "identity"}).direction(
        context, head.of(outer.loss), head.of(host), outer, Solution([], mass, [], [])
    )
    assert all(torch.allclose(plain[n], v / 4, atol=1e-6) for n, v in gradient.items())


# ---- weights


def test_mirror_steps_stay_on_the_simplex() -> None:
    random = torch.Generator().manual_seed(0)
    weights = torch.full((8,), 1 / 8, dtype=torch.float64)
    gains = torch.randn(8, generator=random).double() * 1e5
    for _ in range(50):
        weights = mirror_step(weights, gains, 0.3)
        assert float(weights.min()) >= 0
        assert float(weights.sum()) == pytest.approx(1, abs=1e-12)
    assert int(weights.argmax()) == int(gains.argmax())
    uniform = torch.full((8,), 1 / 8, dtype=torch.float64)
    assert torch.allclose(mirror_step(uniform, gains, 0.0), uniform, rtol=1e-12)
    two = mirror_step(torch.tensor([0.5, 0.5]).double(), torch.tensor([1.0, 5.0]).double(), 1.0)
    assert two.tolist() == pytest.approx([0.1192029, 0.8807971])  # 1 / (1 + e^±2)
    assert standardised(torch.ones(3)).tolist() == [0.0] * 3
    zero = mirror_step(torch.tensor([0.0, 1.0]).double(), torch.tensor([9.0, 1.0]).double(), 1.0)
    assert zero.tolist() == [0.0, 1.0]


def test_weights_have_mean_one_and_rise_with_the_gain(caplog: pytest.LogCaptureFixture) -> None:
    context = make_context(make_lm(), MIXED)
    component = make()
    weights = component.weights(context)
    gains = gains_of(component, context)
    assert float(weights.mean()) == pytest.approx(1, abs=1e-6)
    assert torch.equal(weights.argsort(), gains.argsort())
    assert "12 of 12 forget rows have weight" in caplog.messages[-1]
    expected = 12 * torch.softmax((gains - gains.mean()) / gains.std(correction=0), dim=0)
    assert torch.allclose(weights.double(), expected, rtol=1e-5)
    twice = make(mirror_steps=2, mirror_rate=0.5).weights(context)
    assert torch.allclose(twice, weights, rtol=1e-5)


def test_a_share_gives_the_other_rows_no_weight() -> None:
    context = make_context(make_lm(), MIXED)
    weights = make(share=0.25).weights(context)
    chosen = make("select", share=0.25).choose(context)
    assert weights.nonzero()[:, 0].tolist() == chosen
    assert len(chosen) == 3
    assert float(weights.mean()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("slot", ["weigh", "select"])
def test_all_rows_with_equal_weights_are_the_host_bit_by_bit(slot: str) -> None:
    every: dict[str, dict[str, Any]] = {
        "weigh": {"mirror_steps": 0, "rounds": 1}, "select": {"share": 1.0}
    }  # fmt: skip
    weights = []
    for component in ("none" if slot == "weigh" else "all", {"name": "u2a", **every[slot]}):
        lm = make_lm()
        recipe = Recipe.from_mapping(
            {
                "objective": "gradient_ascent", "keep": "nll", slot: component,
                "training": {"epochs": 1, "batch_size": 4, "precision": "float32"},
            }
        )  # fmt: skip
        Trainer(lm, recipe, {"forget": BAD, "retain": PAIRS}).train()
        weights.append([value.detach() for value in lm.model.parameters()])
    assert all(map(torch.equal, *weights))


# ---- selection


def test_the_most_helpful_rows_have_a_positive_gain() -> None:
    gains = torch.tensor([0.1, -1.0, 3.0, 0.0, 2.0])
    assert most_helpful(gains, [], 2) == [2, 4]
    assert most_helpful(gains, [2], 9) == [4, 0]
    assert most_helpful(-gains.abs(), [], 3) == []


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("objective", ["gradient_ascent", "npo"])
def test_mislabelled_good_answers_are_not_chosen(seed: int, objective: str) -> None:
    context = make_context(make_lm(seed), MIXED, objective=objective)
    options = {"share": 0.5, "rounds": 2, "inner_learning_rate": 1e-4}
    chosen = make("select", **options).choose(context)
    bad = [index for index in chosen if MIXED[index].answer == RUDE]
    assert len(chosen) >= 2
    assert len(bad) >= 0.9 * len(chosen)


def test_rounds_train_in_between_and_put_the_model_back() -> None:
    lm = make_lm()
    context = make_context(lm, MIXED, [*PAIRS, *OTHERS])
    before = [value.detach().clone() for value in lm.model.parameters()]
    options = {"rounds": 3, "inner_learning_rate": 1e-3, "outer_group": "alignment"}
    found = make(**options).solve(context, 0.5, "test")
    assert all(map(torch.equal, before, lm.model.parameters()))
    assert found.outer[1] < found.outer[0]  # unlearning rude answers helps
    assert len(found.gains) >= 2
    assert not torch.allclose(found.gains[0], found.gains[1], rtol=1e-3)
    assert found.support == sorted(found.support)
    assert len(found.support) <= 6
    assert float(found.weights.sum()) == pytest.approx(1)
    again = make(**options).solve(context, 0.5, "test")
    assert again.support == found.support
    assert torch.equal(again.weights, found.weights)
    still = make(**{**options, "inner_epochs": 0}).solve(context, 0.5, "test")
    assert torch.equal(still.gains[0], still.gains[1])


def test_rounds_end_when_the_held_out_rows_get_worse(caplog: pytest.LogCaptureFixture) -> None:
    context = make_context(make_lm(), GOOD)  # unlearning these cannot help
    found = make(rounds=4, held_out=0.5, inner_learning_rate=1e-3, retain_weight=0.0).solve(
        context, 1.0, "test"
    )
    assert len(found.gains) == 1
    assert found.outer[1] > found.outer[0]
    assert "no more rounds" in caplog.messages[-1]


def test_when_no_row_helps_one_is_taken_and_said(caplog: pytest.LogCaptureFixture) -> None:
    context = make_context(make_lm(), GOOD)
    chosen = make("select", share=0.5).choose(context)
    gains = gains_of(make(), context)
    assert bool((gains < 0).all())
    assert chosen == [int(gains.argmax())]
    assert any("no forget row is expected to help" in line for line in caplog.messages)


# ---- what makes the outer objective


def test_the_outer_objective_takes_a_group_and_holds_rows_apart(
    caplog: pytest.LogCaptureFixture,
) -> None:
    context = make_context(make_lm(), BAD, [*OTHERS, *PAIRS])
    component = make(outer_group="alignment", held_out=0.25)
    outer = component.outer_objective(context, "test")
    kept = [*outer.rows, *outer.held]
    assert sorted(row.index for row in kept) == [2, 3, 4, 5]
    assert len(outer.held) == 1
    few = make(outer="likelihood", outer_rows=3).outer_objective(context, "test")
    assert len(few.rows) == 3
    assert caplog.messages == []
    same = replace(context, records={**context.records, "forget": PAIRS[:2]})
    same = replace(same, rows={**context.rows, "forget": context.rows["retain"][2:4]})
    component.outer_objective(same, "test")
    assert "2 prompts of the outer objective are forget prompts too" in caplog.messages[-1]


@pytest.mark.parametrize(
    ("options", "retain", "match"),
    [
        ({}, [], "no retain record is there"),
        ({"outer": "preference"}, OTHERS, "has wrong answers"),
        ({"outer_group": "alignments"}, PAIRS, "of group 'alignments'"),
    ],
)
def test_nothing_that_should_improve_is_an_error(options: Any, retain: Any, match: str) -> None:
    context = make_context(make_lm(), BAD, retain)
    with pytest.raises(RecipeError, match=match):
        make(**options).weights(context)
