"""``delible memory``: filled, searched, and made to forget, in the words that people read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from runs_of_commands import Run


@pytest.fixture
def filled(run: Run, here: Path) -> Path:
    rows = [
        {"id": "ada-1", "text": "Ada Brook lives in Casta", "subject": "Ada Brook"},
        {"id": "sum-1", "text": "One of the neighbours sings", "kind": "summary",
         "parents": ["ada-1"]},
        {"id": "jon-1", "text": "Jon Lind grows plums and sings", "kind": "case"},
    ]  # fmt: skip
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (here / "items.jsonl").write_text(lines, encoding="utf-8")
    ran = run("memory", "add", "notes", "items.jsonl", "--words-only")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out == "notes: 3 items added, 3 in all.\n"
    return here / "notes"


def test_it_is_searched_and_listed(run: Run, filled: Path) -> None:
    found = run("memory", "search", "notes", "who", "sings?")
    assert found.code == 0
    assert [line.split()[0] for line in found.out.splitlines() if "-1" in line] == [
        "sum-1", "jon-1",
    ]  # fmt: skip
    listed = run("memory", "list", "notes", "--kind", "case", "--json")
    assert [json.loads(line)["id"] for line in listed.out.splitlines()] == ["jon-1"]
    assert "3 items." in run("memory", "list", "notes").out


def test_forgetting_shows_the_closure_and_writes_a_certificate(run: Run, filled: Path) -> None:
    dry = run("memory", "forget", "notes", "--subject", "ada brook", "--dry-run")
    assert dry.code == 0
    assert "goes: about ada brook" in dry.out
    assert "goes: made from ada-1" in dry.out
    assert "Nothing is changed" in dry.out
    assert "3 items." in run("memory", "list", "notes").out
    assert not (filled / "certificates").exists()
    ran = run("memory", "forget", "notes", "--subject", "ada brook")
    assert ran.code == 0, ran.err
    assert "2 items removed, 1 left." in ran.out
    assert "Nothing was found." in ran.out
    written = json.loads((filled / "certificates" / "1.json").read_text(encoding="utf-8"))
    assert written["verdict"] == "nothing found"
    assert written["deletion"]["removed_by_kind"] == {"entry": 1, "summary": 1}
    page = (filled / "certificates" / "1.html").read_text(encoding="utf-8")
    assert "Nothing was found" in page
    for sentence in written["not_computed"]:
        assert sentence.split(":")[0].replace("'", "&#39;") in page
    for text in (page, json.dumps(written)):
        assert "Casta" not in text
        assert "Ada" not in text
    again = run("memory", "forget", "notes", "--subject", "ada brook")
    assert (again.code, "nothing matches 'ada brook'" in again.err) == (2, True)
    back = run("memory", "add", "notes", "items.jsonl")
    assert (back.code, "was deleted from this memory" in back.err) == (2, True)


def test_several_texts_all_go_or_nothing_does(run: Run, filled: Path) -> None:
    lost = run("memory", "forget", "notes", "--text", "grows plums", "--text", "nowhere")
    assert lost.code != 0
    assert "nothing matches 'nowhere'" in lost.err
    assert "3 items." in run("memory", "list", "notes").out
    ran = run("memory", "forget", "notes", "--text", "grows plums", "--text", "lives in Casta")
    assert ran.code == 0, ran.err
    assert "3 items removed, 0 left." in ran.out


def test_descendants_can_be_quarantined(run: Run, filled: Path) -> None:
    ran = run("memory", "forget", "notes", "--id", "ada-1", "--descendants", "quarantine")
    assert (ran.code, "is quarantined: made from ada-1" in ran.out) == (0, True)
    assert "sum-1" in run("memory", "list", "notes", "--quarantined").out
    assert "sum-1" not in run("memory", "list", "notes").out


def test_remains_are_an_exit_code(run: Run, filled: Path) -> None:
    (filled / "old.txt").write_text("Ada Brook lives in Casta", encoding="utf-8")
    ran = run("memory", "forget", "notes", "--text", "lives in casta", "--out", "here/c.json")
    assert ran.code == 1
    assert "Remains were found" in ran.out
    assert "old.txt at byte 0" in Path("here/c.html").read_text(encoding="utf-8")
    certified = run("memory", "certify", "notes", "--text", "Ada Brook lives in Casta")
    assert certified.code == 1
    (filled / "old.txt").unlink()
    assert run("memory", "certify", "notes", "--text", "Ada Brook lives in Casta").code == 0
    assert json.loads(run("memory", "certify", "notes", "--json").out)["counted"]


def test_records_are_added_by_meaning(
    run: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np

    class Letters:
        identity = "letters"

        def encode(self, texts: Sequence[str]) -> np.ndarray:
            rows = [[text.lower().count(letter) for letter in "townjbers0123"] for text in texts]
            return np.array(rows, dtype=np.float32)

    monkeypatch.setattr("delible.lm.encoder.sentence_encoder", lambda folder: Letters())
    assert run("memory", "add", "m", "forget.jsonl", "retain.jsonl").out == (
        "m: 8 items added, 8 in all.\n"
    )
    found = run("memory", "search", "m", "Town of person 2?", "--count", "1", "--json")
    told = json.loads(found.out)
    assert (told["text"], told["note"]) == ("Town of person 2?\nTown 2.", "1.000")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["add", "notes"], "a file is missing"),
        (["search", "notes"], "a query is missing"),
        (["list", "notes", "more"], "one word too many"),
        (["forget", "notes"], "nothing is named"),
        (["forget", "notes", "--id", "ada-1", "--text", "x"], "named in one way"),
        (["list", "notes", "--dry-run"], "only forget has a --dry-run"),
        (["list", "nowhere"], "holds no memory"),
        (["forget", "notes", "--id", "ada"], "no item has the id 'ada'"),
        (["add", "notes", "wrong.jsonl"], "wrong.jsonl:1: unknown field 'parent'"),
    ],
)
def test_mistakes_are_told(run: Run, filled: Path, words: list[str], told: str) -> None:
    Path("wrong.jsonl").write_text('{"text": "x", "id": "y", "parent": []}\n', encoding="utf-8")
    ran = run("memory", *words)
    assert ran.code == 2
    assert told in ran.err
    assert not Path("nowhere").exists()
