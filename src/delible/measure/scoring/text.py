"""Asking and reading: question templates, gold answers, normal forms, ROUGE-L, token scores.

What several metrics need; no metric lives here. ROUGE-L: Lin 2004, as in the package
``rouge-score`` with stemming (the setting of the TOFU benchmark, arXiv 2401.06121).
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator

from delible.records import QA, Choice, RecordBase
from delible.system.asks import Answer, Prompt, TokenScores
from delible.system.questions import LETTERS, answer_of, has_answer

_ARTICLES = frozenset({"a", "an", "the"})
#: Answers that are ordinary words elsewhere in a sentence; they count only as its first word.
_FIRST_WORD_ONLY = frozenset({"yes", "no", "true", "false"})
_LETTER_FIRST = re.compile(r"^[\W_]*([A-Z])(?![\w'\u2019])")
_LETTER_NAMED = re.compile(
    r"(?i:\b(?:answer|option|choice)(?:\s+is)?)[\s:*(\[\"']+([A-Z])(?![\w'\u2019])"
)
_ARTICLE = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)

#: Where a template has its question.
QUESTION = "{question}"


def _has_question(template: str) -> str:
    if template.count(QUESTION) != 1:
        raise ValueError(f"it must hold {QUESTION} exactly once")
    return template


#: A user turn around a question, an option of metrics.
QuestionTemplate = Annotated[str, AfterValidator(_has_question)]


def filled(template: str, question: str) -> str:
    """A template with its question in place."""
    return template.replace(QUESTION, question)


def continuing(prompt: Prompt, answer: str) -> str:
    """An answer as it follows a prompt: after a prefill or plain text, parted by a space."""
    before = prompt.prefill or prompt.text or ""
    return answer if not before or before[-1].isspace() else f" {answer}"


def cut_before(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of the stops."""
    return text[: min([found for stop in stops if (found := text.find(stop)) >= 0] or [len(text)])]


def gold_answers(record: RecordBase) -> tuple[str, ...]:
    """All correct answers, the main one first; empty when the record has none."""
    if not has_answer(record):
        return ()
    answer = answer_of(record)
    if not answer.strip():
        return ()
    return (answer, *record.aliases) if isinstance(record, QA) else (answer,)


def token_scores(answer: Answer) -> TokenScores:
    """The answer to a ``Score`` request, typed."""
    if not isinstance(answer, TokenScores):
        raise TypeError(f"expected token scores, got {type(answer).__name__}")
    return answer


def generated(answer: Answer) -> str:
    """The answer to a ``Generate`` request, typed."""
    if not isinstance(answer, str):
        raise TypeError(f"expected text, got {type(answer).__name__}")
    return answer


def mean_log_probability(scores: TokenScores) -> float | None:
    """Mean log p over the answer's tokens, the end-of-turn token included (nats per token).

    Returns:
        A value in (-inf, 0]; ``None`` when the answer has no token of its own.
    """
    logprobs: npt.NDArray[np.float64] = np.asarray(scores.logprobs, np.float64)
    if logprobs.size - int(scores.has_end) <= 0:
        return None
    return float(logprobs.mean())


def content_log_probabilities(scores: TokenScores, compat: bool = False) -> npt.NDArray[np.float64]:
    """log p of the answer's own tokens: the end-of-turn token is left out.

    Args:
        scores: Teacher-forced values at the answer's tokens, shape [answer].
        compat: Leave out the last token whatever it is, as the field's code does.

    Returns:
        Nats, shape [answer] or [answer - 1].
    """
    logprobs: npt.NDArray[np.float64] = np.asarray(scores.logprobs, np.float64)
    return logprobs[:-1] if scores.has_end or compat else logprobs


def mean_over_answers(answers: Sequence[Answer]) -> float | None:
    """Mean of :func:`mean_log_probability` over several answers.

    The exponential of it is the geometric mean of their probabilities.

    Returns:
        ``None`` when there is no answer, or one of them has no tokens.
    """
    means = [mean_log_probability(token_scores(answer)) for answer in answers]
    valued = [mean for mean in means if mean is not None]
    if not valued or len(valued) < len(means):
        return None
    return float(np.mean(valued))


def normalise(text: str) -> str:
    """Lower case, no accents, punctuation or articles, one space between words."""
    folded = unicodedata.normalize("NFKD", text).casefold()
    # Accents on Latin, Greek and Cyrillic letters only: other scripts need their marks.
    folded = "".join(char for char in folded if not "\u0300" <= char <= "\u036f")
    folded = re.sub(r"(?<=\d),(?=\d{3}\b)", "", unicodedata.normalize("NFC", folded))
    spaced = "".join(
        char if char.isalnum() or unicodedata.category(char).startswith("M") else " "
        for char in folded
    )
    words = spaced.split()
    return " ".join([word for word in words if word not in _ARTICLES] or words)


def plain_words(text: str, articles: bool = False) -> list[str]:
    """Words in lower case without ASCII punctuation and articles (question answering's form).

    Args:
        text: Any text.
        articles: Keep a, an and the.
    """
    bare = text.lower().translate(_PUNCTUATION)
    return (bare if articles else _ARTICLE.sub(" ", bare)).split()


def _without_spaces(text: str) -> bool:
    """Whether a text has letters of a script that puts no spaces between words."""
    return any("\u3040" <= char <= "\u9fff" or "\u0e00" <= char <= "\u0eff" for char in text)


def contains(text: str, answer: str) -> bool:
    """Whether ``text`` says ``answer`` in so many words (both in normal form, whole words)."""
    said, wanted = normalise(text), normalise(answer)
    if not wanted:
        return False
    if wanted in _FIRST_WORD_ONLY:
        return said.split(" ", 1)[0] == wanted
    if _without_spaces(wanted):
        return wanted in said
    return f" {wanted} " in f" {said} "


def chosen_option(text: str, record: Choice) -> int | None:
    """Index of the option that an answer picks: by its letter, else by its words."""
    reply = text.strip()
    found = _LETTER_FIRST.match(reply) or _LETTER_NAMED.search(reply)
    # "A dog barked" and "I think" begin with words, not with a choice.
    if found and not re.match(r"[AI]\s+[a-z]", reply):
        index = LETTERS.index(found.group(1))
        if index < len(record.options):
            return index
    said = [index for index, option in enumerate(record.options) if contains(reply, option)]
    return said[0] if len(said) == 1 else None


@lru_cache(maxsize=2)
def _rouge(stemmer: bool = True) -> Any:
    # Imported late: the package takes a second to import.
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=stemmer)


def has_rouge_words(text: str) -> bool:
    """Whether ROUGE sees any word (it knows only a-z and 0-9)."""
    return re.search(r"[a-z0-9]", text.lower()) is not None


def _best_rouge(golds: Sequence[str], text: str, measure: str, stemmer: bool) -> float | None:
    visible = [gold for gold in golds if has_rouge_words(gold)]
    if not visible:
        return None
    rouge = _rouge(stemmer)
    return max(float(getattr(rouge.score(gold, text)["rougeL"], measure)) for gold in visible)


def rouge_l_recall(golds: Sequence[str], text: str) -> float | None:
    """Share of a gold answer's words that ``text`` has in the same order; best gold answer.

    Returns:
        A value in [0, 1]; ``None`` when no gold answer has a word that ROUGE can see.
    """
    return _best_rouge(golds, text, "recall", stemmer=True)


def rouge_l_f1(golds: Sequence[str], text: str, stemmer: bool = True) -> float | None:
    """Harmonic mean of ROUGE-L recall and precision; best gold answer.

    Unlike recall, it punishes what is said beyond the gold answer.

    Args:
        golds: Texts that count as right.
        text: What was generated.
        stemmer: Compare word stems (Porter) instead of words.

    Returns:
        A value in [0, 1]; ``None`` when no gold answer has a word that ROUGE can see.
    """
    return _best_rouge(golds, text, "fmeasure", stemmer)
