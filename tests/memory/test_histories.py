"""After a deletion, every read is that of a memory which never had what was deleted."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from memory_by_hand import (
    QUERIES,
    Died,
    Letters,
    bm25,
    closed,
    cosine,
    dying,
    folded,
    killed,
    reads,
)

from delible.errors import DataError
from delible.memory import Item, Memory, steps

WORDS = st.sampled_from(["red", "Red", "blue", "green", "fox", "owl", "a", "the"])
TEXT = st.lists(WORDS, min_size=1, max_size=4).map(" ".join)
ADD = st.tuples(
    st.just("add"), TEXT, TEXT | st.just(""), st.sampled_from(["entry", "case"]),
    st.lists(st.integers(0, 9), max_size=2),
)  # fmt: skip
FORGET = st.tuples(
    st.just("forget"), st.lists(st.integers(0, 9), min_size=1, max_size=2),
    st.sampled_from(["delete", "quarantine", "rebuild"]),
)  # fmt: skip
#: How many steps an operation lives; most live to their end.
LIFE = st.sampled_from([0, 0, 0, *range(1, 16)])
HISTORY = st.lists(st.tuples(ADD | ADD | FORGET, LIFE), min_size=1, max_size=9)


def rebuilt(item: Item, parents: tuple[Item, ...]) -> Item | None:
    """What is left of its parents, or nothing."""
    if not parents:
        return None
    return item.model_copy(update={"text": f"{item.id} of {len(parents)}", "key": ""})


class Model:
    """What is left, as plain lists."""

    def __init__(self) -> None:
        self.items: list[Item] = []
        self.quarantined: list[Item] = []
        self.gone: set[str] = set()

    @property
    def all(self) -> list[Item]:
        return sorted([*self.items, *self.quarantined], key=lambda one: int(one.id[1:]))

    def forget(self, ids: set[str], policy: str) -> None:
        roots, rest = closed(self.all, ids)
        removed, new = set(roots), dict[str, Item]()
        if policy == "delete":
            removed |= rest
        for item in self.all:
            if item.id not in rest or policy == "delete":
                continue
            left = tuple(one for one in item.parents if one not in removed)
            if policy == "quarantine":
                new[item.id] = item.model_copy(update={"parents": left})
            elif (
                made := rebuilt(item, tuple(new.get(one, self.get(one)) for one in left))
            ) is None:
                removed.add(item.id)
            else:
                new[item.id] = made.model_copy(update={"parents": left})
                self.gone |= {folded(item.text)} - {folded(made.text)}
        for item in self.all:
            if item.id in removed:
                self.gone |= {folded(item.text)}
            if item.id in roots:
                self.gone |= {folded(item.found_by)}
        if policy == "quarantine":
            self.quarantined += [one for one in self.items if one.id in rest]
            self.items = [one for one in self.items if one.id not in rest]
        for some in (self.items, self.quarantined):
            some[:] = [new.get(one.id, one) for one in some if one.id not in removed]
        self.quarantined.sort(key=lambda one: int(one.id[1:]))

    def get(self, id_: str) -> Item:
        return next(one for one in self.all if one.id == id_)


def never_had_it(model: Model, folder: Path, key: bytes) -> Memory:
    """A memory to which only what is left was ever added."""
    folder.mkdir()
    (folder / "key").write_bytes(key)
    fresh = Memory(folder, Letters())
    fresh.add([one for one in model.all if one in model.items])
    return fresh


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(history=HISTORY)
def test_a_history_leaves_what_never_having_had_it_would(history: Sequence[Any]) -> None:
    home = Path(tempfile.mkdtemp())
    try:
        memory, model, number = Memory(home / "memory", Letters()), Model(), 0
        for operation, life in history:
            number += 1
            happen = _applied(operation, model, f"i{number}")
            if happen is None:
                continue
            work, after, refused = happen
            before = model
            if refused:
                with pytest.raises(DataError, match=r"deleted|rebuilt"):
                    work(memory)
                continue
            try:
                with dying(steps, life):
                    work(memory)
                model = after
            except Died:
                memory = Memory(home / "memory", Letters())
                happened = memory.items() == after.items
                assert happened or memory.items() == before.items
                model = after if happened else before
        assert memory.items() == model.items
        assert memory.items(state="quarantined") == model.quarantined
        mine = reads(memory)
        _check_by_hand(mine, model)
        if not model.quarantined:  # what is quarantined was there
            key = (home / "memory" / "key").read_bytes()
            theirs = reads(never_had_it(model, home / "fresh", key))
            assert mine == theirs
    finally:
        shutil.rmtree(home)


def _applied(operation: Any, model: Model, id_: str) -> Any:
    """What to do, the model afterwards, and whether it has to be refused; None: nothing to do."""
    after = Model()
    after.items, after.quarantined = list(model.items), list(model.quarantined)
    after.gone = set(model.gone)
    if operation[0] == "add":
        _, text, key, kind, picks = operation
        parents = {model.items[one % len(model.items)].id for one in picks if model.items}
        item = Item(id=id_, text=text, key=key, kind=kind, parents=tuple(parents))
        refused = bool({folded(item.text), folded(item.found_by)} & model.gone)
        if not refused:
            after.items.append(item)
        return lambda memory: memory.add([item]), after, refused
    _, picks, policy = operation
    if not model.all:
        return None
    ids = {model.all[one % len(model.all)].id for one in picks}
    after.forget(ids, policy)
    build = rebuilt if policy == "rebuild" else None
    gone = {t for t in map(folded, _removed(model, after)) if len(t) >= 8}
    changed = [one for one in after.all if one not in model.all]
    refused = policy == "rebuild" and any(
        text in folded(said) for one in changed for said in one.says() for text in gone
    )
    refused = refused or (policy == "rebuild" and any(
        folded(one.text) in model.gone for one in changed
    ))  # fmt: skip

    def work(memory: Memory) -> None:
        memory.forget(ids=ids, descendants=policy, rebuild=build, scanned=False)

    return work, after, refused


def _removed(before: Model, after: Model) -> list[str]:
    left = {one.id for one in after.all}
    gone = [one for one in before.all if one.id not in left]
    return [text for one in gone for text in (one.text, one.found_by)]


def _check_by_hand(mine: dict[str, Any], model: Model) -> None:
    keys = [one.found_by for one in model.items]
    for query in QUERIES:
        order = sorted(
            ((-cosine(query, one.found_by), place) for place, one in enumerate(model.items))
        )[:3]
        assert [(one.item, one.score) for one in mine["meaning"][query]] == [
            (model.items[place], -minus) for minus, place in order
        ]
        scores = {one.id: bm25(query, one.found_by, keys) for one in model.items}
        best = sorted((score for score in scores.values() if score > 0), reverse=True)[:3]
        assert [one.score for one in mine["words"][query]] == pytest.approx(best)
        for one in mine["words"][query]:
            assert one.score == pytest.approx(scores[one.item.id])


def start(folder: Path) -> None:
    Memory(folder, Letters()).add([
        Item(id="i1", text="red fox"), Item(id="i2", text="blue owl"),
        Item(id="i3", text="green green", parents=("i1", "i2")), Item(id="i4", text="a green owl"),
        Item(id="i5", text="the fox", kind="case", parents=("i3",)), Item(id="i6", text="RED  fox"),
    ])  # fmt: skip


def add(folder: Path) -> None:
    Memory(folder, Letters()).add(
        [Item(id="i7", text="owl"), Item(id="i8", text="red", parents=("i7", "i1"))]
    )


def forget(folder: Path, policy: Any) -> None:
    Memory(folder, Letters()).forget(
        ids=["i1"], descendants=policy, rebuild=rebuilt if policy == "rebuild" else None
    )


@pytest.mark.parametrize("work", ["add", "delete", "quarantine", "rebuild", "make"])
def test_a_killed_process_leaves_all_or_nothing(work: str, tmp_path: Path) -> None:
    """A real process dies at every step, and whoever comes next finds all of it or nothing."""

    def run(folder: Path) -> None:
        if work == "make":
            start(folder)
        elif work == "add":
            add(folder)
        else:
            forget(folder, work)

    first = tmp_path / "first"
    if work == "make":
        Memory(first, Letters())
        for leaf in first.iterdir():
            if leaf.name != "key":
                leaf.unlink()
    else:
        start(first)

    def copy(name: str) -> Path:
        shutil.copytree(first, tmp_path / name)
        return tmp_path / name

    before, after = copy("before"), copy("after")
    run(after)
    known = [reads(Memory(before, Letters())), reads(Memory(after, Letters()))]
    assert known[0] != known[1]
    outcomes = []
    for at in range(1, 1000):
        folder = copy(f"{at}")
        if not killed(lambda folder=folder: run(folder), at):
            break
        found = reads(Memory(folder, Letters()))
        outcomes.append(known.index(found))
        shutil.rmtree(folder)
    assert outcomes == sorted(outcomes)  # from some step on it has happened
    assert outcomes.count(0) >= 2
    assert work in ("make", "add") or outcomes.count(1) >= 5
