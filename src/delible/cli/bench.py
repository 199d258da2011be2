"""``delible bench``: methods through a benchmark, or an experiment about methods and metrics."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from cyclopts import Parameter

from delible.cli import flags, output, tables
from delible.cli.options import components, names_in, option_name, option_value
from delible.cli.roles import read_roles
from delible.errors import EXIT_DONE, RecipeError, nearest
from delible.watching import duration

if TYPE_CHECKING:
    from delible.measure.benchmark import Benchmark, Experiment


@flags.flowing
def bench(
    suite: str,
    /,
    *,
    methods: Annotated[list[str] | None, Parameter(group=flags.METHOD)] = None,
    model: Annotated[str, Parameter(group=flags.METHOD)] = "default",
    seeds: Annotated[int, Parameter(group=flags.RUN)] = 1,
    data: Annotated[Path | None, Parameter(group=flags.DATA)] = None,
    attacks: Annotated[list[str] | None, Parameter(group=flags.ASKED)] = None,
    tune: Annotated[int, Parameter(group=flags.METHOD)] = 0,
    prepare: Annotated[bool, Parameter(group=flags.RUN, show_default=False)] = False,
    jobs: flags.Jobs = 1,
    ray: flags.Ray = False,
    cpus: flags.Cpus = None,
    keep_models: Annotated[bool, Parameter(group=flags.RUN, show_default=False)] = False,
    out: flags.Out = None,
    role: flags.Roles = None,
    **options: Annotated[str, Parameter(group=flags.OTHER)],
) -> int:
    """Run methods through a benchmark of the field and write the leaderboard.

    Parameters
    ----------
    suite
        Name of a benchmark or experiment ('delible list benchmarks').
    methods
        Names of methods of any kind, or recipe files, separated by commas; NAME@paper takes the
        schedule and weights of the method's paper. 'all', 'all-optimisation', 'all-editors',
        'all-interventions', 'all-procedures' and 'all-guards' name many. The model before and,
        where the benchmark trains one, the retrained reference are always in the table.
    model
        What learns and unlearns: 'default', 'tiny' (minutes instead of hours), a hub id, a folder.
    seeds
        Runs of every method; the table gives mean and 95 % interval.
    data
        Folder that holds the benchmark's files. Default: the Hugging Face hub.
    attacks
        Attacks on the weights whose effect gets columns of its own, separated by commas, such as
        relearn,quantize; with options as '{name: quantize, bits: 4}'.
    tune
        Trials of a search over every method's own ranges before it is measured.
    prepare
        Only train the target and the retrained reference, and keep them in the cache.
    jobs
        Processes on this machine.
    ray
        Spread the runs over a Ray cluster (or over this machine, by Ray): one GPU each where there
        are GPUs. OUT and the cache must lie where all its machines see them.
    cpus
        CPUs that each run takes on the cluster. Default: a GPU's share of them, or 4.
    keep_models
        Keep the unlearned models under OUT/models.
    out
        Where results go; the same command goes on there. Default: runs/bench-SUITE-HASH.
    role
        Who plays a part by talking: judge=MODEL, writer=https://host/v1#MODEL (judge, writer,
        attacker, guard, critic, planner, translator), or a YAML file of such lines, which may also
        limit what is spent: 'judge: {system: MODEL, calls: 500, tokens: 200000}'. May be repeated.
    options
        Options of the benchmark by name, such as --split forget01 --authors 20.
    """
    from delible import registry

    known = {card.name: card for card in registry.cards("benchmark")}
    if suite not in known:
        raise RecipeError(f"unknown benchmark '{suite}'.", hint=nearest(suite, known))
    output.quiet_libraries()
    kind = registry.load("benchmark", suite)
    given = {option_name(flag): option_value(text) for flag, text in options.items()}
    _check_options(suite, kind.model_fields, given)
    chosen = kind.build(f"benchmark '{suite}'", **{
        key: _listed(kind.model_fields[key].annotation, value) for key, value in given.items()
    })  # fmt: skip
    names = names_in(methods)
    from delible.measure.benchmark import Experiment

    roles = read_roles(role)
    with output.Reporter() as reporter:
        if isinstance(chosen, Experiment):
            if ray or cpus is not None or jobs > 1:
                raise RecipeError(
                    "an experiment runs in this process alone.",
                    where="--ray" if ray else "--cpus" if cpus is not None else "--jobs",
                )
            return _experiment(
                reporter, chosen, names, model, seeds, data, out, components(attacks), roles
            )
        return _benchmark(
            reporter, chosen, names, model, seeds, data, components(attacks), tune, jobs, ray,
            cpus, prepare, keep_models, out, roles,
        )  # fmt: skip


def _benchmark(
    reporter: output.Reporter,
    benchmark: Benchmark,
    methods: Sequence[str],
    model: str,
    seeds: int,
    data: Path | None,
    attacks: Sequence[Any],
    tune: int,
    jobs: int,
    ray: bool,
    cpus: int | None,
    prepare: bool,
    keep_models: bool,
    out: Path | None,
    roles: Mapping[str, Any],
) -> int:
    from delible.bench.run import BenchResult
    from delible.bench.run import bench as run
    from delible.report.leaderboard import write_page

    def write(found: BenchResult) -> None:
        write_page(
            found.folder / "leaderboard.html", benchmark, found.table, found.cells, found.common
        )

    reporter.field("benchmark", benchmark.card.title)
    reporter.field("model", model)
    reporter.field("methods", ", ".join(methods) or "none (only the model as it is)")
    result = run(
        benchmark, methods=methods, model=model, seeds=seeds, data=data, out=out, attacks=attacks,
        tune=tune, jobs=jobs, ray=ray, cpus=cpus, prepare=prepare, keep_models=keep_models,
        roles=roles, watch=reporter, found=write,
    )  # fmt: skip
    reporter.finish_bar()
    if prepare:
        return EXIT_DONE
    reporter.console.print(tables.leaderboard(result.table))
    for row in result.table.rows:
        if row.failed is not None:
            reporter.say(f"{row.method} failed: {row.failed}")
    reporter.field("leaderboard", str((result.folder / "leaderboard.html").resolve()))
    reporter.field("all numbers", str((result.folder / "leaderboard.parquet").resolve()))
    return EXIT_DONE


def _experiment(
    reporter: output.Reporter,
    experiment: Experiment,
    methods: Sequence[str],
    model: str,
    seeds: int,
    data: Path | None,
    out: Path | None,
    attacks: Sequence[Any],
    roles: Mapping[str, Any],
) -> int:
    from delible.bench.run import spelled_out
    from delible.kept import identity
    from delible.measure.benchmark import Data, Setting
    from delible.measure.starting import roles_of
    from delible.report.findings import write_findings

    if roles and not experiment.casts:
        raise RecipeError("this experiment casts nobody.", where="--role")
    if attacks and not experiment.attacked:
        raise RecipeError("this experiment attacks nothing.", where="--attacks")
    methods = spelled_out(methods, experiment.compares)
    described: dict[str, Any] = {
        "experiment": experiment.spec(), "model": model, "methods": list(methods),
        "seeds": seeds, "data": None if data is None else str(data.resolve()),
    }  # fmt: skip
    described |= {"attacks": list(attacks)} if attacks else {}
    described |= {"roles": roles_of(roles).named()} if roles else {}
    place = f"bench-{experiment.card.name}-{identity(described)[:8]}"
    folder = out or Path("runs") / place
    folder.mkdir(parents=True, exist_ok=True)
    reporter.field("experiment", experiment.card.title)
    reporter.field("model", model)
    setting = Setting(
        model, methods, seeds, folder, Data(data), _stages(reporter), attacks, roles
    )  # fmt: skip
    with _Watch(folder / "seconds.json") as watch:
        found = experiment.run(setting)
    reporter.finish_bar()
    if found.rows:
        columns = list(found.rows[0])
        cells = [[tables.cell(row[column]) for column in columns] for row in found.rows]
        reporter.console.print(output.table(columns, cells))
    for note in found.notes:
        reporter.say(note)
    page = write_findings(folder, experiment, found, {**described, "seconds": watch.seconds})
    reporter.field("page", str(page.resolve()))
    reporter.field("all numbers", str((folder / "experiment.json").resolve()))
    return EXIT_DONE


def _stages(reporter: output.Reporter) -> Callable[[str, int, int], None]:
    """What an experiment reports its stages to; each line says how long the rest takes."""
    began = time.monotonic()

    def stage(what: str, done: int, total: int) -> None:
        told = ""
        if 0 < done < total:
            left = (time.monotonic() - began) / done * (total - done)
            told = f" ({done:,} of {total:,} done, about {duration(left)} left)"
        reporter.stage(f"{what}{told}", done, total)

    return stage


class _Watch:
    """Seconds that an experiment took, those of earlier calls that did not end included."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.seconds = 0.0

    def __enter__(self) -> Self:
        self._began = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        from delible.files import read_json, write_json

        before = read_json(self.file)["seconds"] if self.file.exists() else 0.0
        self.seconds = round(before + time.perf_counter() - self._began, 1)
        write_json(self.file, {"seconds": self.seconds})


def _listed(annotation: Any, value: Any) -> Any:
    """The values of an option that takes several: parts between commas, or one alone."""
    if "tuple" not in str(annotation) or value is None or isinstance(value, list | tuple):
        return value
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return (value,)


def _check_options(suite: str, fields: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Offers the nearest flag, whether it is the benchmark's or the command's."""
    from inspect import signature

    own = {name for name in signature(bench).parameters if name not in ("suite", "options")}
    words = {name.replace("_", "-") for name in {*fields, *own}}
    for key in given.keys() - fields.keys():
        flag = key.replace("_", "-")
        close = difflib.get_close_matches(flag, words, n=1, cutoff=0.6)
        raise RecipeError(
            f"unknown option '--{flag}'.",
            where=f"benchmark '{suite}'",
            hint=f"Did you mean '--{close[0]}'?" if close else f"See 'delible show {suite}'.",
        )
