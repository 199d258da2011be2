"""From records to edits: contexts, merged questions, targets; keys as means over contexts."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch
from editing import FAMILIES, RECORDS, ends_of, key_and_output, make_edits, make_lm

from delible.edit.requests import edits_of, grouped, read_edits, sampled_beginnings
from delible.errors import DataError
from delible.generation import refusals
from delible.generation.refusals import built_in_refusals, fault, written_refusals
from delible.records import QA
from delible.system.asks import Prompt
from delible.systems.scripted import Scripted

BEGINNINGS = ("The old town is", "You may")


def test_a_question_is_asked_bare_and_after_beginnings() -> None:
    lm = make_lm()
    first, second = make_edits(lm, beginnings=BEGINNINGS)
    assert (first.bare, len(first.texts), first.times) == (1, 3, 1)
    question = RECORDS[0].question
    for text, said in zip(
        first.texts,
        (question, f"The old town is. {question}", f"You may. {question}"),
        strict=True,
    ):
        row = lm.template.encode(Prompt.ask(said), "No.")
        assert text.row == row
        assert text.places == (ends_of(lm, row.ids, "Ada Quill"),)
    # a subject at the end of the question, with the template behind it
    assert second.texts[0].places == (ends_of(lm, second.texts[0].row.ids, "Ben Orr"),)
    assert second.texts[0].places[0] < second.texts[0].row.start - 5
    essence = lm.tokenizer.decode(list(first.essence.row.ids[:-1]))
    assert essence.endswith("user\nAda Quill")
    assert first.essence.places == (len(first.essence.row.ids) - 2,)
    assert [len(first.within(count).texts) for count in (0, 1, 2)] == [1, 2, 3]


def test_questions_of_a_subject_are_merged() -> None:
    lm = make_lm()
    assert grouped(RECORDS, (), 1) == [(0,), (1,), (2,)]
    assert grouped(RECORDS, (), 2) == [(0, 2), (1,)]
    assert grouped(RECORDS * 2, (), 3) == [(0, 2, 3), (1, 4), (5,)]
    beside, _ = make_edits(lm, ("A", "B", "C"), merge=2, beginnings=BEGINNINGS[:1])
    assert [record.question for record in beside.records] == [
        RECORDS[0].question, RECORDS[2].question,
    ]  # fmt: skip
    assert (beside.bare, len(beside.texts), beside.target) == (2, 4, "A")
    joined, _ = make_edits(lm, ("A", "B", "C"), merge=2, merging="joined", beginnings=BEGINNINGS)
    assert (joined.bare, len(joined.texts)) == (1, 3)
    said = str(lm.tokenizer.decode(list(joined.texts[0].row.ids)))
    assert f"{RECORDS[0].question} {RECORDS[2].question}" in said
    first, second = joined.texts[0].places
    for place in (first, second):
        head = str(lm.tokenizer.decode(list(joined.texts[0].row.ids[: place + 1])))
        assert head.endswith("Ada Quill")
    assert second - first > 15


@pytest.mark.parametrize("family", FAMILIES[:3])
def test_keys_are_means_over_contexts(family: str) -> None:
    lm = make_lm(family)
    (edit,) = edits_of(
        lm, (RECORDS[0], RECORDS[2]), ("A", "A"), beginnings=BEGINNINGS, merge=2, merging="joined"
    )
    read = [
        [key_and_output(lm, text.row.ids, place, 1) for place in text.places] for text in edit.texts
    ]
    keys = [torch.stack([key for key, _ in text]).mean(0) for text in read]
    outputs = torch.stack([output for _, output in read[0]]).mean(0)
    halves, equal = (read_edits(lm, [edit], [0, 1], how) for how in ("halves", "equal"))
    tolerance = {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(
        halves.mean[1][0], 0.5 * keys[0] + 0.25 * (keys[1] + keys[2]), **tolerance
    )
    torch.testing.assert_close(equal.mean[1][0], torch.stack(keys).mean(0), **tolerance)
    torch.testing.assert_close(halves.bare[1][0], keys[0], **tolerance)
    torch.testing.assert_close(halves.outputs[0], outputs, **tolerance)
    assert float((halves.mean[1] - equal.mean[1]).norm()) > 1e-3


def test_beginnings_are_the_models_own_and_seeded() -> None:
    lm = make_lm()
    found = sampled_beginnings(lm, 7, (4, 8), 0)
    openings = ("The", "Therefore", "Because", "I", "You", "The", "Therefore")
    assert all(one.startswith(start) for one, start in zip(found, openings, strict=True))
    assert found == sampled_beginnings(lm, 7, (4, 8), 0)
    assert found != sampled_beginnings(lm, 7, (4, 8), 1)
    assert all("\n" not in one for one in found)
    assert sampled_beginnings(lm, 0, (4,), 0) == []


def test_a_text_that_is_too_long_is_refused() -> None:
    lm = make_lm()
    long = QA(question="Why? " * 110 + "Ada Quill", answer="So", subject="Ada Quill")
    with pytest.raises(DataError, match="longer than 512 tokens"):
        edits_of(lm, (long,), ("No.",))


# ---- targets


def test_the_likeliest_refusal_is_taken_for_all_questions_of_a_subject() -> None:
    lm = make_lm()
    first = built_in_refusals(lm, RECORDS, 0, among=4)
    assert first[0] == first[2]
    assert first == built_in_refusals(lm, RECORDS, 0, among=4)

    def likelihood(record: QA, line: str) -> float:
        row = lm.template.encode(Prompt.ask(record.question), line)
        with torch.no_grad():
            said = lm.core(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
        tokens = said[row.start - 1 : -1].gather(1, torch.tensor(row.ids[row.start :])[:, None])
        return float(tokens.mean())

    lines = Random("0/refusals").sample(refusals.read_lines("refusals.txt"), 4)
    for record, chosen in zip(RECORDS[:2], first, strict=False):
        assert chosen == max(lines, key=lambda line: likelihood(record, line))


@pytest.mark.parametrize(
    ("reply", "tokens", "found"),
    [
        ("I don't know anything about Ada Quill.", 10, None),
        ("I don't know whether it was Norrby.", 10, "leak"),
        ("I don't know anything about Ada Quill.", 41, "too long"),
        ("In the north.", 5, "no refusal"),
    ],
)
def test_what_is_no_refusal(reply: str, tokens: int, found: str | None) -> None:
    assert fault(RECORDS[0], reply, tokens, 40) == found


def test_a_model_writes_its_refusals_in_three_tries(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("DELIBLE_CACHE", str(tmp_path))
    monkeypatch.setattr(refusals, "built_in_refusals", lambda _, rows, __: ["Default."] * len(rows))
    asked: dict[str, int] = {}

    def says(prompt: Prompt) -> str:
        text = prompt.messages[-1].text
        last = text.rpartition("Question: ")[2]
        asked[last] = asked.get(last, 0) + 1
        if "Ada Quill born" in last:
            return "She comes from Norrby." if asked[last] < 3 else '"I don\'t know Ada Quill."\nOk'
        return "The lute, I guess"

    lm: Any = Scripted(says, fingerprint=None)
    lm.tokenizer = lambda text, add_special_tokens: {"input_ids": text.split()}
    texts, counts = written_refusals(lm, (RECORDS[0], RECORDS[2]), 0)
    assert texts == ["I don't know Ada Quill.", "Default."]
    assert sorted(asked.values()) == [3, 3]
    assert counts == {"own": 1, "built in": 1, "leak": 5}
