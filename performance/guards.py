"""What a guard costs that goes by 10, and by 100,000 targets: time per prompt, loading, memory.

One run measures both, in turn, on the same questions that name no target, with the file of targets
read as a gateway reads it, and the real sentence encoder. The least that detection can cost is what
it costs to read and encode a text, which no number of targets changes; the rest is to stay below a
fifth of that. The index is measured alone, too: on general questions, on questions that are as like
to the targets' as can be without being about them (the worst case: few can be left out by their
bits), and compared whole, as before there were bits.

Run: python performance/guards.py [--targets 100000] [--prompts 300]     (some three minutes)
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from pathlib import Path
from random import Random

import numpy as np
import psutil

from delible.guards.target_detector import TargetDetector, TargetDetectorMind
from delible.lm.encoder import sentence_encoder
from delible.records import QA
from delible.system.asks import Prompt
from delible.systems.judging import Reading, settle_all
from delible.systems.targets import Target, Targets, read_targets, write_targets
from delible.world import general

FEW = 10
ROUNDS = 5


def names(count: int) -> list[str]:
    draw = Random(0)
    parts = ["ka", "ro", "min", "tes", "vul", "ori", "dan", "pel", "shu", "gra", "lio", "ben"]
    words = sorted({"".join(draw.choices(parts, k=draw.randint(3, 5))) for _ in range(3000)})
    found: dict[str, None] = {}
    while len(found) < count:
        found[f"{draw.choice(words)} {draw.choice(words)}".title()] = None
    return list(found)


def about(name: str, place: int) -> str:
    """A question about somebody; there are twelve kinds."""
    asked = (
        "Where was {} born?", "What is {} known for?", "Which school did {} go to?",
        "Who is {} married to?", "What did {} write in the year of the flood?",
        "Which prize was {} given for the second novel?", "How many children does {} have?",
        "What is the name of the dog of {}?", "In which town does {} live now?",
        "Which languages does {} speak at home?", "What did the father of {} do for a living?",
        "Why did {} leave the company after only two years?",
    )  # fmt: skip
    return asked[place % len(asked)].format(name)


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
                    records=(QA(question=about(name, place), answer="There"),),
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
    mind = TargetDetector().prepare(request)
    made = time.perf_counter() - start
    start = time.perf_counter()
    again = TargetDetector().prepare(request)  # a file that is read again
    reloaded = time.perf_counter() - start
    del targets, request, again
    took = (
        f"read {read:.1f} s, made ready {made:.1f} s, made again {reloaded:.1f} s, "
        f"{resident() - before:.0f} MiB, threshold {mind.threshold:.3f}"
    )
    return mind, took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", type=int, default=100_000)
    parser.add_argument("--prompts", type=int, default=60)
    options = parser.parse_args()
    encoder = sentence_encoder()
    encoder.encode(["Loaded."])
    texts = [f"{one.question} {one.answer}" for one in general()]
    prompts = [Prompt.ask(texts[place % len(texts)]) for place in range(options.prompts)]
    words = sum(len(prompt.messages[0].text.split()) for prompt in prompts)
    with tempfile.TemporaryDirectory() as folder:
        minds = {}
        for count in (FEW, options.targets):
            minds[count], took = prepared(count, Path(folder))
            print(f"{count:>7} targets: {took}", flush=True)
    strangers = [
        about(name, place) for place, name in enumerate(("Ada Brook", "Jon Lindqvist", "Mei Tan"))
    ]
    asked = {
        "general": np.asarray(encoder.encode(texts[:20])),
        "alike": np.asarray(encoder.encode([s for s in strangers for _ in range(4)])),
    }
    table: dict[str, dict[int, list[float]]] = {}
    for _ in range(ROUNDS):
        for count, mind in minds.items():
            likeness = mind.likeness
            assert likeness is not None

            def took_of(name: str, start: float, per: float, count: int = count) -> None:
                spent = (time.perf_counter() - start) / per
                table.setdefault(name, {}).setdefault(count, []).append(spent)

            start = time.perf_counter()
            assert not any(mind.names.occur(prompt.messages[0].text) for prompt in prompts)
            took_of("names, µs a word", start, words / 1e6)
            start = time.perf_counter()
            for prompt in prompts:
                mind.before(prompt)
            took_of("detection, ms a prompt", start, len(prompts) / 1e3)
            for kind, vectors in asked.items():
                start = time.perf_counter()
                for vector in vectors:
                    likeness.reach(vector[None], mind.threshold)
                took_of(f"index, ms a text ({kind})", start, len(vectors) / 1e3)
            start = time.perf_counter()
            for vector in asked["general"]:
                likeness.closest_to(vector[None])
            took_of("compared whole, ms a text", start, len(asked["general"]) / 1e3)
            start = time.perf_counter()
            held = spoken = 0
            reading = Reading(mind, Prompt.ask("Go on."))
            for text in texts:
                for word in text.split():
                    spoken += len(word) + 1
                    settle_all([lambda w=word, r=reading: r.read(f"{w} ")])
                    held += spoken - reading.free
            took_of("stream, µs a word", start, sum(len(x.split()) for x in texts) / 1e6)
            table.setdefault("held back, letters (mean)", {})[count] = [
                held / sum(len(x.split()) for x in texts)
            ]
    for name, found in table.items():
        few, many = (statistics.median(found[count]) for count in (FEW, options.targets))
        ratio = f"{many / few:.2f}" if few else "-"
        print(f"{name:<32} {few:10.3f} {many:10.3f}   ratio {ratio}")
    likeness = minds[options.targets].likeness
    assert likeness is not None
    found, missed = recall(likeness.vectors, minds[options.targets])
    print(f"of {found:,} vectors just at the threshold, {missed} were overlooked")


def recall(rows: np.ndarray, mind: TargetDetectorMind, count: int = 5000) -> tuple[int, int]:
    """Vectors whose cosine to a row is just the threshold, and how many are overlooked."""
    draw = np.random.default_rng(1)
    chosen = rows[draw.integers(0, len(rows), count)].astype(np.float64)
    other = draw.standard_normal(chosen.shape)
    other -= (other * chosen).sum(axis=1, keepdims=True) * chosen
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    cosine = min(0.9999, mind.threshold + 1e-4)
    near = (cosine * chosen + np.sqrt(1 - cosine**2) * other).astype(np.float32)
    assert mind.likeness is not None
    return count, int((~mind.likeness.reach(near, mind.threshold)).sum())


if __name__ == "__main__":
    main()
