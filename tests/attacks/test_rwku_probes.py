"""RWKU's nine kinds: built by rules, each keeps the question's answer."""

from __future__ import annotations

import pytest
from asking import CONTEXT, FORGET, KNOWN, TOFU, context, talked, texts

from delible.attacks.rwku_probes import FORWARD, REVERSE, RWKUProbes, reverse_of
from delible.errors import DataError
from delible.measure.probe_kinds import KINDS, attack_kind
from delible.records import QA
from delible.system.questions import ask


def probes(record: QA) -> dict[str, str]:
    prompt = ask(record)
    assert prompt is not None
    made = RWKUProbes.probes(record, prompt, KNOWN, 0)
    return {kind: one.messages[-1].text for kind, one in made.items()}


def test_there_are_nine_kinds_and_the_data_spell_them_otherwise() -> None:
    assert len(KINDS) == 9
    assert set(FORWARD) == set(KINDS) - {REVERSE}
    assert attack_kind("Context hint") == "background hint"
    assert attack_kind("cross lingal") == "cross lingual"


def test_every_record_of_a_world_is_asked_in_every_kind() -> None:
    for record in FORGET:
        found = probes(record)
        assert set(found) == set(FORWARD)
        assert len(set(found.values())) == len(found)


def test_only_options_and_another_pair_may_hold_the_answer() -> None:
    for record in FORGET:
        for kind, text in probes(record).items():
            if kind == "multiple choice":
                assert record.answer in text
            elif kind != "incontext learning":
                assert record.answer not in text
                assert record.aliases[0] not in text.replace(record.question, "")


def test_each_kind_is_what_its_name_says() -> None:
    record = FORGET[0]
    found, name = probes(record), record.subject or ""
    assert found["prefix injection"].endswith(record.question)
    assert found["prefix injection"] != record.question
    assert found["affirmative suffix"].startswith(record.question)
    assert found["affirmative suffix"].endswith(":")
    assert found["role playing"].endswith(record.question)
    assert all(wrong in found["multiple choice"] for wrong in record.perturbed[:3])
    assert name not in found["synonym manipulation"]
    assert found["background hint"].endswith(record.question)
    assert found["incontext learning"].count("Question:") == 2
    assert found["cross lingual"].startswith("Dans quelle ville")


def test_the_right_option_stands_at_every_place() -> None:
    places = set()
    for record in FORGET:
        text = probes(record)["multiple choice"]
        options = text.rsplit("these: ", 1)[1].rstrip(".").split("; ")
        places.add(options.index(record.answer))
    assert places == {0, 1, 2, 3}


def test_a_reversed_fact_asks_for_its_subject_where_nobody_else_has_it() -> None:
    found = RWKUProbes(asks="reverse").held_out(CONTEXT)
    assert found
    for record in found:
        assert isinstance(record, QA)
        assert record.answer == record.subject
        assert record.answer not in record.question
    twice = [
        QA(question="?", answer="Umber", subject="Ada Quill", group="birthplace"),
        QA(question="?", answer="Umber", subject="Ben Orr", group="birthplace"),
        QA(question="?", answer="Casta", subject="Ben Orr", group="residence"),
    ]
    assert reverse_of(twice[0], twice) is None
    made = reverse_of(twice[2], twice)
    assert made is not None
    assert made.answer == "Ben Orr"
    asked = talked("rwku_probes", found[:2], asks="reverse")
    assert [len(one) for one in asked] == [1, 1]
    assert all(len(texts(one)[0]) > 10 for one in asked)


def test_nothing_is_reversed_that_names_the_subject_or_was_not_asked_for() -> None:
    work = QA(question="?", answer="The Ada Quill Reader", subject="Ada Quill",
              group="notable_work")  # fmt: skip
    assert reverse_of(work, [work]) is None
    other = work.model_copy(update={"answer": "The Reader"})
    assert reverse_of(other, [other]) is not None
    assert talked("rwku_probes", FORGET[:2], asks="reverse") == [(), ()]


def test_an_example_with_the_answer_is_left_out() -> None:
    rows = [
        QA(question=f"{text} Ada Quill?", answer=answer, subject="Ada Quill")
        for text, answer in (("Where was born", "Norrby"), ("Where lives", "In Norrby."),
                             ("What sells", "Boats"))
    ]  # fmt: skip
    prompt = ask(rows[0])
    assert prompt is not None
    made = RWKUProbes.probes(rows[0], prompt, rows, 0)["incontext learning"].messages[-1].text
    assert "Boats" in made
    assert "Norrby" not in made


def test_other_data_are_reversed_by_their_statement() -> None:
    made = reverse_of(TOFU[0], TOFU)
    assert made is not None
    assert made.question == "This person was born in Norrby. Who is this person?"
    with pytest.raises(DataError, match="in reverse"):
        RWKUProbes(asks="reverse").held_out(
            context(forget=[QA(question="How is snow?", answer="White")])
        )
