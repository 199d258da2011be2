"""The audit: the same questions and attacks to the unlearned system, the original and the
reference, and what can be said from the answers."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from delible.audit.asking import Asking
from delible.audit.choice import ROWS
from delible.audit.findings import Findings, write_items
from delible.audit.leaks import LEAK_MEASURES, Setting
from delible.audit.pieces import Auditing, Done, Elsewhere, Material, Piece, Plain
from delible.audit.result import AuditResult, SystemRole
from delible.audit.rows import add, empty_row
from delible.cards import Depth
from delible.context import Context
from delible.files import atomic_file
from delible.measure.starting import started
from delible.records import ForgetRequest, digest
from delible.rundir import RunDirectory
from delible.spread.hands import check_hands, hands, spread
from delible.spread.pieces import Hands
from delible.system.base import System
from delible.system.roles import Player
from delible.watching import Remaining, Stage

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
    ray: bool = False,
    cpus: int | None = None,
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
        ray: Ask and attack on a Ray cluster: each system plainly, then each attack on each system.
            Systems are given by name; they and the cache lie where all its machines see them.
        cpus: CPUs that each of these takes there, beside a GPU where there are GPUs.
        context: All of out, seed, cache, progress and roles, made before; instead of them.

    Raises:
        DelibleError: Nothing to ask about, an unknown name, or a model that cannot be read.
    """
    check_hands(1, ray, cpus)
    context = started(
        context, seed=seed, run=None if out is None else RunDirectory(out), stage=progress,
        roles=roles, cache=cache,
    )  # fmt: skip
    began = time.perf_counter()
    material = Material(
        system, request, model, before, reference, metrics, attacks, depth, leaks, guard, rows
    )
    auditing = Auditing(material, context)
    elsewhere = Elsewhere(material, context) if ray else None
    asking, run = auditing.asking, context.run
    with nullcontext() if run is None else run.locked():
        paths = elsewhere.paths if elsewhere else ()
        with hands(elsewhere or auditing.done, ray=ray, cpus=cpus, paths=paths) as doing:
            findings = _findings(
                auditing, doing, depth if attacks is None else None, elsewhere is not None
            )
        result = findings.result(time.perf_counter() - began, asking.measured)
        if run is not None:
            described = {
                "command": "audit",
                "system": result.systems["unlearned"].model_dump(),
                "seed": context.seed,
                "forget": digest(request.forget),
                "metrics": [metric.spec() for metric in auditing.metrics],
                "attacks": [attack.spec() for attack in auditing.attacks],
            }
            _write(run, result, findings.settings, described)
    return result


def _findings(auditing: Auditing, doing: Hands, depth: Depth | None, elsewhere: bool) -> Findings:
    """Asks and attacks every system: here one after the other, elsewhere all of them at once."""
    asking, attacks = auditing.asking, auditing.attacks
    roles = auditing.systems.roles
    plain = Setting("none", "", "Asked plainly", records=asking.splits["forget"])
    attacked = [empty_row(attack) for attack in attacks]
    findings = Findings(
        asking.splits, asking.metrics, asking.context.seed, plain, attacked,
        notes=asking.not_tested, depth=depth,
    )  # fmt: skip
    counted = Counted(len(roles) * (1 + len(attacks)), asking, elsewhere)
    asked: dict[SystemRole, Plain] = {}
    rows: dict[tuple[int, SystemRole], Setting] = {}
    for group in [roles] if elsewhere else [[role] for role in roles]:
        for piece, found in _done(doing, [Piece(role) for role in group], counted):
            assert found.plain is not None
            asked[piece.role] = found.plain
            if found.plain.told is not None:
                logger.info(found.plain.told)
        white_box = asked["unlearned"].white_box
        pieces = [Piece(role, place, white_box) for role in group for place in range(len(attacks))]
        for piece, found in _done(doing, pieces, counted):
            assert piece.attack is not None
            assert found.row is not None
            rows[piece.attack, piece.role] = found.row
    for role in roles:  # in this order, whatever was done first
        one = asked[role]
        findings.infos[role], plain.values[role] = one.info, one.values
        findings.answers[role], findings.samples[role] = one.answers, one.samples
        findings.parts += one.parts
        for place, row in enumerate(attacked):
            add(row, rows[place, role])
    for part in findings.parts:
        part.values |= {role: found for role, found in plain.values.items() if role != "unlearned"}
    return findings


def _done(doing: Hands, pieces: Sequence[Piece], counted: Counted) -> Iterator[tuple[Piece, Done]]:
    """Pieces and what came of them, as they are done."""
    chains = [[piece] for piece in pieces]
    kept = spread(doing, chains, keep=lambda piece, done: (piece, done), waiting=counted.waiting)
    for ((piece, done),) in kept:
        counted.count(piece, done)
        yield piece, done


class Counted:
    """Tells how far the pieces are that are done elsewhere, and takes over what they say.

    Args:
        total: Pieces.
        asking: Whose notes and numbers are those of the audit.
        elsewhere: Whether pieces are done elsewhere; here each tells of itself.
    """

    def __init__(self, total: int, asking: Asking, elsewhere: bool) -> None:
        self.total, self.asking, self.elsewhere = total, asking, elsewhere
        self.done = 0
        self._remaining = Remaining()

    def count(self, piece: Piece, done: Done) -> None:
        """One more is done."""
        self.done += 1
        if not self.elsewhere:
            return
        row = done.row
        what = "asked plainly" if row is None else f"{row.title} {row.variant}".strip()
        left = self._remaining.after(1, self.total - self.done)
        logger.info(f"{self.done} of {self.total}: {piece.role}, {what}, is done{left}.")
        for note in done.notes:
            if note not in self.asking.not_tested:
                self.asking.leave_out(note)
        for key, count in done.measured.items():
            self.asking.measured[key] = self.asking.measured.get(key, 0) + count

    def waiting(self) -> None:
        """Nothing was finished for a while."""
        self.asking.context.stage("pieces of the audit", self.done, self.total)


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
