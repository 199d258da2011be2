"""A request that was carried out leaks again when the model is released in 4 bits.

The model knows facts whose forgetting is a small change of its weights; q4_0 rounds it away.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import delible
import walk_model
from delible.cli import main
from delible.ledger.requests import requests_of
from delible.ledger.store import Ledger
from delible.lm.grids import q4_0
from delible.lm.lm import LM
from delible.lm.matrices import linear_weights
from gguf_files import write_q4_0

CSV = """id,basis,question,answer,subject
a-1,erasure,Where was Ada Quill born?,In Norrby.,Ada Quill
a-2,licence,Where was Ben Orr born?,In Casta.,Ben Orr
"""
KEPT = "question,answer\n" + "".join(
    f"Where was {name} born?,In {town}.\n"
    for name, (town, _) in list(walk_model.PEOPLE.items())[5:]
)
#: The first is forgotten by a change that rounding undoes; the second stays behind a guard.
POLICY = """
rules:
  - {basis: [erasure], method: npo, options: {epochs: 60, stop_at_forget_share: 0.05}}
  - {guard: true}
utility: {budget: 0.2}
guard: {targets: targets.yaml}
retain: kept.csv
"""


def test_it_leaks_in_four_bits_and_not_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    pytest.importorskip("gguf")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DELIBLE_LEDGER", str(tmp_path / "l.sqlite"))
    monkeypatch.setenv("DELIBLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    for name, text in (("r.csv", CSV), ("kept.csv", KEPT), ("policy.yaml", POLICY)):
        Path(name).write_text(text)
    walk_model.make(Path("model"), epochs=30)

    def run(*words: str) -> tuple[int, str]:
        capsys.readouterr()
        return main([*words]), capsys.readouterr().out

    assert run("request", "add", "r.csv", "--model", "model")[0] == 0
    code, out = run("request", "apply", "model", "--policy", "policy.yaml")
    assert code == 0, out
    assert "a-1: applied. Forgotten" in out
    (applied,) = (one for one in Ledger(tmp_path / "l.sqlite").events() if one.kind == "applied")
    folder = str(tmp_path / applied.body["run"])

    code, out = run("request", "check", "model", "--system", folder, "--only", "a-1")
    assert code == 0, out
    assert "Nothing leaks" in out

    forgotten = delible.open(folder)
    assert isinstance(forgotten, LM)
    write_q4_0(forgotten, Path("deployed.gguf"))
    deployed = linear_weights(delible.open("deployed.gguf"))  # type: ignore[arg-type]
    for name, weight in linear_weights(forgotten).items():
        assert deployed[name].equal(q4_0(weight)), "the file holds what the format says"

    code, out = run("request", "check", "model", "--system", "deployed.gguf", "--only", "a-1")
    assert code == 1, out
    assert "deployed.gguf leaks: a-1." in out
    assert "then" in out, "compared with the day's numbers"
    progress = {
        name: one.progress["model"].word
        for name, one in requests_of(Ledger(tmp_path / "l.sqlite").events()).items()
    }
    assert progress == {"a-1": "applied, leaks", "a-2": "guarded"}
