"""The speed of relearning: numbers by hand, and what removal and a mere veil look like."""

from __future__ import annotations

import pytest

from delible.audit.leaks import Setting, leak
from delible.audit.relearning_speed import (
    area_between,
    at,
    forgetting_kept,
    relearning_speed,
    steps_to,
)

KNOWN = [(0, 0.9), (10, 0.9), (20, 0.95)]
NEVER = [(0, 0.1), (10, 0.2), (20, 0.5)]
VEILED = [(0, 0.1), (10, 0.72), (20, 0.9)]


def test_the_first_step_at_a_level_lies_on_the_line() -> None:
    assert steps_to(VEILED, 0.72) == pytest.approx(10)
    assert steps_to(NEVER, 0.35) == pytest.approx(15)
    assert steps_to(NEVER, 0.72) is None
    assert steps_to(KNOWN, 0.72) == 0
    assert steps_to([(0, None), (10, 0.2), (20, 0.4)], 0.3) == pytest.approx(15)


def test_the_area_is_the_mean_difference() -> None:
    # trapezoids: (0 + 0.52)/2 * 10 + (0.52 + 0.4)/2 * 10 over 20 steps
    assert area_between(VEILED, NEVER) == pytest.approx((2.6 + 4.6) / 20)
    assert area_between(NEVER, VEILED) == pytest.approx(-(2.6 + 4.6) / 20)
    assert area_between(VEILED, VEILED) == pytest.approx(0)
    assert area_between(VEILED, [(0, 0.1)]) is None


def test_values_between_points_and_outside() -> None:
    assert at(VEILED, 5) == pytest.approx(0.41)
    assert at(VEILED, 21) is None
    assert at([], 0) is None


def test_forgetting_that_stays() -> None:
    assert forgetting_kept([(0, 0.25)]) == 1.0  # no steps: nothing is lost
    assert forgetting_kept([(0, 0.2), (5, 0.6)]) == pytest.approx(0.5)
    assert forgetting_kept([(0, 0.2), (5, 0.1)]) == 1.0
    assert forgetting_kept([(0, 1.0), (5, 1.0)]) is None


def test_a_veil_is_faster_than_the_reference_and_removal_is_not() -> None:
    veil = relearning_speed({"unlearned": VEILED, "original": KNOWN, "reference": NEVER})
    steps = veil["steps to 0.8 of what the original knows"]
    assert steps["unlearned"] == pytest.approx(10)
    assert (steps["reference"], steps["original"]) == (None, 0)
    assert veil["area above the reference"]["unlearned"] == pytest.approx(0.36 / 0.8)
    # at 15: U 0.81, R 0.35, M 0.925
    assert veil["e after 15 steps"]["unlearned"] == pytest.approx(1 - 0.46 / 0.575)
    assert "e after 50 steps" not in veil
    gone = relearning_speed({"unlearned": NEVER, "original": KNOWN, "reference": NEVER})
    assert gone["area above the reference"]["unlearned"] == pytest.approx(0)
    assert gone["e after 15 steps"]["unlearned"] == pytest.approx(1)
    same = relearning_speed({"unlearned": KNOWN, "original": KNOWN, "reference": NEVER})
    assert same["e after 15 steps"]["unlearned"] == pytest.approx(0)


def test_without_a_reference_or_a_curve() -> None:
    assert relearning_speed({}) == {}
    found = relearning_speed({"unlearned": VEILED, "original": KNOWN})
    assert list(found) == [
        "steps to 0.8 of what the original knows", "share of the forgetting that stays"
    ]  # fmt: skip


def test_the_row_has_them_beside_the_attacks_own_numbers() -> None:
    place = Setting("relearn", "", "Relearning")
    place.curves = {"unlearned": VEILED, "original": KNOWN, "reference": NEVER}  # type: ignore[dict-item]
    place.numbers = {"unlearned": {"mine": 0.25}, "reference": {"mine": 0.5}}
    row = leak(place, Setting("none", "", ""), with_reference=True, seed=0)
    assert row.numbers["mine"] == {"unlearned": 0.25, "reference": 0.5}
    assert row.numbers["area above the reference"] == {"unlearned": pytest.approx(0.45)}
