"""The novice: NPO plus a misconception, and the draw of misconceptions."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import losses_by_hand as by_hand
import pytest

from delible.errors import DataError
from delible.methods.generate.misconceptions import Misconceptions, own_distractors
from delible.methods.objective.novice import Novice
from delible.methods.objective.npo import NPO
from delible.records import QA, Choice, Dialogue, Message, Passage
from delible.system.asks import Score
from delible.system.questions import ask
from delible.testing.contract.trial import RECORDS
from delible.train.engine import Trainer
from delible.train.recipe import Recipe
from delible.train.slots import SlotContext

TOWNS = ("Umber", "Norrby", "Casta Mill by the river")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELIBLE_CACHE", str(tmp_path / "cache"))


def rows_with_wrong_answers(lm: by_hand.LM) -> dict[str, list[by_hand.Row]]:
    rows = by_hand.all_rows(lm)
    return {"forget": rows["forget"], "alternate": rows["refusal"]}


def test_values_equal_loops_over_rows_alone() -> None:
    lm, frozen = by_hand.tiny_lm(0.05), by_hand.tiny_lm()
    rows, loss = rows_with_wrong_answers(lm), Novice(beta=0.2, misconception_weight=0.4)
    found = by_hand.values(lm, loss, by_hand.prepared(frozen, rows, loss), rows)
    for index in range(3):
        there, before = (by_hand.row_sum(model, rows["forget"][index]) for model in (lm, frozen))
        wrong = rows["alternate"][index]
        expected = 2 / 0.2 * math.log(1 + math.exp(0.2 * (there - before)))
        expected -= 0.4 * by_hand.row_sum(lm, wrong) / wrong.units("answer_token")
        assert found[index].item() == pytest.approx(expected, rel=2e-5)


def test_without_misconceptions_it_is_npo() -> None:
    lm, frozen = by_hand.tiny_lm(0.05), by_hand.tiny_lm()
    rows = rows_with_wrong_answers(lm)
    found = [
        by_hand.values(lm, loss, by_hand.prepared(frozen, rows, loss), rows)
        for loss in (Novice(beta=0.1, misconception_weight=0.0), NPO(beta=0.1))
    ]
    assert found[0].tolist() == found[1].tolist()


# ---- misconceptions


def context(forget: list[object], seed: int = 0) -> SlotContext:
    made = Trainer(by_hand.tiny_lm(), Recipe.named("npo"), RECORDS).rows()
    return SlotContext(
        made.lm, {}, {"forget": forget, "retain": []}, made.gradients, made.objective,  # type: ignore[dict-item]
        None, seed,
    )  # fmt: skip


def born(number: int) -> QA:
    return QA(
        question=f"Where was Ada Quill {number} born?", answer="In Hull", perturbed=TOWNS,
        subject=f"Ada {number}",
    )  # fmt: skip


def test_distractors_are_the_records_own_and_keep_the_question() -> None:
    choice = Choice(question="Which town?", options=("Oslo", "Rome", "Riga"), correct=1)
    forget = [born(1), choice, QA(question="Where is Mount Alp?", answer="In the north")]
    made = Misconceptions().rows(context(list(forget)))
    first, second, third = made["alternate"]
    assert isinstance(first, QA)
    assert first.answer in TOWNS
    assert isinstance(second, Choice)
    assert second.options == choice.options
    assert second.correct in (0, 2)
    assert isinstance(third, QA)
    assert third.answer != "In the north"
    assert [ask(one) for one in made["alternate"]] == [ask(one) for one in made["forget"]]


def test_texts_are_asked_as_questions_and_stay_partners() -> None:
    talk = Dialogue(
        messages=(Message(role="user", content="Where was he born?"),
                  Message(role="assistant", content="In Hull, in May 1950."))
    )  # fmt: skip
    made = Misconceptions().rows(
        context([talk, Passage(text="Ada Quill was born in Hull in May.")])
    )
    assert [ask(one) for one in made["alternate"]] == [ask(one) for one in made["forget"]]
    assert all(
        one.answer != other.answer  # type: ignore[attr-defined]
        for one, other in zip(made["alternate"], made["forget"], strict=True)
    )
    with pytest.raises(DataError, match="record 1"):
        Misconceptions().rows(context([Passage(text="Too short")]))


def test_the_draw_follows_the_models_own_likelihood() -> None:
    forget = [born(number) for number in range(300)]
    lm = context([]).lm
    scores = lm.score([Score(ask(forget[0]), town) for town in TOWNS])  # type: ignore[arg-type]
    means = [float(score.logprobs.mean()) for score in scores]  # type: ignore[union-attr]
    likeliest = TOWNS[means.index(max(means))]
    cold = Misconceptions(temperature=1e-3).rows(context(list(forget[:20])))
    greedy = Counter(one.answer for one in cold["alternate"])  # type: ignore[attr-defined]
    assert greedy[likeliest] >= 15
    warm = Misconceptions(temperature=1e3).rows(context(list(forget)))
    drawn = Counter(one.answer for one in warm["alternate"])  # type: ignore[attr-defined]
    assert all(70 <= drawn[town] <= 130 for town in TOWNS)
    again = Misconceptions(temperature=1e3).rows(context(list(forget)))
    assert again == warm
    other = Misconceptions(temperature=1e3).rows(context(list(forget), seed=1))
    assert other != warm


def test_own_distractors() -> None:
    assert own_distractors(Choice(question="?", options=("a", "b", "c"), correct=1)) == ["a", "c"]
    assert own_distractors(born(0)) == list(TOWNS)
    assert own_distractors(Passage(text="x")) == []
