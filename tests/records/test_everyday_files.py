"""Files as pandas, spreadsheets, Arrow, OpenAI and ShareGPT write them: read alike, with notes."""

from __future__ import annotations

import csv
import datetime
import io
import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from delible.errors import DataError
from delible.loaders import read_located, read_records
from delible.records import QA, Choice, Dialogue, Message, Passage, Record

Row = dict[str, Any]


def put(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_bytes(text.encode())
    return path


def as_csv(rows: list[Row], path: Path) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(columns)
    for row in rows:
        values = [row.get(name) for name in columns]
        writer.writerow(
            json.dumps(one, default=str) if isinstance(one, list | dict) else one for one in values
        )
    path.write_text(text.getvalue(), encoding="utf-8", newline="")


def as_json_lines(rows: list[Row], path: Path) -> None:
    path.write_text("".join(json.dumps(row, default=str) + "\n" for row in rows), encoding="utf-8")


def as_json(rows: list[Row], path: Path) -> None:
    path.write_text(json.dumps(rows, default=str), encoding="utf-8")


def as_parquet(rows: list[Row], path: Path) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


WRITERS: dict[str, Callable[[list[Row], Path], None]] = {
    "a.csv": as_csv, "a.jsonl": as_json_lines, "a.json": as_json, "a.parquet": as_parquet,
}  # fmt: skip


def turn(role: str, content: str, **more: Any) -> Row:
    return {"role": role, "content": content, **more}


TALK = Dialogue(
    messages=(Message(role="user", content="Who?"), Message(role="assistant", content="Ines."))
)
#: Rows and what they say, whatever the format.
ROWS: dict[str, tuple[list[Row], list[Record]]] = {
    "number": (
        [{"question": "When?", "answer": 1987}, {"question": "How many?", "answer": 8}],
        [QA(question="When?", answer="1987"), QA(question="How many?", answer="8")],
    ),
    "fraction": ([{"query": "Pi?", "answer": 3.14}], [QA(question="Pi?", answer="3.14")]),
    "date": (
        [{"prompt": "When?", "completion": datetime.date(1987, 3, 1)}],
        [QA(question="When?", answer="1987-03-01")],
    ),
    "decimal": (
        [{"prompt": "How much?", "completion": Decimal("12.50")}],
        [QA(question="How much?", answer="12.50")],
    ),
    "lists of numbers": (
        [{"question": "When?", "answer": "1987", "aliases": [87], "perturbed": [1988, 1989]}],
        [QA(question="When?", answer="1987", aliases=("87",), perturbed=("1988", "1989"))],
    ),
    "own type": (
        [{"type": "qa", "question": "When?", "answer": 1987, "group": 3}],
        [QA(question="When?", answer="1987", group="3")],
    ),
    "answers": (
        [{"question": "When?", "answers": [1987, 87]}],
        [QA(question="When?", answer="1987", aliases=("87",))],
    ),
    "number as an option": (
        [{"question": "Legs?", "choices": [6, 8, 4], "answer": 8}],
        [Choice(question="Legs?", options=("6", "8", "4"), correct=1)],
    ),
    "number as an option of its own column": (
        [{"question": "Legs?", "option1": 6, "option2": 4, "option3": 8, "option4": 9,
          "answer": 8}],
        [Choice(question="Legs?", options=("6", "4", "8", "9"), correct=2)],
    ),
    "index": (
        [{"question": "Legs?", "choices": ["six", "eight"], "answer": 1}],
        [Choice(question="Legs?", options=("six", "eight"), correct=1)],
    ),
    "missing": (
        [{"question": "Who?", "answer": "Ada.", "subject": None},
         {"question": "Who?", "answer": "Eve.", "subject": "Eve"}],
        [QA(question="Who?", answer="Ada."), QA(question="Who?", answer="Eve.", subject="Eve")],
    ),
    "weight": (
        [{"messages": [turn("user", "Who?"), turn("assistant", "Ines.", weight=1)]}],
        [TALK],
    ),
    "keys that are null where another row has them": (
        [{"messages": [turn("user", "Who?"),
                       turn("assistant", "Ines.", reasoning_content="Let me see.")]},
         {"messages": [turn("user", "Who?"), turn("assistant", "Ines.")]}],
        [TALK, TALK],
    ),
    "empty tool calls": (
        [{"messages": [turn("user", "Who?"), turn("assistant", "Ines.", tool_calls=None)]}],
        [TALK],
    ),
    "parts": (
        [{"messages": [{"role": "user", "content": [{"type": "text", "text": "Who?"}]},
                       {"role": "assistant", "content": [{"type": "text", "text": "In"},
                                                         {"type": "text", "text": "es."}]}]}],
        [TALK],
    ),
    "ShareGPT": (
        [{"conversations": [{"from": "human", "value": "Who?"},
                            {"from": "gpt", "value": "Ines."}]}],
        [TALK],
    ),
    "ShareGPT with Arrow's null keys": (
        [{"conversations": [{"from": "human", "value": "Who?", "weight": None},
                            {"from": "gpt", "value": "Ines.", "weight": 0.5}]}],
        [TALK],
    ),
    "roles of other makers": (
        [{"messages": [turn("developer", "Be brief."), turn("human", "Who?"),
                       turn("model", "Ines.")]}],
        [Dialogue(messages=(Message(role="system", content="Be brief."), *TALK.messages))],
    ),
    "own dialogue": (
        [{"type": "dialogue", "messages": [turn("user", "Who?"),
                                           turn("assistant", "Ines.", weight=0)]}],
        [TALK],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("kind", ROWS)
def test_every_format_says_the_same(tmp_path: Path, kind: str, name: str) -> None:
    rows, expected = ROWS[kind]
    WRITERS[name](rows, tmp_path / name)
    assert read_records(tmp_path / name) == expected


def test_a_number_that_may_be_an_index_or_an_option_is_not_guessed() -> None:
    row = {"question": "Legs?", "choices": [2, 1, 8], "answer": 1}
    with pytest.raises(DataError, match="can be read as option 0 or 1"):
        read_records([{**row, "choices": [1, 8, 2]}])
    with pytest.raises(DataError, match="can be read as option 1 or 2"):
        read_records([{**row, "choices": ["8", "2", 1]}])
    assert read_records([row]) == [Choice(question="Legs?", options=("2", "1", "8"), correct=1)]


def test_what_is_left_out_or_read_otherwise_is_noted_once(caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        {"messages": [turn("user", "Who?", name="Bo"), turn("assistant", "Ines.", weight=1)]},
        {"messages": [turn("user", "Who?"), turn("assistant", "Ines.", weight=0)]},
        {"question": "When?", "answer": 1987},
        {"question": "When?", "answer": 1988},
    ]
    read_records(rows)
    assert caplog.messages == [
        "records: keys of messages not used: 'name', 'weight'.",
        "records: numbers in 'answer' are read as text, such as \"1987\".",
    ]
    caplog.clear()
    read_records([{"messages": [turn("user", "Who?", weight=None), turn("assistant", "Ines.")]}])
    assert caplog.messages == []


def test_numbers_are_noted_under_the_users_name(caplog: pytest.LogCaptureFixture) -> None:
    columns = {"question": "q", "answer": "year"}
    read_records([{"q": "When?", "year": 1987}], columns=columns)
    assert caplog.messages == ["records: numbers in 'year' are read as text, such as \"1987\"."]


# Tables as text


def test_the_index_that_pandas_writes_is_not_read(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    path = put(tmp_path, "a.csv", ",question,answer\n0,Who?,Ada.\n1,Where?,Here.\n")
    records = read_records(path)
    assert records == [QA(question="Who?", answer="Ada."), QA(question="Where?", answer="Here.")]
    (note,) = caplog.messages
    assert note == f"{path}:1: column 1 without a name not read (the index that pandas writes?)."


def test_columns_without_a_name_are_not_read_wherever_they_stand(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    path = put(tmp_path, "a.csv", "question,answer,,\nWho?,Ada.,,\nWhere?,Here.,x,\n")
    records = read_records(path)
    (note,) = caplog.messages
    assert records == [QA(question="Who?", answer="Ada."), QA(question="Where?", answer="Here.")]
    assert note == f"{path}:1: columns 3, 4 without a name not read."


def test_cells_may_be_long(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    text = "The harbour light burned all night. " * 8000
    before = csv.field_size_limit()
    records = read_records(put(tmp_path, "a.csv", f"text\n{text}\n"))
    assert records == [Passage(text=text.strip())]
    assert caplog.messages == []
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("name", "separator", "called"),
    [
        ("a.csv", ";", "semicolons"), ("a.csv", "\t", "tabs"), ("a.csv", "|", "vertical bars"),
        ("a.tsv", ",", "commas"), ("a.tsv", ";", "semicolons"),
    ],
)  # fmt: skip
def test_another_separator_is_read_and_named(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, name: str, separator: str, called: str
) -> None:
    text = 'question,answer\n"Who, really?",Ada\n'.replace("n,a", f"n{separator}a")
    path = put(tmp_path, name, text.replace('",', f'"{separator}'))
    assert read_records(path) == [QA(question="Who, really?", answer="Ada")]
    assert caplog.messages == [f"{path}: read as separated by {called}."]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # a comma in a column's name, and one in a cell: not what separates
        ('"question";"answer";"who, when"\n"Q, or";"A";"x"\n', QA(question="Q, or", answer="A")),
        ("question;answer;who, when\nQ;A;x\nR;B;y\n", QA(question="Q", answer="A")),
        # commas separate, whatever else the cells hold
        ("question,answer\nQ;R,A|B\n", QA(question="Q;R", answer="A|B")),
        ("text\nOne; two | three\n", Passage(text="One; two | three")),
    ],
)
def test_the_separator_is_read_off_the_table(tmp_path: Path, text: str, expected: Record) -> None:
    assert read_records(put(tmp_path, "a.csv", text))[0] == expected


def test_the_line_with_which_excel_names_the_separator(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    path = put(tmp_path, "a.csv", "sep=;\r\nquestion;answer\r\nQ;A\r\n")
    (found,) = read_located(path)
    assert found.record == QA(question="Q", answer="A")
    assert found.where == f"{path}:3"
    assert caplog.messages == [f"{path}: read as separated by semicolons."]


def test_own_column_names_work_with_any_separator(tmp_path: Path) -> None:
    path = put(tmp_path, "a.csv", "frage;antwort\nWer?;Ada.\n")
    records = read_records(path, columns={"question": "frage", "answer": "antwort"})
    assert records == [QA(question="Wer?", answer="Ada.")]
