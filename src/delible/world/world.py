"""The world: a seeded knowledge graph of fictional people, with exact ground truth.

The same options make the same world on every machine and in every process.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from delible.component import Config
from delible.errors import DataError, RecipeError, nearest
from delible.records import ForgetRequest
from delible.world import common
from delible.world.export import write
from delible.world.facts import Answers, Fact, MultiHop
from delible.world.graph import Graph, Person, grow
from delible.world.relations import Relation, Selection, select
from delible.world.split import Split, divide

People = Person | str | Iterable[Person | str] | None


class WorldOptions(Config):
    """Everything that a world depends on."""

    people: int = Field(40, ge=4, le=100_000, strict=True, description="Number of people.")
    seed: int = Field(0, strict=True, description="Seed of every choice.")
    relations: Annotated[int, Field(strict=True)] | tuple[str, ...] | None = Field(
        None, description="Relations in use: the first ones, or names; all if left out."
    )
    answers: Answers = Field("short", description="Answers as phrases or as full sentences.")
    shared_surnames: bool = Field(False, description="Give families one surname.")


class World:
    """Fictional people and everything that can be asked about them.

    Args:
        people: Number of people, 4 to 100,000.
        seed: Seed of every choice.
        relations: The relations in use: the first n, or names; all if left out. The graph is the
            same whichever are in use.
        answers: "short" (a phrase of about 2 to 8 words) or "sentence".
        shared_surnames: Families have one surname; otherwise every surname occurs once.

    Raises:
        RecipeError: An unknown option or relation, or a value out of range.
    """

    def __init__(
        self,
        people: int = 40,
        seed: int = 0,
        *,
        relations: int | Sequence[str] | None = None,
        answers: Answers = "short",
        shared_surnames: bool = False,
        **unknown: Any,
    ) -> None:
        if isinstance(relations, str):
            relations = (relations,)
        self.options: Final = WorldOptions.build(
            "world", people=people, seed=seed, relations=relations, answers=answers,
            shared_surnames=shared_surnames, **unknown,
        )  # fmt: skip
        self.relations: Final[tuple[Relation, ...]] = select(self.options.relations)

    def __repr__(self) -> str:
        given = self.options.model_dump(exclude_defaults=True)
        return f"World({', '.join(f'{key}={value!r}' for key, value in given.items())})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, World) and self.options == other.options

    def __hash__(self) -> int:
        return hash(self.options)

    @cached_property
    def graph(self) -> Graph:
        """People and values, made when first needed."""
        return grow(self.options.seed, self.options.people, self.options.shared_surnames)

    @property
    def people(self) -> tuple[Person, ...]:
        """Everybody, with name and aliases."""
        return self.graph.people

    @cached_property
    def _by_name(self) -> dict[str, Person]:
        return {
            name.casefold(): person
            for person in self.people for name in (person.name, *person.aliases)
        }  # fmt: skip

    def person(self, name: str) -> Person:
        """Somebody by name or alias.

        Raises:
            DataError: Nobody is called so.
        """
        found = self._by_name.get(name.casefold())
        if found is None:
            hint = nearest(name, [person.name for person in self.people][:1000])
            raise DataError(f"nobody is called '{name}'.", where="world", hint=hint)
        return found

    def _people(self, people: People) -> tuple[Person, ...]:
        if people is None:
            return self.people
        if isinstance(people, Person | str):
            people = (people,)
        return tuple(self.person(p) if isinstance(p, str) else p for p in people)

    def facts(self, people: People = None, relations: Selection = None) -> list[Fact]:
        """The facts of some people (default: all), person by person.

        Args:
            people: People, their names, or one of either.
            relations: Names, or the first n; default: the world's relations in use.

        Raises:
            DataError: An unknown person.
            RecipeError: An unknown relation.
        """
        wanted = self.relations if relations is None else select(relations)
        return [
            Fact(person, relation, value, self.options.answers, self.graph)
            for person in self._people(people) for relation in wanted
            if (value := self.graph.values[relation.name][person.index]) is not None
        ]  # fmt: skip

    def multi_hop(self, people: People = None, relations: Selection = None) -> list[MultiHop]:
        """Chains of two facts that start at some people (default: all).

        A chain that comes back to its start ("the spouse of the spouse") is left out.
        """
        return [
            MultiHop(first, second)
            for first in self.facts(people, relations) if first.value.person is not None
            for second in self.facts(first.value.person, relations)
            if second.value.person != first.person
        ]  # fmt: skip

    def split(
        self,
        forget: int | Sequence[str] = 2,
        holdout: int | Sequence[str] = 0,
        neighbours: int | None = None,
        relations: Selection = None,
    ) -> Split:
        """Divides the people, and the facts and chains with them.

        Args:
            forget: How many people to forget (drawn by the seed), or their names.
            holdout: How many people the model must never have seen, or their names.
            neighbours: At most so many linked people are watched as neighbours, closest first;
                default: at most half of the kept people. The others stay in retain.
            relations: Names, or the first n; default: the world's relations in use.

        Raises:
            DataError: An unknown name.
            RecipeError: Numbers that leave nobody to forget or to keep, or people in two parts.
        """
        parts = [
            wanted if isinstance(wanted, int) else self._people(wanted)
            for wanted in (forget, holdout)
        ]
        people = divide(self.graph, parts[0], parts[1], neighbours)
        return Split(
            **vars(people),
            facts=tuple(self.facts(relations=relations)),
            chains=tuple(self.multi_hop(relations=relations)),
        )  # fmt: skip

    def request(
        self,
        forget: int | Sequence[str] = 2,
        holdout: int | Sequence[str] = 0,
        neighbours: int | None = None,
        relations: Selection = None,
        bridge: Literal["leave_out", "forget"] = "leave_out",
    ) -> ForgetRequest:
        """A forget request of questions and answers, with the names of the subjects.

        Args:
            forget, holdout, neighbours, relations: As for :meth:`split`.
            bridge: What becomes of the rows about kept people that are answered by a forgotten
                name: in no part, or forgotten too (group "bridge"). They are never retained.

        Raises:
            DataError, RecipeError: As for :meth:`split`.
        """
        if bridge not in ("leave_out", "forget"):
            hint = nearest(bridge, ("leave_out", "forget"))
            raise RecipeError(f"'bridge' = {bridge!r}.", where="request", hint=hint)
        split = self.split(forget, holdout, neighbours, relations)
        return ForgetRequest(
            forget=(*split.qa("forget"), *(split.qa("bridge") if bridge == "forget" else ())),
            subjects=tuple(person.name for person in split.forget),
            retain=tuple(split.qa("retain")),
            neighbours=tuple(split.qa("neighbours")),
            holdout=tuple(split.qa("holdout")),
        )

    general = staticmethod(common.general)
    general_choices = staticmethod(common.general_choices)
    unrelated = staticmethod(common.unrelated)

    def export(
        self,
        folder: str | os.PathLike[str],
        forget: int | Sequence[str] = 2,
        holdout: int | Sequence[str] = 0,
        neighbours: int | None = None,
        relations: Selection = None,
    ) -> Path:
        """Writes everything as JSON Lines, and ``world.json``, which describes it, last.

        Files: one of questions and answers per part (``forget``, ``neighbours``, ``retain``,
        ``bridge``, ``holdout``); one per form over all parts (``choice``, ``cloze``, ``reverse``,
        ``passage``, ``multi_hop``), whose ``subject`` tells the part; ``general``,
        ``general_choice``, ``unrelated``. Each is written under a temporary name and renamed.

        Returns:
            The folder.

        Raises:
            DataError: The folder is a file.
            RunError: The disk is full, or the folder may not be written to.
            DataError, RecipeError: As for :meth:`split`.
        """
        split = self.split(forget, holdout, neighbours, relations)
        return write(self.options.model_dump(mode="json"), self.people, split, Path(folder))
