"""Forget quality: could the truth ratios on the forget set be those of a model never trained on it?

    p-value of the two-sample Kolmogorov-Smirnov test (two-sided) between the raw truth ratios of
    the system and of the reference (retrained without the forget set), and log10 p

Paper: TOFU (arXiv 2401.06121); reference code: locuslab/tofu, locuslab/open-unlearning. Deviation:
log10 p stays finite where p underflows to 0, by the leading term of the exact distribution for
samples of equal size (Gnedenko and Korolyuk 1951), else of the asymptotic one.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from pydantic import Field
from scipy.stats import ks_2samp

from delible.errors import DataError, RecipeError
from delible.measure.metric import SummaryMetric, SystemValues
from delible.registry import register


@dataclass(frozen=True)
class KolmogorovSmirnov:
    """Result of the two-sample test.

    Attributes:
        statistic: Largest distance between the two distribution functions, in [0, 1].
        p: Two-sided p-value, in [0, 1]; may have underflowed to 0.
        log10_p: log10 of the p-value, in (-inf, 0], always finite.
    """

    statistic: float
    p: float
    log10_p: float


def _log_binomial(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def log10_small_p(statistic: float, first: int, second: int) -> float:
    """log10 of a very small two-sided p-value, from the leading term of its series.

    Equal sizes n, h = n * statistic:  p ~ 2 C(2n, n - h) / C(2n, n)   (exact law)
    otherwise:                         p ~ 2 exp(-2 z^2), z^2 = statistic^2 nm / (n + m)

    Args:
        statistic: Kolmogorov-Smirnov distance, in [0, 1].
        first: Size of one sample.
        second: Size of the other.
    """
    if first == second:
        steps = round(first * statistic)
        ratio = _log_binomial(2 * first, first - steps) - _log_binomial(2 * first, first)
    else:
        ratio = -2 * statistic**2 * first * second / (first + second)
    return min(0.0, (math.log(2) + ratio) / math.log(10))


def kolmogorov_smirnov(
    first: npt.NDArray[np.float64], second: npt.NDArray[np.float64]
) -> KolmogorovSmirnov:
    """Two-sided two-sample Kolmogorov-Smirnov test.

    Args:
        first: One sample, shape [n], n >= 1.
        second: The other, shape [m], m >= 1.
    """
    with warnings.catch_warnings():
        # Said when scipy goes from the exact law to the asymptotic one; log10_small_p covers it.
        warnings.simplefilter("ignore", RuntimeWarning)
        result = ks_2samp(first, second)
    statistic, p = float(result.statistic), float(result.pvalue)
    # Denormal numbers have lost digits already, so they count as underflow.
    if p > np.finfo(np.float64).tiny:
        return KolmogorovSmirnov(statistic, p, math.log10(p))
    return KolmogorovSmirnov(statistic, p, log10_small_p(statistic, first.size, second.size))


@register(
    kind="metric",
    name="forget_quality",
    title="Forget quality",
    summary="Kolmogorov-Smirnov p-value between the truth ratios of the system and a reference "
    "that never saw the forget set.",
    paper="2401.06121",
    year=2024,
    family="indistinguishability",
    capability="score",
    changes="nothing",
    range="p: [0, 1]; log10 p: (-inf, 0]; truth ratio: [0, 1]",
    direction="High p: the truth ratios cannot be told from those of the reference. Truth ratio "
    "near 1: right and wrong are equally likely.",
    misleads="Only meaningful with a reference of the same architecture and template. Few "
    "records give a high p for want of power; a destroyed model can reach a high p by accident: "
    "read it next to utility and garbage. Says nothing about attacks.",
    badges=("parity",),
)
class ForgetQuality(SummaryMetric):
    """Keys: ``forget_quality`` (p), ``forget_quality_log10``, ``forget_quality_distance`` (of the
    test, in [0, 1]) and ``forget_truth_ratio``, the mean of min(TR, 1/TR), which needs no
    reference.
    """

    split: str = Field("forget", description="The split whose truth ratios are compared.")

    def uses(self) -> tuple[str, ...]:
        return ("truth_ratio",)

    def _raw(self, values: SystemValues) -> list[float | None] | None:
        if values.options.get("truth_ratio", {}).get("form", "raw") != "raw":
            raise RecipeError(
                "forget quality compares raw truth ratios, but the values have another form.",
                where=f"truth_ratio of '{values.system}'",
                hint="Measure truth_ratio with form: raw.",
            )
        items = values.items.get("truth_ratio", {}).get(self.split)
        return None if items is None else [item.value for item in items]

    def summarise(
        self, values: SystemValues, reference: SystemValues | None
    ) -> dict[str, float | None]:
        """The four numbers; those that need a missing reference or split are ``None``.

        Raises:
            DataError: The two systems were asked different numbers of records.
            RecipeError: The truth ratios are not raw.
        """
        found: dict[str, float | None] = dict.fromkeys(
            ("forget_quality", "forget_quality_log10", "forget_quality_distance")
        )
        found["forget_truth_ratio"] = None
        ours = self._raw(values)
        ratios = [ratio for ratio in ours or () if ratio is not None]
        if ratios:
            closeness = [min(ratio, 1 / ratio) if ratio > 0 else 0.0 for ratio in ratios]
            found["forget_truth_ratio"] = float(np.mean(closeness))
        theirs = self._raw(reference) if reference is not None else None
        if ours is None or theirs is None or reference is None:
            return found
        if len(ours) != len(theirs):
            raise DataError(
                f"{len(ours)} records of '{values.system}' against {len(theirs)} of "
                f"'{reference.system}'.",
                where=f"split '{self.split}'",
                hint="Measure both systems on the same records.",
            )
        pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if None not in (a, b)]
        if pairs:
            first, second = np.asarray(pairs, np.float64).T
            test = kolmogorov_smirnov(first, second)
            found["forget_quality"] = test.p
            found["forget_quality_log10"] = test.log10_p
            found["forget_quality_distance"] = test.statistic
        return found
