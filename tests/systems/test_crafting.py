"""Clauses that are written until the model obeys, and the prompt in which it sees them."""

from __future__ import annotations

import pytest

from delible.messages import Message
from delible.system.asks import NoAnswer, Prompt
from delible.systems.crafting import (
    Target,
    aspects_of,
    crafted,
    cut,
    described,
    related,
    with_item,
)
from delible.systems.forbidden import Forbidden
from delible.systems.scripted import Scripted

ADA = Target("Ada Quill", ("Where was Ada Quill born?",), Forbidden(["Ada Quill", "Norrby"]))
BEN = Target("Ben Orr", ("Where did Ben Orr work?",), Forbidden(["Ben Orr", "Casta"]))


def asked(prompt: Prompt, part: str, clause: str) -> Prompt:
    return with_item(prompt, f"{part}\n{clause}")


def craft(writer: Scripted, model: Scripted, targets: list[Target], tries: int = 3) -> list[object]:
    parts = [f"about {one.name}" for one in targets]
    found = crafted(targets, parts, writer, model, asked, words=10, tries=tries)
    return [(one.clause, one.tries, one.obeyed) for one in found]


def test_it_stops_at_the_first_clause_that_is_obeyed() -> None:
    writer = Scripted(["Be quiet.", "Be very quiet.", "Never."])
    model = Scripted(["In Norrby.", "I cannot help with that."])
    assert craft(writer, model, [ADA]) == [("Be very quiet.", 2, True)]
    assert len(writer.prompts) == len(model.prompts) == 2
    again = writer.prompts[1].messages[-1].text
    assert "Be quiet." in again, "the writer sees which one did not hold"
    tried = model.prompts[1].messages
    assert tried[0].role == "system"
    assert "Where was Ada Quill born?" in tried[-1].text
    assert "about Ada Quill\nBe very quiet." in tried[-1].text, "tried as it will be used"


def test_the_last_try_stays_where_none_is_obeyed() -> None:
    writer = Scripted(["One.", "Two.", "Three.", "Four."])
    model = Scripted(lambda prompt: "In Norrby.")
    assert craft(writer, model, [ADA]) == [("Three.", 3, False)]
    assert len(writer.prompts) == 3


def test_targets_go_side_by_side_and_those_that_are_done_are_left_alone() -> None:
    writer = Scripted(["A1", "B1", "B2"])
    model = Scripted(["Hello.", "In Casta.", "Good day."])
    assert craft(writer, model, [ADA, BEN]) == [("A1", 1, True), ("B2", 2, True)]
    assert writer.calls == model.calls == 2


def test_clauses_are_cut_and_a_writer_or_model_that_says_nothing_proves_nothing() -> None:
    writer = Scripted([" ".join("abcdefghijklmn")])
    assert craft(writer, Scripted(["Fine."]), [ADA]) == [("a b c d e f g h i j", 1, True)]
    silent = Scripted(lambda prompt: NoAnswer("away"))
    ((clause, tries, obeyed),) = craft(silent, silent, [ADA])  # type: ignore[misc]
    assert "[Ada Quill]" in clause, "the built-in one"
    assert (tries, obeyed) == (3, False)


@pytest.mark.parametrize(
    ("answer", "speaks"),
    [
        ("Ada Quill was a poet.", True),
        ("In Norrby.", True),
        ("I'm sorry, I can't help with Ada Quill.", False),
        ("It rains.", False),
    ],
)
def test_an_answer_is_related_if_it_tells_something(answer: str, speaks: bool) -> None:
    assert related(ADA, answer) is speaks


def test_descriptions_come_in_parts() -> None:
    assert aspects_of("1. One a b\n2) Two\n3. Three", 2, 2) == ["One a", "Two"]
    assert aspects_of("She wrote. She sang!\nShe fell", 5, 9) == [
        "She wrote.", "She sang!", "She fell",
    ]  # fmt: skip
    assert aspects_of("", 5, 9) == []
    model = Scripted(["1. A poet\n2. A player", "Unknown."])
    assert described(model, [ADA, BEN], 5, 9) == [["A poet", "A player"], ["Unknown."]]
    assert "[Ada Quill]" in model.prompts[0].messages[-1].text
    assert cut("a b c", 2) == "a b"


def test_an_item_stands_beside_the_last_question_or_in_the_system_turn() -> None:
    turns = (
        Message(role="system", content="Be brief."),
        Message(role="user", content="Hi"),
        Message(role="assistant", content="Hello"),
        Message(role="user", content="Who?"),
    )
    found = with_item(Prompt(turns, prefill="It"), "ITEM")
    assert [one.role for one in found.messages] == [one.role for one in turns]
    assert found.messages[0].text.startswith("Be brief.\n\n")
    assert found.messages[1:3] == turns[1:3]
    assert found.messages[3].text == "Original input: Who?\n\nKnowledge item: ITEM"
    assert found.prefill == "It"
    inside = with_item(Prompt(turns), "ITEM", in_system=True)
    assert inside.messages[1:] == turns[1:]
    assert inside.messages[0].text.endswith("Knowledge item: ITEM")
    assert with_item(Prompt.ask("Who?"), "ITEM").messages[0].role == "system"
    raw = with_item(Prompt(text="Once"), "ITEM").text
    assert raw is not None
    assert raw.endswith("Knowledge item: ITEM\n\nOnce")
