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

Also here: linear connectivity between two unlearned models, and the keyword analysis (unlearning
on the keywords alone, on the text without them, on as many words at random).
"""

from __future__ import annotations

import copy
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from delible.api import unlearn
from delible.bench.stages import mean
from delible.component import build
from delible.context import Context
from delible.errors import RecipeError
from delible.kept import cell
from delible.lm.lm import LM
from delible.measure.evaluate import evaluate
from delible.precision import resolve
from delible.preparing import AUTOMATIC_RETAIN, automatic_retain
from delible.records import QA, ForgetRequest, Passage, RecordBase, digest
from delible.resolving import recipe_named
from delible.rundir import RunDirectory
from delible.system.questions import answer_of
from delible.train.engine import Trainer
from delible.train.keywords import Variant, keywords_of, rewritten
from delible.train.plan import make_plan
from delible.train.randomness import generator
from delible.train.recipe import Recipe
from delible.train.row import Row

logger = logging.getLogger(__name__)

#: The metric of every probability here, and the one of what can be had word for word.
METRIC, VERBATIM = "answer_probability", "extraction_strength"
#: What a run leaves: folders of its run directory.
ARTEFACTS = ("model", "adapter")
#: Two models are connected when no point between them is this much worse (ours).
CONNECTED = 0.02
#: How long a coreset trains.
Length = Literal["equal updates", "shortest"]


@dataclass(frozen=True)
class CoresetRow:
    """One unlearning run and what it left.

    Attributes:
        selector: How rows were chosen; ``start``: the model before, ``all``: every row,
            otherwise a selector or a variant of the keyword analysis.
        fraction: Share of the forget rows that was asked for; ``rows``: how many that are.
        steps, epochs, tokens: Optimiser updates, passes over the rows, tokens seen.
        seconds: Of unlearning, without selection and measurement (of the last part of a run
            that was interrupted).
        selection_seconds: Of choosing the rows.
        forget_probability: Mean answer probability of all forget records, in [0, 1]; low =
            forgotten.
        selected_probability, unselected_probability: Of those trained on, and of the others.
        retain_probability: Of the retain and neighbour records; high = kept.
        selected_extraction, unselected_extraction: Mean extraction strength of the forget
            records trained on, and of the others, in [0, 1]; high = said word for word.
        chosen: Which forget records were trained on, from 0.
        forget_values: Answer probability of each forget record.
        others: Of further splits by name.
        barriers: With ``connect``: per split the largest dip between this model and the one
            from all rows; at most 0.02 = connected. The forget value that may not dip is
            1 - probability.
        reached: With the length ``shortest``: whether the run has enough of the full set's
            effect. If not, it is that with most of it. None: not asked, or the full set had no
            effect. The shorter runs before it count in no number of this row.
    """

    selector: str
    fraction: float
    seed: int
    rows: int
    steps: int
    epochs: float
    tokens: int
    seconds: float
    selection_seconds: float
    forget_probability: float | None
    selected_probability: float | None
    unselected_probability: float | None
    retain_probability: float | None
    others: dict[str, float | None] = field(default_factory=dict)
    stopped: str | None = None
    barriers: dict[str, float] | None = None
    selected_extraction: float | None = None
    unselected_extraction: float | None = None
    chosen: list[int] = field(default_factory=list)
    forget_values: list[float | None] = field(default_factory=list)
    reached: bool | None = None


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
    needs = {need for component in host.components() for need in component.card.needs}
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


def keyword_records(
    forget: Sequence[RecordBase],
    retain: Sequence[RecordBase],
    variant: Variant,
    share: float,
    seed: int,
) -> list[RecordBase]:
    """Forget records rewritten for the keyword analysis; those of which nothing is left go.

    Raises:
        RecipeError: Nothing is left at all.
    """
    texts = [answer_of(record) for record in forget]
    known = keywords_of(texts, [answer_of(record) for record in retain], share)
    random = generator(seed, "coreset.keywords")
    made: list[RecordBase] = []
    for record, text in zip(forget, texts, strict=True):
        changed = rewritten(text, known, variant, random)
        if changed is not None and isinstance(record, QA):
            made.append(record.model_copy(update={"answer": changed}))
        elif changed is not None and isinstance(record, Passage):
            made.append(record.model_copy(update={"text": changed}))
    if not made:
        raise RecipeError(
            f"no forget record has anything left for the analysis '{variant}'.",
            hint="Raise the share of keywords.",
        )
    return made


def share_of_effect(start: float, full: float, part: float) -> float | None:
    """(start - part) / (start - full): 1 = as much forgotten as with the full set, 0 = nothing.

    Args:
        start, full, part: Forget probabilities before, after the full set, after a part or a
            variant of it.

    Returns:
        None when the full set changed nothing.
    """
    return (start - part) / (start - full) if start != full else None


def epochs_grid(full: float, share: float, points: int) -> list[int]:
    """Numbers of epochs from the full set's to that divided by the share, equal ratios apart.

    Args:
        full: Epochs of the full set.
        share: Of the rows, in (0, 1].
        points: At least 2, the ends; equal whole numbers count once.
    """
    low, high = (math.ceil(round(value, 6)) for value in (full, full / share))
    ratio = high / low
    return sorted({round(low * ratio ** (point / (points - 1))) for point in range(points)})


def shortest(
    runs: Iterable[CoresetRow], start: CoresetRow, full: CoresetRow, least_effect: float
) -> CoresetRow:
    """The first run with enough of the full set's effect; without one, that with most of it.

    Args:
        runs: From short to long, not empty; made one by one, and none after the one that is
            enough.
        start, full: The rows before, and after the full set. If that forgot nothing there is no
            effect to reach, and the first run is taken.
    """
    before, after = start.forget_probability, full.forget_probability
    runs = iter(runs)
    if before is None or after is None or not after < before:
        return next(runs)
    tried: list[tuple[float, CoresetRow]] = []
    for row in runs:
        part = row.forget_probability
        effect = share_of_effect(before, after, part) if part is not None else None
        effect = -math.inf if effect is None or math.isnan(effect) else effect
        if effect >= least_effect:
            return replace(row, reached=True)
        tried.append((effect, row))
    return replace(max(tried, key=lambda pair: pair[0])[1], reached=False)


def interpolated(first: LM, second: LM, share: float) -> LM:
    """(1 - share) first + share second, weight by weight, in fp32; both stay as they are.

    Raises:
        RecipeError: Their parameters have other names or shapes.
    """
    result = first.copy()
    theirs: dict[str, Tensor] = dict(second.model.named_parameters())
    mine: dict[str, Tensor] = dict(result.model.named_parameters())
    if {n: v.shape for n, v in mine.items()} != {n: v.shape for n, v in theirs.items()}:
        raise RecipeError("only models with the same parameters have a line between them.")
    with torch.no_grad():
        for name, value in mine.items():
            # not lerp: at 0 and at 1 the result must be the end itself
            mixed = (1 - share) * value.float() + share * theirs[name].to(value.device).float()
            value.copy_(mixed)
    result.touch()
    return result


def linear_connectivity(
    first: LM, second: LM, splits: Mapping[str, Sequence[RecordBase]], points: int = 11
) -> dict[str, list[float]]:
    """Mean answer probability per split at equally spaced points from ``first`` to ``second``."""
    line: dict[str, list[float]] = {name: [] for name in splits}
    for point in range(points):
        lm = interpolated(first, second, point / (points - 1))
        means = evaluate(lm, splits, [build("metric", METRIC)]).means[METRIC]
        for name in splits:
            value = means[name]
            line[name].append(math.nan if value is None else value)
    return line


def barrier(values: Sequence[float]) -> float:
    """Largest dip below the straight line between the ends, at equally spaced points.

    Args:
        values: A metric of which more is better; the first and the last are the ends'.

    Returns:
        0 or more; at most :data:`CONNECTED` = linearly connected.
    """
    last = len(values) - 1
    dips = (
        ((last - i) * values[0] + i * values[-1]) / last - value for i, value in enumerate(values)
    )
    return max(0.0, *dips)  # the ends' own is 0, but for rounding


def _drop_model(folder: Path) -> None:
    for name in ARTEFACTS:
        shutil.rmtree(folder / name, ignore_errors=True)


def _key(selector: str, fraction: float, seed: int) -> str:
    return f"{selector}-{fraction:g}-seed{seed}"


__all__ = [
    "CONNECTED",
    "CoresetRow",
    "Length",
    "barrier",
    "epochs_grid",
    "interpolated",
    "keyword_records",
    "linear_connectivity",
    "run",
    "share_of_effect",
    "shortest",
]
