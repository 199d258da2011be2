"""Runs a benchmark: models that know, methods that make them forget, one table in the end.

Everything is a list of cells, each a manifest of plain data: (benchmark, task, method, seed).
A finished cell is a JSON file, so a killed benchmark goes on with the cells that are missing,
and the same manifests can be worked through by several processes or a Ray cluster.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

from delible import kept, registry
from delible.bench.cell import (
    Nobody,
    Watcher,
    cast_asks,
    cell_elsewhere,
    run_cell,
    write_cell,
    written_cell,
)
from delible.bench.prepare import learned
from delible.bench.table import ORIGINAL, REFERENCE, Table, tabulate, write_parquet
from delible.cards import METHODS, Kind
from delible.component import build
from delible.errors import RecipeError, nearest
from delible.files import write_json
from delible.kept import identity
from delible.lm.lm import LM
from delible.measure.attack import ModelAttack
from delible.measure.benchmark import Benchmark, Data, Task
from delible.measure.starting import roles_of
from delible.records import Record, RecordBase, digest
from delible.resolving import resolve_method
from delible.rundir import hardware, versions
from delible.spread.hands import check_hands, hands, spread, there
from delible.spread.pieces import Chain, Manifest
from delible.train.processes import refuse_shares
from delible.watching import Remaining

logger = logging.getLogger(__name__)

#: Names for several methods at once.
GROUPS: dict[str, tuple[str, ...]] = {
    "all": METHODS,
    "all-optimisation": ("recipe",),
    "all-editors": ("editor",),
    "all-interventions": ("intervention",),
    "all-procedures": ("procedure",),
    "all-guards": ("guard",),
}


@dataclass(frozen=True)
class BenchResult:
    """What a benchmark gave.

    Attributes:
        folder: Holds ``cells/``, ``bench.json`` and ``leaderboard.parquet``.
        benchmark: What was run.
        table: Mean and interval of every column, by method.
        cells: One finished cell each (see :func:`run_cell`).
        common: What all cells share: model, data, attacks, tuning.
    """

    folder: Path
    benchmark: Benchmark
    table: Table
    cells: list[Manifest] = field(default_factory=list)
    common: Manifest = field(default_factory=dict)


def spelled_out(asked: Sequence[str], kinds: Sequence[Kind] = METHODS) -> list[str]:
    """Names with groups (``all``, ``all-guards``, …) replaced by the methods of these kinds that
    are in them; other names stay as they are."""
    known = {card.name: card.kind for card in registry.cards(*kinds) if card.name != "finetune"}
    found: list[str] = []
    for name in asked:
        group = GROUPS.get(name)
        found += [name] if group is None else [one for one in known if known[one] in group]
    return list(dict.fromkeys(found))


def method_names(asked: Sequence[str]) -> list[str]:
    """Names of methods (recipes also with a preset: ``npo@paper``), with groups spelled out; recipe
    files stay paths.

    Raises:
        RecipeError: An unknown name; offers the nearest.
    """
    kinds = {card.name: card.kind for card in registry.cards(*METHODS)}
    found: list[str] = []
    for name in spelled_out(asked):
        if name == "none":
            continue  # the original's row is always there
        plain, preset = registry.split_preset(name)
        if plain not in kinds and not plain.endswith((".yaml", ".yml")):
            raise RecipeError(f"unknown method '{plain}'.", hint=nearest(plain, (*kinds, *GROUPS)))
        if preset is not None:
            resolve_method(name)  # an unknown preset is refused before any work
        found.append(name)
    return found


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
    cpus: int | None = None,
    prepare: bool = False,
    keep_models: bool = False,
    roles: Mapping[str, str | Mapping[str, Any]] | None = None,
    watch: Watcher | None = None,
    found: Callable[[BenchResult], None] | None = None,
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
        ray: Spread over a Ray cluster; results and the cache lie where all its machines see them.
        cpus: CPUs that a cell takes there, beside a GPU where there are GPUs; None: the GPU's
            share, or four.
        prepare: Only train (and cache) target and reference.
        keep_models: Keep the unlearned models under ``out/models``.
        roles: Who judges, writes, … by talking: by role a name or options (no system itself, since
            a cell may run anywhere). A budget counts for each cell.
        watch: Sees every training run and measurement that happens in this process.
        found: Is handed what there is so far, whenever cells are done (to draw a page of it).

    Raises:
        DelibleError: Bad input; told before anything is trained.
    """
    refuse_shares("a benchmark")
    chosen = cast(Benchmark, build("benchmark", benchmark))  # type: ignore[arg-type]
    for name, number, least in (("seeds", seeds, 1), ("tune", tune, 0)):
        if number < least:
            raise RecipeError(f"'{name}' = {number}: give a number from {least} on.")
    check_hands(jobs, ray, cpus)
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
    if not all(isinstance(player, str | Mapping) for player in (roles or {}).values()):
        raise RecipeError(
            "a system is given for a role.", where="bench", hint="Give its name: cells open it."
        )
    cast_asks(chosen.asks(), roles_of(roles))  # what nobody plays is told before any work
    tasks = chosen.tasks(Data(data))
    common: Manifest = {
        "benchmark": chosen.spec(),
        "model": model,
        "data": None if data is None else str(Path(data).resolve()),
        "attacks": [attack.spec() for attack in wanted],
        "tune": tune,
        "keep_models": keep_models,
        **({"roles": roles_of(roles).named()} if roles else {}),
    }
    folder = Path(out or Path("runs") / f"bench-{chosen.card.name}-{identity(common)[:8]}")
    known: dict[str, str] = {}
    watcher = cast(Watcher, watch or Nobody())
    ready = [_prepared(chosen, task, model, known, watcher) for task in tasks]
    requests = _written(chosen, tasks, ready, names, Data(data))
    if prepare:
        logger.info(
            f"Ready: {sum(bool(task.learn) for task in tasks)} target(s) and their reference(s)."
        )
        return BenchResult(folder, chosen, tabulate(chosen, []))
    common["folder"] = str(folder.resolve())
    folder.mkdir(parents=True, exist_ok=True)
    references, originals = (
        [
            [{**common, "task": task.name, **paths, "method": row, "seed": 0}]
            for task, paths in zip(tasks, ready, strict=True)
            # a step on the way to the next task is not measured
            if task.splits and (row == ORIGINAL or paths["reference"])
        ]
        for row in (REFERENCE, ORIGINAL)
    )
    then = list(_chains(tasks, ready, names, seeds, common, options or {}))
    for cell in (cell for chain in then for cell in chain):
        if cell["task"] in requests and _reads_records(str(cell["method"])):
            cell["request"] = requests[cell["task"]]
    total = sum(map(len, (*references, *originals, *then)))
    cells: list[Manifest] = []
    remaining = Remaining()

    def waiting() -> None:
        watcher.stage("cells", len(cells), total)

    def told(done: list[Manifest]) -> BenchResult:
        cells.extend(done)
        left = remaining.after(len(done), total - len(cells))
        logger.info(
            f"{len(cells)} of {total}: {done[-1]['method']} on {done[-1]['task']}, "
            f"seed {done[-1]['seed']}, is done{left}."
        )
        result = BenchResult(folder, chosen, tabulate(chosen, cells), list(cells), common)
        _write(result)
        if found is not None:
            found(result)
        return result

    result = BenchResult(folder, chosen, tabulate(chosen, []), [], common)
    # the references come first: the others are compared with them
    if ray:
        given = there([model, *names, *([] if data is None else [data])])
        with (
            kept.alone(folder / "cells"),  # one writer
            hands(cell_elsewhere, ray=True, cpus=cpus, folders=[folder], paths=given) as doing,
        ):
            for part in (references, [*originals, *then]):
                for done in spread(
                    doing, part, known=written_cell, keep=write_cell, waiting=waiting
                ):
                    result = told(done)
        return result
    for part, count in ((references, 1), (originals, 1), (then, jobs)):
        work = run_cell if count > 1 else partial(run_cell, watch=watcher)
        with hands(work, jobs=count, cpus=cpus) as doing:
            for done in spread(doing, part, waiting=waiting):
                result = told(done)
    return result


def _prepared(
    benchmark: Benchmark,
    task: Task,
    model: str,
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
                models[start] = LM.load(start)
            content = benchmark.corpus(models[start], task, data).model_dump(mode="json")
            path = kept.place("requests", content, ending=".json")
            kept.cell(path, partial(dict, content))
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


# ---- what is left on disk


def _write(result: BenchResult) -> None:
    write_json(
        result.folder / "bench.json",
        {
            **result.common, "versions": versions(), "hardware": hardware(),
            "cells": len(result.cells),
        },
    )  # fmt: skip
    write_parquet(result.folder / "leaderboard.parquet", result.cells)


__all__ = ["BenchResult", "bench", "method_names"]
