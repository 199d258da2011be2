"""What the battery found: a row per method, a column per family of attacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from delible.audit.leaks import PLAIN, WITHOUT_PART
from delible.measure.benchmark import Findings

REFERENCE = "reference"
Cell = Mapping[str, Any]


def lowest(leak: Mapping[str, Any]) -> tuple[float, str] | None:
    """The lowest e of a row of a matrix, and its measure; None where it has no power."""
    found = [(value, measure) for measure, value in leak["erased"].items() if value is not None]
    return min(found, default=None)


def weakest(leaks: Sequence[Mapping[str, Any]]) -> tuple[float, str, str] | None:
    """The lowest e of several rows, the row's name and the measure."""
    found = [(low[0], leak["name"], low[1]) for leak in leaks if (low := lowest(leak)) is not None]
    return min(found, default=None)


def family_of(leak: Mapping[str, Any]) -> str:
    """The column of an attack."""
    if leak["attack"] == WITHOUT_PART:
        return "part taken away"
    return leak["family"] or leak["attack"]


def findings(found: Mapping[str, Sequence[Cell]]) -> Findings:
    """The table over methods (means over seeds), its rows by attack, and what they say."""
    done = {name: [one for one in cells if "failed" not in one] for name, cells in found.items()}
    families = list(
        dict.fromkeys(
            family_of(leak)
            for cells in done.values()
            for cell in cells
            for leak in cell["leaks"]
            if leak["attack"] != PLAIN and leak["weighs"]
        )
    )
    rows = [_row(name, cells, families) for name, cells in done.items() if cells]
    notes = [
        f"{name}: {cell['failed']}"
        for name, cells in found.items()
        for cell in cells
        if "failed" in cell
    ]
    for name, cells in done.items():
        notes += [f"{name}: {cell['verdict']}. {cell['cheapest'] or ''}".strip() for cell in cells]
    return Findings(
        rows, notes=notes, runs=_runs(done), shaded=("asked plainly", *families)
    )  # fmt: skip


def _row(name: str, cells: Sequence[Cell], families: Sequence[str]) -> dict[str, Any]:
    def mean(values: Sequence[float | None]) -> float | None:
        there = [value for value in values if value is not None]
        return sum(there) / len(there) if there else None

    plain = [one[0] if (one := lowest(cell["leaks"][0])) else None for cell in cells]
    row: dict[str, Any] = {
        "method": name,
        "verdict": ", ".join(dict.fromkeys(str(cell["verdict"]) for cell in cells)),
        "kept, worst part": mean([cell["kept"] for cell in cells]),
        "asked plainly": mean(plain),
    }
    for family in families:
        row[family] = mean(
            [
                least[0] if (least := weakest(_of(cell, family))) is not None else None
                for cell in cells
            ]
        )
    low = min((w for cell in cells if (w := weakest(_attacks(cell))) is not None), default=None)
    row["weakest side"] = None if low is None else f"{low[1]} ({low[2].replace('_', ' ')})"
    row["minutes"] = mean([cell["seconds"] / 60 for cell in cells])
    return row


def _attacks(cell: Cell) -> list[Mapping[str, Any]]:
    return [leak for leak in cell["leaks"] if leak["attack"] != PLAIN and leak["weighs"]]


def _of(cell: Cell, family: str) -> list[Mapping[str, Any]]:
    return [leak for leak in _attacks(cell) if family_of(leak) == family]


def _runs(done: Mapping[str, Sequence[Cell]]) -> list[dict[str, Any]]:
    """One mapping per method, seed and attack."""
    runs = []
    for name, cells in done.items():
        for seed, cell in enumerate(cells):
            for leak in cell["leaks"]:
                low = lowest(leak)
                measure = low[1] if low is not None else None
                interval = leak["intervals"].get(measure, (None, None)) if measure else (None, None)
                runs.append(
                    {
                        "method": name, "seed": seed, "attack": leak["attack"],
                        "variant": leak["variant"], "family": family_of(leak),
                        "erased": low[0] if low is not None else None, "measure": measure,
                        "low": interval[0], "high": interval[1],
                        "e": leak["erased"], "known": leak["knowledge"],
                        "numbers": leak["numbers"], "control": leak["control"],
                        "weighs": leak["weighs"], "seconds": leak["cost_seconds"],
                        "questions": leak["cost_queries"], "steps": leak["cost_steps"],
                        "note": leak["note"],
                    }
                )  # fmt: skip
    return runs


__all__ = ["REFERENCE", "findings", "lowest", "weakest"]
