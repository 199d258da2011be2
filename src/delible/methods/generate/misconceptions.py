"""Misconceptions: one wrong answer per forget question that a novice would believe.

    P(distractor i) ~ exp(s_i / temperature),   s_i = mean token log p(distractor i | question)

drawn once per record. Distractors are the record's own wrong answers or options; a record without
any gets them written (by the generator model, or by templates). Those that the model itself finds
likely are drawn more often, as common errors are; the draw keeps the wrong answer from being the
same everywhere. The drawn answers are the role ``alternate``.

Paper: arXiv 2603.26142 (the idea; without code or details, so the draw is ours).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp
from random import Random
from typing import ClassVar

from pydantic import Field

from delible.generation import writing
from delible.generation.answers import other_answers
from delible.generation.rows import answered, questions
from delible.records import QA, Choice, RecordBase
from delible.registry import register
from delible.system.asks import (
    Decoding,
    Prompt,
    Score,
    TokenScores,
)
from delible.train.losses import Role
from delible.train.slots import Generate, SlotContext

WHERE = "generate 'misconceptions'"
#: A distractor that the model cannot score counts as this unlikely, in nats per token.
UNSCORED = -20.0


def own_distractors(record: RecordBase) -> list[str]:
    """The wrong answers that a record brings along."""
    if isinstance(record, QA):
        return list(record.perturbed)
    if isinstance(record, Choice):
        return [text for place, text in enumerate(record.options) if place != record.correct]
    return []


def with_answer(record: QA | Choice, wrong: str) -> QA | Choice:
    """The record with a wrong answer in the place of the right one."""
    if isinstance(record, Choice):
        return record.model_copy(update={"correct": record.options.index(wrong)})
    return answered(record, wrong, "misconception")


@register(
    kind="generate",
    name="misconceptions",
    title="Misconceptions",
    summary="Draws for each forget question a wrong answer that a novice would believe.",
    paper="2603.26142",
    year=2026,
    family="synthetic answers",
    needs=("forget",),
    changes="nothing",
    badges=("variant",),
    variant="Drawn by the model's own likelihood; the paper gives no details.",
)
class Misconceptions(Generate):
    """Options of misconceptions."""

    temperature: float = Field(
        1.0, gt=0, description="Of the draw: towards 0 always the likeliest wrong answer."
    )
    count: int = Field(3, ge=1, le=64, description="Wrong answers to write where there are none.")
    attempts: int = Field(3, ge=1, description="How often the generator model is asked at most.")
    max_new_tokens: int = Field(256, ge=1, description="Longest reply of the generator model.")

    makes: ClassVar[tuple[Role, ...]] = ("alternate",)

    def rows(self, context: SlotContext) -> dict[Role, list[RecordBase]]:
        given = context.records["forget"]
        forget: list[QA | Choice] = [
            record if isinstance(record, Choice) else pair
            for record, pair in zip(given, questions(given, WHERE), strict=True)
        ]
        wrong = [own_distractors(record) for record in forget]
        without = [place for place, texts in enumerate(wrong) if not texts]
        for place, texts in zip(
            without, self._written(context, [forget[place] for place in without]), strict=True
        ):
            wrong[place] = texts
        drawn = self._drawn(context, forget, wrong)
        made = [with_answer(record, text) for record, text in zip(forget, drawn, strict=True)]
        return {"forget": list(forget), "alternate": list(made)}

    def _written(self, context: SlotContext, records: Sequence[RecordBase]) -> list[list[str]]:
        if not records:
            return []

        def prompt(record: QA) -> str:
            asked = {"question": record.question, "answer": record.answer}
            return writing.filled("generate_misconceptions.txt", count=self.count, **asked)

        return other_answers(
            context, questions(records, WHERE), prompt, writing.read_list, name="misconceptions",
            what="wrong answers", where=WHERE, count=self.count, minimum=1,
            attempts=self.attempts,
            decoding=Decoding(self.max_new_tokens, temperature=0.9, seed=context.seed),
        )  # fmt: skip

    def _drawn(
        self, context: SlotContext, forget: Sequence[QA | Choice], wrong: Sequence[Sequence[str]]
    ) -> list[str]:
        """One distractor per record, by the model's likelihood of it as an open answer."""
        asked = [
            Score(Prompt.ask(record.question), text)
            for record, texts in zip(forget, wrong, strict=True)
            for text in texts
        ]
        scores = iter(context.lm.score(asked))
        found = []
        for record, texts in zip(forget, wrong, strict=True):
            means = []
            for _ in texts:
                score = next(scores)
                scored = isinstance(score, TokenScores) and score.logprobs.size > 0
                means.append(float(score.logprobs.mean()) if scored else UNSCORED)  # type: ignore[union-attr]
            random = Random(f"{context.seed}/misconceptions/{record.digest}")
            found.append(random.choices(texts, weights=_softmax(means, self.temperature))[0])
        return found


def _softmax(values: Sequence[float], temperature: float) -> list[float]:
    top = max(values)
    return [exp((value - top) / temperature) for value in values]
