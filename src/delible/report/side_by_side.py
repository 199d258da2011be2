"""Runs side by side: what each knows about a subject, under an attack, by one measure.

From the rows of each run's ``items.parquet``. Runs that were audited before rows named their
subject are compared on all of them together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from delible.audit.result import SystemRole
from delible.errors import RunError
from delible.report.reading import ROLES

FILE = "items.parquet"
FORGET = "forget"


@dataclass(frozen=True)
class Row:
    """One value of one forget record."""

    system: SystemRole
    attack: str
    variant: str
    metric: str
    subject: str | None
    value: float

    @property
    def way(self) -> tuple[str, str]:
        """The attack and its setting."""
        return self.attack, self.variant


@dataclass(frozen=True)
class Choices:
    """What can be chosen, each in the order in which it is met."""

    subjects: Sequence[str]
    attacks: Sequence[str]
    metrics: Sequence[str]


@dataclass
class Cell:
    """Means over the records of one run under one attack.

    Attributes:
        means: By system; those that have no value are left out.
        records: Values of the unlearned system.
    """

    means: dict[SystemRole, float] = field(default_factory=dict)
    records: int = 0


def read_rows(folder: Path) -> list[Row]:
    """The forget rows of a run's audit that have a value; none if it was not audited.

    Raises:
        RunError: The file is damaged.
    """
    from pyarrow import ArrowException, parquet

    path = folder / FILE
    if not path.exists():
        return []
    try:
        found: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    except (OSError, ArrowException) as error:
        raise RunError(
            "it cannot be read.", where=str(path), hint=f"Run 'delible audit {folder}' again."
        ) from error
    return [
        Row(
            one["system"], one["attack"], one["variant"], one["metric"], one.get("subject"),
            one["value"],
        )
        for one in found
        if one["split"] == FORGET and one["value"] is not None
    ]  # fmt: skip


def choices(runs: Sequence[Sequence[Row]]) -> Choices:
    """What rows can be filtered by."""
    rows = [row for run in runs for row in run]
    return Choices(
        sorted({row.subject for row in rows if row.subject is not None}),
        list(dict.fromkeys(row.attack for row in rows)),
        list(dict.fromkeys(row.metric for row in rows)),
    )


def compared(
    runs: Sequence[Sequence[Row]], metric: str, subject: str | None, attack: str | None
) -> list[tuple[tuple[str, str], list[Cell]]]:
    """Means of one measure: by attack and setting, a cell for each run.

    Args:
        subject: Only rows about it; None: all rows.
        attack: Only this one; None: all of them.
    """
    chosen = [
        [
            row
            for row in run
            if row.metric == metric
            and subject in (None, row.subject)
            and attack in (None, row.attack)
        ]
        for run in runs
    ]
    ways = list(dict.fromkeys(row.way for run in chosen for row in run))
    return [(way, [_cell(run, way) for run in chosen]) for way in ways]


def _cell(rows: Sequence[Row], way: tuple[str, str]) -> Cell:
    values: dict[SystemRole, list[float]] = {role: [] for role in ROLES}
    for row in rows:
        if row.way == way:
            values[row.system].append(row.value)
    means = {role: fmean(found) for role, found in values.items() if found}
    return Cell(means, len(values["unlearned"]))
