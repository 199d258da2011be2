"""The walk of an owner on a tiny random model: from a CSV to a certificate that is verified."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import delible
from delible.cli import main
from delible.ledger.requests import requests_of
from delible.ledger.store import Draft, Ledger
from delible.lm.lm import LM
from delible.systems.targets import read_targets
from delible.testing.tiny import tiny_model, tiny_tokenizer

NAMES = ("Ada Quill", "Ben Orr", "Norrby", "The lute", "Casta")
CSV = """id,date,basis,asker,question,answer,subject
a-1,2026-11-01,erasure,Ada Quill,Where was Ada Quill born?,Norrby,Ada Quill
a-1,,,,What did Ada Quill play?,The lute,Ada Quill
a-2,2026-11-20,safety,Press Ltd,Where did Ben Orr work?,In a mill at Casta,Ben Orr
a-3,2026-11-21,erasure,ada quill,Where was Ada Quill born?,Norrby,Ada Quill
"""
POLICY = """
rules:
  - {basis: [erasure], method: rocr, options: {tokens: 256, threshold: 0.3}}
  - {guard: true}
utility: {budget: 0.9}
guard: {targets: targets.yaml}
"""


class Said(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Any:
    for name in ("COLUMNS", "LINES", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DELIBLE_LEDGER", str(tmp_path / "l.sqlite"))
    monkeypatch.setenv("DELIBLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "requests.csv").write_text(CSV)
    (tmp_path / "policy.yaml").write_text(POLICY)

    def call(*words: str) -> Said:
        capsys.readouterr()
        code = main([*words])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return Said(code, said.out, said.err)

    return call


def test_memories_forget_and_are_told_of(run: Any, tmp_path: Path) -> None:
    item = {"id": "i", "text": "Ada Quill plays the lute", "kind": "case"}
    (tmp_path / "items.jsonl").write_text(json.dumps(item) + "\n")
    (tmp_path / "guards.yaml").write_text("rules: [{guard: true}]\nguard: {targets: t.yaml}\n")
    assert run("memory", "add", "notes", "items.jsonl", "--words-only").code == 0
    run("request", "add", "requests.csv", "--model", "model", "--memory", "notes")
    assert "a-1: forgotten. Memory" in (run("request", "apply", "model", "--only", "a-1",
                                            "--policy", "guards.yaml").out)  # fmt: skip
    said = run("request", "show", "a-1").out
    assert f"{tmp_path / 'notes'}: forgotten" in said
    assert "1 of the kind case removed; nothing found" in said
    assert "Not shown: " in said
    assert "1 item removed, nothing found" in said
    assert not [name for name in NAMES if name in said]
    listed = json.loads(run("request", "list", "--json").out)
    assert [one["memories"][str(tmp_path / "notes")] for one in listed] == [
        "forgotten", "open", "open",
    ]  # fmt: skip
    assert run("request", "list").out.count("memories left") == 2


def test_the_walk(run: Any, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    LM(tiny_model("llama"), tiny_tokenizer()).save(tmp_path / "model")
    plain = delible.open("model").fingerprint
    everything = ""

    said = run("request", "add", "requests.csv", "--model", "model")
    assert said.code == 0, said.err
    assert "a-3 holds nothing that was not asked for in a-1." in said.out
    everything += said.out
    ledger = Ledger(tmp_path / "l.sqlite")

    said = run("request", "apply", "model", "--policy", "policy.yaml")
    assert said.code == 0, said.err
    everything += said.out + said.err
    assert "a-2: guarded" in said.out
    assert "a-3: covered" in said.out
    assert [one.id for one in read_targets("targets.yaml").targets] == ["a-2"]
    applied = requests_of(ledger.events())["a-1"].progress["model"].applied
    assert applied is not None
    folder = str(tmp_path / applied.body["run"])
    opened = delible.open(folder)
    assert opened.fingerprint != plain
    assert applied.body["artefact"]["kind"] == "patch"

    again = run("request", "apply", "model", "--policy", "policy.yaml")
    assert again.code == 0
    assert len([one for one in ledger.events() if one.kind == "applied"]) == 2

    said = run("request", "check", "model", "--system", folder)
    assert said.code == 0, said.err
    everything += said.out
    assert "Nothing leaks from" in said.out

    assert run("request", "key").code == 0
    said = run("request", "certify", "a-1")
    assert said.code == 0, said.err
    everything += said.out + Path("certificates/a-1.html").read_text()
    said = run("verify", "certificates/a-1.json", "--key", "l.signing.pem.pub",
               "--run", folder, "--against", "l.sqlite")  # fmt: skip
    assert said.code == 0, said.err
    everything += said.out

    everything += run("request", "list").out + run("request", "show", "a-1").out
    assert not [name for name in NAMES if name in everything]
    assert "Where was Ada Quill born?" in run("request", "show", "a-1", "--show").out

    assert run("request", "export", "e.json").code == 0
    assert not [name for name in NAMES if name in Path("e.json").read_text()]
    assert run("request", "import", "e.json", "--ledger", "m.sqlite").code == 0
    assert run("verify", "m.sqlite", "--against", "e.json").code == 0

    said = run("request", "withdraw", "a-1")
    assert said.code == 0
    assert "and none after" in said.out
    assert "a-3" in said.out, "who else holds it is told"
    assert run("request", "withdraw", "a-3").code == 0
    left = [path.name for path in [tmp_path / "l.sqlite", *tmp_path.glob("*runs/a-1*/**/*")]
            if path.is_file() and any(name.encode() in path.read_bytes()
                                      for name in ("Norrby", "Ada Quill"))]  # fmt: skip
    assert left == []
    assert run("verify", "l.sqlite", "--against", "e.json").code == 0
    assert run("verify", "certificates/a-1.json", "--run", folder).code == 0
    assert delible.open(folder).fingerprint == opened.fingerprint, "what was done stays"
    rows = json.loads(run("request", "list", "--json").out)
    assert {one["id"]: one["state"] for one in rows} == {
        "a-1": "applied", "a-2": "guarded", "a-3": "applied",
    }  # fmt: skip


def test_a_leak_is_exit_code_one_and_what_is_late_is_warned_about(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guard was promised, and the system that is asked says it all the same."""
    from delible.systems.scripted import Scripted

    said = run("request", "add", "--model", "m", "--forget", "f.jsonl", "--id", "x",
               "--date", "2020-01-01", "--deadline", "2020-01-02")  # fmt: skip
    assert said.code == 2
    (tmp_path / "f.jsonl").write_text('{"question": "Where?", "answer": "In Norrby"}\n')
    assert run("request", "add", "--model", "m", "--forget", "f.jsonl", "--id", "x",
               "--date", "2020-01-01", "--deadline", "2020-01-02").code == 0  # fmt: skip
    listed = run("request", "list").out
    assert "days late" in listed
    assert "Past their deadline: x." in listed
    Ledger(tmp_path / "l.sqlite").append(Draft("guarded", "x", "m", {"targets": "t"}))
    for answer, code in (("In Norrby", 1), ("No idea", 0)):
        monkeypatch.setattr(
            delible, "open", lambda *_, answer=answer, **__: Scripted(lambda _: answer)
        )
        looked = run("request", "check", "m", "--system", "s")
        assert looked.code == code, looked
        assert "Norrby" not in looked.out + looked.err
        assert ("leaks: x" in looked.out) == bool(code)
    assert "guarded" in run("request", "list").out


def test_mistakes_are_one_message(run: Any, tmp_path: Path) -> None:
    def told(*words: str) -> str:
        said = run(*words)
        assert said.code == 2, said
        assert said.err.startswith("error: ")
        assert said.err.count("\n") == 1
        return str(said.err)

    assert "there is no ledger" in told("request", "list")
    assert "there is no request" in told("request", "add")
    assert "no model is named" in told("request", "add", "requests.csv")
    assert "'basis' is none" in told(
        "request", "add", "--model", "m", "--subjects", "Ada", "--basis", "whim"
    )
    assert "Did you mean 'list'?" in told("request", "lst")
    assert "Did you mean '--policy'?" in told("request", "apply", "m", "--polcy", "x")
    assert "unknown command 'reqest'" in told("reqest")
    assert run("request", "add", "requests.csv", "--model", "m").code == 0
    assert "there is no request 'a-9'" in told("request", "show", "a-9")
    assert "no request was carried out" in told("request", "check", "m", "--system", "tiny-none")
    unsigned = told("request", "certify", "a-1")
    assert "key cannot be read" in unsigned or "pip install 'delible[ledger]'" in unsigned
    assert "MODEL is missing" in told("request", "apply")
    text = run("request").out
    assert "withdraw" in text
    assert not [name for name in NAMES if name in str(run("request", "list"))]
