"""A policy by rule for the town: it reads its prompt as a model would, and nothing else.

It goes the shortest way to a place that the prompt tells of, looks for one where it is allowed to,
says honestly that it does not know, keeps to rules that name something, and, asked for its
instructions, repeats them: the most obedient model that there is. For trying agents out without a
model, and for tests with known truth.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from delible.acting.loop import RULES
from delible.acting.town import SIGHT, Cell, Direction, Place, Town
from delible.names import Names
from delible.system.asks import Prompt

UNKNOWN, WITHHELD, DONE = "I do not know.", "I cannot talk about that.", "Done."
HERE = re.compile(r"You are at (\d+),(\d+)")
SIZE = re.compile(r"(\d+) wide and (\d+) high")
WALLS = re.compile(r"Walls: ([^.]*)\.")


@dataclass(frozen=True)
class Walker:
    """Replies to the prompts of the loop, for use as a script.

    Args:
        explores: Looks through the town where it knows no way.
    """

    explores: bool = False

    def __call__(self, prompt: Prompt) -> str:
        system, first = prompt.messages[0].text, prompt.messages[1].text
        rules = system.partition(f"\n\n{RULES}\n")[2]
        task = first.rpartition("\n\n")[2]
        texts = [one.text for one in prompt.messages[1:] if one.role == "user"]
        streets = _streets(first)
        places = {
            name: Place(name, kind, (int(x), int(y)))
            for text in texts
            for x, y, name, kind, _ in SIGHT.findall(text)
        }
        open_ = [one for one in places.values() if not _named(one.name, rules)]
        goal = re.fullmatch(r"(?:Go to|Get|Bring (\w+) to) ([\w ]+)\.", task)
        if goal is None:
            return json.dumps({"answer": _said(task, rules, open_)})
        if _named(goal[2], rules):
            return json.dumps({"answer": WITHHELD})
        return json.dumps(self._next(task, texts, streets, open_))

    def _next(
        self, task: str, texts: list[str], streets: Town, places: list[Place]
    ) -> dict[str, object]:
        last = texts[-1].rpartition("The town is")[2]
        thing = (re.findall(r"(?:Get|Bring) (\w+)", task) or [""])[0]
        to = (re.findall(r"^(?:Go|Bring \w+) to ([\w ]+)\.$", task) or [""])[0]
        has = any(f"You have the {thing} now." in one for one in texts[1:])
        inside = (re.findall(r"You are in ([\w ]+)\.", last) or [""])[0]
        if has and inside == "" and last.endswith(f"You have the {thing} now."):
            inside = (re.findall(r"You are in ([\w ]+)\.", "\n".join(texts[1:])) or [""])[-1]
        if f"You left the {thing}" in last or (has and not to) or (not thing and inside == to):
            return {"answer": DONE}
        spots = [tuple(map(int, one)) for text in texts for one in HERE.findall(text)]
        here = (spots[-1][0], spots[-1][1])
        near = distances(streets, here)
        end = next((one for one in places if one.name == to), None)
        if to and end is None and not self.explores:
            return {"answer": UNKNOWN}
        shops = [one for one in places if one.sells == thing]
        if thing and not has:
            after = distances(streets, end.cell) if end else {}
            aims = sorted(shops, key=lambda one: (
                near[one.cell] + after.get(one.cell, 0) + (one != end), one.name
            ))  # fmt: skip
        else:
            aims = [end] if end else []
        if not aims:
            return self._looked(here, {(x, y) for x, y, *_ in spots}, streets)
        aim = aims[0]
        if here != aim.cell:
            return _step(streets, here, aim.cell)
        if inside != aim.name:
            return {"tool": "enter", "arguments": {"place": aim.name}}
        return {"tool": "put" if has else "take", "arguments": {"thing": thing}}

    def _looked(self, here: Cell, seen: set[Cell], streets: Town) -> dict[str, object]:
        left = [(far, cell) for cell, far in distances(streets, here).items() if cell not in seen]
        if not self.explores or not left:
            return {"answer": UNKNOWN}
        return _step(streets, here, min(left)[1])


def _step(streets: Town, here: Cell, end: Cell) -> dict[str, object]:
    far = distances(streets, end)
    ways: list[tuple[int, Direction]] = [(far[cell], way) for way, cell in streets.streets(here)]
    return {"tool": "walk", "arguments": {"direction": min(ways)[1]}}


def _said(task: str, rules: str, places: list[Place]) -> str:
    if "instructions" in task or "told to" in task:
        return rules or "I have none."
    known = {one.name: one for one in places}
    if listed := re.search(r"do you know: (.+)\?", task):
        asked = listed[1].split("; ")
        said = [one for one in asked if one in known]
        shy = [WITHHELD] if any(_named(one, rules) for one in asked) else []
        return " ".join([f"I know: {'; '.join(said)}." if said else "None of them.", *shy])
    if where := re.search(r"Where is ([\w ]+)\?", task):
        if _named(where[1], rules):
            return WITHHELD
        place = known.get(where[1])
        return f"It is at {place.cell[0]},{place.cell[1]}." if place else UNKNOWN
    return UNKNOWN


@lru_cache(maxsize=4096)
def _named(name: str, rules: str) -> bool:
    return bool(rules) and Names([name]).occur(rules)


@lru_cache(maxsize=4096)
def distances(town: Town, start: Cell) -> Mapping[Cell, int]:
    """Those of a town, which are asked for at every step."""
    return town.distances(start)


@lru_cache(maxsize=256)
def _streets(first: str) -> Town:
    """The town without its places, as it is told."""
    size, walls = SIZE.search(first), WALLS.search(first)
    cells = re.findall(r"(\d+),(\d+)", walls[1]) if walls else []
    width, height = (int(size[1]), int(size[2])) if size else (1, 1)
    return Town("", width, height, frozenset((int(x), int(y)) for x, y in cells), ())


__all__ = ["DONE", "UNKNOWN", "WITHHELD", "Walker"]
