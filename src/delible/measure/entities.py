"""Where in an answer its fact stands: the tokens of the name, the number or the word that matters.

"She was born in Norrby." has the fact "Norrby", which the record's aliases tell; what stands
before it is said by any model. An answer without an alias in it is its fact as a whole. The token
that ends an answer belongs to none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field

from delible.errors import DataError
from delible.lm.lm import LM
from delible.lm.states import Span
from delible.lm.template import Encoded
from delible.measure.attack import AttackContext, Budget, InsideAttack
from delible.measure.metric import Item
from delible.records import QA, RecordBase
from delible.system.questions import answer_of, ask, has_answer


@dataclass(frozen=True)
class Entity:
    """A fact's tokens in a question with its answer.

    Attributes:
        row: Question and answer; ``row.start`` is where the answer begins.
        first: The fact's first token.
        end: Behind its last one.
    """

    row: Encoded
    first: int
    end: int

    @property
    def tokens(self) -> tuple[int, ...]:
        """The fact's token ids."""
        return self.row.ids[self.first : self.end]

    @property
    def span(self) -> Span:
        """The tokens that predict the fact: from one before its first to one before its last."""
        return Span(self.row, self.first - 1, self.end - 1)


def entity_of(lm: LM, record: RecordBase, most: int) -> Entity | str:
    """A record's fact as a model's tokens, or why it has none.

    Args:
        most: Tokens at most; a longer fact is cut.
    """
    prompt = ask(record)
    if prompt is None or not has_answer(record):
        return "a record of this kind has no question with an answer"
    answer = answer_of(record)
    row = lm.template.encode(prompt, answer)
    if row.cut:
        return f"question and answer are longer than {lm.template.max_length} tokens"
    start, end = row.start, len(row.ids) - int(row.has_end)
    name = _name(record, answer)
    if name is not None:
        start, end = _tokens_of(lm.tokenizer, row, end, answer, *name)
    if start >= end:
        return "the answer has no token"
    return Entity(row, start, min(end, start + most))


def _name(record: RecordBase, answer: str) -> tuple[int, int] | None:
    """Where in the answer its longest alias stands, as whole words in any case."""
    if not isinstance(record, QA):
        return None
    for alias in sorted(record.aliases, key=len, reverse=True):
        found = re.search(rf"(?<!\w){re.escape(alias)}(?!\w)", answer, re.IGNORECASE)
        if found is not None:
            return found.span()
    return None


def _tokens_of(
    tokenizer: Any, row: Encoded, end: int, answer: str, first: int, last: int
) -> tuple[int, int]:
    """The answer's tokens that touch some of its characters."""
    said = row.ids[row.start : end]
    # how far the text goes with each token; one that ends inside of a character adds none
    ends = [len(_decoded(tokenizer, said[:count]).rstrip("\ufffd")) for count in range(len(said))]
    whole = _decoded(tokenizer, said)
    at = whole.find(answer)
    if at < 0:  # a template may trim or rewrite it
        return row.start, end
    places = [
        place
        for place, (before, behind) in enumerate(zip(ends, [*ends[1:], len(whole)], strict=True))
        if before < at + last and behind > at + first
    ]
    return (row.start + places[0], row.start + places[-1] + 1) if places else (row.start, end)


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


class LooksForFacts(InsideAttack):
    """An attack that looks for facts where the original has them and the reference has not."""

    compares: ClassVar[tuple[Literal["original", "reference"], ...]] = ("original", "reference")

    tokens: int = Field(16, ge=1, description="Tokens of a fact that are looked at, at most.")

    def budget(self, context: AttackContext) -> Budget:
        """One pass for each record."""
        return Budget(queries=len(self.held_out(context)))


def entities_of(
    lm: LM, records: Sequence[RecordBase], most: int, where: str
) -> tuple[list[int], list[Entity], list[Item]]:
    """The facts of records: places of those that have one, the facts, and an item for each record.

    Items hold the reason where there is none, and are to be filled elsewhere.

    Raises:
        DataError: No record has one.
    """
    found = [entity_of(lm, record, most) for record in records]
    entities = {place: one for place, one in enumerate(found) if isinstance(one, Entity)}
    if not entities:
        reasons = dict.fromkeys(one for one in found if isinstance(one, str))
        raise DataError(
            f"no forget record has a fact to look for ({'; '.join(reasons) or 'there is none'}).",
            where=where,
            hint="Add questions with answers to --forget.",
        )
    items = [Item(None, reason=one if isinstance(one, str) else None) for one in found]
    return list(entities), list(entities.values()), items
