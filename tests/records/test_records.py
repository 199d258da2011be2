"""Records as data: every list of records is the same after writing and reading."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from delible.loaders import read_records, write_records
from delible.records import QA, Choice, Dialogue, Message, Passage, Record, digest, to_json_line

# Half a surrogate pair is no character and cannot be written as UTF-8.
CHARACTERS = st.characters(exclude_categories=["Cs"])
ANY_TEXT = st.text(CHARACTERS, max_size=30)
TEXTS = ANY_TEXT.filter(lambda text: bool(text.strip()))
LISTS = st.lists(TEXTS, max_size=3).map(tuple)
ABOUT: dict[str, Any] = {"subject": st.none() | ANY_TEXT, "group": st.none() | ANY_TEXT}


@st.composite
def choices(draw: st.DrawFn) -> Choice:
    options = draw(st.lists(TEXTS, min_size=2, max_size=5).map(tuple))
    correct = draw(st.integers(0, len(options) - 1))
    about = {name: draw(values) for name, values in ABOUT.items()}
    return Choice(question=draw(TEXTS), options=options, correct=correct, **about)


@st.composite
def dialogues(draw: st.DrawFn) -> Dialogue:
    roles = st.sampled_from(["system", "user", "assistant"])
    messages = draw(st.lists(st.builds(Message, role=roles, content=TEXTS), max_size=4))
    last = Message(role="assistant", content=draw(TEXTS))
    return Dialogue(messages=(*messages, last), **{n: draw(values) for n, values in ABOUT.items()})


RECORDS = st.one_of(
    st.builds(
        QA, question=TEXTS, answer=TEXTS, aliases=LISTS, paraphrases=LISTS,
        paraphrased_answers=LISTS, perturbed=LISTS, **ABOUT,
    ),
    st.builds(Passage, text=TEXTS, **ABOUT),
    choices(),
    dialogues(),
)  # fmt: skip


@settings(deadline=None, max_examples=30)
@given(st.lists(RECORDS, min_size=1, max_size=5), st.sampled_from(["jsonl", "json", "jsonl.gz"]))
def test_written_and_read_back_is_equal(records: list[Record], ending: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"records.{ending}"
        write_records(records, path)
        again = read_records(path)
    assert again == records
    assert digest(again) == digest(records)


def test_a_json_line_names_its_type_and_leaves_out_defaults() -> None:
    line = to_json_line(QA(question=" Who? ", answer="Ada.\u2028", perturbed=("Eve.",)))
    assert line == '{"type": "qa", "question": "Who?", "answer": "Ada.", "perturbed": ["Eve."]}'
    assert json.loads(to_json_line(Passage(text="é"))) == {"type": "passage", "text": "é"}


def test_digest_depends_on_content_and_order() -> None:
    one, two = Passage(text="one"), Passage(text="two")
    assert digest([one, two]) != digest([two, one])
    assert one.digest == Passage(text=" one ").digest != two.digest
    assert Passage(text="one", subject="S").digest != one.digest


def test_records_are_frozen_and_strict() -> None:
    record = QA(question="Q", answer="A")
    with pytest.raises(ValidationError, match="frozen"):
        record.answer = "B"
    with pytest.raises(ValidationError, match="extra"):
        QA(question="Q", answer="A", anser="B")  # type: ignore[call-arg]
    with pytest.raises(ValidationError, match="at least 1 character"):
        QA(question="Q", answer=" \n")


def test_the_right_option_of_a_choice_exists() -> None:
    assert Choice(question="Q", options=("a", "b"), correct=1).correct == 1
    with pytest.raises(ValidationError, match="is 2, out of range: there are 2 options"):
        Choice(question="Q", options=("a", "b"), correct=2)
    with pytest.raises(ValidationError, match="at most 26"):
        Choice(question="Q", options=tuple(f"option {n}" for n in range(27)), correct=0)
