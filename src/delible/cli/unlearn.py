"""``delible unlearn``: makes a model forget."""

from __future__ import annotations

import difflib
import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from delible.cli import flags, output
from delible.cli.roles import read_roles
from delible.errors import DataError, RecipeError, nearest
from delible.watching import duration

if TYPE_CHECKING:
    from delible.finishing import UnlearnResult
    from delible.method import Method
    from delible.records import ForgetRequest


@flags.flowing
def unlearn(
    model: str,
    /,
    *,
    forget: flags.Data = None,
    subjects: flags.Subjects = None,
    retain: flags.Data = None,
    neighbours: flags.Data = None,
    holdout: flags.Data = None,
    column: flags.Several = None,
    drop_overlap: flags.DropOverlap = False,
    method: Annotated[str, Parameter(group=flags.METHOD)] = "npo",
    with_: Annotated[list[str] | None, Parameter(name="--with", group=flags.METHOD)] = None,
    strength: Annotated[
        Literal["gentle", "normal", "strong"] | None, Parameter(group=flags.METHOD)
    ] = None,
    anchor: Annotated[str | None, Parameter(group=flags.METHOD)] = None,
    reference: Annotated[str | None, Parameter(group=flags.METHOD)] = None,
    refusals: Annotated[str | None, Parameter(group=flags.METHOD)] = None,
    generator: Annotated[str | None, Parameter(group=flags.METHOD)] = None,
    generated: Annotated[Path | None, Parameter(group=flags.METHOD)] = None,
    learning_rate: Annotated[float | None, Parameter(group=flags.TRAINING)] = None,
    epochs: Annotated[int | None, Parameter(group=flags.TRAINING)] = None,
    max_steps: Annotated[int | None, Parameter(group=flags.TRAINING)] = None,
    batch_size: Annotated[int | None, Parameter(group=flags.TRAINING)] = None,
    generate: flags.Slot = None,
    select: flags.Slot = None,
    sample: flags.Slot = None,
    weigh: flags.Slot = None,
    place: flags.Slot = None,
    objective: flags.Slot = None,
    keep: flags.Slot = None,
    balance: flags.Slot = None,
    harden: flags.Slot = None,
    finish: flags.Slot = None,
    out: flags.Out = None,
    seed: flags.Seed = 0,
    role: flags.Roles = None,
    review: Annotated[bool, Parameter(group=flags.RUN, show_default=False)] = False,
    verify: Annotated[bool, Parameter(group=flags.RUN)] = True,
    dry_run: Annotated[bool, Parameter(group=flags.RUN, show_default=False)] = False,
    **options: Annotated[str, Parameter(group=flags.OTHER)],
) -> int:
    """Make a model forget, and keep the rest.

    Parameters
    ----------
    model
        default (SmolLM2-135M-Instruct), a name on the Hugging Face hub, a folder, the folder of
        an earlier run, or a .gguf file.
    forget
        Records to forget: JSONL, JSON, CSV or Parquet, '-' for standard input, or hf:owner/name.
    subjects
        Names of people, works or concepts to forget, separated by commas. Without --forget, a
        method that trains asks the model what it knows about them, and forgets that.
    retain
        Records to keep. Without them, methods that need some keep the model's own answers to
        general questions.
    neighbours
        Records close to the forgotten ones: kept, and watched by the audit.
    holdout
        Records of the same kind that the model never saw; only the audit uses them.
    column
        Your name of a known column, such as question=prompt. May be repeated.
    drop_overlap
        Drop rows from the other files that are also to be forgotten, instead of refusing.
    method
        Name of a method ('delible list methods'), NAME@paper for the schedule and weights of its
        paper ('delible show NAME' tells both), or a YAML file with a recipe of your own.
    with_
        Components by name, such as sam,wagle: each takes the place of its kind.
    strength
        The one dial: how far to go. It moves the point where a method stops (or its learning rate
        and epochs, if it has none).
    anchor
        The model whose values count as "before" in the loss. Default: MODEL itself.
    reference
        A model that never saw the forget records, if you have one: it is only measured, and tells
        how far along the way the result is.
    refusals
        A text file with one refusal sentence a line, for methods that teach refusals.
    generator
        What writes generated rows (false answers, questions, reasons) for methods that need some,
        and questions about names: a model like MODEL, or 'self' for MODEL before it forgets.
        Default: offline templates.
    generated
        A folder of generated rows to use instead of making any, such as the folder 'generated' of
        an earlier run, edited by you.
    learning_rate
        Peak learning rate of AdamW.
    epochs
        Passes over the forget rows, all of them; without this (and max_steps) a method stops by
        itself once the forget answers are improbable enough.
    max_steps
        Stop after this many optimiser steps, and not before.
    batch_size
        Forget rows per optimiser step.
    generate
        Which rows are made before training.
    select
        Which rows are used.
    sample
        In which order forget and retain rows meet.
    weigh
        How much a row counts.
    place
        Which parameters move.
    objective
        The forget loss.
    keep
        The retain loss.
    balance
        How the two losses become one update.
    harden
        Against what the result must hold.
    finish
        What happens after the last step.
    out
        Run directory. Default: runs/METHOD-HASH, the same for the same command, so that a killed
        run resumes when it is started again.
    seed
        Of every random choice.
    role
        Who plays a part by talking: judge=MODEL, writer=https://host/v1#MODEL (judge, writer,
        attacker, guard, critic, planner, translator), or a YAML file of such lines, which may also
        limit what is spent: 'judge: {system: MODEL, calls: 500, tokens: 200000}'. May be repeated.
    review
        With names alone: stop when the rows that the model was asked for are written, to be read
        and edited. The same command without it goes on with them.
    verify
        Open the saved result in a new process and ask three questions again: it must answer as
        shown.
    dry_run
        Train nothing: print the resolved recipe (YAML, on stdout), and the memory and the time
        that it would take.
    options
        Any other option of the method or of a slot: --beta 0.2, or --objective.beta 0.2 where the
        name alone is not clear. 'delible show npo' lists them.
    """
    slots = _slots(
        {
            "generate": generate, "select": select, "sample": sample, "weigh": weigh,
            "place": place, "objective": objective, "keep": keep, "balance": balance,
            "harden": harden, "finish": finish,
        },
        with_ or [],
    )  # fmt: skip
    training = {
        "learning_rate": learning_rate, "epochs": epochs, "max_steps": max_steps,
        "batch_size": batch_size,
    }  # fmt: skip
    given = {
        **{key: value for key, value in training.items() if value is not None},
        **{option_name(key): option_value(value) for key, value in options.items()},
    }
    roles = read_roles(role)
    with output.Reporter(error=dry_run) as reporter:
        request = read_request(
            reporter, forget=forget, subjects=subjects, retain=retain, neighbours=neighbours,
            holdout=holdout, column=column, drop_overlap=drop_overlap,
        )  # fmt: skip
        sentences = _refusals(refusals)
        reporter.say("Loading the libraries …")
        output.quiet_libraries()
        from delible import api
        from delible.resolving import resolve_method

        base = resolve_method(method, slots=slots)
        _check_options(base, given)
        chosen = resolve_method(method, slots=slots, options=given, strength=strength)
        plan = {
            "method": method, "slots": slots, "strength": strength, "seed": seed, **given,
        }  # fmt: skip
        if dry_run:
            return _dry_run(reporter, model, request, plan)
        spec = chosen.spec()
        folder = out or _folder(
            spec, model, request, seed, anchor, reference, sentences, generator, generated, roles
        )
        _announce(reporter, model, request, chosen, folder)
        began = time.perf_counter()
        result = api.unlearn(
            model, request, **plan, out=folder, anchor=anchor, reference=reference,
            refusals=sentences, generator=generator, generated=generated, review=review,
            roles=roles, verify=verify, progress=reporter.progress(), stage=reporter.stage,
        )  # fmt: skip
        reporter.finish_bar()
        if result.to_review is not None:
            reporter.say(
                f"Nothing was trained yet. Read and edit {result.to_review}; the same command "
                "without --review goes on with what is there."
            )
            return 0
        _conclude(reporter, result, folder, time.perf_counter() - began)
    return 0


# ---- the data


def read_request(
    reporter: output.Reporter,
    *,
    forget: str | Path | None,
    subjects: Sequence[str] | None,
    retain: str | Path | None,
    neighbours: str | Path | None,
    holdout: str | Path | None,
    column: Sequence[str] | None,
    drop_overlap: bool,
) -> ForgetRequest:
    """The request that the data flags describe."""
    if forget is None and not subjects:
        raise DataError(
            "there is nothing to forget.",
            hint="Add --forget FILE with records, or --subjects NAME,… with names.",
        )
    from delible.loaders import build_request

    names = [name for given in subjects or () for name in given.split(",") if name.strip()]
    return build_request(
        forget=forget, subjects=names, retain=retain, neighbours=neighbours, holdout=holdout,
        columns=_columns(column or ()), drop_overlap=drop_overlap,
    )  # fmt: skip


def _columns(given: Iterable[str]) -> dict[str, str]:
    columns = {}
    for pair in given:
        known, equals, theirs = (part.strip() for part in pair.partition("="))
        if not (known and equals and theirs):
            raise DataError(
                f"'{pair}' is no pair of columns.",
                where="--column",
                hint="Write the known name first: --column question=prompt.",
            )
        columns[known] = theirs
    return columns


def _refusals(path: str | None) -> list[str] | None:
    if path is None:
        return None
    from delible.loaders import read_lines

    return read_lines(path)


# ---- the method


def option_name(flag: str) -> str:
    """The option that a flag names: a hyphen for every underscore, a colon for the dot."""
    return flag.replace("-", "_").replace(":", ".")


def option_value(text: str) -> Any:
    """A value as YAML reads it: numbers, true and false, null, lists."""
    import yaml

    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if isinstance(value, str):
        try:  # YAML 1.1 takes 1e-5 for a text
            return float(value)
        except ValueError:
            return text
    return value


def _slots(flags: Mapping[str, str | None], components: Sequence[str]) -> dict[str, Any]:
    slots = {slot: component(value) for slot, value in flags.items() if value is not None}
    names = [name.strip() for given in components for name in given.split(",") if name.strip()]
    if not names:
        return slots
    from delible import registry
    from delible.cards import SLOTS

    homes: dict[str, list[str]] = {}
    for card in registry.cards(*SLOTS):  # type: ignore[arg-type]
        homes.setdefault(card.name, []).append(card.kind)
    for name in names:
        found = homes.get(name, [])
        if not found:
            hint = nearest(name, homes)
            raise RecipeError(
                f"unknown component '{name}'.",
                where="--with",
                hint=hint if hint.startswith("Did") else "'delible list slots' lists them all.",
            )
        if len(found) > 1:
            flags_for_it = " or ".join(f"--{kind} {name}" for kind in found)
            raise RecipeError(
                f"'{name}' is a name in several slots.", where="--with", hint=f"Say {flags_for_it}."
            )
        slot = found[0]
        if slot in slots:
            raise RecipeError(
                f"'{name}' and '{slots[slot]}' both are choices for the slot '{slot}'.",
                where="--with",
                hint="Name one of them.",
            )
        slots[slot] = name
    return slots


def component(text: str) -> Any:
    """A component by name, or as a YAML mapping: ``{name: npo, beta: 0.2}``."""
    value = option_value(text) if text.lstrip().startswith("{") else text
    return value if isinstance(value, dict) else text


def names_in(given: Sequence[str] | None) -> list[str]:
    """Names separated by commas, of a flag that may be repeated."""
    return [name.strip() for text in given or () for name in text.split(",") if name.strip()]


def components(given: Sequence[str] | None) -> list[Any]:
    """Components of a flag that may be repeated: names separated by commas, or a mapping each."""
    found: list[Any] = []
    for text in given or ():
        found += [component(text)] if text.lstrip().startswith("{") else names_in([text])
    return found


def _check_options(base: Method, given: Mapping[str, Any]) -> None:
    """Offers the nearest flag, whether it is the method's or the command's."""
    from inspect import signature

    spec = base.spec()
    parts = [spec, *(part for part in spec.values() if isinstance(part, dict))]
    known = {key for part in parts for key, value in part.items() if not isinstance(value, dict)}
    known -= {"name"}
    own = {name.strip("_") for name in signature(unlearn).parameters} - {"model", "options"}
    for option in given:
        key = option.rpartition(".")[2]
        if key in known:
            continue
        flags = {name.replace("_", "-") for name in known | own}
        close = difflib.get_close_matches(key.replace("_", "-"), flags, n=1, cutoff=0.6)
        name = str(spec["name"])
        hint = f"Did you mean '--{close[0]}'?" if close else f"'delible show {name}' lists them."
        raise RecipeError(
            f"unknown option '--{option.replace('_', '-')}'.", where=f"method '{name}'", hint=hint
        )


# ---- what is told


def _folder(
    spec: Mapping[str, Any],
    model: str,
    request: ForgetRequest,
    seed: int,
    anchor: str | None,
    reference: str | None,
    refusals: Sequence[str] | None,
    generator: str | None,
    generated: Path | None,
    roles: Mapping[str, Any] | None = None,
) -> Path:
    """The same for the same command and data, so that a killed run is found again."""
    content = [spec, model, request.id, seed, anchor, refusals]
    content += [generator, generated]
    content += [] if reference is None else [reference]
    content += [roles] if roles else []
    text = json.dumps(content, sort_keys=True, default=str)
    return Path("runs") / f"{spec['name']}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _announce(
    reporter: output.Reporter,
    model: str,
    request: ForgetRequest,
    chosen: Method,
    folder: Path,
) -> None:
    spec = chosen.spec()
    parts = [
        f"{slot} {spec[slot]['name']}"
        for slot in ("generate", "objective", "keep", "place", "harden", "finish")
        if isinstance(spec.get(slot), dict) and spec[slot]["name"] not in ("none", "all")
    ]
    rows = [
        output.plural(len(found), f"{name} row")
        for name, found in (
            ("forget", request.forget), ("retain", request.retain),
            ("neighbour", request.neighbours), ("holdout", request.holdout),
        ) if found
    ]  # fmt: skip
    if request.subjects:
        rows.append(output.plural(len(request.subjects), "subject"))
    reporter.field("model", model)
    reporter.field("data", ", ".join(rows))
    made_of = f" ({', '.join(parts)})" if parts else ""
    reporter.field("method", f"{spec['name']}{made_of}")
    training = spec.get("training")
    if training:
        reporter.field("training", _length(training))
    reporter.field("folder", str(folder))


def _length(training: Mapping[str, Any]) -> str:
    """How long and how fast, in words."""
    length = (
        f"{training['max_steps']} steps at most"
        if training["max_steps"]
        else output.plural(training["epochs"], "epoch")
    )
    if training["least_steps"]:
        length += f" (at least {training['least_steps']} steps)"
    if share := training["stop_at_forget_share"]:
        length = f"until forget answers are {share:.0%} as probable, {length} at most"
    rate = f"learning rate {training['learning_rate']:g}"
    if width := training["learning_rate_width"]:
        rate += f" at a width of {width}"
    return f"{length}, {rate}"


def _conclude(
    reporter: output.Reporter, result: UnlearnResult, folder: Path, seconds: float
) -> None:
    if result.examples:
        reporter.console.print(output.before_after(result.examples))
    if result.stopped:
        reporter.say(f"Stopped early: {result.stopped}.")
    if not result.resumed_finished:
        moved = result.notes.get("parameters")
        steps = result.notes.get("steps")
        words = [
            f"{output.count(moved)} parameters were trained" if moved else "",
            f"{steps} steps" if steps else "",
            f"{duration(seconds)} in all",
        ]
        reporter.say(", ".join(word for word in words if word).capitalize() + ".")
    if result.achieved is not None:
        reporter.say(result.achieved.sentence())
    reporter.say(_where(folder))
    reporter.say(f"Its page, for a browser: {_page(folder)}")
    reporter.say("Next, see how deep the forgetting goes:")
    reporter.say(f"  delible audit {folder}")


def _where(folder: Path) -> str:
    """What lies where, and what opens it."""
    from delible.system.artefact import read

    artefact = read(folder)
    if artefact.kind == "model":
        return f"The result lies in {folder / 'model'} (safetensors and tokenizer)."
    base = artefact.base.name if artefact.base else "its base"
    return (
        f"The result lies in {folder}: the {artefact.kind} alone, on {base}; delible.open opens "
        "both, 'delible merge' makes a plain model of them where that can be, and 'delible undo' "
        "takes it off."
    )


def _page(folder: Path) -> Path:
    """Writes the run's page, unless there is one already (of an audit, perhaps)."""
    from delible.report import PAGE, write_page

    path = folder / PAGE
    return path if path.exists() else write_page(folder)


def _dry_run(
    reporter: output.Reporter, model: str, request: ForgetRequest, plan: dict[str, Any]
) -> int:
    import yaml

    from delible import api

    spec, cost = api.plan_of(model, request, **plan)
    trains = "objective" in spec
    print(yaml.safe_dump(spec, sort_keys=False, allow_unicode=True), end="", flush=True)
    if cost is None and trains:
        reporter.say(
            "How long it takes depends on what the model knows about the names: --review asks it "
            "and stops."
        )
        return 0
    if cost is None:
        reporter.say("Nothing is trained: seconds per subject, at most.")
        return 0
    reporter.field("steps", f"{cost.steps:,}")
    reporter.field("tokens", f"{cost.tokens:,}")
    reporter.field("trainable", f"{output.count(cost.trainable)} parameters")
    reporter.field("memory", f"about {max(cost.memory_gib, 0.1):.1f} GiB")
    reporter.field("time", f"about {duration(cost.minutes * 60)} on this machine")
    reporter.say(
        "Nothing was trained. The recipe on stdout can be given back as --method FILE.yaml."
    )
    return 0
