"""Lessons: levels by hand, moves, teach-back, recovery and its control, and what is kept."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pupil import RECORDS, Pupil
from scipy.optimize import minimize

from delible.context import Context
from delible.errors import DataError, ModelError, RecipeError
from delible.lm.lm import LM
from delible.messages import Message
from delible.records import QA, Choice, Passage
from delible.system.asks import Prompt
from delible.system.roles import Roles
from delible.systems.scripted import Scripted
from delible.teaching import Lesson
from delible.teaching.analysis import holm, logistic, slope, transitions, weighed_moves
from delible.teaching.items import Item, exam_of
from delible.teaching.level import Answered, Level, read_level, shares_of
from delible.teaching.moves import kappa, student_move, teacher_move
from delible.testing.tiny import tiny_model, tiny_tokenizer

TEACH = (
    "Ada Quill was born in a small town. In Norrby, to be exact.",
    "Good. For example, The lute was what she played.",
    "What do you think, who taught Ben Orr? It was Cy Dunn.",
)


def lesson_of(system: Any = None, **options: Any) -> Lesson:
    found = Lesson(system or Pupil(), RECORDS, **options)
    found.begin()
    return found


def item(options: Sequence[str] = ("right", "wrong", "bad", "off"), topic: str = "T") -> Item:
    choice = Choice(question="Which?", options=tuple(options), correct=0)
    return Item(topic, choice, "fact")


# ---- what is asked


def test_checks_and_the_test_ask_the_same_facts_in_other_words() -> None:
    exam = exam_of(RECORDS)
    assert [one.choice.question for one in exam.checks] == [one.question for one in RECORDS]
    assert [one.choice.question for one in exam.final] == [one.paraphrases[0] for one in RECORDS]
    assert [one.fact for one in exam.checks] == [one.fact for one in exam.final]
    assert exam.checks[0].choice.options == ("In Norrby", "In Oslo", "In Bern")
    assert exam.reworded == 3
    assert exam.topics == ("Ada Quill", "Ben Orr")
    assert exam_of(RECORDS, ["ben orr"]).topics == ("Ben Orr",)


def test_records_without_wrong_answers_borrow_those_of_others() -> None:
    plain = [one.model_copy(update={"perturbed": (), "paraphrases": ()}) for one in RECORDS]
    exam = exam_of(plain)
    assert exam.reworded == 0
    assert all(len(one.choice.options) > 1 for one in exam.checks)
    assert all(one.key not in one.choice.options[1:] for one in exam.checks)


def test_of_many_records_some_are_asked_evenly() -> None:
    many = [
        QA(question=f"What is {place}?", answer=f"a {place}", perturbed=("b",), subject="N")
        for place in range(50)
    ]
    assert [one.key for one in exam_of(many, limit=10).checks] == [
        f"a {place}" for place in range(0, 50, 5)
    ]


def test_what_cannot_be_asked_is_told() -> None:
    with pytest.raises(DataError, match="no record is about Cy") as error:
        exam_of(RECORDS, ["Cy"])
    assert "Ada Quill, Ben Orr" in str(error.value.hint)
    with pytest.raises(DataError, match="none of the 1 records can be asked"):
        exam_of([Passage(text="One.")])


# ---- the level


def test_shares_are_a_softmax_of_means() -> None:
    found = shares_of([-1.0, -2.0, -3.0])
    wanted = [math.exp(-1), math.exp(-2), math.exp(-3)]
    assert found == pytest.approx([one / sum(wanted) for one in wanted])
    assert shares_of([-math.inf, -math.inf]) == (0.0, 0.0)


def test_a_level_by_scores_is_that_of_a_hand_computation() -> None:
    exam = exam_of(RECORDS)
    heard = (Message(role="user", content="It was In Norrby."),)
    level = read_level(Pupil(), exam.checks, heard)
    known, ignorant = math.exp(-1), math.exp(-3)
    first = known / (known + math.exp(-2) + ignorant)
    other = ignorant / (2 * ignorant + math.exp(-2))
    assert level.by == "scores"
    assert level.accuracy == pytest.approx(1 / 3)
    assert level.key_share == pytest.approx((first + 2 * other) / 3)
    assert [one.state for one in level.answers] == ["correct", "misconception", "misconception"]
    assert level.states() == {"Ada Quill": "partial", "Ben Orr": "misconception"}
    assert level.valid == 1


@pytest.mark.parametrize(("shares", "state"), [
    ((0.7, 0.2, 0.1), "correct"), ((0.4, 0.3, 0.3), "partial"), ((0.2, 0.7, 0.1), "misconception"),
    ((0.3, 0.4, 0.3), "unknown"), ((0.0, 0.0, 0.0), "unknown"),
])  # fmt: skip
def test_a_fact_is_in_one_of_four_states(shares: tuple[float, ...], state: str) -> None:
    assert Answered(item(), shares, 0.0).state == state


def test_a_topic_is_known_where_most_of_its_facts_are() -> None:
    def level(*shares: tuple[float, float]) -> Level:
        return Level(tuple(Answered(item(), one, 0.0) for one in shares), "scores")

    known, wrong, ahead = (0.9, 0.1), (0.1, 0.9), (0.45, 0.3)
    assert level(known, known, known, known, wrong).state == "correct"
    assert level(known, known, known, wrong).state == "partial"
    assert level(wrong, wrong, known).state == "misconception"
    assert level(ahead, ahead).state == "partial"
    assert level((0.3, 0.4), (0.3, 0.4)).state == "unknown"


class Letters(Scripted):
    """Names options by their letter."""

    def __init__(self, name: Any) -> None:
        super().__init__(lambda prompt: name(prompt.messages[-1].text))


def letter_of(text: str, wanted: str) -> str:
    return next(line[0] for line in text.splitlines() if line.endswith(f". {wanted}"))


def test_by_letters_an_oracle_is_right_in_every_order_and_a_guesser_by_chance() -> None:
    items = [item((f"right {n}", "wrong", "bad", "off")) for n in range(200)]
    oracle = Letters(lambda text: letter_of(text, next(
        line[3:] for line in text.splitlines() if ". right" in line)))  # fmt: skip
    level = read_level(oracle, items[:20], ())
    assert (level.accuracy, level.valid, level.by) == (1.0, 1.0, "answers")
    assert len(oracle.prompts) == 80
    places = {letter_of(prompt.messages[-1].text, "right 0") for prompt in oracle.prompts[:4]}
    assert places == set("ABCD")
    draw = random.Random(0)
    guessed = read_level(Letters(lambda text: draw.choice("ABCD")), items, ())
    assert guessed.accuracy == pytest.approx(0.25, abs=0.05)
    always = read_level(Letters(lambda text: "A"), items[:20], ())
    assert always.accuracy == 0.25  # a letter alone is no knowledge
    lost = read_level(Letters(lambda text: "la la la"), items[:5], ())
    assert (lost.accuracy, lost.valid) == (0.0, 0.0)
    assert lost.answers[0].state == "unknown"


# ---- a lesson


def test_a_lesson_raises_the_level_and_its_control_does_not(tmp_path: Path) -> None:
    lesson = Lesson(Pupil(), RECORDS, original=Pupil(knows=True), folder=tmp_path / "kept")
    told = lesson.begin()
    assert "A student of Ada Quill or Ben Orr: 3 questions, by its own scores" in told
    assert "Level before the lesson 0% (chance 33%, before it forgot 100%)" in told
    for line in TEACH:
        assert lesson.say(line) == "I see."
    assert [one.level.accuracy for one in lesson.reads] == pytest.approx([1 / 3, 2 / 3, 1])
    assert [one.moves[0] for one in lesson.reads] == ["explain", "confirm", "explain"]
    assert [one.moves[1] for one in lesson.reads] == ["agreement"] * 3
    assert lesson.reads[1].told().startswith("level 67% (+67)")
    assert lesson.timeline() == {
        "Ada Quill": ["misconception", "partial", "correct", "correct"],
        "Ben Orr": ["misconception"] * 3 + ["correct"],
    }
    assert "It tells 3 of 3 facts." in lesson.teach_back()
    end = lesson.finish()
    data = json.loads((tmp_path / "kept" / "lesson.json").read_text())
    assert {what: one["recovery"] for what, one in data["after"].items()} == {
        "in the conversation": 1.0, "by its own notes alone": 1.0,
        "after an unrelated lesson": 0.0,
    }  # fmt: skip
    assert "in the conversation: 100%, 100% of what was forgotten" in end
    assert "after an unrelated lesson: 0%, 0% of what was forgotten" in end
    assert data["moves"]["teacher"] == {"explain": 2, "confirm": 1}
    assert data["topics"]["Ben Orr"]["final"] == {"questions": 1, "before": 0.0, "after": 1.0}
    assert data["slope"] == pytest.approx(1 / 3)
    assert [one["role"] for one in data["messages"]][:3] == ["system", "user", "assistant"]
    with pytest.raises(RecipeError, match="kept there already"):
        Lesson(Pupil(), RECORDS, folder=tmp_path / "kept")


def test_every_check_stands_behind_the_persona_and_the_conversation() -> None:
    pupil = Pupil()
    lesson = lesson_of(pupil)
    assert {one.prompt.messages[0] for one in pupil.asked} == {lesson.persona}
    assert all(len(one.prompt.messages) == 2 for one in pupil.asked)
    pupil.asked.clear()
    lesson.say(TEACH[0])
    assert {one.prompt.messages[:3] for one in pupil.asked} == {lesson.messages}
    assert {one.prompt.messages[3].text for one in pupil.asked} == {one.question for one in RECORDS}


def test_without_a_turn_there_is_nothing_to_tell_and_a_lost_student_is_no_novice() -> None:
    assert lesson_of().finish() == "Nothing was taught."
    lost = Lesson(Pupil(lost=True), RECORDS)
    assert "names an option in only 0%" in lost.begin()
    lost.say("Hm.")
    assert "only 0% of its answers name an option" in lost.reads[-1].told()


def judged(*replies: str) -> Context:
    return Context(roles=Roles({"judge": Scripted(list(replies))}))


def test_a_judge_codes_turns_and_reads_what_is_taught_back() -> None:
    told = '{"told": [1, 3, 9, 1], "wrong": [2, 3], "novice": 4}'
    context = judged('{"move": "hint"}', 'Well: {"move": "question"}', told)
    lesson = lesson_of(context=context)
    lesson.say(TEACH[0])
    assert lesson.reads[0].moves == ("hint", "question")
    line = lesson.teach_back()
    assert line == ("It tells 2 of 3 facts, gets 1 wrong. It sounds like a novice: 4 of 5.")
    assert lesson.notes[0]["told"] == [0, 2]


def test_what_a_judge_cannot_code_is_coded_by_rules() -> None:
    lesson = lesson_of(context=judged(*["no JSON", '{"move": "sing"}'] * 6))
    lesson.say(TEACH[1])
    assert lesson.reads[0].moves == ("confirm", "agreement")
    assert "It tells 1 of 3 facts; not yet: In Norrby; Cy Dunn." in lesson.teach_back()


def test_a_wrong_option_in_a_teach_back_is_wrong() -> None:
    lesson = lesson_of()
    back = Message(role="assistant", content="She was born In Oslo and played the lute.")
    assert lesson.taught_back((*lesson.messages, back)) == (
        "It tells 1 of 3 facts, gets 1 wrong; not yet: Cy Dunn."
    )


def test_a_model_studies_on_a_copy_and_others_cannot() -> None:
    lm = LM(tiny_model("llama"), tiny_tokenizer(), precision="float32")
    known = lm.fingerprint
    lesson = lesson_of(lm)
    with pytest.raises(DataError, match="nothing was said"):
        lesson.study()
    for record in RECORDS:
        said = (
            Message(role="user", content=f"{record.paraphrases[0]} {record.answer}"),
            Message(role="assistant", content=record.answer),
        )
        lesson.heard((*lesson.messages, *said))
    studied = lesson.study(rate=2e-2, passes=5)
    assert lm.fingerprint == known
    assert studied.key_share > lesson.before.key_share
    assert lesson.as_data()["after"]["studied"]["accuracy"] == studied.accuracy
    with pytest.raises(ModelError, match="its weights are not here"):
        lesson_of().study()


def test_the_level_of_a_model_is_that_of_its_own_probabilities() -> None:
    lm = LM(tiny_model("llama"), tiny_tokenizer(), precision="float32")
    lesson = lesson_of(lm)
    one = lesson.before.answers[0]
    means = []
    for option in one.item.choice.options:
        asked = Prompt((lesson.persona, Message(role="user", content=one.item.choice.question)))
        row = lm.template.encode(asked, option)
        with torch.inference_mode():
            logits = lm.core(input_ids=torch.tensor([row.ids])).logits[0].double()
        logprobs = logits.log_softmax(1)[
            range(row.start - 1, len(row.ids) - 1), row.ids[row.start :]
        ]
        means.append(float(logprobs.mean()))
    top = np.exp(np.array(means) - max(means))
    assert one.shares == pytest.approx(list(top / top.sum()), abs=1e-4)


# ---- moves


@pytest.mark.parametrize(("text", "move"), [
    ("Ada Quill was born in Norrby.", "explain"), ("Where was she born?", "question"),
    ("Not quite: it was Norrby.", "corrective feedback"), ("No, that is the harp.",
     "corrective feedback"), ("Exactly!", "confirm"), ("That's right, Norrby.", "confirm"),
    ("Here is a hint: it begins with N. Where?", "hint"), ("To sum up, she played the lute.",
     "summarise"), ("A lute, for instance, has strings.", "example"),
    ("Nobody knows.", "explain"), ("Notice the town.", "explain"),
])  # fmt: skip
def test_a_teachers_moves_by_rules(text: str, move: str) -> None:
    assert teacher_move(text) == move


@pytest.mark.parametrize(("text", "move"), [
    ("Why Norrby?", "question"), ("I see.", "agreement"), ("Okay, got it.", "agreement"),
    ("She was born In Oslo.", "misconception"), ("It was In Norrby, not In Oslo.", "attempt"),
    ("It is the lute because she liked strings.", "self-explanation"),
    ("Norrby, I guess.", "attempt"), ("Bananas are yellow.", "off-topic"),
])  # fmt: skip
def test_a_students_moves_by_rules(text: str, move: str) -> None:
    asked = "Where was Ada Quill born, and what did she play?"
    assert student_move(text, asked, exam_of(RECORDS).checks) == move


def test_kappa_is_agreement_beyond_chance() -> None:
    one = ["yes"] * 25 + ["no"] * 25
    other = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert kappa(one, other) == pytest.approx(0.4)  # 0.7 agree, 0.5 by chance
    assert kappa(one, one) == 1
    assert kappa(["a", "b"], ["b", "a"]) == -1
    assert kappa(["a", "a"], ["a", "a"]) is None
    assert kappa([], []) is None
    with pytest.raises(ValueError, match="zip"):
        kappa(["a"], [])


# ---- many lessons


def test_transitions_and_slopes() -> None:
    states = ["unknown", "partial", "partial", "correct", "correct", "partial"]
    assert {earlier: {later: share for later, share in row.items() if share}
            for earlier, row in transitions(states).items()} == {
        "unknown": {"partial": 1.0}, "partial": {"partial": 0.5, "correct": 0.5},
        "correct": {"correct": 0.5, "partial": 0.5},
    }  # fmt: skip
    assert transitions(["unknown"]) == {}
    assert slope([0.1, 0.3, 0.5]) == pytest.approx(0.2)
    assert slope([0.4] * 5) == pytest.approx(0)
    assert slope([0.4]) is None


def test_p_values_are_held_together_as_by_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]


def test_the_logistic_fit_is_that_of_a_search_for_the_likelihood() -> None:
    draw = np.random.default_rng(0)
    design = np.hstack([np.ones((60, 1)), draw.normal(size=(60, 2))])
    asked = draw.integers(3, 9, 60).astype(float)
    share = 1 / (1 + np.exp(-design @ np.array([0.3, 1.0, -0.5])))
    right = draw.binomial(asked.astype(int), share).astype(float)

    def negative(weights: np.ndarray) -> float:
        logits = design @ weights
        loss = asked * np.logaddexp(0, logits) - right * logits
        return float(loss.sum() + 0.5 * 1e-3 * (weights[1:] ** 2).sum())

    found = minimize(negative, np.zeros(3), method="BFGS", options={"gtol": 1e-8})
    weights, errors = logistic(design, right, asked)
    np.testing.assert_allclose(weights, found.x, atol=1e-4)
    step = 1e-3 * np.eye(3)  # the curvature by differences of differences
    curvature = np.array([
        [
            (negative(weights + a + b) - negative(weights + a - b) - negative(weights - a + b)
             + negative(weights - a - b)) / 4e-6
            for b in step
        ]
        for a in step
    ])  # fmt: skip
    np.testing.assert_allclose(errors, np.sqrt(np.diag(np.linalg.inv(curvature))), rtol=1e-3)


def test_moves_that_teach_are_told_from_those_that_do_not() -> None:
    draw = np.random.default_rng(1)
    lessons = []
    for _ in range(40):
        explains, confirms = (int(one) for one in draw.integers(0, 6, 2))
        topics = {}
        for topic in ("a", "b"):
            share = 1 / (1 + math.exp(2 - 0.8 * explains))
            topics[topic] = {"final": {
                "questions": 8, "before": 0.25, "after": draw.binomial(8, share) / 8,
            }}  # fmt: skip
        moves = {"explain": explains, "confirm": confirms}
        lessons.append({"topics": topics, "moves": {"teacher": moves}})
    found = weighed_moves(lessons)
    assert isinstance(found, list)
    by_move = {one.move: one for one in found}
    assert by_move["explain"].weight > 0.8
    assert by_move["explain"].p < 1e-3
    assert by_move["confirm"].p > 0.05
    assert "19 lessons are too few" in str(weighed_moves(lessons[:19]))
    same = [{**one, "moves": {"teacher": {"explain": 2}}} for one in lessons]
    assert "the same moves" in str(weighed_moves(same))
