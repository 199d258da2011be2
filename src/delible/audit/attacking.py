"""Attacks of all five kinds, each with what it may use, once per system and seed."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import cast

from delible.audit.asking import Asking
from delible.audit.attacked import Attacked, Kept, attacked_key, preparation_key
from delible.audit.choice import Splits, kept_records, spaced
from delible.audit.estimate import Estimate, estimate
from delible.audit.leaks import INFERRED, INSIDE, Setting
from delible.audit.result import SystemRole
from delible.audit.rows import digests, empty_row
from delible.audit.systems import Systems
from delible.component import build
from delible.errors import DataError, DelibleError, RunError
from delible.lm.counting import tokens_read
from delible.lm.lm import LM
from delible.lm.states import StateStore
from delible.measure.attack import (
    Attack,
    AttackContext,
    ConversationAttack,
    InferenceAttack,
    InsideAttack,
    ModelAttack,
    PromptAttack,
    Seen,
)
from delible.measure.evaluate import evaluate, item_asks, joined, mean_of
from delible.measure.metric import SystemValues
from delible.measure.remembering import Remembering
from delible.records import RecordBase
from delible.system.asks import Prompt
from delible.system.base import System

logger = logging.getLogger(__name__)

#: Holdout records that are asked under attack.
ATTACKED_HOLDOUT = 40
#: Held-out records that a curve is measured on.
CURVE_ROWS = 16
#: Kinds that take a model apart, and need its weights.
WHITE_BOX = (ModelAttack, InsideAttack)


class Attacking:
    """Attacks systems, one attack after the other.

    Attributes:
        white_box: Whether the unlearned system gives its weights.
    """

    def __init__(self, asking: Asking, systems: Systems) -> None:
        self.asking, self.systems = asking, systems
        self.kept = Kept(asking.cache)
        #: What one attack has read of a model the next one need not read again.
        self.states = StateStore()
        self.white_box = True
        #: Records that the running attack's curve is measured on.
        self._held: Sequence[RecordBase] = ()
        #: Records that the running attack brings along, by split.
        self._beside: Mapping[str, Sequence[RecordBase]] = {}

    def attack(self, role: SystemRole, system: System, attack: Attack) -> Setting:
        """Attacks one system: what came of it, as a row of its own (see :func:`add`).

        What it cannot be run on, or what gives it nothing to go by, is a reason in the row.
        """
        setting = empty_row(attack)
        began = time.perf_counter()
        title = f"{role}: {setting.title}{f' ({setting.variant})' if setting.variant else ''}"
        try:
            self._allowed(role, system, attack)
            self._run(role, system, attack, setting, title)
        except DelibleError as error:
            setting.notes["skipped"] = str(error)
        setting.seconds += time.perf_counter() - began
        return setting

    def estimate(
        self, system: System, attacks: Sequence[Attack], seconds: float | None
    ) -> Estimate:
        """What attacks will take of all systems.

        Args:
            seconds: What the plain questions to this system took; None: a few are timed.
        """
        asked = sum(map(len, self.asking.splits.values())) * len(item_asks(self.asking.metrics))
        each = None if seconds is None else seconds / max(1, asked)
        splits = self._splits("unlearned", self.asking.splits["forget"])
        context = self._context("reference", None, "")
        return estimate(
            system, attacks, splits, self.asking.leaks, context, len(self.systems.roles), each
        )

    def _allowed(self, role: SystemRole, system: System, attack: Attack) -> None:
        """Refuses an attack on weights that are not there.

        Raises:
            DataError: With the reason.
        """
        if not isinstance(attack, WHITE_BOX):
            return
        if not self.white_box:  # nothing to compare attacked models with
            raise DataError(
                "the unlearned system gives no weights, so this attack cannot be run on it"
            )
        if not isinstance(system, LM):
            raise DataError(
                f"the {role} system gives no weights, so this attack cannot be run on it"
            )

    def _run(
        self, role: SystemRole, system: System, attack: Attack, setting: Setting, title: str
    ) -> None:
        try:
            context = self._context(role, attack, title)
            if isinstance(attack, PromptAttack) and attack.searches_on() is not None:
                logger.info(f"{title}: it is prepared.")
                attack = self._prepared(role, system, attack, context, title)
            held = attack.held_out(context)
            setting.records = held
            self._beside = attack.beside(context)
            match attack:
                case PromptAttack():
                    logger.info(f"{title}.")
                    self._asked(role, system, setting, title, attack.prompts)
                case ConversationAttack():
                    self._conversations(role, system, attack, context, setting, title)
                case ModelAttack():
                    self._weights(role, cast(LM, system), attack, context, setting, title)
                case InsideAttack():
                    lm = cast(LM, system)
                    self._seen(
                        role, system, attack, context, setting, title, INSIDE,
                        lambda: attack.look(lm, held, context),
                    )  # fmt: skip
                case InferenceAttack():
                    self._seen(
                        role, system, attack, context, setting, title, INFERRED,
                        lambda: attack.infer(system, context),
                    )  # fmt: skip
                case _:
                    raise RunError("it is of none of the five kinds of attacks.")
        except DelibleError as error:
            raise DataError(f"not run: {error}") from error
        if role == "unlearned":
            budget = attack.budget(context)
            setting.queries += budget.queries
            setting.steps = budget.steps
            setting.tokens += budget.tokens
            setting.notes.update(context.notes)

    # ---- attacks that only ask

    def _splits(self, role: SystemRole, forget: Sequence[RecordBase]) -> Splits:
        splits: Splits = {"forget": forget, "retain": self.asking.attacked_retain(), **self._beside}
        unseen = splits.pop("holdout", self.asking.splits.get("holdout", ()))
        if role == "original" and "reference" not in self.systems.roles:
            splits["holdout"] = spaced(unseen, ATTACKED_HOLDOUT)
        return splits

    def _conversations(
        self,
        role: SystemRole,
        system: System,
        attack: ConversationAttack,
        context: AttackContext,
        setting: Setting,
        title: str,
    ) -> None:
        logger.info(f"{title}.")

        def progress(done: int, total: int) -> None:
            self.asking.context.stage(f"{title}: talking", done, total)

        talker = Remembering(system, self.asking.cache, progress)
        talks: dict[str, Sequence[Prompt]] = {}
        for records in self._splits(role, setting.records).values():
            found = attack.converse(talker, records, context)
            talks |= {
                record.digest: prompts for record, prompts in zip(records, found, strict=True)
            }
        if role == "unlearned":
            setting.queries += talker.asked

        def told(record: RecordBase, prompt: Prompt) -> Sequence[Prompt]:
            return talks[record.digest]

        self._asked(role, system, setting, title, told)

    def _asked(
        self,
        role: SystemRole,
        system: System,
        setting: Setting,
        title: str,
        rewrite: Callable[[RecordBase, Prompt], Sequence[Prompt]],
    ) -> None:
        splits = self._splits(role, setting.records)
        values = self.asking.evaluate(system, splits, self.asking.leaks, title, rewrite)
        setting.values[role] = values
        if role == "unlearned":
            setting.splits = splits
            setting.queries += values.asked
            setting.recovered = self.asking.recovered(system, setting.records, values, rewrite)

    def _prepared(
        self,
        role: SystemRole,
        system: System,
        attack: PromptAttack,
        context: AttackContext,
        title: str,
    ) -> PromptAttack:
        """The attack after its search, which is made once per system, attack, records and seed."""
        if attack.searches_on() == "original" and role != "original":
            if "original" not in self.systems.roles:
                raise DataError(
                    "it searches on the original model, which was not given.",
                    hint="Add --before MODEL.",
                )
            system = self.systems.kept("original")
        known = system.fingerprint
        key = None if known is None else preparation_key(known, attack, context)
        with self.kept.alone(key):
            kept = None if key is None else self.kept.preparation(key)
            if kept is not None:
                logger.info(f"{title}: the search is known.")
                spec, notes = kept
                context.notes.update(notes)
                return cast(PromptAttack, build("attack", spec))
            prepared = attack.prepare(system, context)
            if key is not None:
                self.kept.keep_preparation(key, prepared, context.notes)
            return prepared

    # ---- attacks on weights, from the inside, and by inference

    def _weights(
        self,
        role: SystemRole,
        lm: LM,
        attack: ModelAttack,
        context: AttackContext,
        setting: Setting,
        title: str,
    ) -> None:
        splits = self._splits(role, setting.records)
        self._held = setting.records[:CURVE_ROWS]

        def attacked() -> Attacked:
            parts: list[SystemValues] = []
            judged: list[str] = []
            for made, records in attack.each(lm, context):
                asked = {**splits, "forget": records}
                parts.append(
                    self.asking.evaluate(made, asked, self.asking.leaks, title, cached=False)
                )
                judged += digests(records)
                del made
                gc.collect()
            if judged != digests(setting.records):
                raise RunError(
                    "it was judged on other records than it says it holds out.",
                    where=f"attack '{attack.card.name}'",
                )
            values = parts[0] if len(parts) == 1 else joined(parts, "forget")
            return Attacked(values, self._curve, dict(context.notes), dict(context.numbers))

        self._curve: list[tuple[int, float | None]] = []
        found = self._once(lm, attack, context, splits, title, attacked)
        setting.values[role], setting.curves[role] = found.values, found.curve
        setting.numbers[role] = found.numbers
        context.notes.update(found.notes)
        if role == "unlearned":
            setting.queries += found.values.asked

    def _seen(
        self,
        role: SystemRole,
        system: System,
        attack: InsideAttack | InferenceAttack,
        context: AttackContext,
        setting: Setting,
        title: str,
        measure: str,
        look: Callable[[], Seen],
    ) -> None:
        def attacked() -> Attacked:
            reader = cast(LM, system) if isinstance(attack, InsideAttack) else None
            with tokens_read(reader, self.states) as read:
                seen = look()
            items = {measure: {split: list(row) for split, row in (seen.items or {}).items()}}
            means = {measure: {split: mean_of(row) for split, row in items[measure].items()}}
            values = SystemValues(system.name, items if seen.items is not None else {}, means)
            layers = list(enumerate(seen.layers, start=1))
            notes, numbers = dict(context.notes), dict(seen.numbers)
            return Attacked(values, layers, notes, numbers, read.tokens)

        splits: Splits = {"forget": setting.records, "holdout": context.holdout}
        found = self._once(system, attack, context, splits, title, attacked)
        if found.values.items:
            setting.values[role] = found.values
        setting.layers[role], setting.numbers[role] = found.curve, found.numbers
        context.notes.update(found.notes)
        if role == "unlearned":
            setting.tokens += found.tokens

    def _once(
        self,
        system: System,
        attack: Attack,
        context: AttackContext,
        splits: Splits,
        title: str,
        make: Callable[[], Attacked],
    ) -> Attacked:
        """What an attack found, made once per system, attack, records, seed and measures."""
        known = system.fingerprint
        key = (
            None
            if known is None
            else attacked_key(known, attack, context, splits, self.asking.leaks)
        )
        with self.kept.alone(key):
            found = None if key is None else self.kept.attacked(key)
            if found is not None:
                logger.info(f"{title}: known from an earlier audit.")
                return found
            logger.info(f"{title}.")
            found = make()
            if key is not None:
                self.kept.keep_attacked(key, found)
        return found

    def _context(self, role: SystemRole, attack: Attack | None, title: str) -> AttackContext:
        from delible.world import unrelated

        def model(wanted: SystemRole) -> LM | None:
            compared = attack.compares if attack is not None else ()
            needed = wanted in compared or (wanted, role) == ("original", "unlearned")
            if not needed or wanted not in self.systems.roles:
                return None
            loaded = self.systems.kept(wanted)
            return loaded if isinstance(loaded, LM) else None

        def observe(lm: LM, step: int) -> None:
            metric = build("metric", "answer_probability")
            values = evaluate(lm, {"forget": self._held}, [metric])
            self._curve.append((step, values.means["answer_probability"]["forget"]))

        def progress(done: int, total: int) -> None:
            self.asking.context.stage(title, done, total)

        return AttackContext(
            forget=self.asking.splits["forget"],
            retain=kept_records(self.asking.splits),
            unrelated=unrelated(),
            original=model("original"),
            reference=model("reference"),
            neighbours=self.asking.splits.get("neighbours", ()),
            holdout=spaced(self.asking.splits.get("holdout", ()), ATTACKED_HOLDOUT),
            seed=self.asking.context.seed,
            roles=self.asking.context.roles,
            states=self.states,
            observe=observe,
            progress=progress,
        )


__all__ = ["ATTACKED_HOLDOUT", "CURVE_ROWS", "Attacking"]
