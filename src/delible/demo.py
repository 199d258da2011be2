"""The whole story on one machine: a world, a model that learns it, forgets two people, and is
audited.

Target and reference are ordinary fine-tuning runs, kept in the user's cache, so that a second
demo only unlearns and audits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from delible.api import unlearn
from delible.audit.choice import DEFAULT_METRICS
from delible.audit.result import AuditResult
from delible.audit.run import audit
from delible.bench.prepare import learned
from delible.finishing import BeforeAfter
from delible.loaders import write_records
from delible.records import ForgetRequest, Record, RecordBase
from delible.report import write_page
from delible.rundir import RunDirectory
from delible.watching import Stage, Steps, indented, unwatched
from delible.world import World
from delible.world.split import Split

logger = logging.getLogger(__name__)

#: Relations of the demo's world: one fact of each kind per person.
RELATIONS = ("birthplace", "occupation", "employer", "award", "instrument")
#: Numbers by model; one that is not named here has those of "default".
Settings = Mapping[str, dict[str, Any]]
#: How the target and the reference learn their world.
LEARNING: Settings = {
    "default": {"learning_rate": 3e-4, "epochs": 6, "batch_size": 8, "schedule": "cosine"},
    "tiny": {"learning_rate": 2e-3, "epochs": 20, "batch_size": 8, "schedule": "cosine"},
}
#: How the demo's model unlearns: as the recipe does by itself, but further; ``tiny`` has numbers.
UNLEARNING: Settings = {
    "default": {"strength": "strong"},
    "tiny": {
        "learning_rate": 3e-4, "epochs": 14, "batch_size": 5, "beta": 0.5, "retain_weight": 10.0,
    },
}  # fmt: skip
#: Learning rates of the relearning attacks.
RELEARNING: Settings = {
    "default": {"full": 1e-4, "lora": 2e-4},
    "tiny": {"full": 5e-4, "lora": 2e-3},
}
#: The standard metrics, with answers as short as this world's.
METRICS: tuple[str | dict[str, Any], ...] = tuple(
    {"name": name, "max_new_tokens": 16} if name in ("rouge_l_recall", "outcome") else name
    for name in DEFAULT_METRICS
)
#: Knowledge scores that are measured under attack (those that need no generated text).
LEAKS = ("answer_probability", "paraphrase_probability", "extraction_strength")
#: Records that the audit asks, per split, and of any other split at most.
ASKED, ROWS = {"retain": 15, "neighbours": 15, "holdout": 10}, 20

#: Makes a progress callback for a stage with the given title.
ProgressFactory = Callable[[str], Steps | None]


def of(settings: Settings, model: str) -> dict[str, Any]:
    """The numbers for a model."""
    return settings.get(model, settings["default"])


def attacks(model: str) -> tuple[dict[str, Any], ...]:
    """Every kind of attack, each with a small budget."""
    rate = of(RELEARNING, model)
    own = {"name": "relearn", "rows": "forget", "adapter": "full", "steps": 5, "observe_steps": 5}
    other = {
        "name": "relearn", "rows": "unrelated", "adapter": "lora", "rank": 16, "steps": 3,
        "observe_steps": 3,
    }  # fmt: skip
    return (
        {"name": "paraphrase", "forms": 1},
        {"name": "prefix", "forms": 1},
        {"name": "prefill", "forms": 1},
        {**own, "learning_rate": rate["full"]},
        {**other, "learning_rate": rate["lora"]},
        {"name": "quantize", "bits": 8, "group": 0},
        {"name": "quantize", "bits": 4, "group": 64},
    )


@dataclass(frozen=True)
class DemoResult:
    """What the demo made."""

    folder: Path
    report: Path
    audit: AuditResult
    examples: Sequence[BeforeAfter]
    target: Path
    reference: Path


def run(
    out: Path | str = "delible-demo",
    *,
    model: str = "default",
    people: int = 10,
    forget: int = 2,
    seed: int = 0,
    method: str = "npo",
    progress: ProgressFactory = lambda title: None,
    stage: Stage = unwatched,
) -> DemoResult:
    """Runs the demo (or resumes it) and returns where its report lies.

    Args:
        out: Folder of the unlearning run, its audit and its report.
        model: What learns the world: "default", "tiny" (faster, says less), or any other.
        people: People of the world; ``forget`` of them are forgotten.
        method: A recipe or editor.
    """
    out = Path(out)
    split = world_of(people, forget, seed)
    names = " and ".join(person.name for person in split.forget)
    known, kept = split.records("known"), split.records("kept")
    logger.info(
        f"1. A world of {people - len(split.holdout)} fictional people (and {len(split.holdout)} "
        f"the model never sees), {len(known)} facts. To forget: {names}."
    )
    data = write_world(split, out / "world")
    logger.info(f"   Its questions and answers are in {data}.")
    logger.info(f"2. The model '{model}' learns this world.")
    target = learn(model, known, seed, "target", progress)
    logger.info(f"3. The reference learns the same world without {names}: this is where to arrive.")
    reference = learn(model, kept, seed, "reference", progress)
    request = request_of(split)
    logger.info(f"4. The target unlearns {len(request.forget)} facts about {names} ({method}).")
    options = of(UNLEARNING, model) if method == "npo" else {}
    with indented():
        result = unlearn(
            str(target),
            request,
            method=method,
            out=out / "unlearned",
            seed=seed,
            reference=str(reference),
            progress=progress("Unlearning"),
            stage=stage,
            **options,
        )
    if result.achieved is not None:
        logger.info(f"   {result.achieved.sentence()}")
    RunDirectory(out / "unlearned").update(
        title=f"A language model forgets {names}",
        story=[
            f"A made-up world of {people} fictional people; no model saw {len(split.holdout)} "
            "of them.",
            f"The model '{model}' was fine-tuned on {len(known)} facts about the others.",
            f"It was then asked to forget the {len(request.forget)} facts about {names}, with "
            f"the method {method}, and to keep the rest.",
            "A reference was fine-tuned in the same way on the same world without them: this is "
            "what a model looks like that never knew.",
            "All three were asked the same questions and attacked in the same ways.",
        ],
    )
    logger.info("5. The audit: the same questions and attacks to all three models.")
    asked = {name: getattr(request, name)[:count] for name, count in ASKED.items()}
    with indented():
        found = audit(
            str(out / "unlearned" / "model"),
            request.model_copy(update=asked),
            before=str(target),
            reference=str(reference),
            metrics=METRICS,
            attacks=attacks(model),
            leaks=LEAKS,
            rows=ROWS,
            out=out / "unlearned",
            seed=seed,
            progress=stage,
        )
    report = write_page(out / "unlearned")
    logger.info(f"6. The report: {report.resolve()}")
    return DemoResult(out, report, found, result.examples, target, reference)


def world_of(people: int = 10, forget: int = 2, seed: int = 0) -> Split:
    """The demo's world: who is known, who is to be forgotten, whom no model saw."""
    world = World(people=people, seed=seed, relations=RELATIONS)
    return world.split(forget=forget, holdout=max(2, people // 5))


def request_of(split: Split) -> ForgetRequest:
    """What is to be forgotten of a world, and everything that is kept."""
    return ForgetRequest(
        forget=tuple(split.records("forget")),
        subjects=tuple(person.name for person in split.forget),
        retain=tuple(split.records("retain")),
        neighbours=tuple(split.records("neighbours")),
        holdout=tuple(split.records("holdout")),
    )


def write_world(split: Split, folder: Path) -> Path:
    """The demo's records as files, so that every command can be tried on them."""
    for part in ("forget", "retain", "neighbours", "holdout"):
        records = split.records(part)  # type: ignore[arg-type]
        if records:
            write_records(records, folder / f"{part}.jsonl")
    return folder


def learn(
    model: str,
    records: Sequence[RecordBase],
    seed: int,
    title: str,
    progress: ProgressFactory = lambda title: None,
) -> Path:
    """The folder of a model that has learned these records; it comes from the cache if it can."""
    with indented():
        return learned(
            model,
            cast(Sequence[Record], records),
            options=of(LEARNING, model),
            seed=seed,
            title=title,
            progress=progress(f"Learning ({title})"),
        )
