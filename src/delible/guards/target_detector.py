"""Target detector: refuses a prompt, or withholds an answer, that touches what is forgotten.

    refuse(prompt)  if  a name or alias of a target occurs in it
                    or  max_u cos(e(prompt), e(u)) >= threshold      u: forget questions, passages
    refuse(answer)  if  a name, or a string that only the forgotten answers hold, occurs in it

Paper: DRAGON (arXiv 2511.05784), its detector on the unlearn store; code: supergirl-os/DRAGON.
Differences, on purpose: the two layers are joined by "or" and not by a sum; a part of a name
does not count (it would flag every bearer of a surname) unless it is unique among the targets
and asked for; the answer is checked too; a hit is refused here and not reasoned about by a
second language model.

The default threshold is a cosine of 0.8. Measured with all-MiniLM-L6-v2 on TOFU: it flags 94.5 %
of the 400 paraphrased forget10 questions and 0.8 % of 600 retain90 questions (seed 0); 0.75 flags
99.8 % and 1.7 %; the 0.9 of the reference code 45.3 % and 0.2 %. Every turn is judged, earlier and
system turns included: whoever writes to an open endpoint writes them all.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from pydantic import Field

from delible import prompts
from delible.errors import DataError, ModelError, RecipeError, nearest
from delible.lm.encoder import Encoder, sentence_encoder
from delible.names import Names, fold, runs, surnames
from delible.records import QA, Choice, Dialogue, ForgetRequest, Passage, RecordBase
from delible.registry import register
from delible.system.asks import Prompt
from delible.systems.guarded import Guard, GuardMind

logger = logging.getLogger(__name__)

#: Part of the fingerprint: goes up whenever the same options judge differently.
VERSION = 1

SENTENCES = re.compile(r"[^.!?。！？\n]+")
QUOTED = re.compile(r"\"([^\"\n]+)\"|“([^”\n]+)”|(?<!\w)['‘]([^\n'’]+)['’](?!\w)")


def _questions(record: RecordBase) -> tuple[str, ...]:
    if isinstance(record, QA):
        return (record.question, *record.paraphrases)
    if isinstance(record, Choice):
        return (record.question,)
    if isinstance(record, Dialogue):
        return tuple(turn.text for turn in record.messages if turn.role == "user")
    return (record.text,) if isinstance(record, Passage) else ()


def _answers(record: RecordBase) -> tuple[str, ...]:
    if isinstance(record, QA):
        return (record.answer, *record.aliases, *record.paraphrased_answers)
    if isinstance(record, Choice):
        return record.options[record.correct : record.correct + 1]
    if isinstance(record, Dialogue):
        return tuple(turn.text for turn in record.messages if turn.role == "assistant")
    return (record.text,) if isinstance(record, Passage) else ()


def distinctive_strings(request: ForgetRequest, *, letters: int, words: int) -> list[str]:
    """Short answers and quoted titles of two or more words that only forgotten answers hold.

    A string that also occurs in a forget question, or in any record to keep, is left out.
    """
    candidates: dict[str, None] = {}
    for record in request.forget:
        for answer in _answers(record):
            titles = ["".join(groups) for groups in QUOTED.findall(answer)]
            for text in [answer.strip(" .!\"'“”"), *titles]:
                folded = fold(text)
                if len(folded.letters) >= letters and 2 <= len(folded.words()) < words:
                    candidates[text] = None
    kept = [*request.retain, *request.neighbours, *request.holdout]
    elsewhere = [text for record in kept for text in (*_questions(record), *_answers(record))]
    # A passage is its own question and its own answer, so its text is not "elsewhere".
    asked = [r for r in request.forget if not isinstance(r, Passage)]
    elsewhere += [text for record in asked for text in _questions(record)]
    found = Names(candidates)
    common = {match.name for text in elsewhere for match in found.find(text)}
    return [text for text in candidates if text not in common]


def _unit(vectors: Float[np.ndarray, "text hidden"]) -> Float[np.ndarray, "text hidden"]:
    vectors = np.asarray(vectors, dtype=np.float32)
    unit: Float[np.ndarray, "text hidden"] = vectors / np.maximum(
        np.linalg.norm(vectors, axis=-1, keepdims=True), np.float32(1e-12)
    )
    return unit


class TargetDetectorMind(GuardMind):
    """What the detector learned from one forget request; made by :class:`TargetDetector`."""

    def __init__(
        self,
        *,
        names: Names,
        strings: Names,
        verbatim: set[str],
        run_words: int,
        encoder: Encoder | None,
        examples: Float[np.ndarray, "text hidden"] | None,
        threshold: float,
        refusals: tuple[str, ...],
        fingerprint: str,
    ) -> None:
        self.names, self.strings, self.verbatim, self.run_words = (
            names,
            strings,
            verbatim,
            run_words,
        )
        self.encoder, self.examples, self.threshold = encoder, examples, threshold
        self.refusals, self._fingerprint = refusals, fingerprint

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def before(self, prompt: Prompt) -> str | None:
        return self._refuse_if(lambda: self._is_about_target(prompt), prompt)

    def after(self, prompt: Prompt, answer: str) -> str | None:
        return self._refuse_if(lambda: self._gives_away(prompt, answer), prompt)

    def similarity(self, *texts: str) -> float:
        """Largest cosine of a text, or of any sentence in it, to a forget example, [-1, 1]."""
        parts = [part for text in texts for part in (text, *SENTENCES.findall(text))]
        pieces = list(dict.fromkeys(part.strip() for part in parts if re.search(r"\w", part)))
        if self.encoder is None or self.examples is None or not pieces:
            return -1.0
        cosines = _unit(self.encoder.encode(pieces)) @ self.examples.T
        if not np.isfinite(cosines).all():  # NaN is below every threshold: that would be a pass
            raise ModelError("the sentence encoder gave a value that is not finite.")
        return float(cosines.max())

    def _is_about_target(self, prompt: Prompt) -> bool:
        turns = [turn.text for turn in prompt.messages]
        turns += [text for text in (prompt.prefill, prompt.text) if text]
        # Joined, so that a name split over two turns is one name again.
        return self.names.occur("\n".join(turns)) or self.similarity(*turns) >= self.threshold

    def _gives_away(self, prompt: Prompt, answer: str) -> bool:
        # The answer goes on where the prompt stopped, perhaps in the middle of a name.
        whole = (prompt.prefill or prompt.text or "") + answer
        return (
            self.names.occur(whole)
            or self.strings.occur(whole)
            or bool(self.verbatim and not self.verbatim.isdisjoint(runs(whole, self.run_words)))
        )

    def _refuse_if(self, detect: Callable[[], bool], prompt: Prompt) -> str | None:
        try:
            found = detect()
        except Exception as error:  # fails closed, and names the kind of error only
            logger.warning("target_detector failed (%s) and refused.", type(error).__name__)
            found = True
        if not found:
            return None
        key = hashlib.sha256(repr(prompt).encode("utf-8", "backslashreplace")).digest()
        return self.refusals[int.from_bytes(key[:8], "big") % len(self.refusals)]


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
class TargetDetector(Guard):
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
    threshold: float = Field(
        0.8, gt=0, le=1, description="Cosine from which a prompt counts as a forget question."
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
    refusal: str | None = Field(
        None, pattern=r"\S", description="One fixed refusal; by default one of 100, by prompt."
    )
    encoder_folder: str | None = Field(
        None, description="Folder of a sentence encoder; by default all-MiniLM-L6-v2."
    )

    def targets(self, request: ForgetRequest) -> dict[str, list[str]]:
        """Each target's names: the request's subjects, its forget records', and the aliases.

        Raises:
            RecipeError: An alias is given for somebody who is not a target.
        """
        named = (record.subject for record in request.forget if record.subject)
        targets = {name: [name] for name in (*request.subjects, *named)}
        for subject, aliases in self.aliases.items():
            if subject not in targets:
                raise RecipeError(
                    f"aliases for '{subject}', who is not a target.",
                    where="guard 'target_detector'",
                    hint=nearest(subject, targets) if targets else "The request names nobody.",
                )
            targets[subject] = [*targets[subject], *aliases]
        return targets

    def prepare(
        self, request: ForgetRequest, *, encoder: Encoder | None = None
    ) -> TargetDetectorMind:
        """Builds the automata and the embeddings of the forget examples.

        Args:
            request: Names and forget records; records to keep make the answer check milder.
            encoder: Used instead of ``encoder_folder``.

        Raises:
            DataError: The request holds nothing that could be detected, or a name is too short.
            RecipeError: An alias is given for somebody who is not a target.
        """
        targets = self.targets(request)
        examples = dict.fromkeys(text for r in request.forget for text in _questions(r))
        if not targets and not (examples and self.similarity):
            raise DataError(
                "the forget request names no target and holds no question to compare with.",
                where="guard 'target_detector'",
                hint="Give names (--subjects NAME,…) or forget records (--forget FILE).",
            )
        names = [name for names_of in targets.values() for name in names_of]
        if self.partial_names:
            names += surnames(targets)

        vectors = None
        if self.similarity and examples:
            encoder = encoder or sentence_encoder(self.encoder_folder)
            vectors = _unit(encoder.encode(list(examples)))
            if not np.isfinite(vectors).all():
                raise ModelError("the sentence encoder gave a value that is not finite.")
        else:
            encoder = None

        strings: list[str] = []
        verbatim: set[str] = set()
        if self.check_answers:
            strings = distinctive_strings(
                request, letters=self.distinctive_letters, words=self.verbatim_words
            )
            kept = (*request.retain, *request.neighbours, *request.holdout)
            for record in request.forget:
                for text in _answers(record):
                    verbatim |= runs(text, self.verbatim_words)
            for record in kept:
                for text in (*_questions(record), *_answers(record)):
                    verbatim -= runs(text, self.verbatim_words)

        refusals = (self.refusal,) if self.refusal else prompts.read_lines("refusals.txt")
        judged_by = {
            "version": VERSION,
            "options": self.spec(),
            "request": request.id,
            "encoder": encoder.identity if encoder else None,
            "refusals": refusals,
        }
        return TargetDetectorMind(
            names=Names(names),
            strings=Names(strings),
            verbatim=verbatim,
            run_words=self.verbatim_words,
            encoder=encoder,
            examples=vectors,
            threshold=self.threshold,
            refusals=refusals,
            fingerprint=hashlib.sha256(json.dumps(judged_by, sort_keys=True).encode()).hexdigest(),
        )
