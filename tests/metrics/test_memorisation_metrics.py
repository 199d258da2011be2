"""Metrics of teacher-forced scores against brute force in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from delible.measure.metric import Item, ItemMetric
from delible.metrics.answer_probability import AnswerProbability, answer_probability
from delible.metrics.exact_memorisation import ExactMemorisation, exact_memorisation
from delible.metrics.extraction_strength import ExtractionStrength, extraction_strength
from delible.metrics.normalised_probability import NormalisedProbability
from delible.metrics.paraphrase_probability import ParaphraseProbability
from delible.metrics.truth_ratio import Form, TruthRatio, truth_ratio
from delible.records import QA, Dialogue, Message, Passage, RecordBase
from delible.system.asks import (
    Answer,
    Prompt,
    Request,
    Score,
    TokenScores,
)


def scores(probabilities: Sequence[float], hits: str = "", has_end: bool = True) -> TokenScores:
    """Token scores from probabilities and a string of hits such as ``"011"``."""
    flags = [flag == "1" for flag in hits or "0" * len(probabilities)]
    return TokenScores(
        np.log(np.asarray(probabilities, np.float64)).astype(np.float32),
        np.asarray(flags, np.bool_),
        has_end,
    )


def item_of(metric: ItemMetric, record: RecordBase, table: dict[str, TokenScores]) -> Item:
    """The metric's item, with every answer's scores looked up by its text."""
    prompt = metric.prompt(record)
    assert prompt is not None
    answers: dict[Request, Answer] = {}
    for request in metric.requests(record, prompt):
        assert isinstance(request, Score)
        assert request.prompt == prompt
        answers[request] = table[request.answer]
    return metric.score(record, prompt, answers)


def random_hits(count: int = 300) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [
        generator.random(int(generator.integers(1, 12))) < generator.random() for _ in range(count)
    ]


def greedy_suffix(hits: np.ndarray, lowest: bool) -> float:
    """The definition: least k such that all later tokens are greedy, over all k."""
    length = len(hits)
    last = length if lowest else length - 1
    k = next((k for k in range(last) if all(hits[k:])), last)
    return 1 - k / length


def test_extraction_strength_is_the_greedy_suffix_definition() -> None:
    for hits in random_hits():
        padded = np.append(hits, False)
        assert extraction_strength(hits, False) == pytest.approx(greedy_suffix(hits, True))
        # The end-of-turn token does not count, whether it is a hit or not.
        assert extraction_strength(padded, True) == pytest.approx(greedy_suffix(hits, True))
        # The reference code's loop: last token dropped, never below 1/L'.
        assert extraction_strength(padded, True, compat=True) == pytest.approx(
            greedy_suffix(hits, False)
        )
        assert extraction_strength(padded, False, compat=True) == pytest.approx(
            greedy_suffix(hits, False)
        )


@pytest.mark.parametrize(
    ("hits", "expected"), [("1111", 1.0), ("0000", 0.0), ("1110", 0.0), ("0101", 0.25), ("01", 0.5)]
)
def test_extraction_strength_by_hand(hits: str, expected: float) -> None:
    found = extraction_strength(np.array([flag == "1" for flag in hits]), has_end=False)
    assert found == pytest.approx(expected)


def test_exact_memorisation_is_never_below_extraction_strength() -> None:
    for hits in random_hits():
        memorised, extracted = exact_memorisation(hits, False), extraction_strength(hits, False)
        assert memorised is not None
        assert extracted is not None
        assert memorised == pytest.approx(sum(bool(hit) for hit in hits) / len(hits))
        assert memorised >= extracted


def test_a_full_match_is_one_for_both_and_for_neither_without_tokens() -> None:
    ones = np.ones(5, np.bool_)
    assert extraction_strength(ones, True) == exact_memorisation(ones, True) == 1.0
    for hits, has_end in ((np.zeros(0, np.bool_), False), (np.ones(1, np.bool_), True)):
        assert extraction_strength(hits, has_end) is None
        assert exact_memorisation(hits, has_end) is None
        assert extraction_strength(hits, has_end, compat=True) is None


def test_compat_drops_the_last_token_of_plain_text_too() -> None:
    hits = np.array([True, True, False])
    assert extraction_strength(hits, has_end=False) == 0.0
    assert extraction_strength(hits, has_end=False, compat=True) == 1.0
    assert exact_memorisation(hits, has_end=False) == pytest.approx(2 / 3)
    assert exact_memorisation(hits, has_end=False, compat=True) == 1.0


def test_answer_probability_is_the_root_of_the_product_with_the_end() -> None:
    found = answer_probability(scores([0.9, 0.5, 0.2]))
    assert found == pytest.approx((0.9 * 0.5 * 0.2) ** (1 / 3), rel=1e-6)
    assert answer_probability(scores([1.0, 1.0])) == 1.0
    assert answer_probability(scores([0.5])) is None
    impossible = TokenScores(np.array([-np.inf, 0], np.float32), np.zeros(2, np.bool_), True)
    assert answer_probability(impossible) == 0.0


RECORD = QA(
    question="Where?",
    answer="Rome",
    aliases=("Roma",),
    paraphrased_answers=("In Rome", "It is Rome"),
    perturbed=("Oslo", "Bern", "Riga"),
)
TABLE = {
    "Rome": scores([0.6, 0.9], "01"),
    "In Rome": scores([0.5, 0.4, 0.9]),
    "It is Rome": scores([0.3, 0.9, 0.5, 0.9]),
    "Oslo": scores([0.1, 0.8]),
    "Bern": scores([0.05, 0.9]),
    "Riga": scores([0.2, 0.7]),
}


def root(*probabilities: float) -> float:
    """Geometric mean."""
    return math.prod(probabilities) ** (1 / len(probabilities))


P_OSLO, P_BERN, P_RIGA = root(0.1, 0.8), root(0.05, 0.9), root(0.2, 0.7)
P_PARAPHRASED = root(root(0.5, 0.4, 0.9), root(0.3, 0.9, 0.5, 0.9))


def test_item_metrics_read_the_right_answers() -> None:
    assert item_of(AnswerProbability(), RECORD, TABLE).value == pytest.approx(root(0.6, 0.9))
    assert item_of(ExactMemorisation(), RECORD, TABLE).value == 0.0
    assert item_of(ExtractionStrength(), RECORD, TABLE).value == 0.0
    assert item_of(ExtractionStrength(compat=True), RECORD, TABLE).value == 1.0


def test_paraphrase_probability_is_the_geometric_mean() -> None:
    found = item_of(ParaphraseProbability(), RECORD, TABLE).value
    assert found == pytest.approx(P_PARAPHRASED, rel=1e-6)


def test_normalised_probability() -> None:
    right = root(0.6, 0.9)
    found = item_of(NormalisedProbability(), RECORD, TABLE).value
    assert found == pytest.approx(right / (right + P_OSLO + P_BERN + P_RIGA), rel=1e-6)


def test_truth_ratio_is_the_geometric_mean_of_wrong_over_right() -> None:
    raw = root(P_OSLO, P_BERN, P_RIGA) / P_PARAPHRASED
    forms: dict[Form, float] = {
        "raw": raw,
        "closer_to_one": min(raw, 1 / raw),
        "true_better": max(0, 1 - raw),
    }
    for form, expected in forms.items():
        found = item_of(TruthRatio(form=form), RECORD, TABLE).value
        assert found == pytest.approx(expected, rel=1e-6)


def test_truth_ratio_uses_the_answer_when_there_is_no_paraphrase() -> None:
    record = RECORD.model_copy(update={"paraphrased_answers": ()})
    found = item_of(TruthRatio(), record, TABLE).value
    assert found == pytest.approx(root(P_OSLO, P_BERN, P_RIGA) / root(0.6, 0.9), rel=1e-6)


def test_truth_ratio_inverts_when_right_and_wrong_are_swapped() -> None:
    swapped = RECORD.model_copy(
        update={"paraphrased_answers": RECORD.perturbed, "perturbed": RECORD.paraphrased_answers}
    )
    there = item_of(TruthRatio(), RECORD, TABLE).value
    back = item_of(TruthRatio(), swapped, TABLE).value
    assert there is not None
    assert back is not None
    assert there != pytest.approx(1.0)
    assert there * back == pytest.approx(1.0, rel=1e-8)


def test_forms_of_the_truth_ratio_stay_in_their_range() -> None:
    generator = np.random.default_rng(0)
    extremes = [0.0, -1e-9, -30.0, -2000.0, -math.inf]
    logs = [*extremes, *(-generator.exponential(5, 40))]
    for right in logs:
        for wrong in logs:
            assert 0 <= truth_ratio(right, wrong) <= 1.0000001e10
            assert 0 <= truth_ratio(right, wrong, "closer_to_one") <= 1
            assert 0 <= truth_ratio(right, wrong, "true_better") <= 1
    assert truth_ratio(0.0, 0.0) == pytest.approx(1.0)


@pytest.mark.parametrize("metric", [ParaphraseProbability(), NormalisedProbability(), TruthRatio()])
def test_without_the_needed_answers_there_is_no_value(metric: ItemMetric) -> None:
    found = item_of(metric, QA(question="q", answer="a"), {})
    assert found.value is None
    assert "has no" in str(found.reason)


@pytest.mark.parametrize(
    "metric",
    [
        AnswerProbability(), ExactMemorisation(), ExtractionStrength(), ParaphraseProbability(),
        NormalisedProbability(), TruthRatio(),
    ],
)  # fmt: skip
def test_an_answer_without_tokens_has_no_value(metric: ItemMetric) -> None:
    found = item_of(metric, RECORD, dict.fromkeys(TABLE, scores([0.5])))
    assert found.value is None
    assert "no tokens" in str(found.reason)


def test_passages_and_dialogues_are_scored_by_their_text_and_last_turn() -> None:
    table = {"once": scores([0.25], "1", has_end=False), "Rome": scores([0.6, 0.9], "11")}
    passage = item_of(AnswerProbability(), Passage(text="once"), table)
    assert passage.value == pytest.approx(0.25)
    turns = (Message(role="user", content="Where?"), Message(role="assistant", content="Rome"))
    assert item_of(ExtractionStrength(), Dialogue(messages=turns), table).value == 1.0
    unanswered = item_of(AnswerProbability(), Dialogue(messages=turns[:1]), table)
    assert (unanswered.value, unanswered.reason) == (None, "the record has no answer")


def test_an_attacks_prompt_is_used() -> None:
    prompt = Prompt.ask("Elsewhere?", prefill="Sure:")
    for metric in (AnswerProbability(), TruthRatio(), ExtractionStrength()):
        requests = list(metric.requests(RECORD, prompt))
        assert requests
        assert all(request.prompt == prompt for request in requests)
