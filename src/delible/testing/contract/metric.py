"""Metrics and benchmarks: a value or a reason for every record."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from delible.component import Component, build
from delible.lm.lm import LM
from delible.measure.benchmark import Benchmark
from delible.measure.engine import measure
from delible.measure.evaluate import evaluate
from delible.measure.metric import Item, ItemMetric, SummaryMetric
from delible.system.asks import (
    Answer,
    Generate,
    Request,
    Score,
    TokenScores,
    needed_capability,
)
from delible.testing.contract.trial import EVERY_KIND, Trial, require

#: From the least to the most that is asked of a system; who has one has those before it.
_CAPABILITIES = ("", "generate", "score", "distribution", "hidden", "weights")


def metric_gives_a_value_or_a_reason(trial: Trial) -> None:
    """Hashable requests of the card's capability; an item for every record."""
    metric = trial.component
    if not isinstance(metric, ItemMetric):
        return
    lm, valued = trial.lm(), 0
    for record in EVERY_KIND:
        prompt = metric.prompt(record)
        if prompt is None:
            continue
        for asked in (prompt, replace(prompt, prefill="Sure:")):
            requests = list(metric.requests(record, asked))
            require(len({*requests}) or not requests, "requests are not hashable")
            for request in requests:
                needed = needed_capability(request)
                stated = _CAPABILITIES.index(metric.card.capability or "")
                able = stated >= _CAPABILITIES.index(needed)
                require(able, f"the card does not say that it needs '{needed}'")
            for answered in (partial(_asked, lm), _nothing_said):
                found = answered(requests)
                while more := [
                    request
                    for request in metric.follow_up(record, asked, found)
                    if request not in found
                ]:
                    found |= answered(more)
                item = metric.score(record, asked, found)
                require(isinstance(item, Item), "score() returns no Item")
                require(item.value is not None or item.reason, f"no value, no reason: {record}")
                require(item == metric.score(record, asked, found), "not deterministic")
                valued += item.value is not None
    require(valued, "no record has a value")
    values = evaluate(lm, {"forget": EVERY_KIND}, [metric])
    for item in values.items[metric.card.name]["forget"]:
        require(item.value is not None or item.reason, "no value and no reason")


def _asked(lm: LM, requests: Sequence[Request]) -> dict[Request, Answer]:
    """The answers, generated ones cut short."""
    short = {
        request: replace(request, decoding=replace(request.decoding, max_new_tokens=4))
        if isinstance(request, Generate)
        else request
        for request in requests
    }
    answers = measure(lm, short.values())
    return {request: answers[asked] for request, asked in short.items()}


def _nothing_said(requests: Sequence[Request]) -> dict[Request, Answer]:
    """Empty answers, and scores of a model to which everything is next to impossible."""
    low = np.full(3, -200.0, np.float32)
    hopeless = TokenScores(low, np.zeros(3, np.bool_), True, low, np.zeros_like(low))
    return {
        request: hopeless
        if isinstance(request, Score)
        else ("" if isinstance(request, Generate) else np.zeros((3, 4), np.float32))
        for request in requests
    }


def benchmark_declares_its_table(component: Component) -> None:
    """One forget and one utility axis; every column of an item metric is asked on its split."""
    if not isinstance(component, Benchmark):
        return
    asks = {ask.name: ask for ask in component.asks()}
    columns = component.columns()
    keys = [column.key for column in columns]
    require(len(set(keys)) == len(keys), "two columns show the same number")
    for axis in ("forget", "utility"):
        count = sum(column.axis == axis for column in columns)
        require(count == 1, f"{count} columns are the axis '{axis}', not one")
    for key in keys:
        label, _, split = key.partition("/")
        if split and label in asks and isinstance(asks[label].metric, ItemMetric):
            splits = asks[label].splits
            require(splits is None or split in splits, f"'{label}' is not asked on '{split}'")


def summary_is_a_number_or_nothing(trial: Trial) -> None:
    """With and without a reference, and where no record has a value."""
    metric = trial.component
    if not isinstance(metric, SummaryMetric):
        return
    require(metric.uses(), "it reads no metric")
    for name in metric.uses():
        require(isinstance(build("metric", name), ItemMetric), f"'{name}' is no item metric")
    splits = {"forget": EVERY_KIND, "retain": EVERY_KIND[:3]}
    values = evaluate(trial.lm(), splits, [metric])
    silent = replace(
        values,
        items={
            name: {split: [Item(None, "silent")] * len(row) for split, row in by_split.items()}
            for name, by_split in values.items.items()
        },
        means={name: dict.fromkeys(splits) for name in values.items},
    )
    for mine, reference in ((values, values), (values, None), (silent, values), (silent, silent)):
        for name, value in metric.summarise(mine, reference).items():
            require(value is None or math.isfinite(value), f"'{name}' is {value}")
    require(
        metric.summarise(values, values) == metric.summarise(values, values), "not deterministic"
    )
