"""Pictures of records in files: relative to the file, known by their bytes, and told if missing."""

from __future__ import annotations

import base64
import csv
import json
from pathlib import Path
from typing import Any

import pytest

from delible.errors import DataError
from delible.loaders import build_request, read_records, write_records
from delible.messages import ImagePart
from delible.records import QA, Choice, Dialogue, ForgetRequest, images_of

GIF, OTHER = b"GIF89a one", b"GIF89a other"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "data" / "pictures").mkdir(parents=True)
    (tmp_path / "data" / "pictures" / "one.gif").write_bytes(GIF)
    (tmp_path / "data" / "other.gif").write_bytes(OTHER)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "data"


def lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def contents(record: Any) -> list[bytes]:
    return [image.content() for image in images_of(record)]


def test_paths_are_from_the_file_wherever_one_stands(folder: Path) -> None:
    path = lines(
        folder / "rows.jsonl",
        {"question": "What?", "answer": "a", "images": ["pictures/one.gif", "other.gif"]},
        {"question": "What?", "answer": "a", "image": "other.gif"},
        {"type": "qa", "question": "What?", "answer": "b", "images": ["pictures/one.gif"]},
        {"question": "Which?", "options": ["a", "b"], "correct": 0, "images": ["other.gif"]},
        {"question": "Hm?", "answer": "c", "image": str(folder / "other.gif")},
        {"question": "Hm?", "answer": "c", "image": {"path": "other.gif", "bytes": None}},
        {"question": "Hm?", "answer": "d"},
        {"messages": [
            {"role": "user", "content": [{"type": "image", "source": "other.gif"}, "What?"]},
            {"role": "assistant", "content": "A"},
        ]},
    )  # fmt: skip
    for name in (str(path), Path("data") / "rows.jsonl"):
        found = read_records(name)
        assert [contents(one) for one in found] == [
            [GIF, OTHER], [OTHER], [GIF], [OTHER], [OTHER], [OTHER], [], [OTHER],
        ]  # fmt: skip
    assert isinstance(found[3], Choice)
    assert isinstance(found[7], Dialogue)


def test_data_urls_bytes_and_csv(folder: Path) -> None:
    url = f"data:image/gif;base64,{base64.b64encode(GIF).decode()}"
    rows = [{"question": "Q", "answer": "A", "images": [url]},
            {"question": "Q", "answer": "A", "image": {"bytes": GIF, "path": "lost.gif"}},
            {"question": "Q", "answer": "A", "image": folder / "other.gif"}]  # fmt: skip
    first, second, third = read_records(rows)
    assert first == second
    assert first.digest == second.digest
    assert contents(third) == [OTHER]
    with (folder / "rows.csv").open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerows([["question", "answer", "image"], ["Q", "A", "other.gif"], ["P", "B", ""]])
    assert [contents(one) for one in read_records(folder / "rows.csv")] == [[OTHER], []]


@pytest.mark.parametrize(
    ("image", "told"),
    [
        ("no.gif", r"rows\.jsonl:2: 'images\[0\]': the picture .*no\.gif cannot be read"),
        ("rows.jsonl", "no picture of a known kind"),
        ("https://example.org/a.png", "not fetched from addresses"),
        ("data:image/gif;base64,%%%", "holds no base64"),
        (7, r"rows\.jsonl:2: 'images' must name pictures, not the number 7"),
        ({"source": "other.gif", "sha256": "0" * 64}, "another one than its sha256 says"),
    ],
)
def test_what_is_no_picture_is_told_with_its_line(folder: Path, image: Any, told: str) -> None:
    path = lines(
        folder / "rows.jsonl",
        {"question": "Q", "answer": "A"},
        {"question": "Q", "answer": "B", "images": [image]},
    )
    with pytest.raises(DataError, match=told):
        read_records(path)


def test_what_is_written_is_read_back_and_a_changed_picture_is_noticed(folder: Path) -> None:
    one = QA(question="Q", answer="A",
             images=(ImagePart.model_validate({"source": str(folder / "other.gif")}),))  # fmt: skip
    plain = QA(question="P", answer="A")
    write_records([one, plain], folder.parent / "elsewhere" / "out.jsonl")
    assert read_records(folder.parent / "elsewhere" / "out.jsonl") == [one, plain]
    (folder / "other.gif").write_bytes(GIF)
    with pytest.raises(DataError, match="another one than its sha256 says"):
        read_records(folder.parent / "elsewhere" / "out.jsonl")
    with pytest.raises(DataError, match="has changed since"):
        one.images[0].content()


def test_the_same_words_about_other_pictures_are_other_facts(folder: Path) -> None:
    rows = [{"question": "What?", "answer": "a", "image": name}
            for name in ("other.gif", "pictures/one.gif", "other.gif")]  # fmt: skip
    path = lines(folder / "forget.jsonl", *rows)
    found = build_request(forget=path)
    assert [contents(one) for one in found.forget] == [[OTHER], [GIF]], "a repeated one is dropped"
    kept = lines(folder / "retain.jsonl", rows[1])
    with pytest.raises(DataError, match="also stand in retain"):
        build_request(forget=path, retain=kept)
    again = ForgetRequest.model_validate_json(found.model_dump_json())
    assert again == found
    assert again.id == found.id
    moved = folder / "moved.gif"
    moved.write_bytes(OTHER)
    elsewhere = QA(question="What?", answer="a",
                   images=(ImagePart.model_validate({"source": str(moved)}),))  # fmt: skip
    assert elsewhere.digest == found.forget[0].digest
