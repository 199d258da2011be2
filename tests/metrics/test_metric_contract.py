"""What every registered metric must keep."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from delible import registry
from delible.component import build
from delible.errors import RecipeError
from delible.measure.evaluate import evaluate
from delible.measure.metric import ItemMetric, SummaryMetric
from delible.records import QA, Choice, Dialogue, Message, Passage, RecordBase
from delible.system.asks import (
    Array,
    Decoding,
    Generate,
    GradientNorm,
    Inspection,
    Prompt,
    Score,
    TokenScores,
)

NAMES = [card.name for card in registry.cards("metric")]
EXPECTED = {
    "answer_probability", "paraphrase_probability", "normalised_probability", "rouge_l_recall",
    "exact_memorisation", "extraction_strength", "truth_ratio", "outcome", "outcome_shares",
    "forget_quality", "model_utility",
    "knowledge_truth_ratio", "loss_attack", "zlib_attack", "min_k", "membership",
    "reference_attack", "rouge_l_f1", "verbatim_memorisation", "knowledge_memorisation",
    "ngram_entropy", "rwku_recall", "token_f1", "chain_exact_match", "truthful_choice",
    "choice_accuracy", "letter_mass", "forget_degree", "retain_utility", "refusal_stability",
    "honesty", "unlearning_quality", "retention_quality",
}  # fmt: skip
#: What has no default.
OPTIONS = {"unlearning_quality": {"judge": "stub"}, "retention_quality": {"judge": "stub"}}

pytestmark = pytest.mark.usefixtures("stub_judge")


def made(name: str) -> ItemMetric | SummaryMetric:
    metric = build("metric", {"name": name, **OPTIONS.get(name, {})})
    assert isinstance(metric, ItemMetric | SummaryMetric)
    return metric


RECORDS: list[RecordBase] = [
    QA(question="Where?", answer="In Rome", paraphrased_answers=("Rome it is",),
       perturbed=("In Oslo", "In Bern")),
    QA(question="Where else?", answer="In Riga"),
    Passage(text="Once upon a time."),
    Choice(question="Which?", options=("Rome", "Oslo"), correct=0),
    Dialogue(messages=(Message(role="user", content="Hm?"),
                       Message(role="assistant", content="In Rome"))),
    Dialogue(messages=(Message(role="user", content="Hm?"),)),
]  # fmt: skip


class Fake:
    """White-box answers that depend on nothing but the request."""

    name = "fake"
    fingerprint = None
    capabilities = frozenset({"generate", "score", "distribution", "weights"})

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str]:
        return ["In Rome, I think." for _ in prompts]

    def score(self, requests: Sequence[Score]) -> list[TokenScores]:
        found = []
        for request in requests:
            generator = np.random.default_rng(len(request.answer))
            size = 1 + len(request.answer.split())
            logprobs = -generator.random(size).astype(np.float32)
            moments = (logprobs - 0.5, logprobs**2 + 1) if request.moments else ()
            has_end = request.prompt.text is None
            found.append(TokenScores(logprobs, logprobs > -0.5, has_end, *moments))
        return found

    def inspect(self, requests: Sequence[Inspection]) -> list[Array]:
        return [np.array([1.0 + len(request.answer)], np.float32) for request in requests]


def card_range(name: str) -> str | None:
    return registry.card("metric", name).range


def test_every_metric_is_found() -> None:
    assert set(NAMES) >= EXPECTED


@pytest.mark.parametrize("name", NAMES)
def test_the_card_says_what_a_reader_needs(name: str) -> None:
    card = registry.card("metric", name)
    for field in ("title", "summary", "range", "direction", "misleads", "capability", "family"):
        assert getattr(card, field), field
    assert card.summary.endswith(".")
    assert registry.load("metric", name).card == card


@pytest.mark.parametrize("name", NAMES)
def test_options_are_described_and_come_back_from_their_spec(name: str) -> None:
    metric = made(name)
    assert build("metric", metric.spec()) == metric
    assert metric.spec()["name"] == name
    with pytest.raises(RecipeError, match="unknown option 'surely_unknown'"):
        build("metric", {**metric.spec(), "surely_unknown": 1})


@pytest.mark.parametrize("name", NAMES)
def test_summaries_read_item_metrics_only(name: str) -> None:
    metric = made(name)
    if not isinstance(metric, SummaryMetric):
        assert isinstance(metric, ItemMetric)
        return
    assert metric.uses()
    for used in metric.uses():
        assert isinstance(build("metric", used), ItemMetric)


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_record_gives_a_value_in_range_or_a_reason(name: str) -> None:
    metric = made(name)
    values = evaluate(Fake(), {"forget": RECORDS, "retain": RECORDS[1:]}, [metric])
    assert not values.skipped
    for used, by_split in values.items.items():
        for split, items in by_split.items():
            assert len(items) == len(RECORDS) - (split == "retain")
            valued = [item.value for item in items if item.value is not None]
            assert all(item.reason for item in items if item.value is None)
            open_ended = any(word in str(card_range(used)) for word in ("inf", "1e10"))
            signed = "-inf" in str(card_range(used))
            highest = 10 if card_range(used) == "[0, 10]" else 1
            assert all(
                (value >= 0 or signed) and (value <= highest or open_ended) for value in valued
            )
            mean = values.means[used][split]
            # Items without a value are never averaged.
            assert mean is None if not valued else mean == pytest.approx(np.mean(valued))
        assert any(item.value is not None for item in by_split["forget"])
    if isinstance(metric, SummaryMetric):
        for value in metric.summarise(values, values).values():
            assert value is None or math.isfinite(value)


@pytest.mark.parametrize("name", NAMES)
def test_a_metric_asks_only_for_its_capability(name: str) -> None:
    metric = made(name)
    if isinstance(metric, SummaryMetric):
        needed = {build("metric", used).card.capability for used in metric.uses()}
        assert metric.card.capability in needed
        return
    kinds = {
        "score": Score, "distribution": Score, "generate": Generate, "weights": GradientNorm,
    }  # fmt: skip
    kind = kinds[metric.card.capability]
    prompt = Prompt.ask("Elsewhere?", prefill="Sure:")
    requests = [r for record in RECORDS for r in metric.requests(record, prompt)]
    assert requests
    assert all(isinstance(request, kind) for request in requests)
    # An attack's prompt is the one that is asked.
    assert all(request.prompt == prompt for request in requests)
