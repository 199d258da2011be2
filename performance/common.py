"""What the benchmarks share: rows, recipes, peak memory, and tables in pages."""

from __future__ import annotations

import resource
from pathlib import Path

import psutil

from delible.records import QA
from delible.train.recipe import Recipe
from delible.world import World

LEARNING_RATE = 1e-5
FORGET: list[QA] = []
RETAIN: list[QA] = []


def prepare(rows: int) -> None:
    """Fills the forget and retain rows."""
    FORGET[:], RETAIN[:] = data(rows)


def data(rows: int) -> tuple[list[QA], list[QA]]:
    """Forget and retain rows of mixed length from a world."""
    world = World(people=40, seed=0, answers="sentence")
    split = world.split(forget=4)
    forget, retain = split.records("forget")[:rows], list(split.records("retain")[: 4 * rows])
    for place, record in enumerate(forget):  # some methods pair forget rows with neighbours
        retain[place] = retain[place].model_copy(update={"neighbour_of": record.subject})
    return list(forget), retain  # type: ignore[arg-type]


def recipe(method: str, steps: int, rows: int) -> Recipe:
    options = {
        "learning_rate": LEARNING_RATE,
        "epochs": steps,
        "max_steps": steps,
        "batch_size": rows,
        "weight_decay": 0.0,
    }
    return Recipe.named(method).changed({}, {f"training.{k}": v for k, v in options.items()})


def forget_peak() -> float:
    """Starts the count of the peak anew (Linux); returns the resident memory now, in GiB."""
    references = Path("/proc/self/clear_refs")
    if references.exists():
        references.write_text("5")
    return float(psutil.Process().memory_info().rss / 2**30)


def peak_gib() -> float:
    """Peak resident memory of this process since it started, or since :func:`forget_peak`.

    Linux hands the parent's peak on to ``ru_maxrss`` of a new program, so its own is read.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30


def write_between(page: Path, name: str, text: str) -> None:
    """Replaces the measured table of that name in a page."""
    start, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    head, _, rest = page.read_text(encoding="utf-8").partition(start)
    page.write_text(f"{head}{start}\n{text}\n{end}{rest.partition(end)[2]}", encoding="utf-8")
