"""Questions about a made-up world, with a tool that searches what is written about it.

The world knows every true answer, so an episode's reward is exact: 1 if the answer is the fact's
value in one of its forms, else 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from delible.acting.loop import Tool
from delible.measure.scoring.text import normalise
from delible.memory import ENTRY, Item, Memory
from delible.records import QA
from delible.world import World
from delible.world.facts import Fact


@dataclass(frozen=True)
class Question:
    """A question, whom it is about, and what answers it."""

    record: QA
    subject: str
    relation: str

    @property
    def text(self) -> str:
        return self.record.question

    def reward(self, answer: str) -> int:
        """1 if it is the true value, in any of its forms; else 0."""
        said = normalise(answer)
        right = (self.record.answer, *self.record.aliases, *self.record.paraphrased_answers)
        return int(bool(said) and said in {normalise(one) for one in right})


def questions(world: World, people: Sequence[str] | None = None) -> list[Question]:
    """One question for each fact."""
    facts: list[Fact] = world.facts(list(people) if people is not None else None)
    return [Question(one.qa(), one.person.name, one.relation.name) for one in facts]


def passages(world: World, people: Sequence[str] | None = None) -> list[Item]:
    """What is written: one item for each fact."""
    return [
        Item(id=f"passage-{place}", kind=ENTRY, text=one.passage().text, subject=one.person.name,
             source="world")
        for place, one in enumerate(world.facts(list(people) if people is not None else None))
    ]  # fmt: skip


class Search(BaseModel):
    """Arguments of the search tool."""

    model_config = ConfigDict(extra="forbid")

    query: str = Field(min_length=1)
    count: int = Field(1, ge=1, le=8)


def search_tool(memory: Memory, by: str = "words") -> Tool:
    """Searches the entries of a memory.

    Args:
        by: words or meaning.
    """

    def use(asked: Search) -> str:
        look = memory.search if by == "meaning" else memory.search_words
        found = look(asked.query, asked.count, ENTRY)
        return "\n".join(one.item.text for one in found) or "Nothing was found."

    return Tool("search", "Finds what is written about something.", Search, use)


__all__ = ["Question", "Search", "passages", "questions", "search_tool"]
