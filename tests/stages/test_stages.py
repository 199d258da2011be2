"""Stages: done once, gone on with after a kill to the same bits, told with inputs and cost."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import Field
from staged import REQUEST, RETAIN, Killed, Staged, model, recipe

from delible.context import Context
from delible.errors import RecipeError, RunError
from delible.lm.lm import LM
from delible.made import Made, remembered
from delible.method import Outcome
from delible.rundir import RunDirectory
from delible.stages.trained import weights_below
from delible.stages.work import Work
from delible.systems.opening import described, keep, open_lm
from delible.testing import check
from delible.train.engine import Trainer
from delible.train.slots import Placement, SlotContext


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    Staged.done.clear()
    Staged.on_step = None
    yield
    Staged.on_step = None


def run_in(folder: Path, seed: int = 0) -> Context:
    run = RunDirectory(folder)
    run.begin({"command": "test"})
    return Context(seed=seed, run=run)


def weights(lm: LM) -> dict[str, torch.Tensor]:
    return {name: one.detach().clone() for name, one in lm.model.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) for name in left
    )


def applied(folder: Path | None, seed: int = 0, **options: Any) -> Outcome:
    context = Context(seed=seed) if folder is None else run_in(folder, seed)
    return Staged(**options).apply(model(), REQUEST, context)


def test_it_keeps_the_contract() -> None:
    done = check(Staged, ("llama",))
    assert "killed_anywhere_it_goes_on_to_the_same_bits on llama" in done


@pytest.mark.parametrize("place", ["all", "lora"])
def test_stages_that_have_ended_are_read_and_not_done(place: str, tmp_path: Path) -> None:
    first = applied(tmp_path / "run", place=place)
    assert Staged.done == ["draw", "sum from 0"]
    again = applied(tmp_path / "run", place=place)
    assert Staged.done == ["draw", "sum from 0"]
    assert same(weights(first.content), weights(again.content))
    assert first.history == again.history
    assert first.remembers is not None
    assert again.remembers is not None
    assert first.remembers.digest == again.remembers.digest
    elsewhere = applied(None, place=place)  # nothing on disk, and the same
    assert same(weights(first.content), weights(elsewhere.content))


def test_a_stage_goes_on_where_it_was_and_a_training_at_its_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = applied(tmp_path / "whole")
    Staged.done.clear()

    def at_the_third(step: int) -> None:
        if step == 2:
            raise Killed

    Staged.on_step = at_the_third
    with pytest.raises(Killed):
        applied(tmp_path / "run")
    Staged.on_step = None

    def in_training(step: int, total: int, numbers: object) -> None:
        if step == 3:
            raise Killed

    run = RunDirectory(tmp_path / "run")
    run.begin({"command": "test"})
    with pytest.raises(Killed):
        Staged().apply(model(), REQUEST, Context(run=run, steps=in_training))
    with caplog.at_level(logging.INFO):
        again = applied(tmp_path / "run")
    assert Staged.done == ["draw", "sum from 0", "sum from 3"]
    assert any("Resuming after step 2" in one for one in caplog.messages)
    assert same(weights(whole.content), weights(again.content))
    assert [one["name"] for one in run.manifest["stages"]] == ["draw", "sum", "train"]


def test_what_a_stage_was_stands_in_its_manifest_and_in_the_runs(tmp_path: Path) -> None:
    outcome = applied(tmp_path / "run", seed=3)
    manifest = json.loads((tmp_path / "run/stages/sum/manifest.json").read_text("utf-8"))
    assert manifest["run"]["inputs"] == {"of": [1, 2]}
    assert manifest["run"]["seed"] == 3
    assert manifest["run"]["procedure"]["name"] == "staged"
    told = RunDirectory(tmp_path / "run").manifest["stages"]
    assert manifest["run"]["after"] == [told[0]["result"]]
    assert [one["cost"]["steps"] for one in told] == [0, 5, 4]
    assert told[2]["cost"]["tokens"] > 0
    assert outcome.notes["steps"] == 9
    events = list(RunDirectory(tmp_path / "run").events())
    assert [one["step"] for one in events if one.get("stage") == "train" and "step" in one] == [
        1, 2, 3, 4
    ]  # fmt: skip
    assert not (tmp_path / "run/stages/sum/partial").exists()
    assert not (tmp_path / "run/stages/train/checkpoint").exists()


def test_another_seed_draws_other_numbers_and_refuses_the_same_folder(tmp_path: Path) -> None:
    one, other = applied(None, seed=1).remembers, applied(None, seed=2).remembers
    assert one is not None
    assert other is not None
    assert one.digest != other.digest
    applied(tmp_path / "run", seed=1)
    with pytest.raises(RunError, match=r"'draw' was begun with other inputs.*seed"):
        applied(tmp_path / "run", seed=2)


def test_a_damaged_result_is_one_message(tmp_path: Path) -> None:
    applied(tmp_path / "run")
    (tmp_path / "run/stages/draw/result/tensors.safetensors").write_bytes(b"nothing")
    with pytest.raises(RunError, match="cannot be read"):
        applied(tmp_path / "run")


@pytest.mark.parametrize(
    ("second", "message"), [("drew", "declares no stage 'drew'"), ("draw", "is done twice")]
)
def test_stages_are_declared_and_done_once(second: str, message: str) -> None:
    class Loose(Staged):
        def run(self, work: Work) -> Outcome:
            work.stage("draw", lambda stage: Made())
            work.stage(second, lambda stage: Made())
            return Outcome(work.lm, "model", work.lm)

    with pytest.raises(RecipeError, match=message):
        Loose().apply(model(), REQUEST, Context())


def test_a_search_looks_at_the_rate_and_the_length() -> None:
    class Rated(Staged):
        learning_rate: float = Field(1e-3, gt=0, description="Rate.")
        epochs: int = Field(5, ge=1, description="Passes.")
        max_steps: int | None = Field(None, ge=1, description="Steps.")

    found = Rated().ranges()
    assert set(found) == {"learning_rate", "epochs"}
    assert (found["learning_rate"].low, found["learning_rate"].high) == pytest.approx((1e-4, 1e-2))
    assert (found["epochs"].low, found["epochs"].high) == (2, 10)


def test_parts_of_a_stage_have_folders_of_their_own(tmp_path: Path) -> None:
    class Rounds(Staged):
        def run(self, work: Work) -> Outcome:
            for part in range(2):
                made = work.stage("draw", lambda stage, n=part: Made({"n": n}), part=part)
                assert made["n"] == part
            return Outcome(work.lm, "model", work.lm)

    outcome = Rounds().apply(model(), REQUEST, run_in(tmp_path / "run"))
    assert list(outcome.notes["stages"]) == ["draw-000", "draw-001"]
    assert (tmp_path / "run/stages/draw-001/manifest.json").exists()


def test_what_was_left_reaches_the_next_request_of_the_same_procedure(tmp_path: Path) -> None:
    start = model()
    start.save(tmp_path / "start")
    lm = open_lm(str(tmp_path / "start"))
    base = described(lm)
    first = Staged().apply(lm, REQUEST, Context())
    folder = tmp_path / "first"
    keep(first.kind, first.content, folder, base, first.system, first.remembers)
    opened = open_lm(str(folder))
    left = remembered(opened)
    assert left is not None
    assert left["requests"] == 1
    assert torch.equal(left.tensors["sum"], first.remembers.tensors["sum"])  # type: ignore[union-attr]
    second = Staged().apply(opened, REQUEST, Context())
    assert second.remembers is not None
    assert second.remembers["requests"] == 2
    third = Staged().apply(second.content, REQUEST, Context())  # from memory
    assert third.remembers is not None
    assert third.remembers["requests"] == 3

    class Other(Staged):
        card = Staged.card.model_copy(update={"name": "other"})

    assert Work(Other(), third.content, REQUEST, Context()).earlier is None
    (folder / "remembers" / "data.json").unlink()
    with pytest.raises(RunError, match="cannot be read"):
        open_lm(str(folder))


class MovingBelow:
    """Places an adapter on a matrix that it changes as well."""

    def __init__(self, place: Any) -> None:
        self.place = place

    def __getattr__(self, name: str) -> Any:
        return getattr(self.place, name)

    def apply(self, context: SlotContext) -> Placement:
        found = self.place.apply(context)
        below = weights_below(context.lm)
        with torch.no_grad():
            below["model.layers.0.mlp.up_proj.weight"].mul_(0.5)
        context.lm.touch()
        return found


def test_an_adapter_on_weights_that_moved_comes_back(tmp_path: Path) -> None:
    class Below(Staged):
        def run(self, work: Work) -> Outcome:
            mine = recipe({"place": "lora"})
            place = type(mine.place)
            plain = place.apply

            def moved(self: Any, context: SlotContext) -> Placement:
                return MovingBelow(_Plain(plain, self)).apply(context)

            place.apply = moved  # type: ignore[method-assign]
            try:
                work.train("train", mine)
            finally:
                place.apply = plain  # type: ignore[method-assign]
            return Outcome(work.lm, "model", work.lm)

    first = Below().apply(model(), REQUEST, run_in(tmp_path / "run"))
    again = Below().apply(model(), REQUEST, run_in(tmp_path / "run"))
    assert same(weights(first.content), weights(again.content))
    name = "model.layers.0.mlp.up_proj.weight"
    half = model().core.get_parameter(name).detach() * 0.5
    assert torch.equal(weights_below(again.content)[name].detach(), half)


class _Plain:
    def __init__(self, function: Any, place: Any) -> None:
        self.function, self.place = function, place

    def apply(self, context: SlotContext) -> Placement:
        found: Placement = self.function(self.place, context)
        return found


def test_a_training_stage_is_the_trainers_own_result(tmp_path: Path) -> None:
    class Only(Staged):
        def run(self, work: Work) -> Outcome:
            rows = {"forget": REQUEST.forget[:2], "retain": RETAIN}
            work.train("train", recipe(), records=rows)
            return Outcome(work.lm, "model", work.lm)

    made = Only().apply(model(), REQUEST, run_in(tmp_path / "run"))
    rows = {"forget": REQUEST.forget[:2], "retain": RETAIN}
    alone = Trainer(model(), recipe(), rows, context=Context()).train()
    assert same(weights(made.content), weights(alone.lm))
