"""The coreset experiment: does a small part of the forget set do what all of it does?

Unlearns with each selector at each share of the forget rows, **at equal optimiser updates** (a
twentieth of the rows trains twenty times the epochs; with equal epochs a coreset only looks bad,
and with unlimited ones it ruins the model). Measures the probability of all forget answers, of
those that were chosen and, the honest test, of those that were not.

Or, as in the paper, a coreset **trains until it forgets as much** as the full set did
(``length="shortest"``): with E epochs for the full set and a share p, separate runs of E to
ceil(E / p) epochs on a geometric grid, from short to long, until one has enough of the full set's
effect on *all* forget rows. One long run that is measured on its way would be cheaper, and the
same only where no learning rate schedule spans the run. With few rows (steps that are not full)
ceil(E / p) epochs are more updates than the full set gets: compare the updates too.

Paper: arXiv 2504.10185. What its effect may also mean: the benchmark repeats itself. On facts
that do not depend on each other (one author each) rows that were not chosen stay known.

Also run here: linear connectivity between two unlearned models, and the keyword analysis
(unlearning on the keywords alone, on the text without them, on as many words at random).
"""

from __future__ import annotations

import copy
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

from delible.api import unlearn
from delible.bench.stages import mean
from delible.component import build
from delible.context import Context
from delible.errors import RecipeError
from delible.experiments.coreset.connectivity import barrier, linear_connectivity
from delible.experiments.coreset.keyword_records import keyword_records
from delible.experiments.coreset.length import Length, epochs_grid, shortest
from delible.experiments.coreset.row import METRIC, CoresetRow
from delible.kept import cell
from delible.lm.lm import LM
from delible.measure.evaluate import evaluate
from delible.precision import resolve
from delible.preparing import AUTOMATIC_RETAIN, automatic_retain
from delible.records import ForgetRequest, RecordBase, digest
from delible.resolving import recipe_named
from delible.rundir import RunDirectory
from delible.train.engine import Trainer
from delible.train.keywords import Variant
from delible.train.plan import make_plan
from delible.train.recipe import Recipe
from delible.train.row import Row

logger = logging.getLogger(__name__)

#: The metric of what can be had word for word.
VERBATIM = "extraction_strength"
#: What a run leaves: folders of its run directory.
ARTEFACTS = ("model", "adapter")


def run(
    model: str | LM,
    request: ForgetRequest,
    *,
    method: str | Recipe | Path = "npo",
    fractions: Sequence[float] = (0.05, 0.1, 1.0),
    selectors: Sequence[str | dict[str, Any]] = ("random_coreset", "grand", "moderate", "min_k"),
    seeds: Sequence[int] = (0, 1, 2),
    out: Path | str | None = None,
    evaluation: Mapping[str, Sequence[RecordBase]] | None = None,
    analyses: Sequence[Variant] = (),
    keywords: float = 0.1,
    length: Length = "equal updates",
    grid: int = 4,
    least_effect: float = 0.95,
    connect: bool = False,
    keep_models: bool = False,
    **options: Any,
) -> list[CoresetRow]:
    """Runs the experiment, or what is left of it.

    Args:
        model: A name, or a model, which stays as it is.
        request: Forget records, and retain records if the method needs them.
        method: The host: a recipe's name or file, or a :class:`Recipe`.
        fractions: Shares of the forget records in (0, 1]; the full set is always run, since it
            says how many updates the others get.
        selectors: Names of components of the slot ``select`` with an option ``share``, or
            mappings with their options.
        out: Folder with one run directory per run and one file per row; finished rows are not
            run again, and a killed run resumes. None keeps nothing.
        evaluation: Further records to measure, by name (questions on the topic, say).
        analyses: Variants of the keyword analysis to run too, on all records.
        keywords: Share of the different words of the forget records that are keywords.
        length: How long a coreset trains: as many updates as the full set, or the shortest on a
            grid that forgets as much. The keyword analysis always gets equal updates.
        grid: With ``shortest``: numbers of epochs to try, at most.
        least_effect: With ``shortest``: share of the full set's effect that is enough, in (0, 1].
        connect: Also measure the line between each model and the one from all rows.
        keep_models: Leave every unlearned model in its run directory.
        options: Options of the host by name, such as ``epochs=5``.

    Returns:
        The start model's row, then per seed the full set's, the selectors' and the analyses'.

    Raises:
        RecipeError: A host that does not train, a setting out of range, or no forget records.
        RunError: ``out`` holds the experiment on other data or with another method.
    """
    host = recipe_named(method, "it has no rows to choose from", options=options)
    host = host.changed({"select": "all"}, {})
    wrong = [fraction for fraction in fractions if not 0 < fraction <= 1]
    if wrong:
        raise RecipeError(f"fraction {wrong[0]} is not in (0, 1].", where="coreset experiment")
    if length not in get_args(Length):
        raise RecipeError(
            f"unknown length '{length}'.", hint=f"Choose {' or '.join(get_args(Length))}."
        )
    if grid < 2:
        raise RecipeError(f"grid {grid} is below 2: its ends.", where="coreset experiment")
    if not 0 < least_effect <= 1:
        raise RecipeError(
            f"least_effect {least_effect} is not in (0, 1].", where="coreset experiment"
        )
    if not request.forget:
        raise RecipeError("there are no forget records.", hint="Add --forget FILE.")
    lm = model if isinstance(model, LM) else LM.load(model)
    needs = {need for component in host.components() for need in component.own_needs}
    if "retain" in needs and not (request.retain or request.neighbours):
        automatic = automatic_retain(lm, AUTOMATIC_RETAIN)
        request = request.model_copy(update={"retain": automatic})
    experiment = _Experiment(
        lm, request, host, Path(out) if out is not None else None, evaluation or {}, connect,
        keep_models,
    )  # fmt: skip
    experiment.begin()
    every = list(range(len(request.forget)))
    start = experiment.start()
    rows = [start]
    for seed in seeds:
        full = experiment.row("all", 1.0, seed, every)
        rows.append(full)
        epochs = experiment.full_epochs(seed) if length == "shortest" else None
        for fraction in [fraction for fraction in dict.fromkeys(fractions) if fraction < 1]:
            lengths = [None] if epochs is None else epochs_grid(epochs, fraction, grid)
            for selector in selectors:
                tried = experiment.selected(selector, fraction, seed, lengths)
                rows.append(
                    next(tried) if epochs is None else shortest(tried, start, full, least_effect)
                )
        rows += [experiment.analysed(variant, keywords, seed) for variant in analyses]
    experiment.finish(rows)
    return rows


@dataclass
class _Experiment:
    """What all runs share."""

    lm: LM
    request: ForgetRequest
    host: Recipe
    out: Path | None
    evaluation: Mapping[str, Sequence[RecordBase]]
    connect: bool
    keep_models: bool
    full: dict[int, LM] = field(default_factory=dict)
    directory: RunDirectory | None = None

    @property
    def kept(self) -> tuple[RecordBase, ...]:
        return (*self.request.retain, *self.request.neighbours)

    def begin(self) -> None:
        if self.out is not None:
            splits = {"forget": self.request.forget, "retain": self.kept, **self.evaluation}
            self.directory = RunDirectory(self.out)
            self.directory.begin(
                {
                    "command": "coreset experiment",
                    "model_fingerprint": self.lm.fingerprint,
                    "method": self.host.spec(),
                    "data": {name: digest(records) for name, records in splits.items()},
                }
            )

    def finish(self, rows: Sequence[CoresetRow]) -> None:
        if self.out is not None:
            directory = self.directory or RunDirectory(self.out)
            directory.finish(rows=[asdict(row) for row in rows])
            directory.release()
            if not self.keep_models:
                for folder in self.out.glob("runs/all-*"):
                    _drop_model(folder)

    def start(self) -> CoresetRow:
        def made() -> CoresetRow:
            values = self._measured(self.lm, [])
            return CoresetRow("start", 0.0, 0, 0, 0, 0.0, 0, 0.0, 0.0, **values)

        return self._row("start", made)

    def selected(
        self,
        selector: str | dict[str, Any],
        fraction: float,
        seed: int,
        lengths: Sequence[int | None],
    ) -> Iterator[CoresetRow]:
        """The same rows unlearned for each number of epochs, when asked for it."""
        spec = {"name": selector} if isinstance(selector, str) else dict(selector)
        title = "-".join([spec["name"], *(f"{k}={v}" for k, v in spec.items() if k != "name")])
        indices, seconds = self.choice(spec, _key(title, fraction, seed), fraction, seed)
        for epochs in lengths:
            yield self.row(title, fraction, seed, indices, seconds, epochs=epochs)

    def choice(
        self, spec: Mapping[str, Any], key: str, fraction: float, seed: int
    ) -> tuple[list[int], float]:
        """Which records a selector takes and the seconds that took; chosen once."""

        def made() -> dict[str, Any]:
            began = time.perf_counter()
            recipe = self.host.changed({"select": {**spec, "share": fraction}}, {})
            indices = [row.index for row in self._rows(recipe, seed)[0]]
            return {"rows": indices, "seconds": time.perf_counter() - began}

        found = cell(self._place(f"{key}.chosen"), made)
        return found["rows"], found["seconds"]

    def analysed(self, variant: Variant, share: float, seed: int) -> CoresetRow:
        records = keyword_records(self.request.forget, self.kept, variant, share, seed)
        every = list(range(len(self.request.forget)))
        return self.row(variant, 1.0, seed, every, records=records)

    def row(
        self,
        selector: str,
        fraction: float,
        seed: int,
        indices: Sequence[int],
        selection_seconds: float = 0.0,
        records: Sequence[RecordBase] | None = None,
        epochs: int | None = None,
    ) -> CoresetRow:
        """Unlearns on some records and measures.

        Args:
            epochs: How often they are seen; None: at the full set's number of updates.
        """
        key = _key(selector, fraction, seed) + (f"-epochs{epochs}" if epochs is not None else "")
        folder = self.out / "runs" / key if self.out is not None else None

        def made() -> CoresetRow:
            trained = records or [self.request.forget[index] for index in indices]
            request = self.request.model_copy(update={"forget": tuple(trained)})
            recipe = (
                self.extended(request, seed)
                if epochs is None
                else self.host.changed({}, {"training.epochs": epochs, "training.max_steps": None})
            )
            length = f", {epochs} epochs" if epochs is not None else ""
            logger.info(f"coreset: {selector}, {len(trained)} records{length}, seed {seed}")
            began = time.perf_counter()
            result = unlearn(
                self.lm.copy(),
                request,
                method=recipe,
                out=folder,
                seed=seed,
                shown=0,
                measured=False,
                verify=False,
            )
            seconds = time.perf_counter() - began
            steps = len(result.history)
            per_epoch = math.ceil(len(trained) / recipe.training.batch_size)
            return CoresetRow(
                selector, fraction, seed, len(trained), steps, round(steps / per_epoch, 3),
                int(result.notes.get("tokens", 0)), round(seconds, 2), round(selection_seconds, 2),
                **self._measured(result.model, indices),
                stopped=result.stopped, barriers=self._barriers(selector, seed, result.model),
            )  # fmt: skip

        def over() -> None:
            if folder is not None and not (
                self.keep_models or (self.connect and selector == "all")
            ):
                _drop_model(folder)

        return self._row(key, made, over)

    def extended(self, request: ForgetRequest, seed: int) -> Recipe:
        """The host with as many epochs as it takes to reach the full set's updates."""
        forget, retain = self._rows(self.host, seed)
        wanted = len(make_plan(self.host, forget, retain, seed).steps)
        once = self.host.changed({}, {"training.epochs": 1, "training.max_steps": None})
        part = forget[: len(request.forget)]
        per_epoch = len(make_plan(once, part, retain, seed).steps)
        epochs = math.ceil(wanted / max(1, per_epoch))
        return self.host.changed({}, {"training.epochs": epochs, "training.max_steps": wanted})

    def full_epochs(self, seed: int) -> float:
        """Passes over the full set; not a whole number where ``max_steps`` ends one early."""
        if self.host.training.max_steps is None:
            return self.host.training.epochs
        plan = make_plan(self.host, *self._rows(self.host, seed), seed)
        return len(plan.steps) / plan.steps_per_epoch

    def _rows(self, recipe: Recipe, seed: int) -> tuple[list[Row], list[Row]]:
        """Forget rows that a recipe chooses and retain rows, tokenized as training will."""
        lm = copy.copy(self.lm)
        lm.template = copy.copy(lm.template)
        lm.template.max_length = min(recipe.training.max_length, lm.template.max_length)
        lm.precision = resolve(recipe.training.precision, lm.device.type)
        records = {"forget": self.request.forget, "retain": self.kept}
        rows = Trainer(lm, recipe, records, context=Context(seed=seed)).rows().rows
        return list(rows["forget"]), list(rows["retain"])

    def _measured(self, lm: LM, indices: Sequence[int]) -> dict[str, Any]:
        splits = {"forget": self.request.forget, "retain": self.kept, **self.evaluation}
        values = evaluate(lm, splits, [build("metric", METRIC), build("metric", VERBATIM)])
        inside = set(indices)

        def part(metric: str, chosen: bool) -> float | None:
            items = values.items[metric]["forget"]
            known = [item.value for place, item in enumerate(items) if (place in inside) == chosen]
            return mean([value for value in known if value is not None])

        means = values.means[METRIC]
        return {
            "forget_probability": means["forget"],
            "selected_probability": part(METRIC, True),
            "unselected_probability": part(METRIC, False),
            "selected_extraction": part(VERBATIM, True),
            "unselected_extraction": part(VERBATIM, False),
            "chosen": list(indices),
            "forget_values": [item.value for item in values.items[METRIC]["forget"]],
            "retain_probability": means["retain"],
            "others": {name: means[name] for name in self.evaluation},
        }

    def _barriers(self, selector: str, seed: int, lm: LM) -> dict[str, float] | None:
        if not self.connect:
            return None
        if selector == "all":
            self.full[seed] = lm
            return None
        if seed not in self.full and self.out is not None:
            run = self.out / "runs" / _key("all", 1.0, seed)
            folder = next((run / name for name in ARTEFACTS if (run / name).exists()), run)
            self.full[seed] = LM.load(str(folder), precision=lm.precision)
        line = linear_connectivity(
            self.full[seed], lm, {"forget": self.request.forget, "retain": self.kept}
        )
        forgotten = [1 - value for value in line["forget"]]
        return {"forget": barrier(forgotten), "retain": barrier(line["retain"])}

    def _place(self, key: str) -> Path | None:
        return self.out / "rows" / f"{key}.json" if self.out is not None else None

    def _row(
        self, key: str, make: Callable[[], CoresetRow], then: Callable[[], None] | None = None
    ) -> CoresetRow:
        return CoresetRow(**cell(self._place(key), lambda: asdict(make()), then))


def _drop_model(folder: Path) -> None:
    for name in ARTEFACTS:
        shutil.rmtree(folder / name, ignore_errors=True)


def _key(selector: str, fraction: float, seed: int) -> str:
    return f"{selector}-{fraction:g}-seed{seed}"
