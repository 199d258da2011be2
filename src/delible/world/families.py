"""Families and teachers, before anybody has a name.

Three generations are drawn: couples, their children (at most two, so that a sibling is one
person), and their grandchildren. Spouses are of one generation, at most eight years apart and
share no ancestor of the world; a mother or father is 19 to 41 years older than the child;
a teacher is 15 to 45 years older than the pupil and no parent. Who has no parent, spouse, child,
sibling or teacher in the world simply lacks that fact.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from random import Random

from delible.world.names import Gender

LAST_GENERATION_SHARE = 0.28


@dataclass
class Kin:
    """A person before there are names; numbers are places in the list of kin."""

    gender: Gender
    birth_year: int
    mother: int | None = None
    father: int | None = None
    spouse: int | None = None
    teacher: int | None = None
    children: list[int] = field(default_factory=list)


def draw_families(stream: Random, count: int) -> list[Kin]:
    """``count`` people in three generations."""
    kin: list[Kin] = []
    last = round(count * LAST_GENERATION_SHARE)
    founders = max(2, (count - last) // 4 * 2)
    for _ in range(founders // 2):
        wife = stream.randint(1892, 1912)
        husband = wife + stream.randint(-6, 6)
        kin.append(Kin("woman", wife, spouse=len(kin) + 1))
        kin.append(Kin("man", husband, spouse=len(kin) - 1))
    for size in (count - last - founders, last):
        parents = range(len(kin))
        slots = [
            (number, other) for number in parents
            if kin[number].gender == "woman" and not kin[number].children
            and (other := kin[number].spouse) is not None
        ] * 2  # fmt: skip
        stream.shuffle(slots)
        newborn = range(len(kin), len(kin) + size)
        for number in newborn:
            gender: Gender = stream.choice(("woman", "man"))
            if not slots:
                kin.append(Kin(gender, stream.randint(1925, 1965)))
                continue
            mother, father = slots.pop()
            siblings = {kin[child].birth_year for child in kin[mother].children}
            oldest = max(kin[mother].birth_year, kin[father].birth_year)
            year = stream.choice([y for y in range(oldest + 19, oldest + 34) if y not in siblings])
            kin.append(Kin(gender, year, mother=mother, father=father))
            for parent in (mother, father):
                kin[parent].children.append(number)
                kin[parent].children.sort(key=lambda child: kin[child].birth_year)
        _marry(stream, kin, newborn)
    return kin


def _marry(stream: Random, kin: list[Kin], generation: Iterable[int]) -> None:
    """Marries most of a generation: at most eight years apart, no common ancestor."""
    men: dict[int, list[int]] = defaultdict(list)
    women: list[int] = []
    for number in generation:
        if stream.random() < 0.1:
            continue
        if kin[number].gender == "man":
            men[kin[number].birth_year].append(number)
        else:
            women.append(number)
    for woman in women:
        year = kin[woman].birth_year
        ancestors = _ancestors(kin, woman)
        for other in sorted(range(year - 8, year + 9), key=lambda y: (abs(y - year), y)):
            match = next((m for m in men[other] if not ancestors & _ancestors(kin, m)), None)
            if match is not None:
                men[other].remove(match)
                kin[woman].spouse, kin[match].spouse = match, woman
                break


def _ancestors(kin: list[Kin], number: int) -> set[int]:
    parents = {p for p in (kin[number].mother, kin[number].father) if p is not None}
    return parents.union(*(_ancestors(kin, parent) for parent in parents))


def add_teachers(stream: Random, kin: list[Kin]) -> None:
    """Gives everybody a teacher for whom there is somebody old enough."""
    by_age = sorted(range(len(kin)), key=lambda number: kin[number].birth_year)
    years = [kin[number].birth_year for number in by_age]
    for one in kin:
        first = bisect_left(years, one.birth_year - 45)
        end = bisect_right(years, one.birth_year - 15)
        parents = {one.mother, one.father}
        # Two parents at most stand in the way, so three different draws find somebody if any.
        drawn = stream.sample(range(first, end), min(end - first, 3))
        one.teacher = next((by_age[d] for d in drawn if by_age[d] not in parents), None)
