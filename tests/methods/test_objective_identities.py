"""Forget losses that are one another in disguise: the same gradient, to all digits there are."""

from __future__ import annotations

import losses_by_hand as by_hand
import pytest
import torch
from torch import Tensor

from delible.lm.forward import complement_logprobs
from delible.methods.objective import tnpo as tnpo_file
from delible.methods.objective.catnip import CATNIP, catnip
from delible.methods.objective.ceu import CEU, ceu
from delible.methods.objective.dpo import dpo
from delible.methods.objective.gradient_ascent import GradientAscent
from delible.methods.objective.kto import KTO, kto
from delible.methods.objective.npo import NPO, npo
from delible.methods.objective.satimp import SatImp, satimp
from delible.methods.objective.tnpo import TNPO, tnpo_weight
from delible.methods.objective.unlikelihood import Unlikelihood, unlikelihood
from delible.methods.objective.wga import WGA, wga
from delible.train.losses import Objective

TARGETS = torch.tensor([3, 1, 6, 2, 0, 5])


def gradient(
    loss: Objective, *, moved: float = 0.05, one_row: bool = False, mean: bool = False
) -> Tensor:
    """Gradient by all weights of the loss over the rows, on a model ``moved`` from its reference.

    ``mean`` divides each row's loss by its answer tokens, as losses that average over answers do.
    """
    lm, frozen = by_hand.tiny_lm(moved), by_hand.tiny_lm()
    rows = by_hand.all_rows(lm)
    if one_row:
        rows = {role: part[:1] for role, part in rows.items()}
    value = by_hand.values(lm, loss, by_hand.prepared(frozen, rows, loss), rows)
    if mean:
        value = value / torch.tensor([row.encoded.answer_tokens for row in rows["forget"]])
    return by_hand.joined(by_hand.gradients(lm, value.sum())).double()


def ratio(left: Tensor, right: Tensor) -> float:
    """Length of left over that of right, once they point the same way."""
    cosine = (left / left.norm()) @ (right / right.norm())
    assert float(cosine) == pytest.approx(1, abs=1e-6)
    return float(left.norm() / right.norm())


def by_logits(function: object) -> Tensor:
    """Gradient by the fixed logits, one row of six tokens, float64."""
    logits = by_hand.fixed_logits(0.2)[0].requires_grad_(True)
    value: Tensor = function(logits)  # type: ignore[operator]
    return torch.autograd.grad(value.sum(), logits)[0]


def logprobs(logits: Tensor) -> Tensor:
    return logits.log_softmax(1).gather(1, TARGETS[:, None])[:, 0]


def test_these_gradients_can_differ() -> None:
    left, right = gradient(WGA(beta=1.0)), gradient(GradientAscent())
    assert float(torch.cosine_similarity(left, right, dim=0)) < 0.999


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
def test_npo_starts_as_gradient_ascent_on_sums(beta: float) -> None:
    found, ascent = gradient(NPO(beta=beta), moved=0.0), gradient(GradientAscent(), moved=0.0)
    assert ratio(found, ascent) == pytest.approx(1, abs=1e-4)


def test_kto_starts_as_npo() -> None:
    found = gradient(KTO(beta=0.3), moved=0.0)
    assert ratio(found, gradient(NPO(beta=0.3), moved=0.0)) == pytest.approx(1, abs=1e-4)
    assert ratio(gradient(KTO(beta=0.3, compat=True), moved=0.0), found) == pytest.approx(
        1, abs=1e-4
    )


def test_kto_without_refusals_is_npo_plus_one() -> None:
    sums = by_hand.fixed_sums(0.2, by_hand.LABELS)
    reference = by_hand.fixed_sums(0.9, by_hand.LABELS)
    for compat in (False, True):
        found = kto(sums - reference, torch.zeros_like(sums), 0.3, compat=compat)
        torch.testing.assert_close(found, 1 + npo(sums, reference, 0.3), rtol=1e-12, atol=0)


def test_dpo_without_winner_is_npo() -> None:
    sums = by_hand.fixed_sums(0.2, by_hand.LABELS).requires_grad_(True)
    reference = by_hand.fixed_sums(0.9, by_hand.LABELS)
    without = dpo(torch.zeros_like(reference), sums - reference, 0.3)
    torch.testing.assert_close(without, npo(sums, reference, 0.3), rtol=1e-12, atol=0)
    left, right = (
        torch.autograd.grad(value.sum(), sums)[0] for value in (without, npo(sums, reference, 0.3))
    )
    torch.testing.assert_close(left, right, rtol=1e-12, atol=0)


def test_wga_with_beta_zero_is_gradient_ascent() -> None:
    torch.testing.assert_close(gradient(WGA(beta=0.0)), gradient(GradientAscent()))
    # and it is the limit of small beta
    assert ratio(gradient(WGA(beta=1e-5)), gradient(GradientAscent())) == pytest.approx(1, 1e-3)


@pytest.mark.parametrize("beta", [0.5, 1.0, 5.0])
def test_satimp_without_importance_is_wga(beta: float) -> None:
    left, right = gradient(SatImp(beta1=beta, beta2=0.0)), gradient(WGA(beta=beta))
    assert ratio(left, right) == pytest.approx(1, abs=1e-5)
    values = torch.linspace(-8, -0.01, 30, dtype=torch.float64)
    torch.testing.assert_close(satimp(values, beta, 0.0), wga(values, beta))


@pytest.fixture
def without_epsilon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tnpo_file, "EPSILON", 1e-30)


@pytest.mark.usefixtures("without_epsilon")
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_tnpo_without_its_epsilon_starts_as_gradient_ascent(beta: float) -> None:
    found, ascent = gradient(TNPO(beta=beta), moved=0.0), gradient(GradientAscent(), moved=0.0)
    assert ratio(found, ascent) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("beta", [0.1, 1.0, 4.0])
def test_tnpo_starts_with_weight_one_up_to_its_epsilon(beta: float) -> None:
    p = torch.linspace(0.01, 0.99, 20, dtype=torch.float64)
    exact = 1 - 1e-5 / (2 * p**beta + 1e-5)
    torch.testing.assert_close(tnpo_weight(p.log(), p.log(), beta), exact)
    found, ascent = gradient(TNPO(beta=0.1), moved=0.0), gradient(GradientAscent(), moved=0.0)
    assert ratio(found, ascent) == pytest.approx(1, abs=1e-4)


def test_ceu_has_the_logit_gradient_of_unlikelihood() -> None:
    left = by_logits(lambda z: ceu(z, TARGETS))
    right = by_logits(lambda z: unlikelihood(z, TARGETS))
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)
    assert float(left.norm()) > 0.1
    whole = gradient(CEU(ignore_first_n=0))
    assert ratio(whole, gradient(Unlikelihood())) == pytest.approx(1, abs=1e-4)


def test_catnip_attached_is_twice_unlikelihood() -> None:
    left = by_logits(
        lambda z: catnip(logprobs(z), complement_logprobs(z, TARGETS), 1.0, attached=True)
    )
    right = by_logits(lambda z: unlikelihood(z, TARGETS))
    torch.testing.assert_close(left, 2 * right, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(left, 2 * by_logits(lambda z: ceu(z, TARGETS)), rtol=1e-5, atol=1e-6)
    z = by_hand.fixed_logits(0.2)[0]
    torch.testing.assert_close(
        catnip(logprobs(z), complement_logprobs(z, TARGETS), 1.0, attached=True),
        2 * unlikelihood(z, TARGETS),
    )
    whole = gradient(CATNIP(beta=1.0, attached=True, mask_end=False))
    assert ratio(whole, gradient(Unlikelihood(), mean=True)) == pytest.approx(2, abs=1e-4)


def test_catnip_detached_is_twice_wga() -> None:
    left = by_logits(lambda z: catnip(logprobs(z), complement_logprobs(z, TARGETS), 1.0))
    right = by_logits(lambda z: wga(logprobs(z), 1.0))
    torch.testing.assert_close(left, 2 * right, rtol=1e-9, atol=1e-12)
    whole = gradient(CATNIP(beta=1.0, mask_end=False))
    assert ratio(whole, gradient(WGA(beta=1.0), mean=True)) == pytest.approx(2, abs=1e-4)


@pytest.mark.usefixtures("without_epsilon")
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_catnip_against_the_start_model_is_tnpo(beta: float) -> None:
    left = gradient(CATNIP(beta=beta, against="start", mask_end=False))
    right = gradient(TNPO(beta=beta), mean=True)
    assert ratio(left, right) == pytest.approx(1, abs=1e-5)


def test_tnpo_of_one_token_is_npo() -> None:
    # the sum of a one-token answer is that token's log-probability
    p = torch.linspace(0.01, 0.99, 20, dtype=torch.float64).log().requires_grad_(True)
    start = torch.linspace(0.9, 0.05, 20, dtype=torch.float64).log()
    (weight,) = torch.autograd.grad(npo(p, start, 0.5).sum(), p)
    torch.testing.assert_close(weight, tnpo_weight(p.detach(), start, 0.5), rtol=1e-4, atol=0)


def test_catnip_of_whole_answers_against_the_start_is_npo_per_token() -> None:
    # one row: the mean log-ratio with beta is the summed one with beta / length
    lm = by_hand.tiny_lm()
    tokens = by_hand.all_rows(lm)["forget"][0].encoded.answer_tokens
    left = gradient(
        CATNIP(beta=1.0, against="start", tokenized=False, mask_end=False), one_row=True
    )
    right = gradient(NPO(beta=1.0 / tokens), one_row=True)
    assert ratio(left, right) == pytest.approx(1 / tokens, rel=1e-4)
