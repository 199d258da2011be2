"""``delible unlearn`` with generated rows: kept in the run, edited by the user, given back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

SHORT = ("--max-steps", "1", "--batch-size", "2", "--learning-rate", "1e-3")


@pytest.fixture
def words(tiny: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("DELIBLE_CACHE", str(here / "cache"))
    (here / "data").mkdir()
    for name, towns in (("forget", ("Norrby", "Umber")), ("retain", ("Casta", "Felden", "Gorm"))):
        rows = [
            {"question": f"Where does {name} {town[0]} live?", "answer": f"In {town}",
             "subject": f"{name} {town[0]}", "group": "town"} for town in towns
        ]  # fmt: skip
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (here / "data" / f"{name}.jsonl").write_text(text)
    data = ["--forget", "data/forget.jsonl", "--retain", "data/retain.jsonl"]
    return ["unlearn", str(tiny), *data, *SHORT]


def test_rows_are_kept_edited_and_given_back(run: Any, here: Path, words: list[str]) -> None:
    done = run(*words, "--method", "altpo", "--count", "2", "--out", "first")
    assert (done.code, done.err) == (0, "")
    assert "altpo (generate alternates, objective altpo, keep nll)" in done.out
    assert "generate: 4 alternates for 2 records" in done.out
    files = {path.name for path in (here / "first" / "generated").iterdir()}
    assert files == {"forget.jsonl", "alternate.jsonl"}
    manifest = json.loads((here / "first" / "manifest.json").read_text())
    assert manifest["generated"]["alternate"]["records"] == 4
    assert manifest["run"]["generator"] is None

    path = here / "first" / "generated" / "alternate.jsonl"
    path.write_text(path.read_text().replace("In ", "Deep in "))
    given = ("--generated", "first/generated", "--out", "second")
    done = run(*words, "--method", "altpo", *given)
    assert (done.code, done.err) == (0, "")
    assert "generate:" not in done.out
    copied = here / "second" / "generated" / "alternate.jsonl"
    assert copied.read_text() == path.read_text()
    again = json.loads((here / "second" / "manifest.json").read_text())
    assert again["run"]["generated"] == again["generated"] != manifest["generated"]

    path.write_text(path.read_text().replace("Deep in ", "Near "))
    done = run(*words, "--method", "altpo", *given)
    assert done.code == 2
    assert "another run (different: generated)" in done.err


def test_the_model_itself_writes_if_asked_and_a_poor_one_is_told_so(
    run: Any, here: Path, words: list[str]
) -> None:
    done = run(
        *words, "--method", "altpo", "--generator", "self", "--count", "1", "--attempts", "2",
        "--alternates.max-new-tokens", "4", "--out", "self",
    )  # fmt: skip
    if done.code:  # random weights rarely write a sentence
        assert "records have fewer than 1 usable alternates" in done.err
        assert "Use a more capable --generator" in done.err
    assert "is asked about 2 of 2 records" in done.out + done.err


def test_what_is_wrong_is_told(run: Any, here: Path, words: list[str]) -> None:
    done = run(*words, "--objective", "altpo", "--out", "a")
    assert done.code == 2
    assert "objective 'altpo' reads 'alternate' rows, and nobody makes them." in done.err
    assert not (here / "a").exists()
    done = run(*words, "--method", "altpo", "--generated", "nowhere", "--out", "b")
    assert done.code == 2
    assert "nowhere: there is no folder of generated rows." in done.err
    done = run(*words, "--objective", "altpo", "--generate", "alternate", "--out", "c")
    assert done.code == 2
    assert "Did you mean 'alternates'?" in done.err


def test_a_dry_run_shows_the_slot(run: Any, here: Path, words: list[str]) -> None:
    done = run(*words, "--method", "tru", "--dry-run")
    assert done.code == 0
    assert "generate:\n  name: reasoning_targets" in done.out
