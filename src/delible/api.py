"""The Python API: what the command line does, as functions with the same names."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delible import finishing, preparing
from delible.achieved import Achieved, Measured, as_metrics, compare, probabilities
from delible.context import Context
from delible.errors import RecipeError
from delible.files import atomic_file
from delible.finishing import SHOWN, UnlearnResult
from delible.generation import elicited
from delible.lm.lm import LM
from delible.measure.starting import started, with_writer
from delible.method import Method
from delible.planning import plan_of
from delible.precision import BasePrecision
from delible.records import ForgetRequest, digest
from delible.resolving import resolve_method
from delible.rundir import RunDirectory
from delible.system.base import System
from delible.system.roles import Player
from delible.systems.opening import merge, open_lm, open_system, undo
from delible.train import generated as generated_rows
from delible.train.engine import MERGED_FIRST
from delible.train.method import GradientMethod
from delible.train.needs import check_base
from delible.train.recipe import Recipe, Strength
from delible.train.savings import phase
from delible.watching import Stage, Steps

if TYPE_CHECKING:
    from delible.audit.result import SystemRole

logger = logging.getLogger(__name__)


def load(name: str = "default", **options: Any) -> LM:
    """Loads a model: ``"default"``, a hub id, a folder, a run directory or a ``.gguf`` file."""
    return LM.load(name, **options)


def open(
    name: str, *, model: str | None = None, roles: Mapping[str, Player] | None = None
) -> System:
    """Opens what answers: the result of any run, a model, an endpoint.

    Args:
        name: A run directory or another artefact's folder, what :func:`load` takes, or the
            address of an OpenAI-compatible server.
        model: Name of the model at an address.
        roles: Whom a guard among them consults by talking, as for :func:`unlearn`; None: whom it
            was made with.

    Raises:
        DelibleError: It cannot be used; says what to do.
    """
    return open_system(name, model=model, context=started(None, roles=roles))


def unlearn(
    model: str | System,
    request: ForgetRequest,
    *,
    method: str | Method | Recipe | Path = "npo",
    slots: Mapping[str, Any] | None = None,
    strength: Strength | None = None,
    out: Path | str | None = None,
    seed: int = 0,
    anchor: str | LM | None = None,
    reference: str | LM | None = None,
    refusals: Sequence[str] | None = None,
    generator: Player | None = None,
    generated: Path | str | None = None,
    review: bool = False,
    shown: int = SHOWN,
    measured: bool = True,
    verify: bool = True,
    progress: Steps | None = None,
    stage: Stage | None = None,
    roles: Mapping[str, Player] | None = None,
    context: Context | None = None,
    **options: Any,
) -> UnlearnResult:
    """Makes a model forget.

    Args:
        model: A name for :func:`open`, or a system; an :class:`LM` is changed in place.
        request: What to forget; see :class:`ForgetRequest`. With subjects alone, a recipe gets
            its forget rows from the model: what it knows about them is asked for, and kept in
            ``RUN/data/forget.jsonl``.
        method: Name of a recipe, an editor, a procedure or a guard, a YAML file, or the method
            itself.
        slots: Other components for single slots, such as ``{"harden": "sam"}`` (recipes).
        strength: The one dial: gentle, normal or strong (recipes).
        out: Run directory; a killed run resumes from it. None keeps nothing on disk.
        seed: Of every random choice.
        shown: Forget and retain questions that are answered before and after.
        measured: Measure forget, retain and neighbour answers before and after
            (:class:`delible.achieved.Achieved`).
        verify: Open what was saved in a new process and ask it again; it must answer as shown.
        anchor: The model whose values count as "before" in the loss; None is the start model.
        reference: A model that never saw the forget records; only measured, to tell how far
            along the way the result is.
        refusals: Refusal sentences for methods that teach refusals; None: the built-in ones.
        generator: What writes generated rows, for methods that need some: a name for
            :func:`load`, ``"self"`` (the model before it forgets), or any system. None: offline
            templates do. The same as the role ``writer``.
        generated: A folder with generated rows, such as ``generated/`` of an earlier run, to be
            used instead of generating any.
        progress: Called after every step as ``progress(step, total, numbers)``.
        stage: Called as ``stage(title, done, total)`` by what takes long beside the steps.
        roles: Who writes (and judges, …) by talking: by role a system, a name, ``"self"``, or
            options such as ``{"system": "https://host/v1#MODEL", "calls": 500}``.
        context: All of seed, progress, stage and roles, made before; instead of them.
        review: Where forget rows are asked for: stop when they are written. The same call
            without it goes on with them, edited or not.
        options: Options by name, such as ``beta=0.2`` or ``epochs=5``.

    Raises:
        DelibleError: Bad input, told in one message.
    """
    chosen = resolve_method(method, slots=slots, options=options, strength=strength)
    chosen = _with_given(chosen, anchor, refusals, generated)
    context = started(
        context, seed=seed, run=None if out is None else RunDirectory(out), steps=progress,
        stage=stage, roles=with_writer(roles, generator),
    )  # fmt: skip
    run = context.run
    recipe = chosen.recipe if isinstance(chosen, GradientMethod) else None
    with phase("loading the model", recipe):
        system = _opened(model, chosen)
    kind = system.device_type if isinstance(system, LM) else "cpu"
    context = replace(context, roles=context.roles.with_itself(system))
    if review:
        preparing.check_review(chosen, request, context)
    request = preparing.prepared(system, request, chosen, context)
    described = _described(system, request, chosen, context, reference)
    if run is not None and run.begin(described):
        logger.info(f"{run.path} holds this run already, finished.")
        return finishing.finished(run)
    if preparing.elicits(chosen, request):
        request = preparing.with_forget_rows(system, request, context, review=review)
        if review and run is not None:
            return UnlearnResult(system, run.path, [], to_review=elicited.place(run))
    start = finishing.Start.of(system)
    if start.chain and request.predecessor is None:
        request = request.model_copy(update={"predecessor": start.chain[-1].request})
    asked = finishing.asked(request, shown)
    found: dict[SystemRole, Measured] = {}
    with phase("answering", recipe, kind):
        before = finishing.answers(system, asked)
        if measured:
            found["original"] = probabilities(system, request)
            if reference is not None:
                never = open_system(reference) if isinstance(reference, str) else reference
                found["reference"] = probabilities(never, request)
                del never
    began = time.perf_counter()
    with phase("training", recipe, kind):
        outcome = chosen.apply(system, request, context)
    seconds = time.perf_counter() - began
    with phase("answering", recipe, kind):
        after = finishing.answers(outcome.system, asked)
        if measured:
            found["unlearned"] = probabilities(outcome.system, request)
    result = UnlearnResult(
        outcome.system,
        None if run is None else run.path,
        finishing.compared(asked, before, after),
        outcome.history,
        outcome.stopped,
        outcome.notes,
    )
    if measured:
        changes = compare(found["original"], found["unlearned"], found.get("reference"))
        words = chosen.more_and_less(outcome.system)
        result.achieved = Achieved(changes, *words, teaches=chosen.teaches, earlier=outcome.earlier)
    if isinstance(result.system, LM):
        result.system.gather()  # all processes give their shares, the first one keeps the model
    if run is not None and run.writes:
        with phase("saving", recipe, kind):
            finishing.keep(run, outcome, result, start, request, asked, seconds, verify=verify)
        if found:
            metrics = as_metrics(found, request, context.seed)
            with atomic_file(run.path / "metrics.json") as handle:
                handle.write(metrics.model_dump_json(indent=2))
        run.release()
    return result


# ---- parts of unlearn


def _opened(model: str | System, method: Method) -> System:
    """The system that is to forget; an adapter that it wears is merged where weights will change.

    What is changed then, by training or by an editor, is what is saved.
    """
    held: BasePrecision = "float32"
    if isinstance(method, GradientMethod):
        check_base(method.recipe)
        held = method.recipe.training.base_precision
    system = open_system(model, base_precision=held) if isinstance(model, str) else model
    if method.needs_model and isinstance(system, LM):
        if system.wears_adapter and not method.keeps_adapter:
            system.merge_adapter()
            logger.info(MERGED_FIRST)
        system.hold(held)
    return system


def _with_given(
    method: Method,
    anchor: str | LM | None,
    refusals: Sequence[str] | None,
    generated: Path | str | None,
) -> Method:
    """The method with what it takes beside the records."""
    given = {"anchor": anchor, "refusals": refusals, "generated": generated}
    named = [name for name, value in given.items() if value is not None]
    if not named:
        return method
    if not isinstance(method, GradientMethod):
        raise RecipeError(
            f"'{method.name}' does not train: it takes no {' and no '.join(named)}.",
            hint=f"Leave out {', '.join(named)}.",
        )
    return replace(
        method,
        anchor=open_lm(anchor) if isinstance(anchor, str) else anchor,
        refusals=refusals,
        generated=None if generated is None else generated_rows.read(Path(generated)),
    )


def _described(
    system: System,
    request: ForgetRequest,
    method: Method,
    context: Context,
    reference: str | LM | None,
) -> dict[str, Any]:
    """Everything that determines the result."""
    writer = context.plays("writer") if method.needs_model else None
    return {
        "command": "unlearn",
        "model": system.name,
        "model_fingerprint": system.fingerprint,
        "method": method.spec(),
        "seed": context.seed,
        **method.given(),
        "reference": reference if isinstance(reference, str | None) else reference.name,
        "subjects": list(request.subjects),
        "generator": None if writer is None else [writer.name, writer.fingerprint],
        "data": {
            name: {"records": len(records), "sha256": digest(records)}
            for name, records in (
                ("forget", request.forget),
                ("retain", request.retain),
                ("neighbours", request.neighbours),
                ("holdout", request.holdout),
            )
        },
    }


__all__ = ["UnlearnResult", "load", "merge", "open", "plan_of", "undo", "unlearn"]
