"""The page of the on-policy methods: its tables, and what it says of claims."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "performance"))
import onpolicy_page  # type: ignore[import-not-found]

from delible.errors import RunError
from delible.files import read_json, write_json

SAID, OVER = onpolicy_page.SAID, onpolicy_page.OVER_REFUSED


def cell(method: str, seed: int, said: float, refused: float, **other: Any) -> dict[str, Any]:
    return {
        "method": method, "seed": seed, "seconds": 10.0 + seed, "peak_bytes": 1,
        "notes": {"stopped": None}, "numbers": {SAID: said, OVER: refused, "other": 1.0},
        **other,
    }  # fmt: skip


def written(folder: Path) -> Path:
    (folder / "cells").mkdir(parents=True)
    write_json(folder / "bench.json", {
        "benchmark": {"name": "world", "people": 20, "forget": 2}, "model": "tiny", "tune": 0,
        "versions": {}, "hardware": {"processors": 2, "machine": "m", "threads": 1,
                                     "accelerator": None, "precision": "float32"},
    })  # fmt: skip
    drawn = {"notes": {"generated_tokens": 1200, "steps": 30}}
    cells = [
        cell("original", 0, 0.9, 0.0), cell("reference", 0, 0.1, 0.0),
        cell("rule", 0, 0.2, 0.1, **drawn), cell("rule", 1, 0.1, 0.2, **drawn),
        cell("npo", 0, 0.5, 0.0), cell("idk", 0, 0.0, 0.9), cell("idk", 1, 0.0, 0.7),
        {**cell("purge", 0, 0, 0), "failed": "no names", "numbers": {}},
    ]  # fmt: skip
    for number, one in enumerate(cells):
        write_json(folder / "cells" / f"{number}.json", one)
    return folder


def test_a_table_and_its_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    audits = tmp_path / "audits"
    audits.mkdir()
    page = tmp_path / "onpolicy.md"
    asked = ["onpolicy_page.py", str(page), str(written(tmp_path / "run")), "--audits"]
    monkeypatch.setattr(sys, "argv", [*asked, str(audits)])
    with pytest.raises((RunError, FileNotFoundError)):
        onpolicy_page.main()
    write_json(audits / "experiment.json", {
        "model": "tiny", "experiment": {"depth": "quick"},
        "rows": [{"method": "rule", "verdict": "suppressed"}],
    })  # fmt: skip
    onpolicy_page.main()
    text = page.read_text("utf-8")
    # means over two seeds; Student's half width of (0.2, 0.1) is 0.05 x 12.706
    assert "| rule | 0.15 ± 0.64 | 0.15 ± 0.64 | 1,200 | 30 | 10 | suppressed (quick) |" in text
    assert "| npo (1 of 2 seeds) | 0.50 | 0.00 |" in text
    assert "## Model `tiny`, defaults" in text
    assert "| original | 0.90 | 0.00 | – | – | – | – |" in text
    assert "| purge | failed: no names |" in text
    said = {line.split(" | ")[0]: line for line in text.splitlines() if line.startswith("| RULE")}
    # 0.8 and 0.5 fewer neighbours refused; 0.7 and 0.8 less said than the one original
    assert "| 0.65 (-1.26 to 2.56) | cannot be told |" in said[next(iter(said))]
    assert "| 0.75 (0.11 to 1.39) | cannot be told |" in said["| RULE: the forget questions are "
                                                             "not answered any more"]  # fmt: skip
    assert "above 0.5" in text
    assert text.count("not run") == 4  # purge thrice, and reinvent
    again = read_json(page.with_suffix(".json"))
    assert onpolicy_page.page(again) == text


def test_the_published_page_is_that_of_its_numbers() -> None:
    numbers = Path(__file__).parents[2] / "docs" / "results" / "onpolicy.json"
    if not numbers.exists():
        pytest.skip("the page has not been made yet")
    found = read_json(numbers)
    assert numbers.with_suffix(".md").read_text("utf-8") == onpolicy_page.page(found)
