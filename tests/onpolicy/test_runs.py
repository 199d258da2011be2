"""Runs from start to end: resuming, guards, stops, faults, and policies whose best is known."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_policy import BOUNDARY, FORGET, SEEN, Recording, letters, lm, run

from delible.context import Context
from delible.errors import DataError, RunError
from delible.records import QA
from delible.rundir import RunDirectory
from delible.system.asks import NoAnswer, Prompt
from delible.system.roles import Roles
from delible.systems.scripted import Scripted
from delible.testing.contract.trial import require_same, weights
from delible.train.onpolicy.guards import Guards
from delible.train.onpolicy.numbers import rates
from delible.train.onpolicy.rewards import reward
from delible.train.onpolicy.rows import Completion, Question, Scored
from delible.train.onpolicy.settings import OnPolicyTraining
from delible.train.onpolicy.starting import planned

RETAIN = [QA(question="How is snow?", answer="White"), QA(question="Where is up?", answer="Up")]


class KilledError(BaseException):
    pass


def directory(path: Path) -> RunDirectory:
    found = RunDirectory(path)
    found.begin({"command": "test"})
    return found


# ---- resuming


@pytest.mark.parametrize(
    ("place", "options"),
    [
        ("all", {"kl_weight": 0.1, "kl_target": 0.01}),
        ("lora", {"kl_weight": 0.1}),
        ("all", {"inner_steps": 2, "retain_weight": 0.5, "schedule": "cosine", "warmup_steps": 2}),
    ],
)
def test_a_killed_run_ends_at_the_same_bits(place: str, options: Any, tmp_path: Path) -> None:
    options = {**options, "steps": 6, "checkpoint_steps": 1}
    whole = run(options=options, place=place, retain=RETAIN,
                context=Context(run=directory(tmp_path / "whole")))  # fmt: skip

    def die(step: int, total: int, numbers: Mapping[str, float]) -> None:
        if step == 5:
            raise KilledError

    begun = directory(tmp_path / "killed")
    with pytest.raises(KilledError):
        run(options=options, place=place, retain=RETAIN, context=Context(run=begun, steps=die))
    begun.release()
    told: list[int] = []
    again = run(
        options=options, place=place, retain=RETAIN,
        context=Context(run=directory(tmp_path / "killed"), steps=lambda s, t, n: told.append(s)),
    )  # fmt: skip
    assert told == [5, 6]
    require_same(weights(whole.lm), weights(again.lm), "resumed, it ends elsewhere")
    timeless = [
        [{k: v for k, v in one.items() if k != "tokens_per_second"} for one in history]
        for history in (whole.history, again.history)
    ]
    assert timeless[0] == timeless[1]
    assert whole.notes == again.notes
    assert not list(tmp_path.rglob("*.pt")), "a pickle was written"
    assert not list(tmp_path.rglob("*.pth"))


def test_another_runs_checkpoint_is_refused(tmp_path: Path) -> None:
    options = {"steps": 2, "checkpoint_steps": 1}
    begun = directory(tmp_path)
    run(options=options, context=Context(run=begun))
    begun.update(identity="other")
    with pytest.raises(RunError, match="belongs to another run"):
        run(options=options, context=Context(run=begun))


def test_the_plan_goes_through_every_question_before_one_comes_again() -> None:
    settings = OnPolicyTraining(steps=5, questions_per_step=3, inner_steps=1)
    plan = planned(5, settings, seed=3)
    assert len(plan) == 15
    assert [sorted(plan[at : at + 5]) for at in (0, 5, 10)] == [list(range(5))] * 3
    assert plan[:5] != plan[5:10] or plan[5:10] != plan[10:]
    assert len(planned(5, settings.model_copy(update={"inner_steps": 2}), 3)) == 9


# ---- numbers, stops and guards


def texts(*pairs: tuple[Question, str]) -> list[Completion]:
    return [Completion(question, text, (1, 2, 3)) for question, text in pairs]


def test_rates_by_hand() -> None:
    refusal = "I'm sorry, I don't know."
    found = rates(
        texts(
            (FORGET[0], "In Norrby."), (FORGET[0], refusal), (FORGET[1], "Somewhere else."),
            (BOUNDARY[0], refusal), (BOUNDARY[0], "Cy did."), (BOUNDARY[0], "%% ##"),
        )
    )  # fmt: skip
    assert found.leak == pytest.approx(1 / 3)
    assert found.refusal == pytest.approx(1 / 3)
    assert found.boundary_refusal == pytest.approx(1 / 3)
    assert found.garbage == pytest.approx(1 / 6)
    unknown = Question(Prompt.ask("Where?"), "forget", "Where?")
    assert rates(texts((unknown, "Here."))).leak is None


def test_it_stops_once_rewards_were_high_for_some_steps() -> None:
    always = {"name": "length", "least": 0, "gate": False}
    trained = run(
        rewards=[always], options={"steps": 9, "stop_at_reward": 1.0, "stop_reward_steps": 3}
    )
    assert trained.steps == 3
    assert trained.stopped == "the reward was high enough at step 3 (1.000)"


def test_it_stops_at_the_token_budget_and_tells_the_tokens() -> None:
    trained = run(options={"steps": 9, "token_budget": 40})
    assert trained.stopped is not None
    assert "token budget was used up at step 2" in trained.stopped
    assert trained.tokens == 60  # two steps of two groups of three, five tokens each


def test_it_stops_at_a_leak_target_on_held_out_questions() -> None:
    trained = run(options={"steps": 4, "stop_at_leak_rate": 0.0, "monitor_steps": 2},
                  held_out=FORGET[:1])  # fmt: skip
    assert trained.stopped == "the leak target was reached at step 2 (0.000)"
    assert "held_out_leak_rate" not in trained.history[0]


@pytest.mark.parametrize(("leak", "stops"), [(0.5, False), (0.2, True), (0.1, True), (None, False)])
def test_a_leak_target_is_reached_from_above(leak: float | None, stops: bool) -> None:
    guards = Guards(OnPolicyTraining(stop_at_leak_rate=0.2))
    told = {"step": 3.0} if leak is None else {"step": 3.0, "held_out_leak_rate": leak}
    assert (guards.stopped(told, 0) is not None) == stops


def test_a_used_up_utility_budget_brings_the_weights_back() -> None:
    start, after = lm(), lm()
    trained = run(
        after, retain=RETAIN,
        options={"steps": 6, "learning_rate": 0.5, "utility_budget": 1.0, "monitor_steps": 1},
    )  # fmt: skip
    assert trained.stopped is not None
    assert "the utility budget was used up" in trained.stopped
    if "step 1" in trained.stopped:
        require_same(weights(start), weights(after), "the weights of the start are not back")


@reward(name="flags", title="Flags", summary="As it is told.", range="any")
def flags(completion: Completion) -> Any:
    """What the test wants."""
    return WANTED[0](completion)


WANTED: list[Any] = []


def wanting(function: Any) -> Any:
    WANTED[:] = [function]
    return flags()


def test_a_step_in_which_everything_turns_into_garbage_again_and_again_is_a_collapse(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from delible.train.onpolicy import numbers

    steps: list[int] = []

    def is_garbage(text: str) -> bool:
        return len(steps) >= 2

    monkeypatch.setattr(numbers.filters, "is_garbage", is_garbage)
    context = Context(run=directory(tmp_path), steps=lambda s, t, n: steps.append(s))
    with pytest.raises(RunError, match=r"collapsed at step 5: 100% .* no language.*last good"):
        run(options={"steps": 9, "checkpoint_steps": 1}, context=context)
    assert steps == [1, 2, 3, 4, 5]
    kept = json.loads((tmp_path / "checkpoint/on-policy/last/state.json").read_text())
    assert kept["step"] == 2, "what was garbage already is kept as good"


def test_a_divergence_that_is_too_large_is_a_collapse() -> None:
    with pytest.raises(RunError, match=r"the divergence is .* above 1e-05"):
        run(options={"steps": 4, "kl_weight": 0.1, "largest_divergence": 1e-5})


def test_a_gradient_that_is_no_number_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    start, after = lm(), lm()
    hook = after.core.get_output_embeddings().weight.register_hook(lambda g: g * math.nan)
    with pytest.raises(RunError, match=r"the gradient of .* is not finite"):
        run(after)
    hook.remove()
    require_same(weights(start), weights(after), "weights moved by a gradient that is no number")


def test_a_reward_without_a_number_stops_before_anything_moves() -> None:
    start, after = lm(), lm()
    with pytest.raises(RunError, match=r"reward 'flags'.*no number"):
        run(after, rewards=[wanting(lambda one: math.nan)])
    require_same(weights(start), weights(after), "weights moved by a reward that is no number")


def test_a_reward_that_raises_stops_the_run() -> None:
    with pytest.raises(RunError, match=r"reward 'flags'.*KeyError: 'x'"):
        run(rewards=[wanting(lambda one: {}["x"])])


def test_completions_without_a_value_move_nothing_and_are_counted() -> None:
    def partly(one: Completion) -> Scored:
        if one.question.tag == "boundary":
            return Scored(None, reason="line is busy")
        return Scored(sum(one.tokens) / 1000)

    trained = run(rewards=[wanting(partly)], options={"steps": 4})
    assert trained.notes["no_value"] == {"flags: line is busy": 12}
    assert sum(one["no_value"] for one in trained.history) == 12


def test_a_judge_that_is_gone_ends_the_run_with_its_reason() -> None:
    with pytest.raises(RunError, match=r"in 3 steps in a row no completion had a value.*busy"):
        run(rewards=[wanting(lambda one: Scored(None, reason="busy"))], options={"steps": 9})


def test_a_role_that_fails_midway_is_counted() -> None:
    asked = 0

    def says(prompt: Prompt) -> str | NoAnswer:
        nonlocal asked
        asked += 1
        reply = prompt.messages[0].text.split("[Reply]")[1]
        if asked > 12 and asked % 2:
            return NoAnswer("line is busy")
        knows = "Norrby" in reply
        readable = "~~" not in reply
        return json.dumps({"knows": knows, "invents": False, "readable": readable})

    class Talking(Scripted):
        def generate(self, prompts: Any, decoding: Any) -> Any:
            return [says(one) for one in prompts]

    context = Context(roles=Roles({"judge": Talking({})}))
    trained = run(
        questions=FORGET, rewards=[{"name": "judged_ignorance", "judge": "role"}],
        options={"steps": 2}, context=context,
    )  # fmt: skip
    counted = sum(trained.notes["no_value"].values())
    assert counted == sum(one["no_value"] for one in trained.history)
    assert counted > 0


def test_equal_groups_are_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "delible"):
        trained = run(rewards=[wanting(lambda one: 1.0)], options={"steps": 3})
    assert trained.notes["equal_groups"] == 6
    assert "all completions of every question earned the same" in caplog.text


def test_numbers_of_every_step_are_told(tmp_path: Path) -> None:
    told: list[Mapping[str, float]] = []
    folder = directory(tmp_path)
    run(context=Context(run=folder, steps=lambda s, t, n: told.append(n)),
        options={"kl_weight": 0.1})  # fmt: skip
    wanted = {
        "step", "reward", "kl", "leak_rate", "refusal_rate", "boundary_refusal_rate",
        "garbage_rate", "no_value", "equal_groups", "mean_length", "generated_tokens",
        "learning_rate", "gradient_norm", "entropy", "loss", "tokens_per_second",
    }  # fmt: skip
    assert all(math.isfinite(value) for one in told for value in one.values())
    lines = [json.loads(one) for one in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [one["step"] for one in lines if one["kind"] == "step"] == [1, 2]
    seen = set().union(*told)
    assert wanted - {"boundary_refusal_rate", "leak_rate", "refusal_rate"} <= seen


def test_a_question_that_is_too_long_is_named() -> None:
    long = replace(FORGET[0], prompt=Prompt.ask("Why? " * 200), text="Why? " * 200)
    with pytest.raises(DataError, match=r"'Why\? Why\?.*tokens"):
        run(questions=[long])
    with pytest.raises(DataError, match="no questions"):
        run(questions=[])


def test_a_prefill_is_continued() -> None:
    begun = replace(FORGET[0], prompt=Prompt.ask(FORGET[0].text, prefill="I remember:"))
    SEEN.clear()
    run(questions=[begun, FORGET[1]], rewards=[Recording()], options={"steps": 1})
    model = lm()
    ids = model.template.prompt_ids(begun.prompt)
    assert model.tokenizer.decode(ids).endswith("I remember:")
    assert any(one.question is begun for one in SEEN[0])


def test_inner_steps_learn_twice_from_the_same_completions() -> None:
    SEEN.clear()
    trained = run(rewards=[Recording()], options={"steps": 4, "inner_steps": 2})
    assert trained.steps == 4
    assert len(SEEN) == 2
    assert letters().score(SEEN[0])[0].value is not None
