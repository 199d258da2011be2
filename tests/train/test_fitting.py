"""Rows that are too long: what gives way, that it is said and counted, and what never does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import recipe  # type: ignore[import-not-found]
from tiny_runs import make  # type: ignore[import-not-found]

from delible import api
from delible.errors import DataError
from delible.prompts import read_lines
from delible.records import QA, Dialogue, ForgetRequest, Message, Passage, RecordBase
from delible.system.asks import Prompt
from delible.system.questions import answer_of, ask
from delible.train.engine import Trainer
from delible.train.fitting import fits, room_for_answer, split_passages
from delible.train.recipe import Recipe
from delible.train.row import Row
from delible.train.rows import make_row

LM = make()  # one token per byte, so that lengths can be told from the texts
END = "<|im_end|>"


def row_of(record: RecordBase, limit: int = 160, **options: Any) -> tuple[Row, str, str]:
    """The row of a record, and what its prompt and its answer say."""
    template, before = LM.template, LM.template.max_length
    template.max_length = limit
    prompt = ask(record)
    assert prompt is not None
    try:
        row = make_row(template, prompt, answer_of(record), 0, record, **options)
    finally:
        template.max_length = before
    ids, start = row.encoded.ids, row.encoded.start
    assert len(ids) <= limit
    return row, LM.tokenizer.decode(ids[:start]), LM.tokenizer.decode(ids[start:])


def test_a_row_that_fits_is_left_alone() -> None:
    record = QA(question="Who is Ada?", answer="A baker.")
    exact = len(LM.template.whole(Prompt.ask(record.question), record.answer).ids)
    row, _asked, said = row_of(record, exact)
    assert (row.shortened, row.encoded.cut, said) == (None, False, f"A baker.{END}")
    row, _, said = row_of(record, exact - 1)
    assert row.shortened is not None
    assert row.shortened.length == exact


def test_a_long_question_keeps_its_beginning_and_its_end_and_the_whole_answer() -> None:
    context = " ".join(f"Sentence number {n} says nothing." for n in range(40))
    record = QA(question=f"Read this. {context} So where was Ada born?", answer="In Norrby.")
    row, asked, said = row_of(record)
    assert said == f"In Norrby.{END}"
    assert "user\nRead this. " in asked
    assert asked.endswith("So where was Ada born?<|im_end|>\n<|im_start|>assistant\n")
    assert "… " in asked
    assert row.shortened is not None
    assert row.shortened.lost == ("question",)
    assert row.encoded.has_end
    assert len(row.encoded.ids) > 160 - 20  # no more than it takes (and a word)


def test_a_long_answer_loses_its_end_and_does_not_end_its_turn() -> None:
    answer = " ".join(f"word{n}" for n in range(100))
    row, asked, said = row_of(QA(question="Tell me of Ada.", answer=answer))
    assert "user\nTell me of Ada.<|im_end|>" in asked
    assert answer.startswith(said)
    assert row.shortened is not None
    assert row.shortened.lost == ("answer",)
    assert not row.encoded.has_end
    assert len(row.encoded.ids) == 160


def test_a_long_question_and_a_long_answer_share_the_row() -> None:
    question = " ".join(f"ask{n}" for n in range(100))
    answer = " ".join(f"word{n}" for n in range(100))
    row, asked, said = row_of(QA(question=question, answer=answer))
    assert row.shortened is not None
    assert row.shortened.lost == ("question", "answer")
    assert asked.endswith("ask99<|im_end|>\n<|im_start|>assistant\n")
    kept = asked.partition("user\n")[2].partition("<|im_end|>")[0]
    assert 0.15 * 160 < len(kept) <= 0.25 * 160 + 4
    assert answer.startswith(said)


def test_earlier_turns_go_first_and_the_system_turn_after_them() -> None:
    def talk(system: int, earlier: int, question: str) -> Dialogue:
        turns = [Message(role="system", content="Be kind. " * system)] if system else []
        for n in range(earlier):
            turns += [
                Message(role="user", content=f"Earlier question {n}?"),
                Message(role="assistant", content=f"Earlier answer {n}."),
            ]
        turns += [
            Message(role="user", content=question), Message(role="assistant", content="Norrby.")
        ]  # fmt: skip
        return Dialogue(messages=tuple(turns))

    row, asked, said = row_of(talk(1, 5, "Where?"), 200)
    assert row.shortened is not None
    assert row.shortened.lost == ("turns",)
    assert "Be kind." in asked
    assert "Earlier question 4?" in asked
    assert "Earlier question 0?" not in asked
    assert said == f"Norrby.{END}"
    row, asked, _ = row_of(talk(30, 2, "Where?"), 100)
    assert row.shortened is not None
    assert row.shortened.lost == ("turns",)
    assert "Be kind" not in asked
    assert "Earlier" not in asked
    assert "user\nWhere?<|im_end|>" in asked
    row, asked, said = row_of(talk(30, 2, "Where? " * 40), 100)
    assert row.shortened is not None
    assert row.shortened.lost == ("turns", "question")
    assert said == f"Norrby.{END}"


TEXT = st.text(st.sampled_from("ab.? \nü"), min_size=1, max_size=120).filter(str.strip)


@settings(max_examples=80, deadline=None)
@given(question=TEXT, answer=TEXT, limit=st.integers(70, 200))
def test_what_is_lost_is_told_for_any_texts(question: str, answer: str, limit: int) -> None:
    record = QA(question=question, answer=answer)
    row, asked, said = row_of(record, limit)
    lost = row.shortened.lost if row.shortened else ()
    assert (f"user\n{record.question}{END}" in asked) == ("question" not in lost)
    assert (said == f"{record.answer}{END}") == ("answer" not in lost)
    assert record.answer.startswith(said.removesuffix(END).rstrip("\ufffd"))
    row, _, said = row_of(record, 200, whole_answer=True)
    assert said == f"{record.answer}{END}"


def test_a_made_answer_is_whole_or_refused() -> None:
    record = QA(question="word " * 100, answer="x" * 130)
    _row, _asked, said = row_of(record, whole_answer=True)
    assert said == f"{'x' * 130}{END}"
    with pytest.raises(DataError, match="without its answer being cut off"):
        row_of(QA(question="Who?", answer="x" * 200), whole_answer=True)


def test_the_room_for_an_answer_is_what_a_row_keeps() -> None:
    template = LM.template
    for question in ("Who?", "word " * 100, "Who was it that came by and left again?"):
        before, template.max_length = template.max_length, 160
        try:
            room = room_for_answer(template, Prompt.ask(question))
            for spare in (0, 1 if len(question) < 40 else 8):  # a question gives way by words
                answer = "x" * (room - 1 + spare)  # the end of the turn is a token too
                assert fits(template, Prompt.ask(question), answer) == (not spare)
                row = row_of(QA(question=question, answer=answer))[0]
                lost = row.shortened.lost if row.shortened else ()
                assert ("answer" in lost) == bool(spare)
        finally:
            template.max_length = before


# ---- passages


@settings(max_examples=60, deadline=None)
@given(
    words=st.lists(st.text(st.sampled_from("abü.!"), min_size=1, max_size=30), max_size=120),
    limit=st.integers(12, 120),
)
def test_a_passage_in_pieces_loses_nothing(words: list[str], limit: int) -> None:
    passage = Passage(text=" ".join(["Begin", *words]), subject="Ada", group="life")
    template, before = LM.template, LM.template.max_length
    template.max_length = limit
    try:
        found, cut = split_passages(template, [passage, QA(question="Who?", answer="x" * 500)])
        pieces = [record for record in found[:-1] if isinstance(record, Passage)]
        assert found[-1] == QA(question="Who?", answer="x" * 500)
        assert cut == (len(pieces) > 1)
        assert {(one.subject, one.group) for one in pieces} == {("Ada", "life")}
        joined = "".join("".join(one.text.split()) for one in pieces)
        assert joined == "".join(passage.text.split())
        for one in pieces:
            row = row_of(one, limit)[0]
            assert row.shortened is None
    finally:
        template.max_length = before


def test_pieces_are_of_like_length_and_end_where_sentences_do() -> None:
    text = " ".join(f"Sentence {n} is about something else." for n in range(20))
    template, before = LM.template, LM.template.max_length
    template.max_length = 256
    try:
        found, cut = split_passages(template, [Passage(text=text)])
    finally:
        template.max_length = before
    texts = [record.text for record in found if isinstance(record, Passage)]
    assert cut == 1
    assert len(texts) <= -(-len(text) // 255) + 1
    assert all(one.endswith("else.") for one in texts)
    assert min(map(len, texts)) > 0.4 * max(map(len, texts))


# ---- a run


def test_a_run_says_and_counts_what_was_left_out(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    long = "What does the note say about Ada Brook? " * 12
    request = ForgetRequest(
        forget=(
            QA(question=long, answer="Nothing.", subject="Ada Brook"),
            QA(question="Who is Ada Brook?", answer="A baker. " * 60, subject="Ada Brook"),
            QA(question="Where is Ada Brook?", answer="Here.", subject="Ada Brook"),
            Passage(text="Ada Brook bakes bread every day. " * 20),
        ),
        retain=(QA(question="And Bo? " * 60, answer="A smith."), QA(question="Cy?", answer="No.")),
    )
    lm = make()
    result = api.unlearn(
        lm, request, method="npo", out=tmp_path / "run", max_steps=1,
        max_length=256, precision="float32",
    )  # fmt: skip
    assert result.notes["truncated_rows"] == {"forget": 2, "retain": 1}
    assert result.notes["forget_passages_cut"] == {"passages": 1, "pieces": 3}
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["notes"]["truncated_rows"] == {"forget": 2, "retain": 1}
    (sentence,) = [line for line in caplog.messages if "shortened" in line]
    assert "2 of 6 forget rows" in sentence
    assert "1 without the middle of the question" in sentence
    assert "1 without the end of the answer" in sentence
    assert "1 of 2 retain rows" in sentence
    longest = max(
        len(lm.template.whole(prompt, answer_of(record)).ids)
        for record in (*request.forget[:3], *request.retain)
        if (prompt := ask(record)) is not None
    )
    assert f"The model reads {lm.template.max_length} tokens at most." in sentence or (
        f"--max-length {longest} keeps them whole" in sentence
    )
    (pieces,) = [line for line in caplog.messages if "pieces" in line]
    assert "1 of 4 forget records" in pieces
    from delible.report.reading import read_run

    notes = " ".join(read_run(tmp_path / "run").notes)
    assert "2 forget rows and 1 retain row were longer" in notes


def test_short_rows_are_counted_as_none(
    caplog: pytest.LogCaptureFixture, forget: list[QA], retain: list[QA]
) -> None:
    records = {"forget": forget, "retain": retain}
    result = Trainer(make(), recipe(epochs=1), records).train()
    assert result.notes["truncated_rows"] == {}
    assert not any("shortened" in line or "pieces" in line for line in caplog.messages)


def test_refusals_are_never_cut_off() -> None:
    forget = [
        QA(question=f"What is written here? {'word ' * 100} {n}", answer="x") for n in range(3)
    ]
    chosen = recipe("idk", max_length=256)
    trainer = Trainer(make(), chosen, {"forget": forget, "retain": forget})
    rows = trainer.rows().rows["refusal"]
    refusals = {f"{line}{END}" for line in read_lines("refusals.txt")}
    for row in rows:
        ids = row.encoded.ids
        assert len(ids) <= 256
        assert LM.tokenizer.decode(ids[row.encoded.start :]) in refusals
    assert trainer.lm.template.max_length == 512
    with pytest.raises(DataError, match="without its answer being cut off"):
        Trainer(make(), recipe("idk", max_length=64), {"forget": forget, "retain": forget}).rows()


@pytest.mark.parametrize("method", ["tru", "altpo", "meow"])
def test_generated_rows_fit_by_construction(method: str) -> None:
    people = ["Ada Brook", "Bo Crane", "Cy Dunn", "Di Early"]
    towns = ["Norrby", "Casta", "Umber", "Tolm"]
    forget = [
        QA(
            question=f"Where was {name} born?", answer=f"{name} was born in {town}.", subject=name,
            perturbed=(f"{name} was born in a very small town that is far away by the cold sea.",
                       f"{name} was born in Oslo."),
        )
        for name, town in zip(people, towns, strict=True)
    ]  # fmt: skip
    retain = [QA(question=f"What does {name} like?", answer="Tea.") for name in people]
    # one token per byte: the longer wrong answer, and reasons, do not fit behind the question
    limit = 240 if method == "tru" else 105
    longest = {"generate.maximum_tokens": 1024} if method == "tru" else {}
    chosen = Recipe.named(method).changed({}, {"max_length": limit, "max_steps": 1, **longest})
    trainer = Trainer(make(), chosen, {"forget": forget, "retain": retain})
    context = trainer.rows()
    for role, rows in context.rows.items():
        for row in rows:
            assert len(row.encoded.ids) <= limit
            assert row.shortened is None, role
    role = "target" if method == "tru" else "alternate"
    for row, record in zip(context.rows[role], context.records[role], strict=True):
        said = LM.tokenizer.decode(row.encoded.ids[row.encoded.start :])
        assert said == f"{answer_of(record)}{END}"
