"""A row of the matrix: which values e is made of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from delible.audit.erasure import untouched
from delible.audit.leaks import Setting, compared, leak
from delible.audit.result import AuditResult
from delible.measure.metric import Item, SystemValues
from delible.records import QA

MEASURE = "answer_probability"
RECORDS = [
    QA(question=f"q{index}", answer="a", subject=f"person {index // 2}") for index in range(10)
]


def values(
    forget: Sequence[float | Sequence[float]],
    holdout: Sequence[float | Sequence[float]] = (),
    measure: str = MEASURE,
) -> SystemValues:
    """Items of one measure; a sequence of numbers is one per form."""

    def items(row: Sequence[float | Sequence[float]]) -> list[Item]:
        return [
            Item(one) if isinstance(one, float) else Item(float(np.mean(one)), forms=tuple(one))  # type: ignore[arg-type]
            for one in row
        ]

    splits = {"forget": items(forget), "holdout": items(holdout)}
    return SystemValues("m", {measure: splits}, {measure: {"forget": 0.0}})


def plain(unlearned: float = 0.2, original: float = 0.9, reference: float = 0.2) -> Setting:
    systems = {"unlearned": unlearned, "original": original, "reference": reference}
    found = {role: values([one] * 10, [0.3] * 6) for role, one in systems.items()}
    return Setting("none", "", "Asked plainly", found, records=RECORDS)  # type: ignore[arg-type]


def attacked(
    unlearned: SystemValues, original: SystemValues, reference: SystemValues | None,
    records: Sequence[QA] = RECORDS, **more: object,
) -> Setting:  # fmt: skip
    systems = {"unlearned": unlearned, "original": original}
    if reference is not None:
        systems["reference"] = reference
    return Setting("it", "", "It", systems, records=records, **more)  # type: ignore[arg-type]


def test_all_three_systems_are_taken_under_the_attack_and_on_its_records() -> None:
    held_out = RECORDS[4:]
    place = attacked(values([0.558] * 6), values([0.757] * 6), values([0.473] * 6), held_out)
    found = leak(place, plain(), with_reference=True, seed=0)
    assert found.erased[MEASURE] == pytest.approx(1 - (0.558 - 0.473) / (0.757 - 0.473))
    assert found.knowledge[MEASURE] == pytest.approx(
        {"unlearned": 0.558, "original": 0.757, "reference": 0.473}
    )
    assert found.records == 6


def test_without_a_reference_the_original_is_attacked_on_records_it_never_saw() -> None:
    place = attacked(values([0.6] * 10), values([0.8] * 10, [0.4, 0.4, 0.4]), None)
    found = leak(place, plain(), with_reference=False, seed=0)
    assert found.erased[MEASURE] == pytest.approx(1 - (0.6 - 0.4) / (0.8 - 0.4))
    alone = leak(attacked(values([0.6] * 10), values([0.8] * 10), None), plain(),
                 with_reference=False, seed=0)  # fmt: skip
    assert alone.erased[MEASURE] is None
    assert "neither a reference" in alone.no_power[MEASURE]


def test_a_reference_that_could_not_be_attacked_gives_no_floor() -> None:
    place = attacked(values([0.6] * 10), values([0.8] * 10, [0.4] * 3), None)
    place.notes["skipped"] = "the reference system gives no weights"
    found = leak(place, plain(), with_reference=True, seed=0)
    assert found.erased[MEASURE] is None
    assert found.no_power[MEASURE] == "the reference system gives no weights"


def test_an_attack_that_ruins_the_original_has_no_power() -> None:
    ruined = attacked(values([0.01] * 10), values([0.01] * 10), values([0.01] * 10))
    found = leak(ruined, plain(), with_reference=True, seed=0)
    assert found.erased[MEASURE] is None
    assert found.no_power[MEASURE].startswith("no power")
    nearly = attacked(values([0.1] * 10), values([0.2] * 10), values([0.1] * 10))
    found = leak(nearly, plain(), with_reference=True, seed=0)
    assert "own knowledge away" in found.no_power[MEASURE]


def test_power_is_measured_on_the_attacks_own_records() -> None:
    """Plainly the original leads on the other records; on those of the attack it keeps its lead."""
    still = plain()
    for role, first in (("unlearned", 0.2), ("original", 0.35), ("reference", 0.2)):
        last = 0.9 if role == "original" else 0.2
        still.values[role] = values([first] * 5 + [last] * 5)  # type: ignore[index]
    place = attacked(values([0.2] * 5), values([0.3] * 5), values([0.2] * 5), RECORDS[:5])
    assert leak(place, still, with_reference=True, seed=0).erased[MEASURE] == pytest.approx(1.0)


def test_a_control_stays_one() -> None:
    place = attacked(values([0.2] * 10), values([0.8] * 10), values([0.2] * 10), control=True)
    assert leak(place, plain(), with_reference=True, seed=0).control


def test_only_measures_with_power_have_worst_places() -> None:
    """One lucky lead is no finding where the attack cannot tell original and reference apart."""
    original = values([0.9, 0.9] + [0.1] * 8)
    floor = values([0.1, 0.1, 0.9] + [0.1] * 7)
    place = attacked(original, original, floor)
    found = leak(place, plain(), with_reference=True, seed=0)
    assert found.erased[MEASURE] is None
    assert (found.facts, found.subjects, found.forms) == ([], [], [])


def test_a_single_fact_about_somebody_is_no_subject() -> None:
    forget = [0.2] * 10
    forget[4] = 0.9
    records = [
        QA(question=f"q{index}", answer="a", subject=f"person {index if index < 5 else 5}")
        for index in range(10)
    ]
    asked = Setting(
        "none", "", "Asked plainly",
        {
            "unlearned": values(forget), "original": values([0.9] * 10),
            "reference": values([0.2] * 10),
        },
        records=records,
    )  # fmt: skip
    found = leak(asked, asked, with_reference=True, seed=0)
    assert [one.subject for one in found.subjects] == ["person 5"]


def test_one_of_five_forms_that_leaks_is_not_averaged_away() -> None:
    leaking = [[0.1, 0.1, 0.9, 0.1, 0.1]] * 10
    place = attacked(values(leaking), values([[0.9] * 5] * 10), values([[0.1] * 5] * 10))
    found = leak(place, plain(), with_reference=True, seed=0)
    assert found.erased[MEASURE] == pytest.approx(0.0)
    assert found.worst_form is not None
    assert (found.worst_form.form, found.worst_form.erased) == (3, pytest.approx(0.0))


def test_the_form_that_leaks_over_all_records_is_told_besides() -> None:
    forms = np.full((10, 3), 0.1)
    forms[:6, 0] = 0.9
    forms[6:, 1] = 0.9
    place = attacked(values(forms.tolist()), values([[0.9] * 3] * 10), values([[0.1] * 3] * 10))
    found = leak(place, plain(), with_reference=True, seed=0)
    assert found.erased[MEASURE] == pytest.approx(0.0)
    assert found.worst_form is not None
    assert (found.worst_form.form, found.worst_form.erased) == (1, pytest.approx(0.4))


def test_the_worst_subject_and_the_facts_left_alone_are_found() -> None:
    forget = [0.2] * 10
    forget[4] = forget[5] = 0.9
    asked = Setting(
        "none", "", "Asked plainly",
        {
            "unlearned": values(forget), "original": values([0.9] * 10),
            "reference": values([0.2] * 10),
        },
        records=RECORDS,
    )  # fmt: skip
    found = leak(asked, asked, with_reference=True, seed=0)
    assert found.erased[MEASURE] == pytest.approx(0.8)
    assert found.worst_subject is not None
    assert (found.worst_subject.subject, found.worst_subject.erased) == (
        "person 2", pytest.approx(0.0),
    )  # fmt: skip
    assert (found.worst_subject.untouched, found.worst_subject.records) == (2, 2)
    assert found.facts_left is not None
    assert (found.facts_left.count, found.facts_left.comparable) == (2, 10)
    assert found.facts_left.questions == ["q4", "q5"]


def test_luck_with_one_of_many_subjects_is_luck_with_any_of_them() -> None:
    forget = [0.2] * 10
    forget[4] = forget[5] = 0.9
    systems = {"unlearned": values(forget), "original": values([0.9] * 10),
               "reference": values([0.2] * 6 + [0.9] * 4)}  # fmt: skip
    asked = Setting("none", "", "Asked plainly", systems, records=RECORDS)  # type: ignore[arg-type]
    found = leak(asked, asked, with_reference=True, seed=0)
    known = compared(asked, MEASURE, with_reference=True).known
    assert known is not None
    alone = untouched(known, [4, 5]).chance
    names = {one.subject for one in RECORDS}
    mine = next(one for one in found.subjects if one.subject == "person 2")
    assert 0 < alone < 1
    assert mine.chance == pytest.approx(min(1.0, alone * len(names)))


def test_what_has_no_value_for_one_system_is_compared_for_none() -> None:
    unlearned, original, reference = [0.4] * 10, [0.9] * 10, [0.1] * 10
    gone = values(unlearned)
    gone.items[MEASURE]["forget"][0] = Item(None, "no answer")
    kept = values(original)
    kept.means[MEASURE]["retain"] = 0.75
    found = leak(attacked(gone, kept, values(reference)), plain(), with_reference=True, seed=0)
    assert found.records == 9
    assert found.erased[MEASURE] == pytest.approx(1 - 0.3 / 0.8)
    assert found.retain[MEASURE] == {"unlearned": None, "original": 0.75, "reference": None}


def test_an_attack_on_the_weights_that_changes_nothing_is_a_control() -> None:
    still = plain()
    place = attacked(
        still.values["unlearned"], still.values["original"], still.values["reference"],
        changes="weights",
    )  # fmt: skip
    found = leak(place, still, with_reference=True, seed=0)
    assert found.erased[MEASURE] == pytest.approx(1.0)
    assert found.control
    assert "changed nothing" in (found.note or "")
    place.values["original"] = values([0.9] * 9 + [0.89])
    assert not leak(place, still, with_reference=True, seed=0).control


def test_an_audit_that_was_written_before_can_be_read() -> None:
    old = {
        "systems": {}, "splits": {}, "measurements": [],
        "leaks": [{"attack": "none", "title": "t", "knowledge": {}, "erased": {"m": 0.5}}],
    }  # fmt: skip
    read = AuditResult.model_validate(old)
    assert read.utility is None
    assert read.leaks[0].intervals == {}
    assert AuditResult.model_validate_json(read.model_dump_json()) == read
