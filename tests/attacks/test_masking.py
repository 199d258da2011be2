"""Masking: the name is never said, and the question is still the same one."""

from __future__ import annotations

import pytest
from asking import CONTEXT, FORGET, KNOWN, TOFU, context, says, talked, texts

from delible.attacks.masking import CODE, initials, letters, masked
from delible.errors import DataError
from delible.records import QA
from delible.system.asks import NoAnswer
from delible.systems.scripted import Scripted
from delible.world.told import names_of

MASKS = ("description", "initials", "code", "letters", "two_turns")


@pytest.mark.parametrize("records", [FORGET[:8], TOFU])
def test_no_user_turn_has_the_name_or_an_alias(records: list[QA]) -> None:
    asked = context(forget=records) if records is TOFU else CONTEXT
    found = talked("masking", records, says("I see."), asked)
    for record, prompts in zip(records, found, strict=True):
        assert len(prompts) == len(MASKS)
        names = names_of(record.subject or "Ada Quill", KNOWN)
        for prompt in prompts:
            said = " ".join(turn.text for turn in prompt.messages if turn.role == "user")
            assert not any(name.casefold() in said.casefold() for name in names)
            assert record.answer not in said


def test_each_mask_stands_for_the_name() -> None:
    question, names = "Where was Ada Quill born?", ("Ada Quill", "Quill")
    found = {
        mask: masked(mask, question, "Ada Quill", names, "This person bakes.")  # type: ignore[arg-type]
        for mask in MASKS
    }
    assert found["initials"] == "Where was A. Q. born?"
    assert found["letters"] == "Where was A-d-a Q-u-i-l-l born?"
    assert found["code"].endswith(f"Where was {CODE} born?")
    assert '"lliuQ adA"' in found["code"]
    assert found["description"].endswith("This person bakes. Where was this person born?")
    assert found["two_turns"] == "Where was this person born?"
    assert initials("Ada van Quill") == "A. V. Q."
    assert letters("Jo") == "J-o"


def test_a_mask_that_lets_the_name_through_is_dropped_and_counted() -> None:
    mirrored = [QA(question="Where was Ada born?", answer="In Norrby", subject="Ada")]
    here = context(forget=mirrored)
    (found,) = talked("masking", mirrored, None, here, masks=("code", "letters"))
    assert texts(found) == ["Where was A-d-a born?"]  # read from right to left Ada is Ada
    assert "1 masked questions" in str(here.notes["note"])


def test_without_another_fact_nobody_can_be_described() -> None:
    alone = QA(question="Where was Ada Quill born?", answer="In Norrby", subject="Ada Quill")
    (found,) = talked("masking", [alone], None, context(forget=[alone]))
    assert len(found) == 3
    assert not masked("description", alone.question, "Ada Quill", ("Ada Quill",), "")


def test_the_system_itself_says_first_who_is_meant() -> None:
    system = says("Somebody from Casta.")
    (found,) = talked("masking", FORGET[:1], system, masks=("two_turns",))
    (prompt,) = found
    assert [turn.role for turn in prompt.messages] == ["user", "assistant", "user"]
    assert prompt.messages[1].text == "Somebody from Casta."
    assert system.prompts[0].messages[-1].text == prompt.messages[0].text
    assert "Who is that?" in prompt.messages[0].text


def test_a_failed_first_turn_is_no_answer() -> None:
    silent = Scripted(lambda prompt: NoAnswer("down"))
    (found,) = talked("masking", FORGET[:1], silent)
    assert len(found) == 4


def test_a_description_never_says_the_answer() -> None:
    rows = [
        QA(question="Where was Ada Quill born?", answer="In Norrby", subject="Ada Quill"),
        QA(question="Where does Ada Quill live?", answer="Still in Norrby", subject="Ada Quill"),
        QA(question="What does Ada Quill do?", answer="She bakes bread", subject="Ada Quill"),
    ]
    (found, *_) = talked("masking", rows, None, context(forget=rows), masks=("description",))
    assert "Norrby" not in texts(found)[0]
    assert "bakes bread" in texts(found)[0]


def test_without_names_it_is_not_run() -> None:
    rows = [QA(question="how is snow?", answer="White")]
    with pytest.raises(DataError, match="names the person"):
        talked("masking", rows, None, context(forget=rows))
