"""What a guard costs that goes by 10, and by 100,000 targets: time per prompt, loading, memory.

One run measures both, in turn, on the same prose that names no target, with the file of targets
read as a gateway reads it. Vectors are random ones in place of a sentence encoder's, whose own
time does not depend on the targets and is not in the numbers.

Run: python performance/guards.py [--targets 100000] [--prompts 300]
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
import numpy.typing as npt
import psutil

from delible.guards.target_detector import TargetDetector, TargetDetectorMind
from delible.records import QA
from delible.system.asks import Prompt
from delible.systems.judging import Reading, settle_all
from delible.systems.targets import Target, Targets, read_targets, write_targets
from delible.world import general

FEW = 10


class RandomEncoder:
    """A unit vector per text."""

    identity = "random"

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        found = np.empty((len(texts), 384), dtype=np.float32)
        for row, text in enumerate(texts):
            found[row] = np.random.default_rng(zlib.crc32(text.encode())).standard_normal(384)
        return found / np.linalg.norm(found, axis=1, keepdims=True)


def names(count: int) -> list[str]:
    draw = Random(0)
    parts = ["ka", "ro", "min", "tes", "vul", "ori", "dan", "pel", "shu", "gra", "lio", "ben"]
    words = sorted({"".join(draw.choices(parts, k=draw.randint(3, 5))) for _ in range(3000)})
    found: dict[str, None] = {}
    while len(found) < count:
        found[f"{draw.choice(words)} {draw.choice(words)}".title()] = None
    return list(found)


def resident() -> float:
    gc.collect()
    return float(psutil.Process().memory_info().rss / 2**20)


def prepared(count: int, folder: Path) -> tuple[TargetDetectorMind, str]:
    """A guard by a file of so many targets, and what it took to have it."""
    path = folder / f"{count}.jsonl"
    write_targets(
        Targets(
            targets=tuple(
                Target(
                    id=f"t-{place}",
                    names=(name,),
                    records=(QA(question=f"Where was {name} born?", answer="There"),),
                )
                for place, name in enumerate(names(count))
            )
        ),
        path,
    )
    before, start = resident(), time.perf_counter()
    targets = read_targets(path)
    read = time.perf_counter() - start
    request = targets.request()
    start = time.perf_counter()
    mind = TargetDetector(threshold=0.9).prepare(request, encoder=RandomEncoder())
    made = time.perf_counter() - start
    del targets, request
    took = f"read {read:.2f} s, made ready {made:.2f} s, {resident() - before:.0f} MiB"
    return mind, took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", type=int, default=100_000)
    parser.add_argument("--prompts", type=int, default=300)
    options = parser.parse_args()
    texts = [f"{one.question} {one.answer}" for one in general()]
    prompts = [Prompt.ask(texts[place % len(texts)]) for place in range(options.prompts)]
    words = sum(len(prompt.messages[0].text.split()) for prompt in prompts)
    with tempfile.TemporaryDirectory() as folder:
        minds = {}
        for count in (FEW, options.targets):
            minds[count], took = prepared(count, Path(folder))
            print(f"{count:>7} targets: {took}")
    table: dict[str, dict[int, list[float]]] = {}
    for _ in range(3):
        for count, mind in minds.items():
            likeness = mind.likeness
            assert likeness is not None
            vectors = likeness.encoder.encode(texts)

            def took_of(name: str, start: float, per: float, count: int = count) -> None:
                spent = (time.perf_counter() - start) / per
                table.setdefault(name, {}).setdefault(count, []).append(spent)

            start = time.perf_counter()
            assert not any(mind.names.occur(prompt.messages[0].text) for prompt in prompts)
            took_of("names, µs a word", start, words / 1e6)
            start = time.perf_counter()
            for vector in vectors[:20]:
                likeness.closest_to(vector[None])
            took_of("index, ms a text", start, 20 / 1e3)
            start = time.perf_counter()
            held = spoken = 0
            reading = Reading(mind, Prompt.ask("Go on."))
            for text in texts * 5:
                for word in text.split():
                    spoken += len(word) + 1
                    settle_all([lambda w=word, r=reading: r.read(f"{w} ")])
                    held += spoken - reading.free
            took_of("stream, µs a word", start, 5 * sum(len(x.split()) for x in texts) / 1e6)
            table.setdefault("held back, letters (mean)", {})[count] = [
                held / (5 * sum(len(x.split()) for x in texts))
            ]
    for name, found in table.items():
        few, many = (statistics.median(found[count]) for count in (FEW, options.targets))
        ratio = f"{many / few:.2f}" if few else "-"
        print(f"{name:<28} {few:10.2f} {many:10.2f}   ratio {ratio}")


if __name__ == "__main__":
    main()
