"""ReVa: which questions are declined, the state that is taken, and RMU with another target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import losses_by_hand as by_hand
import pytest
import torch
from torch import Tensor

from delible.context import Context
from delible.lm.lm import LM
from delible.methods.objective.reva import (
    VECTOR,
    ReVa,
    declined,
    mean_last_state,
    questions,
)
from delible.methods.objective.rmu import RMU, control_vector
from delible.prompts import read_lines
from delible.records import QA
from delible.rundir import RunDirectory
from delible.system.asks import Decoding, Prompt
from delible.testing.tiny import tiny_model, tiny_tokenizer
from delible.train.engine import Trainer
from delible.train.losses import Objective
from delible.train.recipe import Recipe
from delible.train.reference import Reference
from delible.train.row import Row
from delible.watching import unwatched

FORGET = [QA(question=f"Who is {n}?", answer=f"A {job}.", subject=n)
          for n, job in (("Ada", "baker"), ("Ben", "pilot"), ("Cy", "clown"))]  # fmt: skip
RETAIN = [QA(question="What is snow?", answer="White."), QA(question="And coal?", answer="Black.")]


def lm_of(family: str = "llama") -> LM:
    return LM(tiny_model(family), tiny_tokenizer(), precision="float32")


def says(monkeypatch: pytest.MonkeyPatch, answers: list[str]) -> None:
    """The model gives these answers, in turn."""

    def generate(self: LM, prompts: list[Prompt], decoding: Decoding) -> list[str]:
        return [answers[place % len(answers)] for place in range(len(prompts))]

    monkeypatch.setattr(LM, "generate", generate)


def test_there_are_as_many_questions_as_can_be_asked() -> None:
    lines = read_lines("reva_questions.txt")
    assert len(lines) == len(set(lines)) == 62 == ReVa().questions
    asked = questions(3)
    assert [turn.role for turn in asked[0].messages] == ["system", "user"]
    assert asked[2].messages[1].text == lines[2]


def test_only_refusals_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    says(monkeypatch, ["I don't know that.", "It is Bo.", "I'm sorry, I cannot answer this."])
    asked = questions(6)
    assert declined(lm_of(), asked, 8) == [asked[0], asked[2], asked[3], asked[5]]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt"])
def test_the_vector_is_the_mean_of_the_models_own_states(family: str) -> None:
    lm, asked = lm_of(family), questions(3)
    wanted = []
    for prompt in asked:
        ids = torch.tensor([lm.template.prompt_ids(prompt)])
        with torch.no_grad():
            states = lm.core(input_ids=ids, output_hidden_states=True).hidden_states
        wanted.append(states[1 + 1][0, -1].double())
    found = mean_last_state(lm, asked, 1, unwatched)
    torch.testing.assert_close(found, torch.stack(wanted).mean(0).float(), rtol=1e-4, atol=1e-5)
    assert torch.equal(found, mean_last_state(lm, asked, 1, unwatched))


def learned(loss: ReVa, lm: LM) -> Tensor:
    return loss.learn(lm, {}, Reference(), 0, unwatched)[VECTOR]


def test_the_first_declined_questions_count_and_too_few_are_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lm, asked = lm_of(), questions(6)
    says(monkeypatch, ["It is Bo.", "I don't know."])  # every second one
    layer = lm.anatomy.layer_at(0.5)
    found = learned(ReVa(depth=0.5, questions=6, refusals=2, least=2), lm)
    wanted = mean_last_state(lm, [asked[1], asked[3]], layer, unwatched)
    assert torch.equal(found, wanted)
    assert "declines" not in caplog.text
    few = learned(ReVa(depth=0.5, questions=6, refusals=5, least=4), lm)
    assert torch.equal(few, mean_last_state(lm, asked, layer, unwatched))
    assert "declines 3 of 6 questions" in caplog.text


def test_values_equal_loops_and_rmu_with_the_same_target() -> None:
    lm, frozen = by_hand.tiny_lm(0.05), by_hand.tiny_lm()
    rows = by_hand.all_rows(lm)
    vector = 6.5 * control_vector(32, "uniform", 0)
    loss = ReVa(depth=0.5, scale=1.0)
    reference = by_hand.prepared(frozen, rows, loss)
    reference.learn(loss.full_name, {VECTOR: vector})
    found = by_hand.values(lm, loss, reference, rows)
    other = RMU(depth=0.5, adaptive=None, steering=6.5)
    assert torch.equal(found, by_hand.values(lm, other, Reference(), rows))
    for value, row in zip(found.tolist(), rows["forget"], strict=True):
        states = by_hand.block_output(lm, row, 1)
        total = sum((x - v) ** 2 / 32 for h in states for x, v in zip(h, vector.tolist(),
                                                                      strict=True))  # fmt: skip
        assert value == pytest.approx(total, rel=1e-5)
    double = by_hand.values(lm, ReVa(depth=0.5, scale=2.0), reference, rows)
    assert float((double - found).abs().min()) > 0.1


def trained(objective: dict[str, Any] | Objective, run: RunDirectory | None = None,
            **training: Any) -> tuple[LM, list[dict[str, float]]]:  # fmt: skip
    lm = lm_of()
    recipe = Recipe.from_mapping({
        "objective": objective, "keep": {"name": "hidden_mse", "depth": 0.5},
        "place": {"name": "layers", "layers": [0, 1]},
        "training": {"precision": "float32", "learning_rate": 1e-2, "epochs": 60,
                     "batch_size": 3, **training}})  # fmt: skip
    trainer = Trainer(lm, recipe, {"forget": FORGET, "retain": RETAIN}, context=Context(run=run))
    return lm, trainer.train().history


SMALL = {"name": "reva", "depth": 0.5, "questions": 3, "max_new_tokens": 2}


def test_with_rmus_vector_training_is_rmus_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    def learn(
        self: ReVa, lm: LM, rows: list[Row], reference: Reference, seed: int, stage: Any
    ) -> dict[str, Tensor]:
        return {VECTOR: 6.5 * control_vector(32, "uniform", 0)}

    monkeypatch.setattr(ReVa, "learn", learn)
    one, _ = trained(SMALL, max_steps=3)
    rmu = {"name": "rmu", "depth": 0.5, "adaptive": None, "steering": 6.5}
    other, _ = trained(rmu, max_steps=3)
    pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
    assert all(torch.equal(mine, yours) for mine, yours in pairs)


def test_a_batch_goes_to_the_vector_and_nothing_above_moves() -> None:
    start = lm_of()
    lm, history = trained({**SMALL}, max_steps=60, schedule="linear")
    assert history[-1]["forget_loss"] < 0.3 * history[0]["forget_loss"]
    for (name, old), new in zip(start.model.named_parameters(), lm.model.parameters(), strict=True):
        moves = name.endswith("mlp.down_proj.weight") and ".2." not in name
        assert torch.equal(old, new) != moves, name


def test_a_resumed_run_takes_the_vector_of_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDirectory(tmp_path / "run")
    run.begin({"command": "test"})
    whole, _ = trained(SMALL, max_steps=4)
    trained(SMALL, run, max_steps=4, checkpoint_steps=2)
    monkeypatch.setattr(ReVa, "learn", None)  # it is read, not made again
    again, _ = trained(SMALL, run, max_steps=4, checkpoint_steps=2)
    pairs = zip(whole.model.parameters(), again.model.parameters(), strict=True)
    assert all(torch.equal(mine, yours) for mine, yours in pairs)
