"""What an attack is: one of five, each with one verb. All say what they take of a system.

    prompt        rewrites a question                          rewrite(record, prompt) -> prompts
    conversation  talks first, and asks in the end             converse(system, records) -> prompts
    model         changes the weights                          apply(lm) -> lm
    inside        looks at hidden states                       look(lm, records) -> scores
    inference     tells from outputs that something was there  infer(system) -> scores

Every attack runs alike on the unlearned system, the original and the reference. Knowledge scores
are larger where more is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from delible.cards import Depth
from delible.component import Component
from delible.measure.metric import Item, SystemValues
from delible.records import RecordBase
from delible.system.asks import Prompt
from delible.system.base import System
from delible.system.roles import Roles

if TYPE_CHECKING:
    from delible.lm.lm import LM
    from delible.lm.states import StateStore


def _store() -> StateStore:
    from delible.lm.states import StateStore

    return StateStore()


#: Numbers of whole systems, by name and system.
Findings = Mapping[str, Mapping[str, float | None]]


@dataclass(frozen=True)
class Budget:
    """What an attack takes of one system, beside the questions of the metrics.

    Attributes:
        queries: Questions that are asked at most.
        tokens: Tokens that are asked for, or trained on, at most; those that are read from the
            inside are counted while they are read.
        steps: Steps of training, or of a search, each of about one forward and backward pass.
    """

    queries: int = 0
    tokens: int = 0
    steps: int = 0

    def __add__(self, other: Budget) -> Budget:
        return Budget(
            self.queries + other.queries, self.tokens + other.tokens, self.steps + other.steps
        )


@dataclass(frozen=True)
class AttackContext:
    """What an attack may use. It is the same for every system that is attacked.

    Attributes:
        forget: Forget records.
        retain: Retain records.
        unrelated: Records about nothing that was forgotten or kept.
        original: The model before unlearning, if there is one and it was asked for
            (:attr:`Attack.compares`).
        observe: Called as ``observe(lm, step)`` during an attack that takes steps, so that the
            audit can draw a curve.
        notes: Findings the attack wants in the report, such as a collision rate; the text under
            ``"note"`` is printed as it is.
        progress: Called as ``progress(done, total)`` by an attack that searches or trains.
        holdout: Records of the same kind that no system saw.
        reference: The model that never saw the forget records, as ``original``.
        roles: Who attacks, judges or translates by talking.
        neighbours: Records to keep that are close to the forgotten ones; they may be ``retain``.
        numbers: Findings of an attack on the weights for the whole system, by name.
        states: Hidden states that other attacks have read already.
    """

    forget: Sequence[RecordBase]
    retain: Sequence[RecordBase]
    unrelated: Sequence[RecordBase]
    original: LM | None
    seed: int
    observe: Callable[[LM, int], None] | None = None
    notes: dict[str, object] = field(default_factory=dict)
    progress: Callable[[int, int], None] | None = None
    holdout: Sequence[RecordBase] = ()
    reference: LM | None = None
    roles: Roles = field(default_factory=Roles)
    neighbours: Sequence[RecordBase] = ()
    numbers: dict[str, float | None] = field(default_factory=dict)
    states: StateStore = field(default_factory=_store)


class Attack(Component):
    """What every attack has: its settings, and the records that it may be judged on."""

    #: Models that it is given beside the attacked one, in :class:`AttackContext`.
    compares: ClassVar[tuple[Literal["original", "reference"], ...]] = ()
    #: Whether what it finds decides a verdict; otherwise it is told beside it.
    weighs: ClassVar[bool] = True

    def variants(self, depth: Depth = "standard") -> Sequence[Mapping[str, object]]:
        """Settings to run, one row of the matrix each; keys are option names.

        Args:
            depth: How deep the audit goes.
        """
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

    def budget(self, context: AttackContext) -> Budget:
        """What it takes of one system at most, beside the questions of the metrics."""
        return Budget()

    def held_out(self, context: AttackContext) -> Sequence[RecordBase]:
        """What leaks are measured on: forget records that the attack did not train on.

        An attack that only asks may give probes of its own, made of forget records.
        """
        return context.forget

    def beside(self, context: AttackContext) -> Mapping[str, Sequence[RecordBase]]:
        """Records of its own that an attack that only asks is measured on besides, by split.

        Such as invented facts; ``"retain"`` and ``"holdout"`` stand in for the kept records and
        for those that no system saw.
        """
        return {}

    def findings(
        self, values: Mapping[str, SystemValues], splits: Mapping[str, Sequence[RecordBase]]
    ) -> Findings:
        """Numbers that are read off what was measured on all systems, by name and system.

        Args:
            values: By system ("unlearned", "original", "reference"), as far as there are any.
            splits: The records that were asked.
        """
        return {}


class PromptAttack(Attack):
    """Asks the same thing in other ways.

    An attack that must search for its words first overrides :meth:`searches_on` and
    :meth:`prepare`; the others need neither.
    """

    forms: int = Field(5, ge=1, description="At most this many forms of each question.")

    def variants(self, depth: Depth = "standard") -> Sequence[Mapping[str, object]]:
        """One row; a quick audit asks in two forms at most."""
        return ({"forms": min(2, self.forms)},) if depth == "quick" else ({},)

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


class ConversationAttack(Attack):
    """Talks with the system, and leaves conversations in which the answer may come out."""

    def converse(
        self, system: System, records: Sequence[RecordBase], context: AttackContext
    ) -> list[Sequence[Prompt]]:
        """For each record the conversations that end in a question, none without one.

        The metrics ask the system to go on from each; whoever attacks takes the one that works.

        Args:
            system: Who is talked with; it only has to answer.
            records: Forget records, or records to keep (what is suppressed unfairly).

        Raises:
            DelibleError: The records do not give what it needs, or nobody plays a part.
        """
        raise NotImplementedError


class ModelAttack(Attack):
    """Changes the weights and sees what comes back."""

    def apply(self, lm: LM, context: AttackContext) -> LM:
        """The attacked model; the one given stays as it was."""
        raise NotImplementedError

    def each(self, lm: LM, context: AttackContext) -> Iterator[tuple[LM, Sequence[RecordBase]]]:
        """The attacked models, one after the other, each with the records that it is judged on.

        All records together are those of :meth:`Attack.held_out`, in its order. Most attacks make
        one model, by :meth:`apply`; one that trains on some records and judges by the others, in
        turns, overrides this instead.
        """
        yield self.apply(lm, context), self.held_out(context)


@dataclass(frozen=True)
class Seen:
    """What was seen or told of a system without an answer of it.

    Attributes:
        items: Knowledge scores, one per record, by split ("forget"; "holdout" where there is no
            reference to compare with). None: the attack gives numbers only.
        numbers: Findings for the whole system, by name.
        layers: A score of each layer, from the first; empty where it has none.
    """

    items: Mapping[str, Sequence[Item]] | None = None
    numbers: Mapping[str, float | None] = field(default_factory=dict)
    layers: Sequence[float | None] = ()


class InsideAttack(Attack):
    """Looks at hidden states for what the answers do not say."""

    def look(self, lm: LM, records: Sequence[RecordBase], context: AttackContext) -> Seen:
        """Knowledge scores of records, from the inside.

        Args:
            lm: The attacked model: the unlearned one, the original, or the reference.
            records: What :meth:`Attack.held_out` gives.

        Raises:
            DelibleError: The model or the records do not give what it needs.
        """
        raise NotImplementedError


class InferenceAttack(Attack):
    """Infers from outputs that something was learned, or unlearned."""

    weighs: ClassVar[bool] = False

    def infer(self, system: System, context: AttackContext) -> Seen:
        """Scores of the forget records (larger: more like something that is known), or numbers.

        Raises:
            DelibleError: The system or the records do not give what it needs.
        """
        raise NotImplementedError
