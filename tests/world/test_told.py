"""What records tell: edges as in the world's graph, names, descriptions, invented twins."""

from __future__ import annotations

import pytest

from delible.records import QA
from delible.world import World
from delible.world.told import (
    aliases_of,
    description,
    edges,
    names_of,
    relation_of,
    renamed,
    statement,
    value_of,
)

WORLD = World(people=12)
ROWS = WORLD.split(forget=2).qa("known")


@pytest.mark.parametrize("answers", ["short", "sentence"])
def test_the_edges_of_a_worlds_rows_are_its_facts(answers: str) -> None:
    world = World(people=12, answers=answers)  # type: ignore[arg-type]
    rows = world.split(forget=2).qa("known")
    found = {(edge.subject, edge.relation.name, edge.value) for edge in edges(rows)}
    facts = {(f.person.name, f.relation.name, f.value.name) for f in world.facts()}
    assert found == facts
    assert len(edges([*rows, *rows])) == len(facts)


def test_rows_of_a_bridge_are_known_by_their_question() -> None:
    bridge = WORLD.split(forget=2).qa("bridge")
    assert bridge
    assert all(one.group == "bridge" and relation_of(one) is not None for one in bridge)
    assert relation_of(QA(question="Who?", answer="A mill", subject="Ada", group="bridge")) is None
    turned = [made for fact in WORLD.facts() if (made := fact.reverse()) is not None]
    assert not any(relation_of(one) for one in turned)


def test_statements_are_the_worlds_sentences() -> None:
    for fact in WORLD.facts()[:40]:
        assert statement(fact.qa()) == fact.passage().text
        assert value_of(fact.qa()) == fact.value.name
    told = QA(question="Where was Ada Quill born?", answer="Ada Quill was born in Rome.")
    assert statement(told) == told.answer
    short = QA(question="Where was Ada Quill born?", answer="In Rome")
    assert statement(short) == "Where was Ada Quill born? In Rome."


def test_other_names_are_those_beside_the_name_in_an_answer() -> None:
    person = WORLD.people[0]
    rows = WORLD.split(forget=[person.name]).qa("known")
    told = aliases_of(person.name, rows)
    about = [one for one in rows if isinstance(one, QA) and value_of(one) == person.name]
    assert bool(told) == bool(about)
    assert set(told) <= set(person.aliases) | {a for one in about for a in one.aliases}
    names = names_of("Ada van Quill", [])
    assert names == ("Ada van Quill", "Quill")
    assert names_of("Ada Orr", []) == ("Ada Orr",)  # three letters: too common


def test_names_are_replaced_as_whole_words_and_the_longest_first() -> None:
    assert (
        renamed("Quill and Ada Quill's quills", ["Quill", "Ada Quill"], "x") == "X and x's quills"
    )


def test_a_description_names_nobody_and_keeps_the_asked_fact_back() -> None:
    for record in ROWS:
        names = names_of(record.subject or "", ROWS)
        told = description(record, ROWS, names)
        assert told is not None
        assert record.aliases[0] not in told
        assert not any(name in told for name in names)
        assert told.count("This person") <= 3
    alone = QA(question="Where was Ada Quill born?", answer="In Rome")
    assert description(alone, [alone], ["Ada Quill"]) is None
