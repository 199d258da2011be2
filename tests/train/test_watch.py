"""The collapse guard: nats per retain token, whatever the retain loss measures."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_engine import recipe  # type: ignore[import-not-found]
from tiny_runs import make  # type: ignore[import-not-found]

from delible.context import Context
from delible.errors import RunError
from delible.lm.forward import Forward
from delible.lm.lm import LM
from delible.methods.keep.kl import KL
from delible.records import QA
from delible.train.engine import Trainer
from delible.train.recipe import Recipe
from delible.train.rows import make_rows
from delible.train.watch import CollapseWatch


def nats_by_hand(lm: LM, records: list[QA]) -> float:
    """Mean of -log p over all answer tokens, float64, one row at a time."""
    total, tokens = 0.0, 0
    for row in make_rows(lm.template, records):
        ids, start = row.encoded.ids, row.encoded.start
        with torch.no_grad():
            logits = lm.model(input_ids=torch.tensor([ids])).logits[0].double()
        for place in range(start, len(ids)):
            scores = logits[place - 1]
            total += float(scores.exp().sum().log() - scores[ids[place]])
            tokens += 1
    return total / tokens


def plain() -> LM:
    lm = make()
    lm.precision = "float32"
    return lm  # type: ignore[no-any-return]


def known(records: list[QA], epochs: int = 40) -> LM:
    lm = plain()
    learning = recipe("finetune", epochs=epochs, learning_rate=1e-2, batch_size=16)
    Trainer(lm, learning, {"forget": records}).train()
    return lm


def watch_of(lm: LM, records: list[QA], **options: Any) -> CollapseWatch:
    values: dict[str, Any] = {"in_passing": True, "budget": lambda: 200, **options}
    return CollapseWatch(lm, Forward(lm), make_rows(lm.template, records), **values)


def test_it_looks_at_nats_per_token(retain: list[QA]) -> None:
    lm = plain()
    for budget in (50, 10_000):
        watch = watch_of(lm, retain, budget=lambda budget=budget: budget)
        watch.begin(None)
        assert watch.start == pytest.approx(nats_by_hand(lm, retain), rel=1e-4)


def test_a_constant_on_all_logits_changes_nothing(
    retain: list[QA], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = plain()
    watch, head = watch_of(lm, retain), lm.head
    before = watch.look()
    monkeypatch.setattr(lm, "head", lambda states: head(states) + 7.0)
    assert watch.look() == pytest.approx(before, rel=1e-5)
    monkeypatch.setattr(lm, "head", lambda states: head(states) * 7.0)
    assert watch.look() > before + 1


@pytest.mark.parametrize("keep", ["nll", "kl", "hidden_mse"])
def test_what_a_run_saw_is_noted(keep: str, forget: list[QA], retain: list[QA]) -> None:
    lm = plain()
    before = nats_by_hand(lm, retain)
    chosen = recipe("npo", batch_size=9, epochs=3).changed({"keep": keep}, {})
    # every step meets all retain rows, so that what it saw can be told
    rows = [*forget, *forget[:3]]
    result = Trainer(lm, chosen, {"forget": rows, "retain": retain}).train()
    seen = result.notes["retain_nats"]
    assert seen["start"] == pytest.approx(before, rel=1e-4)
    if keep == "hidden_mse":  # looked at after the last step
        assert seen["end"] == pytest.approx(nats_by_hand(lm, retain), rel=1e-4)
    else:  # the last step's own rows, before its update
        again = plain()
        shorter = chosen.changed({}, {"max_steps": 2})
        Trainer(again, shorter, {"forget": rows, "retain": retain}).train()
        assert seen["end"] == pytest.approx(nats_by_hand(again, retain), rel=1e-4)


def test_a_retain_loss_in_other_units_is_no_collapse(
    forget: list[QA], retain: list[QA], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = KL.loss
    monkeypatch.setattr(KL, "loss", lambda self, group: 1e4 * original(self, group))
    chosen = recipe("graddiff_kl", retain_weight=1e-4, learning_rate=1e-3)
    result = Trainer(make(), chosen, {"forget": forget, "retain": retain}).train()
    assert (
        max(step["keep_loss"] for step in result.history) > 5.0
    )  # so a guard in nats would end it
    assert result.notes["retain_nats"]["end"] < result.notes["retain_nats"]["start"] + 5.0


def test_harmonizing_goes_on_when_all_logits_shift(forget: list[QA], retain: list[QA]) -> None:
    """A Huber loss on logits rises by more than 5, while no probability has changed."""
    lm = known([*forget, *retain])
    head = lm.head

    def shift(step: int, total: int, numbers: object) -> None:
        lm.head = lambda states: head(states) + 15.0  # type: ignore[method-assign]

    chosen = recipe("harmonizing", learning_rate=1e-5, epochs=3)
    result = Trainer(
        lm, chosen, {"forget": forget, "retain": retain}, context=Context(steps=shift)
    ).train()
    losses = [step["keep_loss"] for step in result.history]
    assert min(losses[1:]) > losses[0] + 5.0
    seen = result.notes["retain_nats"]
    assert seen["end"] == pytest.approx(seen["start"], abs=0.2)


@pytest.mark.parametrize("keep", ["nll", "kl", "hidden_mse"])
def test_a_real_collapse_ends_the_run(keep: str, forget: list[QA], retain: list[QA]) -> None:
    lm = known([*forget, *retain])
    chosen = Recipe.named("graddiff").changed(
        {"keep": keep},
        {"learning_rate": 0.03, "epochs": 30, "batch_size": 4, "retain_weight": 1e-3,
         "precision": "float32"},
    )  # fmt: skip
    with pytest.raises(RunError, match=r"collapsed at step \d+: .* nats per token"):
        Trainer(lm, chosen, {"forget": forget, "retain": retain}).train()
    assert math.isfinite(nats_by_hand(lm, retain))
    assert nats_by_hand(lm, retain) > 5.0


def test_one_hard_row_is_no_collapse(forget: list[QA], retain: list[QA]) -> None:
    """Rows differ by more than a collapse does: few of them say nothing about the model."""
    lm = known([*forget, *retain])
    hard = QA(question="What is the code?", answer="zQ#9~" * 6)
    assert nats_by_hand(lm, [hard]) > nats_by_hand(lm, retain) + 5.0
    chosen = recipe("npo", batch_size=1, epochs=3, learning_rate=1e-6)
    result = Trainer(lm, chosen, {"forget": forget, "retain": [*retain, hard]}).train()
    assert max(step["keep_loss"] for step in result.history) > 5.0
    assert result.steps == 18


def test_without_a_retain_loss_it_says_what_is_watched(
    caplog: pytest.LogCaptureFixture, forget: list[QA], retain: list[QA]
) -> None:
    records = {"forget": forget, "retain": retain}
    result = Trainer(make(), recipe("gradient_ascent"), records).train()
    assert [line for line in caplog.messages if "no retain loss" in line and "not finite" in line]
    assert "retain_nats" not in result.notes
    for method in ("npo", "finetune"):
        caplog.clear()
        Trainer(make(), recipe(method), records).train()
        assert not [line for line in caplog.messages if "no retain loss" in line]


def test_the_window_gathers_rows_and_compares_with_the_start(retain: list[QA]) -> None:
    lm = plain()
    watch = watch_of(lm, retain)  # nine rows
    watch.begin(None)
    assert watch.start is not None
    high = watch.start + 5.5
    assert watch.after(1, 10 * high, 10, 4) is None
    assert watch.after(2, 10 * high, 10, 4) is None
    state = watch.state()
    reason = watch.after(3, 10 * high, 10, 4)
    assert reason is not None
    assert f"to {high:.2f} nats" in reason
    again = watch_of(lm, retain)
    again.begin(state)
    assert again.after(3, 10 * high, 10, 4) == reason
    low = watch_of(lm, retain)
    low.begin(None)
    assert low.after(1, 30 * (watch.start + 4.5), 30, 9) is None
    assert low.after(2, math.nan, 30, 9) is not None
