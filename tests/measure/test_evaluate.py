"""Evaluation: one measurement for all metrics, prompt variants, means, skipped metrics."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest

from delible.errors import RecipeError
from delible.measure import evaluate as evaluation
from delible.measure.cache import Cache
from delible.measure.evaluate import bootstrap_interval, evaluate, finite, joined, mean_item
from delible.measure.metric import Answers, Item, ItemMetric, SystemValues
from delible.metrics.answer_probability import AnswerProbability
from delible.metrics.exact_memorisation import ExactMemorisation
from delible.metrics.extraction_strength import ExtractionStrength
from delible.metrics.forget_quality import ForgetQuality
from delible.metrics.outcome import Outcome
from delible.metrics.rouge_l_recall import RougeLRecall
from delible.metrics.truth_ratio import TruthRatio
from delible.records import QA, Passage, RecordBase
from delible.registry import register
from delible.system.asks import (
    Decoding,
    Generate,
    Prompt,
    Request,
    Score,
    TokenScores,
)


class Parrot:
    """Says its question; finds every answer as likely as its number of characters says."""

    name = "parrot"
    fingerprint = "parrot"

    def __init__(self, capabilities: Iterable[str] = ("generate", "score")) -> None:
        self.capabilities = frozenset(capabilities)
        self.calls = 0

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str]:
        self.calls += 1
        return [prompt.messages[-1].content for prompt in prompts]

    def score(self, requests: Sequence[Score]) -> list[TokenScores]:
        self.calls += 1
        return [
            TokenScores(
                np.array([-float(len(request.answer)), 0.0], np.float32),
                np.array([len(request.answer) < 4, True]),
                has_end=True,
            )
            for request in requests
        ]


RECORDS = [QA(question="Paris?", answer="Paris"), QA(question="London?", answer="Rome")]


def test_values_means_and_what_it_cost() -> None:
    system = Parrot()
    metrics = [
        AnswerProbability(), ExactMemorisation(), ExtractionStrength(), RougeLRecall(), Outcome(),
    ]  # fmt: skip
    values = evaluate(system, {"forget": RECORDS, "retain": RECORDS[:1]}, metrics)
    probabilities = [math.exp(-2.5), math.exp(-2.0)]
    found = [item.value for item in values.items["answer_probability"]["forget"]]
    assert found == pytest.approx(probabilities)
    assert values.means["answer_probability"]["forget"] == pytest.approx(np.mean(probabilities))
    assert values.means["answer_probability"]["retain"] == pytest.approx(probabilities[0])
    assert values.means["rouge_l_recall"] == {"forget": 0.5, "retain": 1.0}
    assert [item.detail for item in values.items["outcome"]["forget"]] == [
        "correct", "wrong-but-fluent",
    ]  # fmt: skip
    # Three splits' worth of five metrics, but only two scores and two texts to ask for.
    assert values.measured == {
        "asked": 15, "unique": 4, "cached": 0, "scored": 2, "generated": 2,
        "inspected": 0, "unanswered": 0,
    }  # fmt: skip
    assert system.calls == 2
    assert values.system == "parrot"
    assert values.options["rouge_l_recall"]["max_new_tokens"] == 64


def test_metrics_that_a_system_cannot_answer_are_skipped_with_the_reason() -> None:
    values = evaluate(Parrot(["generate"]), {"forget": RECORDS}, [TruthRatio(), RougeLRecall()])
    assert set(values.items) == set(values.means) == {"rouge_l_recall"}
    assert list(values.skipped) == ["truth_ratio"]
    assert "'score'" in values.skipped["truth_ratio"]


def test_a_summary_brings_the_metrics_that_it_reads() -> None:
    values = evaluate(Parrot(), {"forget": RECORDS}, [ForgetQuality()])
    assert set(values.items) == {"truth_ratio"}
    given = TruthRatio(form="true_better")
    values = evaluate(Parrot(), {"forget": RECORDS}, [ForgetQuality(), given])
    assert values.options["truth_ratio"]["form"] == "true_better"


def test_a_metric_given_twice_is_an_error() -> None:
    with pytest.raises(RecipeError, match="'truth_ratio' is given twice"):
        evaluate(Parrot(), {}, [TruthRatio(), TruthRatio(form="true_better")])


def test_items_without_a_value_are_not_averaged() -> None:
    records = [
        QA(question="q", answer="right", perturbed=("wrong",)),
        QA(question="q", answer="right"),
        Passage(text="running text"),
    ]
    values = evaluate(Parrot(), {"forget": records, "none": records[1:]}, [TruthRatio()])
    one, without, passage = values.items["truth_ratio"]["forget"]
    assert one.value == pytest.approx(1.0, rel=1e-6)
    assert (without.value, without.reason) == (None, "the record has no perturbed answers")
    assert passage.value is None
    assert "does not apply to this Passage" in str(passage.reason)
    assert values.means["truth_ratio"] == {"forget": one.value, "none": None}


def test_a_prompt_attack_asks_every_variant_and_averages() -> None:
    def rewrite(record: RecordBase, prompt: Prompt) -> list[Prompt]:
        if record is RECORDS[1]:
            return []
        question = prompt.messages[-1].content
        return [Prompt.ask(question), Prompt.ask("Rome?"), Prompt.ask("Oslo? Paris?")]

    values = evaluate(Parrot(), {"forget": RECORDS}, [Outcome()], rewrite=rewrite)
    asked, unasked = values.items["outcome"]["forget"]
    assert asked.value == pytest.approx(2 / 3)
    assert asked.detail == "correct | wrong-but-fluent | correct"
    assert (unasked.value, unasked.reason) == (None, "the attack has no prompt for this record")
    assert values.measured["generated"] == 3


def test_answers_are_cached_between_evaluations(tmp_path: Path) -> None:
    first = evaluate(Parrot(), {"f": RECORDS}, [AnswerProbability()], cache=Cache(tmp_path))
    system = Parrot()
    metrics = [AnswerProbability(), ExtractionStrength()]
    second = evaluate(system, {"f": RECORDS}, metrics, cache=Cache(tmp_path))
    assert system.calls == 0
    assert second.measured["cached"] == 2
    assert second.means["answer_probability"] == first.means["answer_probability"]


def test_a_value_that_is_no_number_is_no_value() -> None:
    class Broken(Parrot):
        def score(self, requests: Sequence[Score]) -> list[TokenScores]:
            nan = np.array([np.nan, 0.0], np.float32)
            return [TokenScores(nan, np.array([False, True]), True) for _ in requests]

    values = evaluate(Broken(), {"f": RECORDS}, [AnswerProbability()])
    assert values.means["answer_probability"]["f"] is None
    assert "not a finite number" in str(values.items["answer_probability"]["f"][0].reason)
    assert finite(Item(math.inf)).value is None
    assert finite(Item(0.5)).value == 0.5


def test_the_mean_over_variants_ignores_those_without_a_value() -> None:
    mixed = [Item(None, "first"), Item(0.25, detail="a"), Item(0.75, detail="b")]
    assert mean_item(mixed) == Item(0.5, None, "a | b", forms=(None, 0.25, 0.75))
    broken = mean_item([Item(None, "broken", "x"), *mixed])
    assert broken == Item(0.5, None, "a | b", forms=(None, None, 0.25, 0.75))
    nothing = mean_item([Item(None, "first"), Item(None, "second")])
    assert nothing == Item(None, "first", forms=(None, None))


def test_a_third_partys_metric_needs_nothing_but_the_two_methods() -> None:
    @register(kind="metric", name="loudness", title="t", summary="s", capability="generate")
    class Loudness(ItemMetric):
        def requests(self, record: RecordBase, prompt: Prompt) -> Iterable[Request]:
            return [Generate(prompt, Decoding(8))]

        def score(self, record: RecordBase, prompt: Prompt, answers: Answers) -> Item:
            return Item(float(len(str(answers[Generate(prompt, Decoding(8))]))))

    values = evaluate(Parrot(), {"f": RECORDS}, [Loudness()])
    assert values.means["loudness"]["f"] == pytest.approx((6 + 7) / 2)


def test_bootstrap_agrees_with_the_normal_interval() -> None:
    sample = np.random.default_rng(3).normal(2.0, 1.0, 400)
    low, high = bootstrap_interval(sample, seed=0)
    assert low is not None
    assert high is not None
    error = sample.std() / math.sqrt(sample.size)
    assert low == pytest.approx(sample.mean() - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(sample.mean() + 1.96 * error, abs=0.2 * error)
    assert bootstrap_interval(list(sample), seed=0) == (low, high)
    assert bootstrap_interval(sample, seed=1) != (low, high)


def test_bootstrap_is_the_middle_of_means_of_draws_with_replacement() -> None:
    sample = np.random.default_rng(5).random(37)
    draws = np.random.default_rng(11).integers(37, size=(500, 37))
    means = [math.fsum(sample[row]) / 37 for row in draws]
    found = bootstrap_interval(sample, seed=11, resamples=500)
    assert found == pytest.approx(np.quantile(means, [0.025, 0.975]), rel=1e-12)


def test_bootstrap_of_nothing_and_of_constants() -> None:
    assert bootstrap_interval([], seed=0) == (None, None)
    assert bootstrap_interval([0.25], seed=0) == (0.25, 0.25)
    assert bootstrap_interval([0.5] * 7, seed=0) == (0.5, 0.5)


def test_bootstrap_draws_every_resample_in_blocks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = np.random.default_rng(0).random(50)
    monkeypatch.setattr(evaluation, "_DRAWS_AT_ONCE", 50 * 300)
    # Blocks draw the same stream of numbers, so the interval is the same to the bit.
    blocked = bootstrap_interval(sample, seed=0)
    monkeypatch.setattr(evaluation, "_DRAWS_AT_ONCE", 10**9)
    assert bootstrap_interval(sample, seed=0) == blocked


def test_values_of_several_models_are_joined_by_record() -> None:
    def part(forget: list[float | None], retain: list[float], **more: object) -> SystemValues:
        items = {
            "m": {
                "forget": [Item(value, None if value is not None else "why") for value in forget],
                "retain": [Item(value) for value in retain],
            },
            "n": {"forget": [Item(0.0)] * len(forget), "retain": [Item(0.0)] * 2},
        }
        values: dict[str, object] = {"measured": {"asked": 2}, "asked": 3, "unanswered": {"x": 1}}
        return SystemValues("s", items, **{**values, **more})  # type: ignore[arg-type]

    found = joined([part([0.5], [1.0, 0.0]), part([None, 1.0], [0.0, 0.0])], "forget")
    assert [item.value for item in found.items["m"]["forget"]] == [0.5, None, 1.0]
    assert found.items["m"]["forget"][1].reason == "why"
    assert [item.value for item in found.items["m"]["retain"]] == [0.5, 0.0]
    assert found.means["m"] == {"forget": 0.75, "retain": 0.25}
    assert (found.measured, found.asked, found.unanswered) == ({"asked": 4}, 6, {"x": 2})
    gone = joined([part([0.5], [1.0, 0.0]), part([1.0], [0.0, 0.0], skipped={"n": "no"})], "forget")
    assert gone.skipped == {"n": "no"}
    assert list(gone.items) == ["m"]
