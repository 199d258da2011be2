"""How records are asked, and what counts as their answer."""

from __future__ import annotations

import pytest

from delible import finishing
from delible.errors import DataError
from delible.lm.lm import LM
from delible.records import QA, Choice, Dialogue, ForgetRequest, Message, Passage, RecordBase
from delible.system.questions import answer_of, ask, has_answer
from delible.testing.tiny import tiny_model, tiny_tokenizer
from delible.train.rows import make_rows

USER, ASSISTANT = Message(role="user", content="Who?"), Message(role="assistant", content="Ada.")
WAITING = Dialogue(messages=(USER, ASSISTANT, Message(role="user", content="Sure?")))


@pytest.mark.parametrize(
    ("record", "answer"),
    [
        (QA(question="Who?", answer="Ada."), "Ada."),
        (Passage(text="Ada was here."), "Ada was here."),
        (Choice(question="Who?", options=("Bo", "Ada"), correct=1), "B"),
        (Dialogue(messages=(USER, ASSISTANT)), "Ada."),
    ],
)
def test_the_answer_of_each_kind(record: RecordBase, answer: str) -> None:
    assert has_answer(record)
    assert answer_of(record) == answer
    prompt = ask(record)
    assert prompt is not None
    assert answer not in [turn.content for turn in prompt.messages]


@pytest.mark.parametrize(
    "record",
    [
        WAITING,
        Dialogue(messages=(USER,)),
        Dialogue(messages=(USER, ASSISTANT, Message(role="system", content="Be kind."))),
    ],
)
def test_what_is_not_said_by_the_assistant_is_no_answer(record: Dialogue) -> None:
    assert not has_answer(record)
    with pytest.raises(DataError, match="does not end with an assistant turn") as caught:
        answer_of(record)
    assert caught.value.hint is not None


def test_rows_say_which_record_has_no_answer() -> None:

    template = LM(tiny_model("llama"), tiny_tokenizer(), precision="float32").template
    with pytest.raises(DataError, match="does not end with an assistant turn") as caught:
        make_rows(template, [QA(question="Who?", answer="Ada."), WAITING])
    assert caught.value.where == "record 2"


def test_a_record_without_an_answer_is_not_shown_among_the_examples() -> None:
    request = ForgetRequest(forget=(WAITING, Dialogue(messages=(USER, ASSISTANT))))
    shown = finishing.asked(request, 2)
    assert [record for _, record, _ in shown] == [request.forget[1]]
