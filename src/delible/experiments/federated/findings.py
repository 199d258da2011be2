"""What federated runs show: table, curves over rounds, and sentences computed from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from delible.bench.stages import mean
from delible.measure.benchmark import Chart, Curve, Findings

#: The reference among the methods.
RETRAIN = "retrain"
ROUGE, PROBABILITY = "rouge_l_recall", "answer_probability"
#: What forgetting that lasts and keeps the rest looks like here: forgotten at once, lasting (more
#: than this), kept. The thresholds are ours; the paper's tables are of another kind.
AT_ONCE, LASTING, KEPT = 0.6, 0.5, 0.95
#: Below this much ROUGE-L nothing was learned that could be forgotten.
KNOWN = 0.3
Cell = Mapping[str, Any]
Key = tuple[str, str, str]


def fallen(after: float | None, before: float | None) -> float | None:
    """1 - after / before; None where there was nothing."""
    if after is None or not before:
        return None
    return 1 - after / before


def after(curve: Sequence[Cell], phases: Sequence[str]) -> Cell | None:
    """The last point of any of some phases."""
    points = [one for one in curve if one["phase"] in phases]
    return points[-1] if points else None


def shares(cell: Cell, metric: str = ROUGE) -> dict[str, float | None]:
    """forgotten, lasting and kept of one run."""
    curve = cell["curve"]
    start, end = curve[0], curve[-1]
    once = after(curve, ("unlearn",))
    kept = fallen(end[f"retain/{metric}"], start[f"retain/{metric}"])
    return {
        "forgotten": None if once is None else fallen(
            once[f"forget/{metric}"], start[f"forget/{metric}"]
        ),
        "lasting": fallen(end[f"forget/{metric}"], start[f"forget/{metric}"]),
        "kept": None if kept is None else 1 - kept,
    }  # fmt: skip


def findings(found: Mapping[Key, Sequence[Cell]]) -> Findings:
    """Table, charts and notes.

    Args:
        found: By (server, placement, method), one cell per seed: ``curve`` (what was seen when all
            was learned, and after each round) and counts; or ``failed`` with the reason.
    """
    rows, runs, notes = [], [], list[str]()
    curves: dict[str, list[Curve]] = {}
    for (aggregation, placement, name), cells in found.items():
        good = [cell for cell in cells if "failed" not in cell]
        notes += [f"{name} under {aggregation} failed: {cell['failed']}" for cell in cells
                  if "failed" in cell]  # fmt: skip
        if not good:
            continue
        row = _row(good)
        rows.append({"server": aggregation, "method": name, "unlearning at": placement, **row})
        runs += [
            {"server": aggregation, "method": name, "unlearning at": placement, "seed": seed,
             **shares(cell), "bytes": cell["bytes_down"] + cell["bytes_up"]}
            for seed, cell in enumerate(cells) if "failed" not in cell
        ]  # fmt: skip
        if name != RETRAIN:
            title = name if placement == "global" else f"{name}, at the client"
            for split in ("forget", "retain"):
                curves.setdefault(f"{aggregation}: {split}", []).append(
                    Curve(title, _mean_curve(good, f"{split}/{ROUGE}"))
                )
    charts = [Chart(title, "steps after learning", "ROUGE-L recall", lines)
              for title, lines in curves.items() if any(line.points for line in lines)]  # fmt: skip
    return Findings(rows, charts, [*_notes(rows), *notes], runs)


def _row(cells: Sequence[Cell]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for split in ("forget", "retain"):
        for title, phases in (
            ("learned", ("learned",)), ("unlearned", ("unlearn",)),
            ("recovered", ("unlearn", "recover", "retrain")),
        ):  # fmt: skip
            points = [after(cell["curve"], phases) for cell in cells]
            for metric, unit in ((ROUGE, "ROUGE-L"), (PROBABILITY, "p")):
                row[f"{split}, {title}, {unit}"] = mean(
                    [None if one is None else one[f"{split}/{metric}"] for one in points]
                )
    every = [shares(cell) for cell in cells]
    for share in ("forgotten", "lasting", "kept"):
        row[share] = mean([one[share] for one in every])
    row["megabytes"] = mean([(cell["bytes_down"] + cell["bytes_up"]) / 1e6 for cell in cells])
    row["left out"] = mean([float(cell["left_out_in_all"]) for cell in cells])
    row["moved"] = mean([cell["curve"][-1].get("change") for cell in cells])
    return row


def _mean_curve(cells: Sequence[Cell], key: str) -> list[tuple[float, float]]:
    length = min(len(cell["curve"]) for cell in cells)
    points = [(at, mean([cell["curve"][at][key] for cell in cells])) for at in range(length)]
    return [(float(at), value) for at, value in points if value is not None]


def _notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    notes = []
    for row in rows:
        who = f"{row['method']} under {row['server']}"
        if row["unlearning at"] != "global":
            who += ", at the client"
        known = row["forget, learned, ROUGE-L"]
        if known is None or known < KNOWN:
            notes.append(f"{who}: the model had learned too little for forgetting to show.")
            continue
        if row["method"] == RETRAIN:
            notes.append(
                f"{who}: {_said(row['forget, recovered, ROUGE-L'])} of the forgotten is said by a "
                f"model that never saw it (ROUGE-L), {_said(row['retain, recovered, ROUGE-L'])} "
                "of the kept."
            )
            continue
        marks = [
            f"forgotten {_said(row['forgotten'])}, {_shows(row['forgotten'], AT_ONCE)}",
            f"lasting {_said(row['lasting'])}, {_shows(row['lasting'], LASTING, more=True)}",
            f"kept {_said(row['kept'])}, {_shows(row['kept'], KEPT)}",
        ]
        notes.append(f"{who}: {'; '.join(marks)}.")
    return notes


def _shows(value: float | None, least: float, *, more: bool = False) -> str:
    """Whether a share reaches what it should; ``more``: exceeds it."""
    wanted = f"more than {least:g}" if more else f"{least:g} or more"
    margin = 1e-6 if more else -1e-6
    there = value is not None and value >= least + margin
    return f"as wanted ({wanted})" if there else f"where {wanted} was wanted"


def _said(value: float | None) -> str:
    return "an unknown share" if value is None else f"{value:.2f}"
