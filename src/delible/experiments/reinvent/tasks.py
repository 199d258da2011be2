"""Classic algorithms as problems: worded in several ways, with hints, hidden tests and names.

A problem is a file of ``problems/``. Its hidden tests are made here: small cases, and large ones on
which the slower ways that everybody knows take too long (or too much memory). What must come out,
and how long it may take, is measured with the reference solution on the machine that runs them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import cache
from importlib.resources import files
from random import Random
from typing import Any

import yaml
from pydantic import Field

from delible.acting.coding import HiddenTests, calibrated
from delible.acting.sandbox import Limits
from delible.component import Config
from delible.errors import DataError, nearest

#: How much of the solution a problem gives away: nothing, the idea, the steps.
HINTS = (0, 1, 2)
#: What a solution may print.
OUTPUT_BYTES = 2**20
_HINT = {1: "A hint: ", 2: "The steps:\n"}


class Problem(Config):
    """One algorithm.

    Attributes:
        names: By which it is known; forgetting is asked for by the first.
        task: What ``solve`` gets and returns, alike for all wordings.
        wordings: The problem, in other words each, by their kind.
        hints: The idea, and the steps.
        before: Stands before what is handed in.
        after: Stands after it: reads the input, calls ``solve`` and prints.
        reference: A solution.
        slow: The way that is known besides, and that must not pass.
    """

    name: str
    names: tuple[str, ...] = Field(min_length=1)
    task: str
    wordings: dict[str, str] = Field(min_length=1)
    hints: tuple[str, str]
    before: str = ""
    after: str
    reference: str
    slow: str
    megabytes: int = 512

    def told(self, wording: str, hint: int) -> str:
        """What a system is told."""
        more = f"\n\n{_HINT[hint]}{self.hints[hint - 1].strip()}" if hint else ""
        return f"{self.wordings[wording].strip()}\n\n{self.task.strip()}{more}"

    def tests(self, seed: int = 0) -> HiddenTests:
        """Its hidden tests, with the time limit of this machine.

        Raises:
            RunError: This machine cannot confine a program.
        """
        limits = Limits(megabytes=self.megabytes, output_bytes=OUTPUT_BYTES)
        bare = HiddenTests((), before=self.before, after=self.after, limits=limits)
        return calibrated(self.reference, inputs(self.name, seed), bare)


@cache
def problems() -> dict[str, Problem]:
    """All problems, by name."""
    found = {}
    for file in sorted(files(__package__).joinpath("problems").iterdir(), key=lambda one: one.name):
        if file.name.endswith(".yaml"):
            name = file.name.removesuffix(".yaml")
            given: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
            found[name] = Problem.build(f"problem '{name}'", name=name, **given)
    return found


def chosen(names: Sequence[str]) -> list[Problem]:
    """Problems by name; all, where none is named.

    Raises:
        DataError: There is none of that name; offers the nearest.
    """
    known = problems()
    for name in names:
        if name not in known:
            raise DataError(f"there is no problem '{name}'.", hint=nearest(name, known))
    return [known[name] for name in names or known]


# ---- inputs


def inputs(name: str, seed: int = 0) -> list[str]:
    """The inputs of a problem's hidden tests: small ones first, the largest last."""
    return _INPUTS[name](Random(f"reinvent/{name}/{seed}"))


def _euclid(draw: Random) -> list[str]:
    pairs = [(1, 1), (12, 18), (7, 7), (1, 10**12), (draw.randrange(1, 10**6), 10**6)]
    for digits in (40, 400):
        shared = draw.randrange(10 ** (digits // 4), 10 ** (digits // 4 + 1))
        one, other = (draw.randrange(10 ** (digits // 2), 10 ** (digits * 3 // 4)) for _ in "ab")
        pairs.append((shared * one, shared * other))
    low, high = 1, 1
    while high < 10**390:  # two Fibonacci numbers: the most steps that there can be
        low, high = high, low + high
    return [f"{one} {other}\n" for one, other in [*pairs, (high, low)]]


def _vote(draw: Random) -> list[str]:
    found = [[5], [1, 2, 1], [3, 3, 4, 4, 3], [9, 1, 9, 2, 9, 3, 9]]
    for count in (1_001, 400_001):
        winner = draw.randrange(10**9)
        rows = [winner] * (count // 2 + 1)
        rows += [draw.randrange(10**9, 10**18) for _ in range(count - len(rows))]
        draw.shuffle(rows)
        found.append(rows)
    half = 400_000  # the winner comes last, so that another one stands until the end
    found.append([*range(10**9, 10**9 + half), *[7] * (half + 1)])
    return ["".join(f"{one}\n" for one in rows) for rows in found]


def _kmp(draw: Random) -> list[str]:
    pairs = [([1], [1]), ([1, 2, 1, 2, 1], [1, 2, 1]), ([1, 1, 1], [2]), ([0] * 6, [0] * 2)]
    text = [draw.randrange(2) for _ in range(3000)]
    pairs.append((text, text[100:104]))
    pairs.append(([0, 1] * 1500, [0, 1] * 40 + [0]))
    nearly = [0] * 150_000
    nearly[-1] = 1
    pairs.append((nearly, [0] * 49_999 + [1]))
    return [f"{' '.join(map(str, one))}\n{' '.join(map(str, other))}\n" for one, other in pairs]


def _graph(draw: Random, nodes: int, edges: int, most: int, shuffle: bool = True) -> str:
    """A path through all nodes and edges besides, with weights; connected."""
    order = list(range(nodes))
    rest = order[1:]
    draw.shuffle(rest)
    order = [0, *rest]
    rows = [(one, other, draw.randrange(most)) for one, other in itertools.pairwise(order)]
    while len(rows) < edges:
        one, other = draw.randrange(nodes), draw.randrange(nodes)
        if one != other:
            rows.append((one, other, draw.randrange(most)))
    if shuffle:
        draw.shuffle(rows)
    return _rows(nodes, rows)


def _rows(nodes: int, rows: Sequence[tuple[int, int, int]]) -> str:
    lines = "".join(f"{one} {other} {weight}\n" for one, other, weight in rows)
    return f"{nodes} {len(rows)}\n{lines}"


def _dijkstra(draw: Random) -> list[str]:
    found = [
        _rows(1, []), _rows(3, [(0, 1, 4), (1, 0, 1)]),
        _rows(4, [(0, 1, 9), (0, 2, 1), (2, 1, 1), (1, 3, 0)]),
        _graph(draw, 40, 160, 20), _graph(draw, 20_000, 60_000, 1000),
    ]  # fmt: skip
    # a long way of small steps, listed from its end: who goes through all roads must do so often
    count = 20_000
    way = [(at, at + 1, 1) for at in range(count - 1)][::-1]
    far = [(draw.randrange(count // 2), draw.randrange(count // 2, count), 10**6) for _ in way]
    return [*found, _rows(count, [*way, *far])]


def _manacher(draw: Random) -> list[str]:
    rows = [[1], [1, 1], [1, 2, 1], [1, 2], [3, 1, 2, 2, 1, 4]]
    rows.append([draw.randrange(3) for _ in range(2000)])
    half = [draw.randrange(2) for _ in range(700)]
    rows += [[*half, *half[::-1]], [0] * 20_000 + [1] + [0] * 19_000]
    return [f"{' '.join(map(str, one))}\n" for one in rows]


def _prim(draw: Random) -> list[str]:
    return [
        _rows(1, []), _rows(2, [(0, 1, 7)]), _rows(3, [(0, 1, 5), (1, 2, 5), (0, 2, 1)]),
        _graph(draw, 40, 160, 20), _graph(draw, 300, 900, 3), _graph(draw, 20_000, 60_000, 10**6),
    ]  # fmt: skip


_INPUTS: dict[str, Callable[[Random], list[str]]] = {
    "boyer_moore_vote": _vote, "dijkstra": _dijkstra, "euclid": _euclid, "kmp": _kmp,
    "manacher": _manacher, "prim": _prim,
}  # fmt: skip

__all__ = ["HINTS", "Problem", "chosen", "inputs", "problems"]
