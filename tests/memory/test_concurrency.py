"""Readers and writers at once: what is deleted is read by nobody, and nothing is torn."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from memory_by_hand import Letters, killed, reads, unit

from delible.memory import Item, Memory

ITEMS = 24


def text(place: int) -> str:
    return f"{'abcdefghijklmnopqrstuvwxyz'[place] * 3} fox {place}"


def filled(folder: Path) -> Memory:
    memory = Memory(folder, Letters())
    memory.add([Item(id=f"i{n}", text=text(n)) for n in range(ITEMS)])
    memory.add([Item(id=f"s{n}", text=f"of {text(n)}", parents=(f"i{n}",)) for n in range(ITEMS)])
    return memory


def look(memory: Memory, done: Any, wrong: list[str], counted: list[int]) -> None:
    """Reads until it is told to stop; whatever was gone before a read began must not be in it."""
    gone: set[str] = set()
    try:
        while not done.is_set():
            before = set(gone)
            listed = {one.id for one in memory.items()}
            meant, found = memory.search("fox", ITEMS), memory.search_words("fox", ITEMS)
            for one in meant:
                expected = float(unit("fox").astype(np.float64) @ unit(one.item.found_by))
                if abs(one.score - expected) > 1e-5:
                    wrong.append(f"{one.item.id} has another's vector")
            found += meant
            for id_ in {one.item.id for one in found} | listed:
                if id_ in before:
                    wrong.append(f"{id_} came back")
            for id_ in listed:
                if id_.startswith("s") and f"i{id_[1:]}" not in listed:
                    wrong.append(f"{id_} without its parent")
            gone |= {f"i{n}" for n in range(ITEMS)} - listed
            counted[0] += 1
    except Exception as error:
        wrong.append(repr(error))


def test_threads_read_while_one_deletes(tmp_path: Path) -> None:
    memory, done, wrong = filled(tmp_path), threading.Event(), list[str]()
    counted = [[0] for _ in range(3)]
    readers = [threading.Thread(target=look, args=(memory, done, wrong, one)) for one in counted]
    for one in readers:
        one.start()
    for n in range(0, ITEMS, 2):
        memory.forget(ids=[f"i{n}"], scanned=n % 6 == 0)
    done.set()
    for one in readers:
        one.join()
    assert wrong == []
    assert all(one[0] > 0 for one in counted)
    assert {one.id for one in memory.items()} == {
        f"{letter}{n}" for n in range(1, ITEMS, 2) for letter in "is"
    }
    reads(memory)


def writer(folder: str, mine: int) -> None:
    memory = Memory(folder, Letters())
    for n in range(8):
        memory.add([Item(id=f"w{mine}.{n}", text=f"{text(mine)} {text(n)}"), Item(
            id=f"d{mine}.{n}", text=f"from {text(mine)} {text(n)}", parents=(f"w{mine}.{n}",)
        )])  # fmt: skip
        if n % 2:
            memory.forget(ids=[f"w{mine}.{n}"], scanned=False)
    os._exit(0)


def test_processes_write_one_after_the_other(tmp_path: Path) -> None:
    memory, done, wrong, counted = Memory(tmp_path, Letters()), threading.Event(), [], [0]
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=writer, args=(str(tmp_path), n)) for n in range(3)]
    for child in children:
        child.start()
    reader = threading.Thread(target=look, args=(memory, done, wrong, counted))
    reader.start()
    for child in children:
        child.join(60)
    done.set()
    reader.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert wrong == []
    assert {one.id for one in memory.items()} == {
        f"{letter}{mine}.{n}" for mine in range(3) for n in range(0, 8, 2) for letter in "wd"
    }
    reads(memory)


def test_readers_wait_for_whoever_mends(tmp_path: Path) -> None:
    """An intent that a killed process left is carried out before anybody reads."""
    memory = filled(tmp_path)
    for at in range(1, 40):
        n = at % ITEMS
        if f"i{n}" not in {one.id for one in memory.items()}:
            continue
        killed(lambda n=n: memory.forget(ids=[f"i{n}"], scanned=False), at % 13 + 1)
        start = time.monotonic()
        left = {one.id for one in memory.items()}
        assert time.monotonic() - start < 30
        assert (f"i{n}" in left) == (f"s{n}" in left)
        reads(memory)
