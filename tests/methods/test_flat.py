"""FLAT: its divergences as variational bounds, the released code's numbers, and its promises."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import get_args

import losses_by_hand as by_hand
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.special import lambertw
from torch import Tensor

from delible.methods.objective.flat import FLAT, Divergence, activation, conjugate, flat
from delible.train.recipe import Recipe

DIVERGENCES: tuple[Divergence, ...] = get_args(Divergence)
#: Those whose released form has another sign or no matching conjugate.
CORRECTED: tuple[Divergence, ...] = ("reverse_kl", "squared_hellinger", "neyman")
GRID = torch.linspace(0.005, 0.995, 199, dtype=torch.float64)

#: Generators f of D(p || q) = sum of q f(p / q), by the textbook.
GENERATORS: dict[Divergence, Callable[[float], float]] = {
    "total_variation": lambda t: abs(t - 1) / 2,
    "jensen_shannon": lambda t: t * math.log(t) - (t + 1) * math.log((t + 1) / 2),
    "pearson": lambda t: (t - 1) ** 2,
    "kl": lambda t: t * math.log(t),
    "jeffrey": lambda t: (t - 1) * math.log(t),
    "reverse_kl": lambda t: -math.log(t),
    "squared_hellinger": lambda t: (math.sqrt(t) - 1) ** 2,
    "neyman": lambda t: (1 - t) ** 2 / t,
}
#: Optimal activations f'(t), as functions of the ratio t = p / q.
OPTIMA: dict[Divergence, Callable[[float], float]] = {
    "jensen_shannon": lambda t: math.log(2 * t / (t + 1)),
    "pearson": lambda t: 2 * (t - 1),
    "kl": lambda t: 1 + math.log(t),
    "reverse_kl": lambda t: -1 / t,
    "squared_hellinger": lambda t: 1 - 1 / math.sqrt(t),
    "neyman": lambda t: 1 - 1 / t**2,
}
#: Inverses of the activations: the score at which g takes a value.
INVERSES: dict[Divergence, Callable[[float], float]] = {
    "jensen_shannon": lambda u: -math.log(2 * math.exp(-u) - 1),
    "pearson": lambda u: u,
    "kl": lambda u: u,
    "reverse_kl": lambda u: -math.log(-u),
    "squared_hellinger": lambda u: -math.log(1 - u),
    "neyman": lambda u: -math.log(1 - u),
}


def supremum(divergence: Divergence, u: float) -> float:
    """f*(u) = sup over t > 0 of u t - f(t), by search in log t."""
    generator = GENERATORS[divergence]
    found = minimize_scalar(
        lambda x: generator(math.exp(x)) - u * math.exp(x),
        bounds=(-18, 6),
        method="bounded",
        options={"xatol": 1e-10},
    )
    return -float(found.fun)


# ---- the divergences


@pytest.mark.parametrize("divergence", [one for one in DIVERGENCES if one != "jeffrey"])
def test_the_conjugate_is_that_of_the_generator(divergence: Divergence) -> None:
    scores = torch.tensor([0.05, 0.3, 0.5, 0.7, 0.95], dtype=torch.float64)
    values = conjugate(scores, divergence).tolist()
    for u, value in zip(activation(scores, divergence).tolist(), values, strict=True):
        assert value == pytest.approx(supremum(divergence, u), abs=1e-6)


def test_the_conjugate_of_jeffrey_is_its_series() -> None:
    # closed with Lambert's W: W(e^(1-u)) + 1 / W(e^(1-u)) + u - 2
    for u in (0.0, 0.01, 0.05, 0.3, 1.0):
        w = float(lambertw(math.exp(1 - u)).real)
        exact = w + 1 / w + u - 2
        found = float(conjugate(torch.tensor(u, dtype=torch.float64), "jeffrey"))
        assert found == pytest.approx(exact, abs=0.02 * u**4 + 1e-12)
        assert exact == pytest.approx(supremum("jeffrey", u), abs=1e-6)


@pytest.mark.parametrize("divergence", [one for one in DIVERGENCES if one != "jeffrey"])
def test_minus_the_loss_is_a_lower_bound_of_the_divergence(divergence: Divergence) -> None:
    # three outcomes under p (templates) and q (forget answers), any scores in [0, 1]
    p, q = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.2, 0.3, 0.5]).double()
    ratios = (p / q).tolist()
    exact = sum(w * GENERATORS[divergence](t) for w, t in zip(q.tolist(), ratios, strict=True))

    def bound(scores: Tensor) -> float:
        return float(
            (p * activation(scores, divergence)).sum() - (q * conjugate(scores, divergence)).sum()
        )

    draw = torch.Generator().manual_seed(0)
    for _ in range(200):
        scores = 4 * torch.rand(3, generator=draw, dtype=torch.float64) - 2
        assert bound(scores) <= exact + 1e-9
    if divergence == "total_variation":  # reached in the limit of scores without bound
        best = torch.tensor([1e3, 0.0, -1e3], dtype=torch.float64)
    else:
        best = torch.tensor(
            [INVERSES[divergence](OPTIMA[divergence](t)) for t in ratios], dtype=torch.float64
        )
    assert bound(best) == pytest.approx(exact, abs=1e-9)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_gradients_are_the_tabulated_ones(divergence: Divergence) -> None:
    p = GRID
    sigmoid, square = torch.sigmoid, (1 - GRID.tanh() ** 2) / 2
    template, forget = {
        "total_variation": (-square, square),
        "jensen_shannon": (-sigmoid(-p), sigmoid(p)),
        "pearson": (-torch.ones_like(p), 1 + p / 2),
        "kl": (-torch.ones_like(p), (p - 1).exp()),
        "jeffrey": (-torch.ones_like(p), 1 + p / 2 + 3 * p**2 / 16),
        "reverse_kl": (-(-p).exp(), torch.ones_like(p)),
        "squared_hellinger": (-(-p).exp(), p.exp()),
        "neyman": (-(-p).exp(), (-p / 2).exp()),
    }[divergence]
    found_forget, found_template = slopes(divergence, compat=False)
    torch.testing.assert_close(found_template, template, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found_forget, forget, rtol=1e-9, atol=1e-12)


def slopes(divergence: Divergence, *, compat: bool) -> tuple[Tensor, Tensor]:
    """Gradients of the loss by the forget answer's and by the template's score."""
    forget, template = GRID.clone().requires_grad_(True), GRID.clone().requires_grad_(True)
    value = flat(forget, template, divergence, compat=compat).sum()
    found = torch.autograd.grad(value, (forget, template))
    return found[0], found[1]


def right_way(divergence: Divergence, *, compat: bool) -> bool:
    forget, template = slopes(divergence, compat=compat)
    return bool((forget > 0).all()) and bool((template < 0).all())


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_forget_answers_are_lowered_and_templates_raised(divergence: Divergence) -> None:
    assert right_way(divergence, compat=False)
    assert right_way(divergence, compat=True) == (divergence not in CORRECTED)


def test_what_the_released_forms_do_instead() -> None:
    for divergence in ("reverse_kl", "squared_hellinger"):
        forget, template = slopes(divergence, compat=True)  # type: ignore[arg-type]
        assert bool((forget < 0).all())
        assert bool((template > 0).all())
    forget, template = slopes("neyman", compat=True)
    assert bool((forget > 0).all())
    assert bool((template > 0).all())


def test_bounds() -> None:
    ends = torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.tensor([0.0, 1.0, 0.0, 1.0])
    half = math.tanh(1) / 2
    found = flat(*ends, "total_variation")
    assert found.tolist() == pytest.approx([0.0, -half, half, 0.0])
    kl = flat(*ends, "kl").tolist()
    assert min(kl) == pytest.approx(math.exp(-1) - 1)
    assert max(kl) == pytest.approx(1)
    for divergence in DIVERGENCES:
        for compat in (False, True):
            assert bool(flat(*ends, divergence, compat=compat).isfinite().all())


# ---- golden numbers: UCSC-REAL/FLAT, dataloader.py, ProbLossStable and get_contrastive_loss on
# ---- batches of one row, in float64


def scores(shift: float, labels: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Sums of p over each row's labels, and how many there are."""
    sums, counts = [], []
    for row, wanted in zip(by_hand.fixed_logits(shift).tolist(), labels, strict=True):
        terms = [
            math.exp(by_hand.log_probability(row[t - 1], label))
            for t, label in enumerate(wanted)
            if label != -100
        ]
        sums.append(sum(terms))
        counts.append(len(terms))
    return torch.tensor(sums, dtype=torch.float64), torch.tensor(counts, dtype=torch.float64)


@pytest.mark.parametrize(
    ("divergence", "expected"),
    [
        ("total_variation", [0.16283683098591273, 0.003521321678344208, -0.05741539288334978]),
        ("jensen_shannon", [0.18496678272228773, 0.007937706222591823, -0.03859716987428463]),
        ("pearson", [0.37005854243769487, 0.011760353421409353, -0.11123576124670254]),
        ("kl", [0.5111716817436943, 0.2928920500866635, 0.09934218177992626]),
        ("jeffrey", [0.37274906625703313, 0.011916056867061375, -0.11032648674029527]),
    ],
)
def test_the_authors_numbers_for_means_over_answers(
    divergence: Divergence, expected: list[float]
) -> None:
    (forget, of_forget), (template, of_template) = (
        scores(0.2, by_hand.LABELS),
        scores(0.7, by_hand.WINNERS),
    )
    found = flat(forget / of_forget, template / of_template, divergence)
    assert found.tolist() == pytest.approx(expected, rel=1e-6)  # log 2 is fp32 in the original


@pytest.mark.parametrize(
    ("divergence", "expected"),
    [
        ("total_variation", [0.1344029382786098, -0.010599403969923038, -0.060615118891835365]),
        ("jensen_shannon", [0.14776129042286645, -0.008544808598902276, -0.054904658763862635]),
        ("pearson", [0.295581678951975, -0.019725696313630706, -0.12212109350993848]),
        ("kl", [0.48248771141238284, 0.29633529348471305, 0.18346141821458897]),
        ("jeffrey", [0.2969592271474762, -0.019692064369369863, -0.12206289994152841]),
        ("reverse_kl", [-0.2759189673030762, 0.026840404657575645, 0.15111438372349673]),
        ("squared_hellinger", [-0.2400431220169343, 0.03006040579913198, 0.15573051832727564]),
        ("neyman", [0.3078459418910835, 0.19124017862086462, 0.3489189355283697]),
    ],
)
def test_the_authors_numbers_for_means_over_rows(
    divergence: Divergence, expected: list[float]
) -> None:
    # rows of six tokens predict five
    forget, template = scores(0.2, by_hand.LABELS)[0] / 5, scores(0.7, by_hand.WINNERS)[0] / 5
    found = flat(forget, template, divergence, compat=True)
    assert found.tolist() == pytest.approx(expected, rel=1e-6)


# ---- on a tiny model


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_values_of_a_padded_batch_equal_loops_over_rows_alone(
    divergence: Divergence, compat: bool
) -> None:
    lm, loss = by_hand.tiny_lm(0.05), FLAT(divergence=divergence, compat=compat)
    rows = by_hand.all_rows(lm)
    found = by_hand.values(lm, loss, by_hand.Reference(), rows)
    means = []
    for role in ("forget", "refusal"):
        for row in rows[role]:
            logits, targets = by_hand.answer_logits(lm, row)
            total = sum(
                math.exp(by_hand.log_probability(z, y))
                for z, y in zip(logits, targets, strict=True)
            )
            means.append(total / (len(row.encoded.ids) - 1 if compat else len(targets)))
    forget, template = torch.tensor(means[:3]).double(), torch.tensor(means[3:]).double()
    expected = flat(forget, template, divergence, compat=compat)
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-6)


def test_the_released_average_is_diluted_by_the_prompt() -> None:
    lm = by_hand.tiny_lm(0.05)
    rows = by_hand.all_rows(lm)

    def length(loss: FLAT) -> float:
        value = by_hand.values(lm, loss, by_hand.Reference(), rows).sum()
        return float(by_hand.joined(by_hand.gradients(lm, value)).norm())

    assert length(FLAT(compat=True)) < 0.5 * length(FLAT())


def test_a_template_that_is_the_forget_answer_moves_nothing() -> None:
    lm, loss = by_hand.tiny_lm(0.05), FLAT()
    rows = by_hand.all_rows(lm)
    moving = by_hand.gradients(lm, by_hand.values(lm, loss, by_hand.Reference(), rows).sum())
    rows["refusal"] = rows["forget"]
    value = by_hand.values(lm, loss, by_hand.Reference(), rows)
    assert value.tolist() == [0.0, 0.0, 0.0]
    still = by_hand.joined(by_hand.gradients(lm, value.sum()))
    assert float(still.norm()) < 1e-5 * float(by_hand.joined(moving).norm())


def test_neither_a_reference_nor_retain_rows_are_asked_for() -> None:
    lm = by_hand.tiny_lm()
    for divergence in DIVERGENCES:
        loss = FLAT(divergence=divergence)
        assert loss.reference_kinds(lm) == ()
        assert set(loss.roles) == {"forget", "refusal"}
    assert set(FLAT.card.needs) == {"forget", "refusals"}
    recipe = Recipe.named("flat")
    assert recipe.objective == FLAT()
    assert recipe.keep.card.name == "none"
    assert by_hand.prepared(lm, by_hand.all_rows(lm), recipe.objective).values == {}


@pytest.mark.parametrize("divergence", ["total_variation", "kl"])
def test_a_few_steps_teach_templates_and_forget_answers(divergence: Divergence) -> None:
    lm, loss = by_hand.tiny_lm(), FLAT(divergence=divergence)
    rows = by_hand.all_rows(lm)
    optimizer = torch.optim.AdamW(lm.model.parameters(), lr=0.01, weight_decay=0.0)
    before = {role: sum(by_hand.row_sum(lm, row) for row in part) for role, part in rows.items()}
    for _ in range(8):
        optimizer.zero_grad()
        by_hand.values(lm, loss, by_hand.Reference(), rows).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    after = {role: sum(by_hand.row_sum(lm, row) for row in part) for role, part in rows.items()}
    assert after["refusal"] > before["refusal"]
    assert after["forget"] - before["forget"] < after["refusal"] - before["refusal"]
