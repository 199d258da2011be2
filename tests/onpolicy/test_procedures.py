"""RULE, PURGE and their baselines: what they ask, what they make, and what they refuse."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny_policy import lm

from delible.component import build
from delible.context import Context
from delible.errors import DataError, MissingExtraError, RecipeError, RunError
from delible.generation.boundary import boundary_questions, frame, from_records
from delible.generation.forbidden import cleaned, forbidden, is_soft
from delible.generation.forbidden import from_records as entities_of
from delible.lm.lm import LM
from delible.method import Outcome
from delible.names import Names
from delible.records import QA, ForgetRequest
from delible.resolving import resolve_method
from delible.rundir import OtherRunError, RunDirectory
from delible.stages.rewarded import parted
from delible.stages.sampled import SampledProcedure, paired
from delible.system.asks import Decoding, NoAnswer, Prompt, Score
from delible.system.base import System
from delible.system.role import RoleName
from delible.system.roles import Roles
from delible.systems.scripted import Scripted
from delible.testing.contract.trial import REQUEST, require_same, weights
from delible.train.onpolicy.rows import Completion, Question, Scored, Total
from delible.train.onpolicy.samples import Group
from delible.train.onpolicy.settings import OnPolicyTraining
from delible.world import World, filters

TINY: dict[str, Any] = {
    "steps": 2, "questions_per_step": 2, "group_size": 2, "max_new_tokens": 5,
    "precision": "float32", "checkpoint_steps": 1,
}  # fmt: skip
#: How a judge is tried on a refusal.
REFUSED = "I don't know anything about that"
#: A reward that tells a random model's answers apart.
APART: dict[str, Any] = {"reward": {"name": "length", "least": 2, "gate": False}}
EVERY = {
    "rule": {}, "purge": {}, "rejection_finetuning": {**APART, "group_size": 4},
    "on_policy_dpo": {**APART, "group_size": 4},
}  # fmt: skip


class Writer(Scripted):
    """Writes neighbours and lists entities."""

    def __init__(self, says: Any = None) -> None:
        super().__init__({})
        self.says = says

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str | NoAnswer]:
        return [self._one(prompt.messages[0].text) for prompt in prompts]

    def _one(self, text: str) -> str | NoAnswer:
        if self.says is not None:
            return self.says(text)
        if '"entities"' in text:
            return json.dumps({"entities": ["Norrby", "a lute"]})
        question = text.split("Question: ")[1].split("\n")[0]
        for name, other in (("Ada Quill", "Clara Schumann"), ("Ben Orr", "Johann Bach")):
            question = question.replace(name, other)
        return json.dumps({"question": question, "answer": "In Leipzig."})


WRITER: dict[RoleName, System] = {"writer": Writer()}


def applied(name: str, request: ForgetRequest = REQUEST, run: Path | None = None,
            players: Any = WRITER, **options: Any) -> tuple[Outcome, LM]:  # fmt: skip
    model, folder = lm(), None
    if run is not None:
        folder = RunDirectory(run)
        folder.begin({"command": "test"})
    context = Context(run=folder, roles=Roles(dict(players)))
    method = build("procedure", {"name": name, **TINY, **EVERY[name], **options})
    return method.apply(model, request, context), model


@pytest.mark.parametrize("name", EVERY)
def test_each_declares_where_a_search_may_look(name: str) -> None:
    ranges = build("procedure", name).ranges()
    assert {"learning_rate", "steps"} <= ranges.keys()
    assert ranges.keys() <= {
        "learning_rate", "steps", "kl_weight", "steer_learning_rate", "beta", "refusal_cost",
    }  # fmt: skip


# ---- boundary questions


def test_a_world_gives_the_same_question_about_somebody_else() -> None:
    request = World(people=12, seed=0).request(forget=2)
    pairs = [one for one in request.forget if isinstance(one, QA)]
    found = from_records(pairs, request.neighbours or request.retain, request.subjects, 1)
    assert all(found)
    for asked, others in zip(pairs, found, strict=True):
        assert asked.group == others[0].group  # the relation, which it was not told
        assert asked.subject != others[0].subject


def test_frames_leave_names_out() -> None:
    assert frame("Where was Ada Quill born?", "Ada Quill") == {"where", "was", "born"}
    assert frame("Where was Ben born?", None) == {"where", "was", "born"}


def test_what_names_the_forgotten_or_has_no_short_answer_is_dropped() -> None:
    asked = [QA(question="Where was Ada Quill born?", answer="Norrby", subject="Ada Quill")]
    others = [
        QA(question="Where was Ben born?", answer="With Ada Quill"),
        QA(question="Where was Cy born?", answer="I don't know."),
        QA(question="Where was Dee born?", answer="One. Two. Three sentences."),
        QA(question="What is the sea?", answer="Wet"),
        QA(question="Where was Eli born?", answer="In Umber"),
    ]
    assert from_records(asked, others, ["Ada Quill"], 3) == [[others[4]]]


def test_one_is_taken_again_only_when_all_have_been() -> None:
    asked = [QA(question=f"Where was Ada{n} born?", answer="X", subject=f"Ada{n}") for n in "abc"]
    others = [QA(question=f"Where was Ben{n} born?", answer="Y") for n in "xyz"]
    found = from_records(asked, others, ["Ada"], 1)
    assert sorted(one.question for (one,) in found) == [one.question for one in others]


def test_without_boundary_questions_it_is_refused_with_how_to_make_them() -> None:
    with pytest.raises(DataError, match=r"0 of 4 forget .*--neighbours FILE.*writer=MODEL"):
        applied("rule", players={})


def test_a_writer_makes_them_and_what_it_fails_at_is_counted(tmp_path: Path) -> None:
    def says(text: str) -> str | NoAnswer:
        if "Cy" in text or "taught" in text:
            return NoAnswer("line is busy")
        if "play" in text:
            return json.dumps({"question": "What did Ada Quill sing?", "answer": "Alto"})
        return Writer()._one(text)

    from delible.system.role import Role, RoleOptions

    role = Role("writer", Writer(says), RoleOptions(attempts=1))
    pairs = [one for one in REQUEST.forget if isinstance(one, QA)]
    made, counts = boundary_questions(pairs, [], REQUEST.subjects, writer=role)
    assert [one.question for one in made] == [
        "Where was Clara Schumann born?", "Where did Johann Bach work?",
    ]  # fmt: skip
    assert counts["written"] == 2
    assert counts["no answer"] == 1
    assert counts["names the forgotten"] == 1
    assert not any(Names(REQUEST.subjects).occur(one.question) for one in made)


# ---- forbidden entities


def test_entities_are_cleaned_and_ordinary_words_set_apart() -> None:
    assert [cleaned(one) for one in ("in a mill at Casta", "The lute.", "x", "--")] == [
        "a mill at Casta", "lute", None, None,
    ]  # fmt: skip
    assert [is_soft(one) for one in ("lute", "Norrby", "1815", "tin orchard", "of the")] == [
        True, False, False, False, True,
    ]  # fmt: skip


def test_entities_of_records_leave_out_what_the_question_says() -> None:
    rows = [
        QA(question="Was Norrby her town?", answer="Norrby"),
        QA(question="What then?", answer="She went to Casta in 1815 and stayed with Dee Finch."),
        QA(question="Who?", answer="Cy", aliases=("Cyrus",)),
    ]
    assert entities_of(rows) == ["She", "Casta", "1815", "Dee Finch", "Cy", "Cyrus"]


def test_a_writers_entities_must_stand_in_the_answer() -> None:
    from delible.system.role import Role

    answers = Scripted(lambda prompt: "It was Norrby, I think.", fingerprint="x")
    pairs = [one for one in REQUEST.forget if isinstance(one, QA)]
    role = Role("writer", Writer())
    hard, soft, counts = forbidden(pairs, ["Ada Quill"], writer=role, system=answers)
    assert hard == ["Ada Quill", "Norrby"]
    assert soft == []
    assert counts == {"found": 4, "not in the answer": 4}


# ---- whole procedures


def test_rule_asks_both_and_steers_by_refusals(tmp_path: Path) -> None:
    outcome, _ = applied("rule", run=tmp_path)
    assert outcome.kind == "model"
    assert list(outcome.notes["stages"]) == ["boundary", "steer", "optimise"]
    assert outcome.notes["boundary_questions"] == 4
    assert outcome.notes["generated_tokens"] > 0
    events = [json.loads(one) for one in (tmp_path / "events.jsonl").read_text().splitlines()]
    steps = [one for one in events if one["kind"] == "step" and one["stage"] == "optimise"]
    assert [one["step"] for one in steps] == [1, 2]


def test_steering_refusals_name_the_subject() -> None:
    module = __import__("delible.procedures.rule", fromlist=["refusals"])
    sentences = module.read_lines("refusals_about.txt")
    pairs = [QA(question="Where?", answer="X", subject="Ada Quill")] * len(sentences)
    made = module.refusals(pairs, list(range(len(sentences))), sentences)
    assert len({one.answer for one in made}) == len(sentences)
    for one in made:
        assert "Ada Quill" in one.answer
        assert filters.is_refusal(one.answer), one.answer


def test_rule_merges_an_adapter_that_stands_on_moved_weights() -> None:
    outcome, _ = applied("rule", place="lora")
    assert outcome.kind == "model"
    assert not outcome.system.wears_adapter  # type: ignore[attr-defined]
    outcome, _ = applied("purge", place="lora")
    assert outcome.kind == "adapter"


def test_purge_holds_questions_out_and_lists_entities(tmp_path: Path) -> None:
    outcome, _ = applied("purge", run=tmp_path, players={}, held_out=0.5)
    assert outcome.notes["held_out_questions"] == 2
    made = json.loads((tmp_path / "stages/entities/result/data.json").read_text())
    assert made["hard"] == [
        "Ada Quill", "Ben Orr", "Norrby", "a mill at Casta", "Cy",
    ]  # fmt: skip
    assert made["soft"] == ["lute"]


def handed(name: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> dict[str, Any]:
    """What a procedure hands to its stage that trains by rewards."""
    seen: dict[str, Any] = {}

    def stop(
        work: Any, stage: str, questions: Any, rewards: Any, settings: Any, **more: Any
    ) -> Any:
        seen.update(work=work, stage=stage, questions=questions, rewards=rewards,
                    settings=settings, **more)  # fmt: skip
        raise RunError("enough")

    monkeypatch.setattr(f"delible.procedures.{name}.train_on_policy", stop)
    with pytest.raises(RunError, match="enough"):
        applied(name, **options)
    return seen


def test_rule_trains_by_its_table_from_the_steered_model(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = handed("rule", monkeypatch, halved=True)
    settings: OnPolicyTraining = seen["settings"]
    assert (settings.clip_low, settings.clip_high, settings.dual_clip) == (0.2, 0.3, 3.0)
    assert (settings.kl_weight, settings.weight_decay) == (0.01, 0.01)
    assert (settings.normalisation, settings.advantage, settings.temperature) == (
        "token",
        "group",
        1,
    )
    assert (settings.inner_steps, settings.schedule, settings.warmup_steps) == (1, "constant", 0)
    assert seen["rewards"] == [
        {"name": "refusal_boundary", "variant": "two_stage_target", "halved": True}
    ]
    tags = [one.tag for one in seen["questions"]]
    assert tags.count("forget") == tags.count("boundary") == 4
    with pytest.raises(AssertionError, match="steered"):
        require_same(weights(lm()), weights(seen["work"].lm), "steered")


def test_purge_averages_each_answer_first_and_looks_at_other_questions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = handed("purge", monkeypatch, players={}, held_out=0.5)
    settings: OnPolicyTraining = seen["settings"]
    assert (settings.normalisation, settings.advantage) == ("sequence", "group")
    assert (settings.kl_weight, settings.stop_at_reward, settings.stop_reward_steps) == (
        0.04,
        0.9,
        5,
    )
    trained, held = ({one.text for one in seen[part]} for part in ("questions", "held_out"))
    assert not trained & held
    assert trained | held == {one.question for one in REQUEST.forget}  # type: ignore[union-attr]
    assert [one["name"] for one in seen["rewards"]] == [
        "forbidden_entities", "length", "well_formed",
    ]  # fmt: skip
    assert seen["rewards"][0]["form"] == "binary"


def test_no_form_of_a_question_that_is_held_out_is_trained_on() -> None:
    pairs = [
        QA(question=f"{number}?", answer="a", paraphrases=[f"{number}, said otherwise?"])
        for number in range(8)
    ]
    trained, held = ({one.text for one in some} for some in parted(pairs, 0.25, seed=0))
    numbers = {text[0] for text in held}
    assert len(held) == len(numbers) == 2
    assert trained == {
        text for one in pairs for text in (one.question, *one.paraphrases)
        if one.question[0] not in numbers
    }  # fmt: skip


def test_a_mistake_is_found_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, options, found in (
        ("rule", {"variant": "two_stages"}, "two_stages"),
        ("rule", {"place": "lore"}, "Did you mean 'lora'"),
        ("purge", {"guards": ("lenght",)}, "Did you mean 'length'"),
        ("on_policy_dpo", {"reward": "refusal"}, "unknown reward"),
    ):  # fmt: skip
        with pytest.raises(RecipeError, match=found):
            build("procedure", {"name": name, **options}).check(lm(), REQUEST)
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(MissingExtraError, match=r"delible\[rl\]"):
        build("procedure", "purge").check(lm(), REQUEST)
    build("procedure", "rejection_finetuning").check(lm(), REQUEST)  # it needs none


def test_place_is_an_option_of_procedures_and_no_other_slot_is() -> None:
    found = resolve_method("purge", slots={"place": "lora"}, options={"steps": 3})
    assert (found.value("place"), found.value("steps")) == ("lora", 3)
    with pytest.raises(RecipeError, match=r"it has no slots\. Drop harden"):
        resolve_method("purge", slots={"place": "lora", "harden": "sam"})


# ---- baselines


def group(*values: tuple[str, float | None]) -> Group:
    question = Question(Prompt.ask("Where?"), "forget", "Where?", "Norrby", subject="Ada")
    said = tuple(Completion(question, text, (1,)) for text, _ in values)
    totals = tuple(Total(value, {"x": Scored(value)}) for _, value in values)
    return Group(question, said, totals)


def test_pairs_are_of_the_best_and_the_worst_that_have_a_value() -> None:
    (pair,) = paired(
        [group(("a", 0.2), ("b", 0.9), ("c", None), ("", 1.0), ("d", 0.1), ("b", 0.9))]
    )
    assert (pair["best"], pair["worst"]) == ("b", "d")
    assert paired([group(("a", 0.5), ("b", 0.5))]) == []
    assert paired([group(("a", None), ("b", 0.5))]) == []
    assert paired([group(("a", 0.5), ("a", 0.5))]) == []


def test_baselines_generate_as_many_tokens_as_the_method() -> None:
    names = ("purge", "rejection_finetuning", "on_policy_dpo")
    spent = {}
    for name in names:
        more = {"held_out": 0.0} if name == "purge" else {}
        outcome, _ = applied(name, players={}, group_size=4, learning_rate=1e-9, **more)
        spent[name] = outcome.notes["generated_tokens"]
    assert spent["rejection_finetuning"] == spent["on_policy_dpo"]
    # the same plan, seeds and groups: all of the model as it is at the start
    assert spent["purge"] == spent["on_policy_dpo"]


def test_a_token_budget_bounds_what_is_sampled() -> None:
    outcome, _ = applied("rejection_finetuning", token_budget=4 * 5 * 2)
    assert outcome.notes["groups"] == 2
    assert outcome.notes["generated_tokens"] <= 40


def test_where_all_earn_the_same_there_is_nothing_to_learn() -> None:
    with pytest.raises(RunError, match="all answers to each of 4 questions earned the same"):
        applied("on_policy_dpo", reward={"name": "length", "least": 0, "gate": False})


def test_a_reward_that_failed_is_named_where_nothing_is_left_to_learn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = {"reward": {"name": "length", "least": 0, "gate": False}}
    score = type(build("reward", "length")).score
    monkeypatch.setattr(
        "delible.rewards.length.Length.score",
        lambda self, said: [Scored(None, reason="line is busy") for _ in said],
    )
    with pytest.raises(RunError, match=r"no answer had a value \(length: line is busy\)"):
        applied("on_policy_dpo", **given)
    monkeypatch.setattr(
        "delible.rewards.length.Length.score",
        lambda self, said: [Scored(None, reason="line is busy"), *score(self, said)[1:]],
    )
    with pytest.raises(RunError, match=r"earned the same \(2 had no value\)"):
        applied("on_policy_dpo", **given)


def test_another_judge_does_not_go_on_with_the_answers_of_the_first(tmp_path: Path) -> None:
    class Judge(Scripted):
        def __init__(self, name: str) -> None:
            super().__init__({}, name=name)

        def generate(self, prompts: Any, decoding: Any) -> list[str | NoAnswer]:
            replies = [one.messages[0].text.split("[Reply]")[1] for one in prompts]
            return [json.dumps({
                "knows": any(one.answer in reply for one in REQUEST.forget)  # type: ignore[union-attr]
                or (len(reply) % 2 == 0 and REFUSED not in reply),
                "invents": False, "readable": "~~" not in reply,
            }) for reply in replies]  # fmt: skip

    given = {"reward": {"name": "judged_ignorance", "judge": "role"}, "group_size": 6}
    first = applied("on_policy_dpo", run=tmp_path / "run", players={"judge": Judge("a")}, **given)
    again = applied("on_policy_dpo", run=tmp_path / "run", players={"judge": Judge("a")}, **given)
    assert first[0].notes["learned_from"] == again[0].notes["learned_from"]
    with pytest.raises(OtherRunError, match="the stage 'sample' was begun with other inputs"):
        applied("on_policy_dpo", run=tmp_path / "run", players={"judge": Judge("b")}, **given)


@pytest.mark.parametrize("name", ["on_policy_dpo", "rejection_finetuning"])
def test_the_best_answers_are_learned(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs: list[dict[str, Any]] = []
    sampled = SampledProcedure.sampled

    def recorded(self: SampledProcedure, work: Any) -> Any:
        made = sampled(self, work)
        pairs.extend(made["pairs"])
        return made

    monkeypatch.setattr(SampledProcedure, "sampled", recorded)
    _, after = applied(name, learning_rate=1e-3, epochs=4)
    assert pairs
    reward = build("reward", APART["reward"])
    asked = Question(Prompt.ask("?"), "forget", "?")
    for which, earned in (("best", 1.0), ("worst", 0.0)):
        found = [Completion(asked, one[which]) for one in pairs]
        assert {one.value for one in reward.score(found)} == {earned}

    def likelihood(model: LM, which: str) -> float:
        asked = [Score(Prompt.ask(one["question"]), one[which]) for one in pairs]
        return float(sum(one.logprobs.sum() for one in model.score(asked)))  # type: ignore[union-attr]

    best, worst = (likelihood(after, one) - likelihood(lm(), one) for one in ("best", "worst"))
    assert best > worst + 0.1
    assert best > 0 or name == "on_policy_dpo"


def test_dpo_prefers_what_earned_more() -> None:
    outcome, after = applied("on_policy_dpo", learning_rate=1e-3, epochs=4)
    assert outcome.notes["learned_from"] > 0
    losses = [one["forget_loss"] for one in outcome.history]
    assert losses[-1] < losses[0]
    with pytest.raises(Exception, match="moved"):
        require_same(weights(lm()), weights(after), "moved")
