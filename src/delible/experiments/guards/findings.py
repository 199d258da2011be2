"""What came back: a row per guard, what it shows, and a chart of leaks by attack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from delible.measure.benchmark import Chart, Curve, Findings

NOBODY, NEVER = "no guard", "never learned"
Cell = dict[str, Any]


def share(values: Sequence[bool | float | None]) -> float | None:
    """Mean of the values there are; None without any."""
    known = [float(value) for value in values if value is not None]
    return sum(known) / len(known) if known else None


def worst(leaks: Mapping[str, Sequence[bool | None]]) -> float | None:
    """Share of records of which some way to ask brings the answer out."""
    return share([any(column) for column in zip(*leaks.values(), strict=True)])


def row_of(name: str, cell: Cell, attacks: Sequence[str], bare: Cell | None) -> dict[str, Any]:
    """A guard's row; every share in [0, 1].

    Args:
        bare: What came back without a guard; None if that failed.
    """
    leaks, kept = cell["leak"], cell["kept"]
    others, many = cell.get("others"), cell.get("many")
    base = bare or cell
    return {
        "guard": name,
        "leak, plain": share(leaks["plain"]),
        **{f"leak, {attack}": share(leaks[attack]) for attack in attacks},
        "leak, any": worst(leaks),
        "ROUGE forget": cell["rouge"]["forget"],
        "ROUGE kept": cell["rouge"]["kept"],
        "DS": cell["deviation"],
        "DDS": cell["dynamic deviation"],
        "DUS": cell["dynamic utility"],
        "refusal quality": cell["quality"],
        "flagged": share(cell["flagged"]),
        "false flags": added(kept["flagged"], base["kept"]["flagged"]),
        "kept told": share(kept["told"]),
        "kept unchanged": share(
            [mine == theirs for mine, theirs in
             zip(kept["texts"], base["kept"]["texts"], strict=True)]
        ),
        "PHTest refused": share(cell["phtest"]),
        "PHTest false": added(cell["phtest"], base["phtest"]),
        "calls, targets": cell["targets"]["calls"] if others else 1.0,
        "calls, others": others["calls"] if others else 1.0,
        "tokens, targets": cell["targets"]["tokens"] if others else None,
        "tokens, others": others["tokens"] if others else None,
        "seconds added": cell["seconds"]["added"] if others else 0.0,
        "calls, many targets": many["others"]["calls"] if many else None,
        "seconds added, many targets": many["seconds"]["added"] if many else None,
    }  # fmt: skip


def added(mine: Sequence[bool], base: Sequence[bool]) -> float | None:
    """Share of questions that are refused with the guard and not without."""
    return share([one and not other for one, other in zip(mine, base, strict=True)])


def turned(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row per measure and a column per guard: there are more measures than guards."""
    measures = [key for key in (rows[0] if rows else {}) if key != "guard"]
    return [
        {"measure": measure, **{row["guard"]: row[measure] for row in rows}} for measure in measures
    ]


def findings(found: Mapping[str, Cell], attacks: Sequence[str]) -> Findings:
    """Table, chart and notes.

    Args:
        found: What came back, by guard; ``failed`` with the reason where nothing did.
        attacks: In the order of their columns.
    """
    notes = [f"{name} failed: {cell['failed']}" for name, cell in found.items() if "failed" in cell]
    cells = {name: cell for name, cell in found.items() if "failed" not in cell}
    bare = cells.get(NOBODY)
    rows = [row_of(name, cell, attacks, bare) for name, cell in cells.items()]
    ways = ["plain", *attacks]
    curves = [
        Curve(row["guard"], [(float(at), row[f"leak, {way}"]) for at, way in enumerate(ways)
                             if row[f"leak, {way}"] is not None])
        for row in rows
    ]  # fmt: skip
    axis = ", ".join(f"{at} = {way}" for at, way in enumerate(ways))
    chart = Chart("What leaks, by the way of asking", axis, "share of forgotten answers", curves)
    for name, cell in cells.items():
        notes += _notes(name, cell)
    runs = [
        {**row, "records": _run(cell)} for row, cell in zip(rows, cells.values(), strict=True)
    ]  # fmt: skip
    return Findings(turned(rows), [chart] if rows else [], [*notes, *_compared(rows)], runs)


def _run(cell: Cell) -> dict[str, Any]:
    """The values of single records."""
    return {
        **{f"leak, {way}": values for way, values in cell["leak"].items()},
        "flagged": cell["flagged"], "kept told": cell["kept"]["told"],
        "kept flagged": cell["kept"]["flagged"], "PHTest": cell["phtest"],
        "examples": cell["examples"],
    }  # fmt: skip


def _notes(name: str, cell: Cell) -> list[str]:
    found = []
    if cell.get("taught"):
        found.append(f"{name} stands before the model after recipe '{cell['taught']}', which was "
                     "practised on kept people only.")  # fmt: skip
    if cell.get("itself"):
        parts = " and ".join(cell["itself"])
        found.append(f"{name}: the guarded model itself plays the {parts}.")
    for part, who in (cell.get("roles") or {}).items():
        found.append(f"{name}: the {part} is {who}.")
    found += [f"{name}: {attack} was not run: {why}"
              for attack, why in (cell.get("not_run") or {}).items()]  # fmt: skip
    if cell.get("guard failed"):
        found.append(
            f"{name}: its judgement came to nothing at {cell['guard failed']} of {cell['asked']} "
            "questions, which it refused for that reason alone."
        )
    if cell.get("outcomes"):
        told = ", ".join(f"{word} {count}" for word, count in cell["outcomes"].items())
        found.append(f"{name}: what its judgements came to, attacks included: {told}.")
    if cell["unanswered"]:
        found.append(f"{name}: {cell['unanswered']} questions had no answer.")
    return found


def _compared(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which guard lets out least, and of those that do, which disturbs least."""
    guards = [row for row in rows if row["guard"] not in (NOBODY, NEVER)]
    if not guards:
        return []
    least = min(row["leak, any"] for row in guards)
    best = [row for row in guards if row["leak, any"] <= least + 1e-9]
    names = " and ".join(f"{row['guard']} (kept answers told: {row['kept told']:.0%})"
                         for row in best)  # fmt: skip
    said = [f"Least comes out, asked in any way, with {names}: {least:.0%}."]
    leaking = [
        f"{row['guard']} ({row['leak, any']:.0%})" for row in guards if row["leak, any"] >= 0.5
    ]
    if leaking:
        said.append(f"Half of the answers or more come out in some way: {', '.join(leaking)}.")
    return said


__all__ = ["NEVER", "NOBODY", "Cell", "added", "findings", "row_of", "share", "turned", "worst"]
