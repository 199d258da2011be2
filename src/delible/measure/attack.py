"""What an attack is: it changes the prompt, or it changes the model. Both say their budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from delible.component import Component
from delible.records import RecordBase
from delible.system.asks import Prompt
from delible.system.base import System

if TYPE_CHECKING:
    from delible.lm.lm import LM


class Attack(Component):
    """What every attack has: its settings, and the records that it may be judged on."""

    def variants(self) -> Sequence[Mapping[str, object]]:
        """Settings to run, one row of the matrix each; keys are option names."""
        return ({},)

    def variant_title(self) -> str:
        """This setting in words, such as "4 bit, groups of 64"."""
        return ""

    @property
    def control(self) -> bool:
        """Whether this setting only shows that the attack does no harm of its own.

        What a control brings back counts; that it brings nothing back is no evidence.
        """
        return False

    def held_out(self, context: AttackContext) -> Sequence[RecordBase]:
        """Forget records that the attack did not train on; leaks are measured on these."""
        return context.forget


class PromptAttack(Attack):
    """Asks the same thing in other ways.

    An attack that must search for its words first overrides :meth:`searches_on` and
    :meth:`prepare`; the others need neither.
    """

    forms: int = Field(5, ge=1, description="At most this many forms of each question.")

    def searches_on(self) -> Literal["system", "original"] | None:
        """Which system :meth:`prepare` is given: the attacked one, or always the original.

        None: there is nothing to prepare.
        """
        return None

    def prepare(self, system: System, context: AttackContext) -> PromptAttack:
        """The attack with what it found out about a system filled into its options.

        So what was found is plain data: ``spec()`` writes it down, an audit caches it by (system
        fingerprint, attack, records, seed), and the prepared attack can be run on another system.

        Raises:
            ModelError: The system does not give what the search needs.
            DataError: The records do not.
        """
        return self

    def prompts(self, record: RecordBase, prompt: Prompt) -> Sequence[Prompt]:
        """The first forms of :meth:`rewrite`."""
        return tuple(self.rewrite(record, prompt))[: self.forms]

    def rewrite(self, record: RecordBase, prompt: Prompt) -> Sequence[Prompt]:
        """Variants of the prompt; empty where the attack does not apply to the record."""
        raise NotImplementedError


@dataclass(frozen=True)
class AttackContext:
    """What an attack may use. It is the same for every system that is attacked.

    Attributes:
        forget: Forget records.
        retain: Retain records.
        unrelated: Records about nothing that was forgotten or kept.
        original: The model before unlearning, if there is one.
        observe: Called as ``observe(lm, step)`` during an attack that takes steps, so that the
            audit can draw a curve.
        notes: Findings the attack wants in the report, such as a collision rate; the text under
            ``"note"`` is printed as it is.
        progress: Called as ``progress(done, total)`` by an attack that searches or trains.
    """

    forget: Sequence[RecordBase]
    retain: Sequence[RecordBase]
    unrelated: Sequence[RecordBase]
    original: LM | None
    seed: int
    observe: Callable[[LM, int], None] | None = None
    notes: dict[str, object] = field(default_factory=dict)
    progress: Callable[[int, int], None] | None = None


class ModelAttack(Attack):
    """Changes the weights and sees what comes back."""

    def apply(self, lm: LM, context: AttackContext) -> LM:
        """The attacked model; the one given stays as it was."""
        raise NotImplementedError
