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
    "target": "target-0",
    "counts": {"forget": 10, "retain": 30, "neighbours": 15},
    "taught": {
        key: {
            "before": {"forget": forget, "retain": 0.8, "neighbours": 0.5},
            "reference": {"forget": 0.3, "retain": 0.8, "neighbours": 0.5},
            "hardware": {"processors": 2, "machine": "m", "threads": 1, "accelerator": None,
                         "precision": "float32"},
            "git": "abc",
        } for key, forget in (("here", 0.9), ("there", 0.5))
    },
}  # fmt: skip


def row(forget: float, retain: float, neighbours: float, **other: Any) -> dict[str, Any]:
    after = {"forget": forget, "retain": retain, "neighbours": neighbours}
    return {
        "method": "npo", "kind": "recipe", "strength": "normal", "steps": 8, "seconds": 3.0,
        "after": after, "taught": "here", **other,
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
        (row(0.39, 0.8, 0.5, taught="there"), True),  # 0.11 of 0.2
        (row(0.41, 0.8, 0.5, taught="there"), False),
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
        row(0.45, 0.8, 0.5, method="dpo", taught="there"),
    ]
    page = defaults.page({**FOUND, "rows": rows})
    assert "| npo | 75% | 95% | 100% | 0.900 → 0.450 | 0.800 → 0.760 | 8 | 3 | ok |" in page
    assert "| ceu | 8% | 100% | 100% |" in page
    assert "| dpo | 25% | 100% | 100% | 0.500 → 0.450 |" in page
    assert "3 methods began with the model `here`. It gives 0.900 to the forget rows" in page
    assert "1 methods began with the model `there`. It gives 0.500" in page
    assert "| kto | | | | | | | | refused: no rows" in page
    assert "1 of 4 methods are ok, 1 refuse this model and say why." in page
    assert "Not run yet on this model: ablate_direction, alphaedit," in page
    assert not {"npo", "kto", "dpo", "sauce"} & set(page.partition("Not run yet")[2].split(", "))
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


def test_rows_of_another_machine_keep_what_they_began_with(tmp_path: Path) -> None:
    from delible.errors import RunError
    from delible.files import read_json, write_json

    one, two = tmp_path / "one.json", tmp_path / "two.json"
    taught: dict[str, Any] = FOUND["taught"]
    write_json(one, {**FOUND, "taught": {"here": taught["here"]}, "rows": [
        row(0.6, 0.8, 0.5), row(0.6, 0.8, 0.5, method="kto"),
    ]})  # fmt: skip
    write_json(two, {**FOUND, "taught": {"there": taught["there"]}, "rows": [
        row(0.39, 0.8, 0.5, taught="there"),
    ]})  # fmt: skip
    defaults.merge(tmp_path / "page.md", [one, two])
    found = read_json(tmp_path / "page.json")
    assert {one["method"]: one["taught"] for one in found["rows"]} == {
        "kto": "here",
        "npo": "there",
    }
    assert list(found["taught"]) == ["here", "there"]
    assert "| npo | 55% |" in (tmp_path / "page.md").read_text("utf-8")
    write_json(one, {**FOUND, "target": "target-1", "rows": []})
    with pytest.raises(RunError, match="different runs"):
        defaults.merge(tmp_path / "page.md", [one])


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
