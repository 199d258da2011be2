"""What a memory of 100,000 items costs: exact search, a deletion with its closure, its scan.

One run measures all of it, with vectors that are drawn. A search is compared with what NumPy takes
for the same products in memory, and what is found before and after deletions with a memory that is
made of what is left: item by item, to the bit.

Run: python performance/memory.py [--items 100000] [--width 384]     (some two minutes)
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import numpy as np

from delible.memory import Item, Memory

ROUNDS = 5


class Drawn:
    """Vectors that depend on the text alone."""

    def __init__(self, width: int) -> None:
        self.width, self.identity = width, f"drawn-{width}"

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        rows = np.empty((len(texts), self.width), dtype=np.float32)
        for place, text in enumerate(texts):
            seed = int.from_bytes(text.encode()[-8:], "big")
            rows[place] = np.random.Generator(np.random.SFC64(seed)).normal(size=self.width)
        return rows


def items(count: int) -> list[Item]:
    """Every hundredth item is made from the two before it."""
    draw = Random(0)
    parts = ["ka", "ro", "min", "tes", "vul", "ori", "dan", "pel", "shu", "gra", "lio", "ben"]
    words = sorted({"".join(draw.choices(parts, k=draw.randint(2, 4))) for _ in range(20_000)})
    return [
        Item(
            id=f"item-{n:06}",
            text=" ".join([*draw.choices(words, k=14), f"{n:08}"]),
            parents=(f"item-{n - 1:06}", f"item-{n - 2:06}") if n % 100 == 99 else (),
        )
        for n in range(count)
    ]


def took(work: Callable[[], object], clock: Callable[[], float] = time.process_time) -> float:
    """Seconds of CPU time: others may use the same cores."""
    start = clock()
    work()
    return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=384)
    options = parser.parse_args()
    everything, encoder = items(options.items), Drawn(options.width)
    asked = [one.text for one in everything[5 :: max(1, options.items // 20)]]
    with tempfile.TemporaryDirectory() as home:
        memory = Memory(Path(home) / "memory", encoder)
        seconds = took(lambda: memory.add(everything))
        print(f"{len(everything):,} items of {options.width} numbers; seconds of CPU time:")
        print(f"added in {seconds:.1f} s")
        rows = np.fromfile(memory.folder / "vectors.f32", dtype=np.float32)
        rows = rows.reshape(-1, options.width)
        query = rows[7].copy()
        plain, meant, worded = [], [], []
        for _ in range(ROUNDS):
            plain.append(took(lambda: np.argpartition(-(rows @ query), 8)[:8]))
            meant += [took(lambda text=text: memory.search(text)) for text in asked]
            worded += [took(lambda text=text: memory.search_words(text)) for text in asked]
        base = statistics.median(plain)
        print(f"NumPy alone, top 8 of all products: {1e3 * base:.1f} ms")
        for name, some in (("meaning", meant), ("words", worded)):
            middle = statistics.median(some)
            print(f"search by {name}: {1e3 * middle:.1f} ms ({middle / base:.2f} of NumPy alone)")
        deleted, scanned = [], []
        for n in range(ROUNDS):
            alone, too = (f"item-{100 * (7 * n + at) + 98:06}" for at in (0, 3))
            deleted.append(took(
                lambda alone=alone: memory.forget(ids=[alone], scanned=False), time.perf_counter
            ))  # fmt: skip
            start = time.process_time()
            certificate = memory.certificate(memory.forget(ids=[too]))
            scanned.append(time.process_time() - start)
            assert certificate.verdict == "nothing found", certificate
        print(f"deletion with closure: {max(deleted):.2f} s at most of {ROUNDS}, disk included")
        print(
            f"the same with every file scanned before and afterwards: {max(scanned):.2f} s at most"
        )
        left = {one.id for one in memory.items()}
        later = statistics.median([took(lambda text=text: memory.search(text)) for text in asked])
        gone = len(everything) - len(left)
        print(f"{gone} items gone; search by meaning now: {1e3 * later:.1f} ms")
        fresh = Path(home) / "fresh"
        fresh.mkdir()
        shutil.copy(memory.folder / "key", fresh / "key")
        never = Memory(fresh, encoder)
        never.add([one for one in everything if one.id in left])
        same = all(
            memory.search(text) == never.search(text)
            and memory.search_words(text) == never.search_words(text)
            for text in asked
        )
        print(f"as a memory that never had them: {same and memory.state == never.state}")


if __name__ == "__main__":
    main()
