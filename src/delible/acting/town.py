"""A small town on a grid: places that sell things, goals, and the shortest way to each goal.

Its streets are told; where the places are has to be seen or remembered. Everything follows from a
seed, a visit knows what was really done, and a breadth-first search over (cell, inside, held) gives
a plan that no other beats, so an episode's success and its detour are exact.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from delible.acting.loop import Action, Episode, Tool
from delible.errors import DataError
from delible.memory import ENTRY, Item

Cell = tuple[int, int]
Direction = Literal["north", "south", "east", "west"]
MOVES: dict[Direction, Cell] = {"north": (0, -1), "south": (0, 1), "east": (1, 0), "west": (-1, 0)}
#: What each kind of place sells.
SOLD = {"bakery": "bread", "clinic": "medicine", "library": "books", "market": "apples",
        "smithy": "nails"}  # fmt: skip
TREES = (
    "Alder", "Beech", "Cedar", "Dogwood", "Elm", "Fir", "Gorse", "Hazel", "Ivy", "Juniper",
    "Karri", "Larch", "Maple", "Nutmeg", "Oak", "Pine", "Quince", "Rowan", "Spruce", "Tamarack",
    "Umber", "Viburnum", "Willow", "Yew",
)  # fmt: skip
#: How a place is told of, wherever it is.
SIGHT = re.compile(r"At (\d+),(\d+) is ([A-Z][\w ]*?) \((\w+): (\w+)\)")
#: How many times a town is drawn until every street can be reached.
DRAWS = 1000


@dataclass(frozen=True)
class Place:
    """A place: its name, what it is, and where."""

    name: str
    kind: str
    cell: Cell

    @property
    def sells(self) -> str:
        return SOLD[self.kind]

    def told(self) -> str:
        return f"At {self.cell[0]},{self.cell[1]} is {self.name} ({self.kind}: {self.sells})."


@dataclass(frozen=True)
class Goal:
    """Go to a place; get a thing; or, with both, bring the thing to the place."""

    thing: str = ""
    place: str = ""

    @property
    def text(self) -> str:
        if self.thing and self.place:
            return f"Bring {self.thing} to {self.place}."
        return f"Get {self.thing}." if self.thing else f"Go to {self.place}."


@dataclass(frozen=True)
class Town:
    """Streets, walls and places; it never changes.

    Attributes:
        start: Where every visit begins.
    """

    name: str
    width: int
    height: int
    walls: frozenset[Cell]
    places: tuple[Place, ...]
    start: Cell = (0, 0)

    @classmethod
    def made(
        cls, seed: int, *, width: int = 6, height: int = 6, each: int = 2, walls: float = 0.15,
        name: str = "town",
    ) -> Town:  # fmt: skip
        """A town in which every cell that is no wall can be reached.

        Args:
            each: Places of each kind.
            walls: Share of cells that are walls.

        Raises:
            DataError: The places do not fit.
        """
        draw = np.random.default_rng(seed)
        cells = [(x, y) for y in range(height) for x in range(width) if (x, y) != (0, 0)]
        count, kinds = int(walls * len(cells)), [one for one in SOLD for _ in range(each)]
        if len(kinds) > min(len(TREES), len(cells) - count):
            raise DataError(
                f"{len(kinds)} places do not fit into {width} by {height}.",
                where=f"town '{name}'",
                hint="Make it larger, or have fewer places of each kind.",
            )
        trees = [TREES[int(one)] for one in draw.permutation(len(TREES))]
        for _ in range(DRAWS):
            order = [cells[int(one)] for one in draw.permutation(len(cells))]
            places = tuple(
                Place(f"{tree} {kind.capitalize()}", kind, cell)
                for tree, kind, cell in zip(trees, kinds, order[count:], strict=False)
            )
            town = cls(name, width, height, frozenset(order[:count]), places)
            if len(town.distances(town.start)) == width * height - count:
                return town
        raise DataError("walls cut it in two.", where=f"town '{name}'", hint="Have fewer walls.")

    def streets(self, cell: Cell) -> Iterator[tuple[Direction, Cell]]:
        """Where one can walk from a cell."""
        for direction, (right, down) in MOVES.items():
            x, y = cell[0] + right, cell[1] + down
            if 0 <= x < self.width and 0 <= y < self.height and (x, y) not in self.walls:
                yield direction, (x, y)

    def distances(self, start: Cell) -> dict[Cell, int]:
        """Steps from a cell to every cell that can be reached."""
        found, waiting = {start: 0}, deque([start])
        while waiting:
            cell = waiting.popleft()
            for _, other in self.streets(cell):
                if other not in found:
                    found[other] = found[cell] + 1
                    waiting.append(other)
        return found

    def at(self, cell: Cell) -> Place | None:
        return next((one for one in self.places if one.cell == cell), None)

    def named(self, name: str) -> Place | None:
        return next((one for one in self.places if one.name == name), None)


State = tuple[Cell, bool, bool]


def optimal(town: Town, goal: Goal) -> list[Action] | None:
    """A plan of the fewest actions that reaches a goal from the start; None: it cannot be reached.

    The answer that ends an episode is not counted.
    """
    first: State = (town.start, False, False)
    came: dict[State, tuple[State, Action] | None] = {first: None}
    waiting = deque([first])
    while waiting:
        state = waiting.popleft()
        for action, after, reached in _moves(town, goal, state):
            if reached:
                plan = [action]
                while (before := came[state]) is not None:
                    state, earlier = before
                    plan.append(earlier)
                return plan[::-1]
            if after not in came:
                came[after] = (state, action)
                waiting.append(after)
    return None


def _moves(town: Town, goal: Goal, state: State) -> Iterator[tuple[Action, State, bool]]:
    cell, inside, held = state
    place = town.at(cell)
    for direction, other in town.streets(cell):
        yield Action(tool="walk", arguments={"direction": direction}), (other, False, held), False
    if place is None:
        return
    if not inside:
        reached = not goal.thing and place.name == goal.place
        yield Action(tool="enter", arguments={"place": place.name}), (cell, True, held), reached
    elif goal.thing == place.sells and not held:
        take = Action(tool="take", arguments={"thing": goal.thing})
        yield take, (cell, True, True), not goal.place
    elif held and goal.place == place.name:
        put = Action(tool="put", arguments={"thing": goal.thing})
        yield put, (cell, True, False), True


class Walk(BaseModel):
    model_config = ConfigDict(extra="forbid")
    direction: Direction


class Enter(BaseModel):
    model_config = ConfigDict(extra="forbid")
    place: str


class Thing(BaseModel):
    model_config = ConfigDict(extra="forbid")
    thing: str


@dataclass
class Visit:
    """One stay in a town, from its start; it knows what was really done.

    Attributes:
        entered: Names of places, in order.
        brought: Things and where they were put.
    """

    town: Town
    cell: Cell = (0, 0)
    inside: bool = False
    held: set[str] = field(default_factory=set)
    entered: list[str] = field(default_factory=list)
    brought: set[tuple[str, str]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.cell = self.town.start

    @property
    def name(self) -> str:
        return self.town.name

    def opening(self) -> str:
        walls = "; ".join(f"{x},{y}" for x, y in sorted(self.town.walls)) or "none"
        size = f"The town is {self.town.width} wide and {self.town.height} high"
        return f"{size}, and 0,0 is its north-west. Walls: {walls}.\n{self._seen()}"

    def tools(self) -> list[Tool]:
        return [
            Tool("walk", "One step north, south, east or west.", Walk, self._walk),
            Tool("enter", "Goes into a place where you are.", Enter, self._enter),
            Tool("take", "Takes a thing in the place that sells it.", Thing, self._take),
            Tool("put", "Leaves a thing in the place where you are inside.", Thing, self._put),
        ]

    def reached(self, goal: Goal) -> bool:
        """Whether a goal was reached, whatever was said."""
        if goal.thing and goal.place:
            return (goal.thing, goal.place) in self.brought
        return goal.thing in self.held if goal.thing else goal.place in self.entered

    def notes(self, episode: Episode) -> list[Item]:
        """Where the places are that an episode's results tell of."""
        seen = "\n".join((self._seen(self.town.start), *(one.result for one in episode.steps)))
        return [
            Item(text=f"{one.group(0)}.", subject=one.group(3), kind=ENTRY, source=self.name)
            for one in {match.group(3): match for match in SIGHT.finditer(seen)}.values()
        ]

    def _seen(self, cell: Cell | None = None) -> str:
        x, y = cell or self.cell
        place = self.town.at((x, y))
        return f"You are at {x},{y}." + (f" {place.told()}" if place else "")

    def _walk(self, asked: Walk) -> str:
        streets: Mapping[Direction, Cell] = dict(self.town.streets(self.cell))
        if asked.direction not in streets:
            return f"There is no street {asked.direction}. {self._seen()}"
        self.cell, self.inside = streets[asked.direction], False
        return self._seen()

    def _enter(self, asked: Enter) -> str:
        place = self.town.at(self.cell)
        if place is None or place.name != asked.place:
            return f"There is no {asked.place} here."
        self.inside = True
        self.entered.append(place.name)
        return f"You are in {place.name}."

    def _take(self, asked: Thing) -> str:
        place = self.town.at(self.cell)
        if place is None or not self.inside or place.sells != asked.thing:
            return f"There is no {asked.thing} here."
        self.held.add(asked.thing)
        return f"You have the {asked.thing} now."

    def _put(self, asked: Thing) -> str:
        place = self.town.at(self.cell)
        if asked.thing not in self.held or place is None or not self.inside:
            return f"You cannot leave {asked.thing} here."
        self.held.discard(asked.thing)
        self.brought.add((asked.thing, place.name))
        return f"You left the {asked.thing} in {place.name}."


def known(places: Sequence[Place], town: str) -> list[Item]:
    """What somebody notes who has seen some places."""
    return [Item(text=one.told(), subject=one.name, kind=ENTRY, source=town) for one in places]


__all__ = [
    "SIGHT", "SOLD", "Cell", "Direction", "Goal", "Place", "Town", "Visit", "known", "optimal",
]  # fmt: skip
