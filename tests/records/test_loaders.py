"""Reading, mapping, checking and writing of records."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from delible.errors import DataError, MissingExtraError
from delible.loaders import build_request, read_lines, read_located, read_records, write_records
from delible.loaders.forms import FORMS
from delible.records import QA, Choice, Dialogue, Message, Passage, Record

QA_LINE = '{"question": "Who?", "answer": "Ada."}'
Put = Callable[..., Path]


@pytest.fixture
def put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Put:
    """Writes a file into the current folder, so that messages show its bare name."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, content: str | bytes) -> Path:
        path = Path(name)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def failure(source: Any, **options: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        read_records(source, **options)
    return caught.value


def one(row: dict[str, Any], **options: Any) -> Record:
    (record,) = read_records([row], **options)
    return record


# Formats


def test_json_lines_with_blank_lines_and_carriage_returns_have_exact_places(put: Put) -> None:
    path = put("a.jsonl", f"\r\n{QA_LINE}\r\n \t\r\n\r\n{QA_LINE}\r\n")
    assert [found.where for found in read_located(path)] == ["a.jsonl:2", "a.jsonl:5"]


def test_line_separators_inside_strings_do_not_split_lines(put: Put) -> None:
    answer = "one\u2028two\u2029three\x85four\x0bfive"
    text = json.dumps({"question": "Q", "answer": answer}, ensure_ascii=False)
    text = f"{text}\n{QA_LINE}\n"
    for name in ("a.jsonl", "a.json"):
        first, second = read_located(put(name, text))
        assert isinstance(first.record, QA)
        assert first.record.answer == answer
        assert second.where == f"{name}:2"


def test_byte_order_mark_is_not_part_of_the_first_name(put: Put) -> None:
    for name, text in (("a.jsonl", QA_LINE), ("a.json", f"[{QA_LINE}]"),
                       ("a.csv", "question,answer\nWho?,Ada.\n")):  # fmt: skip
        assert read_records(put(name, b"\xef\xbb\xbf" + text.encode())) == [
            QA(question="Who?", answer="Ada.")
        ]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.csv.gz"])
def test_gzip(put: Put, name: str) -> None:
    text = "question,answer\nWho?,Ada.\n" if "csv" in name else QA_LINE
    path = put(name, gzip.compress(text.encode()))
    assert read_records(path) == [QA(question="Who?", answer="Ada.")]


def test_json_array_items_know_their_line(put: Put) -> None:
    text = f'\n[\n{QA_LINE},\n\n  {QA_LINE}, {{"text":\n "T"}}\n]\n'
    found = read_located(put("a.json", text))
    assert [item.where for item in found] == ["a.json:3", "a.json:5", "a.json:5"]
    assert found[2].record == Passage(text="T")


def test_one_json_object_over_several_lines_is_one_record(put: Put) -> None:
    path = put("a.json", '{\n "question": "Who?",\n "answer": "Ada."\n}\n')
    assert read_records(path) == [QA(question="Who?", answer="Ada.")]


@pytest.mark.parametrize(
    ("text", "where", "message"),
    [
        (f"[\n{QA_LINE}\n{QA_LINE}]", "a.json:3", "Expecting ',' delimiter"),
        (f"[\n{QA_LINE},\n]", "a.json:3", "Expecting value"),
        (f"[{QA_LINE}\n", "a.json:2", "Expecting ',' delimiter"),
        (f"[{QA_LINE}]\n\nmore", "a.json:3", "Extra data"),
        ('{\n "question": "Q"\n "answer": 1}', "a.json:3", "Expecting ',' delimiter"),
        (f"{QA_LINE}\n\n{QA_LINE[:-1]}\n", "a.json:3", "Expecting ',' delimiter"),
        (f"{QA_LINE[:-1]}\n{QA_LINE}\n", "a.json:1", "Expecting ',' delimiter"),
        (f"[{QA_LINE}, 3]", "a.json:1", "expected an object, found the number 3"),
        ("[]", "a.json", "holds no records"),
        ("[" * 100_000, "a.json:1", "cannot be read"),
    ],
)
def test_broken_json(put: Put, text: str, where: str, message: str) -> None:
    error = failure(put("a.json", text))
    assert error.where == where
    assert message in error.problem


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        ('{"question": "Q", "answer": ', "broken JSON: Expecting value at column 29", "JSON obj"),
        ("I do not know.", "broken JSON: Expecting value at column 1", "plain text belongs in"),
        ('["a"]', "expected an object, found a list", "must be named .json"),
        ("[", "broken JSON", "must be named .json"),
        ('"text"', "expected an object, found text", "named columns"),
        ("null", "expected an object, found null", "named columns"),
        ('{"question": "Q"}', "fits no known form. Its columns: 'question'", "missing: 'answer'"),
        ('{"type": "qa", "question": "Q"}', "has no 'answer'", "--column answer=NAME"),
        ('{"question": "Q", "answer": " "}', "'answer' is empty", None),
        ('{"question": "Q", "answer": null}', "'answer' is empty", None),
        ('{"question": "Q", "answer": true}', "'answer' must be text, not true", None),
        ('{"question": "Q", "answer": NaN}', "'answer' is empty", None),
        ('{"question": "Q", "answer": ["a"]}', "'answer' must be text, not a list", "'aliases'"),
        ('{"query": {}, "answer": "a"}', "'query' must be text, not an object", None),
        ('{"question": "Q", "answer": "\\ud800"}', "lone surrogate", None),
        (
            '{"question": "Q", "answer": "a", "perturbed_answer": {}}',
            "'perturbed_answer' must be a text or a list of texts, not an object",
            None,
        ),
        (
            '{"question": "Q", "answer": "a", "perturbed_answer": ["b", {}]}',
            "'perturbed[1]' must be text, not an object",
            None,
        ),
        (
            '{"type": "qa", "question": "Q", "answer": "a", "perturbed": "b"}',
            "'perturbed' must be a list, not text",
            None,
        ),
        (
            '{"type": "qa", "question": "Q", "answer": "a", "perturbd": ["b"]}',
            "unknown key 'perturbd' in a record of type 'qa'",
            "Did you mean 'perturbed'?",
        ),
        (
            '{"type": "pasage", "text": "T"}',
            "unknown record type 'pasage'",
            "Did you mean 'passage'?",
        ),
        ('{"type": "choice", "question": "Q", "options": ["a"], "correct": 0}', "too few", None),
        ('{"question": "Q", "options": ["a", "b"], "correct": 2}', "is 2, out of range", None),
        ('{"question": "Q", "options": ["a", "b"], "correct": -1}', "out of range", None),
        (
            json.dumps({"question": "Q", "options": [f"o{i}" for i in range(27)], "correct": 0}),
            "'options' has 27 items, and at most 26 are allowed",
            None,
        ),
        (
            '{"type": "choice", "question": "Q", "options": ["a", "b"], "correct": 2}',
            "the right option is 2, out of range: there are 2 options, counted from 0.",
            None,
        ),
        ('{"question": "Q", "options": ["a", "b"], "correct": true}', "not true", None),
        ('{"question": "Q", "options": "ab", "correct": 1}', "options must be a list of", None),
        ('{"question": "Q", "choices": ["a", "b"], "answer": "c"}', "none of the 2 opt", "letter"),
        ('{"question": "Q", "choices": ["a", "b"], "answer": "2"}', "is 2, out of range", None),
        ('{"question": "Q", "choices": ["B", "A"], "answer": "A"}', "option 0 or 1", "'correct'"),
        ('{"messages": [{"role": "user", "content": "Hi"}]}', "no assistant turn", "last assi"),
        ('{"messages": [{"role": "assistant", "content": " "}]}', "turn is empty", None),
        (
            '{"messages": [{"role": "assistant", "content": "A"}, '
            '{"role": "user", "content": "?"}]}',
            "does not end with an assistant turn",
            "end it there",
        ),
        ('{"messages": [{"role": "narrator", "content": "Hi"}]}', "'messages[0].role'", None),
        ('{"messages": [{"role": "tool", "content": "Hi"}]}', "names the call it answers", None),
        (
            '{"messages": [{"role": "user", "content": [{"type": "image", "source": "no.png"}]}]}',
            "no.png cannot be read",
            None,
        ),
        ('{"messages": [{"role": "user", "content": null}]}', "[0].content' is empty", None),
        (
            '{"messages": [{"role": "user", "content": "Q"}, '
            '{"role": "assistant", "content": null, "tool_calls": [{"id": "1"}]}]}',
            "'messages[1]' has 'tool_calls'",
            "are texts",
        ),
        (
            '{"messages": [{"role": "user", "content": [{"type": "image_url", "text": null}]}]}',
            "'messages[0].content' has a part that is no text (image_url)",
            "are texts",
        ),
        ('{"conversations": [{"from": "human", "value": "Hi"}]}', "no assistant turn", "last"),
        ('{"messages": []}', "'messages' has too few items", None),
        ('{"question": "Q", "answers": []}', "'answers' must be a list with at least", None),
        ('{"qestion": "Q", "anwser": "A"}', "'qestion', 'anwser'", "(is it 'qestion'?)"),
    ],
)
def test_errors_name_the_line(put: Put, line: str, message: str, hint: str | None) -> None:
    path = put("a.jsonl", f"\n{QA_LINE}\n\n{line}\n")
    error = failure(path)
    assert error.where == "a.jsonl:4"
    assert message in error.problem
    assert (error.hint is None) if hint is None else (hint in str(error.hint))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json", "a.txt", "a.parquet", "a.jsonl.gz"])
def test_empty_file(put: Put, name: str) -> None:
    data = gzip.compress(b"") if name.endswith("gz") else b" \n\n"
    error = failure(put(name, data))
    assert (error.where, error.problem) == (name, "the file is empty.")


@pytest.mark.parametrize(
    ("name", "data"), [("a.csv", b"question,answer\n\n"), ("a.jsonl", b"\xef\xbb\xbf\n")]
)
def test_file_without_records(put: Put, name: str, data: bytes) -> None:
    assert str(failure(put(name, data))) == f"{name}: holds no records."


def test_missing_file_offers_the_nearest_name(put: Put) -> None:
    put("forget.jsonl", QA_LINE)
    error = failure("forgot.jsonl")
    assert str(error) == "forgot.jsonl: no such file. Did you mean 'forget.jsonl'?"
    assert "The folder 'no' does not exist" in str(failure("no/forget.jsonl"))
    assert "write 'hf:locuslab/TOFU'" in str(failure("locuslab/TOFU"))


def test_folder_instead_of_file(put: Put) -> None:
    Path("data").mkdir()
    put("data/forget.jsonl", QA_LINE)
    put("data/notes.md", "")
    error = failure("data")
    assert str(error) == "data: is a folder, not a file. It holds forget.jsonl."


def test_unknown_format(put: Put) -> None:
    error = failure(put("a.docx", "x"))
    assert error.problem == "unknown file format '.docx'."
    assert ".parquet" in str(error.hint)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_bad_encoding_says_the_byte_offset(put: Put, mark: bytes) -> None:
    start = mark + QA_LINE.encode() + b"\n\n"
    data = start + '{"question": "Wo?", "answer": "München"}'.encode("latin-1")
    offset = data.index(b"\xfc")
    error = failure(put("a.jsonl", data))
    assert error.where == "a.jsonl:3"
    assert error.problem == f"not UTF-8: byte 0xfc at offset {offset}."
    assert "Save the file as UTF-8" in str(error.hint)


def test_utf16_is_named(put: Put) -> None:
    assert "looks like UTF-16" in str(failure(put("a.jsonl", QA_LINE.encode("utf-16"))))


def test_broken_gzip(put: Put) -> None:
    whole = gzip.compress(QA_LINE.encode())
    for data in (b"no gzip", whole[:-9], whole[:10] + b"\xff\xff\xff" + whole[13:]):
        assert "broken gzip file" in failure(put("a.jsonl.gz", data)).problem


def test_csv_cells_over_several_lines_and_blank_lines(put: Put) -> None:
    text = (
        "question,answer,perturbed_answer,subject\r\n"
        '"Who, really?","Ada\r\nLovelace.","[""Eve."", ""Mia.""]",\r\n'
        "\r\n"
        "Where?,London.,Paris.,Ada\r\n"
    )
    first, second = read_located(put("a.csv", text))
    assert (first.where, second.where) == ("a.csv:2", "a.csv:5")
    assert first.record == QA(
        question="Who, really?", answer="Ada\r\nLovelace.", perturbed=("Eve.", "Mia.")
    )
    assert second.record == QA(
        question="Where?", answer="London.", perturbed=("Paris.",), subject="Ada"
    )


def test_own_records_in_csv(put: Put) -> None:
    text = (
        "type,question,answer,options,correct,aliases\n"
        'choice,Q,,"[""a"", ""b""]",1,\n'
        "qa,Q,A,,,also A\n"
    )
    assert read_records(put("a.csv", text)) == [
        Choice(question="Q", options=("a", "b"), correct=1),
        QA(question="Q", answer="A", aliases=("also A",)),
    ]


@pytest.mark.parametrize(
    ("text", "where", "message"),
    [
        ("question,answer\nQ\n", "a.csv:2", "the row has 1 cells, the header 2"),
        ("question,answer\nQ,A\n\nQ,A,B\n", "a.csv:4", "the row has 3 cells, the header 2"),
        ('question,answer\nQ,A\n"Q,A\nQ,A\n', "a.csv:3", "broken CSV: unexpected end of data"),
        ("question,answer,answer\nQ,A,B\n", "a.csv:1", "repeated column name"),
        ("question,answer\nQ,\n", "a.csv:2", "'answer' is empty"),
        ("question,choices,answer\nQ,\"['a']\",0\n", "a.csv:2", "'choices' is not valid JSON"),
        (
            'question,choices,answer\nQ,"[""1"", ""2"", ""3""]",2\n',
            "a.csv:2",
            "can be read as option 1 or 2",
        ),
        ("question;answer\nQ;A\nQ\n", "a.csv:3", "the header 2 (separated by semicolons)"),
    ],
)
def test_broken_csv(put: Put, text: str, where: str, message: str) -> None:
    error = failure(put("a.csv", text))
    assert error.where == where
    assert message in error.problem


def test_tab_separated(put: Put) -> None:
    assert read_records(put("a.tsv", "prompt\tcompletion\nQ, or\tA\n")) == [
        QA(question="Q, or", answer="A")
    ]


def test_text_paragraphs_keep_their_lines(put: Put) -> None:
    found = read_located(put("a.txt", "\n\nOne\n  two\r\n \t\n\n\nThree"))
    assert [(item.where, item.record) for item in found] == [
        ("a.txt:3", Passage(text="One\n  two")),
        ("a.txt:8", Passage(text="Three")),
    ]


def test_parquet_rows(put: Put) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [
        {"type": "qa", "question": "Q", "answer": "A", "options": None, "correct": None},
        {"type": "choice", "question": "Q", "answer": None, "options": ["a", "b"], "correct": 1},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), "a.parquet")
    assert read_records("a.parquet") == [
        QA(question="Q", answer="A"),
        Choice(question="Q", options=("a", "b"), correct=1),
    ]
    rows[1] = {**rows[0], "answer": " "}
    parquet.write_table(pyarrow.Table.from_pylist(rows), "b.parquet")
    assert str(failure("b.parquet")) == "b.parquet:2: 'answer' is empty."
    assert "broken Parquet file" in failure(put("c.parquet", b"PAR1 no")).problem


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"\n{QA_LINE}\n{{}}\n".encode()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text)))
    error = failure("-")
    assert error.where == "stdin:3"
    assert "Its columns: none" in error.problem
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(text[:-4])))
    assert read_records("-") == [QA(question="Who?", answer="Ada.")]


def test_in_memory_rows_and_records() -> None:
    record = Passage(text="T")
    assert read_records([{"text": "T"}, record]) == [record, record]
    assert failure([{"text": "T"}, "text"]).where == "records:2"
    assert "is a single mapping" in failure({"text": "T"}).problem
    assert "no source of records" in failure(3).problem
    silent = Dialogue(messages=(Message(role="user", content="Q"),))
    assert failure([record, silent]).where == "records:2"


# Data sets of the hub


class FakeDataset:
    column_names = ("question", "answer")

    def __iter__(self) -> Any:
        return iter([{"question": "Q", "answer": "A"}, {"question": "Q", "answer": ""}][: self.n])

    def __init__(self, n: int = 1) -> None:
        self.n = n


def fake_hub(monkeypatch: pytest.MonkeyPatch, load: Callable[..., Any]) -> None:
    errors = SimpleNamespace(DatasetsError=type("DatasetsError", (Exception,), {}))
    module = SimpleNamespace(load_dataset=load, exceptions=errors)
    monkeypatch.setitem(sys.modules, "datasets", module)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("source", "call"),
    [
        ("hf:locuslab/TOFU", ("locuslab/TOFU", None, None)),
        ("hf:locuslab/TOFU:forget10", ("locuslab/TOFU", "forget10", None)),
        ("hf:cais/wmdp:wmdp-bio:test", ("cais/wmdp", "wmdp-bio", "test")),
        ("hf:a/b::test", ("a/b", None, "test")),
    ],
)
def test_hub_names(
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    call: tuple[Any, ...],
) -> None:
    calls = []

    def load(name: str, config: str | None, split: str | None) -> Any:
        calls.append((name, config, split))
        return FakeDataset() if split else {"train": FakeDataset()}

    fake_hub(monkeypatch, load)
    assert read_records(source) == [QA(question="Q", answer="A")]
    assert calls == [call]
    assert "from the Hugging Face hub" in caplog.messages[0]


def test_hub_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch, lambda *_, **__: {"train": FakeDataset(), "test": FakeDataset()})
    error = failure("hf:a/b:c")
    assert "has the splits train, test" in error.problem
    assert "'hf:a/b:c:train'" in str(error.hint)
    assert "no name of a data set" in failure("hf:a/b:c:d:e").problem

    def load(*_: Any, **__: Any) -> Any:
        raise ValueError("BuilderConfig 'train' not found.\nmore")

    fake_hub(monkeypatch, load)
    error = failure("hf:a/b:train")
    assert "BuilderConfig 'train' not found.)" in error.problem
    assert "hf:owner/name::split" in str(error.hint)
    fake_hub(monkeypatch, lambda *_, **__: FakeDataset(2))
    assert failure("hf:a/b::test").where == "hf:a/b::test:2"


@pytest.mark.parametrize(
    ("module", "source"), [("datasets", "hf:a/b"), ("pyarrow.parquet", "a.parquet")]
)
def test_missing_extra(put: Put, monkeypatch: pytest.MonkeyPatch, module: str, source: str) -> None:
    put("a.parquet", b"PAR1")
    monkeypatch.setitem(sys.modules, module, None)  # type: ignore[arg-type]
    with pytest.raises(MissingExtraError, match=r"pip install 'delible\[data\]'"):
        read_records(source)


def test_dataset_objects() -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"question": "Q", "choices": ["a", "b"], "answer": 1}])
    expected = [Choice(question="Q", options=("a", "b"), correct=1)]
    assert read_records(rows) == expected
    assert read_records(datasets.DatasetDict({"test": rows})) == expected
    error = failure(datasets.DatasetDict({"test": rows, "train": rows}))
    assert "'test', 'train'" in error.problem


def test_reading_imports_nothing_heavy() -> None:
    code = (
        "import sys, delible.loaders as l; l.read_records([{'text': 'T'}]); "
        "print(sorted({'torch', 'pyarrow', 'datasets', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Forms


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"question": "Q", "answer": "A", "paraphrased_question": "P",
             "paraphrased_answer": "B", "perturbed_answer": "C"},
            QA(question="Q", answer="A", paraphrases=("P",), paraphrased_answers=("B",),
               perturbed=("C",)),
        ),
        (
            {"question": "Q", "answer": "A", "perturbed": ["B"], "perturbed_answer": ["C"]},
            QA(question="Q", answer="A", perturbed=("B", "C")),
        ),
        (
            {"question": "Q", "option1": "a", "option2": "b", "option3": "c", "option4": "d",
             "answer": "c"},
            Choice(question="Q", options=("a", "b", "c", "d"), correct=2),
        ),
        ({"text": " T "}, Passage(text="T")),
        ({"text": "T", "subject": "S"}, Passage(text="T", subject="S")),
        (
            {"question": "Q", "choices": ["a", "b"], "answer": 1, "subject": "anatomy"},
            Choice(question="Q", options=("a", "b"), correct=1, subject="anatomy"),
        ),
        (
            {"question": "Q", "options": ["x", "y"], "answer": "B"},
            Choice(question="Q", options=("x", "y"), correct=1),
        ),
        (
            {"question": "Q", "choices": ["Yes ", "no"], "correct": "yes"},
            Choice(question="Q", options=("Yes", "no"), correct=0),
        ),
        (
            {"question": "Q", "choices": ["3", "1"], "answer": "1"},
            Choice(question="Q", options=("3", "1"), correct=1),
        ),
        (
            {"question": "Q", "choices": ["x", "y"], "answer": 1.0},
            Choice(question="Q", options=("x", "y"), correct=1),
        ),
        (
            {"question": "Q", "choices": {"text": ["x", "y"], "label": ["1", "2"]},
             "answerKey": "1"},
            Choice(question="Q", options=("x", "y"), correct=0),
        ),
        (
            {"question": {"stem": "Q", "choices": [{"label": "A", "text": "x"},
                                                   {"label": "B", "text": "y"}]},
             "answerKey": "B"},
            Choice(question="Q", options=("x", "y"), correct=1),
        ),
        (
            {"question": "Q", "mc1_targets": {"choices": ["x", "y"], "labels": [0, 1]}},
            Choice(question="Q", options=("x", "y"), correct=1),
        ),
        (
            {"subject": "S", "query": "Q", "answer": "A", "level": "3", "type": "role play"},
            QA(question="Q", answer="A", subject="S", group="role play"),
        ),
        (
            {"subject": "S", "neighbor": "N", "query": "Q", "answer": "A", "type": "cloze"},
            QA(question="Q", answer="A", subject="N", group="cloze"),
        ),
        (
            {"question": "Q", "answers": ["A", "B", "A"]},
            QA(question="Q", answer="A", aliases=("B",)),
        ),
        ({"prompt": "Q", "completion": "A"}, QA(question="Q", answer="A")),
        ({"prompt": "Q", "response": "A"}, QA(question="Q", answer="A")),
        (
            {"instruction": "Translate", "input": "Haus", "output": "house"},
            QA(question="Translate\n\nHaus", answer="house"),
        ),
        (
            {"messages": [{"role": "user", "content": "Q"},
                          {"role": "assistant", "content": "A "}]},
            Dialogue(messages=(Message(role="user", content="Q"),
                               Message(role="assistant", content="A "))),
        ),
        ({"type": "passage", "text": "T", "group": None}, Passage(text="T")),
    ],
)  # fmt: skip
def test_forms(row: dict[str, Any], expected: Record) -> None:
    assert one(row) == expected


def random_value(chance: random.Random, depth: int = 0) -> Any:
    kinds = [None, True, -1, 0, 1, 2.0, float("nan"), 10**30, "", " ", "A", "b", "1", "[", "\ud800"]
    if depth < 3 and chance.random() < 0.5:
        inner = [random_value(chance, depth + 1) for _ in range(chance.randrange(4))]
        keys = ["role", "content", "label", "text", "stem", "choices", "labels"]
        return (
            inner
            if chance.random() < 0.5
            else dict(zip(chance.sample(keys, len(inner)), inner, strict=True))
        )
    return chance.choice(kinds)


def test_a_row_becomes_a_record_or_a_data_error_with_its_place() -> None:
    chance = random.Random(0)
    places: Counter[str | None] = Counter()
    for _ in range(3000):
        form = chance.choice(FORMS)
        optional = [column for _, column in form.optional if chance.random() < 0.3]
        row = {name: random_value(chance) for name in (*form.required.values(), *optional)}
        try:
            read_records([row])
        except DataError as error:
            places[error.where] += 1
        else:
            places["accepted"] += 1
    assert set(places) == {"records:1", "accepted"}


def test_every_form_needs_other_columns_than_those_before_it() -> None:
    for place, form in enumerate(FORMS):
        for earlier in FORMS[:place]:
            hidden = set(earlier.required.values()) <= set(form.required.values())
            assert not hidden, f"{form.title} can never be reached behind {earlier.title}"


def test_unused_columns_are_noted_once_with_a_suggestion(caplog: pytest.LogCaptureFixture) -> None:
    row = {"question": "Q", "answer": "A", "id": 3, "perturbd": ["B"]}
    assert read_records([row, row]) == [QA(question="Q", answer="A")] * 2
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("records: read as 'question and answer")
    assert caplog.messages[0].endswith(
        "columns not used: 'id', 'perturbd' (did you mean 'perturbed'?)."
    )


def test_notes_go_to_the_log_by_default(caplog: pytest.LogCaptureFixture) -> None:
    read_records([{"text": "T", "id": 3}])
    assert "columns not used: 'id'" in caplog.text


def test_columns_rename_and_may_swap() -> None:
    assert one({"q": "Q", "a": "A"}, columns={"question": "q", "answer": "a"}) == QA(
        question="Q", answer="A"
    )
    swapped = {"question": "answer", "answer": "question"}
    assert one({"question": "Q", "answer": "A"}, columns=swapped) == QA(question="A", answer="Q")


def test_column_errors() -> None:
    error = failure([{"query_text": "Q", "a": "A"}], columns={"question": "query_txt"})
    assert (error.where, error.problem) == (
        "records:1", "there is no column 'query_txt' (for 'question').",
    )  # fmt: skip
    assert error.hint == "Did you mean 'query_text'?"
    error = failure([{"q": "Q"}], columns={"qestion": "q"})
    assert error.hint == "Did you mean 'question'?"
    error = failure([{"q": "Q", "a": {}}], columns={"question": "q", "answer": "a"})
    assert error.problem == "'a' must be text, not an object."


# Writing


def test_writing_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "a.jsonl"
    write_records([Passage(text="old")], path)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(DataError, match="No space left on device"):
            write_records([Passage(text="new")], path)
    assert read_records(path) == [Passage(text="old")]
    assert [p.name for p in path.parent.iterdir()] == ["a.jsonl"]
    write_records([Passage(text="new")], path)
    assert path.read_text() == '{"type": "passage", "text": "new"}\n'


def test_writing_refuses_what_could_not_be_read_back(tmp_path: Path) -> None:
    for records, name, message in (
        ([], "a.jsonl", "no records to write"),
        ([Passage(text="T")], "a.csv", "written as JSONL, not as '.csv'"),
        ([Dialogue(messages=(Message(role="user", content="Q"),))], "a.jsonl", "no assistant"),
    ):
        with pytest.raises(DataError, match=message):
            write_records(records, tmp_path / name)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot be written"):
        write_records([Passage(text="T")], tmp_path / "file" / "a.jsonl")


def test_gzip_written_twice_is_the_same_bytes(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl.gz"
    for path in (first, second):
        write_records([Passage(text="T")], path)
    assert first.read_bytes() == second.read_bytes()
    assert read_records(first) == [Passage(text="T")]


# Requests


def test_nothing_to_forget() -> None:
    for forget in (None, []):
        with pytest.raises(DataError, match=r"nothing to forget. Give forget records \(--forget\)"):
            build_request(forget=forget, retain=[{"text": "T"}])


def test_subjects_only(caplog: pytest.LogCaptureFixture) -> None:
    request = build_request(subjects=["Ada  Lovelace", "ada lovelace ", "Bob"])
    assert request.subjects == ("Ada  Lovelace", "Bob")
    assert caplog.messages == ["Dropped 1 repeated names from the subjects."]
    assert build_request(subjects="Ada").subjects == ("Ada",)
    with pytest.raises(DataError, match="subjects:2: a subject must be a name"):
        build_request(subjects=["Ada", " "])


def test_request_reads_every_part(put: Put) -> None:
    request = build_request(
        forget=put("f.csv", "q,answer\nWho?,Ada.\n"),
        retain=[{"q": "Where?", "answer": "London."}],
        neighbours=[{"q": "When?", "answer": "1815."}],
        holdout=[{"q": "Why?", "answer": "Unknown."}],
        columns={"question": "q"},
    )
    parts = (request.forget, request.retain, request.neighbours, request.holdout)
    assert [part[0].question for part in parts] == ["Who?", "Where?", "When?", "Why?"]  # type: ignore[union-attr]


def test_duplicates_in_the_forget_set_are_dropped_with_a_note(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows = [
        {"question": "Who?", "answer": "Ada."},
        {"question": " who? ", "answer": "ADA."},
        {"question": "Who?", "answer": "Eve."},
        {"question": "Who?", "options": ["Ada.", "Eve."], "correct": 0},
        {"text": "A\n text"},
        {"text": "a text"},
    ]
    request = build_request(forget=rows)
    assert len(request.forget) == 4
    assert caplog.messages == ["Dropped 2 repeated rows from the forget set: forget:2, forget:6."]


OVERLAPS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"question": "Who?", "answer": "Ada."}, {"question": "WHO? ", "answer": "ada."}),
    ({"text": "One two"}, {"text": "one\n\ntwo"}),
    (
        {"question": "Who?", "answer": "Ada."},
        {"question": "Who?", "options": ["Eve.", "Ada."], "correct": 1},
    ),
    (
        {"question": "Who?", "answer": "Ada."},
        {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Who?"},
                      {"role": "assistant", "content": "Ada."}]},
    ),
]  # fmt: skip


@pytest.mark.parametrize("part", ["retain", "neighbours", "holdout"])
@pytest.mark.parametrize(("forgotten", "kept"), OVERLAPS)
def test_overlap(
    caplog: pytest.LogCaptureFixture, part: str, forgotten: dict[str, Any], kept: dict[str, Any]
) -> None:
    other = {"question": "Else?", "answer": "No."}
    rows: dict[str, Any] = {part: [other, kept]}
    with pytest.raises(DataError) as caught:
        build_request(forget=[{"text": "first"}, forgotten], **rows)
    assert f"1 rows are to be forgotten and also stand in {part}: forget:2 = {part}:2." in str(
        caught.value
    )
    assert "drop_overlap=True (--drop-overlap)" in str(caught.value)
    assert "Ada" not in str(caught.value)
    request = build_request(forget=[{"text": "first"}, forgotten], drop_overlap=True, **rows)
    assert getattr(request, part) == (QA(question="Else?", answer="No."),)
    assert len(request.forget) == 2
    assert caplog.messages == [f"Dropped 1 rows from {part} that are to be forgotten: {part}:2."]


def test_same_question_with_another_answer_is_no_overlap() -> None:
    request = build_request(
        forget=[{"question": "Who?", "answer": "Ada."}],
        retain=[{"question": "Who?", "answer": "Eve."}],
    )
    assert len(request.retain) == 1


def test_many_overlaps_are_counted_and_the_first_named(put: Put) -> None:
    rows = "".join(f'{{"question": "Q{i}", "answer": "A"}}\n' for i in range(5))
    with pytest.raises(DataError) as caught:
        build_request(forget=put("f.jsonl", rows), retain=put("r.jsonl", "\n" + rows))
    assert (
        "5 rows are to be forgotten and also stand in retain: f.jsonl:1 = r.jsonl:2, "
        "f.jsonl:2 = r.jsonl:3, f.jsonl:3 = r.jsonl:4 and 2 more."
    ) in str(caught.value)


# Real files

DATA = Path(
    os.environ.get("DELIBLE_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data")
)
needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason="no benchmark files (set DELIBLE_TEST_DATA to their folder)"
)
TOFU = {
    "full": 4000, "retain99": 3960, "retain95": 3800, "retain90": 3600, "forget01": 40,
    "forget05": 200, "forget10": 400, "holdout01": 40, "holdout05": 200, "holdout10": 400,
    "forget01_perturbed": 40, "forget05_perturbed": 200, "forget10_perturbed": 400,
    "retain_perturbed": 400, "real_authors_perturbed": 100, "world_facts_perturbed": 117,
    "real_authors": 100, "world_facts": 117,
}  # fmt: skip
OTHERS: dict[str, tuple[int, type[Any]]] = {
    "rwku/forget_level1.jsonl": (3268, QA),
    "rwku/forget_level2.jsonl": (2879, QA),
    "rwku/forget_level3.jsonl": (6984, QA),
    "rwku/neighbor_level1.jsonl": (5846, QA),
    "rwku/forget_target.jsonl": (200, Passage),
    "rwku/mia_forget.jsonl.gz": (6198, Passage),
    "rwku/train_positive_llama3_target001.jsonl": (582, Passage),
    "rwku/train_refusal_llama3_target001.jsonl": (300, QA),
    **{f"muse/{source}_knowmem_{part}_qa{kind}.json": (10 if kind else 100, QA)
       for source in ("news", "books") for part in ("forget", "retain") for kind in ("", "_icl")},
    "general/mmlu_dev.jsonl": (285, Choice),
    "general/mmlu_test_sample_1140.jsonl": (1140, Choice),
    "general/arc_challenge_test.jsonl": (1172, Choice),
    "general/arc_easy_test.jsonl": (2376, Choice),
    "general/commonsenseqa_dev.jsonl": (1221, Choice),
    "general/truthfulqa_mc.json": (817, Choice),
    "general/truthfulqa.csv": (817, QA),
    "general/triviaqa_sample_1000.jsonl": (1000, QA),
    "general/gsm8k_test.jsonl": (1319, QA),
    "harry_potter/hp_trivia_mc.json": (1239, Choice),
}  # fmt: skip


def real(name: str) -> Path:
    if not (DATA / name).exists():
        pytest.skip(f"{name} is not among the benchmark files")
    return DATA / name


@needs_data
@pytest.mark.parametrize("name", TOFU)
def test_tofu_files(caplog: pytest.LogCaptureFixture, name: str) -> None:
    path = real(f"tofu/{name}.json")
    records = read_records(path)
    raw = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    assert len(records) == len(raw) == TOFU[name]
    assert caplog.messages == []
    for record, row in zip(records, raw, strict=True):
        assert isinstance(record, Choice if "option1" in row else QA)
        assert record.question == row["question"].strip()
        if isinstance(record, Choice):
            assert record.options == tuple(row[f"option{i}"].strip() for i in range(1, 5))
            assert record.options[record.correct].casefold() == row["answer"].strip().casefold()
        if isinstance(record, QA):
            assert record.answer == row["answer"].strip()
            wrong = row.get("perturbed_answer", [])
            assert record.perturbed == tuple(text.strip() for text in wrong)
            assert len(record.paraphrases) == ("paraphrased_question" in row)
            assert len(record.paraphrased_answers) == ("paraphrased_answer" in row)


@needs_data
def test_tofu_refusals_are_plain_text() -> None:
    path = real("tofu/idontknow.jsonl")
    lines = read_lines(path)
    assert len(lines) == 100
    assert lines[0] == "I'm not certain about that."
    error = failure(path)
    assert error.where == f"{path}:1"
    assert "plain text belongs in a .txt file" in str(error.hint)


@needs_data
@pytest.mark.parametrize("name", OTHERS)
def test_other_benchmark_files(name: str) -> None:
    count, model = OTHERS[name]
    records = read_records(real(name))
    assert len(records) == count
    assert all(type(record) is model for record in records)


@needs_data
def test_rwku_probes_keep_subject_and_attack() -> None:
    first = read_records(real("rwku/forget_level3.jsonl"))[0]
    raw = json.loads((DATA / "rwku/forget_level3.jsonl").read_text().split("\n", 1)[0])
    assert isinstance(first, QA)
    assert (first.subject, first.group, first.question, first.answer) == (
        raw["subject"], raw["type"], raw["query"].strip(), raw["answer"].strip(),
    )  # fmt: skip


@needs_data
def test_tofu_splits_make_a_request_without_overlap(caplog: pytest.LogCaptureFixture) -> None:
    request = build_request(
        forget=real("tofu/forget10.json"),
        retain=real("tofu/retain90.json"),
        holdout=real("tofu/holdout10.json"),
    )
    assert (len(request.forget), len(request.retain), len(request.holdout)) == (400, 3600, 400)
    assert caplog.messages == []
    with pytest.raises(DataError, match="400 rows are to be forgotten and also stand in retain"):
        build_request(forget=real("tofu/forget10.json"), retain=real("tofu/full.json"))
