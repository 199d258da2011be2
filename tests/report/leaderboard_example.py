"""A made-up leaderboard (12 methods, 3 seeds) and a made-up experiment, for the pages' tests."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

from delible.cards import Card
from delible.component import build
from delible.measure.benchmark import (
    Benchmark,
    Chart,
    Column,
    Curve,
    Data,
    Experiment,
    Findings,
    Task,
)
from delible.measure.evaluate import Ask

ORIGINAL, REFERENCE = "original", "retrained reference"
#: Method: forget probability, model utility (as a seed would give them on average), seconds.
METHODS = {
    "gradient_ascent": (0.002, 0.11, 210.0),
    "graddiff": (0.031, 0.47, 401.3),
    "npo": (0.118, 0.585, 512.6),
    "simnpo": (0.164, 0.598, 466.0),
    "dpo": (0.322, 0.552, 520.4),
    "rmu": (0.091, 0.561, 188.2),
    "undial": (0.244, 0.603, 377.7),
    "satimp": (0.121, 0.606, 433.0),
    "rocr": (0.402, 0.589, 95.1),
    "task_vector": (0.287, 0.441, 61.9),
    "target_detector": (0.139, 0.621, 4.4),
    "purge": (0.5, 0.5, 1234.0),
}
BASELINES = {ORIGINAL: (0.874, 0.628, 1.2), REFERENCE: (0.132, 0.623, 1.1)}
REASON = "purge: the recipe needs names of the subjects to forget (--subjects NAME,…)."
SKIPPED = "needs the capability 'weights', which this system does not have"


class Example(Benchmark):
    """What a benchmark with every kind of column looks like."""

    card = Card(
        kind="benchmark",
        name="example",
        title="Example authors",
        summary="Forget made-up authors; all that is known about them is what was taught.",
        paper="2401.06121",
        year=2024,
        misleads="The authors are known from one wording only: a method that breaks that wording "
        "looks good.",
    )
    split: str = "forget10"
    authors: int | None = None

    def tasks(self, data: Data) -> list[Task]:
        raise NotImplementedError

    def asks(self) -> list[Ask]:
        return [
            Ask(build("metric", "answer_probability"), ("forget", "retain")),
            Ask(build("metric", "truth_ratio"), ("forget",)),
            Ask(build("metric", "forget_quality")),
        ]

    def columns(self) -> list[Column]:
        return [
            Column("forget probability", "answer_probability/forget", "reference", axis="forget"),
            Column("model utility", "model_utility", "higher", axis="utility"),
            Column("forget quality (log10 p)", "forget_quality_log10", "higher"),
            Column("forget ROUGE-L", "rouge_l_recall/forget", "reference", percent=True),
            Column("extraction strength", "extraction_strength/forget", "reference"),
            Column("PrivLeak", "privleak", "reference"),
            Column("retain probability", "answer_probability/retain", "higher"),
            Column("garbage", "outcome_shares/forget/garbage", "lower", percent=True),
        ]


class SameBudget(Example):
    """Every recipe trains equally long."""

    def budget(self, model: str) -> dict[str, Any]:
        return {"epochs": 5, "batch_size": 32}


class HigherForgets(Example):
    """Its forget axis is a p-value: the reference has none, and more is better."""

    def columns(self) -> list[Column]:
        return [
            Column("forget quality (log10 p)", "forget_quality_log10", "higher", axis="forget"),
            Column("model utility", "model_utility", "higher", axis="utility", percent=True),
        ]


class LowerForgets(Example):
    """Nothing to retrain: knowledge of the forget set is best when it is low."""

    def columns(self) -> list[Column]:
        return [
            Column("forget accuracy", "answer_probability/forget", "lower", axis="forget"),
            Column("general accuracy", "model_utility", "higher", axis="utility"),
            Column("membership", "privleak", "reference"),
        ]


class InOrder(Example):
    """One request after the other."""

    def along(self) -> str:
        return "requests, one after the other"


def common(**changed: Any) -> dict[str, Any]:
    return {
        "benchmark": {"name": "example"},
        "model": "default",
        "data": None,
        "attacks": [{"name": "relearn", "steps": 50}],
        "tune": 0,
        "keep_models": False,
        "folder": "runs/example",
        "versions": {"python": "3.12.1", "torch": "2.13.0", "transformers": "5.24.0"},
        "hardware": {"machine": "x86_64", "processors": 2, "threads": 2, "memory_gib": 16.0},
    } | changed


def cell(method: str, seed: int, task: str = "forget10") -> dict[str, Any]:
    """A finished run as the runner writes it."""
    draw = random.Random(f"{method}{seed}{task}")
    head = {"task": task, "method": method, "seed": seed, "model": "default"}
    if method == "purge" and seed != 1:
        return {**head, "failed": REASON, "numbers": {}, "seconds": None}
    forget, utility, seconds = {**METHODS, **BASELINES}[method]
    forget = min(max(forget + draw.gauss(0, 0.012), 0.0005), 1.0)
    utility += draw.gauss(0, 0.007)
    compared = method != REFERENCE
    numbers = {
        "answer_probability/forget": forget,
        "model_utility": utility,
        "forget_quality_log10": -abs(forget - 0.132) * 30 - draw.random() if compared else None,
        "rouge_l_recall/forget": min(0.2 + 0.8 * forget, 1.0),
        "extraction_strength/forget": 0.04 + 0.5 * forget**2,
        "privleak": 100 * (0.132 - forget) / 0.132 if compared else None,
        "answer_probability/retain": utility + 0.2,
        "outcome_shares/forget/garbage": 0.9 if method == "gradient_ascent" else 0.01 * seed,
        "attack: relearn 50 steps/answer_probability": min(0.1 + forget * 1.4, 0.9),
        "attack: relearn 50 steps/extraction_strength": min(0.05 + forget * 0.6, 0.9),
    }
    found = {
        **head,
        "numbers": numbers,
        "counts": {},
        "skipped": {},
        "seconds": seconds + draw.random(),
        "peak_bytes": int((1.1 + draw.random() / 10) * 2**30),
        "notes": {},
        "values": {"items": {}},
    }
    if method == "target_detector":
        found["skipped"] = {"gradient_norm": SKIPPED}
        del numbers["attack: relearn 50 steps/answer_probability"]
        del numbers["attack: relearn 50 steps/extraction_strength"]
    if method == "gradient_ascent":
        found["notes"] = {"stopped": "the loss is not finite at step 118"}
        found["counts"] = {"truth_ratio/forget": 3}
        rows = [[0.5, None, None]] * 37 + [[None, "not a finite number (inf)", None]] * 2
        rows.append([None, "the record has no perturbed answers", None])
        found["values"] = {"items": {"truth_ratio": {"forget": rows}}}
    if method == "dpo" and seed == 2:
        numbers["forget_quality_log10"] = None
    return found


def cells(methods: Sequence[str] = tuple(METHODS), seeds: int = 3) -> list[dict[str, Any]]:
    return [
        cell(REFERENCE, 0),
        cell(ORIGINAL, 0),
        *(cell(method, seed) for method in methods for seed in range(seeds)),
    ]


def cells_in_order(methods: Sequence[str] = ("npo", "rmu"), steps: int = 4) -> list[dict[str, Any]]:
    return [
        cell(method, seed, f"request{10 * step:03d}")
        for method in (REFERENCE, ORIGINAL, *methods)
        for seed in range(2)
        for step in range(1, steps + 1)
    ]


class Question(Experiment):
    """What an experiment looks like."""

    card = Card(
        kind="benchmark",
        name="shares",
        title="Shares of the forget set",
        summary="Does a small part of the forget set do what all of it does?",
        misleads="Rows that repeat each other need fewer of themselves.",
    )
    fractions: tuple[float, ...] = (0.05, 0.1, 1.0)


def findings() -> Findings:
    selectors = ["random_coreset", "grand", "moderate", "min_k", "a selector with a very long name"]
    shares = (0.05, 0.1, 0.25, 0.5, 1.0)

    def curve(index: int, way: float) -> list[tuple[float, float]]:
        return [(x, way * (0.8 * math.exp(-3 * x) + 0.02 * index)) for x in shares]

    return Findings(
        rows=[
            {
                "selector": name,
                "share": share,
                "rows": round(share * 40_000),
                "forget probability": 0.8 * math.exp(-3 * share) + 0.02 * index,
                "not selected": None if share == 1 else 0.7 * math.exp(-2 * share),
                "connected": share > 0.2,
            }
            for index, name in enumerate(selectors)
            for share in shares
        ],
        charts=[
            Chart(
                "Forgetting by share",
                "share of the forget rows",
                "forget probability",
                [Curve(name, curve(index, 1.0)) for index, name in enumerate(selectors)],
            ),
            Chart(
                "Utility by share",
                "share of the forget rows",
                "retain probability",
                [
                    Curve("original", [(0.05, 0.9), (1.0, 0.9)]),
                    *(
                        Curve(f"{name}, half", curve(index, 0.2)[: 5 - index])
                        for index, name in enumerate(selectors[:4])
                    ),
                ],
            ),
        ],
        notes=[
            "At 5 % of the rows, random_coreset leaves a forget probability of 0.689.",
            "From 25 % on, all selectors are connected with the model from all rows.",
        ],
    )
