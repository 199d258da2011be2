"""The end of a run of ``unlearn``: what is shown, what is kept, and that they are the same."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from delible import reload
from delible.achieved import Achieved
from delible.errors import RecipeError, RunError
from delible.lm.lm import LM, language_model
from delible.lm.load import ModelInfo
from delible.loaders import write_records
from delible.method import Outcome
from delible.preparing import retained
from delible.records import ForgetRequest, RecordBase
from delible.rundir import RunDirectory
from delible.system.artefact import Base, is_artefact
from delible.system.asks import Decoding, Prompt
from delible.system.base import Composed, System
from delible.system.questions import answer_of, ask, has_answer
from delible.systems import opening

logger = logging.getLogger(__name__)

#: Questions per split that are answered before and after.
SHOWN = 3
#: Length of a shown answer, in tokens.
SHOWN_TOKENS = 48
#: Folder, in a run, of a model below its artefact that lies nowhere else.
BELOW = "base"

Asked = Sequence[tuple[str, RecordBase, Prompt]]


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
    """What :func:`delible.unlearn` made.

    Attributes:
        system: What answers now: a model, perhaps with an adapter or a patch, or a guarded system.
        folder: The run directory, if one was asked for.
        examples: Answers before and after.
        history: Numbers of every training step (empty where nothing is trained).
        achieved: Answers before and after in numbers; None if they were not measured.
        to_review: The rows to look at and edit before training (with ``review``).
    """

    system: System
    folder: Path | None
    examples: list[BeforeAfter]
    history: list[dict[str, float]] = field(default_factory=list)
    stopped: str | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    achieved: Achieved | None = None
    resumed_finished: bool = False
    to_review: Path | None = None

    @property
    def model(self) -> LM:
        """The unlearned language model.

        Raises:
            ModelError: The result is a guarded system.
        """
        return language_model(self.system, "the result")


@dataclass(frozen=True)
class Link:
    """An earlier run that a run goes on from.

    Attributes:
        folder: Its run directory.
        request: Id of its request.
        ended: When it did.
    """

    folder: str
    request: str
    method: str
    ended: str


def chain_of(system: System) -> tuple[Link, ...]:
    """The runs whose result a system is, the first one first; empty for a model of elsewhere."""
    folder = Path(system.name).expanduser()
    manifest = RunDirectory(folder).manifest if is_artefact(folder) else {}
    if "request" not in manifest:
        return ()
    method = manifest.get("run", {}).get("method", {}).get("name", "?")
    mine = Link(str(folder.resolve()), manifest["request"], method, str(manifest.get("ended", "")))
    return (*(Link(**one) for one in manifest.get("chain", ())), mine)


@dataclass(frozen=True)
class Start:
    """The system before, as an artefact names it.

    Attributes:
        base: Its name and identity.
        lasting: Its name opens it again.
        chain: The runs that made it, the first one first.
    """

    base: Base
    lasting: bool
    chain: tuple[Link, ...] = ()

    @classmethod
    def of(cls, system: System) -> Start:
        """To be asked before anything is changed."""
        return cls(opening.described(system), opening.opens_again(system), chain_of(system))


# ---- what is shown


def asked(request: ForgetRequest, count: int) -> Asked:
    """The first forget and retain questions, spread over the records."""
    found: list[tuple[str, RecordBase, Prompt]] = []
    for split, records in (("forget", request.forget), ("retain", retained(request))):
        step = max(1, len(records) // max(1, count))
        for record in records[::step][:count]:
            prompt = ask(record)
            if prompt is not None and prompt.text is None and has_answer(record):
                found.append((split, record, prompt))
    return found


def answers(system: System, questions: Asked) -> list[str]:
    """Greedy answers; empty where there is none."""
    prompts = [prompt for *_, prompt in questions]
    return [str(text) for text in system.generate(prompts, Decoding(SHOWN_TOKENS))]


def compared(questions: Asked, before: Sequence[str], after: Sequence[str]) -> list[BeforeAfter]:
    """Each question with both answers."""
    return [
        BeforeAfter(split, _question(record), answer_of(record), old, new)
        for (split, record, _), old, new in zip(questions, before, after, strict=True)
    ]


def _question(record: RecordBase) -> str:
    prompt = ask(record)
    return prompt.messages[-1].text if prompt and prompt.messages else ""


# ---- what is kept


def keep(
    run: RunDirectory,
    outcome: Outcome,
    result: UnlearnResult,
    start: Start,
    request: ForgetRequest,
    questions: Asked,
    seconds: float,
    *,
    verify: bool,
) -> None:
    """Writes the artefact, looks that it answers as shown, and closes the run.

    Raises:
        RunError: The disk refuses it, or what was saved answers otherwise.
        RecipeError: The artefact stands on a system that nothing opens again.
    """
    base = _base(run, outcome, start)
    artefact = opening.keep(
        outcome.kind, outcome.content, run.path, base, outcome.system, outcome.remembers
    )
    checked = verify and outcome.system.fingerprint is not None
    if checked:
        shown = list(zip((prompt for *_, prompt in questions), result.examples, strict=True))
        probe = _probe(outcome.system, [(prompt, one.after) for prompt, one in shown])
        prompts, texts = zip(*probe, strict=True)
        reload.check(run.path, outcome.system, prompts, texts)
    for name in ("forget", "retain", "neighbours", "holdout"):
        if records := getattr(request, name):
            write_records(records, run.path / "data" / f"{name}.jsonl")
    run.finish(
        cost={"seconds": round(seconds, 1), "tokens": result.notes.get("tokens", 0)},
        stopped=result.stopped,
        notes=result.notes,
        examples=[asdict(example) for example in result.examples],
        achieved=None if result.achieved is None else result.achieved.as_json(),
        verified=checked,
        request=request.id,
        chain=[asdict(one) for one in start.chain],
        artefact=artefact.model_dump(mode="json", exclude_none=True),
    )
    shutil.rmtree(run.path / "checkpoint", ignore_errors=True)


def _base(run: RunDirectory, outcome: Outcome, start: Start) -> Base:
    """What the artefact stands on; a model that lies nowhere is written beside it.

    Raises:
        RecipeError: It is no model and nothing opens it again.
    """
    if outcome.on is not None:
        return outcome.on
    whole = not opening.kind_named(outcome.kind).card.reversible
    if whole or start.lasting:
        return start.base
    below = outcome.system.taken_off() if isinstance(outcome.system, Composed) else None
    if below is None or not isinstance(below[1], LM):
        raise RecipeError(
            f"'{start.base.name}' is only in memory, so what stands on it cannot be opened again.",
            hint="Give a model's name, a folder or an address, or keep nothing (no out=…).",
        )
    folder = run.path / BELOW
    below[1].save(folder)
    logger.info(f"The model before lies nowhere else, so it is written too: {folder}.")
    if isinstance(outcome.system, LM):
        outcome.system.origin = ModelInfo(str(folder), "folder", str(folder))
    return Base(name=BELOW, identity=start.base.identity, precision=start.base.precision)


def _probe(system: System, shown: Sequence[tuple[Prompt, str]]) -> list[tuple[Prompt, str]]:
    """Three questions with the system's answers: the first shown ones, and a retained one."""
    from delible.world import general

    chosen = list(shown[: reload.QUESTIONS - 1]) + list(shown[-1:])
    chosen = [pair for place, pair in enumerate(chosen) if pair not in chosen[:place]]
    missing = [
        Prompt.ask(record.question) for record in general()[: reload.QUESTIONS - len(chosen)]
    ]
    told = system.generate(missing, Decoding(SHOWN_TOKENS)) if missing else []
    return chosen + [(prompt, str(text)) for prompt, text in zip(missing, told, strict=True)]


def finished(run: RunDirectory) -> UnlearnResult:
    """The result of a run that ended before.

    Raises:
        RunError: Its artefact is missing or damaged.
    """
    manifest = run.manifest
    if not is_artefact(run.path):
        raise RunError(
            "the artefact is missing.", where=str(run.path), hint="Delete the run folder."
        )
    return UnlearnResult(
        opening.open_system(str(run.path)),
        run.path,
        [BeforeAfter(**example) for example in manifest.get("examples", [])],
        [event for event in run.events() if event.get("kind") == "step"],
        manifest.get("stopped"),
        manifest.get("notes", {}),
        achieved=Achieved.from_json(told) if (told := manifest.get("achieved")) else None,
        resumed_finished=True,
    )
