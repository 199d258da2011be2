"""What did not work in a benchmark: failed runs, records without a value, what was not measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from delible.report.board import named


def failures(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Failed runs by method and reason."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for cell in cells:
        if "failed" in cell:
            found.setdefault((str(cell["method"]), str(cell["failed"])), []).append(cell)
    return [
        {"method": named(method), "reason": reason, "runs": which(group)}
        for (method, reason), group in found.items()
    ]


def which(cells: Sequence[Mapping[str, Any]]) -> str:
    """Tasks and seeds in words: ``forget01: seeds 0, 2``."""
    by_task: dict[str, list[int]] = {}
    for cell in cells:
        by_task.setdefault(str(cell["task"]), []).append(int(cell["seed"]))
    return "; ".join(
        f"{task}: seed{'' if len(seeds) == 1 else 's'} {', '.join(map(str, sorted(seeds)))}"
        for task, seeds in by_task.items()
    )


def without_value(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Records without a value, by method and measure: how many, of how many, and why."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for cell in cells:
        for key, count in cell.get("counts", {}).items():
            method = str(cell["method"])
            entry = found.setdefault((method, key), {"count": 0, "total": 0, "why": Counter()})
            entry["count"] += count
            label, _, split = str(key).rpartition("/")
            items = cell.get("values", {}).get("items", {}).get(label, {}).get(split, [])
            entry["total"] += len(items)
            entry["why"].update(str(reason) for value, reason, _ in items if value is None)
    return [
        {
            "method": named(method),
            "key": key,
            "count": entry["count"],
            "total": entry["total"] or None,
            "why": [f"{reason} ({count:,})" for reason, count in entry["why"].most_common(2)],
            "more": max(0, len(entry["why"]) - 2),
        }
        for (method, key), entry in found.items()
    ]


def skipped(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Metrics that were not measured, by reason, and on which methods."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    for cell in cells:
        for metric, reason in cell.get("skipped", {}).items():
            methods = found.setdefault((str(metric), str(reason)), {})
            methods[named(str(cell["method"]))] = None
    return [
        {"metric": metric, "reason": reason, "methods": list(methods)}
        for (metric, reason), methods in found.items()
    ]


def stops(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Runs whose training stopped early, by method and reason."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for cell in cells:
        stopped = cell.get("notes", {}).get("stopped")
        if stopped:
            found.setdefault((str(cell["method"]), str(stopped)), []).append(cell)
    return [
        {"method": named(method), "reason": reason, "runs": which(group)}
        for (method, reason), group in found.items()
    ]
