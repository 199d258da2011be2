"""What an edit to a refusal works with: prompts to move, to keep, and to look at afterwards.

General questions are kept in the same frames in which forgotten ones are moved, and so are the
forgotten questions about other names: prompts that are alike have much of their key in common, and
an edit would fire on all of them otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import TypeVar

from delible.edit.refusal import continued, refusal_probabilities, refusing_contexts, wordings
from delible.errors import DataError, ModelError
from delible.lm.lm import LM
from delible.messages import Message
from delible.prompts import read_lines
from delible.records import QA, Dialogue, ForgetRequest, RecordBase
from delible.system.asks import Decoding, Prompt
from delible.system.questions import ask
from delible.world import general
from delible.world.filters import says, words

#: Records and general questions that are looked at before and after, at most, of each kind.
PROBES = 16
#: Tokens of an answer that is to stay, at most.
ANSWER_TOKENS = 12

Rows = list[list[int]]
T = TypeVar("T")


@dataclass(frozen=True)
class Material:
    """Prompts of an edit, as token ids where they are read.

    Attributes:
        forget, kept, references: Rows whose last token is read.
        contexts: The references as prompts.
        questions: Forgotten questions as they are, to be asked before and after.
        reworded: Forgotten questions in a form that is not edited.
        others: Questions that should not be declined, and are not in the buffer where possible.
        forgotten: Records whose answers are scored.
        retained: Other questions with the answers that the model gives now; empty if not wanted.
    """

    forget: Rows
    kept: Rows
    references: Rows
    contexts: list[Prompt]
    questions: list[Prompt]
    reworded: list[Prompt]
    others: list[Prompt]
    forgotten: Sequence[RecordBase]
    retained: Sequence[RecordBase]


@dataclass(frozen=True)
class Seen:
    """What a model does with the probes. Mean P(first refusal token) in [0, 1], higher = declined.

    Attributes:
        refused: Of the forgotten questions.
        reworded: Of the same in another wording.
        falsely: Of other questions.
        kept: Probability of a token of the answers that the model gave to other questions before,
            the tokens before it given.
        forced: The same of the forgotten answers behind their first token: what is left when an
            answer is begun for the model. None where no answer is that long.
    """

    refused: float
    reworded: float
    falsely: float
    kept: float | None
    forced: float | None

    def as_json(self) -> dict[str, float | None]:
        """Plain data, rounded."""
        return {
            name: None if value is None else round(value, 4) for name, value in asdict(self).items()
        }

    def told(self, before: Seen) -> str:
        """Both in one sentence."""
        forced = ""
        if self.forced is not None and before.forced is not None:
            forced = (
                f"; with the answer begun for it {before.forced:.2f} -> {self.forced:.2f} is left"
            )
        return (
            f"P(refusal) {before.refused:.2f} -> {self.refused:.2f} on the questions, "
            f"{before.reworded:.2f} -> {self.reworded:.2f} reworded, "
            f"{before.falsely:.2f} -> {self.falsely:.2f} on others{forced}."
        )


def gather(
    lm: LM,
    request: ForgetRequest,
    *,
    refusal: str,
    references: int,
    wordings: int,
    buffer: int,
    generic: int,
    contrast: int,
    seed: int,
    answered: bool,
) -> Material:
    """The prompts of an edit.

    Args:
        answered: Ask the model other questions, to know its answers of before.

    Raises:
        DataError: No forget record asks anything.
        ModelError: The model's context is too short for a conversation in which it refuses.
    """
    moved, reworded, questions, forgotten = _forgotten(lm, request.forget, wordings)
    if not moved:
        raise DataError(
            "none of the forget records asks a question that fits into the context.",
            hint="Give questions (--forget FILE), or names alone (--subjects NAME), about which "
            "the model is asked.",
        )
    contexts = refusing_contexts(references, refusal, seed)
    references_read = _rows(lm, contexts)
    if not references_read:
        raise ModelError(
            f"a context of {lm.template.max_length} tokens has no room for three declined "
            "questions and a fourth.",
            where=lm.name,
            hint="Give a shorter refusal (refusal=…).",
        )
    told = [*request.neighbours, *request.retain]
    asked = [record for record in told if ask(record) is not None]
    common = _about_others(general(), request)
    held = asked[::4] if len(asked) >= 8 else []
    buffered = [record for record in asked if record not in held]
    kept = [prompt for record in _spread(buffered, buffer) if (prompt := ask(record))]
    kept += _framed(_in_all_forms(common[::2])[:generic])
    kept += _spread(_about_other_names(request), contrast)
    probed = [*_spread(held or asked, PROBES), *_spread(common[1::2], PROBES)]
    others = [prompt for record in probed if (prompt := ask(record))]
    return Material(
        forget=moved,
        kept=_rows(lm, kept),
        references=references_read,
        contexts=contexts[:PROBES],
        questions=_spread(questions, PROBES),
        reworded=_spread(reworded, PROBES),
        others=others,
        forgotten=_spread(forgotten, PROBES),
        retained=_own_answers(lm, _spread(others, PROBES)) if answered else [],
    )


def _forgotten(
    lm: LM, records: Sequence[RecordBase], count: int
) -> tuple[Rows, list[Prompt], list[Prompt], list[RecordBase]]:
    """Rows to be moved, each once; questions in another wording, questions as they are; records."""
    moved: dict[tuple[int, ...], None] = {}
    reworded, questions, asked = [], [], []
    for record in records:
        forms = [
            prompt
            for prompt in wordings(record, count + 1)
            if len(lm.template.prompt_ids(prompt)) <= lm.template.max_length
        ]
        if not forms:
            continue
        if len(forms) > count:  # the last one is not edited
            reworded.append(forms.pop())
        moved |= dict.fromkeys(tuple(lm.template.prompt_ids(prompt)) for prompt in forms)
        questions.append(forms[0])
        asked.append(record)
    return [list(row) for row in moved], reworded or questions, questions, asked


def _about_others(records: Sequence[QA], request: ForgetRequest) -> list[QA]:
    """General records that neither ask nor are about what is forgotten."""
    names = [*request.subjects, *(one.subject for one in request.forget if one.subject)]
    texts = {
        tuple(words(text))
        for one in request.forget
        if isinstance(one, QA)
        for text in (one.question, *one.paraphrases)
    }
    return [
        record
        for record in records
        if tuple(words(record.question)) not in texts
        and not any(says(record.question, name) for name in names)
    ]


def _in_all_forms(records: Sequence[QA]) -> list[str]:
    """Questions and their paraphrases: first one form of each, then the next of each."""
    forms = [(record.question, *record.paraphrases) for record in records]
    longest = max(map(len, forms), default=0)
    return [one[place] for place in range(longest) for one in forms if place < len(one)]


def _framed(questions: Sequence[str]) -> list[Prompt]:
    """Questions, every other one in a frame."""
    frames = read_lines("edit_frames.txt")
    return [
        Prompt.ask(
            frames[place // 2 % len(frames)].replace("{question}", question)
            if place % 2
            else question
        )
        for place, question in enumerate(questions)
    ]


def _about_other_names(request: ForgetRequest) -> list[Prompt]:
    """The forgotten questions, about well-known names instead of their own; each name in turn."""
    names = [*request.subjects, *(one.subject for one in request.forget if one.subject)]
    others = [
        other
        for other in read_lines("edit_contrasts.txt")
        if not any(says(other, name) or says(name, other) for name in names)
    ]
    texts: list[str] = []
    for record in request.forget:
        if isinstance(record, QA) and record.subject and others:
            for question in (record.question, *record.paraphrases):
                other = others[len(texts) % len(others)]
                changed, count = re.subn(re.escape(record.subject), other, question, flags=re.I)
                texts += [changed] * bool(count)
    return _framed(texts)


def _rows(lm: LM, prompts: Sequence[Prompt]) -> Rows:
    """Token ids of the prompts that ask something and fit into the context."""
    rows = [list(lm.template.prompt_ids(one)) for one in prompts if one.text is None]
    return [row for row in rows if len(row) <= lm.template.max_length]


def _own_answers(lm: LM, prompts: Sequence[Prompt]) -> list[Dialogue]:
    """Conversations that end with the beginning of the answer that the model gives now."""
    asked = [prompt for prompt in prompts if prompt.text is None]
    replies = lm.generate(asked, Decoding(ANSWER_TOKENS))
    return [
        Dialogue(messages=(*prompt.messages, Message(role="assistant", content=str(reply))))
        for prompt, reply in zip(asked, replies, strict=True)
        if str(reply).strip()
    ]


def _spread(items: Sequence[T], count: int) -> list[T]:
    """At most so many, from all over."""
    step = max(1, -(-len(items) // count)) if count else len(items) + 1
    return list(items[::step])[:count]


def seen(lm: LM, material: Material, refusal: str) -> Seen:
    """What the model does with the probes now."""

    def declined(prompts: Sequence[Prompt]) -> float:
        return fmean(refusal_probabilities(lm, prompts, refusal)) if prompts else 0.0

    return Seen(
        refused=declined(material.questions),
        reworded=declined(material.reworded),
        falsely=declined(material.others),
        kept=continued(lm, material.retained, first=True),
        forced=continued(lm, material.forgotten, first=False),
    )


__all__ = ["Material", "Seen", "gather", "seen"]
