"""What a memory should say, worked out item by item; and ways to let a process die."""

from __future__ import annotations

import math
import os
import re
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from delible.memory import Item, Memory, steps


class Letters:
    """Counts of letters: cosines that anybody can work out."""

    identity = "letters"

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        found = np.zeros((len(texts), 26), dtype=np.float32)
        for row, text in enumerate(texts):
            for letter in re.findall("[a-z]", text.lower()):
                found[row, ord(letter) - 97] += 1
        return found


def unit(text: str) -> npt.NDArray[np.float32]:
    vector = Letters().encode([text])[0]
    norm = np.linalg.norm(vector)
    return vector / norm if norm else vector


def cosine(query: str, key: str) -> float:
    """Exact: a sum of fractions, rounded once."""
    pairs = zip(unit(query).tolist(), unit(key).tolist(), strict=True)
    return float(sum(Fraction(a) * Fraction(b) for a, b in pairs))


def bm25(query: str, key: str, keys: Sequence[str]) -> float:
    """Okapi BM25, k1 = 1.2, b = 0.75, with rarities of common words floored at 1e-6."""
    split = [re.findall(r"\w+", one.lower()) for one in keys]
    mean = sum(map(len, split)) / len(split)
    words, total = re.findall(r"\w+", key.lower()), 0.0
    for word in set(re.findall(r"\w+", query.lower())):
        holding = sum(word in one for one in split)
        rarity = max(math.log((len(keys) - holding + 0.5) / (holding + 0.5)), 1e-6)
        count = words.count(word)
        total += rarity * count * 2.2 / (count + 1.2 * (0.25 + 0.75 * len(words) / mean))
    return total


QUERIES = ("red fox", "BLUE owl owl", "green", "zebra", "a")


def reads(memory: Memory, *, whole: bool = True) -> dict[str, Any]:
    """Everything that can be read, to be compared to the bit."""
    found: dict[str, Any] = {
        "length": len(memory),
        "items": memory.items(),
        "quarantined": memory.items(state="quarantined"),
        "state": memory.state,
        "kinds": {kind: memory.items(kind) for kind in ("entry", "case")},
        "words": {query: memory.search_words(query, 3) for query in QUERIES},
        "meaning": {query: memory.search(query, 3) for query in QUERIES},
        "cases": {query: memory.search(query, 2, kind="case") for query in QUERIES},
    }
    if whole:
        certificate = memory.certify()
        assert certificate.counted == found["state"]
        assert certificate.returned == 0
        assert_whole(memory)
    return found


def assert_whole(memory: Memory) -> None:
    """Neither orphans nor ghosts: each vector is one item's, and the index knows active items."""
    with sqlite3.connect(memory.folder / "memory.db") as database:
        slots = [slot for (slot,) in database.execute("SELECT slot FROM items WHERE slot >= 0")]
        active = {seq for (seq,) in database.execute("SELECT seq FROM items WHERE slot >= 0")}
        indexed = {seq for (seq,) in database.execute("SELECT rowid FROM words")}
        ids = {seq for (seq,) in database.execute("SELECT seq FROM items")}
        ends = {end for row in database.execute("SELECT child, parent FROM derived") for end in row}
        left = database.execute("SELECT (SELECT count(*) FROM intents) + (SELECT count(*) FROM "
                                "intended)").fetchone()[0]  # fmt: skip
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    database.close()
    path = memory.folder / "vectors.f32"
    size = path.stat().st_size if path.exists() else 0
    assert sorted(slots) == list(range(len(slots)))
    assert size == 4 * 26 * len(slots)
    assert indexed == active
    assert ends <= ids
    assert left == 0
    rows = np.fromfile(path, dtype="<f4").reshape(-1, 26) if size else np.zeros((0, 26))
    places = dict(_slots(memory.folder))
    for item in memory.items():
        np.testing.assert_allclose(rows[places[item.id]], unit(item.found_by), atol=1e-6)


def _slots(folder: Path) -> list[tuple[str, int]]:
    with sqlite3.connect(folder / "memory.db") as database:
        found = database.execute("SELECT id, slot FROM items WHERE slot >= 0").fetchall()
    database.close()
    return found


def folded(text: str) -> str:
    return " ".join(text.casefold().split())


def closed(items: Sequence[Item], ids: set[str]) -> tuple[set[str], set[str]]:
    """Ids that go themselves, and ids of what was made from them, by going round until it ends."""

    def twins(chosen: set[str], roots: set[str]) -> set[str]:
        there = [one for one in items if one.id in chosen]
        forms = {folded(one.text) for one in there}
        forms |= {folded(one.found_by) for one in there if one.id in roots}
        return {one.id for one in items if {folded(one.text), folded(one.found_by)} & forms}

    roots = set(ids)
    while (more := roots | twins(roots, roots)) != roots:
        roots = more
    every = set(roots)
    while True:
        more = every | twins(every, roots) | {one.id for one in items if set(one.parents) & every}
        if more == every:
            return roots, every - roots
        every = more


class Died(BaseException):
    """The process is gone; nobody may catch this."""


@contextmanager
def dying(monkeypatch_target: Any, at: int, how: Callable[[], None] | None = None) -> Iterator[Any]:
    """Dies at the given step; ``reached`` counts them."""
    counted: dict[str, Any] = {"steps": 0, "names": []}

    def reached(step: str) -> None:
        counted["names"].append(step)
        counted["steps"] += 1
        if counted["steps"] == at:
            if how is not None:
                how()
            raise Died(step)

    before, monkeypatch_target.reached = monkeypatch_target.reached, reached
    try:
        yield counted
    finally:
        monkeypatch_target.reached = before


def killed(work: Callable[[], None], at: int) -> bool:
    """Does the work in a child that is gone, without a goodbye, at the given step.

    Returns:
        Whether it died; False: it had fewer steps.
    """
    child = os.fork()
    if child == 0:
        try:
            with dying(steps, at, lambda: os._exit(9)):
                work()
        except BaseException:
            os._exit(3)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9), code
    return code == 9
