"""What an audit asks: which metrics, attacks and knowledge scores, about which records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from delible import registry
from delible.audit.leaks import LEAK_MEASURES
from delible.cards import DEPTHS, Card, Depth
from delible.component import build
from delible.errors import DataError, RecipeError, nearest
from delible.measure.attack import (
    Attack,
    ConversationAttack,
    InferenceAttack,
    InsideAttack,
    ModelAttack,
    PromptAttack,
)
from delible.measure.evaluate import item_asks
from delible.measure.metric import ItemMetric, SummaryMetric
from delible.records import Choice, ForgetRequest, RecordBase
from delible.system.roles import Roles

Splits = dict[str, Sequence[RecordBase]]

#: What is measured when nothing is chosen.
DEFAULT_METRICS = (
    "answer_probability",
    "paraphrase_probability",
    "rouge_l_recall",
    "exact_memorisation",
    "extraction_strength",
    "truth_ratio",
    "outcome",
    "forget_quality",
    "model_utility",
)
#: Records per split that are asked.
ROWS = 200


def chosen_metrics(
    specs: Sequence[str | Mapping[str, Any]] | None, roles: Roles, request: ForgetRequest
) -> list[ItemMetric | SummaryMetric]:
    """Metrics by name or by options; None takes the standard ones, choices where there are any."""
    choices = any(isinstance(record, Choice) for record in request.forget)
    standard = (*DEFAULT_METRICS, *(["choice_accuracy"] if choices else []))
    return [
        build("metric", spec if isinstance(spec, str) else dict(spec)).with_roles(roles)
        for spec in specs or standard
    ]


def chosen_attacks(specs: Sequence[str | Mapping[str, Any]] | None, depth: Depth) -> list[Attack]:
    """Attacks by name, in the variants of a depth, or by options; None takes those of the depth."""
    found: list[Attack] = []
    for spec in attacks_within(depth) if specs is None else specs:
        attack = build("attack", spec if isinstance(spec, str) else dict(spec))
        if isinstance(spec, str):
            variants = attack.variants(depth)
            found += [build("attack", {"name": spec, **options}) for options in variants]
        else:
            found.append(attack)
    return found


def attacks_within(depth: Depth) -> list[str]:
    """Names of the attacks of an audit, the cheapest kinds first."""
    limit = DEPTHS.index(depth)
    cards = [
        card
        for card in registry.cards("attack")
        if card.depth is not None and DEPTHS.index(card.depth) <= limit
    ]
    kinds = (PromptAttack, ConversationAttack, InferenceAttack, InsideAttack, ModelAttack)

    def order(card: Card) -> tuple[int, int, str]:
        attack = registry.load("attack", card.name)
        place = next(place for place, kind in enumerate(kinds) if issubclass(attack, kind))
        return place, DEPTHS.index(card.depth or depth), card.name

    return [card.name for card in sorted(cards, key=order)]


def leak_metrics(
    metrics: Sequence[ItemMetric | SummaryMetric], names: Sequence[str]
) -> list[ItemMetric]:
    """The knowledge scores that are measured under attack, among the chosen metrics.

    Raises:
        RecipeError: A name that is no knowledge score.
    """
    wanted = item_asks(metrics)
    for name in names:
        if name not in LEAK_MEASURES:
            raise RecipeError(f"'{name}' is no knowledge score.", hint=nearest(name, LEAK_MEASURES))
    return [
        cast(ItemMetric, wanted[name].metric)
        for name in LEAK_MEASURES
        if name in wanted and name in names
    ]


def chosen_records(request: ForgetRequest, rows: int) -> tuple[Splits, list[str]]:
    """Records by split, at most so many each, and what was left out, in sentences.

    Raises:
        DataError: There are no forget records.
    """
    from delible.world import general

    if not request.forget:
        raise DataError(
            "an audit asks about forget records, and there are none.",
            hint="Add --forget FILE with questions about what was to be forgotten.",
        )
    splits: Splits = {}
    notes: list[str] = []
    for name in ("forget", "retain", "neighbours", "holdout"):
        records = getattr(request, name)
        if len(records) > rows:
            step = len(records) / rows
            splits[name] = [records[int(index * step)] for index in range(rows)]
            notes.append(
                f"Only {rows} of {len(records)} {name} records were asked (evenly spaced)."
            )
        elif records:
            splits[name] = records
    splits["general"] = general()[:rows]
    return splits, notes


def spaced(records: Sequence[RecordBase], count: int) -> Sequence[RecordBase]:
    """At most so many records, evenly spaced."""
    return records[:: max(1, len(records) // count)][:count]


def kept_records(splits: Splits) -> Sequence[RecordBase]:
    """Records that were to be kept and are asked under attack: of the retain set, or close ones."""
    return splits.get("retain") or splits.get("neighbours") or ()
