"""``delible tune``: searches a method's options under a utility budget."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from delible.cli import flags, output, tables
from delible.cli.data import read_request
from delible.cli.options import option_name, option_value
from delible.cli.roles import read_roles
from delible.errors import EXIT_DONE, EXIT_THRESHOLD_FAILED

if TYPE_CHECKING:
    from delible.tune import TuneResult


@flags.flowing
def tune(
    model: str,
    /,
    *,
    forget: flags.Data = None,
    subjects: flags.Subjects = None,
    retain: flags.Data = None,
    neighbours: flags.Data = None,
    column: flags.Several = None,
    drop_overlap: flags.DropOverlap = False,
    method: Annotated[str, Parameter(group=flags.METHOD)] = "npo",
    hold: Annotated[list[str] | None, Parameter(group=flags.METHOD)] = None,
    refusals: Annotated[str | None, Parameter(group=flags.METHOD)] = None,
    generator: Annotated[str | None, Parameter(group=flags.METHOD)] = None,
    generated: Annotated[Path | None, Parameter(group=flags.METHOD)] = None,
    utility: Annotated[float, Parameter(group=flags.THRESHOLDS)] = 0.95,
    trials: Annotated[int, Parameter(group=flags.RUN)] = 20,
    jobs: flags.Jobs = 1,
    ray: flags.Ray = False,
    cpus: flags.Cpus = None,
    out: flags.Out = None,
    seed: flags.Seed = 0,
    role: flags.Roles = None,
    **options: Annotated[str, Parameter(group=flags.OTHER)],
) -> int:
    """Search a method's options for the least leak that keeps the utility.

    Parameters
    ----------
    model
        default (SmolLM2-135M-Instruct), a name on the Hugging Face hub, a folder, the folder of
        an earlier run, or a .gguf file.
    forget
        Records to forget: JSONL, JSON, CSV or Parquet, '-' for standard input, or hf:owner/name.
        All are unlearned in every trial; half of them decide.
    subjects
        Names of people, works or concepts to forget, separated by commas, for editors.
    retain
        Records to keep. Half of them are trained on; of the others, half decide. Without them,
        the model's own answers to general questions are kept.
    neighbours
        Records close to the forgotten ones: kept and measured like retain records.
    column
        Your name of a known column, such as question=prompt. May be repeated.
    drop_overlap
        Drop rows from the other files that are also to be forgotten, instead of refusing.
    method
        Name of a method ('delible list methods'), NAME@paper to start from its paper's numbers, or
        a YAML file with a recipe of your own, which may name ranges:
        'tune: {beta: [0.05, 0.5, log]}'.
    hold
        Options that are not searched, separated by commas.
    refusals
        A text file with one refusal sentence a line, for methods that teach refusals.
    generator
        What writes generated rows for methods that need some: a model, or 'self'. Default:
        offline templates.
    generated
        A folder of generated rows to use instead of making any.
    utility
        Share of the start model's utility that is to be kept. When no trial keeps it, the exit
        code is 1.
    trials
        How often to unlearn and measure; the first one is the method as it is. More trials than
        OUT holds already are added to it.
    jobs
        Trials at once, in processes on this machine. Each is proposed without the results of those
        that are under way, so that more at once find less in as many trials.
    ray
        Trials at once on a Ray cluster (or on this machine, by Ray): one GPU each where there are
        GPUs, at most a quarter of all trials at once. Its machines must see the model and the
        cache.
    cpus
        CPUs that each trial takes on the cluster. Default: a GPU's share of them, or 4.
    out
        Where results go; the same command goes on there. Default: runs/tune-METHOD-HASH.
    seed
        Of the search, and of every random choice of a trial.
    role
        Who plays a part by talking: judge=MODEL, writer=https://host/v1#MODEL (judge, writer,
        attacker, guard, critic, planner, translator), or a YAML file of such lines, which may also
        limit what is spent: 'judge: {system: MODEL, calls: 500, tokens: 200000}'. May be repeated.
    options
        Any option of the method or of a slot, such as --beta 0.2: set, and not searched.
    """
    given = {option_name(key): option_value(value) for key, value in options.items()}
    held = [option_name(name.strip()) for text in hold or () for name in text.split(",") if name]
    roles = read_roles(role)
    with output.Reporter() as reporter:
        request = read_request(
            reporter, forget=forget, subjects=subjects, retain=retain, neighbours=neighbours,
            holdout=None, column=column, drop_overlap=drop_overlap,
        )  # fmt: skip
        sentences = _lines(refusals)
        reporter.say("Loading the libraries …")
        output.quiet_libraries()
        from delible.kept import identity
        from delible.report.tuning import write_search
        from delible.resolving import resolve_method
        from delible.rundir import RunDirectory
        from delible.tune import tune as search

        chosen = resolve_method(method, options=given)
        described = {
            "method": chosen.spec(), "model": model, "data": request.id,
            "seed": seed, "utility": utility, "hold": sorted([*held, *given]),
            "given": [sentences, generator, str(generated), *([roles] if roles else [])],
        }  # fmt: skip
        name = str(chosen.spec()["name"])
        folder = out or Path("runs") / f"tune-{name}-{identity(described)[:8]}"
        reporter.field("model", model)
        reporter.field("method", name)
        reporter.field("search", f"{output.plural(trials, 'trial')}, utility {utility:g} or more")
        reporter.field("folder", str(folder))
        found = search(
            model, request, method=method, trials=trials, utility=utility, seed=seed, out=folder,
            hold=held, refusals=sentences, generator=generator, generated=generated,
            roles=roles, progress=reporter.stage, jobs=jobs, ray=ray, cpus=cpus, **given,
        )  # fmt: skip
        reporter.finish_bar()
        page = write_search(folder / "tune.html", found, RunDirectory(folder).manifest)
        return _conclude(reporter, found, model, page)


def _lines(path: str | None) -> list[str] | None:
    if path is None:
        return None
    from delible.loaders import read_lines

    return read_lines(path)


def _conclude(reporter: output.Reporter, found: TuneResult, model: str, page: Path) -> int:
    reporter.console.print(output.table(
        ("trial", *(name.rpartition(".")[2].replace("_", " ") for name in found.space),
         "leak", "utility", ""),
        [_row(found, index) for index in range(len(found.trials))],
    ))  # fmt: skip
    for note in found.notes:
        reporter.say(note)
    best = found.best
    told = f"leak {best.leak:.3f} (before: {found.start_leak:.3f}), utility {best.utility:.3f}"
    if best.aside_leak is not None and best.aside_utility is not None:
        told += f"; on records set aside {best.aside_leak:.3f} and {best.aside_utility:.3f}"
    if found.within_budget:
        reporter.say(f"The winner is trial {best.index + 1}: {told}.")
    else:
        reporter.say(f"No trial keeps a utility of {found.budget:g}.")
        reporter.say(f"The nearest is trial {best.index + 1}: {told}.")
    reporter.field("page", str(page.resolve()))
    reporter.field("options", str((found.recipe_path or Path()).resolve()))
    reporter.say("Use it on all records:")
    reporter.say(f"  delible unlearn {model} --forget … {found.command}")
    return EXIT_DONE if found.within_budget else EXIT_THRESHOLD_FAILED


def _row(found: TuneResult, index: int) -> list[Any]:
    trial = found.trials[index]
    mark = "failed" if trial.failed else "" if trial.keeps(found.budget) else "below the budget"
    if index == found.best.index and not mark:
        mark = "the winner"
    return [
        str(index + 1), *(f"{value:g}" for value in trial.options.values()),
        tables.cell(trial.leak), tables.cell(trial.utility), mark,
    ]  # fmt: skip
