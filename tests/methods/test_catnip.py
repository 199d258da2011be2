"""CATNIP: the loss and its weight in float64, and what the paper says of length and confidence."""

from __future__ import annotations

import math
from typing import Any

import losses_by_hand as by_hand
import pytest
import torch
from torch import Tensor

from delible.lm.forward import complement_logprobs, target_logprobs
from delible.methods.objective.catnip import (
    CATNIP,
    catnip,
    catnip_weight,
    exact_logprobs,
    log_complement,
)
from delible.methods.objective.npo import npo
from delible.methods.objective.unlikelihood import Unlikelihood
from delible.train.recipe import Recipe

#: Probabilities from nearly forgotten to nearly certain.
GRID = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)


def of(logprobs: Tensor, beta: float, **options: Any) -> Tensor:
    """The loss from log p alone, where float64 can tell 1 - p."""
    return catnip(logprobs, log_complement(logprobs), beta, **options)


def found_weight(p: Tensor, beta: float, *, attached: bool, limit: float | None = None) -> Tensor:
    """The gradient of the loss by log p, by autograd."""
    logprobs = p.log().requires_grad_(True)
    values = of(logprobs, beta, attached=attached, max_weight=limit)
    (gradient,) = torch.autograd.grad(values.sum(), logprobs)
    return gradient


# ---- the loss and its weight


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_the_loss_is_the_negative_preference_against_one_minus_p(beta: float) -> None:
    expected = []
    for p in GRID.tolist():
        ratio = p / (1 - p)
        expected.append(-2 / beta * math.log(1 / (1 + math.exp(beta * math.log(ratio)))))
    for attached in (False, True):
        values = of(GRID.log(), beta, attached=attached)
        assert values.tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_the_weight_is_the_derived_one(beta: float) -> None:
    share = [2 * p**beta / (p**beta + (1 - p) ** beta) for p in GRID.tolist()]
    detached = found_weight(GRID, beta, attached=False)
    assert detached.tolist() == pytest.approx(share, rel=1e-9)
    assert catnip_weight(GRID.log(), (1 - GRID).log(), beta).tolist() == pytest.approx(
        share, rel=1e-9
    )
    whole = [w / (1 - p) for w, p in zip(share, GRID.tolist(), strict=True)]
    attached = found_weight(GRID, beta, attached=True)
    assert attached.tolist() == pytest.approx(whole, rel=1e-9)
    again = catnip_weight(GRID.log(), (1 - GRID).log(), beta, attached=True)
    assert again.tolist() == pytest.approx(whole, rel=1e-9)


def test_the_attached_form_is_the_slope_of_the_values() -> None:
    step = 1e-6
    for beta in (0.5, 2.0):
        up = of(GRID.log() + step, beta, attached=True)
        down = of(GRID.log() - step, beta, attached=True)
        slope = (up - down) / (2 * step)
        torch.testing.assert_close(
            found_weight(GRID, beta, attached=True), slope, rtol=1e-4, atol=1e-6
        )


def test_a_small_beta_becomes_ascent_with_weight_one() -> None:
    weight = found_weight(GRID, 1e-5, attached=False)
    assert float((weight - 1).abs().max()) < 1e-4
    assert float((found_weight(GRID, 1.0, attached=False) - 1).abs().max()) > 0.9


def test_a_large_beta_leaves_the_less_than_even_alone() -> None:
    weight = found_weight(GRID, 50.0, attached=False)
    assert float(weight[GRID < 0.4].max()) < 1e-6
    assert float(weight[GRID > 0.6].min()) > 2 - 1e-6


def test_attached_weights_are_capped() -> None:
    p = torch.tensor([0.5, 0.9, 0.95, 0.999, 1 - 1e-9, 1 - 1e-15], dtype=torch.float64)
    assert float(found_weight(p, 1.0, attached=True)[3]) == pytest.approx(1998, rel=1e-6)
    limited = found_weight(p, 1.0, attached=True, limit=20.0)
    assert limited.tolist() == pytest.approx([2.0, 18.0, 20.0, 20.0, 20.0, 20.0], rel=1e-6)
    values = of(p.log(), 1.0, attached=True, max_weight=20.0)
    torch.testing.assert_close(values, of(p.log(), 1.0, attached=True))


def test_nothing_breaks_at_certainty_and_at_impossibility() -> None:
    for attached in (False, True):
        logprobs = torch.tensor([0.0, -1e-9, -1e-3, -200.0, -1e4], requires_grad=True)  # fp32
        values = of(logprobs, 1.0, attached=attached)
        (gradient,) = torch.autograd.grad(values.sum(), logprobs)
        assert bool(values.isfinite().all())
        assert bool(gradient.isfinite().all())
        assert values[-1].item() == gradient[-1].item() == 0.0
        assert bool((gradient[:3] > 0).all())


def test_the_complement_keeps_its_digits() -> None:
    exact = [-1e-5, -0.1, -1.0, -40.0]
    found = log_complement(torch.tensor(exact, dtype=torch.float64))
    assert found.tolist() == pytest.approx([math.log(-math.expm1(x)) for x in exact], rel=1e-9)


def exact(gap: float, beta: float, *, attached: bool) -> tuple[float, list[float]]:
    """Value and gradient by logits of one token that stands ``gap`` nats above the rest."""
    shares = OTHERS.softmax(0).tolist()
    rest = 1 / (1 + math.exp(gap))  # 1 - p; the odds are exp(gap)
    value = 2 / beta * (beta * gap + math.log1p(math.exp(-beta * gap)))
    weight = 2 / (1 + math.exp(-beta * gap)) / (rest if attached else 1)
    # the gradient of log p: 1 - p on the token, minus their probability on the others
    return value, [weight * rest, *(-weight * rest * share for share in shares)]


OTHERS = torch.tensor([0.3, -1.1, 0.0, 2.0], dtype=torch.float64)


@pytest.mark.parametrize("tokenized", [True, False])
@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("beta", [0.5, 1.0])
@pytest.mark.parametrize("gap", [1.0, 14.0, 20.0, 40.0])
def test_certain_tokens_keep_value_and_gradient(
    gap: float, beta: float, attached: bool, tokenized: bool
) -> None:
    logits = torch.cat([OTHERS.logsumexp(0)[None] + gap, OTHERS])[None].float().requires_grad_(True)
    targets, loss = torch.tensor([0]), CATNIP(beta=beta, attached=attached, tokenized=tokenized)
    if tokenized:
        found = loss._token_values(logits, targets)
    else:  # an answer of one token
        complement = complement_logprobs(logits, targets)
        own = exact_logprobs(target_logprobs(logits, targets), complement)
        found = loss._values(own, log_complement(own))
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    value, slope = exact(gap, beta, attached=attached)
    assert found.item() == pytest.approx(value, rel=2e-5)
    assert gradient[0].tolist() == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize(
    "loss", [Unlikelihood(), CATNIP(attached=True), CATNIP(attached=True, tokenized=False)],
    ids=repr,
)  # fmt: skip
def test_the_most_memorised_tokens_are_pushed_hardest(loss: Any) -> None:
    """Through the model: with the head scaled up, every answer token is certain in fp32."""
    lm = by_hand.tiny_lm()
    rows = {"forget": by_hand.all_rows(lm)["forget"][:1]}
    (row,) = rows["forget"]
    states = by_hand.step_of(lm, loss, by_hand.Reference(), rows).forget.answer_states.detach()
    targets = torch.tensor(row.encoded.ids[row.encoded.start :])
    chosen = torch.zeros(len(targets), lm.vocabulary)
    chosen[torch.arange(len(targets)), targets] = 25.0
    with torch.no_grad():  # a head that gives every answer token a lead of about 25 nats
        head = torch.linalg.lstsq(states.double(), chosen.double()).solution
        lm.model.lm_head.weight.copy_(head.T)
    step = by_hand.step_of(lm, loss, by_hand.Reference(), rows)
    assert float(step.forget.token_logprobs.detach().min()) > -1e-6
    value = by_hand.values(lm, loss, by_hand.Reference(), rows).sum()
    assert value.item() > 15
    assert float(by_hand.gradients(lm, value)["lm_head.weight"].norm()) > 0.1


# ---- length


def test_repeating_an_answer_changes_npo_and_not_catnip() -> None:
    once = torch.tensor([[-0.3, -0.3, -0.3]], dtype=torch.float64)
    twice = once.repeat(1, 2)
    single, double = of(once, 1.0).mean(dim=1), of(twice, 1.0).mean(dim=1)
    torch.testing.assert_close(single, double)
    was = once - 0.5
    assert not torch.allclose(
        npo(once.sum(1), was.sum(1), 0.5), npo(twice.sum(1), was.repeat(1, 2).sum(1), 0.5)
    )


# ---- on a tiny model


def by_loops(loss: CATNIP, lm: by_hand.LM, frozen: by_hand.LM, index: int) -> float:
    row = by_hand.all_rows(lm)["forget"][index]
    own, before = (
        [
            by_hand.log_probability(z, y)
            for z, y in zip(*by_hand.answer_logits(model, row), strict=True)
        ]
        for model in (lm, frozen)
    )
    assert row.encoded.has_end
    if loss.mask_end:
        own, before = own[:-1], before[:-1]
    if not loss.tokenized:
        own, before = [sum(own) / len(own)], [sum(before) / len(before)]
    terms = []
    for x, was in zip(own, before, strict=True):
        base = was if loss.against == "start" else math.log(1 - math.exp(x))
        terms.append(2 / loss.beta * math.log1p(math.exp(loss.beta * (x - base))))
    return sum(terms) / len(terms)


@pytest.mark.parametrize(
    "loss",
    [
        CATNIP(), CATNIP(beta=0.5), CATNIP(attached=True), CATNIP(mask_end=False),
        CATNIP(against="start"), CATNIP(tokenized=False),
        CATNIP(tokenized=False, against="start", mask_end=False, beta=2.0),
    ],
    ids=repr,
)  # fmt: skip
def test_values_of_a_padded_batch_equal_loops_over_rows_alone(loss: CATNIP) -> None:
    lm, frozen = by_hand.tiny_lm(0.05), by_hand.tiny_lm()
    rows = by_hand.all_rows(lm)
    found = by_hand.values(lm, loss, by_hand.prepared(frozen, rows, loss), rows)
    expected = [by_loops(loss, lm, frozen, index) for index in range(3)]
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(expected, rel=2e-5)


def test_the_end_of_the_turn_takes_no_gradient_unless_asked() -> None:
    lm = by_hand.tiny_lm()
    rows = {"forget": by_hand.all_rows(lm)["forget"][:1]}
    targets = rows["forget"][0].encoded.ids[rows["forget"][0].encoded.start :]
    end = targets[-1]
    assert end not in targets[:-1]

    def reached(loss: CATNIP) -> float:
        gradient = by_hand.gradients(lm, by_hand.values(lm, loss, by_hand.Reference(), rows).sum())
        # descending on the others raises the end token a little; its own term lowers it
        return float(gradient["lm_head.weight"][end].norm())

    assert reached(CATNIP()) < 0.2 * reached(CATNIP(mask_end=False))


def test_a_reference_is_asked_for_only_where_it_is_needed() -> None:
    lm = by_hand.tiny_lm()
    assert CATNIP().reference_kinds(lm) == ()
    assert CATNIP(attached=True, tokenized=False).reference_kinds(lm) == ()
    assert CATNIP(against="start").reference_kinds(lm) == ("logprobs",)


def test_answer_lengths_decide_less_than_under_npo() -> None:
    # two answers of the same confidence per token, one ten times as long: NPO's gradient per token
    # at the start is the same for both, so the long answer has ten times the pull; CATNIP's hasn't
    logprobs = torch.full((2, 20), -0.3, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(20)[None] < torch.tensor([[2], [20]])
    ours = (of(logprobs, 1.0) * mask).sum(1) / mask.sum(1)
    (pull,) = torch.autograd.grad(ours.sum(), logprobs)
    rows = (pull * mask).sum(1)
    assert float(rows[0]) == pytest.approx(float(rows[1]))
    theirs = npo((logprobs * mask).sum(1), (logprobs.detach() * mask).sum(1), 0.1)
    (pull,) = torch.autograd.grad(theirs.sum(), logprobs)
    rows = (pull * mask).sum(1)
    assert float(rows[1] / rows[0]) == pytest.approx(10)


def test_the_recipe_needs_forget_rows_only() -> None:
    recipe = Recipe.named("catnip")
    assert recipe.objective == CATNIP()
    assert recipe.keep.card.name == "none"
