"""The Python API: what the command line does, as functions with the same names."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from delible import registry, reload
from delible.achieved import (
    Achieved,
    Measured,
    advice,
    as_metrics,
    compare,
    probabilities,
    teaches,
)
from delible.component import build
from delible.edit.base import Editor, Patch
from delible.errors import RecipeError, RunError, nearest
from delible.files import atomic_file
from delible.generation import elicited
from delible.generation.writing import open_writer
from delible.lm.lm import LM
from delible.measure.engine import measure
from delible.records import QA, ForgetRequest, RecordBase, digest
from delible.rundir import RunDirectory, identity
from delible.system.asks import Decoding, Generate, Prompt
from delible.system.base import System
from delible.system.questions import answer_of, ask, has_answer
from delible.train import generated as generated_rows
from delible.train.engine import MERGED_FIRST, Trainer, check_needs
from delible.train.estimate import Estimate, estimate
from delible.train.generated import Generated
from delible.train.loop import Progress
from delible.train.plan import make_plan
from delible.train.reach import check_reach
from delible.train.recipe import Recipe, Strength, read_yaml
from delible.watching import Stage, unwatched

if TYPE_CHECKING:
    from delible.audit.result import SystemRole

Say = Callable[[str], None]
#: Questions per split that are answered before and after.
SHOWN = 3
#: Length of a shown answer, in tokens.
SHOWN_TOKENS = 48
#: Rows of an automatic retain set.
AUTOMATIC_RETAIN = 96
#: In the place of forget rows that the model has not been asked for yet.
_STANDS_IN = (QA(question="?", answer="?"),)


def _quiet(_: str) -> None:
    """Says nothing."""


@dataclass(frozen=True)
class BeforeAfter:
    """One question with the answers of the model before and after."""

    split: str
    question: str
    expected: str
    before: str
    after: str


@dataclass
class UnlearnResult:
    """What :func:`unlearn` made.

    Attributes:
        model: The unlearned model.
        folder: The run directory, if one was asked for.
        examples: Answers before and after.
        history: Numbers of every training step (empty for editors).
        patch: The removable edit (editors only).
        achieved: Answer probabilities before and after; None if they were not measured.
        to_review: The rows to look at and edit before training (with ``review``).
    """

    model: LM
    folder: Path | None
    examples: list[BeforeAfter]
    history: list[dict[str, float]] = field(default_factory=list)
    stopped: str | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    patch: Patch | None = None
    achieved: Achieved | None = None
    resumed_finished: bool = False
    to_review: Path | None = None


def load(name: str = "default", **options: Any) -> LM:
    """Loads a model: ``"default"``, a hub id, a folder, a run directory or a ``.gguf`` file."""
    return LM.load(name, **options)


def resolve_method(
    method: str | Recipe | Path,
    *,
    slots: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    strength: Strength | None = None,
) -> Recipe | Editor:
    """A recipe or an editor from a name or a YAML file, with slots and options changed.

    ``npo@paper`` is the method with its paper's own schedule and weights.

    Raises:
        RecipeError: Unknown method, slot value or option (the nearest name is offered), or a
            strength next to options that it would set.
    """
    options = options or {}
    names = {card.name: card.kind for card in registry.cards("recipe", "editor")}
    name, preset = registry.split_preset("" if isinstance(method, Recipe) else str(method))
    if isinstance(method, Recipe):
        recipe = method
    elif name.endswith((".yaml", ".yml")):
        content = read_yaml(Path(name))
        if "editor" in content:
            return _editor({**content["editor"], **options}, slots, preset)
        recipe = Recipe.from_file(str(method))
    elif name not in names:
        raise RecipeError(f"unknown method '{name}'.", hint=nearest(name, names))
    elif names[name] == "editor":
        return _editor({"name": name, **options}, slots, preset)
    else:
        recipe = Recipe.named(str(method))
    if strength is not None:
        taken = {key.rpartition(".")[2] for key in options} & {"learning_rate", "epochs"}
        if taken:
            raise RecipeError(
                f"--strength sets {' and '.join(sorted(taken))} already.",
                hint="Give either the strength or the numbers.",
            )
        recipe = recipe.with_strength(strength)
    return recipe.changed(slots or {}, options)


def _editor(spec: dict[str, Any], slots: dict[str, Any] | None, preset: str | None) -> Editor:
    if preset is not None:
        raise RecipeError(
            f"'{spec['name']}' is a closed-form editor: it has no presets.",
            hint=f"Say '{spec['name']}' alone.",
        )
    if slots:
        raise RecipeError(
            f"'{spec['name']}' is a closed-form editor: it has no slots.",
            hint=f"Drop {', '.join(sorted(slots))}.",
        )
    return cast(Editor, build("editor", spec))


def automatic_retain(
    lm: LM, count: int, say: Say, stage: Stage = unwatched
) -> tuple[RecordBase, ...]:
    """A retain set from the model itself: general questions with its own answers.

    Nothing is taught that the model did not say before; what is protected is its behaviour.
    """
    from delible.world import general

    questions = general()[:count]
    say(
        f"No retain records were given: keeping the model's own answers to {len(questions)} "
        "general questions instead (--retain FILE protects what matters to you better)."
    )
    asked = {
        record.question: Generate(Prompt.ask(record.question), Decoding(SHOWN_TOKENS))
        for record in questions
    }
    answers = measure(lm, asked.values(), progress=partial(stage, "automatic retain set"))
    replies = {question: str(answers[request]) for question, request in asked.items()}
    return tuple(
        QA(question=question, answer=reply, group="automatic")
        for question, reply in replies.items()
        if reply.strip()
    )


def unlearn(
    model: str | LM,
    request: ForgetRequest,
    *,
    method: str | Recipe | Path = "npo",
    slots: dict[str, Any] | None = None,
    strength: Strength | None = None,
    out: Path | str | None = None,
    seed: int = 0,
    anchor: str | LM | None = None,
    reference: str | LM | None = None,
    refusals: Sequence[str] | None = None,
    generator: str | System | None = None,
    generated: Path | str | None = None,
    review: bool = False,
    shown: int = SHOWN,
    measured: bool = True,
    verify: bool = True,
    say: Say = _quiet,
    progress: Progress | None = None,
    stage: Stage = unwatched,
    **options: Any,
) -> UnlearnResult:
    """Makes a model forget.

    Args:
        model: A name for :func:`load`, or an :class:`LM`, which is changed in place.
        request: What to forget; see :class:`ForgetRequest`. With subjects alone, a recipe gets
            its forget rows from the model: what it knows about them is asked for, and kept in
            ``RUN/data/forget.jsonl``.
        method: Name of a recipe or an editor, a YAML file, or a :class:`Recipe`.
        slots: Other components for single slots, such as ``{"harden": "sam"}``.
        strength: The one dial: gentle, normal or strong.
        out: Run directory; a killed run resumes from it. None keeps nothing on disk.
        seed: Of every random choice.
        shown: Forget and retain questions that are answered before and after.
        measured: Measure forget, retain and neighbour answers before and after
            (:class:`delible.achieved.Achieved`).
        verify: Open what was saved in a new process and ask it again; it must answer as shown.
        anchor: The model whose values count as "before" in the loss; None is the start model.
        reference: A model that never saw the forget records; only measured, to tell how far
            along the way the result is.
        generator: What writes generated rows, for methods that need some: a name for
            :func:`load`, ``"self"`` (the model before it forgets), or any system. None: offline
            templates do.
        generated: A folder with generated rows, such as ``generated/`` of an earlier run, to be
            used instead of generating any.
        progress: Called after every step as ``progress(step, total, numbers)``.
        stage: Called as ``stage(title, done, total)`` by what takes long beside the steps.
        review: Where forget rows are asked for: stop when they are written. The same call
            without it goes on with them, edited or not.
        options: Options by name, such as ``beta=0.2`` or ``epochs=5``.

    Raises:
        DelibleError: Bad input, told in one message.
    """
    made = None if generated is None else generated_rows.read(Path(generated))
    chosen = resolve_method(method, slots=slots, options=options, strength=strength)
    lm = _whole(model, say)
    load_start = _loader(model, chosen)
    if isinstance(chosen, Recipe):
        _require_forget(request, chosen)
        request = _with_retain(lm, request, chosen, say, stage)
        forget = request.forget or _STANDS_IN
        check_needs(chosen, {"forget": forget, "retain": _retained(request)}, made)
        check_reach(chosen, lm)
    elicits = isinstance(chosen, Recipe) and not request.forget
    if review:
        _check_review(elicits, out)
    writer = open_writer(generator, lm, say) if isinstance(chosen, Recipe) else None
    run = RunDirectory(out) if out is not None else None
    described = _described(lm, request, chosen, seed, anchor, reference, refusals, writer, made)
    if run is not None and run.begin(described):
        say(f"{run.path} holds this run already, finished.")
        return _finished(run)
    if elicits:
        request = elicited.with_rows(
            lm, request, run, writer=writer, seed=seed, say=say, stage=stage
        )
        if review and run is not None:
            return UnlearnResult(lm, run.path, [], to_review=elicited.place(run))
        if run is not None:
            elicited.start(run, request.forget)
    asked = _asked(request, shown)
    before = lm.generate([prompt for _, _, prompt in asked], Decoding(SHOWN_TOKENS))
    found: dict[SystemRole, Measured] = {}
    if measured:
        found["original"] = probabilities(lm, request)
        if reference is not None:
            never = LM.load(reference, say=say) if isinstance(reference, str) else reference
            found["reference"] = probabilities(never, request)
            del never
    began = time.perf_counter()
    result = (
        _train(
            lm,
            request,
            chosen,
            run,
            seed,
            anchor,
            load_start,
            refusals,
            say,
            progress,
            stage,
            writer,
            made,
        )
        if isinstance(chosen, Recipe)
        else _edit(lm, request, chosen, run, seed, say)
    )
    seconds = time.perf_counter() - began
    if run is not None and result.model.wears_adapter and result.model.origin is None:
        result.model.merge_adapter()
        say(
            "The model below the adapter is saved nowhere as it is, so the adapter is merged and "
            "the result is a whole model."
        )
    after = result.model.generate([prompt for _, _, prompt in asked], Decoding(SHOWN_TOKENS))
    result.examples = [
        BeforeAfter(split, _question(record), answer_of(record), str(old), str(new))
        for (split, record, _), old, new in zip(asked, before, after, strict=True)
    ]
    if measured:
        found["unlearned"] = probabilities(result.model, request)
        changes = compare(found["original"], found["unlearned"], found.get("reference"))
        result.achieved = Achieved(changes, *advice(chosen, lm), teaches=teaches(chosen))
    if run is not None and run.writes:
        questions = [
            (prompt, one.after) for (*_, prompt), one in zip(asked, result.examples, strict=True)
        ]
        _keep(run, result, request, seconds, _probe(result.model, questions) if verify else [])
        if found:
            metrics = as_metrics(found, request, seed)
            with atomic_file(run.path / "metrics.json") as handle:
                handle.write(metrics.model_dump_json(indent=2))
        run.release()
    return result


def plan_of(
    model: str | LM,
    request: ForgetRequest,
    *,
    method: str | Recipe | Path = "npo",
    slots: dict[str, Any] | None = None,
    strength: Strength | None = None,
    seed: int = 0,
    say: Say = _quiet,
    **options: Any,
) -> tuple[dict[str, Any], Estimate | None]:
    """What :func:`unlearn` would do: the resolved config, and memory and time (no training).

    The latter is None for editors, and where the rows must be asked for first (names alone).
    """
    chosen = resolve_method(method, slots=slots, options=options, strength=strength)
    if not isinstance(chosen, Recipe):
        return chosen.spec(), None
    _require_forget(request, chosen)
    if not request.forget:
        return chosen.spec(), None
    lm = _whole(model, say)
    if "retain" in _needs(chosen) and not _retained(request):
        say("No retain records were given: an automatic retain set would be made.")
        request = request.model_copy(update={"retain": request.forget[:1]})
    records = {"forget": request.forget, "retain": _retained(request)}
    check_needs(chosen, records)
    check_reach(chosen, lm)
    trainer = Trainer(lm, chosen, records, seed=seed, say=say)
    context = trainer.rows()
    placement = chosen.place.apply(context)
    forget = context.rows["forget"]
    plan = make_plan(chosen, forget, context.rows["retain"], seed)
    chosen.finish.check(len(plan.steps))
    budget = trainer.token_budget()
    return chosen.spec(), estimate(
        lm, chosen, plan, placement, forget, context.rows["retain"], budget
    )


# ---- parts of unlearn


def _retained(request: ForgetRequest) -> tuple[RecordBase, ...]:
    return (*request.retain, *request.neighbours)


def _require_forget(request: ForgetRequest, recipe: Recipe) -> None:
    if not request.forget and not request.subjects:
        editors = ", ".join(card.name for card in registry.cards("editor"))
        raise RecipeError(
            "there are no forget records.",
            where=f"method '{recipe.name}'",
            hint="Add --forget FILE, or --subjects NAME to ask the model what it knows (or edit it "
            f"in closed form: {editors}).",
        )


def _check_review(elicits: bool, out: Path | str | None) -> None:
    if not elicits:
        raise RecipeError(
            "there is nothing to review: no rows are asked for.",
            where="review",
            hint="It is for names without forget records, and for methods that train.",
        )
    if out is None:
        raise RecipeError(
            "rows to review need a place.", where="review", hint="Give a run folder (out=…)."
        )


def _needs(recipe: Recipe) -> set[str]:
    return {need for component in recipe.components() for need in component.card.needs}


def _with_retain(
    lm: LM, request: ForgetRequest, recipe: Recipe, say: Say, stage: Stage
) -> ForgetRequest:
    if "retain" not in _needs(recipe) or _retained(request):
        return request
    return request.model_copy(update={"retain": automatic_retain(lm, AUTOMATIC_RETAIN, say, stage)})


def _whole(model: str | LM, say: Say = _quiet) -> LM:
    """The model with its adapter, if it wears one, merged into its weights.

    What is changed then, by training or by an editor, is what is saved.
    """
    lm = model if isinstance(model, LM) else LM.load(model, say=say)
    if lm.wears_adapter:
        lm.merge_adapter()
        say(MERGED_FIRST)
    return lm


def _loader(model: str | LM, method: Recipe | Editor) -> Callable[[], LM]:
    """Gives the start model again; a model in memory is copied only if that will be asked."""
    if isinstance(model, str):
        return lambda: _whole(model)
    if isinstance(method, Recipe) and method.finish.needs_start:
        kept = model.copy()
        return lambda: kept
    return lambda: model


def _described(
    lm: LM,
    request: ForgetRequest,
    method: Recipe | Editor,
    seed: int,
    anchor: str | LM | None,
    reference: str | LM | None,
    refusals: Sequence[str] | None,
    writer: System | None,
    made: Generated | None,
) -> dict[str, Any]:
    return {
        "command": "unlearn",
        "model": lm.name,
        "model_fingerprint": lm.fingerprint,
        "method": method.spec(),
        "seed": seed,
        "anchor": anchor.name if isinstance(anchor, LM) else anchor,
        "reference": reference.name if isinstance(reference, LM) else reference,
        "subjects": list(request.subjects),
        "refusals": None if refusals is None else identity({"refusals": list(refusals)}),
        "generator": None if writer is None else [writer.name, writer.fingerprint],
        "generated": None if made is None else generated_rows.described(made),
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


def _train(
    lm: LM,
    request: ForgetRequest,
    recipe: Recipe,
    run: RunDirectory | None,
    seed: int,
    anchor: str | LM | None,
    start: Callable[[], LM],
    refusals: Sequence[str] | None,
    say: Say,
    progress: Progress | None,
    stage: Stage,
    writer: System | None,
    made: Generated | None,
) -> UnlearnResult:
    trainer = Trainer(
        lm,
        recipe,
        {"forget": request.forget, "retain": _retained(request)},
        seed=seed,
        run=run,
        reference=LM.load(anchor) if isinstance(anchor, str) else anchor,
        start=start,
        refusals=refusals,
        say=say,
        progress=progress,
        stage=stage,
        writer=writer,
        generated=made,
    )
    trained = trainer.train()
    notes = {
        **trained.notes,
        "steps": trained.steps,
        "tokens": trained.tokens,
        "padding_share": round(trained.padding_share, 4),
        "precision": lm.precision,
        "merged_boundaries": lm.template.merged_boundaries,
    }
    return UnlearnResult(
        trained.lm, run.path if run else None, [], trained.history, trained.stopped, notes
    )


def _edit(
    lm: LM, request: ForgetRequest, editor: Editor, run: RunDirectory | None, seed: int, say: Say
) -> UnlearnResult:
    patch = editor.edit(lm, request, seed=seed, say=say)
    lm.touch()
    return UnlearnResult(lm, run.path if run else None, [], notes=dict(patch.notes), patch=patch)


def _asked(request: ForgetRequest, count: int) -> list[tuple[str, RecordBase, Prompt]]:
    """The first forget and retain questions, spread over the records."""
    asked: list[tuple[str, RecordBase, Prompt]] = []
    for split, records in (("forget", request.forget), ("retain", _retained(request))):
        step = max(1, len(records) // max(1, count))
        for record in records[::step][:count]:
            prompt = ask(record)
            if prompt is not None and prompt.text is None and has_answer(record):
                asked.append((split, record, prompt))
    return asked


def _question(record: RecordBase) -> str:
    prompt = ask(record)
    return prompt.messages[-1].text if prompt and prompt.messages else ""


def _probe(lm: LM, shown: Sequence[tuple[Prompt, str]]) -> list[tuple[Prompt, str]]:
    """Three questions with the model's answers: the first shown ones, and a retained one."""
    from delible.world import general

    chosen = list(shown[: reload.QUESTIONS - 1]) + list(shown[-1:])
    chosen = [pair for place, pair in enumerate(chosen) if pair not in chosen[:place]]
    missing = [
        Prompt.ask(record.question) for record in general()[: reload.QUESTIONS - len(chosen)]
    ]
    told = lm.generate(missing, Decoding(SHOWN_TOKENS)) if missing else []
    return chosen + [(prompt, str(text)) for prompt, text in zip(missing, told, strict=True)]


def _keep(
    run: RunDirectory,
    result: UnlearnResult,
    request: ForgetRequest,
    seconds: float,
    probe: Sequence[tuple[Prompt, str]],
) -> None:
    """Writes the artefact, looks that it answers as shown, and closes the run."""
    from delible.loaders import write_records

    adapter = hasattr(result.model.model, "peft_config")
    artefact = "adapter" if adapter else "model"
    result.model.save(run.path / artefact)
    if probe:
        prompts, shown = zip(*probe, strict=True)
        reload.check(run.path / artefact, result.model, prompts, shown)
    if result.patch is not None:
        result.patch.save(run.path / "patch")
    for name in ("forget", "retain", "neighbours", "holdout"):
        if records := getattr(request, name):
            write_records(records, run.path / "data" / f"{name}.jsonl")
    run.finish(
        cost={"seconds": round(seconds, 1), "tokens": result.notes.get("tokens", 0)},
        stopped=result.stopped,
        notes=result.notes,
        examples=[asdict(example) for example in result.examples],
        achieved=None if result.achieved is None else result.achieved.as_json(),
        verified=bool(probe),
        artefact=artefact,
        artefact_fingerprint=result.model.fingerprint,
    )
    shutil.rmtree(run.path / "checkpoint", ignore_errors=True)


def _finished(run: RunDirectory) -> UnlearnResult:
    manifest = run.manifest
    folder = run.path / str(manifest.get("artefact", "model"))
    if not folder.exists():
        raise RunError("the artefact is missing.", where=str(folder), hint="Delete the run folder.")
    return UnlearnResult(
        LM.load(str(folder)),
        run.path,
        [BeforeAfter(**example) for example in manifest.get("examples", [])],
        [event for event in run.events() if event.get("kind") == "step"],
        manifest.get("stopped"),
        manifest.get("notes", {}),
        achieved=Achieved.from_json(told) if (told := manifest.get("achieved")) else None,
        resumed_finished=True,
    )


__all__ = ["BeforeAfter", "UnlearnResult", "load", "plan_of", "unlearn"]
