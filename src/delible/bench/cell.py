"""One cell of a benchmark: a method on a task with a seed, unlearned, measured and written.

A cell is a manifest of plain data, its result a JSON file, so cells are independent of where and
in which order they are worked through.
"""

from __future__ import annotations

import contextlib
import gc
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol, cast

from delible import kept
from delible.api import unlearn
from delible.bench.cost import Cost
from delible.bench.table import ORIGINAL, REFERENCE
from delible.component import build
from delible.context import Context
from delible.errors import DelibleError, RunError
from delible.files import read_json
from delible.kept import identity
from delible.lm.lm import LM
from delible.measure.attack import AttackContext, ModelAttack
from delible.measure.benchmark import Benchmark, Data, Task
from delible.measure.cache import Cache
from delible.measure.evaluate import Ask, evaluate
from delible.measure.metric import SummaryMetric, SystemValues
from delible.measure.starting import started
from delible.records import ForgetRequest, RecordBase
from delible.resolving import resolve_method
from delible.spread.pieces import Manifest
from delible.system.base import System
from delible.system.roles import Roles
from delible.systems.opening import open_lm, stands_on_base
from delible.watching import Steps, aside

#: What a method says of its run that a cell keeps.
TOLD = ("steps", "generated_tokens")
#: What is measured on an attacked model.
LEAKS = ("answer_probability", "extraction_strength")


class Watcher(Protocol):
    """Where a benchmark reports to; the command line draws bars from it."""

    def progress(self, title: str) -> Steps:
        """A new bar for a training run."""
        ...

    def stage(self, title: str, done: int, total: int) -> None:
        """Progress of a measurement, or of the cells."""
        ...


class Nobody:
    """Watches nothing."""

    def progress(self, title: str) -> Steps | None:
        return None

    def stage(self, title: str, done: int, total: int) -> None: ...


def _place(manifest: Manifest) -> Path:
    """The file of a cell's result. Its name says what it is, its hash everything else."""
    described = {key: value for key, value in manifest.items() if key not in ("folder",)}
    method = Path(str(manifest["method"])).stem.replace(" ", "-")
    task = str(manifest["task"]).replace("/", "-").replace(" ", "-")
    name = f"{task}--{method}--{manifest['seed']}--{identity(described)[:8]}.json"
    return Path(manifest["folder"]) / "cells" / name


@lru_cache(maxsize=2)
def _declared(spec: str, data: str | None) -> tuple[Benchmark, list[Task]]:
    """A benchmark and its tasks, read once per process."""
    benchmark = cast(Benchmark, build("benchmark", json.loads(spec)))
    return benchmark, benchmark.tasks(Data(None if data is None else Path(data)))


@aside()  # many cells, each with a line of its own in the end
def run_cell(manifest: Manifest, watch: Watcher | None = None) -> Manifest:
    """One method on one task with one seed: unlearns, measures, writes the result.

    Returns:
        ``task``, ``method``, ``seed``, ``numbers`` (by ``label/split``, summary name, and
        ``attack: …/label``), ``counts`` of records without a value, ``seconds``,
        ``peak_bytes``, ``values`` of every record; or ``failed`` with the reason.
    """
    over = partial(_tidy, manifest)
    return kept.cell(
        _place(manifest), lambda: _worked(manifest, cast(Watcher, watch or Nobody())), over
    )


@aside()
def cell_elsewhere(manifest: Manifest) -> Manifest:
    """What :func:`run_cell` returns, made now; whoever asked for it writes it (:func:`write_cell`).

    For other machines: a result has one writer.
    """
    return _worked(manifest, cast(Watcher, Nobody()))


def written_cell(manifest: Manifest) -> Manifest | None:
    """The result of a cell that was finished before, as :func:`run_cell` reads it."""
    path = _place(manifest)
    try:
        return dict(read_json(path)) if path.exists() else None
    except (OSError, ValueError):  # half of it: it is made again
        return None


def write_cell(manifest: Manifest, result: Manifest) -> Manifest:
    """Writes what :func:`cell_elsewhere` made, as :func:`run_cell` does."""
    return kept.cell(_place(manifest), lambda: result, partial(_tidy, manifest))


def _worked(manifest: Manifest, watcher: Watcher) -> Manifest:
    """What :func:`run_cell` returns, made now."""
    benchmark, tasks = _declared(json.dumps(manifest["benchmark"]), manifest["data"])
    task = next(one for one in tasks if one.name == manifest["task"])
    earlier = _earlier(tasks, task)
    if manifest.get("request"):
        written = ForgetRequest.model_validate(read_json(Path(manifest["request"])))
        task = replace(task, request=written)
    head = {key: manifest[key] for key in ("task", "method", "seed", "model")}
    head["options"] = dict(manifest.get("options", {}))
    result: Manifest
    try:
        context = started(
            None, seed=int(manifest["seed"]), stage=watcher.stage, roles=manifest.get("roles")
        )
        options, notes = _options(benchmark, manifest, task, earlier)
        with Cost() as cost:
            system, ended = _system(manifest, options, task, earlier, watcher, context)
        asks = cast_asks(benchmark.asks(), context.roles)
        values = _measured(asks, task, system, context)
        reference = _reference_values(manifest, task, values)
        numbers = _numbers(asks, values, reference)
        for spec in manifest["attacks"]:
            numbers |= _attacked(system, cast(ModelAttack, build("attack", spec)), task, context)
        result = {
            **head,
            "numbers": numbers,
            "counts": _missing(values),
            "skipped": dict(values.skipped),
            "seconds": round(cost.seconds, 1),
            "peak_bytes": cost.peak_bytes,
            "notes": {**notes, **ended},
            "values": values.as_json(),
        }
        del system
    except DelibleError as error:  # one method that cannot do it must not end the others' runs
        result = {**head, "failed": str(error), "numbers": {}, "seconds": None}
    gc.collect()
    return result


def _earlier(tasks: Sequence[Task], task: Task) -> list[Task]:
    """The tasks whose results a task goes on from, the nearest first."""
    by_name = {one.name: one for one in tasks}
    found: list[Task] = []
    while task.after is not None:
        task = by_name[task.after]
        found.append(task)
    return found


def _tidy(manifest: Manifest) -> None:
    """Removes the models that a finished cell no longer needs, unless all are to be kept.

    Its own goes if no task goes on from it, and those that it went on from; but what stands on
    the model before (an adapter, a patch, a guard) still needs it: those go when the last request
    is done.
    """
    if manifest["keep_models"]:
        return
    tasks = _declared(json.dumps(manifest["benchmark"]), manifest["data"])[1]
    earlier = _earlier(tasks, next(one for one in tasks if one.name == manifest["task"]))
    mine = _model_folder(manifest, str(manifest["task"]))
    over = not manifest.get("leads")
    gone = [mine] if over else []
    if over or not stands_on_base(mine):
        gone += [_model_folder(manifest, task.name) for task in earlier]
    for folder in gone:
        shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        mine.parent.rmdir()  # if it was the last one


def _model_folder(manifest: Manifest, task: str) -> Path:
    method = Path(str(manifest["method"])).stem
    described = {key: manifest.get(key) for key in ("benchmark", "model", "options", "tune")}
    name = f"{task}--{method}--{manifest['seed']}--{identity(described)[:8]}"
    return Path(manifest["folder"]) / "models" / name.replace("/", "-").replace(" ", "-")


def _options(
    benchmark: Benchmark, manifest: Manifest, task: Task, earlier: Sequence[Task]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A method's options, searched first if that is asked for, and what is to be noted of them.

    Raises:
        DelibleError: The search failed, or the result that it starts from is not there.
    """
    method = str(manifest["method"])
    given = dict(manifest.get("options", {}))
    if method in (ORIGINAL, REFERENCE):
        return given, {}
    chosen = resolve_method(method)
    # an editor's rate is that of a search for a value, not of training
    trains = chosen.card.kind in ("recipe", "procedure")
    budget = benchmark.budget(str(manifest["model"])) if trains else {}
    options = {**{name: value for name, value in budget.items() if chosen.takes(name)}, **given}
    if not manifest["tune"] or not chosen.ranges():
        return options, {}
    from delible.tune import tuned_options

    start = _start(manifest, earlier)
    options = tuned_options(
        start, task.request, method, manifest["tune"], options, manifest.get("roles")
    )
    return options, {"tuned": options}


def _start(manifest: Manifest, earlier: Sequence[Task]) -> str:
    """The model that a method starts from: the task's own, or the result of the task before.

    Raises:
        RunError: That result is not there.
    """
    if not earlier:
        return str(manifest["start"])
    before = _model_folder(manifest, earlier[0].name)
    if not before.is_dir():
        raise RunError(
            f"the result of the task before, '{earlier[0].name}', is not there.",
            where=str(before),
            hint="It failed (its own message says why), or was deleted: then give a new --out.",
        )
    return str(before)


def _system(
    manifest: Manifest,
    options: Mapping[str, Any],
    task: Task,
    earlier: Sequence[Task],
    watch: Watcher,
    context: Context,
) -> tuple[System, dict[str, Any]]:
    """The system that a cell measures, and how its training ended.

    Raises:
        DelibleError: The method cannot do it, or the result that it goes on from is not there.
    """
    method = str(manifest["method"])
    if method == ORIGINAL:
        return open_lm(str(manifest["start"])), {}
    if method == REFERENCE:
        return open_lm(str(manifest["reference"])), {}
    result = unlearn(
        _start(manifest, earlier), task.request, method=method,
        out=_model_folder(manifest, task.name), shown=0, measured=False, verify=False,
        context=replace(context, steps=watch.progress(f"{method}, seed {context.seed}")),
        **options,
    )  # fmt: skip
    told = {key: result.notes[key] for key in TOLD if key in result.notes}
    return result.system, {"stopped": result.stopped, **told}


def cast_asks(asks: Sequence[Ask], roles: Roles) -> list[Ask]:
    """What a benchmark asks, with whom its metrics ask besides.

    Raises:
        RecipeError: A metric needs somebody, and nobody was given.
    """
    return [replace(ask, metric=ask.metric.with_roles(roles)) for ask in asks]


def _measured(asks: Sequence[Ask], task: Task, system: System, context: Context) -> SystemValues:
    cache = Cache(context.cache / "answers") if context.cache else None
    show = partial(context.stage, f"measuring {Path(system.name).name}")
    return evaluate(system, task.splits, asks, cache=cache, progress=show)


def _reference_values(manifest: Manifest, task: Task, values: SystemValues) -> SystemValues | None:
    if manifest["method"] == REFERENCE:
        return values  # what perfect agreement looks like
    if manifest["reference"] is None:
        return None
    described = {**manifest, "method": REFERENCE, "seed": 0}
    for key in ("options", "after", "leads", "request"):
        described.pop(key, None)
    described["keep_models"] = False
    for keep in (False, True):
        path = _place({**described, "keep_models": keep})
        if path.exists():
            return SystemValues.from_json(read_json(path)["values"])
    return None


def _numbers(
    asks: Sequence[Ask], values: SystemValues, reference: SystemValues | None
) -> dict[str, float | None]:
    numbers = {
        f"{label}/{split}": mean
        for label, by_split in values.means.items()
        for split, mean in by_split.items()
    }
    for ask in asks:
        if isinstance(ask.metric, SummaryMetric):
            numbers |= ask.metric.summarise(values, reference)
    return numbers


def _missing(values: SystemValues) -> dict[str, int]:
    """How many records have no value, where some do not."""
    found = {
        f"{label}/{split}": sum(item.value is None for item in items)
        for label, by_split in values.items.items()
        for split, items in by_split.items()
    }
    return {key: count for key, count in found.items() if count}


def _attacked(
    system: System, attack: ModelAttack, task: Task, run: Context
) -> dict[str, float | None]:
    """Knowledge scores of the attacked model, on records that the attack did not train on.

    ``recovered`` is the answer probability after the attack less that before, on these records.
    """
    title = f"{attack.card.name} {attack.variant_title()}".strip()
    if not isinstance(system, LM) or not task.splits.get("forget"):
        return {}
    from delible.world import unrelated

    context = AttackContext(
        forget=task.splits["forget"],
        retain=task.request.retain,
        unrelated=unrelated(),
        original=None,
        seed=run.seed,
        progress=partial(run.stage, f"attack: {title}"),
    )
    show = partial(run.stage, f"attack: {title}: measuring")
    held: Sequence[RecordBase] = attack.held_out(context)
    before, after = (
        evaluate(
            one, {"forget": held}, [build("metric", name) for name in LEAKS], progress=show
        ).means
        for one in (system, attack.apply(system, context))
    )
    found = {f"attack: {title}/{name}": after[name]["forget"] for name in LEAKS}
    had, has = (means["answer_probability"]["forget"] for means in (before, after))
    found[f"attack: {title}/recovered"] = None if had is None or has is None else has - had
    return found


__all__ = [
    "Nobody", "Watcher", "cast_asks", "cell_elsewhere", "run_cell", "write_cell", "written_cell",
]  # fmt: skip
