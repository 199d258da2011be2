"""Systems and data that made a verdict lie: value tables whose truth is known by construction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from delible.audit.findings import Findings
from delible.audit.leaks import WITHOUT_PART, Setting
from delible.audit.result import AuditResult, FactsLeft, FormLeak, Leak, SystemInfo, UtilityPart
from delible.audit.result import Utility as Kept
from delible.audit.verdict import verdict
from delible.measure.facts import fact_numbers
from delible.measure.metric import Item, SystemValues
from delible.records import QA, Passage

Rows = Sequence[float | None] | np.ndarray
Table = Mapping[str, Rows]
ANSWERS, PROBABILITY = "outcome", "answer_probability"
ATTACKS = (("prefix", "prompt"), ("relearn", "relearning"), ("quantize", "quantization"))


def questions(count: int, **more: Any) -> list[QA]:
    return [QA(question=f"q{index}", answer=f"a{index}", **more) for index in range(count)]


def values(table: Table, kept: float = 0.9) -> SystemValues:
    """Forget values by measure; everything else is alike in all systems."""
    items: dict[str, dict[str, list[Item]]] = {}
    for measure, row in table.items():
        forget = [Item(None if one is None else float(one), "failed") for one in row]
        holdout = [Item(0.1 if measure == PROBABILITY else 0.0)] * 12
        items[measure] = {"forget": forget, "retain": [Item(kept)] * 12, "holdout": holdout}
    means = {
        measure: {
            split: float(np.mean([one.value for one in row if one.value is not None] or [0.0]))
            for split, row in by_split.items()
        }
        for measure, by_split in items.items()
    }
    return SystemValues("m", items, means)


def audited(
    unlearned: Table,
    original: Table,
    reference: Table | None,
    *,
    records: Sequence[QA] | None = None,
    attacked: Mapping[str, Table] | None = None,
    without_part: Table | None = None,
    kept: float = 0.9,
    asked: bool = True,
) -> AuditResult:
    """The whole way from values to sentences; attacks change values a little, by themselves.

    Args:
        attacked: The unlearned system under single attacks; elsewhere as asked plainly.
    """
    count = len(next(iter(original.values())))
    records = records or questions(count)

    def setting(attack: str, family: str, table: Table) -> Setting:
        systems = {"unlearned": values(table, kept), "original": values(original)}
        if reference is not None:
            systems["reference"] = values(reference)
        return Setting(
            attack, "", attack.capitalize(), systems, records=records, family=family,  # type: ignore[arg-type]
        )  # fmt: skip

    plain = setting("none", "", unlearned)
    rows = [
        setting(name, family, (attacked or {}).get(name, unlearned)) for name, family in ATTACKS
    ]
    parts = []
    if without_part is not None:
        parts = [setting(WITHOUT_PART, "part", without_part)]
        parts[0].variant = "adapter"
    splits = {"forget": records, "holdout": questions(12)}
    if asked:
        splits["retain"] = [QA(question=f"r{i}", answer=f"b{i}") for i in range(12)]
    findings = Findings(splits, [], 0, plain, rows, parts=parts)
    findings.answers["unlearned"] = {}
    for role in plain.values:
        findings.infos[role] = SystemInfo(name=role, capabilities=["weights"])
    return findings.result(0.0, {})


def told(found: AuditResult) -> tuple[str, str]:
    assert found.verdict is not None
    return found.verdict.label, " ".join(found.verdict.reasons)


def clean(count: int, **others: Rows) -> tuple[Table, Table, Table]:
    """All is gone: unlearned, original, reference."""
    never = {PROBABILITY: np.linspace(0.08, 0.12, count), ANSWERS: np.zeros(count)}
    taught = {PROBABILITY: np.linspace(0.85, 0.95, count), ANSWERS: np.ones(count)}
    return {**never, **others}, taught, never


def test_clean_tables_are_consistent_with_removal() -> None:
    label, reasons = told(audited(*clean(10)))
    assert label == "removal-consistent", reasons
    # ten facts cannot show that there is nothing
    assert "up to 28% of the knowledge could be there unseen" in reasons


# ---- what a mean or a single "worst" hides


def test_answers_that_are_said_are_found_behind_probabilities_that_stand_out_more() -> None:
    """Two of ten answers are said; three of ten probabilities are as before."""
    unlearned, original, reference = clean(10)
    unlearned = {
        PROBABILITY: [0.9, 0.9, 0.9, *[0.05] * 7], ANSWERS: [1.0, 1.0, *[0.0] * 8],
    }  # fmt: skip
    label, reasons = told(audited(unlearned, original, reference))
    assert label == "incomplete", reasons
    assert "2 of 10 facts are as they were (outcome), such as 'q0'" in reasons


def test_what_the_original_never_knew_does_not_pass_as_luck() -> None:
    original = {ANSWERS: [1.0] * 5 + [0.0] * 5}
    unlearned = {ANSWERS: [1.0] * 2 + [0.0] * 8}
    label, reasons = told(audited(unlearned, original, {ANSWERS: [0.0] * 10}))
    assert label == "incomplete", reasons
    assert "2 of 5 facts" in reasons


def test_a_subject_is_not_hidden_by_another_where_luck_helps() -> None:
    """Two facts about Ada may be luck (the reference guesses one in five); six about Ben not."""
    who = ["Ada"] * 2 + ["Ben"] * 6 + ["Cyd"] * 52
    records = [QA(question=f"q{i}", answer=f"a{i}", subject=name) for i, name in enumerate(who)]
    reference = np.full(60, 0.1)
    reference[20:32] = 0.9
    unlearned = reference.copy()
    unlearned[:7] = 0.9
    original = {PROBABILITY: np.full(60, 0.9)}
    found = audited(
        {PROBABILITY: unlearned}, original, {PROBABILITY: reference}, records=records
    )  # fmt: skip
    label, reasons = told(found)
    assert found.leaks[0].erased[PROBABILITY] > 0.8  # type: ignore[operator]
    assert label == "incomplete", reasons
    assert "5 of 6 facts about Ben" in reasons
    assert found.leaks[0].worst_subject.subject == "Ada"  # type: ignore[union-attr]


def test_a_certain_form_is_not_hidden_by_an_uncertain_one() -> None:
    forms = [
        FormLeak(form=1, measure=ANSWERS, erased=0.3, low=0.0, high=1.0),
        FormLeak(form=2, measure=ANSWERS, erased=0.4, low=0.3, high=0.5),
    ]
    attack = leak(0.9, attack="prefix", family="prompt", forms=forms)
    found = verdict(leak(1.0), [attack], None, without_reference=False)
    assert found.label == "suppression"
    assert "form 2" in " ".join(found.reasons)


# ---- few facts


@pytest.mark.parametrize(
    ("count", "expected"), [(1, "undetermined"), (2, "undetermined"), (3, "undetermined"),
                            (5, "removal-consistent")],
)  # fmt: skip
def test_a_few_clean_facts_are_not_enough(count: int, expected: str) -> None:
    label, reasons = told(audited(*clean(count)))
    assert label == expected, reasons
    assert "none of 3 attacks found more than in the reference" not in reasons


@pytest.mark.parametrize(
    "records",
    [
        [QA(question="q", answer="a")] * 10,
        questions(10, subject="Ada", group="town"),
        [QA(question=f"q{i}", answer="In Norrby.", subject="Ada") for i in range(10)],
        [QA(question="q", answer="a", paraphrases=(f"p{i}",)) for i in range(10)],
    ],
)
def test_one_fact_given_ten_times_is_one_fact(records: list[QA]) -> None:
    assert fact_numbers(records) == (0,) * 10
    found = audited(*clean(10), records=records)
    label, reasons = told(found)
    assert label == "undetermined", reasons
    assert found.leaks[0].intervals == {}
    assert "10 records could be compared; they, their facts" in reasons


def test_different_facts_stay_apart() -> None:
    yes = [QA(question=f"q{i}", answer="Yes.") for i in range(4)]
    assert fact_numbers(yes) == (0, 1, 2, 3)
    rows = [
        QA(question="town?", answer="Norrby", subject="Ada"),
        Passage(text="Ada of Norrby.", subject="Ada"),
        QA(question="work?", answer="Baker", subject="Ada"),
        QA(question="home?", answer="norrby.", subject="Ada"),
        QA(question="town?!", answer="Casta", subject="Ben"),
    ]
    assert fact_numbers(rows) == (0, 1, 2, 0, 0)


# ---- parts that can be taken away


def test_facts_that_only_a_part_hides_are_found_behind_a_clean_mean() -> None:
    unlearned, original, reference = clean(20)
    bare = {PROBABILITY: [0.9] * 4 + [0.01] * 16, ANSWERS: np.zeros(20)}
    found = audited(unlearned, original, reference, without_part=bare)
    label, reasons = told(found)
    assert found.leaks[1].erased[PROBABILITY] > 0.8  # type: ignore[operator]
    assert label == "suppression", reasons
    assert "without it, 4 of 20 facts are as they were" in reasons


def leak(value: float | None, low: float | None = None, high: float | None = None,
         measure: str = ANSWERS, **more: Any) -> Leak:  # fmt: skip
    if value is not None and low is None:
        low, high = max(0.0, value - 0.05), min(1.0, value + 0.05)
    given: dict[str, Any] = {"attack": "none", "knowledge": {}, "records": 10, **more}
    return Leak(
        title=str(given["attack"]).capitalize(), erased={measure: value},
        intervals={measure: (low, high)} if low is not None and high is not None else {},
        no_power={} if value is not None else {measure: "no power: it says nothing"}, **given,
    )  # fmt: skip


def battery(**changes: Leak) -> list[Leak]:
    rows = {name: leak(1.0, attack=name, family=family) for name, family in ATTACKS}
    return list({**rows, **changes}.values())


KEPT = Kept(parts=[UtilityPart(split="retain", measure=ANSWERS, records=12, kept=1.0, low=0.8,
                               high=1.0)])  # fmt: skip


def judged(
    plain: Leak, attacks: Sequence[Leak] | None = None, utility: Kept = KEPT, **options: Any
) -> tuple[str, str]:
    rows = battery() if attacks is None else attacks
    found = verdict(plain, rows, utility, **{"without_reference": False, **options})
    return found.label, " ".join(found.reasons)


def test_a_part_is_said_to_hide_only_what_was_found() -> None:
    def part(*e: float | None, **more: Any) -> list[Leak]:
        return [leak(*e, attack=WITHOUT_PART, variant="adapter", **more)]

    assert judged(leak(1.0), parts=part(0.7, 0.6, 0.8))[0] == "suppression"
    label, reasons = judged(leak(1.0), parts=part(0.9, 0.3, 1.0))
    assert label == "undetermined"
    assert "hides" not in reasons
    assert "without the adapter: up to 70% of the knowledge may be there" in reasons
    # nothing can be compared, with the part or without it
    label, reasons = judged(leak(None), parts=part(None))
    assert label == "undetermined"
    assert "hides" not in reasons
    assert "without the adapter: what is there could not be compared" in reasons
    # it could be compared with the part, and not without it
    label, reasons = judged(leak(1.0), parts=part(None))
    assert label == "suppression"
    assert "could not be compared" in reasons
    one = FactsLeft(measure=ANSWERS, count=1, comparable=10, guessed=0.05, chance=0.4)
    label, reasons = judged(leak(1.0), parts=part(1.0, facts=[one]))
    assert label == "undetermined"
    assert "without the adapter, 1 of 10 facts is as before" in reasons


# ---- sentences


def test_an_attack_that_finds_what_was_there_brings_nothing_back() -> None:
    plain = leak(1.0)
    plain.erased[PROBABILITY], plain.intervals[PROBABILITY] = 0.4, (0.3, 0.5)
    same = leak(0.4, 0.3, 0.5, PROBABILITY, attack="relearn", family="relearning")
    label, reasons = judged(plain, battery(relearn=same))
    assert label == "suppression"
    assert "back" not in reasons
    assert "'Relearn' finds 60% of the knowledge, no more than without it" in reasons
    more = leak(0.2, 0.1, 0.3, PROBABILITY, attack="relearn", family="relearning")
    assert "'Relearn' brings 80% of the knowledge back" in judged(plain, battery(relearn=more))[1]


def test_it_looks_gone_only_where_it_does() -> None:
    back = battery(relearn=leak(0.1, attack="relearn", family="relearning"))
    assert "asked plainly it looks gone" in judged(leak(0.9), back)[1]
    label, reasons = judged(leak(0.6, 0.2, 1.0), back)
    assert label == "suppression"
    assert "looks gone" not in reasons
    assert "asked plainly it may be gone or not (outcome: e = 0.60" in reasons


def test_over_forgetting_is_told_against_what_it_was_compared_with() -> None:
    unlearned, original, reference = clean(10, answer_probability=[0.001] * 10)
    label, reasons = told(audited(unlearned, original, reference))
    assert label == "undetermined"
    assert "1% of the probability that the reference gives them" in reasons
    label, reasons = told(audited(unlearned, original, None))
    assert label == "undetermined"
    assert "1% of the probability that the original gives answers which it never saw" in reasons
    assert "reference gives" not in reasons


def test_what_is_missing_for_texts_only_is_named() -> None:
    label, reasons = judged(leak(1.0), [], white_box=False)
    assert label == "undetermined"
    assert "no prompt attack was run" in reasons
    assert "relearning" not in reasons
    powerless = leak(None, attack="prefix", family="prompt")
    assert "no prompt attack could have told" in judged(
        leak(1.0), [powerless], white_box=False
    )[1]  # fmt: skip


def test_without_retain_records_that_is_said() -> None:
    general = UtilityPart(split="general", measure=ANSWERS, records=12, kept=1.0, low=0.8, high=1.0)
    for parts, said in (([general], True), ([general, *KEPT.parts], False)):
        reasons = judged(leak(1.0), utility=Kept(parts=parts))[1]
        assert ("No retain or neighbour records were asked" in reasons) is said


def test_the_worst_part_is_told_with_its_interval() -> None:
    worse = UtilityPart(split="retain", measure=PROBABILITY, records=12, kept=0.92, low=0.7,
                        high=1.0)  # fmt: skip
    reasons = judged(leak(1.0), utility=Kept(parts=[*KEPT.parts, worse]))[1]
    assert "92% kept, 95 % interval 70% to 100%" in reasons
    doubtful = [
        worse.model_copy(update={"kept": share, "split": split})
        for share, split in ((0.85, "retain"), (0.5, "neighbours"))
    ]
    label, reasons = judged(leak(1.0), utility=Kept(parts=doubtful))
    assert label == "undetermined"
    assert "on neighbours records may have suffered (50% kept" in reasons


# ---- missing values


def test_an_attack_without_values_did_not_change_nothing() -> None:
    unlearned, original, reference = clean(10)
    empty = {PROBABILITY: [None] * 10, ANSWERS: [None] * 10}
    found = audited(unlearned, original, reference, attacked={"relearn": empty})
    label, reasons = told(found)
    assert label == "undetermined"
    assert "no relearning attack could have told" in reasons
    assert found.leaks[2].note is None


def test_records_without_a_value_are_left_out_for_all_systems() -> None:
    """What the unlearned system did not answer must not lower or raise the others' means."""
    holes = {PROBABILITY: [None, None, *[0.5] * 8]}
    odd = {PROBABILITY: [0.0, 0.0, *[0.9] * 8]}
    found = audited(holes, odd, {PROBABILITY: [0.9, 0.9, *[0.1] * 8]})
    assert found.leaks[0].erased[PROBABILITY] == pytest.approx(0.5)
    assert found.leaks[0].records == 8
    assert told(found)[0] == "incomplete"


# ---- references and originals that are none


def test_systems_that_cannot_be_told_apart_give_no_verdict() -> None:
    unlearned, original, reference = clean(10)
    for m, r in ((original, original), (reference, reference)):  # still knows; never knew
        found = audited(unlearned, m, r)
        label, reasons = told(found)
        assert label == "undetermined", reasons
        assert set(found.leaks[0].erased.values()) == {None}
        assert "could not be said: no power" in reasons


def test_less_than_the_reference_is_all_erased() -> None:
    unlearned, original, _ = clean(10)
    found = audited(unlearned, original, {PROBABILITY: [0.3] * 10, ANSWERS: [0.0] * 10})
    assert found.leaks[0].erased[PROBABILITY] == pytest.approx(1.0)
