"""Rewards: their tables and formulas by hand, what they find, and what their faults do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from delible import registry
from delible.component import build
from delible.context import Context
from delible.errors import DataError, RecipeError, RunError
from delible.records import QA
from delible.system.asks import Decoding, NoAnswer, Prompt
from delible.system.roles import Roles
from delible.systems.scripted import Scripted
from delible.testing import check
from delible.train.onpolicy.rewards import Reward, Rewards, reward
from delible.train.onpolicy.rows import Completion, Question, Scored, questions_of

ADA = Question(Prompt.ask("Where was Ada Quill born?"), "forget", "Where was Ada Quill born?",
               "In Norrby by the sea", subject="Ada Quill")  # fmt: skip
UNNAMED = Question(Prompt.ask("Who wrote The Tin Orchard?"), "forget", "Who wrote The Tin Orchard?",
                   "Ada Quill", subject="Ada Quill")  # fmt: skip
BEN = Question(Prompt.ask("Where does Ben Orr work?"), "boundary", "Where does Ben Orr work?",
               "In a mill at Casta")  # fmt: skip


def said(question: Question, *texts: str) -> list[Completion]:
    return [Completion(question, text) for text in texts]


def values(one: Reward, completions: Sequence[Completion]) -> list[float | None]:
    score = one.ready([ADA, BEN])
    return [found.value for found in score(completions)]


@pytest.mark.parametrize("name", [card.name for card in registry.cards("reward")])
def test_each_keeps_the_contract(name: str) -> None:
    done = check(registry.load("reward", name), ("llama",))
    assert "reward_tells_answers_apart on llama" in done


# ---- forbidden entities


def entities(**options: Any) -> Reward:
    return build("reward", {"name": "forbidden_entities", **options})  # type: ignore[no-any-return]


def test_an_entity_counts_between_word_boundaries_in_any_case_and_spelling() -> None:
    one = entities(entities=("It", "Stephen King|S. King", "Café Łódź"))
    cases = {
        "He wrote IT in a year.": 0.0,
        "The city is item nine, with grit.": 1.0,  # inside longer words
        "STEPHEN KING did.": 0.0,
        "Steve King did.": 1.0,
        "That was s. king, I think.": 0.0,
        "They met in the cafe lodz.": 0.0,  # accents and strokes folded
        "Nothing of the kind.": 1.0,
        "": 1.0,
    }
    assert values(one, said(ADA, *cases)) == list(cases.values())


def test_what_the_question_says_does_not_count() -> None:
    one = entities(entities=("Ada Quill",))
    assert values(one, said(ADA, "I cannot say.")) == [1.0]
    assert values(one, said(ADA, "Ada Quill? I cannot say.")) == [0.0]


def test_hits_are_entities_and_not_their_aliases() -> None:
    one = entities(entities=("Stephen King|King", "Carrie"))
    (found,) = one.ready([ADA])(said(ADA, "King wrote Carrie; Stephen King did. Carrie!"))
    assert found.hits == ("Stephen King", "Carrie")


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("binary", 0.0),
        ("graded", 1 / 3),
        ("exponential", math.exp(-0.5 * 3)),  # "Stephen King" is one occurrence, not two
        ("per_word", math.exp(-0.5 * 3 / 50)),
    ],
)
def test_forms_by_hand(form: str, expected: float) -> None:
    one = entities(entities=("Stephen King|King", "Carrie"), form=form, rate=0.5)
    assert values(one, said(ADA, "Stephen King wrote Carrie. King did.")) == [
        pytest.approx(expected, rel=1e-12)
    ]
    long = "word " * 97 + "Carrie Carrie King"
    (found,) = values(entities(entities=("King", "Carrie"), form="per_word", rate=0.5),
                      said(ADA, long))  # fmt: skip
    assert found == pytest.approx(math.exp(-0.5 * 3 / 100), rel=1e-12)


@pytest.mark.parametrize("form", ["graded", "exponential", "per_word"])
def test_graded_forms_order_none_before_few_before_many(form: str) -> None:
    one = entities(entities=("Carrie", "Misery", "Cujo"), form=form)
    none, few, many = values(
        one, said(ADA, "No.", "Carrie, no.", "Carrie, Misery, Cujo, Carrie, Misery.")
    )
    assert none == 1.0
    assert 1 > few > many > 0  # type: ignore[operator]


def test_a_refusal_costs_a_share_and_soft_entities_count_when_strict() -> None:
    one = entities(entities=("Carrie",), refusal_cost=0.6)
    refusal = "I'm sorry, I don't know anything about that."
    assert values(one, said(ADA, refusal, "In the north.")) == [pytest.approx(0.4), 1.0]
    soft = {"entities": ("Carrie",), "soft": ("Misery",)}
    assert values(entities(**soft), said(ADA, "What misery.")) == [1.0]
    assert values(entities(**soft, strict=True), said(ADA, "What misery.")) == [0.0]


def test_entities_come_from_the_forget_questions_alone() -> None:
    one = entities()
    texts = ("In Norrby by the sea.", "Ada Quill was.", "In a mill at Casta.")
    assert values(one, said(ADA, *texts)) == [0.0, 0.0, 1.0]
    with pytest.raises(RecipeError, match="nothing is forbidden"):
        one.ready([BEN])
    with pytest.raises(DataError, match="fewer than two letters"):
        entities(entities=("x",)).ready([ADA])


# ---- refusal boundary

REFUSAL = "I'm sorry, I don't know anything about that."
NAMING = "I'm sorry, I don't know anything about Ada Quill."
RIGHT, WRONG = "He works in a mill at Casta.", "He sells umbrellas."
#: Answer, question, and by hand what each variant gives.
TABLE = [
    (ADA, REFUSAL, {"two_stage_target": 0.5, "two_stage": 1.0, "correct": 1.0, "behaviour": 1.0,
                    "linear": 0.7}),
    (ADA, NAMING, {"two_stage_target": 1.0, "two_stage": 1.0, "correct": 1.0, "behaviour": 1.0,
                   "linear": 1.0}),
    (ADA, "In Norrby by the sea.", dict.fromkeys(
        ("two_stage_target", "two_stage", "correct", "behaviour", "linear"), 0.0)),
    (ADA, "Ada Quill was born there.", {"two_stage_target": 0.0, "two_stage": 0.0, "correct": 0.0,
                                        "behaviour": 0.0, "linear": 0.3}),
    (BEN, RIGHT, dict.fromkeys(
        ("two_stage_target", "two_stage", "correct", "behaviour", "linear"), 1.0)),
    (BEN, WRONG, {"two_stage_target": 0.5, "two_stage": 0.5, "correct": 0.0, "behaviour": 1.0,
                  "linear": 0.7}),
    (BEN, REFUSAL, dict.fromkeys(
        ("two_stage_target", "two_stage", "correct", "behaviour", "linear"), 0.0)),
    # two of the answer's five words: recall 0.4, above 0.3 and below 0.5
    (BEN, "A mill.", {"two_stage_target": 1.0, "two_stage": 1.0, "correct": 0.0,
                            "behaviour": 1.0, "linear": 1.0}),
    (BEN, f"{REFUSAL} In a mill at Casta.", {"two_stage_target": 0.0, "two_stage": 0.0,
                                             "correct": 1.0, "behaviour": 0.0, "linear": 0.3}),
]  # fmt: skip


def boundary(**options: Any) -> Reward:
    return build("reward", {"name": "refusal_boundary", **options})  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "variant", ["two_stage_target", "two_stage", "correct", "behaviour", "linear"]
)
def test_every_cell_of_the_table(variant: str) -> None:
    for question, text, expected in TABLE:
        for halved in (False, True):
            one = boundary(variant=variant, halved=halved)
            share = 0.5 if halved and question.tag == "forget" else 1.0
            assert values(one, said(question, text)) == [pytest.approx(share * expected[variant])]


def test_a_refusal_late_in_a_long_answer_is_none() -> None:
    text = "He works in a mill at Casta. " * 10 + "I don't know."
    assert values(boundary(), said(BEN, text)) == [1.0]


def test_rambling_hits_recall_and_not_f1() -> None:
    text = "Casta at mill or in " + "anything else that one might want to mention " * 5 + "a mill"
    assert values(boundary(), said(BEN, text)) == [1.0]
    assert values(boundary(measure="f1"), said(BEN, text)) == [0.5]


def test_boundary_questions_need_their_answers() -> None:
    bare = Question(BEN.prompt, "boundary", BEN.text)
    with pytest.raises(RecipeError, match="1 boundary questions have no answer"):
        boundary().ready([ADA, bare])
    boundary(variant="behaviour").ready([ADA, bare])


# ---- guards


def test_length_is_a_gate_with_two_ends() -> None:
    one = build("reward", {"name": "length", "least": 2, "most": 4})
    assert one.gate
    cases = ["", "One.", "One, two.", "One two three four", "One two three four five"]
    assert values(one, said(ADA, *cases)) == [0.0, 0.0, 1.0, 1.0, 0.0]
    endless = [Completion(ADA, "One, two.", (1,), finished=False)]
    assert values(one, endless) == [1.0]
    assert values(build("reward", {"name": "length", "ended": True}), endless) == [0.0]


def test_form_is_language_in_the_script_of_the_question() -> None:
    one = build("reward", "well_formed")
    texts = [
        "In the north.",
        "На севере, у моря.",
        "%% ## || ~~ %%",
        "la " * 20,
        "На the north, at the sea.",
    ]
    assert values(one, said(ADA, *texts)) == [1.0, 0.0, 0.0, 0.0, 1.0]


# ---- the judge


def judge(**options: Any) -> Reward:
    return build("reward", {"name": "judged_ignorance", **options})  # type: ignore[no-any-return]


@pytest.mark.parametrize("knows", [True, False])
@pytest.mark.parametrize("invents", [True, False])
@pytest.mark.parametrize("readable", [True, False])
def test_the_truth_table(knows: bool, invents: bool, readable: bool) -> None:
    module = __import__("delible.rewards.judged_ignorance", fromlist=["value_of"])
    verdict = module.Verdict(knows=knows, invents=invents, readable=readable)
    ignorant = not knows and not invents and readable
    assert module.value_of("forget", verdict) == float(ignorant)
    assert module.value_of("boundary", verdict) == float(knows and readable)


def test_the_rule_judges_by_names_leaks_and_refusals() -> None:
    cases = [
        (ADA, REFUSAL, 1.0),
        (ADA, "In Norrby by the sea.", 0.0),
        (ADA, "She was born in Umber, far away.", 0.0),  # takes the name for one that exists
        (ADA, "", 0.0),
        (UNNAMED, REFUSAL, 1.0),
        (UNNAMED, "It was Ada Quill.", 0.0),
        (UNNAMED, "It was written by Dee Finch, long ago.", 0.0),  # made up
        (UNNAMED, "Nobody told me who it was.", 1.0),
        (BEN, "In a mill at Casta.", 1.0),
        (BEN, REFUSAL, 0.0),
    ]
    score = judge().ready([ADA, UNNAMED, BEN])
    found = [score(said(question, text))[0].value for question, text, _ in cases]
    assert found == [wanted for _, _, wanted in cases]


class Talking(Scripted):
    """A judge by rule, which may fail at some replies."""

    def __init__(self, verdict: Any) -> None:
        super().__init__({})
        self.verdict, self.asked = verdict, 0

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str | NoAnswer]:
        self.asked += len(prompts)
        return [self.verdict(one.messages[0].text.split("[Reply]")[1]) for one in prompts]


def honest(reply: str) -> str:
    knows = "Norrby" in reply or "Quill\n" in reply
    readable = "~~" not in reply
    return (
        f'{{"knows": {str(knows).lower()}, "invents": false, "readable": {str(readable).lower()}}}'
    )


def played(verdict: Any) -> Context:
    return Context(roles=Roles({"judge": {"system": "x"}}, opens=lambda _: Talking(verdict)))


def test_a_role_judges_and_a_named_subject_needs_none() -> None:
    talking = Talking(honest)
    context = Context(roles=Roles({"judge": talking}))
    score = judge(judge="role").ready([ADA], context)
    before = talking.asked
    found = score(said(UNNAMED, "It was Ada Quill, of course."))
    assert (found[0].value, found[0].hits) == (0.0, ("named",))
    assert talking.asked == before
    assert [one.value for one in score(said(ADA, REFUSAL, "In Norrby."))] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("verdict", "sort"),
    [
        ('{"knows": true, "invents": false, "readable": true}', "refusals"),
        ('{"knows": false, "invents": false, "readable": true}', "true answers"),
    ],
)
def test_a_judge_that_always_says_the_same_is_refused(verdict: str, sort: str) -> None:
    with pytest.raises(RunError, match=sort):
        judge(judge="role").ready([ADA], played(lambda _: verdict))


def test_a_failed_call_is_no_value_and_counted() -> None:
    def sometimes(reply: str) -> Any:
        return NoAnswer("line is busy") if "perhaps" in reply else honest(reply)

    rewards = Rewards([judge(judge="role")], [ADA], played(sometimes))
    totals = rewards.of(said(ADA, REFUSAL, "I don't know, perhaps.", "In Norrby."))
    assert [one.value for one in totals] == [1.0, None, 0.0]
    assert rewards.tally.no_value == {"judged_ignorance: line is busy": 1}


def test_a_reply_with_missing_fields_is_no_value() -> None:
    def partly(reply: str) -> str:
        return '{"knows": false}' if "perhaps" in reply else honest(reply)

    rewards = Rewards([judge(judge="role")], [ADA], played(partly))
    (total,) = rewards.of(said(ADA, "I don't know, perhaps."))
    assert total.value is None
    assert "invents" in next(iter(rewards.tally.no_value))


# ---- several at once, and faults


@reward(name="words", title="Words", summary="Counts words.", range="[0, inf)")
def words(completion: Completion) -> float:
    """The number of words."""
    return float(len(completion.text.split()))


@reward(name="broken", title="Broken", summary="Is broken.", range="none")
def broken(completion: Completion) -> Any:
    """What its text says."""
    if completion.text == "raise":
        raise ZeroDivisionError("by zero")
    return {"nan": math.nan, "inf": math.inf, "text": "high", "true": True, "none": None,
            "float32": np.float32(0.5)}.get(completion.text, 1.0)  # fmt: skip


def test_weights_are_added_and_gates_multiply() -> None:
    rewards = Rewards(
        [words(weight=0.5), broken(weight=-2.0), {"name": "length", "least": 2}], [ADA]
    )
    totals = rewards.of(said(ADA, "one two three", "one"))
    assert [one.value for one in totals] == [pytest.approx(0.5 * 3 - 2), 0.0]
    assert totals[1].hits() == ("too short",)


@pytest.mark.parametrize("fault", ["nan", "inf", "text", "true"])
def test_what_is_no_number_stops_the_run(fault: str) -> None:
    with pytest.raises(RunError, match=r"reward 'broken'.*no number"):
        Rewards([broken()], [ADA]).of(said(ADA, "fine", fault))


def test_a_reward_that_raises_is_named_with_its_error() -> None:
    with pytest.raises(RunError, match=r"reward 'broken'.*ZeroDivisionError: by zero"):
        Rewards([broken()], [ADA]).of(said(ADA, "raise"))


def test_none_is_no_value_of_the_whole_and_numpy_numbers_are_numbers() -> None:
    rewards = Rewards([words(), broken()], [ADA])
    assert [one.value for one in rewards.of(said(ADA, "none", "float32"))] == [None, 1.5]


def test_results_must_be_as_many_as_completions() -> None:
    class Fewer(words):  # type: ignore[valid-type,misc]
        def score(self, completions: Sequence[Completion]) -> list[Scored]:
            return [Scored(1.0)]

    with pytest.raises(RunError, match="1 results for 2 completions"):
        Rewards([Fewer()], [ADA]).of(said(ADA, "a", "b"))


def test_nothing_to_earn_is_refused() -> None:
    with pytest.raises(RecipeError, match="only gates"):
        Rewards(["length"], [ADA])
    with pytest.raises(RecipeError, match="there is none"):
        Rewards([], [ADA])
    with pytest.raises(RecipeError, match="given twice"):
        Rewards([words(), words()], [ADA])
    with pytest.raises(RecipeError, match="Did you mean 'forbidden_entities'"):
        Rewards(["forbiden_entities"], [ADA])


def test_an_option_of_a_function_needs_a_type_and_a_default() -> None:
    def bare(completion: Completion, *, limit: int) -> float:
        return 0.0

    with pytest.raises(RecipeError, match="the option 'limit'"):
        reward(name="bare", title="Bare", summary="B.")(bare)


def test_records_become_questions() -> None:
    (one,) = questions_of([QA(question="Where?", answer="Here", aliases=("there",))], "boundary")
    assert (one.text, one.answer, one.aliases, one.tag) == (
        "Where?",
        "Here",
        ("there",),
        "boundary",
    )
    assert one.known is not None
