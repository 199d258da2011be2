"""Target detector: refuses a prompt, or withholds an answer, that touches what is forgotten.

    refuse(prompt)  if  a name or alias of a target occurs in it
                    or  max_u cos(e(prompt), e(u)) >= threshold      u: forget questions, passages
    refuse(answer)  if  a name, or a string that only the forgotten answers hold, occurs in it

Paper: DRAGON (arXiv 2511.05784), its detector on the unlearn store; code: supergirl-os/DRAGON.
Differences, on purpose: the two layers are joined by "or" and not by a sum; a part of a name
does not count (it would flag every bearer of a surname) unless it is unique among the targets
and asked for; the answer is checked too; a hit is refused here and not reasoned about by a
second language model.

The threshold is fitted: at most `false_alarm_rate` of the questions that should pass reach it
(general ones, those to be kept, the forgotten ones about made-up people; the artefact's notes say
how many do). Measured with all-MiniLM-L6-v2 on TOFU, a cosine of 0.8 flags 94.5 % of the 400
paraphrased forget10 questions and 0.8 % of 600 retain90 questions (seed 0); 0.75 flags 99.8 % and
1.7 %; the 0.9 of the reference code 45.3 % and 0.2 %. Every turn is judged, earlier and system
turns, calls and results of tools included: whoever writes to an open endpoint writes them all.
Names are found in other scripts, too (delible.romanised). From 4,096 forget questions on, most are
left out of the comparison by some of their bits; one of a million hits may be missed by that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from delible.context import NO_CONTEXT, Context
from delible.errors import DataError
from delible.lm.encoder import Encoder
from delible.names import Names, Runs, runs, surnames
from delible.records import ForgetRequest
from delible.registry import register
from delible.system.asks import Prompt
from delible.systems.encoding import EncodingGuard
from delible.systems.guarded import GuardMind
from delible.systems.judged_text import texts_of
from delible.systems.judging import Judged, Scanner
from delible.systems.likeness import Likeness, fit_likeness, harmless
from delible.systems.record_texts import (
    answers_of,
    distinctive_strings,
    kept_by,
    names_of,
    questions_of,
)

#: Part of the fingerprint: goes up whenever the same options judge differently.
VERSION = 3


class TargetDetectorMind(GuardMind):
    """What the detector learned from one forget request; made by :class:`TargetDetector`."""

    reads = "words"

    def __init__(
        self,
        *,
        names: Names,
        strings: Names,
        verbatim: Runs,
        likeness: Likeness | None,
        threshold: float,
        refusals: tuple[str, ...],
        fingerprint: str,
        notes: Mapping[str, Any],
    ) -> None:
        self.names, self.strings, self.verbatim = names, strings, verbatim
        self.likeness, self.threshold = likeness, threshold
        self.refusals, self._fingerprint, self.notes = refusals, fingerprint, notes
        self.threaded = likeness is not None

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def before(self, prompt: Prompt) -> Judged:
        texts = texts_of(prompt)
        # Joined, so that a name split over two turns is one name again.
        if self.names.occur("\n".join(texts)) or self.resembles(*texts):
            return self.refuse(prompt)
        return None

    def scanners(self) -> Sequence[Scanner]:
        return (self.names, self.strings, self.verbatim)

    def resembles(self, *texts: str) -> bool:
        """Whether a text, or any sentence in it, reaches the threshold."""
        return self.likeness is not None and self.likeness.reached(texts, self.threshold)

    def similarity(self, *texts: str) -> float:
        """Largest cosine of a text, or of any sentence in it, to a forget example, [-1, 1]."""
        return -1.0 if self.likeness is None else self.likeness.of(texts)


@register(
    kind="guard",
    name="target_detector",
    title="Target detector",
    summary="Refuses prompts and answers that name a target or resemble a forget question.",
    paper="2511.05784",
    year=2025,
    family="Guard",
    intention="suppression",
    mechanism="output-guard",
    needs=("names", "encoder"),
    changes="Nothing in the model; a prompt or an answer about a target becomes a refusal.",
    reversible=True,
    retrain_goal=False,
    weakest="A paraphrase without the name.",
    capability="generate",
    badges=("variant",),
    variant="DRAGON's detector with full names only, joined by 'or', with a check of the answer "
    "and a plain refusal instead of a reasoning guard model.",
)
class TargetDetector(EncodingGuard):
    """Options of the target detector."""

    aliases: dict[str, list[str]] = Field(
        default_factory=dict, description="Other names of a subject: {subject: [alias, ...]}."
    )
    partial_names: bool = Field(
        False, description="A surname alone counts if no other target bears it."
    )
    similarity: bool = Field(
        True, description="Compare prompts with the forget questions; False loads no encoder."
    )
    threshold: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Cosine from which a prompt counts as a forget question; None fits it.",
    )
    false_alarm_rate: float = Field(
        0.01, ge=0, lt=0.5, description="Share of harmless questions that may reach a fitted one."
    )
    harmless: str | None = Field(
        None, description="Records whose questions should pass too, for fitting (a file)."
    )
    check_answers: bool = Field(
        True, description="Look for strings of forgotten answers in answers (names always are)."
    )
    distinctive_letters: int = Field(
        14, ge=4, description="Shortest string of a forget answer that counts, in letters."
    )
    verbatim_words: int = Field(
        8, ge=4, description="Consecutive words of a forget answer that count as a quotation."
    )

    def targets(self, request: ForgetRequest) -> dict[str, list[str]]:
        """Each target's names: the request's subjects, its forget records', and the aliases.

        Raises:
            RecipeError: An alias is given for somebody who is not a target.
        """
        return names_of(request, self.aliases, "guard 'target_detector'")

    def prepare(
        self,
        request: ForgetRequest,
        context: Context = NO_CONTEXT,
        *,
        encoder: Encoder | None = None,
    ) -> TargetDetectorMind:
        """Builds the automata and the embeddings of the forget examples, and fits the threshold.

        Args:
            request: Names and forget records; records to keep make the answer check milder and
                the threshold higher.
            context: Not needed.
            encoder: Used instead of ``encoder_folder``.

        Raises:
            DataError: The request holds nothing that could be detected, or a name is too short.
            RecipeError: An alias is given for somebody who is not a target.
        """
        targets = self.targets(request)
        examples = dict.fromkeys(text for r in request.forget for text in questions_of(r))
        if not targets and not (examples and self.similarity):
            raise DataError(
                "the forget request names no target and holds no question to compare with.",
                where="guard 'target_detector'",
                hint="Give names (--subjects NAME,…) or forget records (--forget FILE).",
            )
        names = [name for names_of in targets.values() for name in names_of]
        if self.partial_names:
            names += surnames(targets)

        likeness, threshold = None, self.threshold
        notes: dict[str, Any] = {}
        if self.similarity and examples:
            encoder = self.encoder(encoder)
            likeness = Likeness(encoder, list(examples))
            if threshold is None:
                groups = harmless(request, self.harmless)
                fitted = fit_likeness(likeness, groups, self.false_alarm_rate)
                threshold = fitted.threshold
                notes = {"threshold": threshold, "false_alarms": fitted.false_alarms}
            likeness.prepare()

        strings: list[str] = []
        verbatim: set[str] = set()
        if self.check_answers:
            strings = distinctive_strings(
                request, letters=self.distinctive_letters, words=self.verbatim_words
            )
            for record in request.forget:
                for text in answers_of(record):
                    verbatim |= runs(text, self.verbatim_words)
            for kept in kept_by(request):
                for text in (*questions_of(kept), *answers_of(kept)):
                    verbatim -= runs(text, self.verbatim_words)

        judged_by = {
            "version": VERSION,
            "options": self.spec(),
            "request": request.id,
            "encoder": likeness.encoder.identity if likeness else None,
            "threshold": threshold,
            "refusals": self.refusals,
        }
        return TargetDetectorMind(
            names=Names(names),
            strings=Names(strings),
            verbatim=Runs(verbatim, self.verbatim_words),
            likeness=likeness,
            threshold=2.0 if threshold is None else threshold,
            refusals=self.refusals,
            fingerprint=hashlib.sha256(json.dumps(judged_by, sort_keys=True).encode()).hexdigest(),
            notes=notes,
        )
