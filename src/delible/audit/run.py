"""The audit: the same questions and attacks to the unlearned system, the original and the
reference, and what can be said from the answers."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from delible.audit.asking import Asking
from delible.audit.attacking import Attacking, empty_row
from delible.audit.choice import (
    ROWS,
    chosen_attacks,
    chosen_metrics,
    chosen_records,
    leak_metrics,
)
from delible.audit.findings import Findings, write_items
from delible.audit.leaks import LEAK_MEASURES, Setting
from delible.audit.result import AuditResult, SystemInfo
from delible.audit.systems import Systems
from delible.cards import Depth
from delible.context import Context
from delible.files import atomic_file
from delible.lm.lm import LM
from delible.measure.attack import Attack
from delible.measure.cache import Cache
from delible.measure.starting import started
from delible.records import ForgetRequest, digest
from delible.rundir import RunDirectory
from delible.system.base import System
from delible.system.roles import Player
from delible.watching import Stage

logger = logging.getLogger(__name__)


def audit(
    system: str | System,
    request: ForgetRequest,
    *,
    model: str | None = None,
    before: str | System | None = None,
    reference: str | System | None = None,
    metrics: Sequence[str | Mapping[str, Any]] | None = None,
    attacks: Sequence[str | Mapping[str, Any]] | None = None,
    depth: Depth = "quick",
    leaks: Sequence[str] = LEAK_MEASURES,
    guard: str | None = None,
    out: Path | str | None = None,
    seed: int = 0,
    cache: bool = True,
    rows: int = ROWS,
    progress: Stage | None = None,
    roles: Mapping[str, Player] | None = None,
    context: Context | None = None,
) -> AuditResult:
    """Asks and attacks a system, and says what is left of what it was to forget.

    Args:
        system: The unlearned system: a model's name or folder, ``vllm:`` before either, the
            address of an OpenAI-compatible server, or any :class:`System`.
        request: What was to be forgotten; retain, neighbour and holdout records make the audit
            stronger.
        model: Name of the model at that address.
        before: The model before unlearning.
        reference: A model trained without the forgotten records.
        metrics: Names or ``{"name": …, option: value}``; None takes the standard ones.
        attacks: Names or ``{"name": …, option: value}``; None takes those of the depth, an empty
            list none.
        depth: How deep it goes: "quick", "standard" or "deep"; attacks by name take their
            settings of that depth.
        leaks: Metrics that are measured under attack, as knowledge scores (larger = more known).
        guard: Name of a guard to put in front of the system (and of no other).
        out: Run directory for ``metrics.json`` and ``items.parquet``.
        cache: Take answers of the same weights to the same questions from earlier audits.
        rows: Records per split that are asked at most.
        progress: Called as ``progress(title, done, total)`` by everything that takes long.
        roles: Who judges, … by talking: by role a system, a name, or options such as
            ``{"system": "https://host/v1#MODEL", "calls": 500}``.
        context: All of out, seed, cache, progress and roles, made before; instead of them.

    Raises:
        DelibleError: Nothing to ask about, an unknown name, or a model that cannot be read.
    """
    context = started(
        context, seed=seed, run=None if out is None else RunDirectory(out), stage=progress,
        roles=roles, cache=cache,
    )  # fmt: skip
    began = time.perf_counter()
    answers = Cache(context.cache / "answers") if context.cache else None
    asked_metrics = chosen_metrics(metrics, context.roles, request)
    asked_attacks = chosen_attacks(attacks, depth)
    scores = leak_metrics(asked_metrics, leaks)
    splits, notes = chosen_records(request, rows)
    systems = Systems(
        system, request, model=model, before=before, reference=reference, guard=guard,
        prefills=any(attack.card.name == "prefill" for attack in asked_attacks), context=context,
    )  # fmt: skip
    notes += systems.notes
    asking = Asking(context, answers, splits, asked_metrics, scores, notes)
    run = context.run
    with nullcontext() if run is None else run.locked():
        findings = _findings(asking, systems, asked_attacks, depth if attacks is None else None)
        result = findings.result(time.perf_counter() - began, asking.measured)
        if run is not None:
            described = {
                "command": "audit",
                "system": result.systems["unlearned"].model_dump(),
                "seed": context.seed,
                "forget": digest(request.forget),
                "metrics": [metric.spec() for metric in asked_metrics],
                "attacks": [attack.spec() for attack in asked_attacks],
            }
            _write(run, result, findings.settings, described)
    return result


def _findings(
    asking: Asking, systems: Systems, attacks: Sequence[Attack], depth: Depth | None
) -> Findings:
    """Asks and attacks every system, one after the other."""
    attacking = Attacking(asking, systems)
    plain = Setting("none", "", "Asked plainly", records=asking.splits["forget"])
    attacked = [empty_row(attack) for attack in attacks]
    findings = Findings(
        asking.splits, asking.metrics, asking.context.seed, plain, attacked,
        notes=asking.not_tested, depth=depth,
    )  # fmt: skip
    for role in systems.roles:
        system = systems.load(role)
        findings.infos[role] = SystemInfo(
            name=system.name,
            capabilities=sorted(system.capabilities),
            fingerprint=system.fingerprint,
        )
        logger.info(f"Asking the {role} system.")
        asked_at, known = time.perf_counter(), asking.measured.get("cached", 0)
        plain.values[role] = asking.evaluate(
            system, asking.splits, asking.metrics, role, must_answer=True
        )
        taken = time.perf_counter() - asked_at
        fresh = asking.measured.get("cached", 0) == known
        findings.answers[role], findings.samples[role] = asking.answers(system)
        if role == "unlearned":
            attacking.white_box = isinstance(system, LM)
            findings.parts = asking.without_parts(system)
            if attacks:
                told = attacking.estimate(system, attacks, taken if fresh else None)
                logger.info(told.sentence(len(attacks), len(systems.roles)))
        for attack, setting in zip(attacks, attacked, strict=True):
            attacking.attack(role, system, attack, setting)
        for note in getattr(system, "notes", ()):
            asking.leave_out(f"{role}: {note}")
        del system
        gc.collect()
    for part in findings.parts:
        part.values |= {role: found for role, found in plain.values.items() if role != "unlearned"}
    return findings


def _write(
    run: RunDirectory,
    result: AuditResult,
    settings: Sequence[Setting],
    described: dict[str, Any],
) -> None:
    """The numbers and the items, and what was audited unless the run says it already."""
    if not run.manifest:
        run.begin(described)
    write_items(run.path / "items.parquet", settings)
    with atomic_file(run.path / "metrics.json") as handle:
        handle.write(result.model_dump_json(indent=2))
    if run.manifest.get("status") != "done":
        run.finish(cost={"seconds": result.seconds})
