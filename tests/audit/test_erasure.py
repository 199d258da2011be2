"""e, its interval, its power, and the facts that a mean hides."""

from __future__ import annotations

import numpy as np
import pytest

from delible.audit.erasure import (
    Known,
    erasure,
    over_forgotten,
    share_erased,
    untouched,
)
from delible.audit.resampling import resampled_means

ORIGINAL = np.array([0.9, 0.8, 0.95, 0.85, 0.9, 0.7])
REFERENCE = np.array([0.2, 0.1, 0.3, 0.25, 0.2, 0.15])


def known(unlearned: np.ndarray, original: np.ndarray, floor: np.ndarray) -> Known:
    return Known(unlearned, original, floor)


def test_the_original_scores_0_and_the_reference_1() -> None:
    # all six records are alike: Wilson's interval leaves room for a share of 0.3903 of another kind
    same = erasure(known(ORIGINAL, ORIGINAL, REFERENCE))
    assert (same.value, same.low, same.high) == pytest.approx((0.0, 0.0, 0.3903), abs=1e-4)
    never = erasure(known(REFERENCE, ORIGINAL, REFERENCE))
    assert (never.value, never.low, never.high) == pytest.approx((1.0, 0.6097, 1.0), abs=1e-4)


@pytest.mark.parametrize(
    ("right", "low", "high"),
    # Wilson's 95 % interval of 0 of n: 0 to 3.8415 / (n + 3.8415)
    [([0] * 5, 0.5655, 1.0), ([0] * 10, 0.7225, 1.0), ([1] * 10, 0.0, 0.2775)],
)
def test_the_interval_of_answers_is_never_without_width(
    right: list[int], low: float, high: float
) -> None:
    count = len(right)
    found = erasure(known(np.array(right, float), np.ones(count), np.zeros(count)))
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)


def test_values_by_degrees_keep_the_interval_of_their_spread() -> None:
    generator = np.random.default_rng(1)
    reference = generator.uniform(0.0, 0.1, 8)
    unlearned, original = reference + generator.uniform(0.05, 0.1, 8), reference + 0.8
    found = erasure(known(unlearned, original, reference))
    assert found.low is not None
    assert found.high is not None
    assert found.high - found.low < 0.05


def test_ten_wordings_of_one_fact_have_no_interval() -> None:
    original, reference = np.full(10, 0.9), np.full(10, 0.1)
    one = Known(reference, original, reference, groups=(0,) * 10)
    assert (one.facts, erasure(one).value, erasure(one).low) == (1, 1.0, None)
    three = Known(reference, original, reference, groups=(0, 0, 0, 0, 1, 1, 1, 2, 2, 2))
    assert three.facts == 3
    # three facts of ten records: the width of three
    assert erasure(three).low == pytest.approx(1 - 3.8415 / 6.8415, abs=1e-4)


def test_what_the_original_does_not_know_is_no_luck() -> None:
    """The original knows five of ten; two of them were left."""
    original, unlearned = np.array([1.0] * 5 + [0.0] * 5), np.array([1.0] * 2 + [0.0] * 8)
    left = untouched(known(unlearned, original, np.zeros(10)))
    assert (left.count, left.comparable) == (2, 5)
    assert left.guessed == pytest.approx(0.5 / 6)
    assert left.chance < 0.1
    unseen = Known(unlearned, original, np.zeros(10), paired=False)
    assert untouched(unseen).guessed == pytest.approx(0.5 / 11)
    half = Known(unlearned, original, np.array([0.9, 0.7, 0.0]), paired=False)
    assert untouched(half).guessed == pytest.approx(1.5 / 4)  # 0.8 of what is known, not of all


def test_all_three_systems_count_under_the_same_attack() -> None:
    # The relearning row of the demo, whose original scores 0.95 when it is not attacked.
    one = np.ones(1)
    found = erasure(known(0.558 * one, 0.757 * one, 0.473 * one), plain_gap=0.7)
    assert found.value == pytest.approx(1 - (0.558 - 0.473) / (0.757 - 0.473))
    assert found.value == pytest.approx(0.70, abs=0.005)


def test_e_is_clipped() -> None:
    assert erasure(known(REFERENCE / 2, ORIGINAL, REFERENCE)).value == 1.0
    assert erasure(known(ORIGINAL + 0.05, ORIGINAL, REFERENCE)).value == 0.0


@pytest.mark.parametrize(
    ("original", "floor", "plain_gap", "reason"),
    [
        (REFERENCE + 0.04, REFERENCE, None, "hardly more than the reference"),
        (REFERENCE - 0.1, REFERENCE, 0.6, "hardly more than the reference"),
        (REFERENCE + 0.1, REFERENCE, 0.6, "takes the original's own knowledge away"),
        (np.array([0.9, 0.1, 0.1, 0.2]), np.array([0.1, 0.2, 0.2, 0.1]), None, "could be chance"),
    ],
)
def test_an_attack_that_cannot_tell_has_no_power(
    original: np.ndarray, floor: np.ndarray, plain_gap: float | None, reason: str
) -> None:
    found = erasure(known(floor, original, floor), plain_gap=plain_gap)
    assert found.value is None
    assert found.reason is not None
    assert reason in found.reason
    assert found.reason.startswith("no power")


def test_the_interval_is_that_of_a_paired_bootstrap() -> None:
    generator = np.random.default_rng(5)
    reference = generator.uniform(0.0, 0.2, 40)
    original = reference + generator.uniform(0.5, 0.7, 40)
    unlearned = reference + generator.uniform(0.0, 0.3, 40)
    found = erasure(known(unlearned, original, reference))
    drawn = generator.integers(40, size=(4000, 40))
    lead = (original - reference)[drawn].mean(axis=1)
    by_hand = 1 - (unlearned - reference)[drawn].mean(axis=1) / lead
    low, high = np.quantile(by_hand, [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=0.02)
    assert found.high == pytest.approx(high, abs=0.02)
    assert found.low < found.value < found.high  # type: ignore[operator]


def test_records_of_one_fact_are_drawn_together() -> None:
    columns = np.array([[0.0, 0.0, 0.0, 1.0, 1.0, 1.0]])
    alone = resampled_means(columns, None, 0).std()
    together = resampled_means(columns, (0, 0, 0, 1, 1, 1), 0).std()
    # the standard error of six draws and of two
    assert alone == pytest.approx(0.5 / np.sqrt(6), rel=0.1)
    assert together == pytest.approx(0.5 / np.sqrt(2), rel=0.1)


def test_facts_with_more_records_weigh_more() -> None:
    columns = np.array([[1.0, 1.0, 1.0, 0.0]])
    drawn = resampled_means(columns, (0, 0, 0, 1), 0)[:, 0]
    # both facts, or one of them twice: a mean over records, never over more than were drawn
    assert sorted(set(np.round(drawn, 6))) == [0.0, 0.75, 1.0]


def test_answers_are_widened_although_draws_differ() -> None:
    """One of ten is still right: resampling is too sure (0.7 to 1.0), Wilson's bound is lower."""
    right = np.array([1.0] + [0.0] * 9)
    found = erasure(known(right, np.ones(10), np.zeros(10)))
    assert found.value == pytest.approx(0.9)
    assert found.low == pytest.approx(0.9 * 0.7225, abs=1e-3)


def test_a_lead_that_is_kept_is_measured_from_the_floor() -> None:
    """0.76 of 0.9 is much, but not where a model that never knew it says 0.5."""
    half = np.full(4, 0.5)
    assert untouched(known(np.full(4, 0.76), np.full(4, 0.9), half)).count == 0
    assert untouched(known(np.full(4, 0.83), np.full(4, 0.9), half)).count == 4


def test_the_floor_without_a_reference_is_itself_uncertain() -> None:
    unseen = np.array([0.0, 0.0, 0.6])
    one = Known(np.full(12, 0.25), np.full(12, 0.9), unseen, paired=False)
    found = erasure(one)
    assert found.low is not None
    assert found.high is not None
    # the records are all alike, the three unseen ones are not: 0 to 0.6
    assert found.low < 0.8
    assert found.high == pytest.approx(1.0)


def test_two_records_give_no_interval() -> None:
    found = erasure(known(REFERENCE[:2], ORIGINAL[:2], REFERENCE[:2]))
    assert (found.value, found.low, found.high) == (1.0, None, None)


def test_without_a_reference_the_floor_is_what_the_original_scores_on_unseen_records() -> None:
    unseen = np.array([0.3, 0.1, 0.2, 0.2])
    half = Known(np.full(6, 0.525), np.full(6, 0.85), unseen, paired=False)
    found = erasure(half)
    assert found.value == pytest.approx(1 - (0.525 - 0.2) / (0.85 - 0.2))
    assert found.low is not None
    assert found.low < found.value  # the floor itself is uncertain  # type: ignore[operator]


def test_two_facts_of_ten_are_found_behind_a_perfect_mean() -> None:
    original, reference = np.full(10, 0.95), np.full(10, 0.25)
    unlearned = np.array([0.95, 0.94] + [0.05] * 8)
    assert unlearned.mean() < reference.mean()
    assert erasure(known(unlearned, original, reference)).value == 1.0
    left = untouched(known(unlearned, original, reference))
    assert (left.count, left.comparable, left.where) == (2, 10, (0, 1))
    # Two of ten, where luck has 1 / 22 by Jeffreys' prior on none of ten.
    luck = 0.5 / 11
    none, one = (1 - luck) ** 10, 10 * luck * (1 - luck) ** 9
    assert left.guessed == pytest.approx(luck)
    assert left.chance == pytest.approx(1 - none - one)


def test_what_the_reference_guesses_too_is_luck() -> None:
    original = np.full(10, 0.95)
    reference = np.array([0.95, 0.9, 0.9] + [0.2] * 7)
    left = untouched(known(reference[::-1].copy(), original, reference))
    assert (left.count, left.comparable) == (3, 7)
    assert left.guessed == pytest.approx(3.5 / 11)
    assert left.chance > 0.3
    assert untouched(known(reference, original, reference)).count == 0


def test_the_facts_of_one_subject_are_looked_at_alone() -> None:
    unlearned = REFERENCE.copy()
    unlearned[3:5] = ORIGINAL[3:5]
    one = known(unlearned, ORIGINAL, REFERENCE)
    assert share_erased(one, [3, 4]) == pytest.approx(0.0)
    assert share_erased(one, [0, 1]) == pytest.approx(1.0)
    assert untouched(one, [3, 4]).where == (3, 4)
    assert untouched(one, [0, 1]).count == 0
    assert share_erased(known(unlearned, REFERENCE, REFERENCE), [0, 1]) is None


@pytest.mark.parametrize(
    ("unlearned", "expected"),
    [(REFERENCE * 0.1, 0.1), (REFERENCE * 0.3, None), (REFERENCE, None), (ORIGINAL, None)],
)
def test_over_forgetting_is_measured_against_the_floor(
    unlearned: np.ndarray, expected: float | None
) -> None:
    found = over_forgotten(unlearned, REFERENCE)
    assert found == (None if expected is None else pytest.approx(expected))


def test_one_lucky_record_of_the_reference_is_no_over_forgetting() -> None:
    lucky = np.array([0.9, 0.01, 0.01, 0.01, 0.01])
    assert over_forgotten(np.full(5, 0.02), lucky) is None
