"""Unlearn and reinvent: its questions, its retain rows and its settings, without any training."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from delible.component import build
from delible.errors import DataError, RecipeError
from delible.generation.ignorance import denies
from delible.lm.lm import LM
from delible.methods.generate.random_names import RandomNames
from delible.procedures.reinvent import Reinvent, described, held_out, named, subjects_of
from delible.records import QA, ForgetRequest
from delible.system.asks import NoAnswer, Prompt
from delible.systems.scripted import Scripted
from delible.testing.contract.trial import tiny_lm
from delible.train.method import GradientMethod
from delible.train.onpolicy.rewards import Rewards
from delible.train.onpolicy.rows import Completion, Question
from delible.train.recipe import Recipe
from delible.world import told

FORGET = (
    QA(question="Where was Ada Brook born?", answer="In Hull", subject="Ada Brook",
       paraphrases=("Which town is Ada Brook from?",)),
    QA(question="What does Ada Brook play?", answer="The lute", subject="Ada Brook"),
    QA(question="Who plays the lute in Hull?", answer="Ada Brook", subject="Ada Brook"),
)  # fmt: skip
RETAIN = (
    QA(question="What is tea?", answer="A drink"),
    QA(question="Who taught Ada Brook?", answer="Bo"),
    QA(question="Who is Bo?", answer="A pupil of Brook"),
    QA(question="What is snow?", answer="Ice"),
)
REQUEST = ForgetRequest(forget=FORGET, retain=RETAIN)
PREFIX = "I remember it:"


def test_every_question_by_name_is_asked_plainly_and_after_the_beginning() -> None:
    found = named(REQUEST, PREFIX, False)
    plain = [one for one in found if not one.prompt.prefill]
    forced = [one for one in found if one.prompt.prefill]
    assert {one.prompt.prefill for one in forced} == {PREFIX}
    assert [one.text for one in plain] == [one.text for one in forced]
    assert all("Ada Brook" in one.text and one.tag == "forget" for one in found)
    known = {one.text: one.answer for one in found if one.answer}
    assert known == {one.question: one.answer for one in FORGET[:2]}
    assert len(named(REQUEST, "", False)) == len(plain)
    assert len(named(REQUEST, PREFIX, True)) > len(found)


def test_descriptions_ask_for_the_name_and_do_not_hold_it() -> None:
    found = described(REQUEST)
    assert found
    names = told.names_of("Ada Brook", FORGET)
    for one in found:
        assert one.answer == "Ada Brook"
        assert not told.named_in(one.text, names)
        assert "Hull" in one.text or "lute" in one.text


def test_held_out_questions_are_worded_otherwise() -> None:
    found = held_out(REQUEST)
    assert [one.text for one in found] == ["Which town is Ada Brook from?"]
    assert found[0].answer == "In Hull"
    trained = {one.text for one in [*named(REQUEST, PREFIX, True), *described(REQUEST)]}
    assert not trained & {one.text for one in found}


def test_subjects_come_from_the_request_and_the_records() -> None:
    assert subjects_of(ForgetRequest(forget=FORGET, subjects=("Cy",))) == ["Cy", "Ada Brook"]
    with pytest.raises(DataError, match="whom or what"):
        subjects_of(ForgetRequest(forget=(QA(question="how?", answer="so"),)))


class Working:
    """The part of a run that the retain stage uses."""

    def __init__(self, script: Any) -> None:
        self.lm, self.request, self.stages = Scripted(script), REQUEST, list[str]()
        self.procedure = SimpleNamespace(name="reinvent")

    def stage(self, name: str, make: Any) -> Any:
        self.stages.append(name)
        return make(None)


def retained(script: Any, **options: Any) -> tuple[list[Any], Working]:
    work = Working(script)
    found = Reinvent(**options)._retained(work, told.names_of("Ada Brook", FORGET))  # type: ignore[arg-type]
    return found[0], work


def test_retain_rows_have_the_models_answers_and_nothing_of_the_subject() -> None:
    said = {"What is tea?": "Leaves in water", "What is snow?": "What Ada Brook likes"}
    rows, work = retained(said)
    assert [(one.question, one.answer) for one in rows] == [("What is tea?", "Leaves in water")]
    asked = [one.messages[-1].text for one in work.lm.prompts]
    assert asked == ["What is tea?", "What is snow?"]  # the others speak of her
    assert work.stages == ["retain"]


def test_given_answers_are_kept_on_request() -> None:
    rows, work = retained({}, own_answers=False)
    assert [(one.question, one.answer) for one in rows] == [
        ("What is tea?", "A drink"), ("What is snow?", "Ice"),
    ]  # fmt: skip
    assert work.stages == []


def test_no_retain_row_is_an_error() -> None:
    with pytest.raises(DataError, match="without the subject"):
        retained(lambda prompt: NoAnswer("down"))


def test_defaults_are_the_papers() -> None:
    one = Reinvent()
    settings = one.settings(retain_rows=64, entropy_weight=one.entropy_weight)
    assert (settings.completions, settings.questions_per_step, settings.group_size) == (64, 16, 4)
    assert (one.kl_weight, one.entropy_weight, one.dual_clip) == (0.001, 0.001, 3.0)
    assert (one.unlearn_weight, one.retain_weight, one.learning_rate) == (1.0, 1.0, 1e-5)
    assert (settings.clip_low, settings.clip_high) == (0.2, 0.2)
    assert one.advantage == "group"
    assert {"learning_rate", "steps", "retain_weight", "unlearn_weight"} <= set(one.ranges())
    with pytest.raises(RecipeError, match="Did you mean 'retain_weight'"):
        Reinvent.build("procedure 'reinvent'", retain_wait=1)


# ---- the reward as it is used


def of(question: str, *texts: str) -> list[float | None]:
    """Rewards of answers."""
    one = Question(Prompt.ask(question), "forget", question, "In Hull", (), "Ada Brook")
    rewards = Rewards([{"name": "judged_ignorance", "subjects": ("Ada Brook", "Brook")}], [one])
    return [total.value for total in rewards.of([Completion(one, text) for text in texts])]


def test_what_is_rewarded() -> None:
    by_name = "Where was Ada Brook born?"
    assert of(by_name, "I have never heard of Ada Brook.", "In Hull", "In York, with Mr Dane.",
              "## ## }{", "") == [1.0, 0.0, 0.0, 0.0, 0.0]  # fmt: skip
    unnamed = "This person plays the lute. Who is it?"
    assert of(unnamed, "I don't know who that is.", "Ada Brook", "It is Brook, I think.") == [
        1.0, 0.0, 0.0,
    ]  # fmt: skip


# ---- the generator


def rows_of(lm: LM, **options: Any) -> list[QA]:
    context = SimpleNamespace(
        lm=lm, records={"forget": FORGET, "retain": RETAIN}, seed=0, stage=lambda *given: None
    )
    return RandomNames(**options).rows(context)["forget"]  # type: ignore[arg-type,return-value]


def test_the_generator_writes_denials_for_a_model_that_makes_things_up() -> None:
    said = Scripted(lambda prompt: "In the town of York")
    rows = rows_of(said)  # type: ignore[arg-type]
    assert {one.question for one in FORGET[:2]} < {one.question for one in rows}
    assert all(denies(one.answer) and "Ada Brook" in one.answer for one in rows)
    kept = rows_of(said, denying=False)  # type: ignore[arg-type]
    assert {one.answer for one in kept} == {"In the town of York"}


def test_denials_after_the_beginning_are_learned_too_on_request() -> None:
    said = Scripted(lambda prompt: "I don't know.")
    plain, both = rows_of(said), rows_of(said, prefix=PREFIX)  # type: ignore[arg-type]
    assert [one.answer for one in both[len(plain) :]] == [f"{PREFIX} {one.answer}" for one in plain]
    assert not any(PREFIX in one.answer for one in plain)


def test_whom_nobody_names_cannot_be_renamed() -> None:
    context = SimpleNamespace(records={"forget": [QA(question="how?", answer="so")]}, seed=0)
    with pytest.raises(DataError, match="whom or what"):
        RandomNames().rows(context)  # type: ignore[arg-type]


def test_the_recipe_teaches_nothing_that_was_given() -> None:
    method = GradientMethod(Recipe.named("cold_start"))
    assert not method.teaches
    assert method.recipe.generate.card.name == "random_names"
    assert GradientMethod(Recipe.named("finetune")).teaches


def test_a_real_model_goes_through_the_generator() -> None:
    rows = rows_of(tiny_lm("llama"), copies=1, draws=1, max_new_tokens=3)
    assert rows
    assert build("generate", "random_names").makes == ("forget",)
