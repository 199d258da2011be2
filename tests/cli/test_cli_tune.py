"""``delible tune`` on a tiny model: what it prints, what it leaves, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from delible.cli.docs import help_page

QUICK = ("--max-steps", "1", "--batch-size", "2", "--learning-rate", "1e-3")


def test_help() -> None:
    page = help_page("tune")
    for part in ("--trials", "--utility", "--hold", "--method", "delible tune default", "0.95"):
        assert part in page, part


def test_end_to_end_and_again(run: Any, here: Path, tiny: Path) -> None:
    pytest.importorskip("optuna")
    command = [
        "tune", str(tiny), "--forget", "forget.jsonl", "--retain", "retain.jsonl", *QUICK,
        "--hold", "retain-weight", "--utility", "0.01", "--trials", "2",
    ]  # fmt: skip
    done = run(*command)
    assert (done.code, done.err) == (0, "")
    (folder,) = (here / "runs").iterdir()
    assert folder.name.startswith("tune-npo-")
    for part in (
        "2 trials, utility 0.01 or more", "trial 1 of 2: leak ", "trial 2 of 2: leak ", "beta",
        "the winner", "tune.html", f"--method {Path('runs') / folder.name / 'recipe.yaml'}",
    ):  # fmt: skip
        assert part in done.out, part
    assert "retain weight" not in done.out
    assert {"trials.json", "tune.html", "recipe.yaml", "manifest.json"} <= {
        path.name for path in folder.iterdir()
    }
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["status"], manifest["trials"]) == ("done", 2)

    again = run(*command)
    assert again.code == 0
    assert "All 2 trials are finished already." in again.out
    assert [path.name for path in (here / "runs").iterdir()] == [folder.name]


def test_refusals(run: Any, here: Path, tiny: Path) -> None:
    pytest.importorskip("optuna")
    start = ["tune", str(tiny), "--forget", "forget.jsonl"]
    for words, said in (
        (["--utility", "95"], "utility = 95 is not in (0, 1]"),
        (["--trials", "0"], "trials = 0"),
        (["--hold", "bet"], "unknown option 'bet'"),
        (["--bet", "1"], "unknown option 'bet'"),
        (["--method", "nop"], "unknown method 'nop'. Did you mean 'npo'?"),
    ):
        done = run(*start, *words)
        assert done.code == 2, words
        assert said in done.err, done.err
    assert not (here / "runs").exists()
    done = run("tune", str(tiny))
    assert "there is nothing to forget" in done.err
