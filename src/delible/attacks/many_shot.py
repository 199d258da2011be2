"""Many-shot: a long conversation in which every question was answered, and then the real one.

The k turns before the question are questions about what is kept, with their full answers; where
there are too few, about people who do not exist. No turn says the answer. The control has as many
turns about nothing of it: a long conversation alone must bring nothing back.

Paper: arXiv 2506.09227 (in its battery, with 8, 32 and 128 turns). Reference code: none.
Deviations: 8 and 32 turns; the first ones are left out where they would be too long, counted in
characters, so that every system gets the same words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Literal

from pydantic import Field

from delible.cards import Depth
from delible.errors import DataError
from delible.measure.attack import AttackContext, ConversationAttack
from delible.measure.turns import Turn, after, last_turn
from delible.records import QA, RecordBase
from delible.registry import register
from delible.system.asks import Prompt
from delible.system.base import System
from delible.system.questions import answer_of, ask, has_answer
from delible.train.randomness import generator, shuffled
from delible.world import filters, general
from delible.world.invented import twins


def fitting(turns: Sequence[Turn], characters: int) -> list[Turn]:
    """The last turns that have together at most so many characters."""
    kept: list[Turn] = []
    for turn in reversed(turns):
        characters -= len(turn[0]) + len(turn[1])
        if characters < 0:
            break
        kept.insert(0, turn)
    return kept


def says_answer(record: RecordBase, turn: Turn) -> bool:
    """Whether a turn asks a record's question, or says its answer."""
    if isinstance(record, QA):
        return turn[0] == record.question or filters.leaks(record, f"{turn[0]} {turn[1]}")
    return has_answer(record) and filters.says(turn[1], answer_of(record))


@register(
    kind="attack",
    name="many_shot",
    title="Many answered questions before",
    summary="Asks at the end of a long conversation in which every question was answered.",
    paper="2506.09227",
    year=2025,
    family="prompt",
    needs=("forget", "retain"),
    changes="prompts",
    reversible=True,
    capability="generate",
    depth="standard",
    badges=("variant",),
    variant="8 and 32 turns; the length is limited in characters.",
)
class ManyShot(ConversationAttack):
    """Options: how many turns, and about what."""

    turns: int = Field(8, ge=1, le=512, description="Answered questions before the real one.")
    about: Literal["kept", "unrelated"] = Field(
        "kept", description="What they are about: what is kept, or (a control) nothing of it."
    )
    characters: int = Field(
        12_000, ge=1, description="Characters of the conversation before the question at most."
    )

    def variants(self, depth: Depth = "standard") -> Sequence[Mapping[str, object]]:
        """8 turns; in a deep audit 32 as well, and as many unrelated ones."""
        settings = ({"turns": 8}, {"turns": 32}, {"turns": 32, "about": "unrelated"})
        return settings if depth == "deep" else settings[:1]

    def variant_title(self) -> str:
        """Such as "8 turns"."""
        return f"{self.turns} turns{' of other things' if self.control else ''}"

    @property
    def control(self) -> bool:
        return self.about == "unrelated"

    def converse(
        self, system: System, records: Sequence[RecordBase], context: AttackContext
    ) -> list[Sequence[Prompt]]:
        """One conversation per record that ends in its question.

        Raises:
            DataError: There is nothing that could be asked before.
        """
        pool = self._pool(context)
        if not pool:
            raise DataError(
                "there are no questions and answers that could be asked before.",
                where="attack 'many_shot'",
                hint="Add --retain with questions and answers.",
            )
        found: list[Sequence[Prompt]] = []
        for record in records:
            prompt = ask(record)
            if prompt is None or last_turn(prompt) is None:
                found.append(())
                continue
            usable = (turn for turn in pool if not says_answer(record, turn))
            turns = fitting(list(islice(usable, self.turns)), self.characters)
            found.append((after(prompt, turns),) if turns else ())
        return found

    def _pool(self, context: AttackContext) -> list[Turn]:
        """Questions with their answers, drawn by the seed: more than are needed."""
        random = generator(context.seed, "many_shot", self.about)
        if self.about == "unrelated":
            rows = _questions([*context.unrelated, *general()])
            return [(one.question, one.answer) for one in shuffled(rows, random)]
        kept = _questions([*context.retain, *context.neighbours])
        rows = shuffled(kept, random)
        copy = 0
        while len(rows) < 2 * self.turns and copy < 2 * self.turns:
            made = twins(kept or context.forget, context.seed + copy)
            rows += shuffled(made, random)
            copy += 1
        return list(dict.fromkeys((one.question, one.answer) for one in rows))


def _questions(records: Sequence[RecordBase]) -> list[QA]:
    return [one for one in dict.fromkeys(records) if isinstance(one, QA)]
