"""Evaluation: all metrics on all splits of one system, in one measurement.

The requests of every metric, record and prompt variant are gathered first and measured together;
then every metric turns answers into numbers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from delible.component import build
from delible.errors import ModelError, RecipeError, RefusedConversationError
from delible.measure.cache import Cache
from delible.measure.engine import Progress, measure
from delible.measure.metric import (
    Answers,
    Item,
    ItemMetric,
    SummaryMetric,
    SystemValues,
)
from delible.records import RecordBase
from delible.system.asks import NoAnswer, Prompt, Request
from delible.system.base import System

#: A prompt attack: the prompts to try instead of the plain one.
Rewrite = Callable[[RecordBase, Prompt], Sequence[Prompt]]

#: Between the details of one record's prompt variants.
DETAIL_SEPARATOR = " | "

#: Numbers drawn at once by the bootstrap, so that memory does not grow with the records.
_DRAWS_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class _Cell:
    """One metric on one record: the prompts to ask with; ``reason`` is why there are none."""

    metric: ItemMetric
    record: RecordBase
    prompts: tuple[Prompt, ...] = ()
    reason: str = ""

    def requests(self) -> list[Request]:
        return [
            request
            for prompt in self.prompts
            for request in self.metric.requests(self.record, prompt)
        ]

    def follow_up(self, answers: Answers) -> list[Request]:
        return [
            request
            for prompt in self.prompts
            if self._unanswered(prompt, answers) is None
            for request in self.metric.follow_up(self.record, prompt, answers)
        ]

    def item(self, answers: Answers) -> Item:
        if not self.prompts:
            return Item(None, self.reason)
        return mean_item([self._item(prompt, answers) for prompt in self.prompts])

    def _item(self, prompt: Prompt, answers: Answers) -> Item:
        reason = self._unanswered(prompt, answers)
        if reason is not None:
            return Item(None, reason)
        return finite(self.metric.score(self.record, prompt, answers))

    def _unanswered(self, prompt: Prompt, answers: Answers) -> str | None:
        """Why the system could not answer one of the requests."""
        for ask in (self.metric.requests, partial(self.metric.follow_up, answers=answers)):
            for request in ask(self.record, prompt):
                answer = answers.get(request)
                if isinstance(answer, NoAnswer):
                    return answer.reason
        return None


def finite(item: Item) -> Item:
    """The item itself, or one without a value when the value is infinite or not a number."""
    if item.value is None or math.isfinite(item.value):
        return item
    return Item(None, f"not a finite number ({item.value})", item.detail)


def mean_item(items: Sequence[Item]) -> Item:
    """One item for all prompt variants of a record: the mean of the values there are.

    Details are joined with ``" | "``, so that each variant's class can be counted; the values are
    kept as the item's forms.
    """
    if len(items) == 1:
        return items[0]
    valued = [item for item in items if item.value is not None]
    details = [item.detail for item in (valued or items) if item.detail is not None]
    detail = DETAIL_SEPARATOR.join(details) or None
    forms = tuple(item.value for item in items)
    if not valued:
        return Item(None, items[0].reason, detail, forms)
    return Item(float(np.mean([item.value for item in valued])), None, detail, forms)


def mean_of(items: Sequence[Item]) -> float | None:
    """Mean of the items that have a value; ``None`` when none has."""
    values = [item.value for item in items if item.value is not None]
    return float(np.mean(values)) if values else None


def joined(parts: Sequence[SystemValues], split: str) -> SystemValues:
    """The values of several models as of one.

    Args:
        parts: Of the models.
        split: Each model was asked about other records of it, which stand one after the other. Of
            the other splits each record has the mean over the models.
    """
    skipped = {name: reason for part in parts for name, reason in part.skipped.items()}
    items: dict[str, dict[str, list[Item]]] = {}
    for metric, by_split in parts[0].items.items():
        if metric in skipped:
            continue
        for name in by_split:
            rows = [part.items[metric][name] for part in parts]
            if name == split:
                items.setdefault(metric, {})[name] = [item for row in rows for item in row]
            else:
                items.setdefault(metric, {})[name] = [
                    Item(mean_of(same), same[0].reason, same[0].detail)
                    for same in zip(*rows, strict=True)
                ]
    return SystemValues(
        system=parts[0].system,
        items=items,
        means={
            metric: {name: mean_of(row) for name, row in by_split.items()}
            for metric, by_split in items.items()
        },
        skipped=skipped,
        options=parts[0].options,
        measured=dict(sum((Counter(part.measured) for part in parts), Counter())),
        asked=sum(part.asked for part in parts),
        unanswered=dict(sum((Counter(part.unanswered) for part in parts), Counter())),
    )


@dataclass(frozen=True)
class Ask:
    """A metric on some of the splits, perhaps under another name than its own.

    Attributes:
        metric: The metric.
        splits: Names of the splits it is asked on; ``None``: all.
        label: What its values are called; ``None``: the metric's name. So one metric can be
            measured in two forms.
    """

    metric: ItemMetric | SummaryMetric
    splits: tuple[str, ...] | None = None
    label: str | None = None

    @property
    def name(self) -> str:
        return self.label or self.metric.card.name


Asked = ItemMetric | SummaryMetric | Ask


def item_asks(metrics: Sequence[Asked]) -> dict[str, Ask]:
    """The item metrics by label: those given, then (with defaults) those the summaries read.

    Raises:
        RecipeError: A label is given twice, since values are kept by label.
    """
    asks = [one if isinstance(one, Ask) else Ask(one) for one in metrics]
    found: dict[str, Ask] = {}
    for ask in asks:
        if isinstance(ask.metric, ItemMetric):
            if ask.name in found:
                raise RecipeError(
                    f"the metric '{ask.name}' is given twice.",
                    hint="Evaluate its other form on its own; the answers are cached.",
                )
            found[ask.name] = ask
    for ask in asks:
        if isinstance(ask.metric, SummaryMetric):
            for name in ask.metric.uses():
                if name not in found:
                    found[name] = Ask(build("metric", name), ask.splits)
    return found


def missing_capability(metric: ItemMetric, system: System) -> str | None:
    """Why a metric cannot be measured on a system; ``None`` if it can."""
    needed = metric.card.capability
    if needed is None or needed in system.capabilities:
        return None
    return f"it needs the capability '{needed}', which '{system.name}' does not have"


def _cell(metric: ItemMetric, record: RecordBase, rewrite: Rewrite | None) -> _Cell:
    prompt = metric.prompt(record)
    if prompt is None:
        kind = type(record).__name__
        reason = f"'{metric.card.name}' does not apply to this {kind} record"
        return _Cell(metric, record, reason=reason)
    if rewrite is None:
        return _Cell(metric, record, (prompt,))
    prompts = tuple(rewrite(record, prompt))
    return _Cell(metric, record, prompts, "the attack has no prompt for this record")


@contextmanager
def _naming_records(cells: Mapping[str, Mapping[str, Sequence[_Cell]]]) -> Iterator[None]:
    """Inside, a refused conversation is told with its record's place, or its split and number."""
    try:
        yield
    except RefusedConversationError as refused:
        where = _place_of(refused.conversation, cells)
        raise ModelError(refused.problem, where=where, hint=refused.hint) from refused


def _place_of(
    conversation: tuple[Any, ...], cells: Mapping[str, Mapping[str, Sequence[_Cell]]]
) -> str | None:
    """Where the record is from whose prompt is the longest beginning of a conversation."""
    found = {
        len(turns): cell.record.where or f"{split} record {index + 1}"
        for by_split in cells.values()
        for split, row in by_split.items()
        for index, cell in enumerate(row)
        for request in cell.requests()
        for turns in [request.prompt.messages]
        if turns and conversation[: len(turns)] == turns
    }
    return found[max(found)] if found else None


def evaluate(
    system: System,
    splits: Mapping[str, Sequence[RecordBase]],
    metrics: Sequence[Asked],
    *,
    rewrite: Rewrite | None = None,
    cache: Cache | None = None,
    progress: Progress | None = None,
) -> SystemValues:
    """All metrics on all splits of one system.

    Args:
        system: What is measured, as deployed.
        splits: Records by split name (forget, retain, neighbours, general, holdout, …).
        metrics: Item metrics, and summary metrics for the item metrics that they read (call
            their ``summarise`` with what comes back); an :class:`Ask` limits one to some splits.
        rewrite: A prompt attack. Every record is asked with each of its prompts, and its value
            is the mean over them.
        cache: Answers known from earlier measurements.
        progress: Called with (answers there are, answers there will be).

    Returns:
        The values per record and their means. Metrics that need what the system does not have
        are in ``skipped``, with the reason.

    Raises:
        RecipeError: A metric is given twice.
    """
    known = item_asks(metrics)
    skipped: dict[str, str] = {}
    for name, ask in known.items():
        reason = missing_capability(cast(ItemMetric, ask.metric), system)
        if reason is not None:
            skipped[name] = reason

    cells = {
        name: {
            split: [_cell(cast(ItemMetric, ask.metric), record, rewrite) for record in records]
            for split, records in splits.items()
            if ask.splits is None or split in ask.splits
        }
        for name, ask in known.items()
        if name not in skipped
    }
    every = [cell for by_split in cells.values() for row in by_split.values() for cell in row]
    requests = [request for cell in every for request in cell.requests()]
    with _naming_records(cells):
        answers = measure(system, requests, cache=cache, progress=progress)
    counts = answers.report.counts()
    while more := {
        request for cell in every for request in cell.follow_up(answers) if request not in answers
    }:
        with _naming_records(cells):
            found = measure(system, more, cache=cache, progress=progress)
        answers.update(found)
        counts = {name: count + found.report.counts()[name] for name, count in counts.items()}
    for name in cells:
        cast(ItemMetric, known[name].metric).settle(progress)

    items = {
        name: {split: [cell.item(answers) for cell in row] for split, row in by_split.items()}
        for name, by_split in cells.items()
    }
    means = {
        name: {split: mean_of(row) for split, row in by_split.items()}
        for name, by_split in items.items()
    }
    return SystemValues(
        system=system.name,
        items=items,
        means=means,
        skipped=skipped,
        options={name: known[name].metric.spec() for name in items},
        measured=counts,
        asked=len(answers),
        unanswered=dict(
            Counter(one.reason for one in answers.values() if isinstance(one, NoAnswer))
        ),
    )


def bootstrap_interval(
    values: Sequence[float] | npt.NDArray[np.float64], seed: int, *, resamples: int = 1000
) -> tuple[float | None, float | None]:
    """95 % percentile bootstrap interval of the mean over records.

    Args:
        values: One value per record, shape [records].
        seed: The same seed and values give the same interval.
        resamples: Samples with replacement.

    Returns:
        (low, high); (None, None) without values.
    """
    from scipy.stats import bootstrap  # most of a second, which only intervals need

    sample = np.asarray(values, np.float64)
    if sample.size < 2:
        return (float(sample[0]),) * 2 if sample.size else (None, None)
    found = bootstrap(
        (sample,), np.mean, n_resamples=resamples, method="percentile", rng=seed,
        batch=max(1, _DRAWS_AT_ONCE // sample.size),
    ).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)
