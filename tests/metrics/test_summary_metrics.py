"""Forget quality and model utility against brute force."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from delible.errors import DataError, RecipeError
from delible.measure.evaluate import mean_of
from delible.measure.metric import Item, SystemValues
from delible.measure.scoring.text import rouge_l_recall
from delible.metrics.forget_quality import ForgetQuality, kolmogorov_smirnov, log10_small_p
from delible.metrics.model_utility import ModelUtility, harmonic_mean


def system_values(
    name: str, values: Mapping[str, Mapping[str, Sequence[float | None]]], form: str = "raw"
) -> SystemValues:
    items = {
        metric: {
            split: [Item(value, None if value is not None else "none") for value in row]
            for split, row in by_split.items()
        }
        for metric, by_split in values.items()
    }
    means = {
        metric: {split: mean_of(row) for split, row in by_split.items()}
        for metric, by_split in items.items()
    }
    return SystemValues(name, items, means, options={"truth_ratio": {"form": form}})


def ratios(name: str, values: Sequence[float | None], form: str = "raw") -> SystemValues:
    return system_values(name, {"truth_ratio": {"forget": values}}, form)


def distance(first: Sequence[float], second: Sequence[float]) -> float:
    """Largest gap between two empirical distribution functions."""
    return max(
        abs(
            sum(value <= at for value in first) / len(first)
            - sum(value <= at for value in second) / len(second)
        )
        for at in (*first, *second)
    )


def permutation_p(first: Sequence[float], second: Sequence[float]) -> float:
    """Share of all ways to split the pooled sample that are at least as far apart."""
    pooled, observed = [*first, *second], distance(first, second)
    far, total = 0, 0
    for chosen in itertools.combinations(range(len(pooled)), len(first)):
        left = [pooled[index] for index in chosen]
        right = [value for index, value in enumerate(pooled) if index not in chosen]
        far += distance(left, right) >= observed - 1e-12
        total += 1
    return far / total


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sizes", [(4, 4), (3, 5)])
def test_p_is_that_of_all_permutations(seed: int, sizes: tuple[int, int]) -> None:
    generator = np.random.default_rng(seed)
    first, second = generator.random(sizes[0]), generator.random(sizes[1]) + 0.4 * (seed % 2)
    found = kolmogorov_smirnov(first, second)
    assert found.statistic == pytest.approx(distance(list(first), list(second)))
    assert found.p == pytest.approx(permutation_p(list(first), list(second)))
    assert found.log10_p == pytest.approx(math.log10(found.p))


def test_a_model_as_its_own_reference_has_p_one() -> None:
    sample = list(np.random.default_rng(0).exponential(size=200))
    found = ForgetQuality().summarise(ratios("a", sample), ratios("a", sample))
    assert found["forget_quality"] == 1.0
    assert found["forget_quality_log10"] == 0.0
    assert found["forget_quality_distance"] == 0.0


@pytest.mark.parametrize("size", [10, 100, 400, 600, 2000, 20_000])
def test_log10_p_is_finite_for_samples_that_do_not_overlap(size: int) -> None:
    below, above = np.linspace(0, 1, size), np.linspace(2, 3, size)
    found = kolmogorov_smirnov(below, above)
    assert found.statistic == 1.0
    # Two of all the orders of the pooled sample keep the halves apart.
    exact = (math.log(2) - math.log(math.comb(2 * size, size))) / math.log(10)
    assert math.isfinite(found.log10_p)
    assert found.log10_p == pytest.approx(exact, rel=1e-9)
    if size >= 600:
        assert found.p < 1e-300


def test_log10_p_of_unequal_sizes_is_finite_and_falls_with_the_distance() -> None:
    below, above = np.linspace(0, 1, 8000), np.linspace(2, 3, 9000)
    apart = kolmogorov_smirnov(below, above)
    assert math.isfinite(apart.log10_p)
    assert apart.log10_p < -1000
    values = [log10_small_p(step / 10, 8000, 9000) for step in range(11)]
    assert values == sorted(values, reverse=True)
    assert values[0] == 0.0


@pytest.mark.parametrize("statistic", [0.3, 0.5, 0.8])
def test_the_small_p_formula_meets_the_exact_p_where_both_can_be_computed(
    statistic: float,
) -> None:
    size = 200
    shift = round(statistic * size)
    first, second = np.arange(size), np.arange(size) + shift + 0.5
    found = kolmogorov_smirnov(first.astype(float), second)
    assert 0 < found.p < 1e-5
    guess = log10_small_p(found.statistic, size, size)
    assert guess == pytest.approx(found.log10_p, rel=1e-6)
    asymptotic = log10_small_p(found.statistic, size, size + 1)
    assert asymptotic == pytest.approx(found.log10_p, rel=0.35)


def test_the_step_of_the_statistic_is_not_lost_to_rounding() -> None:
    # 0.29 * 100 is 28.999999999999996 in binary.
    expected = 2 * math.comb(200, 71) / math.comb(200, 100)
    assert log10_small_p(0.29, 100, 100) == pytest.approx(math.log10(expected))


def test_forget_quality_pairs_records_and_leaves_out_those_without_a_value() -> None:
    first, second = [0.1, None, 0.3, 0.9, 2.0], [0.2, 0.5, None, 1.5, 4.0]
    found = ForgetQuality().summarise(ratios("a", first), ratios("r", second))
    expected = kolmogorov_smirnov(np.array([0.1, 0.9, 2.0]), np.array([0.2, 1.5, 4.0]))
    assert found["forget_quality"] == expected.p
    assert found["forget_truth_ratio"] == pytest.approx((0.1 + 0.3 + 0.9 + 0.5) / 4)


def test_forget_quality_without_a_reference_or_split_says_nothing() -> None:
    found = ForgetQuality().summarise(ratios("a", [0.0, 4.0]), None)
    assert found["forget_quality"] is None
    assert found["forget_quality_log10"] is None
    assert found["forget_truth_ratio"] == pytest.approx(0.125)
    empty = ForgetQuality(split="other").summarise(ratios("a", [1.0]), ratios("r", [1.0]))
    assert set(empty.values()) == {None}
    nothing = ForgetQuality().summarise(ratios("a", [None]), ratios("r", [None]))
    assert set(nothing.values()) == {None}


def test_forget_quality_refuses_what_cannot_be_compared() -> None:
    with pytest.raises(DataError, match="2 records of 'a' against 1 of 'r'"):
        ForgetQuality().summarise(ratios("a", [1.0, 2.0]), ratios("r", [1.0]))
    with pytest.raises(RecipeError, match="raw truth ratios"):
        ForgetQuality().summarise(ratios("a", [1.0]), ratios("r", [1.0], "true_better"))


def test_harmonic_mean() -> None:
    assert harmonic_mean([0.5, 0.25]) == pytest.approx(2 / (2 + 4))
    assert harmonic_mean([0.7] * 9) == pytest.approx(0.7)
    assert harmonic_mean([0.9, 0.9, 0.0]) == 0.0
    assert harmonic_mean([]) is None


UTILITY: dict[str, dict[str, list[float | None]]] = {
    "answer_probability": {"retain": [0.8, 0.6], "general": [0.01, 0.03], "forget": [0.0]},
    "normalised_probability": {"retain": [0.99, 0.99], "general": [0.5, None], "forget": [0.0]},
    "rouge_l_recall": {"retain": [1.0, 0.5], "general": [0.25, 0.75], "forget": [0.0]},
    "truth_ratio": {"retain": [0.25, 3.0], "general": [0.5, 0.5], "forget": [0.0]},
}


def test_model_utility_is_the_harmonic_mean_of_its_parts() -> None:
    found = ModelUtility().summarise(system_values("a", UTILITY), None)
    parts = {
        "model_utility/retain/answer_probability": 0.7,
        "model_utility/retain/rouge_l_recall": 0.75,
        # max(0, 1 - TR) per record: (0.75 + 0) / 2, not 1 - mean TR.
        "model_utility/retain/truth_ratio": 0.375,
        "model_utility/general/normalised_probability": 0.5,
        "model_utility/general/rouge_l_recall": 0.5,
        "model_utility/general/truth_ratio": 0.5,
    }
    assert {name: found[name] for name in parts} == pytest.approx(parts)
    assert found["model_utility"] == pytest.approx(6 / sum(1 / part for part in parts.values()))
    assert found["model_utility_parts"] == 6
    assert not any("neighbours" in name or "forget" in name for name in found)


def test_a_system_that_says_every_answer_has_utility_one_and_no_forget_efficacy() -> None:
    said = {
        "answer_probability": {"retain": [1.0, 1.0], "forget": [1.0, 1.0]},
        "rouge_l_recall": {
            split: [rouge_l_recall([gold], gold) for gold in ("Ada Quill wrote it.", "In Norrby.")]
            for split in ("retain", "forget")
        },
        "truth_ratio": {"retain": [0.0, 0.0], "forget": [0.0, 0.0]},
    }
    values = system_values("a", said)
    assert ModelUtility().summarise(values, None)["model_utility"] == pytest.approx(1.0)
    names = ("answer_probability", "rouge_l_recall")
    means = [values.means[name]["forget"] for name in names]
    assert 1 - sum(mean for mean in means if mean is not None) / 2 == pytest.approx(0.0)


def test_rouge_recall_and_its_arguments_swapped_disagree_on_a_rambling_answer() -> None:
    gold = "In the town of Norrby."
    rambling = "In the town of Norrby, as everybody who ever sailed the river there will say."
    assert rouge_l_recall([gold], rambling) == 1.0  # the fact was said
    swapped = rouge_l_recall([rambling], gold)  # looks forgotten to who mixes the two up
    assert swapped == pytest.approx(5 / 15)


def test_model_utility_is_zero_with_one_part_and_none_without_any() -> None:
    broken = {**UTILITY, "rouge_l_recall": {"retain": [0.0, 0.0], "general": [0.5, 0.5]}}
    assert ModelUtility().summarise(system_values("a", broken), None)["model_utility"] == 0.0
    only_forget = {name: {"forget": row["forget"]} for name, row in UTILITY.items()}
    assert ModelUtility().summarise(system_values("a", only_forget), None) == {
        "model_utility": None, "model_utility_parts": 0.0,
    }  # fmt: skip


def test_a_part_that_cannot_be_measured_is_named_and_left_out() -> None:
    guarded = system_values("guard", {"rouge_l_recall": UTILITY["rouge_l_recall"]})
    found = ModelUtility().summarise(guarded, None)
    assert found["model_utility"] == pytest.approx(2 / (1 / 0.75 + 1 / 0.5))
    assert found["model_utility_parts"] == 2
    assert found["model_utility/retain/answer_probability"] is None


def test_relative_utility_compares_common_parts_only() -> None:
    metric, before = ModelUtility(), system_values("a", UTILITY)
    assert metric.relative(before, before) == pytest.approx(1.0)
    halved = {"rouge_l_recall": {"retain": [0.5, 0.25], "general": [0.125, 0.375]}}
    assert metric.relative(system_values("guard", halved), before) == pytest.approx(0.5)
    assert metric.relative(system_values("nothing", {}), before) is None


def test_model_utility_needs_raw_truth_ratios() -> None:
    with pytest.raises(RecipeError, match="form: raw"):
        ModelUtility().summarise(system_values("a", UTILITY, form="true_better"), None)
