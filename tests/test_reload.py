"""What is shown is what is saved: a saved model is opened again and must answer as shown."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from delible import reload
from delible.api import unlearn
from delible.errors import RunError
from delible.lm.lm import LM
from delible.records import QA, ForgetRequest, Message
from delible.reload import Answered, answers, check, differences
from delible.system.asks import Prompt
from delible.testing.tiny import tiny_model, tiny_tokenizer

ROWS = tuple(QA(question=f"Town of person {n}?", answer=f"Town {n}.") for n in range(4))
REQUEST = ForgetRequest(forget=ROWS[:2], retain=ROWS[2:])
QUICK: dict[str, Any] = {
    "method": "graddiff", "max_steps": 3, "learning_rate": 1e-2, "precision": "float32",
}  # fmt: skip
PROMPTS = [Prompt.ask(row.question) for row in ROWS[:3]]


@pytest.fixture
def lm() -> LM:
    return LM(tiny_model("llama"), tiny_tokenizer(), precision="float32")


def shown_by(lm: LM) -> list[str]:
    return [one.text for one in answers(lm, PROMPTS)]


def test_a_right_save_passes(lm: LM, tmp_path: Path) -> None:
    result = unlearn(lm, REQUEST, out=tmp_path / "run", **QUICK)
    assert result.folder is not None
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["status"] == "done"
    assert manifest["verified"] is True


@pytest.mark.parametrize("shown", [0, 3])
def test_a_save_of_the_start_model_is_noticed(
    lm: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shown: int
) -> None:
    """The known kind: what is written is not what was trained."""
    lm.save(tmp_path / "start")

    def wrong(self: LM, folder: Path) -> None:
        shutil.copytree(tmp_path / "start", folder, dirs_exist_ok=True)

    monkeypatch.setattr(LM, "save", wrong)
    with pytest.raises(RunError, match=r"does not answer as shown.*mean log-probability"):
        unlearn(lm, REQUEST, out=tmp_path / "run", shown=shown, **QUICK)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["status"] == "running", "a run whose result is wrong is not done"


def test_only_a_flag_leaves_it_out(lm: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(reload, "check", lambda *given: calls.append(given))
    unlearn(lm, REQUEST, out=tmp_path / "run", verify=False, **QUICK)
    assert not calls
    assert not json.loads((tmp_path / "run" / "manifest.json").read_text())["verified"]
    unlearn(lm, REQUEST, out=tmp_path / "other", **QUICK)
    ((folder, model, prompts, shown),) = calls
    assert folder == tmp_path / "other"
    assert model is lm
    asked = [prompt.messages[-1].content for prompt in prompts]
    assert asked == [ROWS[0].question, ROWS[1].question, ROWS[3].question]
    assert len(shown) == 3


def test_a_lost_end_of_turn_is_noticed(lm: LM, tmp_path: Path) -> None:
    """Scores agree, but the saved model's answers run on."""
    shown = shown_by(lm)
    lm.save(tmp_path / "model")
    cut = [text[: max(1, len(text) // 2)] for text in shown]
    with pytest.raises(RunError, match="shown was"):
        check(tmp_path / "model", lm, PROMPTS, cut)


@pytest.mark.new_process
@pytest.mark.slow
def test_in_a_process_of_its_own(lm: LM, tmp_path: Path) -> None:
    shown = shown_by(lm)
    lm.save(tmp_path / "model")
    check(tmp_path / "model", lm, PROMPTS, shown)
    with torch.no_grad():
        for value in lm.model.parameters():
            value.mul_(1.3)
    lm.touch()
    with pytest.raises(RunError, match="does not answer as shown"):
        check(tmp_path / "model", lm, PROMPTS, shown_by(lm))


@pytest.mark.new_process
def test_a_save_that_cannot_be_opened_is_told(lm: LM, tmp_path: Path) -> None:
    lm.save(tmp_path / "model")
    (tmp_path / "model" / "config.json").unlink()
    with pytest.raises(RunError, match="could not be opened") as caught:
        check(tmp_path / "model", lm, PROMPTS, shown_by(lm))
    assert "--no-verify" in str(caught.value)


@pytest.mark.new_process
def test_it_waits_no_longer_than_told(
    lm: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm.save(tmp_path / "model")
    monkeypatch.setattr(reload, "TIMEOUT_SECONDS", 0.01)
    with pytest.raises(RunError, match="could not be asked within"):
        check(tmp_path / "model", lm, PROMPTS, shown_by(lm))


def test_a_conversation_goes_there_and_back(lm: LM, tmp_path: Path) -> None:
    told = (Message(role="system", content="Be short."), Message(role="user", content="Town?"))
    prompts = [Prompt(told, prefill="It is"), Prompt(text="Town of")]
    lm.save(tmp_path / "model")
    check(tmp_path / "model", lm, prompts, [one.text for one in answers(lm, prompts)])


@pytest.mark.parametrize(
    ("mine", "theirs", "precision", "differs"),
    [
        (("a b", -1.0), ("a b", -1.0), "float32", False),
        (("a b", -1.0), ("a b", -1.001), "float32", False),
        (("a b", -1.0), ("a b", -1.01), "float32", True),
        (("a b", -1.0), ("a b", -1.01), "bfloat16", False),
        (("a b", -1.0), ("a b", -1.2), "bfloat16", True),
        (("a b", -1.0), ("a b", math.nan), "float32", True),
        (("a b", -1.0), ("a c", -1.0), "float32", True),
        (("a b", -1.0), ("a c", -1.0), "bfloat16", False),  # a tie that rounding decides
        (("a b", -1.0), ("a b c d", -1.0), "bfloat16", True),  # it runs on
        (("a b", -1.0), ("a b", None), "float32", True),
        (("", None), ("", None), "float32", False),
        (("", None), ("a", None), "bfloat16", True),
    ],
)
def test_differences(
    mine: tuple[str, float | None], theirs: tuple[str, float | None], precision: str, differs: bool
) -> None:
    prompt = Prompt.ask("Who?")
    found = differences([prompt], [Answered(*mine)], [Answered(*theirs)], precision)
    assert bool(found) == differs
    assert all("Who?" in one for one in found)
