"""What a metric is: it declares requests, then turns answers into numbers. Nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from delible.component import Component
from delible.measure.engine import Progress
from delible.records import RecordBase
from delible.system.asks import Answer, Prompt, Request
from delible.system.roles import Roles

Answers = Mapping[Request, Answer]


@dataclass(frozen=True)
class Item:
    """The value of one metric on one record. ``None`` needs a reason and is never averaged.

    Attributes:
        forms: Where the record was asked in several forms, the value of each (the item's value is
            their mean).
    """

    value: float | None
    reason: str | None = None
    detail: str | None = None
    forms: tuple[float | None, ...] = ()

    def as_json(self) -> list[Any]:
        """Plain data; :meth:`from_json` reads it."""
        return [self.value, self.reason, self.detail, list(self.forms)]

    @classmethod
    def from_json(cls, content: Sequence[Any]) -> Item:
        """What :meth:`as_json` made; older data have no forms."""
        value, reason, detail, *forms = content
        return cls(value, reason, detail, tuple(forms[0]) if forms else ())


class ItemMetric(Component):
    """A metric with one value per record."""

    def with_roles(self, roles: Roles) -> Self:
        """The metric with whom it asks besides the system that it measures: nobody, usually.

        Raises:
            RecipeError: It needs somebody, and nobody was given.
        """
        return self

    def prompt(self, record: RecordBase) -> Prompt | None:
        """How a record is asked; ``None``: the metric does not apply to it."""
        from delible.system.questions import ask

        return ask(record)

    def requests(self, record: RecordBase, prompt: Prompt) -> Iterable[Request]:
        """What to ask the system about a record that is asked with ``prompt``.

        An attack may hand in another prompt than :meth:`prompt` would make.
        """
        raise NotImplementedError

    def follow_up(self, record: RecordBase, prompt: Prompt, answers: Answers) -> Iterable[Request]:
        """What to ask next, now that the answers so far are known (a second round of a talk).

        Asked again after every round, until it names nothing that is not answered.
        """
        return ()

    def settle(self, progress: Progress | None = None) -> None:
        """What is done once for all records between the last answer and the first value.

        Nothing, unless somebody else is asked (a judge).
        """

    def score(self, record: RecordBase, prompt: Prompt, answers: Answers) -> Item:
        """The value, from the answers to :meth:`requests` and :meth:`follow_up`.

        Not called where one of them could not be answered: the item is then ``None``.
        """
        raise NotImplementedError


#: values[metric name][split name] = one item per record, in the order of the split
Values = Mapping[str, Mapping[str, Sequence[Item]]]


@dataclass(frozen=True)
class SystemValues:
    """All item values of one system.

    Attributes:
        system: Its name.
        items: ``items[metric][split]``, one item per record.
        means: ``means[metric][split]`` over the items that have a value; ``None`` if none has.
        skipped: Metrics that were not measured, with the reason.
        options: Every option of every measured metric, so that a summary (and a reader) can
            tell which form of a metric the values have.
        measured: Counts of the requests (asked, unique, cached, scored, generated).
        asked: Different questions that were asked.
        unanswered: Reason -> questions that the system could not answer.
    """

    system: str
    items: Values
    means: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    measured: Mapping[str, int] = field(default_factory=dict)
    asked: int = 0
    unanswered: Mapping[str, int] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain data; :meth:`from_json` reads it."""
        items = {
            metric: {split: [item.as_json() for item in row] for split, row in by_split.items()}
            for metric, by_split in self.items.items()
        }
        return {**{name: getattr(self, name) for name in self.__dataclass_fields__}, "items": items}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> SystemValues:
        """What :meth:`as_json` made."""
        items = {
            metric: {
                split: [Item.from_json(item) for item in row] for split, row in by_split.items()
            }
            for metric, by_split in content["items"].items()
        }
        return cls(**{**content, "items": items})


class SummaryMetric(Component):
    """A metric over the values of other metrics, perhaps against a reference system."""

    def with_roles(self, roles: Roles) -> Self:
        """As :meth:`ItemMetric.with_roles`: it asks nobody itself."""
        return self

    def uses(self) -> tuple[str, ...]:
        """Names of the item metrics it reads."""
        raise NotImplementedError

    def summarise(
        self, values: SystemValues, reference: SystemValues | None
    ) -> dict[str, float | None]:
        """One or a few named numbers; ``None`` where it cannot be said."""
        raise NotImplementedError
