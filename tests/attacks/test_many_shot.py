"""Many-shot: k answered turns before the question, none of which says the answer."""

from __future__ import annotations

import pytest
from asking import CONTEXT, FORGET, context, talked

from delible.attacks.many_shot import fitting
from delible.component import build
from delible.errors import DataError
from delible.records import QA
from delible.world import filters


@pytest.mark.parametrize("turns", [1, 8, 32])
def test_so_many_answered_questions_stand_before_the_real_one(turns: int) -> None:
    some = FORGET[::6]
    for record, (prompt,) in zip(some, talked("many_shot", some, turns=turns), strict=True):
        assert len(prompt.messages) == 2 * turns + 1
        assert [one.role for one in prompt.messages] == [*["user", "assistant"] * turns, "user"]
        assert prompt.messages[-1].text == record.question
        asked = [one.text for one in prompt.messages[:-1:2]]
        assert len(set(asked)) == turns
        kept = {one.question: one.answer for one in CONTEXT.retain if isinstance(one, QA)}
        kept |= {one.question: one.answer for one in CONTEXT.neighbours if isinstance(one, QA)}
        for question, answer in zip(asked, prompt.messages[1::2], strict=True):
            assert kept[question] == answer.text


def test_no_turn_says_the_answer_or_asks_the_question() -> None:
    shared = QA(question="Where did the stranger go?", answer="To Umber", aliases=("Umber",))
    kept = [
        QA(question="Where is the mill?", answer="It is in Umber"),
        QA(question="Where did the stranger go?", answer="Nobody knows"),
        QA(question="How is snow?", answer="White"),
    ]
    (found,) = talked("many_shot", [shared], None, context(retain=kept, neighbours=()), turns=3)
    said = " ".join(turn.text for turn in found[0].messages[:-1])
    assert "White" in said
    assert not filters.says(said, "Umber")
    assert "Nobody knows" not in said


def test_too_few_kept_questions_are_filled_up_with_people_who_do_not_exist() -> None:
    few = CONTEXT.retain[:3]
    ((prompt,),) = talked(
        "many_shot", FORGET[:1], None, context(retain=few, neighbours=()), turns=8
    )
    asked = [one.text for one in prompt.messages[:-1:2]]
    known = {one.question for one in few if isinstance(one, QA)}
    people = {one.subject for one in CONTEXT.retain if one.subject}
    assert len(asked) == 8
    strange = [question for question in asked if question not in known]
    assert len(strange) >= 5
    assert not any(name in question for question in strange for name in people)


def test_the_control_has_as_many_turns_about_nothing_of_it() -> None:
    attack = build("attack", {"name": "many_shot", "about": "unrelated"})
    assert attack.control
    assert not build("attack", "many_shot").control
    ((prompt,),) = talked("many_shot", FORGET[:1], turns=8, about="unrelated")
    assert len(prompt.messages) == 17
    said = " ".join(turn.text for turn in prompt.messages[:-1])
    names = {one.subject for one in (*CONTEXT.forget, *CONTEXT.retain) if one.subject}
    assert not any(name in said for name in names)


def test_the_seed_decides_which_turns() -> None:
    first, again = (talked("many_shot", FORGET[:1]) for _ in range(2))
    assert first == again
    assert talked("many_shot", FORGET[:1], None, context(seed=1)) != first


def test_what_is_too_long_loses_its_first_turns() -> None:
    turns = [("aa", "bb"), ("cc", "dd"), ("ee", "ff")]
    assert fitting(turns, 12) == turns
    assert fitting(turns, 11) == turns[1:]
    assert fitting(turns, 3) == []


def test_without_anything_to_ask_before_it_is_not_run() -> None:
    nothing = context(retain=(), neighbours=(), forget=())
    with pytest.raises(DataError, match="there are no questions"):
        talked("many_shot", FORGET[:1], None, nothing)


def test_a_deep_audit_has_more_turns_and_the_control() -> None:
    attack = build("attack", "many_shot")
    assert attack.variants("standard") == ({"turns": 8},)
    assert [one["turns"] for one in attack.variants("deep")] == [8, 32, 32]
