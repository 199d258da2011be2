"""Keyword focus (unPact): does the answer still hang on the same words as before unlearning?

For each forget record the contribution of every word of the question to the gold answer is
measured on the attacked model and on the original (``search/attribution.py``). Told are means of

    focus overlap  J = |K_M and K_U| / |K_M or K_U|       of the keywords
    rank correlation of the two models' contributions     Spearman
    keyword mass   share of U's positive contributions that lies on M's keywords

U = M gives 1 for both comparisons. Where the answer became so unlikely that all contributions are
noise the record is flat, and only counted.

Paper: arXiv 2509.24675. Reference code: none. Deviations: the gold answer stands for the
original's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from delible.errors import DataError
from delible.lm.lm import LM
from delible.measure.attack import AttackContext, Budget, InsideAttack, Seen
from delible.measure.turns import last_turn, question_of
from delible.records import RecordBase
from delible.registry import register
from delible.search.attribution import (
    contributions,
    key_units,
    keyword_mass,
    overlap,
    rank_correlation,
)
from delible.system.questions import answer_of, ask, has_answer

#: An answer that lost so many nats per token is flat.
FLAT = 5.0


@register(
    kind="attack",
    name="keyword_focus",
    title="Focus on keywords (unPact)",
    summary="Compares which words of a question the answer hangs on, before and after.",
    paper="2509.24675",
    year=2025,
    family="inside",
    needs=("forget", "weights", "reference"),
    changes="nothing",
    reversible=True,
    capability="weights",
    depth="deep",
    misleads="A model that gives up the answer for other reasons also looks at other words.",
    badges=("variant",),
    variant="The gold answer stands for the original's own.",
)
class KeywordFocus(InsideAttack):
    """Options: what counts as a keyword."""

    weighs: ClassVar[bool] = False
    compares: ClassVar[tuple[Literal["original", "reference"], ...]] = ("original",)

    alpha: float = Field(
        0.3, ge=0, lt=1, description="Least share of the largest contribution for a keyword."
    )
    beta: int = Field(5, ge=1, description="With fewer supporting words all are keywords.")

    def budget(self, context: AttackContext) -> Budget:
        """Two forward passes for each word of each question."""
        questions = (question_of(record) or "" for record in context.forget)
        return Budget(steps=sum(2 + 2 * len(question.split()) for question in questions))

    def look(self, lm: LM, records: Sequence[RecordBase], context: AttackContext) -> Seen:
        """Means over the records that are not flat.

        Raises:
            DataError: There is no original, or no question with an answer.
        """
        if context.original is None:
            raise DataError("it compares with the original model, which was not given.",
                            hint="Add --before MODEL.")  # fmt: skip
        rows: dict[str, list[float]] = {
            "focus overlap": [], "rank correlation": [], "keyword mass": [],
        }  # fmt: skip
        flat: list[bool] = []
        for record in records:
            prompt = ask(record)
            if prompt is None or last_turn(prompt) is None or not has_answer(record):
                continue
            before = contributions(context.original, prompt, answer_of(record))
            now = contributions(lm, prompt, answer_of(record))
            flat.append(before.whole - now.whole > FLAT)
            if flat[-1]:
                continue
            keys = key_units(before.values, self.alpha, self.beta)
            found = {
                "focus overlap": overlap(keys, key_units(now.values, self.alpha, self.beta)),
                "rank correlation": rank_correlation(before.values, now.values),
                "keyword mass": keyword_mass(keys, now.values),
            }
            for name, value in found.items():
                rows[name] += [] if value is None else [value]
        if not flat:
            raise DataError("no forget record has a question and an answer.",
                            where="attack 'keyword_focus'")  # fmt: skip
        numbers: dict[str, float | None] = {
            name: sum(row) / len(row) if row else None for name, row in rows.items()
        }
        return Seen(numbers={**numbers, "flat": sum(flat) / len(flat)})
