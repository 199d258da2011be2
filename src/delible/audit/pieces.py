"""An audit in pieces: each system asked plainly, and each attack on each system.

Once the systems are known, attacks do not depend on each other. So the pieces are done one after
the other here, or by the machines of a cluster, each of which makes the same systems, questions
and attacks from the same plain material.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from delible.audit.asking import Asking
from delible.audit.attacking import Attacking
from delible.audit.choice import chosen_attacks, chosen_metrics, chosen_records, leak_metrics
from delible.audit.leaks import Setting
from delible.audit.result import SystemInfo, SystemRole
from delible.audit.systems import Systems
from delible.audit.utility import Answers
from delible.cards import Depth
from delible.context import Context
from delible.errors import RecipeError
from delible.lm.lm import LM
from delible.measure.cache import Cache
from delible.measure.metric import SystemValues
from delible.measure.starting import started
from delible.records import ForgetRequest
from delible.spread.hands import there
from delible.system.base import System
from delible.system.roles import options_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Material:
    """What an audit is made from; the arguments of :func:`delible.audit`."""

    system: str | System
    request: ForgetRequest
    model: str | None
    before: str | System | None
    reference: str | System | None
    metrics: Sequence[str | Mapping[str, Any]] | None
    attacks: Sequence[str | Mapping[str, Any]] | None
    depth: Depth
    leaks: Sequence[str]
    guard: str | None
    rows: int

    @property
    def named(self) -> list[str | System]:
        """The systems, as they were given."""
        given = (self.system, self.before, self.reference)
        return [one for one in given if one is not None]


@dataclass(frozen=True)
class Piece:
    """One piece of an audit.

    Attributes:
        role: Which system.
        attack: Place of the attack; None: it is asked plainly.
        white_box: Whether the unlearned system gives its weights.
    """

    role: SystemRole
    attack: int | None = None
    white_box: bool = True


@dataclass
class Plain:
    """What a system says when it is simply asked.

    Attributes:
        answers, samples: Shown answers, and those to questions that were to be kept.
        parts: The system without parts that can be taken away.
        told: How long the attacks will take.
    """

    info: SystemInfo
    values: SystemValues
    answers: Answers
    samples: Answers
    parts: list[Setting] = field(default_factory=list)
    white_box: bool = True
    told: str | None = None


@dataclass
class Done:
    """What came of a piece.

    Attributes:
        plain, row: The one or the other.
        notes: What was left out.
        measured: Questions asked, by kind.
    """

    plain: Plain | None = None
    row: Setting | None = None
    notes: list[str] = field(default_factory=list)
    measured: dict[str, int] = field(default_factory=dict)


class Auditing:
    """An audit's systems, questions and attacks, ready in one process.

    Raises:
        DelibleError: Nothing to ask about, an unknown name, or a model that cannot be read.
    """

    def __init__(self, material: Material, context: Context) -> None:
        answers = Cache(context.cache / "answers") if context.cache else None
        self.metrics = chosen_metrics(material.metrics, context.roles, material.request)
        self.attacks = chosen_attacks(material.attacks, material.depth)
        scores = leak_metrics(self.metrics, material.leaks)
        splits, notes = chosen_records(material.request, material.rows)
        self.systems = Systems(
            material.system, material.request, model=material.model, before=material.before,
            reference=material.reference, guard=material.guard,
            prefills=any(attack.card.name == "prefill" for attack in self.attacks),
            context=context,
        )  # fmt: skip
        notes += self.systems.notes
        self.asking = Asking(context, answers, splits, self.metrics, scores, notes)
        self.attacking = Attacking(self.asking, self.systems)
        self._open: tuple[SystemRole, System] | None = None

    def done(self, piece: Piece) -> Done:
        """Does one piece; the system is open until another one is asked."""
        system = self._system(piece.role)
        notes, measured = len(self.asking.not_tested), dict(self.asking.measured)
        if piece.attack is None:
            found = Done(plain=self._plain(piece.role, system))
        else:
            self.attacking.white_box = piece.white_box
            found = Done(row=self.attacking.attack(piece.role, system, self.attacks[piece.attack]))
        for note in getattr(system, "notes", ()):
            line = f"{piece.role}: {note}"
            if line not in self.asking.not_tested:
                self.asking.leave_out(line)
        found.notes = self.asking.not_tested[notes:]
        found.measured = {
            key: count - measured.get(key, 0) for key, count in self.asking.measured.items()
        }
        return found

    def _system(self, role: SystemRole) -> System:
        if self._open is None or self._open[0] != role:
            self._open = None
            gc.collect()
            self._open = role, self.systems.load(role)
        return self._open[1]

    def _plain(self, role: SystemRole, system: System) -> Plain:
        logger.info(f"Asking the {role} system.")
        asking = self.asking
        asked_at, known = time.perf_counter(), asking.measured.get("cached", 0)
        values = asking.evaluate(system, asking.splits, self.metrics, role, must_answer=True)
        taken = time.perf_counter() - asked_at
        fresh = asking.measured.get("cached", 0) == known
        answers, samples = asking.answers(system)
        info = SystemInfo(
            name=system.name,
            capabilities=sorted(system.capabilities),
            fingerprint=system.fingerprint,
        )
        found = Plain(info, values, answers, samples)
        if role == "unlearned":
            self.attacking.white_box = found.white_box = isinstance(system, LM)
            found.parts = asking.without_parts(system)
            if self.attacks:
                told = self.attacking.estimate(system, self.attacks, taken if fresh else None)
                found.told = told.sentence(len(self.attacks), len(self.systems.roles))
        return found


class Elsewhere:
    """Does pieces of an audit on any machine; made from names alone.

    Args:
        context: Of the audit: its seed, its roles by name, and whether answers are kept.

    Raises:
        RecipeError: A system is given itself, or a role has a budget, which machines cannot share.
    """

    def __init__(self, material: Material, context: Context) -> None:
        if not all(isinstance(one, str) for one in material.named):
            raise RecipeError(
                "a system is given itself.",
                where="ray",
                hint="Give its name or folder: other machines open it.",
            )
        for part, player in context.roles.players.items():
            options = options_of(part, player)
            if options.calls is not None or options.tokens is not None:
                raise RecipeError(
                    f"the {part} has a budget, which machines cannot share.",
                    where="ray",
                    hint="Leave out its calls and tokens, or audit without --ray.",
                )
        self.material = material
        self.seed, self.roles = context.seed, context.roles.named()
        self.cache = context.cache is not None
        self._token = uuid4().hex

    @property
    def paths(self) -> list[Path]:
        """What every machine must see."""
        return there(self.material.named)

    def __call__(self, piece: Piece) -> Done:
        if self._token not in _READY:
            _READY.clear()
            context = started(None, seed=self.seed, roles=self.roles, cache=self.cache)
            _READY[self._token] = Auditing(self.material, context)
        found = _READY[self._token].done(piece)
        if found.row is not None:
            found.row.reads = None  # whoever puts rows together has it
        return found


#: The audit of whose pieces this process has done one.
_READY: dict[str, Auditing] = {}

__all__ = ["Auditing", "Done", "Elsewhere", "Material", "Piece", "Plain"]
