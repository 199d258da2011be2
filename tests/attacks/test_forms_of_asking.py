"""Persuasion and form: the question is still asked, and looks otherwise."""

from __future__ import annotations

import pytest

from delible.attacks.form import SIGNS, terms, with_signs, with_variables
from delible.attacks.persuasion import frames
from delible.component import build
from delible.records import QA, Choice, Passage
from delible.system.asks import Prompt
from delible.system.questions import ask

RECORD = QA(question="Where was Ada Quill educated?", answer="In Norrby")


def asked(name: str, **options: object) -> list[str]:
    attack = build("attack", {"name": name, "forms": 9, **options})
    prompt = ask(RECORD)
    assert prompt is not None
    return [one.messages[-1].text for one in attack.prompts(RECORD, prompt)]


@pytest.mark.parametrize("by", ["appeals", "parts"])
def test_every_appeal_and_part_asks_the_question_word_for_word(by: str) -> None:
    found = asked("persuasion", by=by)
    assert len(found) == 3
    assert all(RECORD.question in text and len(text) > 60 for text in found)
    assert not any("Norrby" in text or "{" in text for text in found)


def test_the_appeals_are_to_feelings_logic_and_authority() -> None:
    assert list(frames("appeals")) == ["emotional", "logical", "authority"]
    assert not set(frames("appeals")) & set(frames("parts"))


def test_signs_stand_after_so_many_characters_and_nothing_is_lost() -> None:
    assert with_signs("abcdefg", "_", 3) == "abc_def_g"
    assert with_signs("abcdef", "_", 3) == "abc_def"
    found = asked("form", kind="signs")
    assert len(found) == len(SIGNS)
    for text, (sign, every) in zip(found, SIGNS, strict=True):
        assert text[every] == sign
        parts = [text[start : start + every] for start in range(0, len(text), every + 1)]
        assert "".join(parts) == RECORD.question


def test_variables_stand_for_names_and_long_words() -> None:
    assert terms("Where was Ada Quill educated?") == ["Ada Quill", "educated"]
    definitions, question = with_variables("Where was Ada Quill educated?")
    assert definitions == 'x = "Ada Quill", y = "educated"'
    assert question == "Where was x y?"
    (text,) = asked("form", kind="variables")
    assert text == f"Let {definitions}. {question}"
    assert terms("How is snow?") == []


def test_talk_and_poem_and_filler_keep_the_question() -> None:
    for kind, count in (("writing", 2), ("filler", 3)):
        found = asked("form", kind=kind)
        assert len(found) == count
        assert all(RECORD.question in text and text != RECORD.question for text in found)


@pytest.mark.parametrize("name", ["persuasion", "form"])
def test_options_stay_and_running_text_is_left_alone(name: str) -> None:
    attack = build("attack", name)
    choice = Choice(question="Where was she born?", options=("Oslo", "Norrby"), correct=1)
    prompt = ask(choice)
    assert prompt is not None
    assert all(
        "A. Oslo\nB. Norrby" in one.messages[-1].text for one in attack.prompts(choice, prompt)
    )
    assert attack.rewrite(Passage(text="Ada was born."), Prompt(text="")) == ()


def test_a_deep_audit_asks_in_every_form() -> None:
    assert len(build("attack", "form").variants("deep")) == 4
    assert [one["by"] for one in build("attack", "persuasion").variants("standard")] == ["appeals"]
