"""Forget degree and retain utility against hand-made numbers."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from delible.errors import RecipeError
from delible.measure.metric import SummaryMetric, SystemValues
from delible.measure.scoring.closeness import closeness, combined_score, target_score
from delible.metrics.forget_degree import ForgetDegree
from delible.metrics.retain_utility import RetainUtility

PARTS = ("answer_probability", "rouge_l_f1", "exact_memorisation")


def system(name: str, **parts: tuple[float | None, float | None, float | None]) -> SystemValues:
    """Means of the three parts by split."""
    means: Mapping[str, Mapping[str, float | None]] = {
        part: {split: row[place] for split, row in parts.items()}
        for place, part in enumerate(PARTS)
    }
    return SystemValues(name, {}, means)


def uniform(level: float) -> SystemValues:
    return system("u", forget=(level, level, level), retain=(level, level, level))


def test_the_score_is_the_geometric_mean_of_three_parts() -> None:
    assert combined_score(0.5, 0.4, 0.3) == pytest.approx(100 * 0.06 ** (1 / 3))
    assert combined_score(1.0, 1.0, 1.0) == pytest.approx(100)
    assert combined_score(0.9, 0.0, 0.9) == 0.0


@pytest.mark.parametrize("metric", [ForgetDegree(), RetainUtility()])
def test_the_reference_itself_is_perfect(metric: SummaryMetric) -> None:
    name = metric.card.name
    found = metric.summarise(uniform(0.4), uniform(0.4))
    assert found[name] == pytest.approx(1.0)
    assert sorted(found.values()) == pytest.approx([1.0, 40.0, 40.0])  # type: ignore[type-var]


@pytest.mark.parametrize("metric", [ForgetDegree(), RetainUtility()])
def test_too_little_and_too_much_are_punished_alike(metric: SummaryMetric) -> None:
    name = metric.card.name
    below, above, far = (
        metric.summarise(uniform(level), uniform(0.4))[name] for level in (0.3, 0.5, 0.9)
    )
    assert below == pytest.approx(0.75)
    assert above == pytest.approx(0.75)
    assert far == 0.0


def test_each_reads_its_own_split() -> None:
    values = system("u", forget=(0.2, 0.2, 0.2), retain=(0.6, 0.6, 0.6))
    reference = system("r", forget=(0.4, 0.4, 0.4), retain=(0.5, 0.5, 0.5))
    forgotten = ForgetDegree().summarise(values, reference)
    assert forgotten == pytest.approx(
        {"forget_degree": 0.5, "forget_score": 20.0, "forget_score_target": 40.0}
    )
    kept = RetainUtility().summarise(values, reference)
    assert kept == pytest.approx(
        {"retain_utility": 0.8, "retain_score": 60.0, "retain_score_target": 50.0}
    )


def test_compat_takes_the_accuracy_of_the_other_split() -> None:
    values = system("u", forget=(0.2, 0.3, 0.1), retain=(0.6, 0.7, 0.8))
    found = ForgetDegree(compat=True).summarise(values, None)["forget_score"]
    assert found == pytest.approx(combined_score(0.2, 0.3, 0.8))
    found = RetainUtility(compat=True).summarise(values, None)["retain_score"]
    assert found == pytest.approx(combined_score(0.6, 0.7, 0.1))


def test_the_target_moves_from_the_start_to_the_reference() -> None:
    assert target_score(40.0, 80.0, 0.25) == pytest.approx(70.0)
    assert target_score(40.0, None, 1.0) == 40.0
    halfway = ForgetDegree(progress=0.5, start_score=80)
    found = halfway.summarise(uniform(0.3), uniform(0.4))
    assert found["forget_score_target"] == pytest.approx(60.0)
    assert found["forget_degree"] == pytest.approx(0.5)
    with pytest.raises(RecipeError, match="start is not known"):
        ForgetDegree(progress=0.5).summarise(uniform(0.3), uniform(0.4))


def test_what_cannot_be_said() -> None:
    assert closeness(5.0, 0.0) is None
    nothing = ForgetDegree().summarise(uniform(0.3), None)
    assert nothing["forget_degree"] is nothing["forget_score_target"] is None
    assert nothing["forget_score"] == pytest.approx(30.0)
    gone = ForgetDegree().summarise(uniform(0.3), system("r", forget=(0.0, 0.5, 0.5)))
    assert gone["forget_degree"] is None
    partly = system("u", forget=(0.5, None, 0.5))
    assert set(ForgetDegree().summarise(partly, partly).values()) == {None}
    assert set(RetainUtility().summarise(partly, partly).values()) == {None}
