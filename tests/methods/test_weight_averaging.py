"""Weight averaging: the mean of the late weights, exactly, also over a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import losses_by_hand as by_hand
import pytest
import torch
from torch import Tensor

from delible.component import build
from delible.context import Context
from delible.errors import RecipeError
from delible.lm.lm import LM
from delible.methods.finish.weight_averaging import WeightAveraging
from delible.records import QA
from delible.rundir import RunDirectory
from delible.train.engine import Trainer, TrainResult
from delible.train.losses import Memory
from delible.train.recipe import Recipe

FORGET = [QA(question=f"Who is {n}?", answer=f"A {job}.")
          for n, job in (("Ada", "baker"), ("Ben", "pilot"))]  # fmt: skip
RETAIN = [QA(question="What is snow?", answer="White."), QA(question="And coal?", answer="Black.")]


def weights(lm: LM) -> list[Tensor]:
    return [value.detach().clone() for value in lm.model.parameters()]


def train(lm: LM, finish: dict[str, Any], place: Any = "all", **options: Any) -> TrainResult:
    training = {"epochs": 10, "batch_size": 2, "learning_rate": 1e-3, "precision": "float32",
                "checkpoint_steps": 1, **options.pop("training", {})}  # fmt: skip
    recipe = Recipe.from_mapping(
        {
            "objective": "npo", "keep": "nll", "place": place,
            "finish": {"name": "weight_averaging", **finish}, "training": training,
        }
    )  # fmt: skip
    return Trainer(
        lm, recipe, {"forget": FORGET, "retain": RETAIN}, context=Context(**options)
    ).train()


@pytest.mark.parametrize(
    ("start", "every", "total", "expected"),
    [
        (0.8, 5, 125, [100, 105, 110, 115, 120, 125]),  # the released code's steps
        (0.5, 2, 20, [10, 12, 14, 16, 18, 20]),
        (0.0, 3, 15, [1, 4, 7, 10, 13]),
        (0.55, 1, 20, [11, 12, 13, 14, 15, 16, 17, 18, 19, 20]),
        # in short runs steps lie closer together, and begin earlier, until there are five
        (0.8, 5, 60, [48, 51, 54, 57, 60]),
        (0.8, 5, 30, [24, 25, 26, 27, 28, 29, 30]),
        (0.8, 5, 10, [6, 7, 8, 9, 10]),
        (0.99, 100, 5, [1, 2, 3, 4, 5]),
    ],
)
def test_which_steps_count(start: float, every: int, total: int, expected: list[int]) -> None:
    assert list(WeightAveraging(start=start, every=every).steps(total)) == expected


@pytest.mark.parametrize("total", range(5, 200))
def test_there_are_always_enough_points_inside_the_run(total: int) -> None:
    for start, every, points in ((0.8, 5, 5), (0.0, 1000, 3), (0.95, 2, 5)):
        steps = WeightAveraging(start=start, every=every, points=points).steps(total)
        assert len(steps) >= points
        assert min(steps) >= 1
        assert max(steps) <= total


def test_a_run_that_is_too_short_is_refused_before_its_first_step() -> None:
    seen: list[int] = []
    with pytest.raises(RecipeError, match="has 4 steps"):
        train(by_hand.tiny_lm(), {}, training={"epochs": 4}, steps=lambda *_: seen.append(1))
    assert not seen
    result = train(by_hand.tiny_lm(), {"points": 2}, training={"epochs": 4})
    assert result.notes["weight_averaging"] == {"points": 2}


def test_the_mean_of_known_points() -> None:
    finish, memory = WeightAveraging(start=0.0, every=1), Memory()
    still = torch.nn.Parameter(torch.tensor([0.1, -7.3]))
    moving = torch.nn.Parameter(torch.zeros(1))
    points = [1.0, 5.0, -3.0, 2.0]
    for step, value in enumerate(points, 1):
        moving.data.fill_(value)
        finish.observe(step, 4, [still, moving], memory)
    mean, frozen = memory["weight_averaging.mean"][1], memory["weight_averaging.mean"][0]
    assert float(mean) == pytest.approx(sum(points) / 4)
    assert torch.equal(frozen, still)  # what does not move keeps its bits


def test_a_run_ends_at_the_mean_of_its_late_weights() -> None:
    plain, averaged = by_hand.tiny_lm(), by_hand.tiny_lm()
    seen: list[list[Tensor]] = []
    result = train(averaged, {"start": 0.5, "every": 2, "points": 3},
                   steps=lambda *_: seen.append(weights(averaged)))  # fmt: skip
    assert result.notes["weight_averaging"] == {"points": 3}
    for index, found in enumerate(weights(averaged)):
        expected = torch.stack([seen[step - 1][index].double() for step in (5, 7, 9)]).mean(0)
        assert torch.allclose(found.double(), expected, rtol=1e-6, atol=1e-7)
    train(plain, {"start": 0.5, "every": 1, "points": 3})
    assert not all(map(torch.equal, weights(averaged), weights(plain)))


@pytest.mark.parametrize("epochs", [5, 10])
def test_the_recipe_differs_from_every_single_step_and_is_their_mean(epochs: int) -> None:
    lm, seen = by_hand.tiny_lm(), list[list[Tensor]]()
    recipe = Recipe.named("npo_wa").changed(
        {}, {"epochs": epochs, "batch_size": 2, "learning_rate": 1e-3, "precision": "float32"}
    )
    result = Trainer(
        lm, recipe, {"forget": FORGET, "retain": RETAIN},
        context=Context(steps=lambda *_: seen.append(weights(lm))),
    ).train()  # fmt: skip
    assert result.steps == epochs
    assert result.notes["weight_averaging"] == {"points": 5}
    for step in seen:
        assert not all(map(torch.equal, weights(lm), step))
    for index, found in enumerate(weights(lm)):
        expected = torch.stack([step[index].double() for step in seen[-5:]]).mean(0)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)


def test_frozen_parameters_keep_their_bits() -> None:
    lm = by_hand.tiny_lm()
    before = dict(lm.copy().model.named_parameters())
    train(lm, {"start": 0.0, "every": 1}, {"name": "layers", "layers": [1], "role": "mlp_out"})
    wanted = set(lm.anatomy.parameter_names(1, "mlp_out"))
    for name, value in lm.model.named_parameters():
        assert torch.equal(value, before[name]) == (name not in wanted), name


class StopError(Exception):
    pass


@pytest.mark.parametrize("stop_after", [3, 8])
def test_a_killed_run_resumes_with_its_mean(tmp_path: Path, stop_after: int) -> None:
    finish = {"start": 0.4, "every": 2, "points": 4}  # steps 4, 6, 8, 10
    whole = by_hand.tiny_lm()
    train(whole, finish)

    def interrupt(step: int, total: int, numbers: object) -> None:
        if step == stop_after:
            raise StopError

    ends = []
    for forgets in (False, True):
        run = RunDirectory(tmp_path / str(forgets))
        run.begin({"name": "mean"})
        with pytest.raises(StopError):
            train(by_hand.tiny_lm(), finish, run=run, steps=interrupt)
        kept = run.path / "checkpoint" / "last" / "memory.safetensors"
        assert kept.exists() == (stop_after > 4)
        if forgets:
            kept.unlink(missing_ok=True)
        lm = by_hand.tiny_lm()
        result = train(lm, finish, run=run)
        ends.append((weights(lm), result.notes["weight_averaging"]))
    assert ends[0][1] == {"points": 4}
    assert all(map(torch.equal, weights(whole), ends[0][0]))
    if stop_after > 4:  # so the mean was in the checkpoint
        assert not all(map(torch.equal, weights(whole), ends[1][0]))


def test_a_run_that_ends_early_says_that_nothing_was_averaged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    lm = by_hand.tiny_lm()
    last: list[list[Tensor]] = []
    result = train(
        lm, {"start": 0.9, "every": 1, "points": 2},
        steps=lambda *_: last.append(weights(lm)),
        training={"monitor_steps": 1, "stop_at_forget_probability": 0.999},
    )  # fmt: skip
    assert result.stopped is not None
    assert result.notes["weight_averaging"] == {"points": 0}
    assert any("nothing was averaged" in line for line in caplog.messages)
    assert all(map(torch.equal, weights(lm), last[-1]))


def test_wrong_options_are_refused() -> None:
    for options in ({"start": 1.0}, {"every": 0}, {"points": 1}, {"interval": 5}):
        with pytest.raises(RecipeError):
            build("finish", {"name": "weight_averaging", **options})
