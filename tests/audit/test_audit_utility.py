"""The utility gate: comparable parts, paired intervals, and what is plainly broken."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from delible.audit.result import Utility, UtilityPart
from delible.audit.utility import Answers, part, utility
from delible.audit.weighing import gate
from delible.measure.metric import Item, SystemValues
from delible.records import QA

RECORDS = [QA(question=f"q{i}", answer="a", perturbed=("b", "c", "d")) for i in range(20)]
KNOWN = np.linspace(0.7, 0.95, 20)


def items(values: Sequence[float] | np.ndarray) -> list[Item]:
    return [Item(float(value)) for value in values]


def system(**means: float) -> SystemValues:
    """Values by ``split__measure``, all records alike."""
    found: dict[str, dict[str, list[Item]]] = {}
    for name, value in means.items():
        split, _, measure = name.partition("__")
        found.setdefault(measure, {})[split] = items(np.full(20, value))
    averages = {
        measure: {split: float(np.mean([one.value for one in row])) for split, row in each.items()}
        for measure, each in found.items()
    }
    return SystemValues("m", found, averages)


def one(
    unlearned: Sequence[float] | np.ndarray,
    original: Sequence[float] | np.ndarray = KNOWN,
    reference: Sequence[float] | np.ndarray | None = None,
    floor: float = 0.0,
) -> UtilityPart:
    values = {"unlearned": items(unlearned), "original": items(original)}
    if reference is not None:
        values["reference"] = items(reference)
    return part("retain", "rouge_l_recall", values, floor)  # type: ignore[arg-type]


def test_the_original_keeps_everything_and_a_loss_is_seen() -> None:
    same = one(KNOWN)
    # all 20 records alike: Wilson's interval leaves room for a share of 0.161 of another kind
    assert (same.kept, same.low, same.high) == pytest.approx((1.0, 1 - 0.1611, 1.0), abs=1e-4)
    lost = one(0.6 * KNOWN)
    assert (lost.kept, lost.low, lost.high) == pytest.approx(
        (0.6, 0.6 - 0.6 * 0.1611, 0.6 + 0.4 * 0.1611), abs=1e-4
    )


def test_five_answers_that_are_all_lost_are_no_certainty() -> None:
    right, wrong = np.ones(5), np.zeros(5)
    lost, kept = one(wrong, right), one(right, right)
    # 0 of 5 by Wilson: 0 to 0.434
    assert (lost.kept, lost.low, lost.high) == pytest.approx((0.0, 0.0, 0.4345), abs=1e-4)
    assert (kept.kept, kept.low, kept.high) == pytest.approx((1.0, 1 - 0.4345, 1.0), abs=1e-4)
    assert gate(Utility(parts=[lost, kept])) == lost


def test_a_reference_that_never_learned_this_is_no_bar() -> None:
    assert one(0.3 * KNOWN, reference=0.1 * KNOWN).kept == pytest.approx(0.3)
    assert one(0.3 * KNOWN, reference=0.5 * KNOWN, floor=0.35).kept == pytest.approx(0.3)
    assert one(0.3 * KNOWN, reference=0.6 * KNOWN, floor=0.35).kept == pytest.approx(0.5)


def test_records_of_one_fact_are_one_record() -> None:
    """Ten wordings of two facts, of which one is lost, are no 20 records."""
    lost = np.repeat([0.0, 1.0], 10)
    values = {"unlearned": items(lost), "original": items(np.ones(20))}
    groups = [0] * 10 + [1] * 10
    few = part("retain", "outcome", values, 0.0, groups=groups)  # type: ignore[arg-type]
    assert few.kept is None
    assert "20 records of 2 facts are too few" in (few.reason or "")
    groups = [index // 5 for index in range(20)]
    four = part("retain", "outcome", values, 0.0, groups=groups)  # type: ignore[arg-type]
    alone = part("retain", "outcome", values, 0.0)  # type: ignore[arg-type]
    assert four.high == pytest.approx(1.0)
    assert alone.high is not None
    assert alone.high < 0.8


def test_records_of_one_fact_are_told_by_the_audit() -> None:
    records = [QA(question=f"q{i}", answer="a", subject="Ada", group="town") for i in range(20)]
    before, after = system(retain__rouge_l_recall=0.9), system(retain__rouge_l_recall=0.3)
    found = utility({"unlearned": after, "original": before}, {"retain": records}, {})
    assert "of 1 facts" in (found.parts[0].reason or "")


def test_the_interval_is_paired() -> None:
    rates = np.tile([0.5, 1.0], 10)
    found = one(rates * KNOWN)
    generator = np.random.default_rng(3)
    drawn = generator.integers(20, size=(4000, 20))
    by_hand = (rates * KNOWN)[drawn].mean(axis=1) / KNOWN[drawn].mean(axis=1)
    low, high = np.quantile(by_hand, [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.02)


def test_more_than_the_original_counts_as_all() -> None:
    assert one(np.minimum(1, KNOWN * 1.2)).kept == 1.0


def test_no_more_is_asked_for_than_retraining_keeps() -> None:
    assert one(0.8 * KNOWN, reference=0.8 * KNOWN).kept == pytest.approx(1.0)
    assert one(0.6 * KNOWN, reference=0.8 * KNOWN).kept == pytest.approx(0.75)
    assert one(0.6 * KNOWN, reference=1.1 * KNOWN).kept == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("original", "floor", "reason"),
    [
        (np.full(20, 0.0137), 0.0, "hardly knows more"),
        (np.full(20, 0.3), 0.25, "hardly knows more"),
        (np.full(2, 0.9), 0.0, "too few"),
    ],
)
def test_where_the_original_knows_little_nothing_can_be_lost(
    original: np.ndarray, floor: float, reason: str
) -> None:
    found = one(original / 2, original, floor=floor)
    assert found.kept is None
    assert reason in (found.reason or "")


def test_the_gate_is_the_worst_part_beyond_its_interval() -> None:
    lucky = UtilityPart(split="a", measure="m", kept=0.5, low=0.1, high=1.0, records=3)
    real = UtilityPart(split="b", measure="m", kept=0.7, low=0.6, high=0.8, records=30)
    less = UtilityPart(split="c", measure="m", kept=0.8, low=0.7, high=0.9, records=30)
    fine = UtilityPart(split="d", measure="m", kept=0.95, low=0.93, high=0.97, records=300)
    assert gate(None) is None
    found = utility({}, {}, {}).model_copy(update={"parts": [lucky, fine]})
    assert gate(found) is None
    found.parts += [less, real]
    assert gate(found) == real


def test_refusing_too_much_is_seen_where_a_harmonic_mean_sees_nothing() -> None:
    """The default model's own general probability is 0.0137: it must not decide anything."""
    before = system(
        retain__answer_probability=0.8, retain__rouge_l_recall=0.9,
        general__normalised_probability=0.3, general__rouge_l_recall=0.02,
    )  # fmt: skip
    after = system(
        retain__answer_probability=0.78, retain__rouge_l_recall=0.54,
        general__normalised_probability=0.26, general__rouge_l_recall=0.02,
    )  # fmt: skip
    found = utility(
        {"unlearned": after, "original": before}, {"retain": RECORDS, "general": RECORDS}, {}
    )
    lost = gate(found)
    assert lost is not None
    assert (lost.split, lost.measure) == ("retain", "rouge_l_recall")
    assert lost.kept == pytest.approx(0.6)
    general = {part.measure: part for part in found.parts if part.split == "general"}
    # Chance is 1 / 4 with three wrong answers.
    assert general["normalised_probability"].kept is None
    assert general["rouge_l_recall"].kept is None


def test_the_floor_is_what_a_model_scores_that_never_saw_such_answers() -> None:
    before = system(retain__rouge_l_recall=0.6, holdout__rouge_l_recall=0.55)
    after = system(retain__rouge_l_recall=0.4)
    found = utility({"unlearned": after, "original": before}, {"retain": RECORDS}, {})
    assert found.parts[0].kept is None
    without = system(retain__rouge_l_recall=0.6)
    reference = system(retain__rouge_l_recall=0.6, forget__rouge_l_recall=0.55)
    systems = {"unlearned": after, "original": without, "reference": reference}
    assert utility(systems, {"retain": RECORDS}, {}).parts[0].kept is None  # type: ignore[arg-type]
    del systems["reference"]
    assert utility(systems, {"retain": RECORDS}, {}).parts[0].kept == pytest.approx(2 / 3)  # type: ignore[arg-type]


def said(kinds: str, texts: Sequence[str] | None = None) -> Answers:
    words = {"g": "garbage", "c": "correct", "w": "wrong-but-fluent"}
    texts = texts or [f"answer {index}" for index in range(len(kinds))]
    answers = zip(texts, kinds, strict=True)
    return {("retain", place): (text, words[kind]) for place, (text, kind) in enumerate(answers)}


@pytest.mark.parametrize(
    ("after", "before", "broken"),
    [
        (said("ggggggwwww"), said("wwwwwwcccc"), "60%"),
        (said("ggggggwwww"), said("gggggwwwww"), None),
        (said("gwwwwwwwww"), said("wwwwwwwwww"), None),
        (said("ggwwww"), said("wwwwww"), None),  # a third, of six answers: may be chance
        (said("gggg"), said("cccc"), None),
        (said("w" * 10, ["Fine."] * 9 + ["No."]), said("c" * 10), "90%"),
        (said("w" * 10, ["Fine."] * 9 + ["No."]), said("w" * 10, ["Yes."] * 8 + ["a", "b"]), None),
        (said("w" * 10, ["Fine."] * 5 + list("abcde")), said("c" * 10), None),
    ],
)
def test_babble_and_one_answer_to_everything_are_broken(
    after: Answers, before: Answers, broken: str | None
) -> None:
    values = {"unlearned": system(), "original": system()}
    found = utility(values, {}, {"unlearned": after, "original": before})  # type: ignore[arg-type]
    assert len(found.broken) == (broken is not None)
    assert broken is None or broken in found.broken[0]


def test_only_questions_that_both_answered_are_compared() -> None:
    values = {"unlearned": system(), "original": system()}
    after, before = said("ggggggwwww"), said("wwwwwwcccc")
    for place in list(after)[:6]:
        del before[place]
    found = utility(values, {}, {"unlearned": after, "original": before})  # type: ignore[arg-type]
    assert found.broken == []


def test_without_the_original_nothing_is_compared() -> None:
    found = utility({"unlearned": system(retain__rouge_l_recall=0.5)}, {}, {})
    assert found.missing
    assert found.parts == []
