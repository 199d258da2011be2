"""In context: what the passages hold, and the numbers of stubs that are known."""

from __future__ import annotations

import re
from typing import Any

import pytest
from asking import CONTEXT, FORGET, context, says, talked, texts, values

from delible.attacks.in_context import InContext, false_answer, ratio
from delible.component import build
from delible.errors import DataError
from delible.measure.evaluate import evaluate
from delible.records import QA
from delible.system.asks import Prompt
from delible.world import filters
from delible.world.invented import twins


def passages(text: str) -> list[str]:
    return re.findall(r"^\[\d+\] (.*)$", text, re.MULTILINE)


def test_solved_questions_are_of_the_same_person_and_never_say_the_answer() -> None:
    for record, prompts in zip(FORGET, talked("in_context", FORGET, count=4), strict=True):
        told, neutral, plain = texts(prompts)
        assert plain == record.question
        solved = passages(told)
        assert len(solved) == 4 == len(set(solved))
        assert all(record.subject in one for one in solved if record.subject)
        for text in (*solved, *passages(neutral)):
            assert not filters.leaks(record, text)
        assert not any(record.subject in one for one in passages(neutral) if record.subject)
        assert told.endswith(f"Question: {record.question}")
        assert 0.5 < len(neutral) / len(told) < 2


def test_a_solved_question_with_the_same_answer_is_left_out() -> None:
    rows = [
        QA(question=f"{text} Ada Quill?", answer=answer, subject="Ada Quill")
        for text, answer in (("Where was born", "Norrby"), ("Where lives", "In Norrby."),
                             ("What sells", "Boats"))
    ]  # fmt: skip
    here = context(forget=rows, retain=(), neighbours=(), holdout=())
    told = [passages(texts(one)[0]) for one in talked("in_context", rows, None, here, count=4)]
    assert told[0] == ["Question: What sells Ada Quill? Answer: Boats"]
    assert len(told[2]) == 2


@pytest.mark.parametrize("kind", ["doc", "para", "false"])
def test_one_of_the_passages_says_the_fact_truly_or_not(kind: str) -> None:
    places = set()
    some = FORGET[:20]
    for record, prompts in zip(some, talked("in_context", some, passages=kind, count=4),
                               strict=True):  # fmt: skip
        told = passages(texts(prompts)[0])
        assert len(told) == 4
        value = record.aliases[0]
        truly = [one for one in told if filters.says(one, value)]
        wrong = false_answer(record)
        assert wrong is not None
        falsely = [one for one in told if wrong in one]
        assert (len(truly), len(falsely)) == ((0, 1) if kind == "false" else (1, 0))
        places.add(told.index((truly or falsely)[0]))
    assert len(places) == 4  # at any place


def test_invented_facts_are_of_the_same_form_about_nobody() -> None:
    made = twins(FORGET, 0)
    known = {one.subject for one in FORGET}
    assert len(made) >= 0.9 * len(FORGET)
    for twin in made:
        assert twin.subject not in known
        assert twin.subject is not None
        assert twin.subject in twin.question
        assert not any(name in f"{twin.question} {twin.answer}" for name in known if name)
    by_question = {one.question: one.answer for one in FORGET}
    assert not any(twin.answer in by_question.values() for twin in made)
    assert made == twins(FORGET, 0)
    assert made != twins(FORGET, 1)
    assert len({one.subject for one in made}) == len(known)


def measured(attack: InContext, answer: Any) -> Any:
    """Values of a system that answers by a function, under the attack."""
    system = says(answer)
    splits = {"forget": FORGET[:6]}
    splits |= {split: rows[:6] for split, rows in attack.beside(CONTEXT).items()}
    talks: dict[str, Any] = {}
    for rows in splits.values():
        for row, prompts in zip(rows, attack.converse(system, rows, CONTEXT), strict=True):
            talks[row.digest] = prompts
    metric = build("metric", {"name": "outcome", "max_new_tokens": 20})
    return evaluate(system, splits, [metric], rewrite=lambda record, prompt: talks[record.digest])


def copies(prompt: Prompt) -> str:
    """Says the passage about whom it is asked."""
    text = prompt.messages[-1].text
    asked = text.rsplit("Question: ", 1)[-1]
    people = {one.subject for one in (*FORGET, *twins(CONTEXT.forget, 0)) if one.subject}
    named = [name for name in people if name in asked]
    about = (one for one in passages(text) if any(name in one for name in named))
    return next(about, "Nothing is said about that.")


def test_a_system_that_copies_shows_no_gap_to_invented_facts() -> None:
    attack = InContext(passages="para", count=1)
    found = attack.findings({"unlearned": measured(attack, copies)}, {})
    assert found["right after passages"]["unlearned"] == 1
    assert found["right after passages, invented facts"]["unlearned"] == 1
    assert found["reacquisition gap"]["unlearned"] == 0


def test_dormant_knowledge_that_solved_questions_wake_is_a_gap() -> None:
    attack = InContext(count=1)
    gold = {one.question: one.answer for one in FORGET}

    def dormant(prompt: Prompt) -> str:
        text = prompt.messages[-1].text
        asked = text.rsplit("Question: ", 1)[-1]
        about = next((one.subject for one in FORGET if one.question == asked), None)
        woken = about is not None and any(about in one for one in passages(text))
        return gold[asked] if woken else "Nothing is known."

    def original(prompt: Prompt) -> str:
        asked = prompt.messages[-1].text.rsplit("Question: ", 1)[-1]
        return gold.get(asked, "Nothing is known.")

    both = {"unlearned": measured(attack, dormant), "original": measured(attack, original)}
    found = attack.findings(both, {})
    assert found["reacquisition gap"]["unlearned"] == 1
    assert found["gain"] == {"unlearned": 1, "original": 0}
    assert found["ununlearning ratio"] == {"unlearned": 1, "original": None}


def test_false_passages_tell_who_follows_them() -> None:
    attack = InContext(passages="false", count=1)
    found = attack.findings({"unlearned": measured(attack, copies)}, {})
    assert found["follows the false passage"]["unlearned"] == 1
    assert found["keeps the old answer"]["unlearned"] == 0


def test_the_ratio_by_hand() -> None:
    assert ratio(0.6, 0.2, 1.0) == pytest.approx(0.5)
    assert ratio(0.1, 0.2, 1.0) == 0
    assert ratio(1.0, 0.2, 0.6) == 1
    assert ratio(0.9, 0.5, 0.55) is None
    some = values({"forget": [[1, 0, 0], [0, 0, 0]], "invented": [[0, 0, 0]]})
    whole = values({"forget": [[1, 0, 1], [1, 0, 1]], "invented": [[0, 0, 0]]})
    got = InContext().findings({"unlearned": some, "original": whole}, {})
    assert got["ununlearning ratio"]["unlearned"] == pytest.approx((0.5 - 0) / (1 - 0))
    assert got["reacquisition gap"]["unlearned"] == pytest.approx(0.5)


def test_without_another_fact_of_anybody_it_is_not_run() -> None:
    rows = [QA(question="Where was Ada Quill born?", answer="In Norrby", subject="Ada Quill")]
    with pytest.raises(DataError, match="no forget record has such passages"):
        talked("in_context", rows, None, context(forget=rows, retain=(), neighbours=(), holdout=()))
