"""A chat template that refuses a conversation: the error names file, row and what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import delible
from delible.component import build
from delible.errors import DataError, ModelError
from delible.lm.lm import LM
from delible.loaders import build_request
from delible.loaders.mapping import read_located
from delible.measure.evaluate import evaluate
from delible.records import QA, Dialogue, ForgetRequest, Message, Passage
from delible.testing.tiny import CHAT_TEMPLATE, tiny_model, tiny_tokenizer
from delible.train.rows import make_rows, refusal_rows

#: As Gemma has it.
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
)
ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/...') }}"
    "{% endif %}{% endfor %}"
)
NO_SECRETS = (
    "{% for m in messages %}{% if 'secret' in m['content'] %}"
    "{{ raise_exception('No secrets') }}{% endif %}{% endfor %}"
)
WITH_SYSTEM = {"messages": [
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Ada."},
]}  # fmt: skip
TWICE = {"messages": [
    {"role": "user", "content": "Hello?"}, {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Ada."},
]}  # fmt: skip
PLAIN = {"question": "Where?", "answer": "Here."}
SYSTEM_SAID = "the chat template refuses the conversation: System role not supported."


def speaker(refusal: str) -> LM:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = refusal + CHAT_TEMPLATE
    return LM(tiny_model(), tokenizer, precision="float32")


def written(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


def told(call: Callable[[], Any], kind: type[delible.DelibleError] = ModelError) -> Any:
    with pytest.raises(kind) as caught:
        call()
    return caught.value


def dialogue(content: dict[str, Any]) -> Dialogue:
    return Dialogue(messages=tuple(Message(**turn) for turn in content["messages"]))


# ---- what to do


@pytest.mark.parametrize(
    ("refusal", "content", "advice"),
    [
        (NO_SYSTEM, WITH_SYSTEM, "put that text into the first user turn"),
        (ALTERNATING, TWICE, "Roles must alternate"),
        (ALTERNATING, WITH_SYSTEM, "It takes no system turn"),
        (NO_SECRETS, {"messages": [
            {"role": "user", "content": "Any secret?"}, {"role": "assistant", "content": "No."},
        ]}, "Change its turns"),
        (ALTERNATING, {"messages": [
            {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Who?"},
            {"role": "assistant", "content": "Ada."},
        ]}, "must begin with a user turn"),
        (ALTERNATING, {"messages": [
            {"role": "system", "content": "Be brief."}, *TWICE["messages"],
        ]}, "Roles must alternate"),
    ],
)  # fmt: skip
def test_the_advice_fits_the_conversation(
    refusal: str, content: dict[str, Any], advice: str
) -> None:
    template = speaker(refusal).template
    error = told(lambda: make_rows(template, [dialogue(content)]))
    assert "the chat template refuses the conversation: " in error.problem
    assert error.problem.endswith(".")
    assert error.problem.endswith("...") or not error.problem.endswith("..")
    assert advice in error.hint


# ---- which row


def test_a_run_names_the_file_and_the_line_before_it_works(tmp_path: Path) -> None:
    forget = written(tmp_path / "forget.jsonl", PLAIN, {"question": "When?", "answer": "Now."})
    retain = written(tmp_path / "keep.jsonl", {"question": "Why?", "answer": "So."}, WITH_SYSTEM)
    request = build_request(forget=forget, retain=retain)
    lm = speaker(NO_SYSTEM)
    for measured in (True, False):  # by the measurement before training, and by training itself
        error = told(
            lambda measured=measured: delible.unlearn(
                lm, request, method="npo", shown=0, measured=measured
            )
        )
        assert error.where == f"{retain}:2"
        assert error.problem == SYSTEM_SAID


def test_records_without_a_file_are_named_by_their_role_and_number() -> None:
    lm = speaker(NO_SYSTEM)
    rows = [QA(**PLAIN), dialogue(WITH_SYSTEM)]
    forgetting = ForgetRequest(forget=rows, retain=[QA(question="Why?", answer="So.")])
    error = told(
        lambda: delible.unlearn(lm, forgetting, method="graddiff", shown=0, measured=False)
    )
    assert error.where == "forget record 2"
    keeping = ForgetRequest(forget=rows[:1], retain=[*forgetting.retain, rows[1]])
    error = told(lambda: delible.unlearn(lm, keeping, method="graddiff", shown=0, measured=False))
    assert error.where == "retain record 2"


def test_a_measurement_names_the_row_too() -> None:
    lm, metrics = speaker(ALTERNATING), [build("metric", "answer_probability")]
    alone = Dialogue(messages=(Message(role="user", content="Hello?"), *_answered("Me.")))
    splits = {"forget": [QA(**PLAIN), alone], "retain": [alone, QA(**PLAIN), dialogue(TWICE)]}
    error = told(lambda: evaluate(lm, splits, metrics))
    # another record's prompt is the beginning of this one
    assert error.where == "retain record 3"
    assert "Roles must alternate" in error.hint


def _answered(text: str) -> tuple[Message, ...]:
    return (Message(role="assistant", content=text),)


def test_what_cannot_be_refused_names_its_line(tmp_path: Path) -> None:
    import torch

    path = written(tmp_path / "forget.jsonl", PLAIN, {"text": "A passage."})
    records = [found.record for found in read_located(path)]
    template = speaker(NO_SYSTEM).template
    generator = torch.Generator().manual_seed(0)
    error = told(lambda: refusal_rows(template, records, ["No."], generator), DataError)
    assert error.where == f"{path}:2"


# ---- a record's place is no part of it


def test_a_place_changes_nothing_else(tmp_path: Path) -> None:
    path = written(tmp_path / "forget.jsonl", PLAIN, {"text": "A passage."}, WITH_SYSTEM)
    request = build_request(forget=path)
    made = (QA(**PLAIN), Passage(text="A passage."), dialogue(WITH_SYSTEM))
    assert [record.where for record in request.forget] == [f"{path}:{n}" for n in (1, 2, 3)]
    assert [record.where for record in made] == ["", "", ""]
    for read, own in zip(request.forget, made, strict=True):
        assert read == own
        assert hash(read) == hash(own)
        assert read.digest == own.digest
        assert read.model_dump() == own.model_dump()
    assert request.id == ForgetRequest(forget=made).id
    assert "where" not in request.model_dump_json()
    assert request.forget[1].model_copy(update={"text": "A piece."}).where == f"{path}:2"


def test_records_of_the_caller_are_left_as_they_are() -> None:
    own = QA(**PLAIN)
    (found,) = read_located([own], name="forget")
    assert found.record is own
    assert own.where == ""
