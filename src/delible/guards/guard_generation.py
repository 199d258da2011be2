"""GUARD: questions about what is forgotten are answered by beam search, past the answer's words.

    h        the model's mean hidden state over a question, in the last but one block
    g(h)     log-odds of a small network: forgotten question against any other
    s(v)     log p(beam) + log p(v | beam) - penalty           if g(h) >= tau, over the best beams
    penalty  infinite, if v ends a word of the closest forgotten record's answer, or one that means
             much the same: max_f cos(e(w), e(f)) > delta      w: the last one to three words

Paper: GUARD, Generation-time LLM Unlearning via Adaptive Restriction and Detection (arXiv
2505.13312); no public code, so the numbers are our design after it. Differences, on purpose: words
are looked for in the text and not in its tokens, so no spelling in tokens passes; the finished
answer is looked through once more; tau is fitted so that at most `false_alarm_rate` of questions
that should pass reach it; words of the question itself may be said whatever they mean.

A model behind a server shows no states and takes no part in our search. With `weights=False` the
network reads a sentence encoder's vectors instead, and an answer with a forbidden word is withheld
whole: the same judgement, without the fluent answer.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, Field

from delible import prompts as prompt_files
from delible.context import NO_CONTEXT, Context
from delible.errors import DataError, ModelError
from delible.lm.encoder import Encoder
from delible.lm.lm import LM
from delible.names import Names
from delible.records import ForgetRequest, Passage, Record
from delible.registry import register
from delible.system.asks import NoAnswer, Prompt
from delible.systems.detector import Detector, Features, Pooling, log_odds, states_of, vectors_of
from delible.systems.encoding import EncodingGuard
from delible.systems.forbidden import (
    Forbidden,
    Meanings,
    common_words,
    forbidden_words,
    usable_words,
    windows,
)
from delible.systems.guarded import GuardMind
from delible.systems.judging import Forward, Judged, Scanner
from delible.systems.likeness import Likeness, alarms, harmless, least_above, pieces_of
from delible.systems.record_texts import answers_of, distinctive_strings, kept_by, questions_of
from delible.systems.restricted import Restricted

#: Part of the fingerprint: goes up whenever the same options judge differently.
VERSION = 1
#: Texts whose scores are remembered.
REMEMBERED = 20_000
#: Prompts whose forbidden words are kept ready.
READY = 256


@dataclass(frozen=True)
class Entry:
    """A record, or a window of one, as it is looked up.

    Attributes:
        asked: By what it is found: questions, or the window itself.
        words: What an answer must not hold.
        allowed: Texts whose words may be said whatever they mean.
        subject: Whom it is about.
    """

    asked: tuple[str, ...]
    words: tuple[str, ...]
    allowed: tuple[str, ...] = ()
    subject: str | None = None


class GuardGenerationMind(GuardMind):
    """Detector, records and forbidden words, ready; made by :class:`GuardGeneration`."""

    def __init__(
        self,
        options: GuardGeneration,
        detector: Detector,
        features: Features,
        threshold: float,
        records: Sequence[Entry],
        meanings: Meanings,
        lm: LM | None,
        strings: Names,
        fingerprint: str,
        notes: Mapping[str, Any],
    ) -> None:
        self.options, self.detector, self.threshold = options, detector, threshold
        self.records, self.meanings, self.lm, self.strings = records, meanings, lm, strings
        self.refusals, self._fingerprint, self.notes = options.refusals, fingerprint, notes
        self.reads = "whole" if lm is None else "words"
        self.consulted = () if lm is None else (lm,)
        self.closest = Likeness(meanings.encoder, [text for one in records for text in one.asked])
        self._owners = [place for place, one in enumerate(records) for _ in one.asked]
        self.features = features
        #: Of what was judged before: system turns and earlier ones come again and again.
        self._scores: dict[str, float] = {}
        self._ready = lru_cache(READY)(self._forbidden)
        self.restricted = None
        if lm is not None:
            self.restricted = Restricted(
                lm,
                self.forbidden,
                lambda prompt: self.refuse(prompt).text,
                beams=options.beams,
                candidates=options.candidates,
            )

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def before(self, prompt: Prompt) -> Judged:
        if self.restricted is None or not self.concerns(prompt):
            return None
        # The search speaks in texts: it is offered no tools.
        return Forward(replace(prompt, tools=(), tool_choice=None), self.restricted)

    def after(self, prompt: Prompt, answer: str, since: int = 0) -> Judged:
        if self.lm is not None:
            return super().after(prompt, answer, since)
        lead = prompt.prefill or prompt.text or ""
        withheld = self.concerns(prompt) and self.forbidden(prompt).holds(lead + answer, len(lead))
        return self.refuse(prompt) if withheld else None

    def scanners(self) -> Sequence[Scanner]:
        return (self.strings,)

    def concerns(self, prompt: Prompt) -> bool:
        """Whether any text or sentence of a prompt is about what is forgotten."""
        pieces = pieces_of(prompt)
        known = self._scores
        scores = {one: known[one] for one in pieces if one in known}
        new = [one for one in pieces if one not in scores]
        if new:
            scores |= dict(zip(new, self.detector.scores(self.features(new)), strict=True))
            self._scores = scores if len(known) > REMEMBERED else known | scores
        return max(scores.values(), default=-math.inf) >= self.threshold

    def forbidden(self, prompt: Prompt) -> Forbidden:
        """What an answer to a prompt must not hold: the words of the closest records.

        Of those that are closest to the prompt, and to each sentence of it.
        """
        pieces = pieces_of(prompt)
        if not pieces:  # nothing to go by: everything is forbidden
            return self._ready(tuple(range(len(self.records))))
        chosen: dict[int, None] = {}
        for cosines in self.closest.cosines(self.meanings.encoder.encode(pieces)):
            own: dict[int, None] = {}
            for place in (-cosines).argsort(kind="stable"):
                own[self._owners[int(place)]] = None
                if len(own) == self.options.closest:
                    break
            chosen |= own
        if self.options.whole_subject:
            subjects = {self.records[place].subject for place in chosen} - {None}
            chosen |= {
                place: None for place, one in enumerate(self.records) if one.subject in subjects
            }
        return self._ready(tuple(sorted(chosen)))

    def _forbidden(self, places: tuple[int, ...]) -> Forbidden:
        chosen = [self.records[place] for place in places]
        return Forbidden(
            (word for one in chosen for word in one.words),
            self.meanings,
            threshold=self.options.similarity,
            strength=self.options.penalty,
            content=self.options.content_words,
            allowed=[text for one in chosen for text in one.allowed],
        )


class Spans(BaseModel):
    """Parts of an answer, as somebody who was asked for them lists them."""

    spans: list[str]


@register(
    kind="guard",
    name="guard_generation",
    title="GUARD (restricted generation)",
    summary="Decodes questions about what is forgotten by beam search past the answer's words.",
    paper="2505.13312",
    year=2025,
    family="Guard",
    intention="suppression",
    mechanism="output-guard",
    needs=("forget", "encoder", "weights"),
    changes="Nothing in the model; of a question about a target the answer is searched, past the "
    "words of the forgotten one.",
    reversible=True,
    retrain_goal=False,
    weakest="A question that the detector misses; a description instead of the word.",
    capability="hidden",
    badges=("variant",),
    variant="No public code. Words are looked for in the text and not in its tokens; the threshold "
    "is fitted; without weights the detector reads a sentence encoder and the answer is withheld.",
)
class GuardGeneration(EncodingGuard):
    """Options of the detector and the search."""

    consults = ("guard",)

    weights: bool = Field(
        True,
        description="Read the model's states and search its answers; False, for servers: judge by "
        "the sentence encoder, and withhold answers.",
    )
    pooling: Pooling = Field(
        "mean", description="The detector reads the mean state of a question, or the last token's."
    )
    beams: int = Field(7, ge=2, le=64, description="Beams of the search.")
    candidates: int | None = Field(
        None, ge=2, description="Next tokens of a beam that are looked at; None: 2 for each beam."
    )
    closest: int = Field(
        1, ge=1, description="Records whose words are forbidden, for each sentence of a prompt."
    )
    whole_subject: bool = Field(
        False, description="Forbid the words of all records about the same subject."
    )
    similarity: float = Field(
        0.5, ge=-1, description="Cosine to a forbidden word above which words count; 1: never."
    )
    penalty: float | None = Field(
        None, ge=0, description="Cost of each unit of cosine above that; None drops the candidate."
    )
    content_words: bool = Field(
        True, description="Compare only words with content; False compares them all."
    )
    spans: Literal["rules", "guard"] = Field(
        "rules", description="Who finds the forbidden words: rules, or the role 'guard' by talking."
    )
    threshold: float | None = Field(
        None, gt=0, le=1, description="Probability from which the detector speaks; None fits it."
    )
    false_alarm_rate: float = Field(
        0.01, ge=0, lt=0.5, description="Share of harmless questions that may reach a fitted one."
    )
    harmless: str | None = Field(
        None, description="Records whose questions should pass too, for fitting (a file)."
    )
    check_answers: bool = Field(
        True, description="Look for strings of forgotten answers in answers to other questions."
    )
    seed: int = Field(0, description="Of the detector's training.")

    def prepare(
        self,
        request: ForgetRequest,
        context: Context = NO_CONTEXT,
        *,
        encoder: Encoder | None = None,
    ) -> GuardGenerationMind:
        """Finds the forbidden words, trains the detector and fits its threshold.

        Args:
            request: Forget records; records to keep are questions that should pass.
            context: The model that is guarded, and who finds the words if asked for.
            encoder: Used instead of ``encoder_folder``.

        Raises:
            DataError: There are no forget records.
            ModelError: What is guarded gives no weights.
        """
        if not any(questions_of(record) for record in request.forget):
            raise DataError(
                "there are no records to forget.",
                where="guard 'guard_generation'",
                hint="Give forget records (--forget FILE): names alone have no words to forbid.",
            )
        lm = self._model(context)
        encoder = self.encoder(encoder)
        entries, by_rules = self._entries(request, context)
        features = vectors_of(encoder) if lm is None else states_of(lm, self.pooling)
        groups = harmless(request, self.harmless)
        forgotten = features([text for one in entries for text in one.asked])
        others = {name: features(texts) for name, texts in groups.items()}
        detector = Detector(
            forgotten, np.concatenate([found[::2] for found in others.values()]), self.seed
        )
        scores = {
            name: np.asarray(detector.scores(found[1::2]))
            for name, found in others.items()
            if len(found) > 1
        }
        # Below even odds nothing counts, however few of those that should pass come so far.
        threshold = max(0.0, *(least_above(one, self.false_alarm_rate) for one in scores.values()))
        if self.threshold is not None:
            threshold = log_odds(self.threshold)
        missed = np.mean([score < threshold for score in detector.scores(forgotten)])
        notes = {
            "threshold": threshold,
            "false_alarms": alarms(scores, threshold, self.false_alarm_rate),
            "missed": float(missed),
            "records_without_words": sum(not one.words for one in entries),
            "found_by_rules": by_rules,
        }
        strings = distinctive_strings(request, letters=14, words=8) if self.check_answers else []
        judged_by = {
            "version": VERSION,
            "options": self.spec(),
            "request": request.id,
            "encoder": encoder.identity,
            "threshold": threshold,
            "words": [one.words for one in entries],
            "refusals": self.refusals,
        }
        return GuardGenerationMind(
            self,
            detector,
            features,
            threshold,
            entries,
            Meanings(encoder),
            lm,
            Names(strings),
            hashlib.sha256(json.dumps(judged_by, sort_keys=True).encode()).hexdigest(),
            notes,
        )

    def _model(self, context: Context) -> LM | None:
        if not self.weights:
            return None
        if isinstance(context.itself, LM):
            return context.itself
        given = f"'{context.itself.name}' gives no weights" if context.itself else "none is given"
        raise ModelError(
            f"it reads the states of a model and searches its answers, and {given}.",
            where="guard 'guard_generation'",
            hint="Put it right before a local model, or set weights=False: then a sentence encoder "
            "judges, and an answer with a forbidden word is withheld.",
        )

    def _entries(self, request: ForgetRequest, context: Context) -> tuple[list[Entry], int]:
        """Records as they are looked up, and of how many rules found the words."""
        common = common_words([*request.forget, *kept_by(request)])
        found: list[Entry] = []
        asked: list[tuple[int, Record]] = []
        for record in request.forget:
            if not questions_of(record):
                continue
            if isinstance(record, Passage):
                for text in windows(record.text):
                    part = record.model_copy(update={"text": text})
                    words = tuple(forbidden_words(part))
                    found.append(Entry((text,), words, (), record.subject))
                continue
            asked.append((len(found), record))
            questions = tuple(dict.fromkeys(questions_of(record)))
            words = tuple(forbidden_words(record, common))
            found.append(Entry(questions, words, questions, record.subject))
        if self.spans == "rules":
            return found, len(found)
        left = len(found)
        template = prompt_files.read_text("guard_spans.txt")
        replies = context.role("guard").ask_all(
            [
                template.format(question=questions_of(one)[0], answer=answers_of(one)[0])
                for _, one in asked
            ],
            Spans,
        )
        for (place, record), reply in zip(asked, replies, strict=True):
            if isinstance(reply, NoAnswer):
                continue
            words = usable_words(reply.spans, record)
            if words:
                found[place] = replace(found[place], words=words)
                left -= 1
        return found, left
