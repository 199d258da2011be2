"""Unlearn and reinvent, run: what each weight is for, resuming, and from one end to the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from delible.bench.prepare import learned
from delible.component import build
from delible.context import Context
from delible.errors import RunError
from delible.experiments.reinvent.experiment import Reinvention
from delible.experiments.reinvent.knowing import share
from delible.lm.lm import LM
from delible.measure.benchmark import Data
from delible.method import Outcome
from delible.procedures.reinvent import Reinvent
from delible.records import QA, ForgetRequest
from delible.rundir import RunDirectory
from delible.stages.folder import stages_of
from delible.testing.contract.trial import tiny_lm, weights

FORGET = tuple(
    QA(question=f"Where was Ada {n} born?", answer="Norrby", subject=f"Ada {n}") for n in "BC"
)
RETAIN = tuple(QA(question=f"What is tea {n}?", answer=f"A drink {n}") for n in "ABCD")
SHORT: dict[str, Any] = {
    "steps": 2, "questions_per_step": 2, "group_size": 4, "max_new_tokens": 4, "retain_rows": 2,
    "learning_rate": 1e-2, "cold_start": "none", "precision": "float32", "own_answers": False,
    "entropy_weight": 0.0, "kl_weight": 0.0, "dual_clip": None,
}  # fmt: skip


class Lengthy(Reinvent):
    """Rewards answers by how they end, so that random answers differ."""

    def rewards(self, *main: Any) -> list[Any]:
        from tiny_policy import letters

        return [letters()]


def run(context: Context | None = None, retain: Any = RETAIN, **options: Any) -> Outcome:
    chosen = Lengthy.build("test", **{**SHORT, **options})
    request = ForgetRequest(forget=FORGET, retain=retain)
    return chosen.apply(tiny_lm("llama").copy(), request, context or Context())


def apart(one: Outcome, other: Outcome) -> float:
    first, second = weights(one.system), weights(other.system)  # type: ignore[arg-type]
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def test_without_the_reward_term_it_is_fine_tuning_on_retain_rows() -> None:
    plain = {"unlearn_weight": 0.0, "retain_weight": 1.0}
    one, other = run(prefix="", **plain), run(prefix="I know it:", group_size=2, **plain)
    assert apart(one, other) == pytest.approx(0.0, abs=2e-5)  # no completion counts; rounding
    assert apart(run(**plain), run(retain=RETAIN[:1], **plain)) > 1e-4
    assert apart(run(unlearn_weight=1.0), run(**plain)) > 1e-4


def test_without_the_retain_term_no_retain_row_counts() -> None:
    plain = {"unlearn_weight": 1.0, "retain_weight": 0.0}
    assert apart(run(**plain), run(retain=RETAIN[:1], **plain)) == pytest.approx(0.0, abs=2e-5)
    assert apart(run(prefix="", **plain), run(prefix="I know it:", **plain)) > 1e-4


def test_as_many_retain_rows_as_completions(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def stop(work: Any, name: str, questions: Any, rewards: Any, settings: Any, **_: Any) -> None:
        seen.append(settings)
        raise RunError("enough")

    monkeypatch.setattr("delible.procedures.reinvent.train_on_policy", stop)
    for given, wanted in ((None, 2 * 4), (3, 3)):
        with pytest.raises(RunError, match="enough"):
            run(retain_rows=given, entropy_weight=0.25, dual_clip=4.0)
        settings = seen.pop()
        assert (settings.retain_rows, settings.completions) == (wanted, 2 * 4)
        assert (settings.entropy_weight, settings.dual_clip) == (0.25, 4.0)


def test_stages_are_told_and_read_back(tmp_path: Path) -> None:
    told: list[int] = []

    def go() -> Outcome:
        folder = RunDirectory(tmp_path / "run")
        folder.begin({"command": "test"})
        context = Context(run=folder, steps=lambda step, total, numbers: told.append(step))
        try:
            return run(context, cold_start="cold_start", cold_start_epochs=1, own_answers=True)
        finally:
            folder.release()

    first = go()
    names = [one["name"] for one in stages_of(RunDirectory(tmp_path / "run"))]
    assert names == ["retain", "cold_start", "unlearn"]
    assert first.notes["cold_start_steps"] >= 1
    assert first.notes["questions"] > 0
    steps = len(told)
    again = go()
    assert len(told) == steps  # nothing is trained twice
    assert apart(first, again) == pytest.approx(0.0, abs=0.0)
    generated = list((tmp_path / "run").rglob("generated/forget.jsonl"))
    assert generated, "the rows of the cold start cannot be looked at"


def test_the_weight_of_the_divergence_follows_its_target() -> None:
    far = run(steps=4, kl_weight=1.0, kl_target=1e-6, learning_rate=1e-2)
    assert far.notes["kl_weight"] > 1.0  # it went further than that
    near = run(steps=4, kl_weight=1.0, kl_target=1e3)
    assert near.notes["kl_weight"] < 1.0
    assert run(steps=4, kl_weight=1.0).notes["kl_weight"] == pytest.approx(1.0)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_taught_person_is_denied_also_when_forced_and_the_others_stay() -> None:
    """Tiny model, made-up people: denial above 80 % twice, others' recall within 5 points."""
    task = build("benchmark", {"name": "world", "people": 12, "forget": 1}).tasks(Data())[0]
    learning = build("benchmark", "world").learning("tiny")
    start = learned("tiny", task.learn, options=learning.options, slots=learning.slots)
    probe = Reinvention(about="people")
    before = probe._asked(LM.load(str(start)), task)
    assert before["denies"] == 0
    torch.manual_seed(0)
    chosen = Reinvent(
        steps=12, questions_per_step=4, group_size=8, max_new_tokens=28, learning_rate=2e-4,
        cold_start_rate=1e-3, cold_start_epochs=40, cold_start_prefix=True,
    )  # fmt: skip
    made = chosen.apply(LM.load(str(start)), task.request, Context(seed=0))
    after = probe._asked(made.system, task)
    assert after["denies"] >= 0.8
    assert after["denies, forced"] >= 0.8
    assert share(after["hints"]["0"]) == 0
    assert after["kept"] >= before["kept"] - 0.05
    assert after["kept denied"] <= 0.1
    # what is handed back is asked for, and measured; a model of this size uses little of it
    assert {hint: len(row) for hint, row in after["hints"].items()} == {
        hint: len(row) for hint, row in before["hints"].items()
    }
    rewards = [one["reward"] for one in made.history if "reward" in one]
    assert len(rewards) == 12
    assert sum(rewards[-4:]) > sum(rewards[:4])
