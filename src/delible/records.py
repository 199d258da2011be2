"""Records: what is forgotten, kept and asked. Plain frozen data, JSONL in and JSONL out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from delible.messages import IDENTITY, ImagePart
from delible.messages import Message as Message

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class RecordBase(BaseModel):
    """Fields every record has.

    Attributes:
        subject: The person, work, place or concept that the record is about.
        neighbour_of: The forgotten subject that a retain record is linked to.
        group: A word that a data set uses to tell its rows apart (a relation, a split, an
            attack kind); free for use in reports and samplers.
        client: Whose data it is, among many that train together (federated runs).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    subject: str | None = None
    neighbour_of: str | None = None
    group: str | None = None
    client: str | None = None

    @model_serializer(mode="wrap")
    def _written(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        found: dict[str, Any] = write(self)
        for name in ("client", "images"):  # so that digests of records without them stay
            if not found.get(name, True):
                del found[name]
        return found

    @cached_property
    def where(self) -> str:
        """The file and line that it was read from, for messages; empty: it was made in memory.

        No part of what it is: records that say the same are equal wherever they come from.
        """
        return ""

    @property
    def digest(self) -> str:
        """SHA-256 over the record's content (hexadecimal)."""
        return hashlib.sha256(self.model_dump_json(context=IDENTITY).encode()).hexdigest()


class Shown(RecordBase):
    """A record that may be asked about pictures.

    Attributes:
        images: What the question is about, shown before it. They are written, and hashed, only
            where there are some, so that digests of plain records stay.
    """

    images: tuple[ImagePart, ...] = ()


class QA(Shown):
    """A question and its answer.

    Attributes:
        aliases: Other correct answers.
        paraphrases: Other forms of the question.
        paraphrased_answers: Other forms of the answer (same fact).
        perturbed: Wrong answers of the same form.
    """

    type: Literal["qa"] = "qa"
    question: Text
    answer: Text
    aliases: tuple[Text, ...] = ()
    paraphrases: tuple[Text, ...] = ()
    paraphrased_answers: tuple[Text, ...] = ()
    perturbed: tuple[Text, ...] = ()


class Passage(RecordBase):
    """Running text."""

    type: Literal["passage"] = "passage"
    text: Text


class Choice(Shown):
    """A multiple-choice question with one letter per option, so 26 at most.

    Attributes:
        correct: Index of the right option, from 0.
    """

    type: Literal["choice"] = "choice"
    question: Text
    options: tuple[Text, ...] = Field(min_length=2, max_length=26)
    correct: int = Field(ge=0)

    @model_validator(mode="after")
    def _right_option_exists(self) -> Self:
        if self.correct >= len(self.options):
            raise PydanticCustomError(
                "no_such_option",
                "the right option is {correct}, out of range: "
                "there are {count} options, counted from 0.",
                {"correct": self.correct, "count": len(self.options)},
            )
        return self


class Dialogue(RecordBase):
    """A conversation; its last assistant turn is what is learned or forgotten."""

    type: Literal["dialogue"] = "dialogue"
    messages: tuple[Message, ...] = Field(min_length=1)


def images_of(record: RecordBase) -> tuple[ImagePart, ...]:
    """The pictures that a record holds, in order; of a dialogue those of all turns."""
    if isinstance(record, Shown):
        return record.images
    if isinstance(record, Dialogue):
        return tuple(image for turn in record.messages for image in turn.images)
    return ()


Record = Annotated[QA | Passage | Choice | Dialogue, Field(discriminator="type")]


class ForgetRequest(BaseModel):
    """What to forget, and what surrounds it.

    Give forget records, or only the names of subjects; the rest is optional.

    Attributes:
        forget: Records to forget.
        subjects: Names of people, works or concepts to forget.
        retain: Records to keep.
        neighbours: Records close to the forgotten ones, to be kept and watched.
        holdout: Records of the same kind that the model never saw.
        created: When it was made; no part of its id.
        predecessor: Id of the request that was carried out on the model before this one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    forget: tuple[Record, ...] = ()
    subjects: tuple[Text, ...] = ()
    retain: tuple[Record, ...] = ()
    neighbours: tuple[Record, ...] = ()
    holdout: tuple[Record, ...] = ()
    created: datetime | None = None
    predecessor: str | None = None

    @property
    def id(self) -> str:
        """SHA-256 over what is to be forgotten and kept, and the predecessor (hexadecimal)."""
        content = self.model_dump_json(exclude={"created"}, context=IDENTITY)
        return hashlib.sha256(content.encode()).hexdigest()


def digest(records: Sequence[RecordBase]) -> str:
    """SHA-256 over a sequence of records, in order (hexadecimal)."""
    joined = hashlib.sha256()
    for record in records:
        joined.update(record.digest.encode())
    return joined.hexdigest()


def to_json_line(record: RecordBase) -> str:
    """The record as one JSON line, without fields that hold their default."""
    content: dict[str, Any] = {"type": getattr(record, "type", ""), **record.model_dump(
        mode="json", exclude_defaults=True
    )}  # fmt: skip
    return json.dumps(content, ensure_ascii=False)
