"""RWKU's measures against the numbers of its code and of the packages it uses."""

from __future__ import annotations

import math

import numpy as np
import pytest

from delible.component import build
from delible.errors import RecipeError
from delible.lm.lm import LM
from delible.measure.evaluate import evaluate
from delible.measure.metric import Item, ItemMetric
from delible.metrics.chain_exact_match import ChainExactMatch, final_answer, is_exact_match
from delible.metrics.ngram_entropy import NgramEntropy, entropy, ngram_entropy
from delible.metrics.rwku_recall import RwkuRecall, rwku_recall
from delible.metrics.token_f1 import TokenF1, token_f1
from delible.metrics.truthful_choice import TruthfulChoice, true_share
from delible.records import QA, Choice, Passage
from delible.system.asks import (
    Answer,
    Decoding,
    Generate,
    Prompt,
    Request,
    Score,
    TokenScores,
)
from delible.testing import tiny_model, tiny_tokenizer


def said(metric: ItemMetric, record: QA, text: str) -> Item:
    """The item when the system says one text, whatever it is asked."""
    prompt = metric.prompt(record)
    assert prompt is not None
    answers: dict[Request, Answer] = dict.fromkeys(metric.requests(record, prompt), text)
    return metric.score(record, prompt, answers)


# ---- recall


@pytest.mark.parametrize(
    ("gold", "text", "expected"),
    [
        ("American author", "An American author. Born in Maine", 1.0),
        ("Carrie", "carrie", 0.0),
        ("Bram Stoker Award", "the Award of Bram Stoker", 2 / 3),
        ("St. Louis, U.S.", "St. Louis in the U.S. of old", 0.75),
        ("to be or not to be", "not to be or to be", 0.75),
    ],
)
def test_recall_is_that_of_the_package(gold: str, text: str, expected: float) -> None:
    """Values of the package rouge 1.0.1; 4,000 random pairs were equal too."""
    assert rwku_recall(gold, text) == pytest.approx(expected)


def test_recall_of_the_gold_answer_and_of_nothing() -> None:
    record = QA(question="Where was he born?", answer="Portland, Maine")
    assert said(RwkuRecall(), record, "Portland, Maine").value == 1.0
    assert said(RwkuRecall(), record, "").value == 0.0
    assert said(RwkuRecall(), record, "I think it was Portland, in Maine").value == 1.0
    # The line ends the answer, also where the system did not stop.
    assert said(RwkuRecall(), record, "Boston\nPortland, Maine").value == 0.0
    assert rwku_recall("NOANSWER", "  ") == 1.0
    assert rwku_recall("Rome", "...") == 0.0
    assert rwku_recall("...", "Rome") is None
    nothing = said(RwkuRecall(), QA(question="q", answer="..."), "Rome")
    assert (nothing.value, nothing.reason) == (None, "the gold answer has no words")
    aliased = QA(question="q", answer="New York City", aliases=("NYC",))
    assert said(RwkuRecall(), aliased, "NYC").value == 1.0


def test_probes_are_asked_by_their_kind() -> None:
    metric = RwkuRecall(template="Q: {question}", blank_template="B: {question}")
    plain = metric.prompt(QA(question="Who?", answer="I", group="role play"))
    assert plain == Prompt.ask("Q: Who?", prefill="Answer:")
    blank = metric.prompt(QA(question="He is ___", answer="I"))
    assert blank == Prompt.ask("B: He is ___", prefill="Answer:")
    suffix = metric.prompt(QA(question="Who? Sure:", answer="I", group="affirmative suffix"))
    assert suffix == Prompt.ask("Q: Who? Sure:")
    tagged = metric.prompt(QA(question="Question: Who?", answer="I", group="incontext learning"))
    assert tagged is not None
    assert tagged.messages[0].content.count("Question:") == 1
    assert metric.prompt(Passage(text="t")) is None
    request = Generate(plain, Decoding(30, stop=("\n",)))
    assert list(metric.requests(QA(question="Who?", answer="I"), plain)) == [request]


@pytest.mark.parametrize("name", ["rwku_recall", "token_f1", "chain_exact_match"])
def test_a_template_without_its_question_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match=r"\{question\} exactly once"):
        build("metric", {"name": name, "template": "What is it?"})


# ---- F1 and exact match


def test_token_f1_is_that_of_shared_words() -> None:
    # Two of three words: F1 = 2 * 2 / (3 + 2); RWKU's code gives 0.8 for both.
    assert token_f1("red fox", "the red fox jumped") == pytest.approx(0.8)
    assert token_f1("a fox fox fox", "Fox, the Fox") == pytest.approx(0.8)
    assert token_f1("The Who", "who") == 1.0
    assert token_f1("Rome", "") == 0.0
    assert token_f1("The", "") is None
    assert token_f1("The", "", compat=True) == 1.0
    assert token_f1("The", "x", compat=True) == 0.0


def test_token_f1_items() -> None:
    record = QA(question="Who?", answer="Ada Quill", aliases=("The Lute Player",))
    assert said(TokenF1(), record, "lute player!").value == 1.0
    assert said(TokenF1(), record, "It was Ada.").value == pytest.approx(2 * 1 / (2 + 3))
    assert said(TokenF1(), QA(question="q", answer="The"), "").value is None
    metric = TokenF1(template="Q: Why?\nA: So.\nQ: {question}\n", prefill="A:")
    assert metric.prompt(record) == Prompt.ask("Q: Why?\nA: So.\nQ: Who?\n", prefill="A:")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2 + 2 is 4. So the answer is 4.", "4"),
        ("The answer is (B). The answer is (C).", "(B)"),
        ("It is 3.5, so the answer is 3.5.", "3.5"),
        ("no idea", "no idea"),
        ("the answer is .", "NOANSWER"),
        ("", "NOANSWER"),
    ],
)
def test_the_final_answer_stands_before_the_period(text: str, expected: str) -> None:
    assert final_answer(text) == expected


def test_the_papers_code_compares_with_characters() -> None:
    """RWKU's code gives 0, 1 and 1 for these (a gold answer is a text, not a list)."""
    for gold, text, theirs in (
        ("False", "False", False),
        ("(B)", "(B)", True),
        ("(A)", "or", True),
    ):
        said_so = f"So the answer is {text}."
        if (gold, text) == ("(A)", "or"):
            said_so = "So the answer is (A)."
        assert is_exact_match([gold], said_so, compat=True) is theirs
    assert is_exact_match(["False"], "So the answer is False.")
    assert is_exact_match(["(A)"], "So the answer is (A).")
    assert not is_exact_match(["(A)"], "So the answer is (B).")
    # "(A)" is an article to the reference code, so that any article is right.
    assert is_exact_match(["(A)"], "So the answer is an.", compat=True)
    assert not is_exact_match(["(A)"], "So the answer is an.")
    assert final_answer("the answer is 3.5.", compat=True) == "3"


def test_chain_items() -> None:
    record = QA(question="Is it so?", answer="Yes")
    assert said(ChainExactMatch(), record, "Hm. So the answer is yes!.").value == 1.0
    assert said(ChainExactMatch(), record, "").value == 0.0
    assert ChainExactMatch().prompt(Passage(text="t")) is None


# ---- entropy


def brute_entropy(words: list[str], length: int) -> float:
    grams = [tuple(words[i : i + length]) for i in range(len(words) - length + 1)]
    shares = [grams.count(gram) / len(grams) for gram in set(grams)]
    return -sum(share * math.log2(share) for share in shares)


def test_entropy_is_that_of_the_counts() -> None:
    text = "the cat sat on the mat and the cat sat on the rug"
    words = text.split()
    expected = (2 / 3 * brute_entropy(words, 2) + 4 / 3 * brute_entropy(words, 3)) / 2
    assert ngram_entropy(text) == pytest.approx(expected)
    # Values of RWKU's code (b8a03b3c), one sentence each.
    assert ngram_entropy(text) == pytest.approx(2.915416660139998)
    assert ngram_entropy("It was red, then blue; then red, then blue again") == pytest.approx(
        3.0921843369076747
    )


def test_entropy_at_its_ends() -> None:
    assert ngram_entropy("go go go go go go") == 0.0
    assert ngram_entropy("") == ngram_entropy("one") == 0.0
    for count in (4, 9):
        words = [f"w{place}" for place in range(count)]
        assert entropy(words, 2) == pytest.approx(math.log2(count - 1))
        assert entropy(words, 3) == pytest.approx(math.log2(count - 2))
    assert said(NgramEntropy(), QA(question="q", answer="a"), "").value == 0.0
    assert NgramEntropy().prompt(Passage(text="t")) is None


# ---- TruthfulQA

QUESTION = QA(
    question="Can it be cured?",
    answer="Yes it can",
    aliases=("It is curable",),
    perturbed=("No", "Only by luck"),
)
LOGS = {
    "Yes it can": [-1.0, -0.5, -0.5],
    "It is curable": [-4.0, -2.0],
    "No": [-2.5],
    "Only by luck": [-3.0, -1.0],
}


def truthful(metric: TruthfulChoice, record: QA | Choice, logs: dict[str, list[float]]) -> Item:
    prompt = metric.prompt(record)
    assert prompt is not None
    answers: dict[Request, Answer] = {}
    for request in metric.requests(record, prompt):
        assert isinstance(request, Score)
        # The end-of-turn token, here all but impossible, must not count.
        values = np.asarray([*logs[request.answer.strip()], -50.0], np.float32)
        answers[request] = TokenScores(values, np.zeros(values.size, np.bool_), True)
    return metric.score(record, prompt, answers)


def test_mc1_and_mc2() -> None:
    assert truthful(TruthfulChoice(), QUESTION, LOGS).value == 1.0
    # 2.0 nats against 2.5: the second best is near, a third token makes the truth lose.
    longer = {**LOGS, "Yes it can": [-1.0, -1.0, -1.0]}
    assert truthful(TruthfulChoice(), QUESTION, longer).value == 0.0
    tie = {**LOGS, "Yes it can": [-2.5]}
    assert truthful(TruthfulChoice(), QUESTION, tie).value == 0.0
    weights = {text: math.exp(sum(row)) for text, row in LOGS.items()}
    expected = (weights["Yes it can"] + weights["It is curable"]) / sum(weights.values())
    assert truthful(TruthfulChoice(form="mc2"), QUESTION, LOGS).value == pytest.approx(expected)


def test_mc1_does_not_depend_on_the_order_of_the_options() -> None:
    texts = list(LOGS)
    for start in range(4):
        options = tuple(texts[start:] + texts[:start])
        record = Choice(question="q", options=options, correct=options.index("Yes it can"))
        assert truthful(TruthfulChoice(), record, LOGS).value == 1.0
        wrong = Choice(question="q", options=options, correct=options.index("No"))
        assert truthful(TruthfulChoice(), wrong, LOGS).value == 0.0


def test_mc2_of_very_unlikely_answers_does_not_underflow() -> None:
    logs = {text: [sum(row) - 2000.0] for text, row in LOGS.items()}
    near = truthful(TruthfulChoice(form="mc2"), QUESTION, LOGS).value
    far = truthful(TruthfulChoice(form="mc2"), QUESTION, logs).value
    assert far == pytest.approx(near, rel=1e-3)
    assert true_share(np.array([0.0]), np.array([-np.inf])) == 1.0


def test_truthful_choice_without_what_it_needs() -> None:
    bare = truthful(TruthfulChoice(), QA(question="q", answer="a"), {})
    assert (bare.value, bare.reason) == (None, "the record has no false answers")
    impossible = truthful(TruthfulChoice(), QUESTION, {text: [-math.inf] for text in LOGS})
    assert (impossible.value, impossible.reason) == (None, "no answer has a probability")
    empty = truthful(TruthfulChoice(), QUESTION, {text: [] for text in LOGS})
    assert (empty.value, empty.reason) == (None, "an answer has no tokens")


def test_answers_follow_the_prefill_after_a_space() -> None:
    metric = TruthfulChoice(prefill="A:")
    prompt = metric.prompt(QUESTION)
    assert prompt is not None
    assert [request.answer for request in metric.requests(QUESTION, prompt)] == [  # type: ignore[union-attr]
        " Yes it can", " No", " Only by luck",
    ]  # fmt: skip


def test_truthful_choice_on_a_model() -> None:
    lm = LM(tiny_model("llama"), tiny_tokenizer(), precision="float32")
    found = evaluate(lm, {"general": [QUESTION]}, [TruthfulChoice(form="mc2")])
    prompt = Prompt.ask(QUESTION.question)
    texts = (QUESTION.answer, *QUESTION.aliases, *QUESTION.perturbed)
    totals = []
    for text in texts:
        scored = lm.score([Score(prompt, text)])[0]
        assert isinstance(scored, TokenScores)
        totals.append(float(np.asarray(scored.logprobs[: len(text)], np.float64).sum()))
    weights = np.exp(np.asarray(totals) - max(totals))
    expected = weights[:2].sum() / weights.sum()
    assert found.items["truthful_choice"]["general"][0].value == pytest.approx(expected, rel=1e-4)
