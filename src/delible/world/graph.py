"""The knowledge graph itself: people, and the value of every relation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from random import Random

from delible.world.families import Kin, add_teachers, draw_families
from delible.world.names import Gender, Namer, words

FAMILY = ("spouse", "mother", "father", "sibling", "child")


@dataclass(frozen=True)
class Person:
    """A fictional person; ``index`` is the place in ``World.people``."""

    index: int
    name: str
    aliases: tuple[str, ...]
    given: str
    surname: str
    gender: Gender
    birth_year: int


@dataclass(frozen=True)
class Value:
    """What a relation points at; ``person`` is set where that is somebody of the world."""

    name: str
    aliases: tuple[str, ...] = ()
    person: Person | None = None


@dataclass(frozen=True, eq=False)
class Graph:
    """People and values.

    Attributes:
        values: For each relation one value (or None) per person.
        children: Children per person, eldest first.
        pools: For each kind of value, everything that a wrong answer may be drawn from.
        strangers: Names of nobody, per gender, for worlds too small to offer wrong people.
    """

    seed: int
    people: tuple[Person, ...]
    values: dict[str, tuple[Value | None, ...]]
    children: tuple[tuple[Person, ...], ...]
    pools: dict[str, tuple[Value, ...]]
    strangers: dict[Gender, tuple[Value, ...]]

    @cached_property
    def holders(self) -> dict[tuple[str, str], tuple[Person, ...]]:
        """Who has a value: (relation, name of the value) -> people."""
        found: dict[tuple[str, str], list[Person]] = defaultdict(list)
        for relation, values in self.values.items():
            for person, value in zip(self.people, values, strict=True):
                if value is not None:
                    found[relation, value.name].append(person)
        return {key: tuple(people) for key, people in found.items()}

    def wrong_values(
        self, person: Person, relation: str, kind: str, avoid: frozenset[Person], count: int
    ) -> tuple[Value, ...]:
        """Distinct values of the same type that are not true of ``person``.

        Args:
            avoid: People who must not be named, nor what only they have (a work, a pet).
        """
        truth = self.values[relation][person.index]
        if truth is None:
            raise ValueError(f"{person.name} has no {relation}.")
        stream = Random(f"{self.seed}/wrong/{relation}/{person.index}")
        if kind == "year":
            year = int(truth.name)
            near = [other for other in range(year - 12, year + 13) if other != year]
            return tuple(Value(str(other)) for other in stream.sample(near, count))
        if truth.person is not None:
            gender = truth.person.gender
            pool, spare = self.pools[gender], self.strangers[gender]
        else:
            pool, spare = self.pools[kind], ()
        alternatives = self.children[person.index] if relation == "child" else ()
        taken = {truth.name, person.name}
        chosen: list[Value] = []
        for value in _draw(pool, spare, stream):
            if len(chosen) == count:
                break
            if value.name in taken or value.person in alternatives or value.person in avoid:
                continue
            if kind in ("work", "pet") and any(
                holder in avoid for holder in self.holders.get((relation, value.name), ())
            ):
                continue
            taken.add(value.name)
            chosen.append(value)
        return tuple(chosen)

    def wrong_people(
        self, person: Person, avoid: frozenset[Person], relation: str, count: int
    ) -> tuple[Value, ...]:
        """Other people of the same gender who lack this person's value of ``relation``."""
        truth = self.values[relation][person.index]
        stream = Random(f"{self.seed}/wrong people/{relation}/{person.index}")
        excluded = avoid | {person}
        if truth is not None and truth.person is not None:
            excluded |= {truth.person}
        chosen: dict[str, Value] = {}
        for value in _draw(self.pools[person.gender], self.strangers[person.gender], stream):
            if len(chosen) == count:
                break
            if value.person is None or value.person not in excluded:
                chosen[value.name] = value
        return tuple(chosen.values())

    def neighbours(self, person: Person) -> Iterator[tuple[int, Person]]:
        """Who is linked to ``person``, with how closely.

        Yields:
            (0, family), (1, teacher or pupil), (2, same employer), (3, same birthplace).
            A person who is linked twice comes twice.
        """
        for relation in (*FAMILY, "teacher"):
            rank = 1 if relation == "teacher" else 0
            value = self.values[relation][person.index]
            if value is not None and value.person is not None:
                yield rank, value.person
            for other in self.holders.get((relation, person.name), ()):
                yield rank, other
        for child in self.children[person.index]:
            yield 0, child
        for rank, relation in ((2, "employer"), (3, "birthplace")):
            shared = self.values[relation][person.index]
            if shared is not None:
                for other in self.holders[relation, shared.name]:
                    if other != person:
                        yield rank, other


def _draw(pool: tuple[Value, ...], spare: tuple[Value, ...], stream: Random) -> Iterator[Value]:
    """The pool in random order (values may come twice), then the spare values."""
    # A few draws are nearly always enough, and far cheaper than shuffling a large pool.
    for place in stream.sample(range(len(pool)), min(len(pool), 12)):
        yield pool[place]
    yield from stream.sample(pool, len(pool))
    yield from spare


def grow(seed: int, count: int, shared_surnames: bool) -> Graph:
    """Makes the graph of ``count`` people (at least 4)."""
    stream = Random(f"{seed}/families")
    kin = draw_families(stream, count)
    add_teachers(Random(f"{seed}/teachers"), kin)
    order = stream.sample(range(count), count)
    place = {old: new for new, old in enumerate(order)}
    namer = Namer(seed)
    surnames, givens = _names(kin, namer, shared_surnames)
    for given, surname in zip(givens, surnames, strict=True):
        namer.take(f"{given} {surname}")
    people = tuple(
        Person(
            index=new,
            name=f"{givens[old]} {surnames[old]}",
            aliases=namer.aliases(givens[old], surnames[old], kin[old].gender),
            given=givens[old],
            surname=surnames[old],
            gender=kin[old].gender,
            birth_year=kin[old].birth_year,
        )
        for new, old in enumerate(order)
    )
    as_value = [Value(person.name, person.aliases, person) for person in people]

    def link(old: int | None) -> Value | None:
        return None if old is None else as_value[place[old]]

    def sibling(old: int) -> int | None:
        mother = kin[old].mother
        others = [] if mother is None else [c for c in kin[mother].children if c != old]
        return others[0] if others else None

    ordered = [kin[old] for old in order]
    pools = _pools(namer, count)
    values = _attributes(seed, people, pools)
    values |= {
        "teacher": tuple(link(one.teacher) for one in ordered),
        "spouse": tuple(link(one.spouse) for one in ordered),
        "mother": tuple(link(one.mother) for one in ordered),
        "father": tuple(link(one.father) for one in ordered),
        "sibling": tuple(link(sibling(old)) for old in order),
        "child": tuple(link(one.children[0] if one.children else None) for one in ordered),
    }
    strangers: dict[Gender, tuple[Value, ...]] = {"woman": (), "man": ()}
    for gender in strangers:
        strangers[gender] = tuple(
            Value(f"{namer.given(gender, set())} {namer.surname()}") for _ in range(8)
        )
        pools[gender] = tuple(
            value for value in as_value if value.person is not None
            and value.person.gender == gender
        )  # fmt: skip
    children = tuple(tuple(people[place[child]] for child in one.children) for one in ordered)
    return Graph(seed, people, values, children, pools, strangers)


def _names(kin: list[Kin], namer: Namer, shared: bool) -> tuple[list[str], list[str]]:
    """Surnames and given names; with ``shared``, a couple and its children have one surname.

    Family members never have the same given name, and none that ends with another's.
    """
    surnames: list[str] = []
    givens: list[str] = []
    used: dict[str, set[str]] = defaultdict(set)
    for number, one in enumerate(kin):
        relatives = [other for other in (one.father, one.mother) if other is not None]
        # Whoever marries takes the name of the spouse who came first in the list.
        if one.spouse is not None and one.spouse < number:
            relatives.insert(0, one.spouse)
        surname = surnames[relatives[0]] if shared and relatives else namer.surname()
        surnames.append(surname)
        givens.append(namer.given(one.gender, used[surname]))
    return surnames, givens


def _pools(namer: Namer, count: int) -> dict[str, tuple[Value, ...]]:
    def plain(size: int, draw: Callable[[], str]) -> tuple[Value, ...]:
        return tuple(Value(draw()) for _ in range(size))

    def aliased(size: int, draw: Callable[[], tuple[str, str]]) -> tuple[Value, ...]:
        return tuple(Value(name, (alias,)) for name, alias in (draw() for _ in range(size)))

    return {
        "town": plain(max(10, count // 3), namer.town),
        "employer": aliased(max(10, count // 4), namer.employer),
        "university": aliased(max(10, count // 6), namer.university),
        "award": plain(max(10, count // 3), namer.award),
        "language": plain(max(10, min(60, count // 3)), namer.language),
        # One each, and some that nobody has.
        "work": plain(count + 10, namer.work),
        "pet": plain(count + 10, namer.pet),
        "occupation": tuple(map(Value, words()["occupation"])),
        "instrument": tuple(map(Value, words()["instrument"])),
        "hobby": tuple(map(Value, words()["hobby"])),
    }


def _attributes(
    seed: int, people: tuple[Person, ...], pools: dict[str, tuple[Value, ...]]
) -> dict[str, tuple[Value | None, ...]]:
    values: dict[str, tuple[Value | None, ...]] = {
        "birth_year": tuple(Value(str(person.birth_year)) for person in people)
    }
    kinds = {"birthplace": "town", "residence": "town", "notable_work": "work"}
    for relation in (
        "birthplace", "occupation", "employer", "notable_work", "residence", "university",
        "award", "instrument", "language", "pet", "hobby",
    ):  # fmt: skip
        kind = kinds.get(relation, relation)
        stream = Random(f"{seed}/values/{relation}")
        if kind in ("work", "pet"):
            values[relation] = tuple(stream.sample(pools[kind], len(people)))
            continue
        drawn = [stream.choice(pools[kind]) for _ in people]
        if relation == "residence":  # Nobody stayed at home: the two towns are told apart.
            born = values["birthplace"]
            for place, town in enumerate(born):
                while drawn[place] == town:
                    drawn[place] = stream.choice(pools[kind])
        values[relation] = tuple(drawn)
    return values
