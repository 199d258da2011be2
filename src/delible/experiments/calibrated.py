"""Calibrated comparison: methods at equal retention.

One method forgets more, another keeps more: which one is better? Every result is mixed with the
model before, weight by weight, until the retain records are extracted as well as they were, up
to a share. What is left to compare is the forget records' extraction strength.

    theta(alpha) = (1 - alpha) theta_before + alpha theta_unlearned
    score        = ES_forget(theta(alpha*)),  alpha* the largest with
                   ES_retain(theta(alpha)) >= retention ES_retain(theta_before)

Paper: arXiv 2406.09179. Reference code: github.com/tmlr-group/Unlearning-with-Control.
Deviations: those of the finisher ``calibrate``, which does the search; the data is the benchmark
``world``; a model retrained without the forget records is measured beside the methods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pydantic import Field

from delible.api import unlearn
from delible.bench.prepare import learned
from delible.bench.stages import mean, spaced
from delible.component import build
from delible.lm.lm import LM
from delible.measure.benchmark import (
    Benchmark,
    Chart,
    Curve,
    Experiment,
    Findings,
    Setting,
    Task,
)
from delible.measure.evaluate import bootstrap_interval, evaluate
from delible.method import Method
from delible.records import Record
from delible.registry import register
from delible.resolving import resolve_method
from delible.train.slots import Finish, FinishContext

METHODS = ("graddiff", "npo", "idk")
METRIC = "extraction_strength"
#: Below this share of the way a method has ruined the model, and mixing gave it back.
RUINED = 0.1
Cell = Mapping[str, Any]


@dataclass(frozen=True)
class Models:
    """Folders of the model before unlearning and of the one that never saw the forget records."""

    start: str
    reference: str


@register(
    kind="benchmark",
    name="calibrated",
    title="Calibrated comparison",
    summary="Mixes every result with the model before until all keep alike, then compares.",
    paper="2406.09179",
    year=2024,
    family="fictional",
    needs=("forget", "retain", "weights"),
    capability="score",
    misleads="A method that ruins the model is mixed back to the model before: look at alpha, "
    "and at the values as trained. Extraction strength sees only what was learned word for word.",
    badges=("variant",),
    variant="A finer search than in released code; made-up people.",
)
class Calibrated(Experiment):
    """Each method once per seed, with options of its recipe; finished cells are kept."""

    people: int = Field(20, ge=4, description="People in the world.")
    forget: int = Field(2, ge=1, description="People to forget.")
    retention: float = Field(
        0.95, gt=0, le=1, description="Share of the retain extraction strength to keep."
    )
    records: int = Field(200, ge=1, description="At most this many records of each kind count.")
    learning_rate: float | None = Field(
        None, gt=0, description="Of unlearning; none: the recipe's own (tiny models: 1e-4)."
    )
    epochs: int | None = Field(None, ge=1, description="Of unlearning; none: the recipe's own.")
    world_seed: int = Field(0, ge=0, description="Seed of the world.")

    def _world(self) -> Benchmark:
        options = {name: getattr(self, name) for name in ("people", "forget", "world_seed")}
        return cast(Benchmark, build("benchmark", {"name": "world", **options}))

    def method(self, name: str, model: str) -> Method:
        """A method, with the experiment's options where it trains.

        Raises:
            RecipeError: An unknown method.
        """
        chosen = resolve_method(name)
        rate = self.learning_rate or (1e-4 if model == "tiny" else None)
        given = {"training.learning_rate": rate, "training.epochs": self.epochs}
        return chosen.with_options(
            {key: value for key, value in given.items() if value and chosen.takes(key)}
        )

    def run(self, setting: Setting) -> Findings:
        methods = tuple(dict.fromkeys(setting.methods or METHODS))
        chosen = {name: self.method(name, setting.model) for name in methods}
        world = self._world()
        (task,) = world.tasks(setting.data)
        total, done = 2 + setting.seeds * len(methods), 0
        models = self._models(world, task, setting)
        ends: dict[str, Cell] = {}
        for name, folder in (("original", models.start), ("reference", models.reference)):
            setting.progress(name, done, total)
            ends[name] = self.kept(setting, name, {}, lambda at=folder: self.ends(at, task))
            done += 1
        found: dict[str, list[Cell]] = {name: [] for name in methods}
        for seed in range(setting.seeds):
            for name, method in chosen.items():
                setting.progress(f"{name}, seed {seed}", done, total)
                found[name].append(
                    self.kept(
                        setting, f"{Path(name).stem}-{seed}",
                        {"method": method.spec(), "seed": seed},
                        lambda m=method, s=seed: self.cell(m, models.start, task, s, setting),
                    )
                )  # fmt: skip
                done += 1
        setting.progress("done", total, total)
        return findings(ends, found)

    def _models(self, world: Benchmark, task: Task, setting: Setting) -> Models:
        learning = world.learning(setting.model)
        start, reference = (
            str(
                learned(
                    setting.model, cast("Sequence[Record]", records), options=learning.options,
                    slots=learning.slots, title=title,
                )
            )
            for title, records in (("target", task.learn), ("reference", task.relearned))
        )  # fmt: skip
        return Models(start, reference)

    def values(self, lm: LM, task: Task) -> dict[str, list[float]]:
        """Extraction strength of the forget and of the retain records."""
        request = task.request
        splits = {"forget": request.forget, "retain": (*request.retain, *request.neighbours)}
        limited = {name: spaced(rows, self.records) for name, rows in splits.items()}
        items = evaluate(lm, limited, [build("metric", METRIC)]).items[METRIC]
        return {
            name: [item.value for item in rows if item.value is not None]
            for name, rows in items.items()
        }

    def ends(self, model: str, task: Task) -> Cell:
        """What a model that is not to be calibrated extracts."""
        values = self.values(LM.load(model), task)
        return {"trained": values, "calibrated": values, "alpha": None}

    def cell(self, method: Method, start: str, task: Task, seed: int, setting: Setting) -> Cell:
        """Unlearns, measures, mixes, measures."""
        request = task.request
        lm = LM.load(start)
        lm = unlearn(lm, request, method=method, seed=seed, shown=0, measured=False).model
        trained = self.values(lm, task)
        finish = cast(
            Finish,
            build("finish", {"name": "calibrate", "retention": self.retention,
                             "records": self.records}),
        )  # fmt: skip
        context = FinishContext(
            lm=lm,
            start=lambda: LM.load(start),
            records={"forget": request.forget, "retain": (*request.retain, *request.neighbours)},
            folder=None,
        )
        mixed = finish.apply(context)
        notes = cast("dict[str, Any]", context.notes["calibration"])
        alpha = None if notes.get("skipped") else notes["alpha"]
        return {"trained": trained, "calibrated": self.values(mixed, task), "alpha": alpha}


def ranks(values: Mapping[str, float | None]) -> dict[str, int | None]:
    """1 for the lowest value; equal values share the better place; None for none."""
    known = [value for value in values.values() if value is not None]
    return {
        name: None if value is None else 1 + sum(other < value for other in known)
        for name, value in values.items()
    }


def findings(ends: Mapping[str, Cell], found: Mapping[str, Sequence[Cell]]) -> Findings:
    """Table, chart and notes.

    Args:
        ends: Cells of the original and the reference.
        found: By method, one cell per seed: ``trained`` and ``calibrated`` (values of the forget
            and retain records) and ``alpha``; or ``failed`` with the reason.
    """
    rows: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    curves: list[Curve] = []
    good = {name: [c for c in cells if "failed" not in c] for name, cells in found.items()}
    means = {
        stage: {name: _mean_of(cells, stage, "forget") for name, cells in good.items()}
        for stage in ("trained", "calibrated")
    }
    places = {stage: ranks(values) for stage, values in means.items()}
    for name, cells in {**{name: [cell] for name, cell in ends.items()}, **good}.items():
        pooled = [value for cell in cells for value in cell["calibrated"]["forget"]]
        low, high = bootstrap_interval(pooled, 0)
        row: dict[str, Any] = {
            "method": name,
            "alpha": mean([cell["alpha"] for cell in cells]),
            "retain, as trained": _mean_of(cells, "trained", "retain"),
            "forget, as trained": _mean_of(cells, "trained", "forget"),
            "retain, calibrated": _mean_of(cells, "calibrated", "retain"),
            "forget, calibrated": _mean_of(cells, "calibrated", "forget"),
            "95 % from": low,
            "to": high,
            "place as trained": places["trained"].get(name),
            "place, calibrated": places["calibrated"].get(name),
        }
        rows.append(row)
        runs += [
            {"method": name, "seed": seed, "alpha": cell["alpha"], **_in_words(cell)}
            for seed, cell in enumerate(found.get(name, cells))
            if "failed" not in cell
        ]
        points = [
            (row[f"retain, {stage}"], row[f"forget, {stage}"])
            for stage in ("as trained", "calibrated")
        ]
        curves.append(Curve(name, [(x, y) for x, y in points if x is not None and y is not None]))
    chart = Chart(
        "From as trained to calibrated", "retain extraction strength",
        "forget extraction strength", [curve for curve in curves if curve.points],
    )  # fmt: skip
    return Findings(rows, [chart] if chart.curves else [], _notes(rows, found), runs)


def _in_words(cell: Cell) -> dict[str, Sequence[float]]:
    """The values of every record, by title."""
    return {
        f"{split}, {title}": cell[stage][split]
        for stage, title in (("trained", "as trained"), ("calibrated", "calibrated"))
        for split in ("retain", "forget")
    }


def _notes(rows: Sequence[Mapping[str, Any]], found: Mapping[str, Sequence[Cell]]) -> list[str]:
    notes = []
    ranked = [row for row in rows if row["method"] in found and row["place, calibrated"]]
    if len(ranked) > 1:
        before = sorted(ranked, key=lambda row: int(row["place as trained"]))
        after = sorted(before, key=lambda row: int(row["place, calibrated"]))  # ties stay
        orders = [[str(row["method"]) for row in order] for order in (before, after)]
        same = "the same" if orders[0] == orders[1] else "another"
        notes.append(
            f"Calibrated, the order is {same}: {', '.join(orders[1])} (as trained: "
            f"{', '.join(orders[0])})."
        )
    for row in ranked:
        if row["alpha"] is not None and row["alpha"] < RUINED:
            notes.append(
                f"{row['method']} keeps the retain records only at alpha {row['alpha']:.2f}: what "
                "is compared is almost the model before."
            )
    notes += [
        f"{name} failed: {cell['failed']}"
        for name, cells in found.items() for cell in cells if "failed" in cell
    ]  # fmt: skip
    return notes


def _mean_of(cells: Sequence[Cell], stage: str, split: str) -> float | None:
    return mean([value for cell in cells for value in cell[stage][split]])
