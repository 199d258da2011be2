"""The table of a benchmark: mean and interval of every column, by method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from delible.files import atomic_file
from delible.measure.benchmark import Benchmark, Column

#: The two rows that every table has: the model before, and one that never knew.
ORIGINAL, REFERENCE = "original", "retrained reference"
#: Columns that every table has, besides the benchmark's own.
COST = (
    Column("seconds", "seconds", "lower"),
    Column("peak memory (GiB)", "peak_gib", "lower"),
)


@dataclass(frozen=True)
class Number:
    """A mean over runs (seeds and tasks).

    Attributes:
        mean: Over the runs that have a value; ``None`` if none has.
        low, high: 95 % t-interval of the mean; ``None`` with fewer than two runs.
        runs: Runs that have a value.
    """

    mean: float | None
    low: float | None = None
    high: float | None = None
    runs: int = 0


@dataclass(frozen=True)
class TableRow:
    """One method. ``failed`` is why a run of it did not end, if one did not."""

    method: str
    numbers: Mapping[str, Number]
    failed: str | None = None


@dataclass(frozen=True)
class Table:
    """Columns and rows; ``rows[i].numbers[column.key]``."""

    columns: tuple[Column, ...]
    rows: tuple[TableRow, ...]


def mean_of_runs(values: Sequence[float | None]) -> Number:
    """Mean and 95 % t-interval over independent runs.

    Args:
        values: One per run; ``None`` where a run has no value.
    """
    valued = np.asarray([value for value in values if value is not None], np.float64)
    if valued.size == 0:
        return Number(None)
    mean = float(valued.mean())
    if valued.size < 2:
        return Number(mean, runs=1)
    width = float(stats.t.ppf(0.975, valued.size - 1) * valued.std(ddof=1)) / valued.size**0.5
    return Number(mean, mean - width, mean + width, int(valued.size))


def value_of(cell: Mapping[str, Any], key: str) -> float | None:
    """The number of a cell under a column's key."""
    if key == "seconds":
        seconds = cell.get("seconds")
        return None if seconds is None else float(seconds)
    if key == "peak_gib":
        peak = cell.get("peak_bytes")
        return None if peak is None else peak / 2**30
    value = cell["numbers"].get(key)
    return None if value is None else float(value)


def tabulate(benchmark: Benchmark, cells: Sequence[Mapping[str, Any]]) -> Table:
    """The table of finished cells; methods in the order they came."""
    attacked = sorted({
        key for cell in cells for key in cell["numbers"] if key.startswith("attack: ")
    })  # fmt: skip
    columns = (
        *benchmark.columns(),
        *(
            Column(_attack_title(key), key, "lower" if key.endswith("/recovered") else "reference")
            for key in attacked
        ),
        *COST,
    )
    methods = list(dict.fromkeys(str(cell["method"]) for cell in cells))
    rows = []
    for method in methods:
        mine = [cell for cell in cells if cell["method"] == method]
        numbers = {
            column.key: mean_of_runs([value_of(cell, column.key) for cell in mine])
            for column in columns
        }
        failed = next((str(cell["failed"]) for cell in mine if "failed" in cell), None)
        rows.append(TableRow(method, numbers, failed))
    return Table(columns, tuple(rows))


def _attack_title(key: str) -> str:
    attack, _, measure = key.removeprefix("attack: ").rpartition("/")
    return f"{measure.replace('_', ' ')} after {attack}"


def shown(number: Number, column: Column) -> str:
    """A number as text: mean, and half the interval's width where there is one."""
    if number.mean is None:
        return "–"
    scale = 100 if column.percent else 1
    digits = 1 if column.percent or column.key == "seconds" else 3
    text = f"{scale * number.mean:.{digits}f}"
    if number.low is not None:
        text += f" ± {scale * (number.mean - number.low):.{digits}f}"
    return text


def as_markdown(table: Table) -> str:
    """The table for a page of documentation."""
    head = ["method", *(column.title for column in table.columns)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in table.rows:
        if row.failed is not None and all(one.mean is None for one in row.numbers.values()):
            cells = [f"failed: {row.failed}", *[""] * (len(table.columns) - 1)]
        else:
            cells = [shown(row.numbers[column.key], column) for column in table.columns]
        lines.append("| " + " | ".join([row.method, *cells]) + " |")
    return "\n".join(lines) + "\n"


def write_parquet(path: Path, cells: Sequence[Mapping[str, Any]]) -> None:
    """One row per cell and number, and per record: ``record`` is null for a mean or summary."""
    import pyarrow as arrow
    from pyarrow import parquet

    schema = arrow.schema(
        [
            ("task", arrow.string()), ("method", arrow.string()), ("seed", arrow.int64()),
            ("key", arrow.string()), ("record", arrow.int64()), ("value", arrow.float64()),
            ("reason", arrow.string()), ("detail", arrow.string()),
        ]
    )  # fmt: skip
    rows: list[tuple[Any, ...]] = []
    for cell in cells:
        head = (cell["task"], cell["method"], cell["seed"])
        costs = {key: value_of(cell, key) for key in ("seconds", "peak_gib")}
        for key, value in {**cell["numbers"], **costs}.items():
            rows.append((*head, key, None, value, cell.get("failed"), None))
        for label, by_split in cell.get("values", {}).get("items", {}).items():
            for split, items in by_split.items():
                for place, (value, reason, detail, *_) in enumerate(items):
                    rows.append((*head, f"{label}/{split}", place, value, reason, detail))
    columns = list(zip(*rows, strict=True)) or [()] * len(schema)
    table = arrow.table(
        [
            arrow.array(list(column), field.type)
            for column, field in zip(columns, schema, strict=True)
        ],
        schema=schema,
    )
    with atomic_file(path, "wb") as handle:
        parquet.write_table(table, handle)
