"""``delible unlearn``: makes a model forget."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from delible.cli import flags, output, sequence
from delible.cli.data import read_refusals, read_request
from delible.cli.options import check_options, chosen_slots, option_name, option_value
from delible.cli.roles import read_roles
from delible.cli.unlearned import announce, conclude
from delible.errors import RecipeError
from delible.watching import duration

if TYPE_CHECKING:
    from delible.records import ForgetRequest


@flags.flowing
def unlearn(
    model: str,
    /,
    *,
    forget: flags.Data = None,
    subjects: flags.Subjects = None,
    requests: Annotated[Path | None, Parameter(group=flags.DATA)] = None,
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
    memory: Annotated[str | None, Parameter(group=flags.RUN)] = None,
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
    requests
        Many requests instead of one, carried out one after the other: a file whose rows are
        requests (rows with the same id are one; columns of records, or subjects), or a folder with
        a file of records for each. After each, all earlier ones are measured again.
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
        So many optimiser steps at most: fewer where --epochs, or the passes of the method, are over
        before. What was forgotten by then does not end it.
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
        that it would take. No weights are loaded: a model's settings are enough.
    memory
        With --dry-run: a device's memory, such as 24GB (10^9 bytes each) or 80GiB: which options
        make the run fit it, and with how large micro-batches.
    options
        Any other option of the method or of a slot: --beta 0.2, or --objective.beta 0.2 where the
        name alone is not clear. 'delible show npo' lists them.
    """
    slots = chosen_slots(
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
    plan = {"method": method, "slots": slots, "strength": strength, "seed": seed, **given}
    if requests is not None:
        sequence.refuse({
            "forget": forget, "subjects": subjects, "neighbours": neighbours, "holdout": holdout,
            "column": column, "reference": reference, "generated": generated, "review": review,
            "dry_run": dry_run, "memory": memory,
        })  # fmt: skip
    with output.Reporter(error=dry_run) as reporter:
        if requests is not None:
            output.quiet_libraries()
            from delible.resolving import resolve_method

            check_options(resolve_method(method, slots=slots), given, unlearn)
            chosen = resolve_method(method, slots=slots, options=given, strength=strength)
            return sequence.run(
                reporter, model, requests, plan, chosen=chosen, retain=retain, out=out,
                given={"anchor": anchor, "refusals": read_refusals(refusals),
                       "generator": generator},
                roles=roles, verify=verify,
            )  # fmt: skip
        request = read_request(
            reporter, forget=forget, subjects=subjects, retain=retain, neighbours=neighbours,
            holdout=holdout, column=column, drop_overlap=drop_overlap,
        )  # fmt: skip
        sentences = read_refusals(refusals)
        reporter.say("Loading the libraries …")
        output.quiet_libraries()
        from delible import api
        from delible.resolving import resolve_method
        from delible.rundir import RunDirectory

        base = resolve_method(method, slots=slots)
        check_options(base, given, unlearn)
        chosen = resolve_method(method, slots=slots, options=given, strength=strength)
        if memory is not None and not dry_run:
            raise RecipeError("--memory belongs to --dry-run.", where="--memory")
        if dry_run:
            return _dry_run(reporter, model, request, plan, memory)
        spec = chosen.spec()
        folder = out or _folder(
            spec, model, request, seed, anchor, reference, sentences, generator, generated, roles
        )
        announce(reporter, model, request, chosen, folder)
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
        if RunDirectory(folder).writes:  # of several processes the first one keeps and tells it
            conclude(reporter, result, folder, time.perf_counter() - began)
    return 0


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


def _dry_run(
    reporter: output.Reporter,
    model: str,
    request: ForgetRequest,
    plan: dict[str, Any],
    memory: str | None,
) -> int:
    import yaml

    from delible import planning

    limit = None if memory is None else planning.read_memory(memory)
    spec, cost = planning.plan_of(model, request, **plan)
    trains = "objective" in spec
    print(yaml.safe_dump(spec, sort_keys=False, allow_unicode=True), end="", flush=True)
    if cost is None and trains:
        reporter.say(
            "How long it takes depends on what the model knows about the names: --review asks it "
            "and stops."
        )
        return 0
    if cost is None and "procedure" in spec:
        reporter.say(
            f"It runs in stages ('delible show {spec['procedure']['name']}'); how long they take "
            "depends on what the first ones find."
        )
        return 0
    if cost is None:
        reporter.say("Nothing is trained: seconds per subject, at most.")
        return 0
    told = {
        "steps": f"{cost.steps:,}",
        "tokens": f"{cost.tokens:,}",
        "trainable": f"{output.count(cost.trainable)} parameters",
        "memory": f"about {max(cost.memory_gib, 0.01):.2f} GiB at most",
    }
    for name, size in cost.memory.parts().items():
        told[f"  {name}"] = f"{size / 2**30:.3f} GiB"
    told["micro-batch"] = f"{cost.micro_batch_tokens:,} tokens"
    told["time"] = f"about {duration(cost.minutes * 60)} on this machine"
    for name, value in told.items():
        reporter.field(name, value, width=2 + max(map(len, told)))
    for note in cost.notes:
        reporter.say(note)
    if limit is not None:
        reporter.heading(f"In {limit / 2**30:.1f} GiB")
        for line in planning.shown(planning.ways_to_fit(model, request, limit, **plan), limit):
            reporter.say(line)
    reporter.say(
        "Nothing was trained. The recipe on stdout can be given back as --method FILE.yaml."
    )
    return 0
