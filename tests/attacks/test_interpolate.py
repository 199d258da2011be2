"""Interpolation: a straight line through the fine-tuned model, and a control of equal length."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from delible.attacks.interpolate import Interpolate, random_like
from delible.errors import DataError, RunError
from delible.lm.lm import LM
from delible.measure.attack import AttackContext
from delible.records import QA, RecordBase
from delible.testing.tiny import tiny_model, tiny_tokenizer
from delible.train.tuning import FineTuning
from delible.world import benign

FORGET: list[RecordBase] = [QA(question="Where was Ada born?", answer="In Norrby.")]


def make_lm() -> LM:
    return LM(tiny_model("llama"), tiny_tokenizer(), precision="float32")


def make_context(forget: list[RecordBase] = FORGET, seed: int = 0) -> AttackContext:
    return AttackContext(forget, (), (), None, seed)


def walked(alpha: float, **options: Any) -> tuple[dict[str, torch.Tensor], AttackContext]:
    context = make_context()
    attack = Interpolate(alpha=alpha, steps=2, learning_rate=1e-3, **options)
    made = attack.apply(make_lm(), context)
    return dict(made.core.named_parameters()), context


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 3.0, -2.0])
def test_the_model_lies_on_the_line_through_the_fine_tuned_one(alpha: float) -> None:
    start = dict(make_lm().core.named_parameters())
    end = dict(FineTuning(2, 1e-3, 4).tuned(make_lm(), benign(), 0).lm.core.named_parameters())
    found, context = walked(alpha)
    square = 0.0
    for name, value in start.items():
        change = (end[name] - value).detach().double()
        square += float(change.pow(2).sum())
        expected = value.double() + alpha * change
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-5, atol=1e-6)
    assert context.numbers["length of the task vector"] == pytest.approx(square**0.5, rel=1e-4)
    assert square > 0


def test_the_control_is_as_long_and_leads_elsewhere() -> None:
    start = dict(make_lm().core.named_parameters())
    there, elsewhere = walked(2.0)[0], walked(2.0, direction="random")[0]
    again = walked(2.0, direction="random")[0]
    products, lengths = 0.0, 0.0
    for name, value in start.items():
        one, other = there[name] - value, elsewhere[name] - value
        assert torch.equal(elsewhere[name], again[name])
        assert float(other.norm()) == pytest.approx(float(one.norm()), rel=1e-3, abs=1e-6)
        products += float((one * other).sum())
        lengths += float(one.norm() * other.norm())
    assert abs(products) < 0.1 * lengths
    assert Interpolate(direction="random").control
    assert not Interpolate().control


def test_a_tensor_that_did_not_move_stays() -> None:
    vector = {"a": torch.zeros(3), "b": torch.ones(2)}
    found = random_like(vector, 0)
    assert torch.equal(found["a"], torch.zeros(3))
    assert float(found["b"].norm()) == pytest.approx(2**0.5)
    assert not torch.equal(found["b"], random_like(vector, 1)["b"])


def test_what_goes_wrong_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    row = benign()[1]
    same = QA(question=f"{row.question} {row.answer} {row.question}", answer=row.answer)
    with pytest.raises(DataError, match="words in a row"):
        Interpolate().apply(make_lm(), make_context([same]))
    monkeypatch.setattr("delible.attacks.interpolate.along", lambda a, b, share: a * float("inf"))
    with pytest.raises(RunError, match="left the numbers"):
        Interpolate(steps=1).apply(make_lm(), make_context())


def test_settings_have_titles() -> None:
    titles = [Interpolate(**each).variant_title() for each in Interpolate().variants("deep")]  # type: ignore[arg-type]
    assert len(set(titles)) == len(titles) == 4
