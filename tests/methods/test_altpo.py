"""AltPO: the authors' numbers, equality with DPO, its alternates, and both in a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import losses_by_hand as by_hand
import pytest
import torch

from delible.errors import DataError
from delible.methods.generate.alternates import STOPS, Alternates
from delible.methods.objective.altpo import AltPO, altpo, altpo_separate
from delible.methods.objective.dpo import DPO
from delible.records import QA
from delible.system.asks import Decoding, NoAnswer, Prompt
from delible.system.base import BlackBox
from delible.testing.contract.trial import RECORDS
from delible.train.engine import Trainer
from delible.train.recipe import Recipe
from delible.train.slots import SlotContext
from delible.world import filters


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELIBLE_CACHE", str(tmp_path / "cache"))


# ---- the loss


@pytest.mark.parametrize(
    ("beta", "joint", "separate"),
    [
        (0.05, 29.640773385479044, 57.31362548905652),
        (0.1, 15.925112956086192, 29.68318153605165),
        (0.5, 5.825989933858949, 8.209682382386),
    ],
)
def test_the_authors_numbers(beta: float, joint: float, separate: float) -> None:
    # molereddy/Alternate-Preference-Optimization, dataloader.py: the loss "dpo", and its ablation
    # "subppo_npo", on these logits in float64
    loser = by_hand.fixed_sums(0.2, by_hand.LABELS) - by_hand.fixed_sums(0.9, by_hand.LABELS)
    winner = by_hand.fixed_sums(0.7, by_hand.WINNERS) - by_hand.fixed_sums(1.4, by_hand.WINNERS)
    assert float(altpo(winner, loser, beta).mean()) == pytest.approx(joint, rel=1e-12)
    assert float(altpo_separate(winner, loser, beta).mean()) == pytest.approx(separate, rel=1e-12)


def rows_with_alternates(lm: by_hand.LM) -> dict[str, list[by_hand.Row]]:
    rows = by_hand.all_rows(lm)
    return {"forget": rows["forget"], "alternate": rows["refusal"], "refusal": rows["refusal"]}


@pytest.mark.parametrize("form", ["joint", "separate"])
def test_values_equal_loops_over_rows_alone(form: str) -> None:
    lm, frozen = by_hand.tiny_lm(0.05), by_hand.tiny_lm()
    rows, loss = rows_with_alternates(lm), AltPO(beta=0.3, form=form)  # type: ignore[arg-type]
    found = by_hand.values(lm, loss, by_hand.prepared(frozen, rows, loss), rows)
    for index in range(3):
        won, lost = (
            by_hand.row_sum(lm, rows[role][index]) - by_hand.row_sum(frozen, rows[role][index])
            for role in ("alternate", "forget")
        )
        if form == "joint":
            expected = 2 / 0.3 * math.log(1 + math.exp(-0.3 * (won - lost)))
        else:
            expected = math.log(1 + math.exp(-0.3 * won)) + math.log(1 + math.exp(0.3 * lost))
            expected *= 2 / 0.3
        assert found[index].item() == pytest.approx(expected, rel=2e-5)


def test_it_is_dpo_with_alternates_for_refusals() -> None:
    lm, frozen = by_hand.tiny_lm(0.05), by_hand.tiny_lm()
    rows = rows_with_alternates(lm)
    found = [
        by_hand.values(lm, loss, by_hand.prepared(frozen, rows, loss), rows)
        for loss in (AltPO(beta=0.2), DPO(beta=0.2))
    ]
    assert found[0].tolist() == found[1].tolist()


def test_equal_winner_and_loser_move_nothing() -> None:
    lm, frozen, loss = by_hand.tiny_lm(0.05), by_hand.tiny_lm(), AltPO(beta=0.5)
    rows = rows_with_alternates(lm)
    reference = by_hand.prepared(frozen, rows, loss)
    moving = by_hand.joined(by_hand.gradients(lm, by_hand.values(lm, loss, reference, rows).sum()))
    rows["alternate"] = rows["forget"]
    value = by_hand.values(lm, loss, reference, rows)
    assert value.tolist() == pytest.approx([2 / 0.5 * math.log(2)] * 3, rel=1e-5)
    still = by_hand.joined(by_hand.gradients(lm, value.sum()))
    assert float(still.norm() / moving.norm()) < 1e-5


# ---- the alternates


class Author(BlackBox):
    """Writes another town for every seed, except for the truth at seed 1."""

    name, fingerprint = "author", None

    def __init__(self) -> None:
        self.decodings: list[Decoding] = []
        self.prompts: list[str] = []

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str | NoAnswer]:
        self.decodings.append(decoding)
        self.prompts += [prompt.messages[-1].content for prompt in prompts]
        towns = ["Umber", "Norrby", "Casta", "Casta", "Felden", "Gorm", "Holt", "Ives"]
        return [f"In the town of {towns[decoding.seed]}" for _ in prompts]


def context(writer: BlackBox | None) -> SlotContext:
    lm = by_hand.tiny_lm()
    made = Trainer(lm, Recipe.named("npo"), RECORDS).rows()
    born = QA(question="Where was Ada Quill born?", answer="In Norrby", subject="Ada Quill")
    work = QA(question="Where did Ben Orr work?", answer="In Casta Mill", subject="Ben Orr")
    records = {"forget": [born, work], "retain": RECORDS["retain"]}
    return replace(made, rows={}, records=records, writer=writer)


def test_the_model_itself_draws_five_and_bad_draws_are_repeated() -> None:
    author = Author()
    made = Alternates().rows(context(author))
    answers = [one.answer for one in made["alternate"]]  # type: ignore[attr-defined]
    towns = [answer.rpartition(" ")[2] for answer in answers]
    assert towns[:5] == ["Umber", "Casta", "Felden", "Gorm", "Holt"], "no truth, nothing twice"
    assert [one.question for one in made["forget"]] == [  # type: ignore[attr-defined]
        one.question
        for one in made["alternate"]  # type: ignore[attr-defined]
    ]
    assert len(made["forget"]) == 10
    assert [one.seed for one in author.decodings] == list(range(len(author.decodings)))
    assert author.decodings[0] == Decoding(200, STOPS, 1.0)
    assert any("In Norrby" in prompt for prompt in author.prompts), "it is shown what to contradict"


def test_too_few_draws_are_an_error() -> None:
    with pytest.raises(DataError, match=r"2 of 2 records have fewer than 4 usable alternates"):
        Alternates(minimum=4, attempts=3).rows(context(Author()))


def test_offline_alternates_tell_no_truth() -> None:
    found = context(None)
    made = Alternates(count=3).rows(found)
    assert made == Alternates(count=3).rows(found)
    assert made != Alternates(count=3).rows(replace(found, seed=1))
    for truth, false in zip(made["forget"], made["alternate"], strict=True):
        assert isinstance(truth, QA)
        assert isinstance(false, QA)
        assert not filters.leaks(truth, false.answer)


# ---- a run


def test_alternates_become_likelier_than_the_truth() -> None:
    lm, start = by_hand.tiny_lm(), by_hand.tiny_lm()
    recipe = Recipe.named("altpo").changed(
        {"keep": "none"},
        {"count": 2, "epochs": 3, "batch_size": 8, "learning_rate": 2e-3, "precision": "float32"},
    )
    trainer = Trainer(lm, recipe, RECORDS)
    result = trainer.train()
    rows = trainer.rows().rows
    assert len(rows["forget"]) == len(rows["alternate"]) == 8

    def margin(model: by_hand.LM) -> float:
        pairs = zip(rows["alternate"], rows["forget"], strict=True)
        return sum(by_hand.row_sum(model, a) - by_hand.row_sum(model, f) for a, f in pairs)

    assert margin(result.lm) > margin(start) + 1
    assert result.history[0]["forget_loss"] == pytest.approx(2 / 0.1 * math.log(2), rel=1e-4)
    assert torch.tensor([one["forget_loss"] for one in result.history]).isfinite().all()
