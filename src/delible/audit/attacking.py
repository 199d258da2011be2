"""Attacks: on prompts and on weights, each with what it may use, once per system and seed."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Sequence
from typing import cast

from delible.audit.asking import Asking
from delible.audit.attacked import Attacked, Kept, attacked_key, preparation_key
from delible.audit.choice import Splits, kept_records, spaced
from delible.audit.leaks import Setting
from delible.audit.result import SystemRole
from delible.audit.systems import Systems
from delible.component import build
from delible.errors import DataError, DelibleError
from delible.lm.lm import LM
from delible.measure.attack import AttackContext, ModelAttack, PromptAttack
from delible.measure.evaluate import evaluate
from delible.records import RecordBase
from delible.system.base import System

logger = logging.getLogger(__name__)

#: Holdout records that are asked under attack.
ATTACKED_HOLDOUT = 40
#: Held-out records that a curve is measured on.
CURVE_ROWS = 16


def empty_row(attack: PromptAttack | ModelAttack) -> Setting:
    """An attack's row, still empty."""
    card = attack.card
    return Setting(
        card.name,
        attack.variant_title(),
        card.title,
        family="prompt" if isinstance(attack, PromptAttack) else card.family or "",
        control=attack.control,
        changes=card.changes or "",
    )


class Attacking:
    """Attacks systems, one attack after the other.

    Attributes:
        white_box: Whether the unlearned system gives its weights.
    """

    def __init__(self, asking: Asking, systems: Systems) -> None:
        self.asking, self.systems = asking, systems
        self.kept = Kept(asking.cache)
        self.white_box = True
        #: Records that the running attack's curve is measured on.
        self._held: Sequence[RecordBase] = ()

    def attack(
        self, role: SystemRole, system: System, attack: PromptAttack | ModelAttack, setting: Setting
    ) -> None:
        """Attacks one system and puts what came of it into the attack's row."""
        began = time.perf_counter()
        splits: Splits = {
            "forget": self.asking.splits["forget"],
            "retain": self.asking.attacked_retain(),
        }
        if role == "original" and "reference" not in self.systems.roles:
            splits["holdout"] = spaced(self.asking.splits.get("holdout", ()), ATTACKED_HOLDOUT)
        title = f"{role}: {setting.title}{f' ({setting.variant})' if setting.variant else ''}"
        if isinstance(attack, PromptAttack):
            self._attack_prompts(role, system, attack, setting, splits, title)
        elif not self.white_box:  # nothing to compare attacked models with
            setting.notes["skipped"] = (
                "the unlearned system gives no weights, so this attack cannot be run on it"
            )
        elif not isinstance(system, LM):
            setting.notes["skipped"] = (
                f"the {role} system gives no weights, so this attack cannot be run on it"
            )
        else:
            self._attack_weights(role, system, attack, setting, splits, title)
        setting.seconds += time.perf_counter() - began

    def _attack_prompts(
        self,
        role: SystemRole,
        system: System,
        attack: PromptAttack,
        setting: Setting,
        splits: Splits,
        title: str,
    ) -> None:
        logger.info(f"{title}.")
        if attack.searches_on() is not None:
            context = self._context(role, [], title)
            try:
                splits["forget"] = attack.held_out(context)
                attack = self._prepared(role, system, attack, context, title)
            except DelibleError as error:
                setting.notes["skipped"] = f"not run: {error}"
                return
            if role == "unlearned":
                setting.notes.update(context.notes)
        setting.records = splits["forget"]
        setting.values[role] = self.asking.evaluate(
            system, splits, self.asking.leaks, title, attack.prompts
        )

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
            system = self.systems.original()
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

    def _attack_weights(
        self,
        role: SystemRole,
        lm: LM,
        attack: ModelAttack,
        setting: Setting,
        splits: Splits,
        title: str,
    ) -> None:
        curve: list[tuple[int, float | None]] = []
        context = self._context(role, curve, title)
        try:
            splits["forget"] = attack.held_out(context)
        except DelibleError as error:
            setting.notes["skipped"] = f"not run: {error}"
            return
        self._held = splits["forget"][:CURVE_ROWS]
        setting.records = splits["forget"]
        key = attacked_key(lm.fingerprint, attack, context, splits, self.asking.leaks)
        with self.kept.alone(key):
            found = self.kept.attacked(key)
            if found is not None:
                logger.info(f"{title}: known from an earlier audit.")
            else:
                logger.info(f"{title}.")
                try:
                    attacked = attack.apply(lm, context)
                except DelibleError as error:
                    setting.notes["skipped"] = f"not run: {error}"
                    return
                values = self.asking.evaluate(
                    attacked, splits, self.asking.leaks, title, cached=False
                )
                found = Attacked(values, curve, dict(context.notes))
                self.kept.keep_attacked(key, found)
                del attacked
                gc.collect()
        setting.values[role], setting.curves[role] = found.values, found.curve
        if role == "unlearned":
            setting.notes.update(found.notes)

    def _context(
        self, role: SystemRole, curve: list[tuple[int, float | None]], title: str
    ) -> AttackContext:
        from delible.world import unrelated

        original = None
        if role == "unlearned" and "original" in self.systems.roles:
            loaded = self.systems.original()
            original = loaded if isinstance(loaded, LM) else None

        def observe(lm: LM, step: int) -> None:
            metric = build("metric", "answer_probability")
            values = evaluate(lm, {"forget": self._held}, [metric])
            curve.append((step, values.means["answer_probability"]["forget"]))

        def progress(done: int, total: int) -> None:
            self.asking.context.stage(title, done, total)

        return AttackContext(
            forget=self.asking.splits["forget"],
            retain=kept_records(self.asking.splits),
            unrelated=unrelated(),
            original=original,
            seed=self.asking.context.seed,
            observe=observe,
            progress=progress,
        )
