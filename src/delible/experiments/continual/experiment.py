"""Continual: many requests one after another, by several methods, against retraining.

A model learns made-up personal files, openings of books and recipes; then they are deleted one by
one, each on the result of the last. At chosen points everything deleted so far and everything that
remains is asked, of the model as it is then and of one that never saw what is deleted:

    score = 100 (Prob x ROUGE x Acc)^(1/3)
    F.D. = max(0, 1 - |F / FQ - 1|),    R.U. = max(0, 1 - |R / RQ - 1|)

F and R are the scores of what is deleted and of what remains, FQ and RQ those of the model that is
retrained at that point. Paper: FIT and its benchmark PCH (arXiv 2601.21682). Deviations: those of
the benchmark ``pch``, whose items these are; FQ and RQ are measured at every point, where the paper
draws a line from the start to one reference at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from pydantic import Field, model_validator

from delible import registry
from delible.bench.prepare import learned
from delible.bench.table import write_parquet
from delible.cards import METHODS as KINDS
from delible.component import build
from delible.errors import RunError
from delible.experiments.continual.findings import REFERENCE, START, Point, findings
from delible.files import read_json, write_json
from delible.loaders.requests import Named
from delible.measure.benchmark import Benchmark, Experiment, Findings, Setting, Task
from delible.measure.evaluate import evaluate
from delible.measure.scoring.closeness import PARTS, split_score
from delible.method import Method
from delible.records import Record
from delible.registry import register
from delible.resolving import resolve_method
from delible.sequence.result import SequenceResult, Step, read_sequence
from delible.sequence.run import unlearn_sequence
from delible.system.base import System
from delible.systems.opening import open_system

#: Those of them that are there are compared, if nobody says which.
METHODS = ("o3", "fit", "uld", "npo")
SPLITS = ("forget", "retain")
#: Options that a method needs here: a passage has no question that could be declined.
NEEDED = {"o3": {"objective": "npo"}}
#: Options of the metrics behind a score, as in the benchmark.
GENERATED = {"rouge_l_f1": {"max_new_tokens": 32}}


@register(
    kind="benchmark",
    name="continual",
    title="Continual unlearning",
    summary="Deletes items one by one by several methods, and compares each point with retraining.",
    paper="2601.21682",
    year=2026,
    family="fictional",
    needs=("forget", "retain"),
    capability="score",
    misleads="Nothing is attacked. A score near 0 of the reference makes every method look bad, "
    "and a method that answers better than the reference is punished like one that is worse.",
    badges=("variant",),
    variant="Made-up items; a reference is retrained at every point.",
)
class Continual(Experiment):
    """Each method once per seed through all requests; what is done is kept."""

    requests: int = Field(30, ge=1, description="Items to delete, one per request.")
    retain: int = Field(30, ge=1, description="Items that stay.")
    points: tuple[int, ...] = Field(
        (10, 20, 30), description="Requests after which all is compared with retraining."
    )
    rows: int = Field(20, ge=1, description="Records of each item that are asked after a request.")
    limit: int | None = Field(
        None, ge=1, description="Items of a split that are compared at most; none: all."
    )
    learning_rate: float | None = Field(
        None, gt=0, description="Of unlearning; none: each method's own."
    )
    epochs: int | None = Field(None, ge=1, description="Of unlearning; none: each method's own.")
    items_seed: int = Field(0, ge=0, description="Seed of the items and of their order.")

    @model_validator(mode="after")
    def _within(self) -> Continual:
        if not self.points or max(self.points) > self.requests or min(self.points) < 1:
            raise ValueError("points lie between 1 and the number of requests")
        return self

    def items(self) -> tuple[Benchmark, list[Task]]:
        """The benchmark whose items these are, and a task for every request."""
        options = {
            "name": "pch", "forget": self.requests, "retain": self.retain,
            "requests": self.requests, "checkpoints": self.requests,
            "items_seed": self.items_seed, "limit": self.limit,
        }  # fmt: skip
        benchmark = cast(Benchmark, build("benchmark", options))
        return benchmark, benchmark.tasks(cast(Any, None))

    def method(self, name: str) -> Method:
        """A method, with the experiment's options where it has them.

        Raises:
            RecipeError: An unknown method.
        """
        chosen = resolve_method(name)
        given = {
            "learning_rate": self.learning_rate, "epochs": self.epochs, **NEEDED.get(name, {}),
        }  # fmt: skip
        return chosen.with_options(
            {key: value for key, value in given.items() if value and chosen.takes(key)}
        )

    def run(self, setting: Setting) -> Findings:
        known = {card.name for card in registry.cards(*KINDS)}
        names = tuple(setting.methods) or tuple(one for one in METHODS if one in known)
        methods = {name: self.method(name) for name in dict.fromkeys(names)}
        benchmark, tasks = self.items()
        points = sorted(set(self.points))
        total, done = 1 + len(points) + setting.seeds * len(methods), 0
        setting.progress("the model before", done, total)
        start = self._learned(setting, benchmark, tasks[0].learn, "target")
        found: dict[str, list[Point]] = {START: [], REFERENCE: []}
        for number in points:
            setting.progress(f"reference after {number}", done := done + 1, total)
            task = tasks[number - 1]
            reference = self._learned(setting, benchmark, task.relearned, f"reference{number}")
            for name, folder in ((START, start), (REFERENCE, reference)):
                kept = self.kept(
                    setting, f"{name}-{number}", {"point": number, "model": folder},
                    lambda at=folder, of=task: self.scores(open_system(at), of),
                )  # fmt: skip
                found[name].append(Point(number, kept))
        sequences: dict[str, list[SequenceResult]] = {}
        failed: dict[str, str] = {}
        for seed in range(setting.seeds):
            for name, method in methods.items():
                setting.progress(f"{name}, seed {seed}", done := done + 1, total)
                place = setting.folder / "sequences" / f"{Path(name).stem}-{seed}"
                try:
                    self._sequence(place, start, tasks, method, points, seed)
                except RunError as error:  # a model that broke down; what was before it counts
                    failed[f"{name}, seed {seed}"] = str(error)
                sequences.setdefault(name, []).append(read_sequence(place))
                found.setdefault(name, []).extend(
                    Point(number, read_json(file), seed)
                    for number in points
                    if (file := _file(place, number)).exists()
                )
        setting.progress("done", total, total)
        result = findings(found, sequences, failed)
        told = [
            f"{name}: with {option} {value} here, since a passage has no question to decline."
            for name in methods for option, value in NEEDED.get(name, {}).items()
        ]  # fmt: skip
        result = replace(result, notes=[*result.notes, *told])
        cells = [
            {"task": f"after {point.requests}", "method": name, "seed": point.seed,
             "numbers": point.scores}
            for name, ones in found.items() for point in ones
        ]  # fmt: skip
        every = [cell for ones in sequences.values() for one in ones for cell in one.cells()]
        write_parquet(setting.folder / "continual.parquet", [*cells, *every])
        return result

    def _learned(
        self, setting: Setting, benchmark: Benchmark, records: Sequence[Any], title: str
    ) -> str:
        learning = benchmark.learning(setting.model)
        return str(
            learned(
                setting.model, cast("Sequence[Record]", records), options=learning.options,
                slots=learning.slots, title=title,
            )
        )  # fmt: skip

    def _sequence(
        self, folder: Path, start: str, tasks: Sequence[Task], method: Method,
        points: Sequence[int], seed: int,
    ) -> None:  # fmt: skip
        def look(step: Step, system: System) -> None:
            if step.number in points:
                write_json(_file(folder, step.number), self.scores(system, tasks[step.number - 1]))

        named = [Named(f"{number:03d}", task.request) for number, task in enumerate(tasks, start=1)]
        unlearn_sequence(
            start, named, method=method, out=folder, seed=seed, rows=self.rows, verify=False,
            retain=tasks[0].request.retain, look=look,
        )  # fmt: skip

    def scores(self, system: System, task: Task) -> dict[str, float | None]:
        """The scores of what is deleted so far and of what remains, in [0, 100]."""
        metrics = [build("metric", {"name": one, **GENERATED.get(one, {})}) for one in PARTS]
        splits = {split: task.splits[split] for split in SPLITS}
        values = evaluate(system, splits, metrics)
        return {split: split_score(values, split) for split in SPLITS}


def _file(folder: Path, number: int) -> Path:
    """Where the scores of a method at a point are kept, beside its sequence."""
    return folder.with_name(f"{folder.name}-scores") / f"{number:03d}.json"


__all__ = ["METHODS", "Continual"]
