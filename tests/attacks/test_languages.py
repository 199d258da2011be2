"""Other languages: a world's own templates, and translations that mean the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from asking import CONTEXT, FORGET, TOFU, context, played, says, talked, texts

from delible.attacks import languages as module
from delible.attacks.languages import Languages, checked
from delible.component import build
from delible.errors import DataError
from delible.records import QA
from delible.system.asks import Prompt
from delible.system.role import Role
from delible.world import relations
from delible.world.languages import ENGLISH_WORDS, LANGUAGES, fact_in, question_in, templates


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_relation_has_a_question_and_an_answer_of_its_own(language: str) -> None:
    known = templates()[language]
    assert list(known) == list(relations())
    assert all(row["question"].count("{name}") == 1 for row in known.values())
    assert all("{value}" not in row["question"] for row in known.values())
    assert all(row["answer"].count("{value}") == 1 for row in known.values())
    assert all("{name}" not in row["answer"] for row in known.values())
    for part in ("question", "answer"):
        assert len({row[part] for row in known.values()}) == len(known)


def test_no_template_stands_in_two_languages() -> None:
    every = [row["question"] for rows in templates().values() for row in rows.values()]
    assert len(set(every)) == len(every) == 3 * len(relations())
    assert not {one.question for one in relations().values()} & set(every)


def test_a_fact_keeps_its_value() -> None:
    (birth,) = [one for one in FORGET[:17] if one.group == "birthplace"][:1]
    made = fact_in(birth, "de")
    assert made is not None
    assert made.question == f"Wo wurde {birth.subject} geboren?"
    assert made.answer == f"In der Stadt {birth.aliases[0]}"
    assert made.aliases[0] == birth.aliases[0]
    hobby = next(one for one in FORGET if one.group == "hobby")
    assert relations()["hobby"].kind in ENGLISH_WORDS
    assert fact_in(hobby, "de") is None
    assert question_in(hobby, "de") == f"Was ist das liebste Hobby von {hobby.subject}?"
    assert question_in(TOFU[0], "de") is None


@pytest.mark.parametrize("language", LANGUAGES)
def test_questions_ask_for_an_answer_in_english(language: Any) -> None:
    for record, prompts in zip(FORGET, talked("languages", FORGET, language=language), strict=True):
        (text,) = texts(prompts)
        question = question_in(record, language)
        assert question is not None
        assert text.startswith(question)
        assert len(text) > len(question)
        assert record.aliases[0] not in text


def test_answers_in_the_language_are_facts_of_their_own() -> None:
    attack = Languages(language="fr", answers="own")
    rows = attack.held_out(CONTEXT)
    assert 0 < len(rows) < len(FORGET)
    for row, prompts in zip(rows, talked("languages", rows, language="fr", answers="own"),
                            strict=True):  # fmt: skip
        assert isinstance(row, QA)
        assert texts(prompts) == [row.question]
    beside = attack.beside(CONTEXT)
    forgotten = {one.subject for one in FORGET}
    assert not {one.subject for one in beside["retain"]} & forgotten
    assert {one.subject for one in beside["holdout"]} == {one.subject for one in CONTEXT.holdout}
    with pytest.raises(DataError, match="answered in French"):
        attack.held_out(context(forget=TOFU))


class Letters:
    """An encoder that counts letters: the same words in any order are the same."""

    identity = "letters"

    def encode(self, given: Sequence[str]) -> Any:
        counted = np.array(
            [[text.casefold().count(letter) for letter in "abcdefghijklmnopqrstuvwxyz"]
             for text in given], np.float32,
        )  # fmt: skip
        return counted / np.linalg.norm(counted, axis=1, keepdims=True)


def translator(back: str) -> Role:
    """Writes backwards into a language, and says one thing when it translates back."""

    def reply(prompt: Prompt) -> str:
        text = prompt.messages[-1].text
        said = text.rsplit("Text: ", 1)[1].strip()
        return json.dumps({"text": back if "into English" in text else said[::-1]})

    return Role("translator", says(reply))


def test_a_translation_that_comes_back_otherwise_is_not_used() -> None:
    same = checked(["Where is Ada?"], translator("Where is Ada?"), "German", Letters(), 0.8)
    assert same == ["?adA si erehW"]
    other = checked(["Where is Ada?"], translator("Buy milk now"), "German", Letters(), 0.8)
    assert other == [None]
    mute = Role("translator", says("no JSON"))
    assert checked(["Where is Ada?"], mute, "German", Letters(), 0.8) == [None]


def test_other_questions_are_translated_by_the_translator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "sentence_encoder", Letters)
    here = context(forget=TOFU, roles=played(translator=translator(TOFU[0].question)))
    found = talked("languages", TOFU, None, here)
    assert texts(found[0])[0].startswith(TOFU[0].question[::-1])
    assert found[1] == ()  # came back as another question
    assert "2 of 3 questions" in str(here.notes["note"])


def test_without_translator_other_questions_are_not_asked() -> None:
    with pytest.raises(DataError, match="nobody translates"):
        talked("languages", TOFU, None, context(forget=TOFU))


def test_a_deep_audit_asks_in_every_language() -> None:
    settings = build("attack", "languages").variants("deep")
    assert [one["language"] for one in settings] == ["de", "fr", "es"] * 2
    assert len(build("attack", "languages").variants("standard")) == 1
