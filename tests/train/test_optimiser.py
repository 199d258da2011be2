"""The optimiser's settings do what they say: schedule, decay, divisors, precision of weights."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from test_engine import recipe, weights  # type: ignore[import-not-found]
from tiny_runs import make  # type: ignore[import-not-found]

from delible.context import Context
from delible.lm.lm import LM
from delible.methods.keep.nll import NLL
from delible.records import QA
from delible.testing.tiny import tiny_model, tiny_tokenizer
from delible.train.engine import Trainer
from delible.train.plan import make_plan
from delible.train.rows import make_rows
from delible.train.schedule import learning_rate_factor
from delible.watching import shown


def factors(schedule: Any, total: int, warmup: int) -> list[float]:
    return [learning_rate_factor(schedule, step, total, warmup) for step in range(total)]


def test_schedules_are_those_of_their_definition() -> None:
    assert factors("constant", 4, 0) == [1, 1, 1, 1]
    assert factors("constant", 4, 4) == pytest.approx([0.25, 0.5, 0.75, 1])
    assert factors("linear", 4, 0) == pytest.approx([1, 0.75, 0.5, 0.25])
    assert factors("linear", 6, 2) == pytest.approx([0.5, 1, 1, 0.75, 0.5, 0.25])
    half = math.sqrt(0.5)
    assert factors("cosine", 4, 0) == pytest.approx([1, (1 + half) / 2, 0.5, (1 - half) / 2])
    assert factors("cosine", 6, 2) == pytest.approx(
        [0.5, 1, 1, (1 + half) / 2, 0.5, (1 - half) / 2]
    )


def test_plain_descent_moves_by_the_rate_times_the_gradient(
    forget: list[QA], retain: list[QA]
) -> None:
    lm, rate = make(), 3e-2
    before = weights(lm)
    chosen = recipe("npo", optimizer="sgd", learning_rate=rate, max_steps=1, max_gradient_norm=None)
    result = Trainer(lm, chosen, {"forget": forget, "retain": retain}).train()
    after = weights(lm)
    squares = sum(float((after[name] - old).double().pow(2).sum()) for name, old in before.items())
    assert math.sqrt(squares) == pytest.approx(rate * result.history[0]["gradient_norm"], rel=1e-3)


def test_a_gradient_that_is_too_long_is_cut_to_the_limit(
    forget: list[QA], retain: list[QA]
) -> None:
    """Its direction stays; what is told is its length before."""
    starts, moves, norms = weights(make()), [], []
    for limit in (None, 0.01):
        lm = make()
        chosen = recipe(
            "npo", optimizer="sgd", learning_rate=0.5, max_steps=1, max_gradient_norm=limit
        )
        result = Trainer(lm, chosen, {"forget": forget, "retain": retain}).train()
        after = weights(lm)
        moves.append(
            torch.cat([(after[name] - one).double().flatten() for name, one in starts.items()])
        )
        norms.append(result.history[0]["gradient_norm"])
    free, cut = moves
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert norms[0] > 1
    assert float(cut.norm()) == pytest.approx(0.5 * 0.01, rel=1e-3)
    assert float(free @ cut / (free.norm() * cut.norm())) == pytest.approx(1, abs=1e-4)


def test_the_first_step_is_that_of_both_losses_in_float64(
    forget: list[QA], retain: list[QA]
) -> None:
    """NPO and the retain loss by their formulas, over plain logits of the whole batch."""
    chosen = recipe(
        "npo", optimizer="sgd", learning_rate=1.0, max_steps=1, batch_size=4,
        micro_batch_tokens=150, max_gradient_norm=None,
    )  # fmt: skip
    seen = Trainer(make(), chosen, {"forget": forget, "retain": retain}).rows()
    step = make_plan(chosen, seen.rows["forget"], seen.rows["retain"], 0).steps[0]
    model = make().model.double()

    def answer(row: Any) -> tuple[torch.Tensor, int]:
        ids, start = row.encoded.ids, row.encoded.start
        logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(dim=1)
        every = [logits[place - 1, ids[place]] for place in range(start, len(ids))]
        return torch.stack(every).sum(), len(every)

    beta, forgotten, kept, tokens = chosen.objective.beta, [], [], 0
    for row, other in step:
        mine, _ = answer(seen.rows["forget"][row])
        ratio = mine - mine.detach()  # the reference is the model before
        forgotten.append(-2 / beta * torch.nn.functional.logsigmoid(-beta * ratio))
        assert other is not None
        score, count = answer(seen.rows["retain"][other])
        kept.append(-score)
        tokens += count
    first, second = torch.stack(forgotten).mean(), torch.stack(kept).sum() / tokens
    balance = chosen.balance
    (balance.forget_weight * first + balance.retain_weight * second).backward()
    expected = {name: (one.detach() - one.grad).float() for name, one in model.named_parameters()}
    norm = math.sqrt(sum(float(one.grad.pow(2).sum()) for one in model.parameters()))
    lm = make()
    told = Trainer(lm, chosen, {"forget": forget, "retain": retain}).train().history[0]
    assert told["forget_loss"] == pytest.approx(float(first), rel=1e-5)
    assert told["keep_loss"] == pytest.approx(float(second), rel=1e-5)
    assert told["gradient_norm"] == pytest.approx(norm, rel=1e-5)
    for name, one in weights(lm).items():
        torch.testing.assert_close(one, expected[name], rtol=0, atol=2e-5, msg=name)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_each_step_moves_the_weights_by_its_own_rate(
    schedule: Any, forget: list[QA], retain: list[QA]
) -> None:
    """AdamW's update has a size of about the rate; its first one is the rate, nearly everywhere."""
    lm, rate, warmup = make(), 1e-3, 3
    places = [weights(lm)]
    chosen = recipe(
        "npo", schedule=schedule, warmup_steps=warmup, learning_rate=rate, epochs=4, batch_size=4
    )
    result = Trainer(
        lm, chosen, {"forget": forget, "retain": retain},
        context=Context(steps=lambda *_: places.append(weights(lm))),
    ).train()  # fmt: skip
    total = len(result.history)
    assert total == 8
    expected = [rate * one for one in factors(schedule, total, warmup)]
    assert [step["learning_rate"] for step in result.history] == pytest.approx(expected)
    moved = [
        max(float((after[name] - before[name]).abs().max()) for name in before)
        for before, after in itertools.pairwise(places)
    ]
    assert moved[0] == pytest.approx(expected[0], rel=0.01)
    for mine, wanted in zip(moved, expected, strict=True):
        assert 0.4 * wanted < mine < 2.5 * wanted


def test_decay_is_for_matrices_only_and_is_decoupled(forget: list[QA], retain: list[QA]) -> None:
    rate, decay = 1e-3, 0.5
    start, ends = weights(make()), []
    for weight_decay in (0.0, decay):
        lm = make()
        chosen = recipe("npo", max_steps=1, learning_rate=rate, weight_decay=weight_decay)
        Trainer(lm, chosen, {"forget": forget, "retain": retain}).train()
        ends.append(weights(lm))
    matrices = 0
    for name, value in start.items():
        extra = ends[1][name] - ends[0][name]
        if value.ndim >= 2:
            matrices += 1
            torch.testing.assert_close(extra, -rate * decay * value, rtol=1e-3, atol=1e-7)
        else:
            assert torch.equal(ends[1][name], ends[0][name]), name
    assert 0 < matrices < len(start)


@pytest.mark.parametrize("unit", ["row", "answer_token", "position"])
def test_the_retain_loss_is_a_mean_over_its_units(
    unit: Any, forget: list[QA], retain: list[QA], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NLL, "unit", unit)
    lm = make()
    chosen = recipe("npo", max_steps=1, micro_batch_tokens=150, max_gradient_norm=None)
    forget_rows, rows = make_rows(lm.template, forget), make_rows(lm.template, retain)
    plan = make_plan(chosen, forget_rows, rows, 0)
    total, units = 0.0, 0
    for _, kept in plan.steps[0]:
        assert kept is not None
        ids, start = rows[kept].encoded.ids, rows[kept].encoded.start
        with torch.no_grad():
            scores = lm.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(dim=1)
        total -= sum(float(scores[place - 1, ids[place]]) for place in range(start, len(ids)))
        units += {"row": 1, "answer_token": len(ids) - start, "position": len(ids)}[unit]
    result = Trainer(lm, chosen, {"forget": forget, "retain": retain}).train()
    assert result.history[0]["keep_loss"] == pytest.approx(total / units, rel=1e-4)


# ---- weights that are shorter than fp32


def shares(dtype: torch.dtype, place: Any, forget: list[QA]) -> tuple[float, list[str], LM]:
    """Share of the weights that ten epochs of small steps move."""
    model = tiny_model("llama").to(torch.bfloat16)  # the same start for all
    lm = LM(model.to(dtype), tiny_tokenizer(), precision="float32")
    before = weights(lm)
    told: list[str] = []
    chosen = recipe("gradient_ascent", epochs=10, learning_rate=1e-5).changed({"place": place}, {})
    with shown(told.append):
        result = Trainer(lm, chosen, {"forget": forget}).train()
    after = weights(result.lm)
    moved = sum(int((after[name].double() != old.double()).sum()) for name, old in before.items())
    return moved / sum(old.numel() for old in before.values()), told, result.lm


@pytest.mark.parametrize("place", ["all", {"name": "layers", "layers": [1], "role": "mlp"}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_weights_are_widened_before_they_are_trained(
    dtype: torch.dtype, place: Any, forget: list[QA]
) -> None:
    expected, quiet, _ = shares(torch.float32, place, forget)
    found, told, lm = shares(dtype, place, forget)
    assert expected > (0.5 if place == "all" else 0.1)
    assert found == pytest.approx(expected, abs=0.02)
    assert {value.dtype for value in lm.model.parameters()} == {torch.float32}
    name = str(dtype).removeprefix("torch.")
    assert [line for line in told if f"The weights are {name}" in line and "float32" in line]
    assert not [line for line in quiet if "converted" in line]


def test_an_adapter_on_short_weights_is_merged_into_full_ones(
    caplog: pytest.LogCaptureFixture, forget: list[QA]
) -> None:
    lm = LM(tiny_model("llama").to(torch.bfloat16), tiny_tokenizer(), precision="float32")
    before = weights(lm)
    chosen = recipe("gradient_ascent", epochs=5, learning_rate=1e-4).changed(
        {"place": {"name": "lora", "rank": 4}, "finish": "merge_adapter"}, {}
    )
    result = Trainer(lm, chosen, {"forget": forget}).train()
    after = weights(result.lm)
    assert {value.dtype for value in after.values()} == {torch.float32}
    for layer in range(3):
        for name in lm.anatomy.parameter_names(layer, "mlp_out"):
            assert float((after[name] != before[name].float()).float().mean()) > 0.9
    assert [line for line in caplog.messages if "would round away" in line]
