"""How much cheaper VILA's map of importance is than FILA's: seconds and bytes, in one process.

Both see the same forget and retain rows as often as their options say, on one model, in turn. The
bytes are those of what is kept until the map is there: squared gradients of all linear layers on
one side; small factors, their moments and variances on the other. What a pass takes besides (all
inputs of linear layers) is the same for both.

Run: python performance/importance.py [--model default] [--rows 16] [--epochs 10]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass

from common import data

from delible.component import build
from delible.lm.lm import LM
from delible.methods.place.fila import Squares, squares
from delible.methods.place.vila import Probes, measured
from delible.train.gradient_space import linear_layers
from delible.train.gradients import Gradients
from delible.train.importance import ImportanceStart
from delible.train.randomness import generator
from delible.train.row import Row
from delible.train.rows import make_rows
from delible.train.slots import SlotContext

#: What the map of VILA may cost, of FILA's.
TIME, MEMORY = 1 / 3, 0.05


@dataclass(frozen=True)
class Cost:
    """Seconds until both maps are there, and bytes that are kept for them."""

    seconds: float
    bytes: int


def importance_costs(lm: LM, rows: int, epochs: int) -> dict[str, Cost]:
    """Costs of both maps, by name."""
    forget, retain = data(rows)
    parts = {"forget": make_rows(lm.template, forget), "retain": make_rows(lm.template, retain)}
    context = SlotContext(
        lm, parts, {"forget": forget, "retain": retain}, Gradients(lm), build("objective", "ihl"),
        None, 0,
    )  # fmt: skip
    return {
        "fila": fila_cost(build("place", {"name": "fila", "importance_epochs": epochs}), context),
        "vila": vila_cost(build("place", {"name": "vila", "importance_epochs": epochs}), context),
    }


def fila_cost(place: ImportanceStart, context: SlotContext) -> Cost:
    began, layers = time.perf_counter(), linear_layers(context.lm)
    maps = Squares(), Squares()
    for epoch in range(place.importance_epochs):
        for rows, found in zip(place.rows_of(context, epoch), maps, strict=True):
            squares(context.lm, layers, rows, place.importance_batch_size, found)
    kept = sum(one.nbytes for found in maps for one in found.sums.values())
    return Cost(time.perf_counter() - began, kept)


def vila_cost(place: ImportanceStart, context: SlotContext) -> Cost:
    began, layers = time.perf_counter(), linear_layers(context.lm)
    probes = Probes(layers, place.rank, 0.05, place.alpha / place.rank, context.seed)
    of_factors = sum(one.nbytes for pair in probes.factors.values() for one in pair)
    random = generator(0, "measured")
    parts: Sequence[list[Row]] = place.rows_of(context, 0)
    for rows in parts:
        measured(
            context.lm,
            layers,
            rows,
            probes,
            place.importance_batch_size,
            place.importance_epochs,
            random,
        )
    # at most: factors, variances of forget rows, means and squares of retain rows
    return Cost(time.perf_counter() - began, 4 * of_factors)


def table(found: dict[str, Cost]) -> str:
    fila, vila = found["fila"], found["vila"]
    return "\n".join((
        "| what | FILA | VILA | ratio | goal |",
        "|---|---|---|---|---|",
        f"| seconds of the map | {fila.seconds:.1f} | {vila.seconds:.1f} | "
        f"**{vila.seconds / fila.seconds:.2f}** | <= {TIME:.2f} |",
        f"| MiB of the map | {fila.bytes / 2**20:.0f} | {vila.bytes / 2**20:.1f} | "
        f"**{vila.bytes / fila.bytes:.3f}** | <= {MEMORY:.2f} |",
    ))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("--model", default="default")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=10)
    given = parser.parse_args()
    lm = LM.load(given.model, precision="float32")
    print(table(importance_costs(lm, given.rows, given.epochs)))


if __name__ == "__main__":
    main()
