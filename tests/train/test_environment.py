"""What the environment says about training must not change a result."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from test_engine import recipe, same, weights  # type: ignore[import-not-found]
from tiny_runs import make  # type: ignore[import-not-found]

from delible.errors import RunError
from delible.records import QA
from delible.train.engine import Trainer


def _forget_accelerate() -> None:
    """As in a fresh process: accelerate keeps what it read for the life of a process."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    PartialState._reset_state()


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    _forget_accelerate()
    yield
    _forget_accelerate()


def trained(forget: list[QA], retain: list[QA]) -> dict[str, torch.Tensor]:
    _forget_accelerate()
    lm = make()
    Trainer(lm, recipe(), {"forget": forget, "retain": retain}).train()
    found: dict[str, torch.Tensor] = weights(lm)
    return found


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4"),
        ("ACCELERATE_MIXED_PRECISION", "bf16"),
        ("ACCELERATE_DYNAMO_BACKEND", "eager"),
        ("ACCELERATE_DOWNCAST_BF16", "true"),
    ],
)
def test_the_environment_changes_no_bit(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, forget: list[QA], retain: list[QA]
) -> None:
    expected = trained(forget, retain)
    monkeypatch.setenv(name, value)
    assert same(trained(forget, retain), expected)


def test_another_precision_in_this_process_is_refused(forget: list[QA], retain: list[QA]) -> None:
    Accelerator(mixed_precision="bf16", cpu=True)
    with pytest.raises(RunError, match="mixed precision"):
        Trainer(make(), recipe(), {"forget": forget, "retain": retain}).train()
