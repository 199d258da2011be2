"""What earlier edits made a model forget, asked again after a further one.

    returned = mean over questions of an earlier request of (p now - p right after that request)

p is the probability of a token of the forgotten answer (geometric mean over its tokens). Of several
earlier requests the one that comes back furthest counts, so that none is lost among many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from delible.edit.verify import spoken
from delible.errors import ModelError
from delible.files import write_json
from delible.records import Record, RecordBase
from delible.system.asks import Score
from delible.system.questions import answer_of, ask, has_answer

if TYPE_CHECKING:
    from delible.lm.lm import LM

#: Questions of one request that are kept, and of all earlier requests that are asked, at most.
KEPT, ASKED = 12, 48
T = TypeVar("T")


class ReturnedError(ModelError):
    """An edit that would have brought an earlier request back: nothing was changed."""


class Forgotten(BaseModel):
    """Questions that an edit was about, at most :data:`KEPT`, evenly spaced.

    Attributes:
        records: Each asks something, and has an answer.
        left: p of each right after the edit, in [0, 1].
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    records: tuple[Record, ...] = Field(min_length=1)
    left: tuple[float, ...]

    @classmethod
    def of(cls, lm: LM, records: Sequence[Record]) -> Forgotten | None:
        """What is left of records now; None where none asks anything."""
        asked = tuple(_spaced([one for one in records if _is_asked(one)], KEPT))
        return cls(records=asked, left=tuple(_probabilities(lm, asked))) if asked else None

    def within(self, count: int) -> Forgotten:
        """At most so many of its questions."""
        return Forgotten(
            records=tuple(_spaced(self.records, count)), left=tuple(_spaced(self.left, count))
        )

    def save(self, folder: Path) -> None:
        """Writes them where a run keeps what it was asked to forget; both go together.

        Args:
            folder: The patch's, in a run.
        """
        write_json(_place(folder), self.model_dump(mode="json"))

    @classmethod
    def load(cls, folder: Path) -> Forgotten | None:
        """What :meth:`save` wrote; None where it is not kept, or not any more.

        Raises:
            ValidationError: It was damaged.
            OSError: It cannot be read.
        """
        path = _place(folder)
        return cls.model_validate_json(path.read_bytes()) if path.exists() else None


@dataclass(frozen=True)
class Returned:
    """What became of earlier requests. Numbers are means of p, in [0, 1]; higher = remembered.

    Attributes:
        requests: How many were asked about.
        questions: With how many questions.
        left: Right after their own edits.
        before, after: Before and after this edit.
        worst: Which one came back furthest, the first request being 1.
        furthest: By how much, since its own edit; below 0: less is left.
        by_this: The part of it that this edit brought.
    """

    requests: int
    questions: int
    left: float
    before: float
    after: float
    worst: int
    furthest: float
    by_this: float

    def notes(self) -> dict[str, object]:
        """As plain data."""
        return {
            "requests": self.requests, "questions": self.questions,
            "left": float(f"{self.left:.4g}"), "before": float(f"{self.before:.4g}"),
            "after": float(f"{self.after:.4g}"), "furthest": self.worst,
            "returned": float(f"{self.furthest:.4g}"),
        }  # fmt: skip

    def __str__(self) -> str:
        """In one sentence."""
        return (
            f"Of {self.requests} earlier request{'s' * (self.requests > 1)} {self.questions} "
            f"question{'s' * (self.questions > 1)} were asked again: the forgotten answers went "
            f"from a probability of {self.before:.3f} to {self.after:.3f} (right after those "
            f"requests it was {self.left:.3f})."
        )

    def require(self, most: float, where: str) -> None:
        """Refuses an edit that brings an earlier request back.

        Args:
            most: How far it may be back, since its own edit.

        Raises:
            ReturnedError: It is further, and this edit had a part in it.
        """
        if self.furthest > most and self.by_this > 0:
            raise ReturnedError(
                "the edit was refused and nothing was changed: it brings an earlier request back. "
                f"A token of the answers of request {self.worst} of {self.requests} is likelier by "
                f"{self.furthest:.2g} than right after that request, {most:g} at most is allowed.",
                where=where,
                hint="Ask for both requests together, edit less, take alphaedit, which keeps "
                "earlier edits best, or allow more: most_returned.",
            )


class Earlier:
    """Questions of earlier edits, and how a model answers them before a further one.

    Args:
        lm: The model as it is.
        forgotten: Of the edits that it wears; of many, evenly spaced ones.
    """

    def __init__(self, lm: LM, forgotten: Sequence[Forgotten]) -> None:
        chosen = _spaced(forgotten, ASKED)
        self._asked = [one.within(ASKED // len(chosen)) for one in chosen]
        self._before = self._now(lm)

    def after(self, lm: LM) -> Returned | None:
        """How it answers them now; None where there are none."""
        if not self._asked:
            return None
        left = [fmean(one.left) for one in self._asked]
        now = self._now(lm)
        far = [one - own for one, own in zip(now, left, strict=True)]
        worst = max(range(len(far)), key=far.__getitem__)
        counts = [len(one.records) for one in self._asked]
        questions = sum(counts)

        def mean(values: Sequence[float]) -> float:
            return sum(n * one for n, one in zip(counts, values, strict=True)) / questions

        return Returned(
            len(self._asked), questions, mean(left), mean(self._before), mean(now),
            worst + 1, far[worst], now[worst] - self._before[worst],
        )  # fmt: skip

    def _now(self, lm: LM) -> list[float]:
        """Mean p of each request's questions."""
        every = _probabilities(lm, [record for one in self._asked for record in one.records])
        found = []
        for one in self._asked:
            found.append(fmean(every[: len(one.records)]))
            every = every[len(one.records) :]
        return found


def _place(folder: Path) -> Path:
    """Beside the patch: what is said of whom one may want to be rid of without the patch."""
    return folder.parent / "data" / "asked_again.json"


def _is_asked(record: RecordBase) -> bool:
    prompt = ask(record)
    return prompt is not None and bool(prompt.messages) and has_answer(record)


def _probabilities(lm: LM, records: Sequence[RecordBase]) -> list[float]:
    """p of each record's answer."""
    asked = [Score(prompt, answer_of(one)) for one in records if (prompt := ask(one)) is not None]
    return [one for one, _ in spoken(lm, asked, ends=False)]


def _spaced(items: Sequence[T], count: int) -> list[T]:
    """At most so many, evenly spaced."""
    if len(items) <= count:
        return list(items)
    return [items[place * len(items) // count] for place in range(count)]


__all__ = ["Earlier", "Forgotten", "Returned", "ReturnedError"]
