"""A student to whom all options are alike knows nothing, and a missing score is no answer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from pupil import RECORDS

from delible.system.asks import NoAnswer, Score, TokenScores
from delible.teaching.items import exam_of
from delible.teaching.level import Answered, read_level, shares_of


class Flat:
    """The same for everything; without a score for the wrong options if it is broken."""

    name, fingerprint = "flat", None
    capabilities = frozenset({"score"})

    def __init__(self, broken: bool = False) -> None:
        self.broken = broken

    def score(self, requests: Sequence[Score]) -> list[TokenScores | NoAnswer]:
        right = {one.answer for one in RECORDS}
        return [
            NoAnswer("no score") if self.broken and one.answer not in right
            else TokenScores(np.full(3, -2.5, np.float32), np.zeros(3, bool), False)
            for one in requests
        ]  # fmt: skip


def test_a_draw_is_chance_and_no_knowledge() -> None:
    items = exam_of(RECORDS).checks
    level = read_level(Flat(), items, ())  # type: ignore[arg-type]
    assert level.accuracy == pytest.approx(1 / len(items[0].choice.options))
    assert {one.state for one in level.answers} == {"unknown"}
    assert level.valid == 1


def test_a_missing_score_makes_no_option_the_likeliest() -> None:
    level = read_level(Flat(broken=True), exam_of(RECORDS).checks, ())  # type: ignore[arg-type]
    assert (level.accuracy, level.valid, level.state) == (0.0, 0.0, "unknown")
    assert shares_of([-1.0, math.nan]) == shares_of([math.nan, -1.0]) == (0.0, 0.0)


def test_a_firm_draw_is_no_misconception() -> None:
    (item, *_) = exam_of(RECORDS).checks
    assert Answered(item, (0.5, 0.5, 0.0), 0.5).state == "unknown"
    assert Answered(item, (0.0, 0.5, 0.5), 0.0).state == "misconception"
