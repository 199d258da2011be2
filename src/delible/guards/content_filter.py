"""Content filter: blocks what goes in or comes out if it states what is forgotten.

    blocked  if  max_w s(w) >= tau      for one of two scores s, each with a tau of its own
    meaning  s = sigma(b + a . e(sentence))         a logistic regression on a sentence encoder:
                                                    forgotten statements against all others
    copying  s = share of the 6-grams of a window of 128 words that forgotten records hold

Paper: UnUnlearning (arXiv 2407.00106), which argues that exact unlearning does not regulate
content, since a model uses what it is told again in the prompt; it has no experiment and no code,
so windows, scores and constants are our design after it. In: all turns, system and tools' turns
included. Out: the answer, and each sentence of it after the question. tau is fitted so that at
most `false_alarm_rate` of texts that should pass are blocked, half of it for each score.
Differences, on purpose: words, not tokens, make a window, and meaning is judged sentence by
sentence, since a sentence in a long window would vanish; so a text of many sentences has more
chances to be blocked by mistake. Premises from which a forgotten fact follows pass, unavoidably.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from pydantic import Field

from delible.context import NO_CONTEXT, Context
from delible.errors import DataError
from delible.lm.encoder import Encoder
from delible.names import fold
from delible.records import QA, Choice, ForgetRequest, Passage, RecordBase
from delible.registry import register
from delible.system.asks import Prompt
from delible.systems.encoding import EncodingGuard
from delible.systems.guarded import GuardMind
from delible.systems.judged_text import texts_of
from delible.systems.judging import Judged
from delible.systems.likeness import SENTENCES, Fitted, fit, spread
from delible.systems.record_texts import answers_of, kept_by, questions_of
from delible.world import general

#: Part of the fingerprint: goes up whenever the same options judge differently.
VERSION = 1
#: Of the regression: weight of the squared norm, against the mean loss.
DECAY = 1e-3


def windows(words: Sequence[str], size: int, stride: int) -> list[Sequence[str]]:
    """Windows of ``size`` words, ``stride`` apart; the last one ends with the text."""
    if len(words) <= size:
        return [words]
    starts = list(range(0, len(words) - size, stride))
    return [words[start : start + size] for start in (*starts, len(words) - size)]


def grams(words: Sequence[str], size: int) -> list[str]:
    """All runs of ``size`` words."""
    return [" ".join(words[place : place + size]) for place in range(len(words) - size + 1)]


def logistic(
    features: Float[np.ndarray, "text hidden"], forgotten: Float[np.ndarray, text]
) -> Float[np.ndarray, hidden_and_one]:
    """Weights and offset of a logistic regression with both classes of equal weight.

    Minimises mean_class mean -log p(class) + DECAY |a|^2.
    """
    from scipy.optimize import minimize

    inputs = np.hstack([features.astype(np.float64), np.ones((len(features), 1))])
    signs = np.where(forgotten, 1.0, -1.0)
    weights = np.where(forgotten, 0.5 / forgotten.sum(), 0.5 / (~forgotten).sum())

    def loss(values: Float[np.ndarray, hidden_and_one]) -> tuple[float, Any]:
        margins = signs * (inputs @ values)
        slope = -signs * weights / (1 + np.exp(np.clip(margins, -500, 500)))
        decayed = np.append(values[:-1], 0.0)
        total = (weights * np.logaddexp(0, -margins)).sum() + DECAY * (decayed**2).sum()
        return float(total), inputs.T @ slope + 2 * DECAY * decayed

    found = minimize(loss, np.zeros(inputs.shape[1]), jac=True, method="L-BFGS-B")
    result: Float[np.ndarray, hidden_and_one] = found.x
    return result


class Scores:
    """Both scores of a text."""

    def __init__(
        self,
        encoder: Encoder,
        weights: Float[np.ndarray, hidden_and_one],
        copied: frozenset[str],
        options: ContentFilter,
    ) -> None:
        self.encoder, self.weights, self.copied = encoder, weights, copied
        self.options = options

    def copying(self, text: str) -> float:
        """Largest share of forgotten n-grams in a window, [0, 1]."""
        size = self.options.gram_words
        words = fold(text).words()
        best = 0.0
        for window in windows(words, self.options.window_words, self.options.stride_words):
            found = grams(window, size)
            if found:
                best = max(best, sum(one in self.copied for one in found) / len(found))
        return best

    def meaning(self, texts: Iterable[str]) -> float:
        """Largest probability of a sentence to be a forgotten statement, [0, 1]; 0 of none."""
        return max(self.meanings(list(texts)), default=0.0)

    def meanings(self, texts: Sequence[str]) -> list[float]:
        """As :meth:`meaning`, of each text."""
        parts = [
            [part.strip() for part in SENTENCES.findall(text) if any(map(str.isalnum, part))]
            for text in texts
        ]
        pieces = _unique(part for of_text in parts for part in of_text)
        if not pieces:
            return [0.0] * len(texts)
        found = dict(zip(pieces, map(float, self.probabilities(pieces)), strict=True))
        return [max((found[part] for part in of_text), default=0.0) for of_text in parts]

    def probabilities(self, texts: Sequence[str]) -> Float[np.ndarray, text]:
        """Of each text to be a forgotten statement.

        Raises:
            FloatingPointError: The encoder gave a value that is not finite.
        """
        vectors = np.asarray(self.encoder.encode(list(texts)), dtype=np.float64)
        margins = vectors @ self.weights[:-1] + self.weights[-1]
        if not np.isfinite(margins).all():  # NaN is below every threshold: that would be a pass
            raise FloatingPointError("the sentence encoder gave a value that is not finite")
        found: Float[np.ndarray, text] = 1 / (1 + np.exp(-np.clip(margins, -500, 500)))
        return found


class ContentFilterMind(GuardMind):
    """Scores and thresholds, ready; made by :class:`ContentFilter`."""

    reads = "sentences"

    def __init__(
        self,
        scores: Scores,
        fitted: Mapping[str, Mapping[str, Fitted]],
        refusals: tuple[str, ...],
        fingerprint: str,
    ) -> None:
        self.scores, self.fitted, self.refusals = scores, fitted, refusals
        self._fingerprint = fingerprint
        self.notes = {
            side: {
                score: {"threshold": one.threshold, "false_alarms": one.false_alarms}
                for score, one in found.items()
            }
            for side, found in fitted.items()
        }

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def before(self, prompt: Prompt) -> Judged:
        texts = texts_of(prompt)
        # Joined for copying, so that what comes in pieces over turns is one text again.
        return self._refused(prompt, "in", "\n".join(texts), texts)

    def after(self, prompt: Prompt, answer: str, since: int = 0) -> Judged:
        lead = prompt.prefill or prompt.text or ""
        new = answer[since:] if since else lead + answer
        asked = prompt.messages[-1].text if prompt.messages else ""
        both = [f"{asked.strip(' ?!.')} {part.strip()}" for part in SENTENCES.findall(new)]
        return self._refused(prompt, "out", lead + answer, [new, *(both if asked else ())])

    def _refused(self, prompt: Prompt, side: str, text: str, texts: Sequence[str]) -> Judged:
        fitted = self.fitted[side]
        bad = (
            self.scores.copying(text) >= fitted["copying"].threshold
            or self.scores.meaning(texts) >= fitted["meaning"].threshold
        )
        return self.refuse(prompt) if bad else None


def statements(record: RecordBase) -> list[str]:
    """Texts that tell what a record tells: a question with its answer, a passage's sentences."""
    if isinstance(record, Passage):
        return [part.strip() for part in SENTENCES.findall(record.text) if part.strip()]
    asked = [text.strip(" ?!.") for text in questions_of(record)]
    answers = [text.strip(" .") for text in answers_of(record)]
    return [f"{question} {answers[0]}" for question in asked if answers] + [
        answer for answer in answers if len(answer.split()) > 3
    ]


@register(
    kind="guard",
    name="content_filter",
    title="Content filter",
    summary="Blocks prompts and answers that state what is forgotten, by meaning or by copying.",
    paper="2407.00106",
    year=2024,
    family="Guard",
    intention="suppression",
    mechanism="output-guard",
    needs=("forget", "retain", "encoder"),
    changes="Nothing in the model; a prompt or an answer that states a target becomes a refusal.",
    reversible=True,
    retrain_goal=False,
    weakest="Premises from which the forgotten follows; other languages.",
    capability="generate",
    badges=("variant",),
    variant="The paper has no experiment: windows, scores and constants are our design after it.",
)
class ContentFilter(EncodingGuard):
    """Options of the filter."""

    window_words: int = Field(128, ge=8, description="Words of a window.")
    stride_words: int = Field(64, ge=1, description="Words from one window to the next.")
    gram_words: int = Field(6, ge=2, description="Words of a run that counts as copied.")
    false_alarm_rate: float = Field(
        0.01, ge=0, lt=0.5, description="Share of texts that should pass that may be blocked."
    )

    def prepare(
        self,
        request: ForgetRequest,
        context: Context = NO_CONTEXT,
        *,
        encoder: Encoder | None = None,
    ) -> ContentFilterMind:
        """Trains the regression on half of what should pass, and fits on the other half.

        Raises:
            DataError: There are no forget records.
        """
        forgotten = [text for record in request.forget for text in statements(record)]
        forgotten += [
            text
            for record in request.forget
            if isinstance(record, QA | Choice)
            for text in questions_of(record)
        ]
        forgotten = list(dict.fromkeys(forgotten))
        if not forgotten:
            raise DataError(
                "there are no records to forget.",
                where="guard 'content_filter'",
                hint="Give forget records (--forget FILE): names alone state nothing.",
            )
        encoder = self.encoder(encoder)
        groups: dict[str, list[RecordBase]] = {"general": list(general()), "kept": kept_by(request)}
        asked = {
            name: spread(text for one in records for text in questions_of(one))
            for name, records in groups.items()
        }
        said = {
            name: spread(text for one in records for text in statements(one))
            for name, records in groups.items()
        }
        others = [text for side in (asked, said) for texts in side.values() for text in texts[::2]]
        weights = logistic(
            np.asarray(encoder.encode([*forgotten, *others])),
            np.arange(len(forgotten) + len(others)) < len(forgotten),
        )
        size = self.gram_words
        copied = {gram for text in forgotten for gram in grams(fold(text).words(), size)}
        copied -= {gram for text in others for gram in grams(fold(text).words(), size)}
        scores = Scores(encoder, weights, frozenset(copied), self)
        fitted = {
            "in": self._fitted(scores, {name: texts[1::2] for name, texts in asked.items()}),
            "out": self._fitted(scores, {name: texts[1::2] for name, texts in said.items()}),
        }
        judged_by = {
            "version": VERSION,
            "options": self.spec(),
            "request": request.id,
            "encoder": encoder.identity,
            "refusals": self.refusals,
        }
        return ContentFilterMind(
            scores,
            fitted,
            self.refusals,
            hashlib.sha256(json.dumps(judged_by, sort_keys=True).encode()).hexdigest(),
        )

    def _fitted(self, scores: Scores, texts: Mapping[str, Sequence[str]]) -> dict[str, Fitted]:
        rate = self.false_alarm_rate / 2
        found = {name: list(group) for name, group in texts.items() if group}
        meaning = {name: scores.meanings(group) for name, group in found.items()}
        copying = {name: [scores.copying(one) for one in group] for name, group in found.items()}
        return {"meaning": fit(meaning, rate), "copying": fit(copying, rate)}


def _unique(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))
