"""Verbatim and knowledge memorisation, and ROUGE-L F1, against brute force."""

from __future__ import annotations

import pytest

from delible.component import build
from delible.lm.lm import LM
from delible.measure.evaluate import evaluate
from delible.measure.scoring.text import cut_before, rouge_l_f1
from delible.metrics.knowledge_memorisation import (
    EXAMPLES,
    STOPS,
    KnowledgeMemorisation,
    few_shot_prompt,
)
from delible.metrics.rouge_l_f1 import RougeLF1
from delible.metrics.verbatim_memorisation import (
    VerbatimMemorisation,
    cut_after_words,
    start_and_continuation,
)
from delible.records import QA, Choice, Passage
from delible.system.asks import Decoding, Generate, Prompt
from delible.testing import tiny_model, tiny_tokenizer


def longest_common(first: list[str], second: list[str]) -> int:
    """Longest common subsequence, by its recursive definition."""
    if not first or not second:
        return 0
    if first[-1] == second[-1]:
        return longest_common(first[:-1], second[:-1]) + 1
    return max(longest_common(first[:-1], second), longest_common(first, second[:-1]))


def brute_f1(gold: str, text: str) -> float:
    common = longest_common(gold.split(), text.split())
    return 2 * common / (len(gold.split()) + len(text.split()))


@pytest.mark.parametrize(
    ("gold", "text"),
    [
        ("red fox over hill", "red fox over hill"),
        ("red fox over hill", "one red dog over one hill"),
        ("red fox", "the red fox sat on a hill"),
        ("red fox", "blue cat"),
        ("fox fox fox", "fox"),
    ],
)
def test_f1_is_the_harmonic_mean_of_recall_and_precision(gold: str, text: str) -> None:
    assert rouge_l_f1([gold], text) == pytest.approx(brute_f1(gold, text))
    assert rouge_l_f1([gold], text, stemmer=False) == pytest.approx(brute_f1(gold, text))


def test_f1_stems_if_asked_and_takes_the_best_gold_answer() -> None:
    assert rouge_l_f1(["running foxes"], "run fox") == 1.0
    assert rouge_l_f1(["running foxes"], "run fox", stemmer=False) == 0.0
    assert rouge_l_f1(["one two three", "three"], "three") == 1.0
    assert rouge_l_f1(["one two"], "") == 0.0
    assert rouge_l_f1(["東京"], "東京") is None


def test_rouge_l_f1_items() -> None:
    metric = RougeLF1(max_new_tokens=7)
    record = QA(question="q", answer="the city of Rome", aliases=("Roma",))
    prompt = Prompt.ask("q")
    request = Generate(prompt, Decoding(7))
    assert list(metric.requests(record, prompt)) == [request]
    assert metric.score(record, prompt, {request: "Rome"}).value == pytest.approx(2 / 5)
    assert metric.score(record, prompt, {request: "Roma"}).value == 1.0
    assert metric.score(record, prompt, {request: ""}).value == 0.0
    unseen = metric.score(QA(question="q", answer="東京"), prompt, {request: "東京"})
    assert unseen.value is None
    assert unseen.reason
    assert metric.prompt(Passage(text="t")) is metric.prompt(
        Choice(question="q", options=("a", "b"), correct=0)
    )


# ---- verbatim memorisation


def test_texts_are_cut_between_words() -> None:
    assert cut_after_words("one  two\nthree", 2) == ("one  two", "\nthree")
    assert cut_after_words("one two", 5) == ("one two", "")
    assert cut_after_words("one two", 0) == ("", "one two")
    assert start_and_continuation("a b  c d e f g h", 3, 2) == ("a b  c", "d e")
    # At most half is shown.
    assert start_and_continuation("a b c d e", 50, 50) == ("a b", "c d e")
    assert start_and_continuation("alone", 50, 50) == ("", "")


def test_reciting_scores_one_and_anything_else_what_it_shares() -> None:
    metric = VerbatimMemorisation(prompt_words=2, continuation_words=4)
    record = Passage(text="once upon a time there was one red fox")
    prompt = metric.prompt(record)
    assert prompt == Prompt(text="once upon")
    request = Generate(prompt, Decoding(128))
    assert list(metric.requests(record, prompt)) == [request]
    assert metric.score(record, prompt, {request: " a time there was"}).value == 1.0
    # What follows the compared words lowers precision, as in MUSE, whose two sides are 128 tokens.
    longer = metric.score(record, prompt, {request: "a time there was one red"}).value
    assert longer == pytest.approx(brute_f1("a time there was", "a time there was one red"))
    assert metric.score(record, prompt, {request: ""}).value == 0.0
    stemmed = VerbatimMemorisation(prompt_words=2, continuation_words=4, stemmer=True)
    assert metric.score(record, prompt, {request: "times"}).value == 0.0
    assert stemmed.score(record, prompt, {request: "times"}).value == pytest.approx(2 / 5)


def test_texts_that_cannot_be_cut_or_seen_have_no_value() -> None:
    metric = VerbatimMemorisation()
    alone = Passage(text="alone")
    prompt = metric.prompt(alone)
    assert prompt is not None
    assert list(metric.requests(alone, prompt)) == []
    assert "fewer than two words" in str(metric.score(alone, prompt, {}).reason)
    unseen = Passage(text="東 京 都 の")
    prompt = metric.prompt(unseen)
    assert prompt is not None
    found = metric.score(unseen, prompt, {Generate(prompt, Decoding(128)): "東"})
    assert (found.value, found.reason) == (None, "ROUGE sees no word in the continuation")


def test_ready_made_pairs_are_questions_and_answers() -> None:
    record = QA(question="once upon", answer="a time there")
    assert VerbatimMemorisation().prompt(record) is None
    metric = VerbatimMemorisation(pairs=True, continuation_words=2)
    prompt = metric.prompt(record)
    assert prompt == Prompt(text="once upon")
    assert metric.score(record, prompt, {Generate(prompt, Decoding(128)): "a time"}).value == 1.0


# ---- knowledge memorisation


def test_the_few_shot_prompt() -> None:
    examples = [QA(question="Who?", answer="I"), QA(question="Where?", answer="Here")]
    assert few_shot_prompt(examples, "When?") == (
        "Question: Who?\nAnswer: I\n\nQuestion: Where?\nAnswer: Here\n\nQuestion: When?\nAnswer:"
    )
    assert few_shot_prompt([], "When?", compat=True) == "Question: When?\nAnswer: "
    # An example must not give the answer away.
    assert few_shot_prompt(examples, "Who?").count("Who?") == 1
    assert len(EXAMPLES) == 10


def test_answers_end_at_the_next_question() -> None:
    assert cut_before("Rome\n\nMore", STOPS) == "Rome"
    assert cut_before("Rome\nQuestion: x\n\ny", STOPS) == "Rome"
    assert cut_before("Rome and Bern", STOPS) == "Rome and Bern"
    metric = KnowledgeMemorisation(examples=())
    record = QA(question="Where?", answer="In Rome", aliases=("Rome",))
    prompt = metric.prompt(record)
    assert prompt == Prompt(text="Question: Where?\nAnswer:")
    request = Generate(prompt, Decoding(32, stop=STOPS))
    assert list(metric.requests(record, prompt)) == [request]
    said = metric.score(record, prompt, {request: " in Rome\nQuestion: In which?"})
    assert said.value == 1.0
    assert metric.score(record, prompt, {request: "\n\nRome"}).value == 0.0
    assert metric.prompt(Passage(text="Rome")) is None


def test_examples_are_options_that_come_back() -> None:
    spec = {"name": "knowledge_memorisation", "examples": [{"question": "Who?", "answer": "I"}]}
    metric = build("metric", spec)
    assert metric.examples == (QA(question="Who?", answer="I"),)
    assert build("metric", metric.spec()) == metric


def test_both_run_on_a_model() -> None:
    lm = LM(tiny_model("llama"), tiny_tokenizer(), precision="float32")
    records = [Passage(text="once upon a time"), QA(question="Where?", answer="Rome")]
    metrics = [VerbatimMemorisation(max_new_tokens=4), KnowledgeMemorisation(max_new_tokens=4)]
    items = evaluate(lm, {"forget": records}, metrics).items
    # The model's own words, cut where MUSE cuts, give the value.
    prompt = Prompt(text=few_shot_prompt(EXAMPLES, "Where?"))
    text = str(lm.generate([prompt], Decoding(4, stop=STOPS))[0])
    expected = rouge_l_f1(["Rome"], text, stemmer=False)
    assert items["knowledge_memorisation"]["forget"][1].value == expected
    assert items["verbatim_memorisation"]["forget"][0].value is not None
    assert items["verbatim_memorisation"]["forget"][1].value is None
