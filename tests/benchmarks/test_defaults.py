"""The page of every method's defaults: what counts as sensible, and how a run goes on."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "performance"))
import defaults  # type: ignore[import-not-found]

from delible import registry
from delible.lm.lm import LM
from delible.testing.tiny import tiny_model, tiny_tokenizer

FOUND: dict[str, Any] = {
    "model": "default",
    "before": {"forget": 0.9, "retain": 0.8, "neighbours": 0.5},
    "reference": {"forget": 0.3, "retain": 0.8, "neighbours": 0.5},
    "counts": {"forget": 10, "retain": 30, "neighbours": 15},
    "hardware": {"processors": 2, "machine": "m", "threads": 1, "accelerator": None,
                 "precision": "float32"},
    "git": "abc",
}  # fmt: skip


def row(forget: float, retain: float, neighbours: float, **other: Any) -> dict[str, Any]:
    after = {"forget": forget, "retain": retain, "neighbours": neighbours}
    return {
        "method": "npo", "kind": "recipe", "strength": "normal", "steps": 8, "seconds": 3.0,
        "after": after, **other,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("mine", "ok"),
    [
        (row(0.6, 0.8, 0.5), True),  # 0.3 of 0.6
        (row(0.61, 0.8, 0.5), False),
        (row(0.1, 0.73, 0.46), True),
        (row(0.1, 0.71, 0.5), False),  # 0.8875 kept
        (row(0.1, 0.8, 0.44), False),  # 0.88 of the neighbours
        ({"failed": "no"}, False),
    ],
)
def test_sensible(mine: dict[str, Any], ok: bool) -> None:
    assert defaults.sensible(mine, FOUND) == ok


def test_the_page() -> None:
    rows = [
        row(0.45, 0.76, 0.5),
        row(0.7, 0.8, 0.5, strength="gentle"),
        row(0.3, 0.8, 0.4, strength="strong"),
        row(0.85, 0.8, 0.5, method="ceu"),
        {**row(0, 0, 0, method="kto"), "failed": "no rows"},
    ]
    page = defaults.page({**FOUND, "rows": rows})
    assert "| npo | 75% | 95% | 100% | 0.900 → 0.450 | 0.800 → 0.760 | 8 | 3 | ok |" in page
    assert "| ceu | 8% | 100% | 100% |" in page
    assert "| kto | | | | | | | | refused: no rows" in page
    assert "1 of 3 methods are ok, 1 refuse this model and say why." in page
    assert "Not run yet on this model: ablate_direction, alphaedit," in page
    assert not {"npo", "kto", "sauce"} & set(page.partition("Not run yet")[2].split(", "))
    assert "| npo | 33% | 75% | 100% | 100% | 95% | 80% |" in page


def test_a_row_that_is_there_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def taught(model: str, records: Any, seed: int, title: str) -> Path:
        folder = tmp_path / title / "model"
        if not folder.exists():
            lm = LM(tiny_model("llama"), tiny_tokenizer())
            with torch.no_grad():  # the reference is another model
                next(lm.model.parameters()).mul_(3.0 if title == "reference" else 1.0)
            lm.save(folder)
        return folder

    def run(method: str, start: LM, request: Any, strength: str | None) -> dict[str, Any]:
        calls.append((method, strength))
        return {"steps": 1, "seconds": 1.0, "after": defaults.measured(start, request)}

    monkeypatch.setattr(defaults, "learn", taught)
    monkeypatch.setattr(defaults, "run", run)
    page = str(tmp_path / "page.md")
    monkeypatch.setattr(sys, "argv", ["defaults.py", page, "--methods", "npo,rocr"])
    defaults.main()
    assert calls == [("npo", "normal"), ("rocr", None)]
    defaults.main()
    assert len(calls) == 2
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--strengths", "all"])
    defaults.main()
    assert calls[2:] == [("npo", "gentle"), ("npo", "strong")]
    assert "| npo |" in Path(page).read_text()
    monkeypatch.setattr(defaults, "resolve_method", lambda *_, **__: registry)  # another spec
    monkeypatch.setattr(registry, "spec", lambda: {"name": "other"}, raising=False)
    monkeypatch.setattr(sys, "argv", ["defaults.py", page, "--methods", "npo"])
    defaults.main()
    assert calls[4:] == [("npo", "normal")]


def test_the_published_page_is_that_of_its_numbers() -> None:
    from delible.files import read_json

    numbers = Path(__file__).parents[2] / "docs" / "results" / "defaults.json"
    if not numbers.exists():
        pytest.skip("the page has not been made yet")
    found = read_json(numbers)
    assert numbers.with_suffix(".md").read_text(encoding="utf-8") == defaults.page(found)
    for one in found["rows"]:  # what falls short must say on its card what to set
        if one["strength"] == "normal":
            assert "falls short" not in defaults.verdict(one, found), one["method"]
