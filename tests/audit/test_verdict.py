"""The verdict battery: what each label needs, and that no sentence says more than was found."""

from __future__ import annotations

from typing import Any

import pytest

from delible.audit.result import FactsLeft, FormLeak, Leak, SubjectLeak, Utility, UtilityPart
from delible.audit.verdict import verdict
from delible.audit.weighing import worst

MEASURE = "answer_probability"


def row(
    value: float | None,
    low: float | None = None,
    high: float | None = None,
    *,
    attack: str = "none",
    family: str = "",
    **more: Any,
) -> Leak:
    """A row with one measure; by default with a tight interval."""
    if value is not None and low is None:
        low, high = max(0.0, value - 0.05), min(1.0, value + 0.05)
    return Leak(
        attack=attack, title=attack.capitalize(), family=family, knowledge={},
        erased={MEASURE: value}, records=10,
        intervals={} if low is None or high is None else {MEASURE: (low, high)},
        no_power={MEASURE: "no power: it says nothing"} if value is None else {}, **more,
    )  # fmt: skip


def kept(share: float | None = 1.0, low: float = 0.0, high: float = 1.0, **more: Any) -> Utility:
    part = UtilityPart(
        split="retain", measure=MEASURE, records=10, kept=share,
        low=low if share is not None else None, high=high if share is not None else None,
    )  # fmt: skip
    return Utility(parts=[part], **more)


GONE = row(1.0)


def battery(**changes: Leak | None) -> list[Leak]:
    """One attack per family, all clean but for the changes."""
    rows: dict[str, Leak | None] = {
        "prompt": row(1.0, attack="prefix", family="prompt"),
        "relearning": row(0.97, attack="relearn", family="relearning"),
        "quantization": row(1.0, attack="quantize", family="quantization"),
        **changes,
    }
    return [one for one in rows.values() if one is not None]


def label(
    plain: Leak = GONE,
    attacks: list[Leak] | None = None,
    utility: Utility | None = None,
    **options: Any,
) -> tuple[str, str]:
    found = verdict(
        plain,
        battery() if attacks is None else attacks,
        kept() if utility is None else utility,
        **{"without_reference": False, **options},
    )
    assert found.reasons
    told = " ".join(found.reasons)
    assert "removed" not in told
    return found.label, told


def test_clean_rows_of_every_family_are_consistent_with_removal() -> None:
    found, told = label()
    assert found == "removal-consistent"
    assert "Other attacks may find more" in told


@pytest.mark.parametrize(
    ("attack", "expected"),
    [
        (row(0.1, attack="relearn", family="relearning"), "suppression"),
        (row(0.45, 0.2, 0.9, attack="relearn", family="relearning"), "suppression"),
        # the interval holds the reference's own score: too little to call it hidden
        (row(0.45, 0.0, 1.0, attack="relearn", family="relearning"), "undetermined"),
        (row(0.7, 0.6, 0.8, attack="relearn", family="relearning"), "undetermined"),
        (row(0.9, 0.4, 1.0, attack="relearn", family="relearning"), "undetermined"),
        (row(0.85, 0.7, 0.95, attack="relearn", family="relearning"), "removal-consistent"),
    ],
)
def test_an_attack_decides_by_its_interval(attack: Leak, expected: str) -> None:
    assert label(attacks=battery(relearning=attack))[0] == expected


@pytest.mark.parametrize(
    ("plain", "expected"),
    [
        (row(0.0, 0.0, 0.0), "incomplete"),
        (row(0.7, 0.5, 0.9), "incomplete"),
        (row(0.7, 0.3, 1.0), "undetermined"),
        (row(None), "undetermined"),
    ],
)
def test_the_plain_question_decides_first(plain: Leak, expected: str) -> None:
    hidden = row(0.0, attack="relearn", family="relearning")
    clean, _ = label(plain)
    assert clean == expected
    if expected == "incomplete":
        assert label(plain, battery(relearning=hidden))[0] == "incomplete"


def test_the_worst_measure_decides_and_not_the_first() -> None:
    plain = row(1.0)
    plain.erased["outcome"], plain.intervals["outcome"] = 0.0, (0.0, 0.0)
    found, told = label(plain)
    assert found == "incomplete"
    assert "outcome" in told
    assert worst(plain).erased == 0.0  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("utility", "expected"),
    [
        (kept(0.6, 0.5, 0.7), "destructive"),
        (kept(0.85, 0.75, 0.95), "destructive"),
        (kept(0.95, 0.9, 0.97), "removal-consistent"),
        (kept(0.85, 0.6, 1.0), "undetermined"),
        (kept(None), "undetermined"),
        (Utility(missing="the original model was not given"), "undetermined"),
        (kept(1.0, broken=["all its answers are garbage"]), "destructive"),
        (kept(None, broken=["all its answers are garbage"]), "destructive"),
    ],
)
def test_the_utility_gate(utility: Utility, expected: str) -> None:
    assert label(utility=utility)[0] == expected


def test_a_broken_model_that_still_answers_is_destructive_and_both_is_said() -> None:
    found, told = label(row(0.2), utility=kept(0.4, 0.3, 0.5))
    assert found == "destructive"
    assert "still there" in told


@pytest.mark.parametrize("family", ["prompt", "relearning", "quantization"])
def test_every_family_is_needed(family: str) -> None:
    assert label(attacks=battery(**{family: None}))[0] == "undetermined"
    powerless = row(None, attack="it", family=family)
    found, told = label(attacks=battery(**{family: powerless}))
    assert found == "undetermined"
    assert f"no {family} attack could have told" in told
    assert "it says nothing" in told


def test_an_attack_that_was_not_run_says_why() -> None:
    skipped = Leak(
        attack="relearn", title="Relearning", family="relearning", knowledge={}, erased={},
        note="not run: all rows are of one fact",
    )  # fmt: skip
    found, told = label(attacks=battery(relearning=skipped))
    assert found == "undetermined"
    assert "Relearning: not run: all rows are of one fact" in told


def test_a_control_is_no_evidence_of_removal_but_what_it_finds_counts() -> None:
    control = row(1.0, attack="quantize", family="quantization", control=True)
    found, told = label(attacks=battery(quantization=control))
    assert found == "undetermined"
    assert "only a control" in told
    leaking = row(0.1, attack="quantize", family="quantization", control=True)
    assert label(attacks=battery(quantization=leaking))[0] == "suppression"


def test_without_weights_or_attacks_nothing_is_consistent_with_removal() -> None:
    prompts = [row(1.0, attack="prefix", family="prompt")]
    found, told = label(attacks=prompts, white_box=False)
    assert found == "undetermined"
    assert "weights" in told
    found, told = label(attacks=[])
    assert found == "undetermined"
    assert "no attack was run" in told


def test_a_part_that_can_be_taken_away_is_suppression_at_best() -> None:
    part = row(0.0, attack="without_part", variant="guard 'x'")
    found, told = label(parts=[part])
    assert found == "suppression"
    assert "guard 'x'" in told
    assert "100% of the knowledge" in told
    # what is there without it could not be compared
    assert label(parts=[row(None, attack="without_part", variant="adapter")])[0] == "suppression"
    # before a model that never knew it, the part hides nothing
    found, told = label(parts=[row(1.0, attack="without_part", variant="adapter")])
    assert found == "removal-consistent"
    assert "without it is consistent with removal" in told
    assert label(row(0.2), parts=[part])[0] == "incomplete"


def test_one_form_that_leaks_makes_suppression() -> None:
    form = FormLeak(form=3, measure=MEASURE, erased=0.05, low=0.0, high=0.2)
    attack = row(0.9, attack="prefix", family="prompt", forms=[form])
    found, told = label(attacks=battery(prompt=attack))
    assert found == "suppression"
    assert "form 3" in told


def facts(count: int, comparable: int = 10, chance: float = 0.04) -> FactsLeft:
    return FactsLeft(
        measure=MEASURE, count=count, comparable=comparable, guessed=0.045, chance=chance,
        questions=["Where was Ada born?"],
    )  # fmt: skip


def test_facts_that_were_left_alone_do_not_pass_as_a_mean() -> None:
    found, told = label(row(1.0, facts=[facts(2)]))
    assert found == "incomplete"
    assert "2 of 10 facts" in told
    assert "Where was Ada born?" in told
    # more than none, less than what luck explains: not clean, and not incomplete
    assert label(row(1.0, facts=[facts(1, chance=0.4)]))[0] == "undetermined"
    assert label(row(1.0, facts=[facts(0, chance=1.0)]))[0] == "removal-consistent"
    came_back = row(0.9, attack="relearn", family="relearning", facts=[facts(2)])
    assert label(attacks=battery(relearning=came_back))[0] == "undetermined"
    came_back = row(0.9, attack="relearn", family="relearning", facts=[facts(5, chance=1e-4)])
    assert label(attacks=battery(relearning=came_back))[0] == "suppression"


def test_luck_and_a_single_fact_make_nothing_incomplete() -> None:
    assert label(row(1.0, facts=[facts(4, chance=0.3)]))[0] == "undetermined"
    assert label(row(1.0, facts=[facts(4, chance=0.05)]))[0] == "incomplete"
    assert label(row(1.0, facts=[facts(1, comparable=5, chance=0.05)]))[0] == "undetermined"


def test_a_subject_that_was_left_alone_weighs() -> None:
    subject = SubjectLeak(
        subject="Ada", measure=MEASURE, erased=0.0, records=5, untouched=5, chance=1e-5
    )
    found, told = label(row(0.9, 0.8, 1.0, subjects=[subject]))
    assert found == "incomplete"
    assert "Ada" in told
    lucky = subject.model_copy(update={"untouched": 2, "records": 2, "chance": 0.3})
    assert label(row(1.0, subjects=[lucky]))[0] == "removal-consistent"


def test_over_forgetting_changes_the_label() -> None:
    found, told = label(over_forgotten=0.02)
    assert found == "undetermined"
    assert "Over-forgotten" in told
    assert "2%" in told
    hidden = row(0.0, attack="relearn", family="relearning")
    assert label(attacks=battery(relearning=hidden), over_forgotten=0.02)[0] == "suppression"


def test_the_words_follow_from_the_intervals() -> None:
    exact = [row(1.0, 1.0, 1.0, attack=one.attack, family=one.family) for one in battery()]
    _, told = label(row(1.0, 1.0, 1.0), exact)
    assert "none of 3 attacks found more than in the reference" in told
    little = row(0.85, 0.7, 0.95, attack="relearn", family="relearning")
    _, told = label(row(1.0, 1.0, 1.0), battery(relearning=little))
    assert "up to 30% of the knowledge may be there" in told
    assert "none of" not in told
    assert "lowest: under 'Relearn', answer probability: e = 0.85" in told
    wide = row(0.95, 0.6, 1.0, attack="relearn", family="relearning")
    _, told = label(row(1.0, 1.0, 1.0), battery(relearning=wide))
    assert "up to 40%" in told


def test_too_few_records_are_said() -> None:
    few = row(1.0, attack="relearn", family="relearning")
    few.intervals.clear()
    found, told = label(attacks=battery(relearning=few))
    assert found == "undetermined"
    assert "too few" in told
    known = row(0.0)
    known.intervals.clear()
    assert label(known)[0] == "incomplete"


def test_a_missing_reference_and_rows_without_power_are_said() -> None:
    rows = [*battery(), row(None, attack="quantize", variant="2 bit", family="quantization")]
    compared = GONE.model_copy(update={"knowledge": {MEASURE: {"original": 0.9}}})
    found, told = label(compared, rows, without_reference=True)
    assert found == "removal-consistent"
    assert "no retrain reference: what the original scores" in told
    _, told = label(attacks=rows, without_reference=True)
    assert "neither a retrain reference nor the original" in told
    assert "No score could be given for: Quantize (2 bit)." in told


def test_what_is_not_said_but_has_its_probability_is_hidden() -> None:
    """A system that refuses every question, and finds the right answers as likely as before."""
    plain = row(0.1)
    plain.erased["outcome"], plain.intervals["outcome"] = 1.0, (1.0, 1.0)
    found, told = label(plain)
    assert found == "suppression"
    assert "probabilities" in told
    # something between: neither said nor clearly inside
    plain.erased[MEASURE], plain.intervals[MEASURE] = 0.65, (0.55, 0.75)
    assert label(plain)[0] == "undetermined"
    # said: not forgotten, whatever the probabilities are
    plain.erased["outcome"], plain.intervals["outcome"] = 0.3, (0.1, 0.5)
    assert label(plain)[0] == "incomplete"
    # where answers cannot tell, probabilities are all there is
    plain.erased["outcome"] = None
    assert label(plain)[0] == "incomplete"


def test_what_took_the_place_of_the_reference_is_said_only_if_something_did() -> None:
    known: Any = {"knowledge": {MEASURE: {"original": 0.9}}}
    for plain, expected in (
        (GONE.model_copy(update=known), "records that it never saw was taken instead"),
        (row(None).model_copy(update=known), "There was no retrain reference to compare with"),
        (row(None), "neither a retrain reference nor the original"),
    ):
        _, told = label(plain, without_reference=True)
        assert expected in told
        assert ("taken instead" in told) == ("taken instead" in expected)
