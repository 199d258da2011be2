"""The town: its optimum against all pairs of cells, its rules, and the policy by rule."""

from __future__ import annotations

import dataclasses
from itertools import product

import numpy as np
import pytest

from delible.acting.loop import Action, Budget, Episode, act, used
from delible.acting.town import SOLD, Goal, Place, Town, Visit, known, optimal
from delible.acting.town_policy import UNKNOWN, Walker
from delible.errors import DataError
from delible.system.role import Role
from delible.systems.scripted import Scripted

BUDGET = Budget(steps=90, tokens=90 * 64, step_tokens=64)


def by_hand(town: Town) -> dict[tuple[tuple[int, int], tuple[int, int]], float]:
    """Floyd and Warshall over cells, from walls alone."""
    cells = [one for one in product(range(town.width), range(town.height)) if one not in town.walls]
    far = np.full((len(cells),) * 2, np.inf)
    for (i, a), (j, b) in product(enumerate(cells), repeat=2):
        if abs(a[0] - b[0]) + abs(a[1] - b[1]) <= 1:
            far[i, j] = float(a != b)
    for k in range(len(cells)):
        far = np.minimum(far, far[:, k : k + 1] + far[k : k + 1])
    return {(a, b): far[i, j] for (i, a), (j, b) in product(enumerate(cells), repeat=2)}


def goals(town: Town) -> list[Goal]:
    names = [one.name for one in town.places]
    return [*(Goal(place=one) for one in names), *(Goal(one) for one in SOLD.values()),
            *(Goal(one, two) for one, two in zip(SOLD.values(), names, strict=False)),
            *(Goal(one.sells, one.name) for one in town.places[:6])]  # fmt: skip


def fewest(town: Town, goal: Goal) -> float:
    far, start = by_hand(town), town.start
    to = next((one for one in town.places if one.name == goal.place), None)
    if not goal.thing:
        return far[start, to.cell] + 1
    shops = [one for one in town.places if SOLD[one.kind] == goal.thing]
    if to is None:
        return min(far[start, one.cell] for one in shops) + 2
    return min(far[start, one.cell] + 2 + far[one.cell, to.cell]
               + (2 if one.cell != to.cell else 1) for one in shops)  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_no_plan_is_shorter_and_every_plan_works(seed: int) -> None:
    town = Town.made(seed, width=5, height=4, each=2)
    assert town == Town.made(seed, width=5, height=4, each=2)
    assert town != Town.made(seed + 1, width=5, height=4, each=2)
    for goal in goals(town):
        plan, visit = optimal(town, goal), Visit(town)
        assert plan is not None
        assert len(plan) == fewest(town, goal)
        tools = {one.name: one for one in visit.tools()}
        for number, action in enumerate(plan):
            assert not visit.reached(goal), number
            used(tools, action)
        assert visit.reached(goal)


def test_a_town_is_whole_and_says_when_it_cannot_be() -> None:
    for seed in range(10):
        town = Town.made(seed, walls=0.3)
        far = by_hand(town)
        assert max(far.values()) < np.inf
        cells = [one.cell for one in town.places]
        assert len({*cells, town.start}) == len(cells) + 1
        assert not town.walls & {*cells, town.start}
    with pytest.raises(DataError, match="do not fit"):
        Town.made(0, width=3, height=3)
    with pytest.raises(DataError, match="cut it in two"):
        Town.made(0, width=12, height=12, walls=0.7)
    lonely = dataclasses.replace(town, places=(Place("Elm Clinic", "clinic", (1, 0)),))
    assert optimal(lonely, Goal("bread")) is None


def test_what_is_not_so_is_not_done() -> None:
    town = Town("t", 3, 1, frozenset(), (Place("Elm Bakery", "bakery", (1, 0)),))
    visit = Visit(town)
    tools = {one.name: one for one in visit.tools()}

    def do(tool: str, word: str, value: str) -> str:
        return used(tools, Action(tool=tool, arguments={word: value}))

    assert do("walk", "direction", "north") == "There is no street north. You are at 0,0."
    assert do("enter", "place", "Elm Bakery") == "There is no Elm Bakery here."
    assert do("walk", "direction", "east") == (
        "You are at 1,0. At 1,0 is Elm Bakery (bakery: bread)."
    )
    assert do("take", "thing", "bread") == "There is no bread here."
    assert do("enter", "place", "Elm Bakery") == "You are in Elm Bakery."
    assert do("take", "thing", "nails") == "There is no nails here."
    assert do("put", "thing", "bread") == "You cannot leave bread here."
    assert not visit.reached(Goal("bread"))
    assert do("take", "thing", "bread") == "You have the bread now."
    assert visit.reached(Goal("bread"))
    do("walk", "direction", "east")
    assert do("put", "thing", "bread") == "You cannot leave bread here."
    assert not visit.reached(Goal("bread", "Elm Bakery"))
    assert visit.reached(Goal(place="Elm Bakery"))


def walked(town: Town, goal: Goal, told: str, walker: Walker) -> tuple[Visit, Episode]:
    visit = Visit(town)
    role = Role("planner", Scripted(walker))
    episode = act(role, goal.text, visit.tools(), BUDGET, "\n".join((visit.opening(), told)))
    return visit, episode


def test_the_policy_is_optimal_where_it_knows_all_and_honest_where_not() -> None:
    town = Town.made(5)
    told = "\n".join(one.text for one in known(town.places, "town"))
    for goal in goals(town):
        visit, episode = walked(town, goal, told, Walker())
        assert visit.reached(goal), goal
        assert len(episode.steps) - 1 == len(optimal(town, goal) or ()), goal
        visit, episode = walked(town, goal, "", Walker())
        assert episode.answer == UNKNOWN
        assert not visit.reached(goal)
        visit, episode = walked(town, goal, "", Walker(explores=True))
        assert visit.reached(goal), goal
        assert len(episode.steps) - 1 >= len(optimal(town, goal) or ())
        seen = {one.subject: one.text for one in visit.notes(episode)}
        assert seen == {one.name: one.told() for one in town.places if one.name in seen}
        assert set(visit.entered) <= set(seen)
