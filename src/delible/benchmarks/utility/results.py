"""Results of lm-evaluation-harness as our values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delible.errors import DataError
from delible.files import read_json
from delible.measure.metric import Item, SystemValues

if TYPE_CHECKING:
    pass


def read_results(source: Path | str | Mapping[str, Any]) -> SystemValues:
    """What the harness measured, as values of a system.

    Args:
        source: A results file of the harness, the folder that holds one (the newest is read), or
            what ``simple_evaluate`` returns. Values of single documents are in ``samples``, or in
            the files ``samples_TASK_….jsonl`` beside.

    Returns:
        ``means[metric][task]`` of tasks and groups, ``items[metric][task]`` where there are
        samples. A metric behind a filter is called ``"metric (filter)"``.

    Raises:
        DataError: It is no result of the harness.
    """
    path = None if isinstance(source, Mapping) else _results_file(Path(source))
    content = source if isinstance(source, Mapping) else read_json(path)  # type: ignore[arg-type]
    results = content.get("results") if isinstance(content, Mapping) else None
    if not isinstance(results, Mapping):
        raise DataError(
            "is no result of lm-evaluation-harness: it has no 'results'.",
            where=str(path or "results"),
            hint="It writes one with --output_path.",
        )
    means: dict[str, dict[str, float | None]] = {}
    for task, numbers in results.items():
        for key, mean in numbers.items():
            metric, _, kept = key.partition(",")
            if not kept or metric.endswith("_stderr") or not _is_number(mean):
                continue  # the task's names, sizes and standard errors
            means.setdefault(_label(metric, kept), {})[str(task)] = float(mean)
    items: dict[str, dict[str, list[Item]]] = {}
    for task, samples in _samples(content, path).items():
        for sample in sorted(samples, key=lambda one: int(one["doc_id"])):
            for metric in sample.get("metrics", ()):
                value: Any = sample.get(metric)
                if _is_number(value):  # others (perplexities) exist for all documents only
                    label = _label(metric, str(sample.get("filter", "none")))
                    items.setdefault(label, {}).setdefault(task, []).append(Item(float(value)))
    sizes = content.get("n-samples", {})
    return SystemValues(
        system=str(content.get("model_name") or content.get("model_source") or "model"),
        items=items,
        means=means,
        measured={str(task): int(count["effective"]) for task, count in sizes.items()},
    )


def standard_errors(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The harness's standard errors: ``[metric][task]``, where it has one."""
    found: dict[str, dict[str, float]] = {}
    for task, numbers in results["results"].items():
        for key, value in numbers.items():
            metric, _, kept = key.partition(",")
            if metric.endswith("_stderr") and _is_number(value):
                label = _label(metric.removesuffix("_stderr"), kept)
                found.setdefault(label, {})[task] = float(value)
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (
        hasattr(value, "dtype") and getattr(value, "shape", None) == ()
    )


def _label(metric: str, kept: str) -> str:
    return metric if kept in ("", "none") else f"{metric} ({kept})"


def _results_file(path: Path) -> Path:
    if path.is_file():
        return path
    found = sorted(path.rglob("results*.json"), key=lambda one: one.name)
    if not found:
        raise DataError(
            "holds no results of lm-evaluation-harness (results….json).",
            where=str(path),
            hint="It writes them with --output_path.",
        )
    return found[-1]


def _samples(content: Mapping[str, Any], path: Path | None) -> dict[str, list[dict[str, Any]]]:
    """Documents with their values, by task."""
    if "samples" in content or path is None:
        return dict(content.get("samples", {}))
    stamp = path.stem.removeprefix("results").lstrip("_")
    found: dict[str, list[dict[str, Any]]] = {}
    for task in content["results"]:
        beside = path.parent / f"samples_{task}{f'_{stamp}' if stamp else ''}.jsonl"
        if beside.is_file():
            lines = beside.read_text(encoding="utf-8").split("\n")
            found[task] = [json.loads(line) for line in lines if line.strip()]
    return found
