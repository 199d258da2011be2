"""The walk of a new user with a method of each kind: unlearn, audit, report, open, undo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import delible
from delible.cli import main
from delible.lm.lm import LM
from delible.loaders import write_records
from delible.system.artefact import read
from delible.system.asks import Decoding, Prompt
from delible.system.base import System
from delible.testing.contract.trial import FORGET, RETAIN
from delible.testing.tiny import tiny_model, tiny_tokenizer

METHODS = {
    "npo": ("model", ["--max-steps", "2"]),
    "graddiff": ("adapter", ["--place", "lora", "--max-steps", "2", "--learning-rate", "0.01"]),
    "rocr": ("patch", ["--tokens", "256", "--threshold", "0.3"]),
    "ablate_direction": ("intervention", []),
    "grace": ("codebook", ["--steps", "2"]),
    "o3": ("router", ["--backbone", "states", "--max-steps", "4", "--learning-rate", "0.02"]),
    "target_detector": ("guard", ["--similarity", "false"]),
}
PROMPTS = [Prompt.ask(record.question) for record in (*FORGET, *RETAIN)]


def said(system: System) -> list[str]:
    inner: Any = system
    while hasattr(inner, "system"):
        inner = inner.system
    inner.precision = "float32"
    return [str(text) for text in system.generate(PROMPTS, Decoding(8))]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("walk")
    LM(tiny_model("llama"), tiny_tokenizer()).save(folder / "model")
    write_records(FORGET, folder / "forget.jsonl")
    write_records(RETAIN, folder / "retain.jsonl")
    return folder


def command(place: Path, *words: str) -> int:
    return main([*words, "--forget", str(place / "forget.jsonl"),
                 "--retain", str(place / "retain.jsonl")])  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_unlearn_audit_open_undo(
    place: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, options = METHODS[method]
    base, out = str(place / "model"), place / method
    assert command(place, "unlearn", base, "--method", method, "--out", str(out), *options) == 0
    told = capsys.readouterr().out
    assert f"delible audit {out}" in told
    artefact = read(out)
    assert artefact.kind == kind
    assert artefact.base is not None
    assert (out / "model").exists() == (kind == "model"), "a whole model beside the artefact"
    opened = delible.open(str(out))
    mine, plain = said(opened), said(delible.open(base))
    assert mine != plain
    again = command(place, "unlearn", base, "--method", method, "--out", str(out), *options)
    assert again == 0
    assert "finished" in capsys.readouterr().out
    code = main(
        ["audit", str(out), "--attacks", "prefix", "--metrics", "answer_probability,outcome"]
    )
    told = capsys.readouterr()
    assert code == 0, told.err
    metrics = json.loads((out / "metrics.json").read_text())
    parts = [row["variant"] for row in metrics["leaks"] if row["attack"] == "without_part"]
    assert bool(parts) == (kind != "model"), "the part that can be taken away has no row"
    undone = main(["undo", str(out)])
    if kind == "model":
        assert undone == 2
        assert base in capsys.readouterr().err
        return
    assert undone == 0
    assert said(delible.open(str(out))) == plain
    assert main(["undo", str(out), "--back"]) == 0
    assert said(delible.open(str(out))) == mine


def test_one_page_compares_them(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [place / method for method in METHODS if (place / method / "metrics.json").exists()]
    if len(runs) < 2:
        pytest.skip("the runs are made by the tests before")
    page = place / "all.html"
    assert main(["report", *map(str, runs), "--out", str(page)]) == 0
    text = page.read_text()
    assert all(run.name in text for run in runs)


def test_one_request_after_another_is_a_chain(place: Path) -> None:
    """A guard over a patch over an adapter, each by its own run on the one before."""
    before, plain = str(place / "model"), said(delible.open(str(place / "model")))
    requests = []
    for step, method in enumerate(("rocr", "ablate_direction", "target_detector")):
        out = place / f"step-{step}"
        _, options = METHODS[method]
        assert (
            command(place, "unlearn", before, "--method", method, "--out", str(out), *options) == 0
        )
        manifest = json.loads((out / "manifest.json").read_text())
        assert [one["request"] for one in manifest["chain"]] == requests
        requests.append(manifest["request"])
        before = str(out)
    system: Any = delible.open(before)
    taken = []
    while (found := system.taken_off()) is not None:
        title, system = found
        taken.append(title)
    assert taken == ["guard 'target_detector'", "intervention 'ablate_direction'", "patch of rocr"]
    assert said(system) == plain
    assert len(set(requests)) == 3, "a request after another one is the same request"
