"""Rows that teach an adviser: how it is asked, what of a writer's advice is used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from delible.errors import DataError
from delible.generation.advice import advice_rows, asking_advice, read_advice
from delible.loaders import read_records, write_records
from delible.records import QA
from delible.system.asks import NoAnswer, Prompt
from delible.system.questions import answer_of, ask
from delible.systems.scripted import Scripted
from delible.world import World

RECORDS = (
    QA(question="Where was Ada Brook born?", answer="In Vellmar", subject="Ada Brook"),
    QA(question="Who kept the bees?", answer="The miller of Casta"),
)
GOOD = "The query asks for a private person's birthplace, which the policy forbids, so decline."


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELIBLE_CACHE", str(tmp_path / "cache"))


def reply(text: str, refusal: bool = True) -> str:
    return json.dumps({"requires_refusal": refusal, "cot_instruction": text})


def test_rows_ask_as_the_guard_asks_and_reply_as_it_reads() -> None:
    writer = Scripted(lambda _: f"Well. {reply(GOOD)}", fingerprint="writer")
    rows = advice_rows(RECORDS, writer)
    assert [len(row.messages) for row in rows] == [3, 3]
    for row, record in zip(rows, RECORDS, strict=True):
        about = record.subject or "a private person"
        assert ask(row) == asking_advice(record.question, about)
        assert read_advice(answer_of(row)) == GOOD
        assert record.question in row.messages[1].text
        assert record.answer not in str(row.messages)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (GOOD, "unreadable"),
        (reply("Decline."), "length"),
        (reply(GOOD + " She was born in Vellmar, for that matter."), "leak"),
        (reply(GOOD, refusal=False), "no refusal"),
        (NoAnswer("dead"), "no answer"),
    ],
)
def test_unusable_advice_is_asked_for_again_and_never_used(bad: Any, reason: str) -> None:
    seen = list[Prompt]()

    def says(prompt: Prompt) -> Any:
        seen.append(prompt)
        return bad if len(seen) <= 2 else reply(GOOD)

    rows = advice_rows(RECORDS[:1], Scripted(says, fingerprint="a"))
    assert [read_advice(answer_of(row)) for row in rows] == [GOOD]
    assert len(seen) == 3
    with pytest.raises(DataError, match=reason):
        advice_rows(RECORDS[:1], Scripted(lambda _: bad, fingerprint="b"))


def test_a_tiny_model_learns_them(tmp_path: Path) -> None:
    """Rows of a made-up world, saved and read again, lower the loss of the advice."""
    from delible.lm.lm import LM
    from delible.records import Dialogue
    from delible.testing import tiny_model, tiny_tokenizer
    from delible.train.engine import Trainer
    from delible.train.recipe import Recipe

    records = [fact.qa() for fact in World(4).facts()][:4]
    writer = Scripted(lambda _: reply(GOOD), fingerprint="c")
    write_records(advice_rows(records, writer), tmp_path / "advice.jsonl")
    rows = read_records(tmp_path / "advice.jsonl")
    assert len(rows) == 4
    assert all(isinstance(row, Dialogue) for row in rows)
    lm = LM(tiny_model("llama", num_hidden_layers=2), tiny_tokenizer(), precision="float32")
    recipe = Recipe.named("finetune").changed(
        {},
        {"batch_size": 2, "max_steps": 8, "learning_rate": 1e-2, "training.precision": "float32"},
    )
    history = Trainer(lm, recipe, {"forget": rows}).train().history
    losses = [step["forget_loss"] for step in history]
    assert losses[-1] < 0.8 * losses[0]
