"""What an attack is: it changes the prompt, or it changes the model. Both say their budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pydantic import Field

from delible.component import Component
from delible.measure.requests import Prompt
from delible.records import RecordBase

if TYPE_CHECKING:
    from delible.lm.lm import LM


class PromptAttack(Component):
    """Asks the same thing in other ways."""

    forms: int = Field(5, ge=1, description="At most this many forms of each question.")

    def prompts(self, record: RecordBase, prompt: Prompt) -> Sequence[Prompt]:
        """The first forms of :meth:`rewrite`."""
        return tuple(self.rewrite(record, prompt))[: self.forms]

    def rewrite(self, record: RecordBase, prompt: Prompt) -> Sequence[Prompt]:
        """Variants of the prompt; empty where the attack does not apply to the record."""
        raise NotImplementedError


@dataclass(frozen=True)
class AttackContext:
    """What a model attack may use. It is the same for every system that is attacked.

    Attributes:
        forget: Forget records.
        retain: Retain records.
        unrelated: Records about nothing that was forgotten or kept.
        original: The model before unlearning, if there is one.
        observe: Called as ``observe(lm, step)`` during an attack that takes steps, so that the
            audit can draw a curve.
        notes: Findings the attack wants in the report, such as a collision rate.
    """

    forget: Sequence[RecordBase]
    retain: Sequence[RecordBase]
    unrelated: Sequence[RecordBase]
    original: LM | None
    seed: int
    say: Callable[[str], None]
    observe: Callable[[LM, int], None] | None = None
    notes: dict[str, object] = field(default_factory=dict)


class ModelAttack(Component):
    """Changes the weights and sees what comes back."""

    def variants(self) -> Sequence[Mapping[str, object]]:
        """Settings to run, one row of the matrix each; keys are option names."""
        return ({},)

    def variant_title(self) -> str:
        """This setting in words, such as "4 bit, groups of 64"."""
        return ""

    def held_out(self, context: AttackContext) -> Sequence[RecordBase]:
        """Forget records that the attack did not train on; leaks are measured on these."""
        return context.forget

    def apply(self, lm: LM, context: AttackContext) -> LM:
        """The attacked model; the one given stays as it was."""
        raise NotImplementedError
