"""``delible audit URL``: what a server's texts allow to be said, and what they do not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from completions_server import Asked, Reply, serving

from delible.audit.result import AuditResult
from delible.cli import main
from delible.testing.tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("DELIBLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DELIBLE_API_KEY", "sesame-street")
    for name, count in (("forget", 3), ("retain", 4)):
        rows = [
            {"question": f"What does {name} {index} eat?", "answer": f"{name} cake {index}"}
            for index in range(count)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tiny_model("llama").save_pretrained(tmp_path / "before")
    tiny_tokenizer().save_pretrained(tmp_path / "before")
    return tmp_path


def hides(asked: Asked) -> Reply:
    """Knows everything, and refuses what is to be forgotten when it is asked plainly."""
    if asked.key != "Bearer sesame-street":
        return Reply(status=401, body=b"no")
    *_, last = asked.body["messages"]
    questions = [turn["content"] for turn in asked.body["messages"] if turn["role"] == "user"]
    question = questions[-1]
    if "retain 1 " in question:
        return Reply(status=400, body=b'{"error": {"message": "blocked"}}')
    for name in ("forget", "retain"):
        for index in range(4):
            if f"{name} {index} " in question:
                plain = question.startswith("What does") and last["role"] == "user"
                hidden = name == "forget" and plain
                return Reply("I cannot help with that." if hidden else f"{name} cake {index}")
    return Reply("something else")


def audit(*words: str) -> int:
    return main(["audit", *words])


def test_an_endpoint_is_audited_by_what_it_says(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(hides) as server:
        code = audit(
            server.url, "--model", "small", "--forget", "forget.jsonl", "--retain",
            "retain.jsonl", "--before", "before", "--metrics",
            "answer_probability,rouge_l_recall,outcome", "--attacks", "prefix,prefill,quantize",
            "--out", "run",
        )  # fmt: skip
    said = capsys.readouterr()
    assert (code, said.err) == (0, "")
    found = AuditResult.model_validate_json((here / "run" / "metrics.json").read_text())
    assert found.systems["unlearned"].name == f"small at {server.url}"
    assert found.systems["unlearned"].fingerprint is None

    def value(system: str, attack: str, split: str, metric: str) -> list[Any]:
        return [
            (item.value, item.n, item.skipped, item.reason)
            for item in found.measurements
            if (item.system, item.attack, item.split, item.metric)
            == (system, attack, split, metric)
        ]

    # The question that the server blocked is no wrong answer: it is missing, with the reason.
    reason = "the server says 400: blocked"
    assert value("unlearned", "none", "retain", "rouge_l_recall") == [(1.0, 3, 1, reason)]
    assert value("unlearned", "none", "forget", "rouge_l_recall") == [(0.0, 3, 0, None)]
    assert value("unlearned", "prefix", "forget", "rouge_l_recall") == [(1.0, 3, 0, None)]
    assert value("unlearned", "prefill", "forget", "outcome") == [(1.0, 3, 0, None)]
    assert value("unlearned", "none", "forget", "answer_probability") == []
    assert value("original", "none", "forget", "answer_probability")
    # Nothing is attacked of which there is nothing to compare with.
    assert not [item for item in found.measurements if item.attack == "quantize"]
    shown = {example.question: example.answers["unlearned"] for example in found.examples}
    assert shown["What does retain 1 eat?"] == f"(no answer: {reason})"

    notes = "\n".join(found.not_tested)
    assert "Metric answer_probability: it needs the capability 'score'" in notes
    assert "An endpoint gives texts only" in notes
    assert "some servers begin anew" in notes
    assert notes.count("the unlearned system gives no weights") >= 1
    assert "An endpoint gives texts only" in " ".join(said.out.split())
    for file in [*(here / "run").rglob("*"), *(here / "cache").rglob("*")]:
        assert file.is_dir() or b"sesame-street" not in file.read_bytes()
    assert all(one.key == "Bearer sesame-street" for one in server.asked)


def test_what_was_not_answered_is_said_on_the_screen_and_in_the_report(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def some(asked: Asked) -> Reply:
        if "temperature" in asked.body:
            return Reply(status=400, body=b'{"error": {"message": "no temperature, please"}}')
        question = asked.body["messages"][-1]["content"]
        for name, reason in (("forget 0", "blocked"), ("retain 1", "blocked"), ("retain 2", "no")):
            if f"{name} " in question:
                return Reply(status=403, body=reason.encode())
        return Reply("cake")

    with serving(some) as server:
        words = (server.url, "--model", "small", "--forget", "forget.jsonl")
        kept = ("--retain", "retain.jsonl", "--metrics", "outcome", "--attacks", "prefix")
        assert audit(*words, *kept, "--out", "run") == 0
    said = " ".join(capsys.readouterr().out.split())
    found = AuditResult.model_validate_json((here / "run" / "metrics.json").read_text())
    asked = sum(found.splits.values())
    told = (
        f"unlearned: 3 of {asked} questions not answered: the server says 403: blocked (2); "
        "the server says 403: no (1)."
    )
    assert told in said
    assert found.not_tested.count(told) == 1
    # the attack asked other questions, of which some have no answer either
    others = [one for one in found.not_tested if "questions not answered" in one and one != told]
    assert others
    assert all(
        re.match(r"unlearned: \w.*: \d+ of \d+ questions not answered: ", one) for one in others
    )
    refused = "unlearned: The server refuses the option 'temperature'"
    assert [one.startswith(refused) for one in found.not_tested].count(True) == 1
    assert refused in said


def test_an_audit_that_got_no_answer_at_all_fails(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def silent(asked: Asked) -> Reply:
        is_probe = asked.body["max_tokens"] == 1
        return Reply("Hi") if is_probe else Reply("<think>\nLet me see", finish="length")

    with serving(silent) as server:
        words = (server.url, "--model", "small", "--forget", "forget.jsonl", "--attacks", "prefix")
        assert audit(*words, "--metrics", "outcome", "--out", "run") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "the unlearned system: nothing was answered, so nothing can be audited." in said
    assert "questions not answered: it was cut off while it was thinking." in said
    assert "max_new_tokens: 1024" in said
    assert not (here / "run" / "metrics.json").exists()


def test_a_wrong_key_stops_the_audit_before_the_first_question(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DELIBLE_API_KEY", "wrong")
    with serving(hides) as server:
        code = audit(server.url, "--model", "small", "--forget", "forget.jsonl", "--out", "run")
        assert code == 2
        assert not server.questions()
    assert "refuses the key in $DELIBLE_API_KEY" in " ".join(capsys.readouterr().err.split())
    assert not (here / "run").exists()


def test_a_model_name_without_an_address_is_refused(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert audit("before", "--model", "small", "--forget", "forget.jsonl") == 2
    assert "Leave out --model" in " ".join(capsys.readouterr().err.split())
