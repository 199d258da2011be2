"""A tokenized record."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from delible.lm.template import Encoded
from delible.train.keywords import name_tokens

#: What a loss averages over: rows, answer tokens, or all real positions.
Unit = Literal["row", "answer_token", "position"]
RetainKind = Literal["direct", "indirect", "general"]


@dataclass(frozen=True)
class Shortened:
    """What a row lost because it was too long (see :mod:`delible.train.fitting`).

    Attributes:
        lost: ``turns``, ``question``, ``answer``, in this order.
        length: Tokens that it had.
    """

    lost: tuple[str, ...]
    length: int


@dataclass(frozen=True)
class Row:
    """A tokenized record with its role's index.

    Attributes:
        index: Position among the rows of its role.
        key: Digest of the token ids and the answer's start; names cached values.
        subject: What the record is about.
        neighbour_of: The forgotten subject that a retain record is linked to.
        kind: For retain rows: ``direct`` (linked to a forgotten subject), ``indirect`` (about
            another subject) or ``general`` (about none).
        taught: What an instructed reference model reads instead: its instruction, then the same
            question and answer. The answer's tokens are the same.
        shortened: What was left out; None: nothing.
        asked: What the prompt says, turn by turn.
        tokenizer: What the row was tokenized with.
        contexts: The same row behind other texts, by name, for the reference model.
    """

    index: int
    encoded: Encoded
    key: str
    subject: str | None = None
    neighbour_of: str | None = None
    kind: RetainKind = "general"
    taught: Encoded | None = None
    shortened: Shortened | None = None
    asked: tuple[str, ...] = field(default=(), compare=False, repr=False)
    tokenizer: Any = field(default=None, compare=False, repr=False)
    contexts: tuple[tuple[str, Encoded], ...] = ()

    @cached_property
    def names(self) -> tuple[bool, ...]:
        """Which answer tokens belong to names or numbers, by :func:`keywords.name_spans`."""
        ids, start = self.encoded.ids, self.encoded.start
        return name_tokens(self.tokenizer, ids[:start], ids[start:], self.asked, self.subject or "")

    @property
    def for_reference(self) -> Encoded:
        """The tokens that the reference model reads."""
        return self.taught or self.encoded

    def behind(self, context: str) -> Encoded | None:
        """The same behind a named text, if there is one; without a name as it is."""
        return dict(self.contexts).get(context) if context else self.for_reference

    def units(self, unit: Unit) -> int:
        """How many units of the given kind the row has."""
        if unit == "row":
            return 1
        return self.encoded.answer_tokens if unit == "answer_token" else len(self.encoded.ids)
