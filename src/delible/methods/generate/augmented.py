"""Augmented rows: forget records in other words, and wrong answers to them as rows to keep.

    forget   each record, and ``paraphrases`` more of it in other words
    retain   as many retain records as forget records (the last ones), and ``perturbed`` wrong
             answers to each forget question

Without the first, an assistant remembers one wording only; without the second it remembers whoever
asks anything alike, and takes it from the model. Kept are wrong answers that do not tell the true
answer's facts, are no refusals and no doubles, and paraphrases that differ from the record and
from each other.

Paper: arXiv 2406.08607 (ULD). Reference code: UCSB-NLP-Chang/ULD (uld/data/tofu.py).
Deviations: own paraphrases and wrong answers of a record come first. Without a generator, wrong
answers come from templates, and a question without other forms stands in other words around it,
its answer as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import cycle
from typing import ClassVar

from pydantic import Field

from delible.generation import writing
from delible.generation.answers import other_answers
from delible.generation.rows import answered, questions
from delible.prompts import read_lines
from delible.records import QA, RecordBase
from delible.registry import register
from delible.system.asks import Decoding, Prompt
from delible.train.losses import Role
from delible.train.slots import Generate, SlotContext
from delible.world import filters

WHERE = "generate 'augmented'"


def distinct(texts: Sequence[str], original: str) -> list[str]:
    """Texts that are not the original, nor each other, by their words."""
    known, found = {tuple(filters.words(original))}, list[str]()
    for text in texts:
        words = tuple(filters.words(text))
        if words and words not in known:
            known.add(words)
            found.append(text.strip())
    return found


def paired(record: QA, questions_: Sequence[str], answers: Sequence[str], count: int) -> list[QA]:
    """At most ``count`` rows of other questions, each with the next of the other answers.

    Where there is no other answer it is the record's own; where there are fewer questions than
    ``count``, none is repeated with the same answer.
    """
    found: list[QA] = []
    seen = {(record.question, record.answer)}
    wordings = [*questions_, record.question]
    for answer, place in zip(cycle(answers or [record.answer]), range(4 * count), strict=False):
        row = (wordings[place % len(wordings)], answer)
        if row not in seen and len(found) < count:
            seen.add(row)
            found.append(
                QA(question=row[0], answer=row[1], subject=record.subject, group="paraphrase")
            )
    return found


@register(
    kind="generate",
    name="augmented",
    title="Paraphrases and wrong answers",
    summary="Puts forget records in other words, and makes wrong answers to them rows to keep.",
    paper="2406.08607",
    year=2024,
    family="synthetic rows",
    needs=("forget",),
    changes="nothing",
    badges=("variant",),
    variant="A record's own forms come first; templates write without a generator model.",
)
class Augmented(Generate):
    """Options of augmented rows."""

    paraphrases: int = Field(2, ge=0, le=16, description="Paraphrased rows per forget record.")
    perturbed: int = Field(2, ge=0, le=16, description="Wrong answers per forget record.")
    attempts: int = Field(3, ge=1, description="How often the generator model is asked at most.")
    temperature: float = Field(0.9, ge=0, description="Of the generator model; 0 is greedy.")
    max_new_tokens: int = Field(512, ge=1, description="Longest reply of the generator model.")

    makes: ClassVar[tuple[Role, ...]] = ("retain",)

    def rows(self, context: SlotContext) -> dict[Role, list[RecordBase]]:
        forget = questions(context.records["forget"], WHERE)
        others = list(context.records.get("retain", ()))
        kept = others[max(0, len(others) - len(forget)) :]
        wrong = self._wrong(context, forget)
        return {
            "forget": [one for record, more in zip(forget, self._reworded(context, forget),
                       strict=True) for one in (record, *more)],
            "retain": [*kept, *(answered(record, text, "perturbed")
                       for record, texts in zip(forget, wrong, strict=True) for text in texts)],
        }  # fmt: skip

    def _decoding(self, context: SlotContext) -> Decoding:
        return Decoding(self.max_new_tokens, temperature=self.temperature, seed=context.seed)

    def _wrong(self, context: SlotContext, forget: Sequence[QA]) -> list[list[str]]:
        if not self.perturbed:
            return [[] for _ in forget]

        def prompt(record: QA) -> str:
            asked = {"question": record.question, "answer": record.answer}
            return writing.filled("generate_inverted_facts.txt", count=self.perturbed, **asked)

        return other_answers(
            context, forget, prompt, writing.read_list, name="augmented", what="wrong answers",
            where=WHERE, count=self.perturbed, minimum=1, attempts=self.attempts,
            decoding=self._decoding(context),
        )  # fmt: skip

    def _reworded(self, context: SlotContext, forget: Sequence[QA]) -> list[list[QA]]:
        """Other rows of each record."""
        if not self.paraphrases:
            return [[] for _ in forget]
        asked = [distinct(one.paraphrases, one.question) for one in forget]
        said = [distinct(one.paraphrased_answers, one.answer) for one in forget]
        if context.writer is not None:
            asked = self._written(context, forget, asked, [one.question for one in forget])
            said = self._written(context, forget, said, [one.answer for one in forget])
        frames = [line for line in read_lines("paraphrase_frames.txt") if "{question}" in line]
        found = []
        for record, forms, answers in zip(forget, asked, said, strict=True):
            framed = [frame.replace("{question}", record.question) for frame in frames]
            forms = [*forms, *framed[: max(0, self.paraphrases - len(forms))]]
            found.append(paired(record, forms, answers, self.paraphrases))
        return found

    def _written(
        self,
        context: SlotContext,
        forget: Sequence[QA],
        own: Sequence[Sequence[str]],
        sentences: Sequence[str],
    ) -> list[list[str]]:
        """Other forms of sentences: the records' own, and what the generator writes besides."""
        assert context.writer is not None
        counts: Counter[str] = Counter()
        short = [place for place, forms in enumerate(own) if len(forms) < self.paraphrases]

        def prompt(index: int) -> Prompt:
            sentence = sentences[short[index]]
            text = writing.filled(
                "generate_paraphrase.txt", count=self.paraphrases, sentence=sentence
            )
            return Prompt.ask(text)

        def usable(index: int, reply: str, known: Sequence[str]) -> list[str]:
            lines = [
                line for line in writing.read_list(reply)
                if not filters.is_garbage(line) and not filters.is_refusal(line)
            ]  # fmt: skip
            new = distinct([*known, *lines], sentences[short[index]])
            return new[len(known) :]

        made = writing.written(
            context.writer, [forget[place] for place in short], prompt, usable,
            wanted=self.paraphrases, decoding=self._decoding(context), attempts=self.attempts,
            counts=counts, stage=context.stage,
        )  # fmt: skip
        found = [list(forms) for forms in own]
        for place, forms in zip(short, made, strict=True):
            found[place] = distinct([*found[place], *forms], sentences[place])
        return found
