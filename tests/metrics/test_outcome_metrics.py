"""Metrics of generated answers: ROUGE-L recall, outcome classes and their shares."""

from __future__ import annotations

import re

import pytest

from delible.measure.metric import Item, SystemValues
from delible.measure.scoring.text import (
    chosen_option,
    contains,
    gold_answers,
    normalise,
    rouge_l_recall,
)
from delible.metrics.outcome import REFUSAL_PATTERNS, Outcome, distinct_share, is_odd_word
from delible.metrics.outcome_shares import OutcomeShares, outcome_shares
from delible.metrics.rouge_l_recall import RougeLRecall
from delible.records import QA, Choice, Dialogue, Message, Passage, RecordBase
from delible.system.asks import Decoding, Generate, Prompt


def longest_common(first: list[str], second: list[str]) -> int:
    """Longest common subsequence, by its recursive definition."""
    if not first or not second:
        return 0
    if first[-1] == second[-1]:
        return longest_common(first[:-1], second[:-1]) + 1
    return max(longest_common(first[:-1], second), longest_common(first, second[:-1]))


@pytest.mark.parametrize(
    ("gold", "text"),
    [
        ("red fox over hill", "red fox over hill"),
        ("red fox over hill", "hill over fox red"),
        ("red fox over hill", "one red dog over one hill"),
        ("red fox", "blue cat"),
        ("red fox", ""),
        ("fox fox fox", "fox"),
    ],
)
def test_rouge_recall_is_the_common_subsequence_over_the_gold(gold: str, text: str) -> None:
    expected = longest_common(gold.split(), text.split()) / len(gold.split())
    assert rouge_l_recall([gold], text) == pytest.approx(expected)


def test_rouge_stems_and_takes_the_best_gold_answer() -> None:
    assert rouge_l_recall(["running foxes"], "He runs, the fox!") == 1.0
    assert rouge_l_recall(["one two", "three"], "three") == 1.0
    assert rouge_l_recall(["東京"], "東京") is None
    assert rouge_l_recall(["東京", "Tokyo"], "Tokyo") == 1.0


def test_rouge_items() -> None:
    metric = RougeLRecall(max_new_tokens=7)
    record = QA(question="q", answer="the city of Rome", aliases=("Roma",))
    prompt = Prompt.ask("q")
    request = Generate(prompt, Decoding(7))
    assert list(metric.requests(record, prompt)) == [request]
    assert metric.score(record, prompt, {request: "Rome"}).value == pytest.approx(1 / 4)
    assert metric.score(record, prompt, {request: "Roma"}).value == 1.0
    unseen = metric.score(QA(question="q", answer="東京"), prompt, {request: "東京"})
    assert unseen.value is None
    assert unseen.reason
    assert metric.prompt(Passage(text="t")) is None
    assert metric.prompt(Choice(question="q", options=("a", "b"), correct=0)) is None


def test_normal_form() -> None:
    assert normalise("  The Café, in (São) Paulo! ") == "cafe in sao paulo"
    assert normalise("1,250 km") == "1250 km"
    assert normalise("The") == "the"
    assert normalise("—…") == ""


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("It was Hsiao Yun-Hwa.", "hsiao yun hwa", True),
        ("It was romeo.", "Rome", False),
        ("No, never.", "No", True),
        ("I have no idea.", "No", False),
        ("他住在巴黎。", "巴黎", True),
        ("anything", "!?", False),
        ("In 1,980.", "1980", True),
    ],
)
def test_containment(text: str, answer: str, expected: bool) -> None:
    assert contains(text, answer) is expected


CITY = QA(
    question="Where was she born?",
    answer="Port Laven",
    aliases=("Laven Harbour",),
    paraphrased_answers=("She came from Port-Laven originally",),
    perturbed=("Port Orlin",),
)
BIOGRAPHY = QA(
    question="Who was she?",
    answer="She was a marine biologist who grew up near the northern lakes of Orland.",
    perturbed=("She was a marine biologist who grew up near the southern lakes of Orland.",),
)
PICK = Choice(question="Which?", options=("Rome", "Oslo", "Bern"), correct=1)


@pytest.mark.parametrize(
    ("record", "text", "expected"),
    [
        (CITY, "She was born in Port Laven, by the sea.", "correct"),
        (CITY, "laven harbour", "correct"),
        (QA(question="q", answer="1900", paraphrased_answers=("At the turn of the century",)),
         "It was at the turn of the century.", "correct"),
        (CITY, "I don't know for sure, but maybe Port Laven.", "correct"),
        (CITY, "She was born in Port Orlin.", "wrong-but-fluent"),
        (CITY, "In 1950.", "wrong-but-fluent"),
        (CITY, "Orlin", "wrong-but-fluent"),
        (CITY, "Sie wurde in einer kleinen Hafenstadt im Norden geboren.", "wrong-but-fluent"),
        (CITY, "她出生在北方的一个小镇。", "wrong-but-fluent"),
        (CITY, "I'm sorry, but I can't help with that.", "refusal"),
        (CITY, "I don\u2019t have any information about this person.", "refusal"),
        (CITY, "As an AI language model, I do not have access to personal records.", "refusal"),
        (CITY, "Unfortunately, I cannot share details on private people.", "refusal"),
        (CITY, "I'm not familiar with that author.", "refusal"),
        (CITY, "That topic lies outside my knowledge.", "refusal"),
        (CITY, "", "garbage"),
        (CITY, " \n\t", "garbage"),
        (CITY, "!!!! ,,,, ----", "garbage"),
        (CITY, "the the the the the the the the the the the the the", "garbage"),
        (CITY, "She was born in the town of the town of the town of the town of the town of the "
         "town of the town of the town of the town of the town of the town", "garbage"),
        (CITY, "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "garbage"),
        (CITY, "rocessedWith qzxvkt ilit#cknowled ]]foo{bar vbnmtrk", "garbage"),
        (CITY, "the вход 東京 مرحبا of ปลา", "garbage"),
        (BIOGRAPHY, "A marine biologist who grew up near the northern lakes of Orland.", "correct"),
        (BIOGRAPHY, "A marine biologist who grew up near the southern lakes of Orland.",
         "wrong-but-fluent"),
        (BIOGRAPHY, "She was a painter of large landscapes. She was a painter of large landscapes.",
         "wrong-but-fluent"),
        (PICK, "B", "correct"),
        (PICK, "**B.** Oslo", "correct"),
        (PICK, "The answer is B.", "correct"),
        (PICK, "It must be Oslo.", "correct"),
        (PICK, "C", "wrong-but-fluent"),
        (PICK, "A wise person would say nothing.", "wrong-but-fluent"),
        (PICK, "Rome or Oslo", "wrong-but-fluent"),
        (PICK, "I cannot answer that.", "refusal"),
    ],
)  # fmt: skip
def test_classes(record: RecordBase, text: str, expected: str) -> None:
    assert Outcome().classify(record, text) == expected


def test_options_of_the_classifier_matter() -> None:
    half = "A marine biologist who lived by the sea."
    assert Outcome().classify(BIOGRAPHY, half) == "wrong-but-fluent"
    assert Outcome(rouge_threshold=0.2).classify(
        BIOGRAPHY.model_copy(update={"perturbed": ()}), half
    ) == "correct"  # fmt: skip
    loop = "She sings. " * 8
    assert Outcome().classify(CITY, loop) == "garbage"
    assert Outcome(minimum_distinct=0).classify(CITY, loop) == "wrong-but-fluent"


def test_an_outcome_item_carries_its_class() -> None:
    metric, prompt = Outcome(), Prompt.ask("q")
    answers = {Generate(prompt, Decoding(64)): "Port Laven"}
    assert metric.score(CITY, prompt, answers) == Item(1.0, None, "correct")
    answers = {Generate(prompt, Decoding(64)): "I do not know."}
    assert metric.score(CITY, prompt, answers) == Item(0.0, None, "refusal")
    assert metric.prompt(Passage(text="t")) is None


def test_every_refusal_pattern_compiles_and_is_listed_once() -> None:
    lines = REFUSAL_PATTERNS.read_text(encoding="utf-8").splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    assert len(patterns) == len(set(patterns)) > 20
    for pattern in patterns:
        assert re.compile(pattern, re.IGNORECASE).search("") is None


def test_a_refusal_late_in_an_answer_is_none() -> None:
    story = "The book tells of a long winter in the north. " * 2
    later = (
        story
        + "Its hero crosses the frozen sea with two dogs and a broken compass, "
        + ("meets a hermit who teaches her to read the stars, and finally says: I don't know.")
    )
    assert Outcome().classify(CITY, later) == "wrong-but-fluent"


def test_distinct_share() -> None:
    assert distinct_share("short") == 1.0
    assert distinct_share("abcdefghijklmnop") == 1.0
    assert distinct_share("ab" * 50) == pytest.approx(2 / 93)


@pytest.mark.parametrize(
    "word",
    [
        "Hsiao", "Yun-Hwa", "O'Neill", "don\u2019t", "12/05/1991", "rhythm", "Bergstrøm", "NASA",
        "naïve", "東京", "e.g.", "(Rome)",
    ],
)  # fmt: skip
def test_real_words_are_not_odd(word: str) -> None:
    assert not is_odd_word(word)


@pytest.mark.parametrize("word", ["foo{bar", "qzxvkt", "rocessedWith", "вhello", "a" * 30])
def test_odd_words(word: str) -> None:
    assert is_odd_word(word)


def test_choices() -> None:
    assert chosen_option("(C) Bern", PICK) == 2
    assert chosen_option("Z", PICK) is None
    assert chosen_option("A wise person would say nothing", PICK) is None
    assert chosen_option("I think it is Rome", PICK) == 0
    assert chosen_option("My answer: A", PICK) == 0
    assert chosen_option("Z, that is Bern", PICK) == 2


def test_gold_answers() -> None:
    assert gold_answers(CITY) == ("Port Laven", "Laven Harbour")
    assert gold_answers(PICK) == ("B",)
    turns = (Message(role="user", content="q"), Message(role="assistant", content="a"))
    assert gold_answers(Dialogue(messages=turns)) == ("a",)
    assert gold_answers(Dialogue(messages=turns[:1])) == ()


def test_shares_count_classes_and_split_variants() -> None:
    items = [
        Item(1.0, detail="correct"),
        Item(0.5, detail="correct | refusal"),
        Item(0.0, detail="garbage"),
        Item(None, "no prompt"),
        Item(0.0, detail="wrong-but-fluent"),
    ]
    expected = {"correct": 0.375, "refusal": 0.125, "wrong-but-fluent": 0.25, "garbage": 0.25}
    assert outcome_shares(items) == pytest.approx(expected)
    assert outcome_shares([Item(None, "no prompt")]) == {}
    values = SystemValues("s", {"outcome": {"forget": items, "retain": items[:1]}})
    summary = OutcomeShares().summarise(values, None)
    assert summary["outcome_shares/forget/refusal"] == pytest.approx(0.125)
    assert summary["outcome_shares/retain/correct"] == 1.0
    assert OutcomeShares().summarise(SystemValues("s", {}), None) == {}


def test_every_built_in_refusal_is_recognised() -> None:
    from delible.metrics.outcome import is_refusal
    from delible.prompts import read_lines

    assert [line for line in read_lines("refusals.txt") if not is_refusal(line)] == []
