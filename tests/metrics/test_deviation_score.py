"""The deviation score, and the two for several requests in a row."""

from __future__ import annotations

import math

import pytest

from delible.measure.metric import SystemValues
from delible.metrics.deviation_score import (
    DeviationScore,
    deviation,
    dynamic_deviation,
    dynamic_utility,
)


def test_the_score_is_zero_only_where_all_is_forgotten_and_all_is_kept() -> None:
    assert deviation(0.0, 1.0) == pytest.approx(0.0, abs=1e-12)
    assert deviation(0.3, 0.6) == pytest.approx(50.0)  # a 3-4-5 triangle
    assert deviation(1.0, 0.0) == pytest.approx(100 * math.sqrt(2))
    assert deviation(0.2, 1.0) == pytest.approx(20.0)
    assert deviation(0.0, 0.8) == pytest.approx(20.0)


def test_scores_of_several_requests() -> None:
    assert dynamic_deviation([21.0, 21.0, 21.0]) == pytest.approx(21.0)
    # by hand: mean (10 + 30 + 20 + 24) / 4 = 21; steps up 20 + 4 over 3 gaps = 8
    assert dynamic_deviation([10, 30, 20, 24]) == pytest.approx(29.0)
    assert dynamic_deviation([10, 30, 20, 24], beta=0.5) == pytest.approx(25.0)
    assert dynamic_deviation([30, 20, 10]) == pytest.approx(20.0), "getting better costs"
    assert dynamic_deviation([7.0]) == pytest.approx(7.0)
    assert dynamic_utility([0.6, 0.6, 0.6]) == pytest.approx(1.0)
    assert dynamic_utility([0.6, 0.5, 0.7]) == pytest.approx(1 - 0.3 / 2)
    assert dynamic_utility([0.6]) == pytest.approx(1.0)
    for score in (dynamic_deviation, dynamic_utility):
        with pytest.raises(ValueError, match="one request"):
            score([])


def values(**means: float | None) -> SystemValues:
    return SystemValues(
        system="s", items={}, means={"rouge_l_recall": means}, skipped={}, options={}, measured={},
        asked=0, unanswered={},
    )  # fmt: skip


def test_it_reads_the_mean_rouge_of_both_splits() -> None:
    metric = DeviationScore()
    found = metric.summarise(values(forget=0.3, retain=0.6), None)
    assert found == {"deviation_score": pytest.approx(50.0)}
    assert metric.summarise(values(forget=0.3), None) == {"deviation_score": None}
    assert metric.summarise(values(forget=None, retain=0.5), None) == {"deviation_score": None}
    other = DeviationScore(retain_split="neighbours")
    found = other.summarise(values(forget=0.0, retain=1.0, neighbours=0.5), None)
    assert found == {"deviation_score": pytest.approx(50.0)}
