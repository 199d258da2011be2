"""Runs a benchmark: models that know, methods that make them forget, one table in the end.

Everything is a list of cells, each a manifest of plain data: (benchmark, task, method, seed).
A finished cell is a JSON file, so a killed benchmark goes on with the cells that are missing,
and the same manifests can be worked through by several processes or a Ray cluster.
"""

from __future__ import annotations

import contextlib
import gc
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol, cast

from delible import registry
from delible.api import unlearn
from delible.attacks.base import AttackContext, ModelAttack
from delible.bench.cost import Cost
from delible.bench.prepare import learned
from delible.bench.spread import Chain, Manifest, spread
from delible.bench.suite import Benchmark, Data, Task
from delible.bench.table import ORIGINAL, REFERENCE, Table, tabulate
from delible.component import build
from delible.errors import DelibleError, RecipeError, RunError, nearest
from delible.files import read_json, write_json
from delible.guards import guard
from delible.lm.embedded import cache_folder
from delible.lm.lm import LM
from delible.measure.cache import Cache
from delible.measure.evaluate import Ask, evaluate
from delible.measure.requests import System
from delible.metrics.base import SummaryMetric, SystemValues
from delible.records import ForgetRequest, Record, RecordBase, digest
from delible.rundir import hardware, identity, versions
from delible.train.engine import Progress

Say = Callable[[str], None]
#: Names for several methods at once.
GROUPS = ("all", "all-optimisation", "all-editors", "all-guards")
#: What is measured on an attacked model.
LEAKS = ("answer_probability", "extraction_strength")


class Watcher(Protocol):
    """Where a benchmark reports to; the command line draws bars from it."""

    def progress(self, title: str) -> Progress:
        """A new bar for a training run."""
        ...

    def stage(self, title: str, done: int, total: int) -> None:
        """Progress of a measurement, or of the cells."""
        ...


class _Nobody:
    def progress(self, title: str) -> Progress | None:
        return None

    def stage(self, title: str, done: int, total: int) -> None: ...


def _quiet(_: str) -> None:
    """Says nothing."""


@dataclass(frozen=True)
class BenchResult:
    """What a benchmark gave.

    Attributes:
        folder: Holds ``cells/``, ``leaderboard.parquet`` and ``leaderboard.html``.
        table: Mean and interval of every column, by method.
        cells: One finished cell each (see :func:`run_cell`).
    """

    folder: Path
    table: Table
    cells: list[Manifest] = field(default_factory=list)


def method_names(asked: Sequence[str]) -> list[str]:
    """Names of recipes, editors and guards, with groups spelled out; recipe files stay paths.

    Raises:
        RecipeError: An unknown name; offers the nearest.
    """
    kinds = {card.name: card.kind for card in registry.cards("recipe", "editor", "guard")}
    of_group = {
        "all": ("recipe", "editor", "guard"),
        "all-optimisation": ("recipe",),
        "all-editors": ("editor",),
        "all-guards": ("guard",),
    }
    found: list[str] = []
    for name in asked:
        if name in GROUPS:
            found += [
                known
                for known, kind in kinds.items()
                if kind in of_group[name] and known != "finetune"
            ]
        elif name == "none":
            continue  # the original's row is always there
        elif name in kinds or name.endswith((".yaml", ".yml")):
            found.append(name)
        else:
            raise RecipeError(f"unknown method '{name}'.", hint=nearest(name, (*kinds, *GROUPS)))
    return list(dict.fromkeys(found))


def bench(
    benchmark: str | Mapping[str, Any] | Benchmark,
    *,
    methods: Sequence[str] = (),
    model: str = "default",
    seeds: int = 1,
    data: Path | None = None,
    out: Path | str | None = None,
    attacks: Sequence[str | Mapping[str, Any]] = (),
    options: Mapping[str, Mapping[str, Any]] | None = None,
    tune: int = 0,
    jobs: int = 1,
    ray: bool = False,
    prepare: bool = False,
    keep_models: bool = False,
    say: Say = _quiet,
    watch: Watcher | None = None,
) -> BenchResult:
    """Runs methods through a benchmark.

    Args:
        benchmark: Its name, ``{"name": …, option: value}``, or the benchmark itself.
        methods: Names of recipes, editors and guards, recipe files, or groups (``all``,
            ``all-optimisation``, …). The original and, where the benchmark trains one, the
            retrained reference are always measured.
        model: What learns (where the benchmark teaches) and unlearns.
        seeds: Runs of each method, with seeds 0, 1, …
        data: Folder with the benchmark's files; ``None`` takes them from the hub.
        out: Where results go; a second call with the same arguments goes on there.
        attacks: Attacks on weights whose effect is measured on every method.
        options: Options by method name, such as ``{"npo": {"beta": 0.2}}``.
        tune: Trials of a search per method before it is measured (0: the recipe as it is).
        jobs: Processes on this machine.
        ray: Spread over a Ray cluster.
        prepare: Only train (and cache) target and reference.
        keep_models: Keep the unlearned models under ``out/models``.
        watch: Sees every training run and measurement that happens in this process.

    Raises:
        DelibleError: Bad input; told before anything is trained.
    """
    chosen = cast(Benchmark, build("benchmark", benchmark))  # type: ignore[arg-type]
    for name, number, least in (("seeds", seeds, 1), ("jobs", jobs, 1), ("tune", tune, 0)):
        if number < least:
            raise RecipeError(f"'{name}' = {number}: give a number from {least} on.")
    names = method_names(methods)
    wanted = [cast(ModelAttack, build("attack", dict(one) if isinstance(one, Mapping) else one))
              for one in attacks]  # fmt: skip
    for attack in wanted:
        if not isinstance(attack, ModelAttack):
            raise RecipeError(
                f"the attack '{attack.card.name}' changes prompts, not weights.",
                where="bench",
                hint="Prompt attacks are asked by 'delible audit', or by the benchmark itself.",
            )
    tasks = chosen.tasks(Data(data, say))
    common: Manifest = {
        "benchmark": chosen.spec(),
        "model": model,
        "data": None if data is None else str(Path(data).resolve()),
        "attacks": [attack.spec() for attack in wanted],
        "tune": tune,
        "keep_models": keep_models,
    }
    folder = Path(out or Path("runs") / f"bench-{chosen.card.name}-{identity(common)[:8]}")
    known: dict[str, str] = {}
    watcher = cast(Watcher, watch or _Nobody())
    ready = [_prepared(chosen, task, model, say, known, watcher) for task in tasks]
    requests = _written(chosen, tasks, ready, names, Data(data, say))
    if prepare:
        say(f"Ready: {sum(bool(task.learn) for task in tasks)} target(s) and their reference(s).")
        return BenchResult(folder, tabulate(chosen, []))
    common["folder"] = str(folder.resolve())
    folder.mkdir(parents=True, exist_ok=True)
    first: list[Chain] = [
        [{**common, "task": task.name, **paths, "method": row, "seed": 0}]
        for task, paths in zip(tasks, ready, strict=True)
        if task.splits  # a step on the way to the next task is not measured
        for row in ([REFERENCE] if paths["reference"] else []) + [ORIGINAL]
    ]
    then = list(_chains(tasks, ready, names, seeds, common, options or {}))
    for cell in (cell for chain in then for cell in chain):
        if cell["task"] in requests and _reads_records(str(cell["method"])):
            cell["request"] = requests[cell["task"]]
    total = sum(map(len, (*first, *then)))
    cells: list[Manifest] = []
    # the references come first: the others are compared with them
    for part, count in ((first, 1), (then, jobs)):
        elsewhere = part is then and (ray or jobs > 1)
        work = run_cell if elsewhere else partial(run_cell, watch=watcher)
        for done in spread(work, part, jobs=count, ray=ray and part is then):
            cells += done
            say(
                f"{len(cells)} of {total}: {done[-1]['method']} on {done[-1]['task']}, "
                f"seed {done[-1]['seed']}, is done."
            )
            table = tabulate(chosen, cells)
            _write(folder, chosen, table, cells, common)
    return BenchResult(folder, table, cells)


def _prepared(
    benchmark: Benchmark,
    task: Task,
    model: str,
    say: Say,
    known: dict[str, str],
    watch: Watcher,
) -> dict[str, str | None]:
    """Where the task's start model and its reference are.

    Args:
        known: Models by what they learned, so that tasks that share one ask for it once.
    """
    if not task.learn:
        return {"start": model, "reference": None}
    learning = benchmark.learning(model)

    def taught(records: Sequence[RecordBase], title: str) -> str:
        key = f"{title}/{digest(records)}"
        if key not in known:
            known[key] = str(
                learned(
                    model,
                    cast(Sequence[Record], records),
                    options=learning.options,
                    slots=learning.slots,
                    title=title,
                    say=say,
                    progress=watch.progress(f"learning ({title})"),
                )
            )
        return known[key]

    start = taught(task.learn, "target")
    reference = taught(task.relearned, "reference") if task.relearned else None
    return {"start": start, "reference": reference}


def _reads_records(method: str) -> bool:
    """Whether a method is given forget records; one that needs names alone is not."""
    cards = registry.cards("editor", "guard")
    return not any(card.name == method and "names" in card.needs for card in cards)


def _written(
    benchmark: Benchmark,
    tasks: Sequence[Task],
    ready: Sequence[Mapping[str, str | None]],
    methods: Sequence[str],
    data: Data,
) -> dict[str, str]:
    """Files of the requests that the model writes itself, by task; named by their content."""
    found: dict[str, str] = {}
    if not any(_reads_records(method) for method in methods):
        return found
    models: dict[str, LM] = {}
    for task, paths in zip(tasks, ready, strict=True):
        if task.unwritten:
            start = str(paths["start"])
            if start not in models:
                models[start] = LM.load(start, say=data.say)
            content = benchmark.corpus(models[start], task, data).model_dump(mode="json")
            path = cache_folder() / "requests" / f"{identity(content)[:16]}.json"
            write_json(path, content)
            found[task.name] = str(path)
    return found


def _chains(
    tasks: Sequence[Task],
    ready: Sequence[Mapping[str, str | None]],
    methods: Sequence[str],
    seeds: int,
    common: Manifest,
    options: Mapping[str, Mapping[str, Any]],
) -> Iterator[Chain]:
    """Cells of every method and seed; successive tasks are in one chain.

    All methods have their first run before any has its second: a search that the seeds of a
    method share keeps no other process waiting, and a half-finished table has every row.
    """
    for seed in range(seeds):
        for method in methods:
            chains: list[list[Manifest]] = []
            for task, paths in zip(tasks, ready, strict=True):
                cell = {
                    **common, "task": task.name, **paths, "method": method, "seed": seed,
                    "options": dict(options.get(method, {})), "after": task.after,
                }  # fmt: skip
                before = [one for one in chains if one[-1]["task"] == task.after]
                if before:
                    before[0].append(cell)
                else:
                    chains.append([cell])
            for chain in chains:
                for cell in chain[:-1]:
                    cell["leads"] = True  # the next one starts from its result
            yield from chains


# ---- one cell


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
    return benchmark, benchmark.tasks(Data(None if data is None else Path(data), _quiet))


def run_cell(manifest: Manifest, watch: Watcher | None = None) -> Manifest:
    """One method on one task with one seed: unlearns, measures, writes the result.

    Returns:
        ``task``, ``method``, ``seed``, ``numbers`` (by ``label/split``, summary name, and
        ``attack: …/label``), ``counts`` of records without a value, ``seconds``,
        ``peak_bytes``, ``values`` of every record; or ``failed`` with the reason.
    """
    place = _place(manifest)
    if place.exists():
        return cast(Manifest, read_json(place))
    watcher = cast(Watcher, watch or _Nobody())
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
        options, notes = _options(benchmark, manifest, task, earlier)
        with Cost() as cost:
            system, ended = _system(manifest, options, task, earlier, watcher)
        values = _measured(benchmark, task, system, watcher)
        reference = _reference_values(manifest, task, values)
        numbers = _numbers(benchmark.asks(), values, reference)
        for spec in manifest["attacks"]:
            numbers |= _attacked(system, cast(ModelAttack, build("attack", spec)), task, manifest)
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
    if "failed" not in result:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_json(place, result)
        _tidy(manifest, earlier)
    return result


def _earlier(tasks: Sequence[Task], task: Task) -> list[Task]:
    """The tasks whose results a task goes on from, the nearest first."""
    by_name = {one.name: one for one in tasks}
    found: list[Task] = []
    while task.after is not None:
        task = by_name[task.after]
        found.append(task)
    return found


def _so_far(task: Task, earlier: Sequence[Task]) -> ForgetRequest:
    """A task's request with all that was requested before it."""
    requests = [one.request for one in (*reversed(earlier), task)]
    return task.request.model_copy(
        update={
            "forget": tuple(record for one in requests for record in one.forget),
            "subjects": tuple(dict.fromkeys(name for one in requests for name in one.subjects)),
        }
    )


def _tidy(manifest: Manifest, earlier: Sequence[Task]) -> None:
    """Removes the models that a finished cell no longer needs, unless all are to be kept.

    Its own goes if no task goes on from it, and those that it went on from; but an adapter still
    needs the model that it changes: those go when the last request is done.
    """
    if manifest["keep_models"]:
        return
    mine = _model_folder(manifest, str(manifest["task"]))
    over = not manifest.get("leads")
    gone = [mine] if over else []
    if over or (mine / "model").is_dir():
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
    kinds = {card.kind for card in registry.cards("guard", "editor") if card.name == method}
    if method in (ORIGINAL, REFERENCE) or "guard" in kinds:
        return given, {}
    budget = {} if "editor" in kinds else benchmark.budget(str(manifest["model"]))
    options = {**budget, **given}
    if not manifest["tune"]:
        return options, {}
    from delible.tune import tuned_options

    start = _start(manifest, earlier)
    options = tuned_options(start, task.request, method, manifest["tune"], options)
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
) -> tuple[System, dict[str, Any]]:
    """The system that a cell measures, and how its training ended.

    Raises:
        DelibleError: The method cannot do it, or the result that it goes on from is not there.
    """
    method = str(manifest["method"])
    if method == ORIGINAL:
        return LM.load(str(manifest["start"])), {}
    if method == REFERENCE:
        return LM.load(str(manifest["reference"])), {}
    if any(card.name == method for card in registry.cards("guard")):
        # a guard changes no weights: it guards the first model against all requests so far
        asked = _so_far(task, earlier)
        return guard(LM.load(str(manifest["start"])), asked, method, **options), {}
    result = unlearn(
        _start(manifest, earlier), task.request, method=method, seed=manifest["seed"],
        out=_model_folder(manifest, task.name), shown=0,
        progress=watch.progress(f"{method}, seed {manifest['seed']}"), **options,
    )  # fmt: skip
    return result.model, {"stopped": result.stopped}


def _measured(benchmark: Benchmark, task: Task, system: System, watch: Watcher) -> SystemValues:
    cache = Cache(cache_folder() / "answers")
    show = partial(watch.stage, f"measuring {Path(system.name).name}")
    return evaluate(system, task.splits, benchmark.asks(), cache=cache, progress=show)


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
    system: System, attack: ModelAttack, task: Task, manifest: Manifest
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
        seed=int(manifest["seed"]),
        say=_quiet,
    )
    held: Sequence[RecordBase] = attack.held_out(context)
    before, after = (
        evaluate(one, {"forget": held}, [build("metric", name) for name in LEAKS]).means
        for one in (system, attack.apply(system, context))
    )
    found = {f"attack: {title}/{name}": after[name]["forget"] for name in LEAKS}
    had, has = (means["answer_probability"]["forget"] for means in (before, after))
    found[f"attack: {title}/recovered"] = None if had is None or has is None else has - had
    return found


# ---- what is left on disk


def _write(
    folder: Path, benchmark: Benchmark, table: Table, cells: Sequence[Manifest], common: Manifest
) -> None:
    from delible.bench.table import write_parquet
    from delible.report.leaderboard import write_page

    write_json(
        folder / "bench.json",
        {**common, "versions": versions(), "hardware": hardware(), "cells": len(cells)},
    )
    write_parquet(folder / "leaderboard.parquet", cells)
    write_page(folder / "leaderboard.html", benchmark, table, cells, common)


__all__ = ["BenchResult", "bench", "method_names", "run_cell"]
