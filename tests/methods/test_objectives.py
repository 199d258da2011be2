"""Forget losses: the authors' numbers, float64 loops, and what their papers say of them."""

from __future__ import annotations

import math
from pathlib import Path

import losses_by_hand as by_hand
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from delible.component import build
from delible.errors import RecipeError
from delible.methods.keep.hidden_mse import HiddenMSE
from delible.methods.keep.kl import KL
from delible.methods.keep.nll import NLL
from delible.methods.objective.dpo import DPO, dpo
from delible.methods.objective.gradient_ascent import GradientAscent, gradient_ascent
from delible.methods.objective.idk import IDK
from delible.methods.objective.margin_flattening import MarginFlattening, margin_flattening
from delible.methods.objective.npo import NPO, npo
from delible.methods.objective.rmu import RMU, control_vector, mean_norm
from delible.methods.objective.simnpo import SimNPO, simnpo
from delible.records import QA
from delible.registry import card
from delible.train.engine import Trainer
from delible.train.losses import Keep, Objective
from delible.train.recipe import Recipe
from delible.train.representation import squared_distance

OBJECTIVES: list[Objective] = [
    GradientAscent(), NPO(), SimNPO(beta=0.3, delta=0.3), DPO(), IDK(), MarginFlattening(),
    RMU(depth=0.5), RMU(depth=0.5, adaptive=None, direction="gaussian"),
]  # fmt: skip
KEEPS: list[Keep] = [NLL(), KL(), HiddenMSE(depth=0.5)]


def named(loss: Objective | Keep) -> str:
    return type(loss).__name__


# ---- golden numbers: the functions of the named repositories, run on these logits in float64


@pytest.mark.parametrize(
    ("beta", "expected"),
    [(0.1, 14.68169383542217), (0.7, 2.9483570393619045), (2.5, 1.796452220709399)],
)
def test_npo_gives_the_authors_numbers(beta: float, expected: float) -> None:
    # locuslab/open-unlearning, src/trainer/utils.py, compute_dpo_loss without a winner; the
    # same formula as licong-lin/negative-preference-optimization, TOFU/dataloader.py
    sums = by_hand.fixed_sums(0.2, by_hand.LABELS)
    reference = by_hand.fixed_sums(0.9, by_hand.LABELS)
    assert float(npo(sums, reference, beta).mean()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("beta", "expected"),
    [(0.1, 15.925112956086192), (0.7, 5.375293349037408), (2.5, 5.032273104682545)],
)
def test_dpo_gives_the_authors_numbers(beta: float, expected: float) -> None:
    # locuslab/open-unlearning, src/trainer/utils.py, compute_dpo_loss
    loser = by_hand.fixed_sums(0.2, by_hand.LABELS) - by_hand.fixed_sums(0.9, by_hand.LABELS)
    winner = by_hand.fixed_sums(0.7, by_hand.WINNERS) - by_hand.fixed_sums(1.4, by_hand.WINNERS)
    assert float(dpo(winner, loser, beta).mean()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("beta", "delta", "expected"),
    [
        (2.5, 0.0, 0.002657071641551802),
        (4.5, 0.0, 3.552859565771676e-05),
        (0.7, 1.5, 0.9507172343827673),
    ],
)
def test_simnpo_gives_the_authors_numbers(beta: float, delta: float, expected: float) -> None:
    # locuslab/open-unlearning, src/trainer/unlearn/simnpo.py; the same formula as
    # OPTML-Group/Unlearn-Simple, TOFU/dataloader.py
    counts = torch.tensor([4.0, 3.0, 2.0], dtype=torch.float64)
    found = simnpo(by_hand.fixed_sums(0.2, by_hand.LABELS), counts, beta, delta)
    assert float(found.mean()) == pytest.approx(expected, rel=1e-9)


def test_gradient_ascent_is_minus_the_summed_loss_of_the_authors() -> None:
    # locuslab/open-unlearning, src/trainer/utils.py, compute_batch_nll
    expected = torch.tensor([7.410176413892384, 10.438603799759269, 7.3453908777118615]).double()
    found = gradient_ascent(by_hand.fixed_sums(0.2, by_hand.LABELS))
    torch.testing.assert_close(found, -expected, rtol=1e-6, atol=0)


def test_margin_flattening_gives_the_authors_number() -> None:
    # locuslab/open-unlearning, src/trainer/unlearn/pdu.py, given labels that are shifted
    mask = torch.tensor(by_hand.LABELS)[:, 1:] != -100
    found = margin_flattening(by_hand.fixed_logits(0.2)[:, :-1][mask])
    assert float(found.mean()) == pytest.approx(10.4778394931736, rel=1e-6)


def test_rmu_gives_the_authors_number() -> None:
    # locuslab/open-unlearning, src/trainer/unlearn/rmu.py, compute_activation_loss of one row
    states, vector = by_hand.fixed_logits(0.2)[1:2], by_hand.fixed_logits(0.9)[0, :1]
    positions = torch.tensor([[True] * 5 + [False]])
    found = squared_distance(states, vector[:, None], positions) / 5
    assert float(found) == pytest.approx(12.378224005100515, rel=1e-6)


# ---- every objective on a tiny model, against loops over explicit probabilities


def expected_value(loss: Objective, lm: by_hand.LM, frozen: by_hand.LM, index: int) -> float:
    rows = by_hand.all_rows(lm)
    forget, refusal = rows["forget"][index], rows["refusal"][index]
    own, was = by_hand.row_sum(lm, forget), by_hand.row_sum(frozen, forget)
    if isinstance(loss, GradientAscent):
        return own
    if isinstance(loss, IDK):
        return -by_hand.row_sum(lm, refusal)
    if isinstance(loss, NPO):
        left, right = math.exp(loss.beta * own), math.exp(loss.beta * was)
        return -(2 / loss.beta) * math.log(right / (left + right))
    if isinstance(loss, SimNPO):
        mean = -own / forget.encoded.answer_tokens
        odds = math.exp(loss.beta * (mean - loss.delta))
        return -(2 / loss.beta) * math.log(odds / (1 + odds))
    if isinstance(loss, DPO):
        margin = by_hand.row_sum(lm, refusal) - by_hand.row_sum(frozen, refusal) - own + was
        return -(2 / loss.beta) * math.log(1 / (1 + math.exp(-loss.beta * margin)))
    if isinstance(loss, MarginFlattening):
        logits, _ = by_hand.answer_logits(lm, forget)
        return sum((max(z) - sum(z) / len(z)) ** 2 for z in logits)
    assert isinstance(loss, RMU)
    states = by_hand.block_output(lm, forget, 1)
    unit = control_vector(len(states[0]), loss.direction, loss.seed).tolist()
    length = loss.steering
    if loss.adaptive is not None:
        before = by_hand.block_output(frozen, forget, 1)
        norms = [math.sqrt(sum(x * x for x in state)) for state in before]
        length = loss.adaptive * sum(norms) / len(norms)
    return sum(
        sum((x - length * u) ** 2 for x, u in zip(state, unit, strict=True)) / len(unit)
        for state in states
    )


@pytest.mark.parametrize("loss", OBJECTIVES, ids=named)
def test_values_of_a_padded_batch_equal_loops_over_rows_alone(loss: Objective) -> None:
    lm, frozen = by_hand.tiny_lm(0.05), by_hand.tiny_lm()
    rows = by_hand.all_rows(lm)
    found = by_hand.values(lm, loss, by_hand.prepared(frozen, rows, loss), rows)
    expected = [expected_value(loss, lm, frozen, index) for index in range(3)]
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(expected, rel=2e-5, abs=1e-4)


@pytest.mark.parametrize("loss", OBJECTIVES, ids=named)
def test_padding_and_company_change_nothing(loss: Objective) -> None:
    lm, frozen = by_hand.tiny_lm(0.05), by_hand.tiny_lm()
    rows = by_hand.all_rows(lm)
    reference = by_hand.prepared(frozen, rows, loss)
    together = by_hand.values(lm, loss, reference, rows)
    alone = [
        by_hand.values(lm, loss, reference, {role: [part[i]] for role, part in rows.items()})
        for i in range(3)
    ]
    assert together.tolist() == pytest.approx(torch.cat(alone).tolist(), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("loss", OBJECTIVES, ids=named)
def test_a_step_averages_over_rows_tokens_or_positions(loss: Objective) -> None:
    lm, frozen = by_hand.tiny_lm(0.05), by_hand.tiny_lm()
    rows = by_hand.all_rows(lm)
    reference = by_hand.prepared(frozen, rows, loss)
    found = by_hand.values(lm, loss, reference, rows).tolist()
    answers = rows["refusal"] if isinstance(loss, IDK) else rows["forget"]
    if isinstance(loss, NPO | SimNPO | DPO):
        count = 3
    elif isinstance(loss, RMU):
        count = sum(len(row.encoded.ids) for row in answers)
    else:
        count = sum(len(row.encoded.ids) - row.encoded.start for row in answers)
    passes = by_hand.passes_of(lm, loss, None, reference)
    passes.both()
    weighted = 1.0 * found[0] + 0.5 * found[1] + 1.5 * found[2]
    assert passes.totals.forget == pytest.approx(weighted / count, rel=1e-5)


@pytest.mark.parametrize("keep", KEEPS, ids=named)
@pytest.mark.parametrize("loss", OBJECTIVES, ids=named)
def test_gradient_accumulation_changes_nothing(loss: Objective, keep: Keep) -> None:
    lm, frozen = by_hand.tiny_lm(0.05), by_hand.tiny_lm()
    reference = by_hand.prepared(frozen, by_hand.all_rows(lm), loss, keep)
    found = []
    for budget, pieces in ((10**6, 1), (1, 3)):
        passes = by_hand.passes_of(lm, loss, keep, reference, budget=budget, weights=(0.5, 2.0))
        assert len(passes.micro_batches) == pieces
        passes.clear()
        passes.both()
        gradient = torch.cat([p.grad.flatten() for p in passes.parameters if p.grad is not None])
        found.append((gradient, passes.totals.forget, passes.totals.keep))
    (once, forget_once, keep_once), (often, forget_often, keep_often) = found
    assert float((once - often).norm() / once.norm()) < 1e-6
    assert forget_often == pytest.approx(forget_once, rel=1e-6)
    assert keep_often == pytest.approx(keep_once, rel=1e-6)


@pytest.mark.parametrize(
    "loss", [loss for loss in OBJECTIVES if not isinstance(loss, RMU)], ids=named
)
def test_one_step_against_the_gradient_lowers_the_loss(loss: Objective) -> None:
    lm, frozen = by_hand.tiny_lm(0.05), by_hand.tiny_lm()
    rows = by_hand.all_rows(lm)
    reference = by_hand.prepared(frozen, rows, loss)
    before = by_hand.values(lm, loss, reference, rows).sum()
    length = by_hand.joined(by_hand.gradients(lm, before)).norm()
    with torch.no_grad():
        for parameter in lm.model.parameters():
            parameter -= 0.01 / length * parameter.grad
    after = by_hand.values(lm, loss, reference, rows).sum()
    assert after.item() < before.item()
    if not isinstance(loss, IDK | MarginFlattening):
        assert sum(by_hand.row_sum(lm, row) for row in rows["forget"]) < sum(
            by_hand.row_sum(by_hand.tiny_lm(0.05), row) for row in rows["forget"]
        )


# ---- NPO


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
def test_npo_starts_as_ascent_on_sums(beta: float) -> None:
    lm = by_hand.tiny_lm()
    rows, loss = by_hand.all_rows(lm), NPO(beta=beta)
    reference = by_hand.prepared(lm, rows, loss)
    value = by_hand.values(lm, loss, reference, rows)
    assert value.tolist() == pytest.approx([2 / beta * math.log(2)] * 3, rel=1e-5)
    found = by_hand.joined(by_hand.gradients(lm, value.mean()))
    sums = by_hand.values(lm, GradientAscent(), reference, rows)
    ascent = by_hand.joined(by_hand.gradients(lm, gradient_ascent(sums).mean()))
    assert float(torch.cosine_similarity(found, ascent, dim=0)) == pytest.approx(1, abs=1e-5)
    assert float(found.norm() / ascent.norm()) == pytest.approx(1, abs=1e-5)


def weight(r: Tensor, beta: float) -> Tensor:
    """Gradient of NPO by log p where r = log p_ref - log p."""
    logprob = (-r).requires_grad_(True)
    (gradient,) = torch.autograd.grad(npo(logprob, torch.zeros_like(r), beta).sum(), logprob)
    return gradient


def test_npo_becomes_ascent_as_beta_vanishes() -> None:
    r = torch.linspace(-9.9, 9.9, 41, dtype=torch.float64)
    assert float((weight(r, 1e-4) - 1).abs().max()) < 1e-3
    assert float((weight(r, 0.1) - 1).abs().max()) > 0.4


def test_npo_has_the_gradient_of_ascent_as_beta_vanishes_on_a_moved_model() -> None:
    lm, frozen = by_hand.tiny_lm(0.05), by_hand.tiny_lm()
    rows = by_hand.all_rows(lm)
    reference = by_hand.prepared(frozen, rows, NPO())
    ratios = [by_hand.row_sum(lm, row) - by_hand.row_sum(frozen, row) for row in rows["forget"]]
    assert all(0.01 < abs(ratio) < 10 for ratio in ratios)
    sums = by_hand.values(lm, GradientAscent(), reference, rows).sum()
    ascent = by_hand.joined(by_hand.gradients(lm, sums))

    def apart(beta: float) -> float:
        value = by_hand.values(lm, NPO(beta=beta), reference, rows).sum()
        return float((by_hand.joined(by_hand.gradients(lm, value)) - ascent).norm() / ascent.norm())

    assert apart(1e-4) < 1e-3
    assert apart(1.0) > 0.01


@pytest.mark.parametrize("beta", [0.05, 0.1, 1.0])
def test_npo_weight_falls_from_two_to_zero(beta: float) -> None:
    found = weight(torch.linspace(-15 / beta, 15 / beta, 101, dtype=torch.float64), beta)
    assert bool((found[1:] < found[:-1]).all())
    assert float(found[0]) == pytest.approx(2, abs=1e-6)
    assert float(found[50]) == pytest.approx(1, abs=1e-9)
    assert float(weight(torch.tensor([10 / beta], dtype=torch.float64), beta)) < 1e-4


# ---- SimNPO


def test_simnpo_does_not_see_length_and_npo_does() -> None:
    sums, counts = torch.tensor([-3.0, -8.0]), torch.tensor([4.0, 5.0])
    assert torch.equal(simnpo(sums, counts, 2.5, 0.1), simnpo(2 * sums, 2 * counts, 2.5, 0.1))
    start = torch.tensor([-1.0, -2.0])
    assert not torch.allclose(npo(sums, start, 0.1), npo(2 * sums, 2 * start, 0.1))


def test_simnpo_margin_is_the_papers_gamma_over_beta() -> None:
    # -(2 / beta) log sigmoid(-(beta / |y|) log p - gamma) with gamma = beta * delta
    beta, gamma, total, count = 2.5, 0.75, -6.0, 4.0
    expected = -(2 / beta) * math.log(1 / (1 + math.exp(beta / count * total + gamma)))
    found = simnpo(torch.tensor([total]), torch.tensor([count]), beta, gamma / beta)
    assert float(found) == pytest.approx(expected, rel=1e-6)


# ---- DPO


def test_dpo_of_equal_winner_and_loser_moves_nothing() -> None:
    lm, frozen, loss = by_hand.tiny_lm(0.05), by_hand.tiny_lm(), DPO(beta=0.5)
    rows = by_hand.all_rows(lm)
    rows["refusal"] = rows["forget"]
    reference = by_hand.prepared(frozen, rows, loss)
    value = by_hand.values(lm, loss, reference, rows)
    assert value.tolist() == pytest.approx([2 / 0.5 * math.log(2)] * 3, rel=1e-5)
    still = by_hand.joined(by_hand.gradients(lm, value.sum()))
    rows["refusal"] = by_hand.all_rows(lm)["refusal"]
    reference.prepare(frozen, rows["refusal"], ("logprobs",))
    moving = by_hand.joined(by_hand.gradients(lm, by_hand.values(lm, loss, reference, rows).sum()))
    assert float(still.norm() / moving.norm()) < 1e-5


def test_npo_is_dpo_without_the_winner() -> None:
    sums = by_hand.fixed_sums(0.2, by_hand.LABELS)
    reference = by_hand.fixed_sums(0.9, by_hand.LABELS)
    without = dpo(torch.zeros_like(sums), sums - reference, 0.3)
    torch.testing.assert_close(without, npo(sums, reference, 0.3), rtol=1e-12, atol=0)


# ---- RMU


def test_rmu_reaches_nothing_above_its_layer() -> None:
    lm, loss = by_hand.tiny_lm(), RMU(depth=0.5)
    assert loss.reads(lm) == (1,)
    rows = by_hand.all_rows(lm)
    value = by_hand.values(lm, loss, by_hand.prepared(lm, rows, loss), rows).sum()
    reached = by_hand.gradients(lm, value)
    above = ("model.layers.2.", "model.norm.", "lm_head.")
    assert not [name for name in reached if name.startswith(above)]
    below = [name for name in reached if name.startswith(("model.layers.0.", "model.layers.1."))]
    assert len(below) == 18
    assert all(float(reached[name].abs().max()) > 0 for name in below)


def test_rmu_overfits_to_a_vector_of_the_wanted_length() -> None:
    lm, loss = by_hand.tiny_lm(), RMU(depth=0.5, adaptive=None, steering=20.0)
    rows = by_hand.all_rows(lm)
    reference = by_hand.prepared(lm, rows, loss)
    optimizer = torch.optim.AdamW(lm.model.parameters(), lr=0.05, weight_decay=0.0)
    for _ in range(30):
        optimizer.zero_grad()
        by_hand.values(lm, loss, reference, rows).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    group = by_hand.step_of(lm, loss, reference, rows).forget
    states = group.hidden(1)[group.positions].detach()
    unit = control_vector(states.shape[1], "uniform", 0)
    assert float(torch.cosine_similarity(states, unit[None]).mean()) > 0.95
    assert float(states.norm(dim=1).mean()) == pytest.approx(20, rel=0.05)


@pytest.mark.parametrize(("weight", "holds"), [(1200.0, True), (0.0, False)])
def test_a_large_retain_weight_holds_the_retain_states(weight: float, holds: bool) -> None:
    lm, frozen = by_hand.tiny_lm(), by_hand.tiny_lm()
    rows, forget, keep = by_hand.all_rows(lm), RMU(depth=0.5), HiddenMSE(depth=0.5)
    reference = by_hand.prepared(frozen, rows, forget, keep)
    states = [by_hand.block_output(frozen, row, 1) for row in rows["retain"]]
    flat = [x for row in states for state in row for x in state]
    size = sum(x * x for x in flat) / len(flat)  # mean of ||h||^2 / d
    before = float(by_hand.values(lm, forget, reference, rows).detach().sum())
    optimizer = torch.optim.AdamW(lm.model.parameters(), lr=3e-4, weight_decay=0.0)
    for step in range(30):
        optimizer.param_groups[0]["lr"] = 3e-4 * (1 - step / 30)
        optimizer.zero_grad()
        loss = by_hand.values(lm, forget, reference, rows).sum()
        (loss + weight * by_hand.values(lm, keep, reference, rows).sum()).backward()
        optimizer.step()
    moved = [by_hand.block_output(lm, row, 1) for row in rows["retain"]]
    new = [x for row in moved for state in row for x in state]
    apart = sum((a - b) ** 2 for a, b in zip(new, flat, strict=True)) / len(flat)
    assert apart > 0
    assert (apart < 1e-4 * size) == holds
    assert float(by_hand.values(lm, forget, reference, rows).detach().sum()) < before


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rmu_changes_only_the_chosen_matrices_on_disk(family: str, tmp_path: Path) -> None:
    lm = by_hand.LM(
        by_hand.tiny_model(family, tie_word_embeddings=False),
        by_hand.tiny_tokenizer(),
        precision="float32",
    )
    recipe = Recipe.named("rmu").changed(
        {}, {"training.max_steps": 3, "training.learning_rate": 1e-3, "training.max_length": 64}
    )
    records = {
        role: [QA(question=question, answer=answer) for question, answer in pairs]
        for role, pairs in (("forget", by_hand.FORGET), ("retain", by_hand.RETAIN))
    }
    lm.save(tmp_path / "before")
    Trainer(lm, recipe, records).train().lm.save(tmp_path / "after")
    before, after = (
        load_file(tmp_path / name / "model.safetensors") for name in ("before", "after")
    )
    top = lm.anatomy.layer_at(7 / 32)
    chosen = {
        name
        for layer in range(max(0, top - 2), top + 1)
        for name in lm.anatomy.parameter_names(layer, "mlp_out")
    }
    assert set(before) == set(after)
    assert chosen
    changed = {name for name in before if before[name].ne(after[name]).any()}
    stored = {name if name in before else name.partition(".")[2] for name in chosen}
    assert changed == stored


def test_adaptive_rmu_equals_rmu_with_the_measured_length() -> None:
    lm, frozen, adaptive = by_hand.tiny_lm(0.05), by_hand.tiny_lm(), RMU(depth=0.5, adaptive=4.0)
    rows = {"forget": by_hand.all_rows(lm)["forget"][1:2]}
    states = by_hand.block_output(frozen, rows["forget"][0], 1)
    measured = 4 * sum(math.sqrt(sum(x * x for x in state)) for state in states) / len(states)
    fixed = RMU(depth=0.5, adaptive=None, steering=measured)
    found = []
    for loss in (adaptive, fixed):
        reference = by_hand.prepared(frozen, rows, loss)
        found.append(by_hand.gradients(lm, by_hand.values(lm, loss, reference, rows).sum()))
    torch.testing.assert_close(by_hand.joined(found[0]), by_hand.joined(found[1]))


def test_mean_norm_counts_real_positions_only() -> None:
    states = torch.tensor([[[3.0, 4.0], [0.0, 1.0], [60.0, 80.0]]])
    assert mean_norm(states, torch.tensor([[True, True, False]])).tolist() == [3.0]


def test_control_vectors_are_fixed_units_and_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    first, again = control_vector(4096, "uniform", 3), control_vector(4096, "uniform", 3)
    other = control_vector(4096, "uniform", 4)
    assert torch.equal(first, again)
    assert torch.equal(before, torch.get_rng_state())
    assert float(first.norm()) == pytest.approx(1, abs=1e-5)
    assert bool((first >= 0).all())
    assert float(first @ other) == pytest.approx(0.75, abs=0.03)
    around = control_vector(4096, "gaussian", 3) @ control_vector(4096, "gaussian", 4)
    assert abs(float(around)) < 0.06


def test_rmu_ignores_what_lies_in_the_padding() -> None:
    states = torch.ones(1, 3, 4)
    states[0, 2] = float("inf")
    found = squared_distance(
        states.requires_grad_(True), torch.zeros(1, 1, 4), torch.tensor([[True, True, False]])
    )
    found.sum().backward()
    assert found.tolist() == [2.0]
    assert states.grad is not None
    assert bool((states.grad[0, 2] == 0).all())


# ---- margin flattening


def test_margin_flattening_is_zero_only_for_equal_logits() -> None:
    assert margin_flattening(torch.full((2, 9), 3.5)).tolist() == [0.0, 0.0]
    assert float(margin_flattening(torch.tensor([[0.0, 0.0, 0.01]]))) > 0
    logits = by_hand.fixed_logits(0.2)[0]
    torch.testing.assert_close(
        margin_flattening(logits + 7), margin_flattening(logits), rtol=1e-5, atol=0
    )


def test_margin_flattening_gradient_by_logits() -> None:
    logits = by_hand.fixed_logits(0.2)[0].float().requires_grad_(True)
    (found,) = torch.autograd.grad(margin_flattening(logits).sum(), logits)
    gap, largest = logits.amax(1) - logits.mean(1), logits.argmax(1)
    size = logits.shape[1]
    expected = (-2 * gap[:, None] / size).expand_as(logits).clone()
    expected[torch.arange(len(logits)), largest] = 2 * gap * (1 - 1 / size)
    torch.testing.assert_close(found, expected)
    assert float(found.sum(1).abs().max()) < 1e-5


def test_margin_flattening_gradient_grows_where_that_of_entropy_vanishes() -> None:
    norms, entropy_norms = [], []
    for scale in (1.0, 10.0, 100.0):
        logits = torch.tensor([[scale * 5.0, 0.3, -0.2, 0.1]], requires_grad=True)
        (flat,) = torch.autograd.grad(margin_flattening(logits).sum(), logits)
        entropy = -(logits.softmax(1) * logits.log_softmax(1)).sum()
        (vanishing,) = torch.autograd.grad(-entropy, logits)
        norms.append(float(flat.norm()))
        entropy_norms.append(float(vanishing.norm()))
    assert norms[1] / norms[0] == pytest.approx(10, rel=0.02)
    assert norms[2] / norms[1] == pytest.approx(10, rel=0.02)
    assert entropy_norms[0] > 0.01
    assert entropy_norms[1] < 1e-15


def test_margin_flattening_leaves_rows_beyond_the_vocabulary_out() -> None:
    wide = by_hand.LM(
        by_hand.tiny_model("llama", vocab_size=300), by_hand.tiny_tokenizer(), precision="float32"
    )
    rows, loss = by_hand.all_rows(wide), MarginFlattening()
    with torch.no_grad():
        wide.core.get_output_embeddings().weight[260:] += 5.0
    found = by_hand.values(wide, loss, by_hand.Reference(), rows).detach()
    logits, _ = by_hand.answer_logits(wide, rows["forget"][0])
    expected = sum((max(z[:260]) - sum(z[:260]) / 260) ** 2 for z in logits)
    with_padding = sum((max(z) - sum(z) / 300) ** 2 for z in logits)
    assert float(found[0]) == pytest.approx(expected, rel=1e-5)
    assert abs(expected - with_padding) > 1


# ---- options and recipes


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("npo", {"beta": 0}), ("simnpo", {"beta": -1}), ("dpo", {"beta": 0}),
        ("rmu", {"depth": 1.5}), ("rmu", {"adaptive": 0}), ("rmu", {"direction": "north"}),
        ("gradient_ascent", {"beta": 1}), ("idk", {"x": 1}),
    ],
)  # fmt: skip
def test_wrong_options_are_refused(name: str, options: dict[str, object]) -> None:
    with pytest.raises(RecipeError):
        build("objective", {"name": name, **options})


@pytest.mark.parametrize(
    ("name", "objective", "keep", "balance"),
    [
        ("gradient_ascent", "gradient_ascent", "none", "weighted_sum"),
        ("graddiff", "gradient_ascent", "nll", "weighted_sum"),
        ("graddiff_kl", "gradient_ascent", "kl", "weighted_sum"),
        ("npo", "npo", "nll", "weighted_sum"),
        ("npo_kl", "npo", "kl", "weighted_sum"),
        ("simnpo", "simnpo", "nll", "weighted_sum"),
        ("dpo", "dpo", "nll", "weighted_sum"),
        ("idk", "idk", "nll", "weighted_sum"),
        ("rmu", "rmu", "hidden_mse", "weighted_sum"),
        ("pdu", "margin_flattening", "nll", "primal_dual"),
    ],
)
def test_recipes_ship_and_say_what_they_need(
    name: str, objective: str, keep: str, balance: str
) -> None:
    recipe = Recipe.named(name)
    assert recipe.objective.card.name == objective
    assert recipe.keep.card.name == keep
    assert recipe.balance.card.name == balance
    assert Recipe.from_mapping(recipe.spec()) == recipe
    needs = set(recipe.objective.card.needs) | set(recipe.keep.card.needs)
    assert set(card("recipe", name).needs) == needs


def test_the_rmu_recipe_trains_at_and_below_the_steered_layer() -> None:
    recipe = Recipe.named("rmu")
    assert isinstance(recipe.objective, RMU)
    assert isinstance(recipe.keep, HiddenMSE)
    place = recipe.place.spec()
    assert place["depth"] == recipe.objective.depth == recipe.keep.depth
