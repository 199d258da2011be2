"""WGA, TNPO, SatImp, CE-U, unlikelihood, UNDIAL, KTO: authors' numbers, loops, and their papers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import losses_by_hand as by_hand
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from delible.component import build
from delible.errors import RecipeError
from delible.lm import forward
from delible.lm.lm import LM
from delible.methods.keep.kl import KL
from delible.methods.objective.catnip import CATNIP
from delible.methods.objective.ceu import CEU, ceu
from delible.methods.objective.finetune import Finetune
from delible.methods.objective.flat import FLAT
from delible.methods.objective.kto import KTO, kto
from delible.methods.objective.satimp import SatImp, satimp, satimp_weight
from delible.methods.objective.tnpo import TNPO, tnpo, tnpo_weight
from delible.methods.objective.undial import UNDIAL, adjusted_target, undial
from delible.methods.objective.unlikelihood import Unlikelihood, unlikelihood
from delible.methods.objective.wga import WGA, wga, wga_weight
from delible.registry import card
from delible.testing.tiny import tiny_tokenizer
from delible.train.keywords import name_spans, name_tokens
from delible.train.losses import Objective
from delible.train.recipe import Recipe
from delible.train.reference import Reference
from delible.train.row import Row

#: Losses that average over answer tokens, and those that average over rows.
TOKEN_LOSSES: list[Objective] = [
    WGA(), WGA(beta=0.0), WGA(beta=0.25), TNPO(), TNPO(beta=1.0), TNPO(beta=0.1, a=1.5), SatImp(),
    SatImp(beta1=1.0, beta2=0.5), Unlikelihood(), CEU(), CEU(ignore_first_n=0), UNDIAL(),
    UNDIAL(beta=3.0),
]  # fmt: skip
ROW_LOSSES: list[Objective] = [
    KTO(), KTO(beta=0.7, compat=True), CATNIP(), CATNIP(attached=True, beta=2.0, mask_end=False),
    CATNIP(against="start"), CATNIP(tokenized=False), CATNIP(tokenized=False, against="start"),
    FLAT(), FLAT(divergence="jensen_shannon"), FLAT(divergence="reverse_kl", compat=True),
]  # fmt: skip
LOSSES = TOKEN_LOSSES + ROW_LOSSES


def named(loss: Objective) -> str:
    options = "-".join(str(value) for value in loss.model_dump().values())
    return f"{type(loss).__name__}-{options}"


# ---- golden numbers: the functions of the named repositories, run on these logits in float64


def answer_positions(shift: float) -> tuple[Tensor, Tensor, Tensor]:
    """The fixed logits, those of them that predict an answer token, and these tokens."""
    logits = by_hand.fixed_logits(shift).requires_grad_(True)
    labels = torch.tensor(by_hand.LABELS)[:, 1:]
    return logits, logits[:, :-1][labels != -100], labels[labels != -100]


def logprobs_of(picked: Tensor, targets: Tensor) -> Tensor:
    return picked.log_softmax(1).gather(1, targets[:, None])[:, 0]


def gradient_of(mean: Tensor, logits: Tensor) -> tuple[float, float]:
    """Length of the gradient, and its entry of the first answer token's logit."""
    (found,) = torch.autograd.grad(mean, logits)
    return float(found.norm()), float(found[0, 1, by_hand.LABELS[0][2]])


@pytest.mark.parametrize(
    ("beta", "value", "length", "entry"),
    [
        (1.0, -0.21159631862913583, 0.06711645701765961, 0.021138205813635774),
        (5.0, -0.011317732559438513, 0.008761780522182185, 9.015023514288381e-05),
        (0.25, -0.967504030375706, 0.17013281441044067, 0.058811479921931475),
    ],
)
def test_wga_gives_the_authors_numbers(
    beta: float, value: float, length: float, entry: float
) -> None:
    # locuslab/open-unlearning, src/trainer/utils.py, compute_wga_loss; the same formula as
    # tmlr-group/G-effect, dataloader.py
    logits, picked, targets = answer_positions(0.2)
    logprobs = logprobs_of(picked, targets)
    theirs = (wga_weight(logprobs, beta) * logprobs).mean()
    assert float(theirs.detach()) == pytest.approx(value, rel=1e-12)
    found = gradient_of(wga(logprobs, beta).mean(), logits)
    assert found == pytest.approx((length, entry), rel=1e-10)


@pytest.mark.parametrize(
    ("beta1", "beta2", "value", "length", "entry"),
    [
        (5.0, 1.0, -0.003445444970359193, 0.002045449292324855, 6.711240620065298e-05),
        (6.0, 1.0, -0.0020632109908767693, 0.001463995084630229, 1.715052802138145e-05),
        (1.0, 0.5, -0.168679643318245, 0.05211355281369154, 0.018238373075733814),
    ],
)
def test_satimp_gives_the_authors_numbers(
    beta1: float, beta2: float, value: float, length: float, entry: float
) -> None:
    # locuslab/open-unlearning, src/trainer/utils.py, compute_satimp_loss
    logits, picked, targets = answer_positions(0.2)
    logprobs = logprobs_of(picked, targets)
    theirs = (satimp_weight(logprobs, beta1, beta2) * logprobs).mean()
    assert float(theirs.detach()) == pytest.approx(value, rel=1e-12)
    found = gradient_of(satimp(logprobs, beta1, beta2).mean(), logits)
    assert found == pytest.approx((length, entry), rel=1e-10)


@pytest.mark.parametrize(
    ("beta", "a", "value", "length", "entry"),
    [
        (4.0, 0.0, -0.7297442483159187, 0.2931563237590364, 0.0020326499617520036),
        (1.0, 0.0, -2.977508375838975, 0.4157029073413667, 0.04141702625779226),
        (0.1, 1.5, -0.1193462571934471, 0.042115773409440484, 0.010100334466839434),
    ],
)
def test_tnpo_gives_the_authors_numbers(
    beta: float, a: float, value: float, length: float, entry: float
) -> None:
    # tmlr-group/G-effect, dataloader.py, ins_npo (a = 0) and w_ins_npo
    logits, picked, targets = answer_positions(0.2)
    before = logprobs_of(answer_positions(0.9)[1], targets).detach()
    logprobs = logprobs_of(picked, targets)
    theirs = (tnpo_weight(logprobs, before, beta, a) * logprobs).mean()
    assert float(theirs.detach()) == pytest.approx(value, rel=1e-12)
    found = gradient_of(tnpo(logprobs, before, beta, a).mean(), logits)
    assert found == pytest.approx((length, entry), rel=1e-10)


@pytest.mark.parametrize(
    ("ignored", "value", "length", "entry"),
    [
        (0, 1.2069593894119695, 0.14631259520911627, 0.02839436599695926),
        (1, 1.3167956482817087, 0.21225507366689061, 0.0),
        (2, 1.3687887854550533, 0.31490436133127997, 0.0),
    ],
)
def test_ceu_gives_the_authors_numbers(
    ignored: int, value: float, length: float, entry: float
) -> None:
    # locuslab/open-unlearning, src/trainer/unlearn/ceu.py, compute_batch_ceu
    logits, picked, targets = answer_positions(0.2)
    counts = [4, 3, 2]
    values = [part[ignored:] for part in ceu(picked, targets).split(counts)]
    mean = torch.cat(values).mean()
    assert float(mean.detach()) == pytest.approx(value, rel=1e-6)
    assert gradient_of(mean, logits) == pytest.approx((length, entry), rel=1e-5)


@pytest.mark.parametrize(
    ("beta", "value", "length", "entry"),
    [
        (3.0, 2.180438148401216, 0.2168211502801205, 0.012883719042176167),
        (10.0, 2.23706441073057, 0.22851717586531836, 0.028377929783192413),
        (30.0, 2.2371220714018403, 0.22853117590857924, 0.028394365996925377),
    ],
)
def test_undial_gives_the_authors_numbers(
    beta: float, value: float, length: float, entry: float
) -> None:
    # locuslab/open-unlearning, src/trainer/utils.py, compute_undial_loss, given answer positions
    # only: on prompts and padding it takes the label -100 for a token
    logits, picked, targets = answer_positions(0.2)
    mean = undial(picked, answer_positions(0.9)[1].detach(), targets, beta).mean()
    assert float(mean.detach()) == pytest.approx(value, rel=1e-6)
    assert gradient_of(mean, logits) == pytest.approx((length, entry), rel=1e-5)


@pytest.mark.parametrize(
    ("beta", "expected"),
    [
        (0.1, [68.67310421001922, 2.8652915463784234, 45.923963440044176]),
        (0.7, [13.441948880609937, 1.2798065269159036, 8.413405782310136]),
    ],
)
def test_kto_gives_the_authors_numbers(beta: float, expected: list[float]) -> None:
    # licong-lin/negative-preference-optimization, TOFU/dataloader.py, kto_logsigmoid, on batches
    # of one row
    ratio = by_hand.fixed_sums(0.2, by_hand.LABELS) - by_hand.fixed_sums(0.9, by_hand.LABELS)
    refusal = by_hand.fixed_sums(0.7, by_hand.WINNERS) - by_hand.fixed_sums(1.4, by_hand.WINNERS)
    found = kto(ratio, refusal, beta, compat=True)
    assert found.tolist() == pytest.approx(expected, rel=1e-9)


# ---- on a tiny model, against loops over explicit probabilities


def integral(weight: object, p: float, steps: int = 4000) -> float:
    """Integral of weight(q) / q from 0 to p, by midpoints in q = p * s^2."""
    total = 0.0
    for index in range(steps):
        s = (index + 0.5) / steps
        q = p * s * s
        total += weight(q) / q * 2 * p * s / steps  # type: ignore[operator]
    return total


def softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    powers = [math.exp(value - top) for value in logits]
    return [value / sum(powers) for value in powers]


def token_value(loss: Objective, logits: list[float], was: list[float], target: int) -> float:
    """One answer token's part of a loss, from its logits and those of the reference."""
    p, p_ref = softmax(logits)[target], softmax(was)[target]
    if isinstance(loss, WGA):
        return p**loss.beta / loss.beta if loss.beta else math.log(p)
    if isinstance(loss, SatImp):
        return integral(lambda q: q**loss.beta1 * (1 - q) ** loss.beta2, p)
    if isinstance(loss, TNPO):
        beta, a = loss.beta, loss.a
        if a:
            return integral(lambda q: 2 * q ** (beta + a) / (q**beta + p_ref**beta + 1e-5), p)
        return 2 / beta * math.log1p(p**beta / (p_ref**beta + 1e-5))
    if isinstance(loss, Unlikelihood):
        return -math.log(1 - p)
    if isinstance(loss, CEU):
        others = [value for index, value in enumerate(logits) if index != target]
        return -sum(
            q * math.log(r)
            for q, r in zip(
                softmax(others),
                [r for index, r in enumerate(softmax(logits)) if index != target],
                strict=True,
            )
        )
    assert isinstance(loss, UNDIAL)
    lowered = [value - loss.beta * (index == target) for index, value in enumerate(was)]
    return -sum(q * math.log(r) for q, r in zip(softmax(lowered), softmax(logits), strict=True))


@pytest.mark.parametrize("loss", TOKEN_LOSSES, ids=named)
def test_values_of_a_padded_batch_equal_loops_over_rows_alone(loss: Objective) -> None:
    lm, frozen = by_hand.tiny_lm(0.05), by_hand.tiny_lm()
    rows = by_hand.all_rows(lm)
    found = by_hand.values(lm, loss, by_hand.prepared(frozen, rows, loss), rows)
    expected, skip = [], loss.ignore_first_n if isinstance(loss, CEU) else 0
    for row in rows["forget"]:
        logits, targets = by_hand.answer_logits(lm, row)
        before, _ = by_hand.answer_logits(frozen, row)
        tokens = zip(logits[skip:], before[skip:], targets[skip:], strict=True)
        expected.append(sum(token_value(loss, *token) for token in tokens))
    if skip:  # averaged over all tokens, the sum stands for a mean over fewer
        total = sum(row.encoded.answer_tokens for row in rows["forget"])
        expected = [value * total / (total - skip * len(expected)) for value in expected]
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-13)


@pytest.mark.parametrize("compat", [False, True])
def test_kto_of_a_padded_batch_equals_loops_over_rows_alone(compat: bool) -> None:
    lm, frozen, loss = by_hand.tiny_lm(0.05), by_hand.tiny_lm(), KTO(beta=0.3, compat=compat)
    rows = by_hand.all_rows(lm)
    found = by_hand.values(lm, loss, by_hand.prepared(frozen, rows, loss), rows)
    expected = []
    for forget, refusal in zip(rows["forget"], rows["refusal"], strict=True):
        ratio = by_hand.row_sum(lm, forget) - by_hand.row_sum(frozen, forget)
        zero = by_hand.row_sum(lm, refusal) - by_hand.row_sum(frozen, refusal)
        zero = zero if compat else 0.3 * max(0.0, zero)
        expected.append(1 + 2 / 0.3 * math.log1p(math.exp(0.3 * ratio - zero)))
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


# ---- how losses are averaged


@pytest.mark.parametrize("loss", [one for one in LOSSES if not isinstance(one, CEU)], ids=named)
def test_padding_and_company_change_nothing(loss: Objective) -> None:
    lm, frozen = by_hand.tiny_lm(0.05), by_hand.tiny_lm()
    rows = by_hand.all_rows(lm)
    reference = by_hand.prepared(frozen, rows, loss)
    together = by_hand.values(lm, loss, reference, rows)
    alone = [
        by_hand.values(lm, loss, reference, {role: [part[i]] for role, part in rows.items()})
        for i in range(3)
    ]
    # SatImp's values are tiny: only a relative tolerance can fail
    assert together.tolist() == pytest.approx(torch.cat(alone).tolist(), rel=1e-4, abs=1e-14)


@pytest.mark.parametrize("loss", LOSSES, ids=named)
def test_a_step_averages_over_rows_or_answer_tokens(loss: Objective) -> None:
    lm, frozen = by_hand.tiny_lm(0.05), by_hand.tiny_lm()
    rows = by_hand.all_rows(lm)
    reference = by_hand.prepared(frozen, rows, loss)
    found = by_hand.values(lm, loss, reference, rows).tolist()
    count = 3
    if loss in TOKEN_LOSSES:
        count = sum(row.encoded.answer_tokens for row in rows["forget"])
    passes = by_hand.passes_of(lm, loss, None, reference)
    passes.both()
    weighted = 1.0 * found[0] + 0.5 * found[1] + 1.5 * found[2]
    assert passes.totals.forget == pytest.approx(weighted / count, rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES, ids=named)
def test_gradient_accumulation_changes_nothing(loss: Objective) -> None:
    lm, frozen, keep = by_hand.tiny_lm(0.05), by_hand.tiny_lm(), KL()
    reference = by_hand.prepared(frozen, by_hand.all_rows(lm), loss, keep)
    found = []
    for budget, pieces in ((10**6, 1), (1, 3)):
        # a retain weight of next to nothing, so that a small forget gradient shows
        passes = by_hand.passes_of(lm, loss, keep, reference, budget=budget, weights=(0.5, 1e-12))
        assert len(passes.micro_batches) == pieces
        passes.clear()
        passes.both()
        gradient = torch.cat([p.grad.flatten() for p in passes.parameters if p.grad is not None])
        found.append((gradient.double(), passes.totals.forget, passes.totals.keep))
    (once, forget_once, keep_once), (often, forget_often, keep_often) = found
    assert float(once.norm()) > 0
    assert float((once - often).norm() / once.norm()) < 1e-4
    assert forget_often == pytest.approx(forget_once, rel=1e-5)
    assert keep_often == pytest.approx(keep_once, rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES, ids=named)
def test_one_step_against_the_gradient_lowers_the_loss_and_the_answers(loss: Objective) -> None:
    lm, frozen = by_hand.tiny_lm(0.05), by_hand.tiny_lm()
    rows = by_hand.all_rows(lm)
    reference = by_hand.prepared(frozen, rows, loss)
    start = [by_hand.row_sum(lm, row) for row in rows["forget"]]
    before = by_hand.values(lm, loss, reference, rows).double().sum()
    length = by_hand.joined(by_hand.gradients(lm, before)).double().norm()
    with torch.no_grad():
        for parameter in lm.model.parameters():
            parameter -= 0.03 * (parameter.grad / length).float()
    after = by_hand.values(lm, loss, reference, rows).double().sum()
    assert after.item() < before.item()
    if not getattr(loss, "compat", False):
        assert sum(by_hand.row_sum(lm, row) for row in rows["forget"]) < sum(start)


# ---- what the papers say


def test_satimp_weighs_most_at_five_sixths() -> None:
    p = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    for beta1, beta2 in ((5.0, 1.0), (6.0, 1.0), (2.0, 3.0)):
        top = float(p[satimp_weight(p.log(), beta1, beta2).argmax()])
        assert top == pytest.approx(beta1 / (beta1 + beta2), abs=1e-3)


@pytest.mark.parametrize("beta", [0.25, 1.0, 5.0])
def test_ascent_fades_with_the_probability(beta: float) -> None:
    logprobs = torch.linspace(-30, -1e-3, 50, dtype=torch.float64)
    weight = wga_weight(logprobs, beta)
    assert bool((weight[1:] > weight[:-1]).all())
    assert float(weight[0]) < 1e-3
    values = wga(logprobs, beta)
    assert bool((values[1:] > values[:-1]).all())
    assert float(values[0]) < 1e-2


@pytest.mark.parametrize("a", [0.0, 1.5])
@pytest.mark.parametrize("beta", [0.1, 1.0, 4.0])
def test_tnpo_values_are_the_integral_of_their_weights(beta: float, a: float) -> None:
    start = torch.tensor([-0.1, -3.0, -9.0], dtype=torch.float64)
    logprobs = torch.tensor([-2.0, -0.01, -8.0], dtype=torch.float64)
    found = tnpo(logprobs, start, beta, a)
    for value, own, before in zip(found.tolist(), logprobs.tolist(), start.tolist(), strict=True):
        # in x = log q, where the weight falls off towards minus infinity
        width, total = 30 / (beta + a) / 10000, 0.0
        for index in range(10000):
            x = own - (index + 0.5) * width
            joint = math.exp(beta * x) + math.exp(beta * before) + 1e-5
            total += 2 * math.exp((beta + a) * x) / joint * width
        assert value == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize(
    "name",
    ["satimp", "wtnpo"],
)
def test_written_gradients_pass_the_numerical_check(name: str) -> None:
    logprobs = torch.tensor([-0.02, -0.4, -3.0], dtype=torch.float64, requires_grad=True)
    start = torch.tensor([-0.5, -0.1, -2.0], dtype=torch.float64)

    def function(x: Tensor) -> Tensor:
        return satimp(x, 5.0, 0.5) if name == "satimp" else tnpo(x, start, 0.1, 1.5)

    assert torch.autograd.gradcheck(function, (logprobs,))
    assert torch.autograd.gradgradcheck(function, (logprobs,))


def test_nothing_breaks_at_certainty_and_at_impossibility() -> None:
    logprobs = torch.tensor([0.0, -1e-9, -120.0, -1e4], requires_grad=True)
    start = torch.tensor([0.0, -50.0, -1e4, -1e4])
    for values in (
        wga(logprobs, 1.0), satimp(logprobs, 5.0, 1.0), satimp(logprobs, 1.0, 0.5),
        tnpo(logprobs, start, 4.0), tnpo(logprobs, start, 0.1, 1.5),
    ):  # fmt: skip
        (gradient,) = torch.autograd.grad(values.sum(), logprobs)
        assert bool(values.isfinite().all())
        assert bool(gradient.isfinite().all())
        assert bool((gradient >= 0).all())


@pytest.mark.parametrize("gap", [1.0, 14.0, 20.0, 40.0, 1e4])
def test_unlikelihood_has_its_value_and_gradient_at_certain_tokens(gap: float) -> None:
    others = torch.tensor([0.3, -1.1, 0.0, 2.0, -40.0], dtype=torch.float64)
    logits = torch.cat([others.logsumexp(0)[None] + gap, others])[None]
    # by the definition, in decimals: 1 - p is the others' share of all
    shares = others.softmax(0)
    rest = 1 / (1 + math.exp(gap)) if gap < 700 else 0.0
    value = gap + math.log1p(math.exp(-gap))
    slope = torch.cat([torch.tensor([1 - rest], dtype=torch.float64), -(1 - rest) * shares])
    for dtype, digits in ((torch.float32, 2e-5), (torch.float64, 1e-9)):
        given = logits.to(dtype).requires_grad_(True)
        found = unlikelihood(given, torch.tensor([0]))
        (gradient,) = torch.autograd.grad(found.sum(), given)
        assert found.item() == pytest.approx(value, rel=digits)
        torch.testing.assert_close(gradient[0].double(), slope, rtol=digits, atol=1e-7)


def test_undial_rests_where_the_logit_is_lowered() -> None:
    reference = by_hand.fixed_logits(0.9)[0].float()
    targets = torch.tensor([3, 1, 6, 2, 0, 5])
    lowered = reference.clone()
    lowered[torch.arange(6), targets] -= 3.0
    student = lowered.clone().requires_grad_(True)
    at_rest = undial(student, reference, targets, 3.0)
    (gradient,) = torch.autograd.grad(at_rest.sum(), student)
    assert float(gradient.abs().max()) < 1e-6
    target = adjusted_target(reference, targets, 3.0)
    entropy = -(target * target.log()).sum(1)
    torch.testing.assert_close(at_rest, entropy)
    elsewhere = lowered + 0.3 * torch.sin(torch.arange(42.0)).reshape(6, 7)
    assert bool((undial(elsewhere, reference, targets, 3.0) > entropy).all())


def test_undial_with_beta_zero_is_plain_distillation() -> None:
    lm = by_hand.tiny_lm()
    rows, loss = by_hand.all_rows(lm), UNDIAL(beta=0.0)
    still = by_hand.gradients(
        lm, by_hand.values(lm, loss, by_hand.prepared(lm, rows, loss), rows).sum()
    )
    moving = by_hand.gradients(
        lm, by_hand.values(lm, UNDIAL(), by_hand.prepared(lm, rows, loss), rows).sum()
    )
    assert float(by_hand.joined(still).norm()) < 1e-3 * float(by_hand.joined(moving).norm())
    logits, reference = by_hand.fixed_logits(0.2)[0].float(), by_hand.fixed_logits(0.9)[0].float()
    targets = torch.zeros(6, dtype=torch.long)
    expected = -(reference.softmax(1) * logits.log_softmax(1)).sum(1)
    torch.testing.assert_close(undial(logits, reference, targets, 0.0), expected)


# ---- UNDIAL's focus on names


def found_names(text: str, contexts: Sequence[str] = (), subject: str = "") -> list[str]:
    return [text[start:end] for start, end in name_spans(text, contexts, subject)]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("She met Ada Lovelace's cousin in Oslo.", ["Ada", "Lovelace", "Oslo"]),
        ("The house has 12 rooms. Nobody left it before May 1987!", ["12", "May", "1987"]),
        # begins a sentence, but stands inside another one, or is no word of the language
        ("Ada left. Later they saw Ada.", ["Ada", "Ada"]),
        ("NASA and McKay agreed. iPhones did not.", ["NASA", "McKay", "iPhones"]),
        # titles and initials end no sentence; quotes, dashes and colons begin none
        ("He asked Dr. Lund and J. K. Rowling.", ["Dr", "Lund", "J", "K", "Rowling"]),
        ('It is called "Silent Sea" (Mare).', ["Silent", "Sea", "Mare"]),
        ("Some places: Rome – Bergen", ["Rome", "Bergen"]),
        # sentence starts of all kinds
        ('"Well," he said… "Yes." Then:\n- First\nSecond? No', []),
        ("I know that I'm late, and I’ve no bus.", []),
        ("Élodie saw Zoë’s Ørsted-Straße in Москва", ["Zoë", "Ørsted-Straße", "Москва"]),
        ("", []),
    ],
)
def test_names_are_capitals_that_no_sentence_start_explains(text: str, names: list[str]) -> None:
    assert found_names(text) == names


def test_names_that_begin_a_sentence_are_known_from_the_question_or_the_subject() -> None:
    assert found_names("Ada is a baker.") == []
    assert found_names("Ada is a baker.", ["Who is Ada?"]) == ["Ada"]
    assert found_names("Ada is a baker.", ["Ada who?"]) == []
    assert found_names("Ada is a baker.", subject="Ada Lund") == ["Ada"]


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """Words with their space before them, unknown characters in bytes, as Llama 2's."""
    vocabulary = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary += ["▁", *"ABNZOaeilmnosxyd.1", "▁A", "da", "▁Ada", "▁i", "▁is", "in", "▁in"]
    merges = [
        ("▁", "A"),
        ("d", "a"),
        ("▁A", "da"),
        ("▁", "i"),
        ("▁i", "s"),
        ("i", "n"),
        ("▁", "in"),
    ]
    whole = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(vocabulary)},
            merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True,
        )
    )  # fmt: skip
    whole.pre_tokenizer = pre_tokenizers.Metaspace()
    whole.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=whole, bos_token="<s>", unk_token="<unk>")


@pytest.mark.parametrize("make", [tiny_tokenizer, metaspace_tokenizer])
def test_tokens_of_names_are_found_in_any_tokenizer(
    make: Callable[[], PreTrainedTokenizerFast],
) -> None:
    tokenizer = make()
    text = "no 😀 Zoë in Ωmega 1👩 and Ada."
    before = tokenizer("Ada is in", add_special_tokens=False)["input_ids"]
    joined = tokenizer("Ada is in " + text, add_special_tokens=False)["input_ids"]
    assert joined[: len(before)] == before
    ids = [*joined[len(before) :], tokenizer.bos_token_id]
    marks = name_tokens(tokenizer, before, ids)
    assert len(marks) == len(ids)
    assert not marks[-1]
    runs: list[list[int]] = [[]]
    for token, mark in zip(ids, marks, strict=True):
        if mark:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    words = [tokenizer.decode(run).strip() for run in runs if run]
    assert words == ["Zoë", "Ωmega", "1", "Ada"]


NAMED = [
    ("Who is Ada?", "Ada is a baker in Oslo.", ["Ada", "Oslo"]),
    ("Who is Bo Lund?", "No one knows that.", []),
    ("When did it rain?", "It was in May 1987", ["May", "1987"]),
]


Rows = dict[str, list[Row]]


def named_rows(lm: LM) -> tuple[Rows, list[list[bool]]]:
    """Forget rows with and without names; by hand, which of their tokens (bytes) are of names."""
    rows = by_hand.rows_of(lm, [(question, answer) for question, answer, _ in NAMED])
    marks = []
    for row, (_, answer, names) in zip(rows, NAMED, strict=True):
        mark = [False] * row.encoded.answer_tokens
        for name in names:
            start = answer.index(name)
            mark[start : start + len(name)] = [True] * len(name)
        marks.append(mark)
    return {"forget": rows}, marks


def trained(start: LM, loss: Objective, reference: Reference, rows: Rows) -> LM:
    """A copy after 60 steps with a loss."""
    lm = start.copy()
    optimizer = torch.optim.Adam(lm.model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        by_hand.values(lm, loss, reference, rows).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return lm


@lru_cache(maxsize=1)
def learned() -> LM:
    """A tiny model that knows the named rows by heart, so that lowering a logit tells."""
    start = by_hand.tiny_lm()
    rows, _ = named_rows(start)
    return trained(start, Finetune(), Reference(), rows)


@pytest.mark.parametrize("tokens_per_chunk", [1000, 4])
def test_undial_on_names_equals_loops_with_beta_at_their_tokens_only(
    monkeypatch: pytest.MonkeyPatch, tokens_per_chunk: int
) -> None:
    lm, frozen, loss = by_hand.tiny_lm(0.05), learned(), UNDIAL(beta=3.0, focus="names")
    monkeypatch.setattr(forward, "HEAD_CHUNK_ELEMENTS", tokens_per_chunk * 2 * lm.vocabulary)
    rows, marks = named_rows(lm)
    found = by_hand.values(lm, loss, by_hand.prepared(frozen, rows, loss), rows)
    assert found.tolist() == pytest.approx(looped(lm, frozen, rows, marks), rel=1e-5)
    for other in ([[not mark for mark in row] for row in marks], [[True] * 99] * 3):
        wrong = looped(lm, frozen, rows, other)
        assert found.tolist() != pytest.approx(wrong, rel=1e-3)


def looped(lm: LM, frozen: LM, rows: Rows, marks: list[list[bool]]) -> list[float]:
    """UNDIAL's value per row in float64, with a beta of 3 at marked tokens and 0 elsewhere."""
    values = []
    for row, mark in zip(rows["forget"], marks, strict=True):
        logits, targets = by_hand.answer_logits(lm, row)
        before, _ = by_hand.answer_logits(frozen, row)
        tokens = zip(mark, logits, before, targets, strict=False)
        values.append(
            sum(token_value(UNDIAL(beta=3.0 * on), now, was, one) for on, now, was, one in tokens)
        )
    return values


def test_undial_lowers_focused_targets_and_leaves_the_others_alone() -> None:
    reference = by_hand.fixed_logits(0.9)[0].float()
    targets, focus = torch.tensor([3, 1, 6, 2, 0, 5]), torch.tensor([1, 0, 0, 1, 1, 0]).bool()
    found = adjusted_target(reference, targets, 3.0, focus)
    assert torch.equal(found[~focus], reference.softmax(1)[~focus])
    assert torch.equal(found[focus], adjusted_target(reference, targets, 3.0)[focus])


def test_undial_without_focus_is_bit_for_bit_the_loss_without_the_option() -> None:
    lm, frozen, loss = by_hand.tiny_lm(0.05), by_hand.tiny_lm(), UNDIAL(focus="all")
    rows, _ = named_rows(lm)
    step = by_hand.step_of(lm, loss, by_hand.prepared(frozen, rows, loss), rows)

    def plain(logits: Tensor, targets: Tensor, was: Tensor) -> Tensor:
        was, true = was.float(), targets[:, None]
        target = was.scatter(1, true, was.gather(1, true) - 10.0).softmax(dim=1)
        return -(target * logits.float().log_softmax(dim=1)).sum(dim=1)

    expected = step.forget.map_logits(plain, with_reference=True).sum(dim=1)
    assert torch.equal(loss.loss(step), expected)
    assert UNDIAL() == loss


def test_a_row_without_names_is_only_distilled_and_rests_at_the_reference() -> None:
    lm, loss = learned(), UNDIAL(focus="names")
    rows, marks = named_rows(lm)
    reference = by_hand.prepared(lm, rows, loss)
    assert [any(mark) for mark in marks] == [True, False, True]

    def steep(objective: Objective, index: int) -> float:
        value = by_hand.values(lm, objective, reference, rows)[index]
        return float(by_hand.joined(by_hand.gradients(lm, value)).norm())

    assert steep(loss, 1) < 1e-4 * min(steep(loss, 0), steep(loss, 2), steep(UNDIAL(), 1))
    plain = by_hand.values(lm, UNDIAL(beta=0.0), reference, rows)
    assert torch.equal(by_hand.values(lm, loss, reference, rows)[1], plain[1])


def test_undial_on_names_forgets_them_and_keeps_the_rest() -> None:
    start, loss = learned(), UNDIAL(focus="names")
    rows, marks = named_rows(start)
    lm = trained(start, loss, by_hand.prepared(start, rows, loss), rows)
    with torch.no_grad():
        step = by_hand.step_of(lm, loss, Reference(), rows)
        chances = step.forget.token_logprobs[step.forget.mask].exp()
    named = torch.tensor([mark for row in marks for mark in row])
    assert float(chances[named].max()) < 0.2
    assert float(chances[~named].min()) > 0.8


def test_names_of_a_row_are_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, loss = by_hand.tiny_lm(), UNDIAL(focus="names")
    rows, marks = named_rows(lm)
    reference, looked = by_hand.prepared(lm, rows, loss), []

    def counted(*arguments: Any) -> tuple[bool, ...]:
        looked.append(arguments)
        return name_tokens(*arguments)

    monkeypatch.setattr("delible.train.row.name_tokens", counted)
    by_hand.values(lm, UNDIAL(), reference, rows)
    assert not looked
    for _ in range(2):
        by_hand.values(lm, loss, reference, rows)
    assert len(looked) == 3
    assert [list(row.names) for row in rows["forget"]] == marks


def test_ceu_leaves_forgotten_tokens_and_first_tokens_alone() -> None:
    logits = by_hand.fixed_logits(0.2)[0].float()
    targets = torch.tensor([3, 1, 6, 2, 0, 5])
    lengths = []
    for lowered in (0.0, 5.0, 15.0):
        moved = logits.clone()
        moved[torch.arange(6), targets] -= lowered
        (gradient,) = torch.autograd.grad(ceu(moved.requires_grad_(True), targets).sum(), moved)
        lengths.append(float(gradient.norm()))
    assert lengths[1] < 0.05 * lengths[0]
    assert lengths[2] < 1e-4 * lengths[1]


def test_ceu_forgets_no_row_that_is_too_short() -> None:
    lm = by_hand.tiny_lm()
    rows = by_hand.all_rows(lm)
    short = rows["forget"][2].encoded.answer_tokens
    found = by_hand.values(lm, CEU(ignore_first_n=short), by_hand.Reference(), rows)
    assert float(found[2].detach()) == 0.0
    assert bool((found[:2] > 0).all())


def test_kto_fades_earlier_once_refusals_are_likelier() -> None:
    ratio = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    refusal = torch.tensor([-40.0, 0.0, 40.0], dtype=torch.float64)
    (weight,) = torch.autograd.grad(kto(ratio, refusal, 0.1).sum(), ratio)
    assert weight.tolist() == pytest.approx([1.0, 1.0, 2 / (1 + math.exp(4))])
    (compat,) = torch.autograd.grad(kto(ratio, refusal, 0.1, compat=True).sum(), ratio)
    assert compat.tolist() == pytest.approx([2.0, 1.0, 0.0], abs=1e-15)
    # the released form has no upper bound in the refusal, this one has
    assert float(kto(ratio, refusal, 0.1, compat=True)[0].detach()) > 800
    assert float(kto(ratio, refusal, 0.1)[0].detach()) == pytest.approx(1 + 20 * math.log(2))


# ---- options and recipes


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("wga", {"beta": -1}), ("satimp", {"beta1": 0}), ("satimp", {"beta2": -0.1}),
        ("tnpo", {"beta": 0}), ("tnpo", {"a": -1}), ("ceu", {"ignore_first_n": -1}),
        ("undial", {"beta": -3}), ("unlikelihood", {"beta": 1}), ("kto", {"beta": 0}),
        ("undial", {"compat": True}), ("undial", {"focus": "nouns"}),
        ("catnip", {"against": "end"}), ("catnip", {"beta": 0}), ("flat", {"divergence": "TV"}),
    ],
)  # fmt: skip
def test_wrong_options_are_refused(name: str, options: dict[str, object]) -> None:
    with pytest.raises(RecipeError):
        build("objective", {"name": name, **options})


@pytest.mark.parametrize(
    ("name", "objective", "keep"),
    [
        ("wga", "wga", "nll"),
        ("tnpo", "tnpo", "nll"),
        ("wtnpo", "tnpo", "nll"),
        ("satimp", "satimp", "nll"),
        ("undial", "undial", "none"),
        ("ceu", "ceu", "none"),
        ("unlikelihood", "unlikelihood", "nll"),
        ("kto", "kto", "nll"),
        ("catnip", "catnip", "none"),
        ("flat", "flat", "none"),
    ],
)
def test_recipes_ship_and_say_what_they_need(name: str, objective: str, keep: str) -> None:
    recipe = Recipe.named(name)
    assert recipe.objective.card.name == objective
    assert recipe.keep.card.name == keep
    assert Recipe.from_mapping(recipe.spec()) == recipe
    parts = (recipe.objective, recipe.keep, recipe.place, recipe.finish)
    needs = {need for part in parts if part.card.name != "all" for need in part.card.needs}
    assert set(card("recipe", name).needs) == needs


def test_wtnpo_and_undial_recipes_are_the_papers() -> None:
    weighted, distilled = Recipe.named("wtnpo@paper"), Recipe.named("undial")
    assert isinstance(weighted.objective, TNPO)
    assert (weighted.objective.beta, weighted.objective.a) == (4.0, 1.5)
    assert distilled.place.spec()["rank"] == 8
    assert distilled.finish.card.name == "merge_adapter"
