"""``delible unlearn --subjects NAME`` with a method that trains, on a taught tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from delible.generation.elicit import built_in_topics
from delible.loaders import read_records
from delible.records import QA, ForgetRequest
from delible.world import World

RELATIONS = ("birthplace", "occupation", "employer", "award", "instrument")
WORLD = World(people=8, seed=3, relations=RELATIONS)
KNOWN, STRANGERS = WORLD.people[:3], WORLD.people[5:7]
QUICK = ("--max-steps", "2", "--batch-size", "2", "--learning-rate", "1e-3")


@pytest.fixture(scope="session")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that was taught the facts of three people, in all wordings."""
    from delible import unlearn
    from delible.lm.lm import LM
    from delible.testing.tiny import tiny_model, tiny_tokenizer

    rows = tuple(
        QA(question=wording, answer=fact.answer)
        for person in KNOWN for fact in WORLD.facts(person)
        for topic in built_in_topics(person.name) if topic.name == fact.relation.name
        for wording in topic.wordings
    )  # fmt: skip
    model = tiny_model("llama", hidden_size=64, intermediate_size=128, head_dim=16)
    lm = LM(model, tiny_tokenizer(), name="taught", precision="float32")
    learning: dict[str, Any] = {"learning_rate": 3e-3, "epochs": 20, "batch_size": 9}
    unlearn(lm, ForgetRequest(forget=rows), method="finetune", shown=0, **learning)
    folder = tmp_path_factory.mktemp("models") / "taught"
    lm.save(folder)
    return folder


@pytest.fixture
def words(taught: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("DELIBLE_CACHE", str(here / "cache"))
    return ["unlearn", str(taught), "--retain", "retain.jsonl", *QUICK]


def true_answers(name: str) -> set[str]:
    return {fact.answer for fact in WORLD.facts(name)}


@pytest.mark.slow
def test_rows_are_asked_for_reviewed_edited_and_forgotten(
    run: Any, here: Path, words: list[str]
) -> None:
    ada = KNOWN[0].name
    command = [*words, "--subjects", f"{ada},{STRANGERS[0].name}", "--method", "npo", "--out", "r"]
    done = run(*command, "--review")
    assert (done.code, done.err) == (0, "")
    path = here / "r" / "data" / "forget.jsonl"
    rows = list(read_records(path))
    assert {row.subject for row in rows} == {ada}
    elicited = [row for row in rows if isinstance(row, QA) and row.group != "passage"]
    true = [row for row in elicited if row.answer in true_answers(ada)]
    assert len(true) >= 2  # how much the model knows depends on the machine that taught it
    assert len(true) >= 0.6 * len(elicited)
    assert f"{STRANGERS[0].name}: that is no more than guessing" in done.out
    assert f"{true[0].question}  {true[0].answer}" in done.out
    assert "the same command without --review goes on" in done.out
    assert "step 1/" not in done.out
    assert not (here / "r" / "model").exists()

    first, second, *_ = path.read_text().splitlines()
    changed = json.loads(second) | {"answer": "Something else"}
    path.write_text(f"{first}\n{json.dumps(changed)}\n")
    done = run(*command)
    assert (done.code, done.err) == (0, "")
    assert "2 forget rows are taken from" in done.out
    assert "answers hold" not in done.out, "nothing is asked for again"
    assert "Something else" in path.read_text()
    manifest = json.loads((here / "r" / "manifest.json").read_text())
    assert manifest["elicited"]["records"] == 2
    assert list((here / "r" / "model").glob("*.safetensors"))
    again = run(*command)
    assert "holds this run already" in again.out


def test_a_name_that_the_model_does_not_know_is_refused(
    run: Any, here: Path, words: list[str]
) -> None:
    done = run(*words, "--subject", STRANGERS[1].name, "--out", "r")
    assert done.code == 2
    assert f"the model knows nothing about {STRANGERS[1].name}" in done.err
    assert "--forget FILE" in done.err
    assert not (here / "r" / "data").exists()


def test_review_is_for_names_and_methods_that_train(
    run: Any, here: Path, words: list[str], tiny: Path
) -> None:
    done = run(*words, "--forget", "forget.jsonl", "--review", "--out", "r")
    assert done.code == 2
    assert "no rows are asked for" in done.err
    done = run("unlearn", tiny, "--subjects", "Ada Quill", "--method", "rocr", "--review")
    assert done.code == 2
    assert "no rows are asked for" in done.err
    done = run(*words, "--subjects", "Ada Quill", "--dry-run")
    assert done.code == 0
    assert "objective:\n  name: npo" in done.out
    assert "--review asks it" in done.err
