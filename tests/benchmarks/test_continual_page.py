"""The page of many requests: tables, and what it says of claims."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "performance"))
import continual_page  # type: ignore[import-not-found]

from delible.errors import RunError
from delible.experiments.continual.findings import Point, findings
from delible.files import read_json, write_json


def points(*scores: tuple[int, float, float, int]) -> list[Point]:
    return [Point(n, {"forget": f, "retain": r}, seed) for n, f, r, seed in scores]


def written(folder: Path, **other: Any) -> Path:
    found = findings(
        {
            "original": points((10, 90, 80, 0), (20, 90, 80, 0)),
            "reference": points((10, 20, 80, 0), (20, 20, 80, 0)),
            "fit": points((10, 20, 80, 0), (20, 20, 76, 0), (10, 20, 80, 1), (20, 22, 72, 1)),
            "npo": points((10, 20, 60, 0), (20, 20, 20, 0), (10, 20, 60, 1), (20, 20, 24, 1)),
        },
        {"fit": [], "npo": []}, {"o3, seed 0": "too little memory."},
    )  # fmt: skip
    folder.mkdir(parents=True)
    write_json(folder / "experiment.json", {
        "model": "tiny", "rows": found.rows, "runs": found.runs, "notes": found.notes,
        "command": "delible bench continual --model tiny", "seconds": 600.0,
        "git_revision": "abcdef0123456", "versions": {}, "left out": 1,
        "hardware": {"processors": 2, "machine": "m", "threads": 1, "accelerator": None,
                     "precision": "float32"}, **other,
    })  # fmt: skip
    return folder


def test_the_page_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "continual.md"
    monkeypatch.setattr(sys, "argv", ["continual_page.py", str(page), str(tmp_path)])
    with pytest.raises(RunError, match="has the run ended"):
        continual_page.main()
    monkeypatch.setattr(sys, "argv", [*sys.argv[:2], str(written(tmp_path / "run"))])
    continual_page.main()
    text = page.read_text("utf-8")
    assert "| reference | 20 | 1.00 | 1.00 | 20.0 | 80.0 | – | – | 0 |" in text
    # 76 / 80 and 72 / 80; 20 / 24 would be farther above than below
    assert "| fit | 20 |" in text
    assert "0.93 (0.61 to 1.24) | cannot be told |" in text
    assert "| below 0.5 | 0.28 (-0.04 to 0.59) | cannot be told |" in text
    assert "| retain utility of o3, last point | above 0.8 | – | not run |" in text
    assert "- o3, seed 0 ended early: too little memory." in text
    assert "10 minutes (other work on the machine included)" in text
    again = read_json(page.with_suffix(".json"))
    assert "left out" not in again["runs"][0]
    assert continual_page.page(again) == text
    other = written(tmp_path / "other", model="default")
    monkeypatch.setattr(sys, "argv", [*sys.argv[:2], str(other)])
    continual_page.main()
    assert page.read_text("utf-8").count("## Model") == 2


def test_the_published_page_is_that_of_its_numbers() -> None:
    numbers = Path(__file__).parents[2] / "docs" / "results" / "continual.json"
    if not numbers.exists():
        pytest.skip("the page has not been made yet")
    found = read_json(numbers)
    assert numbers.with_suffix(".md").read_text("utf-8") == continual_page.page(found)
