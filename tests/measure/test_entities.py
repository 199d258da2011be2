"""Which tokens of an answer are its fact, for tokens of a byte and for longer ones."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from delible.errors import DataError
from delible.lm.lm import LM
from delible.measure.entities import Entity, entities_of, entity_of
from delible.records import QA, Choice, Dialogue, Message, Passage, RecordBase
from delible.testing.tiny import tiny_model, tiny_tokenizer


@cache
def tiny(**changes: Any) -> LM:
    return LM(tiny_model("llama"), tiny_tokenizer(), precision="float32")


def said(record: RecordBase, most: int = 99) -> str:
    lm = tiny()
    found = entity_of(lm, record, most)
    assert isinstance(found, Entity)
    return str(lm.tokenizer.decode(found.tokens))


def record(answer: str, *aliases: str) -> QA:
    return QA(question="Where?", answer=answer, aliases=aliases)


@pytest.mark.parametrize(
    ("answer", "aliases", "fact"),
    [
        ("She was born in Norrby.", ("Norrby",), "Norrby"),
        ("She was born in Norrby.", ("norrby", "born in NORRBY"), "born in Norrby"),
        ("She was born in Norrby.", ("Nor", "orrby"), "She was born in Norrby."),
        ("Norrby", (), "Norrby"),
        ("In Zürich, ja.", ("Zürich",), "Zürich"),
        ("Am 3. Mai", ("3",), "3"),
        ("A (small) one.", ("(small)",), "(small)"),
    ],
)
def test_the_fact_is_the_longest_alias_in_the_answer(
    answer: str, aliases: tuple[str, ...], fact: str
) -> None:
    assert said(record(answer, *aliases)) == fact


def test_the_span_predicts_the_fact() -> None:
    found = entity_of(tiny(), record("In Norrby.", "Norrby"), 99)
    assert isinstance(found, Entity)
    assert found.row.start == found.first - len("In ")
    assert (found.span.start, found.span.end) == (found.first - 1, found.end - 1)
    assert found.end - found.first == len("Norrby")
    assert said(record("In Norrby.", "Norrby"), 3) == "Nor"


class Pieces:
    """A tokenizer of words with the space before them; it loses a text's first space."""

    words = ("She", " was", " born", " in", " Nor", "rby", ".", " Norrby")

    def decode(self, ids: tuple[int, ...], **options: Any) -> str:
        return "".join(self.words[one] for one in ids).removeprefix(" ")


@pytest.mark.parametrize(
    ("ids", "fact"),
    [((0, 1, 2, 3, 4, 5, 6), (4, 5)), ((3, 7, 6), (7,)), ((7, 6), (7,)), ((4, 5), (4, 5))],
)
def test_tokens_that_touch_the_fact_are_its_own(
    ids: tuple[int, ...], fact: tuple[int, ...]
) -> None:
    from delible.lm.template import Encoded
    from delible.measure.entities import _tokens_of

    tokenizer = Pieces()
    answer = tokenizer.decode(ids)
    at = answer.index("Norrby")
    row = Encoded((1, 1, *ids, 6), 2, True)
    start, end = _tokens_of(tokenizer, row, 2 + len(ids), answer, at, at + len("Norrby"))
    assert row.ids[start:end] == fact


def test_other_kinds_of_records() -> None:
    assert said(Passage(text="Bread rises.")) == "Bread rises."
    assert said(Choice(question="Which?", options=("a", "b"), correct=1)) == "B"
    asked, answered = (
        Message(role="user", content="Hm?"), Message(role="assistant", content="In Rome")
    )  # fmt: skip
    assert said(Dialogue(messages=(asked, answered))) == "In Rome"
    reason = entity_of(tiny(), Dialogue(messages=(asked,)), 9)
    assert isinstance(reason, str)
    assert "no question" in reason
    long = entity_of(tiny(), record("x" * 600), 9)
    assert isinstance(long, str)
    assert "longer than" in long


def test_reasons_stand_where_there_is_no_fact() -> None:
    records = [record("x" * 600), record("In Norrby.", "Norrby"), record("y" * 600)]
    places, entities, items = entities_of(tiny(), records, 9, "here")
    assert places == [1]
    assert len(entities) == 1
    assert [item.reason is None for item in items] == [False, True, False]
    with pytest.raises(DataError, match="longer than"):
        entities_of(tiny(), records[:1], 9, "here")
