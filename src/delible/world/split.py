"""Who is forgotten, kept, watched and never seen, and the rows that follow from it.

A row belongs to the person it asks about, with two exceptions that keep the parts apart:

- A fact of a kept person whose answer is a forgotten person (a spouse, a teacher), or a chain
  that leads through one, would teach or test the forgotten name. It is in no kept part, but in a
  part and group of its own: **bridge**.
- A fact of a known person whose answer is a held-out person would make the latter known, and a
  fact of a held-out person about a forgotten one would mix two questions. They are in no part.

No wrong answer of any row names a forgotten or a held-out person.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import Literal, cast, get_args

from delible.errors import RecipeError, nearest
from delible.records import QA, Choice, Passage
from delible.world.facts import Fact, MultiHop
from delible.world.graph import Graph, Person

Part = Literal["forget", "neighbours", "retain", "bridge", "holdout", "kept", "known"]
Form = Literal["qa", "choice", "cloze", "reverse", "passage", "multi_hop"]

#: Parts made of others: what is trained to get the model before, and the retrain reference.
UNIONS: dict[str, tuple[Part, ...]] = {
    "known": ("forget", "neighbours", "retain", "bridge"),
    "kept": ("neighbours", "retain"),
}


@dataclass(frozen=True)
class Parts:
    """People in four disjoint parts.

    Attributes:
        forget: People to forget.
        neighbours: Kept people linked to them (family, teacher or pupil, colleague, same
            birthplace), closest first; to be watched for damage.
        retain: All other kept people.
        holdout: People whom the model must never have seen.
        links: For every linked kept person (a neighbour, or in retain beyond the number of
            neighbours) the closest forgotten one, by name; the rows' ``neighbour_of``.
    """

    forget: tuple[Person, ...]
    neighbours: tuple[Person, ...]
    retain: tuple[Person, ...]
    holdout: tuple[Person, ...]
    links: Mapping[str, str]


@dataclass(frozen=True)
class Split(Parts):
    """People in four disjoint parts, and the rows about them.

    Attributes:
        facts: All facts that were selected.
        chains: All chains of two such facts.
    """

    facts: tuple[Fact, ...]
    chains: tuple[MultiHop, ...]

    def part_of(self, row: Fact | MultiHop) -> Part | None:
        """The part that a fact or chain belongs to; None for the few that belong to none."""
        start, *others = row.people
        gone, unseen = self._sets["forget"], self._sets["holdout"]
        if start not in gone and not gone.isdisjoint(others):
            return None if not unseen.isdisjoint(row.people) else "bridge"
        if start in unseen:
            return "holdout"
        if not unseen.isdisjoint(others):
            return None
        if start in gone:
            return "forget"
        return "neighbours" if start in self._sets["neighbours"] else "retain"

    @cached_property
    def _sets(self) -> dict[str, frozenset[Person]]:
        return {
            part: frozenset(getattr(self, part)) for part in ("forget", "neighbours", "holdout")
        }

    def records(self, part: Part, form: Form = "qa") -> list[QA | Choice | Passage]:
        """The rows of one part in one form, in the order of the world's facts.

        Args:
            part: One of the four, "bridge", "known" (all that the model to be unlearned is
                trained on: everything but holdout) or "kept" (what a retrained reference sees).
            form: How the fact is asked; "reverse" only has the facts whose value is unique.

        Raises:
            RecipeError: An unknown part or form.
        """
        for word, known in ((part, get_args(Part)), (form, get_args(Form))):
            if word not in known:
                raise RecipeError(f"unknown '{word}'.", where="split", hint=nearest(word, known))
        avoid = self._sets["forget"] | self._sets["holdout"]
        parts = UNIONS.get(part, (part,))
        rows: Sequence[Fact | MultiHop] = self.chains if form == "multi_hop" else self.facts
        made: list[QA | Choice | Passage] = []
        for row in rows:
            place = self.part_of(row)
            if place not in parts:
                continue
            record = getattr(row, "qa" if form == "multi_hop" else form)(avoid)
            if record is None:  # The value is not unique, so there is no reverse question.
                continue
            extra = {"neighbour_of": self.links.get(row.people[0].name)}
            if place == "bridge":
                named = next(person for person in row.people if person in self.forget)
                extra |= {"group": "bridge", "neighbour_of": named.name}
            made.append(record.model_copy(update=extra))
        return made

    def qa(self, part: Part) -> list[QA]:
        """The part's questions and answers."""
        return cast(list[QA], self.records(part, "qa"))


def divide(
    graph: Graph,
    forget: Sequence[Person] | int,
    holdout: Sequence[Person] | int,
    neighbours: int | None,
) -> Parts:
    """Divides the people.

    One random order serves all numbers: the forgotten are its beginning and the held-out its end,
    so that the people of ``forget=2`` are among those of ``forget=4``.

    Raises:
        RecipeError: Nobody to forget, nobody left to keep, a person in two parts, or more
            neighbours wanted than one less than the kept people.
    """
    where = "split"
    for name, wanted in (("forget", forget), ("holdout", holdout)):
        if isinstance(wanted, int) and (isinstance(wanted, bool) or wanted < 0):
            raise RecipeError(f"'{name}' = {wanted}: give a number from 0 on.", where=where)
        if not isinstance(wanted, int) and len(set(wanted)) < len(wanted):
            raise RecipeError(f"'{name}' names a person twice.", where=where)
    counts = [n if isinstance(n, int) else len(n) for n in (forget, holdout)]
    if counts[0] == 0 or sum(counts) >= len(graph.people):
        raise RecipeError(
            f"'forget' = {counts[0]} and 'holdout' = {counts[1]} of {len(graph.people)} people.",
            where=where,
            hint="Forget at least one person, and leave at least one to keep.",
        )
    order = Random(f"{graph.seed}/split").sample(graph.people, len(graph.people))
    chosen = {p for named in (forget, holdout) if not isinstance(named, int) for p in named}
    free = [person for person in order if person not in chosen]
    gone = tuple(free[:forget]) if isinstance(forget, int) else tuple(forget)
    free = [person for person in free if person not in gone]
    unseen = tuple(free[len(free) - holdout :]) if isinstance(holdout, int) else tuple(holdout)
    if both := set(gone) & set(unseen):
        raise RecipeError(
            f"'{min(person.name for person in both)}' is both in 'forget' and in 'holdout'.",
            where=where,
        )
    kept = [person for person in order if person not in gone and person not in unseen]
    limit = len(kept) // 2 if neighbours is None else neighbours
    if not 0 <= limit < max(len(kept), 1):
        raise RecipeError(
            f"'neighbours' = {limit} of {len(kept)} kept people.",
            where=where,
            hint="Leave at least one kept person who is no neighbour.",
        )
    rank: dict[Person, tuple[int, Person]] = {}
    for person in gone:
        for closeness, other in graph.neighbours(person):
            if other not in rank or closeness < rank[other][0]:
                rank[other] = (closeness, person)
    linked = sorted((p for p in kept if p in rank), key=lambda p: rank[p][0])
    close = set(linked[:limit])
    return Parts(
        forget=gone,
        neighbours=tuple(linked[:limit]),
        retain=tuple(sorted((p for p in kept if p not in close), key=lambda p: p.index)),
        holdout=unseen,
        links={person.name: rank[person][1].name for person in linked},
    )
