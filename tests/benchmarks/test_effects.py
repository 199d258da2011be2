"""Pages of effects: what they say follows from the numbers beside them, and so do badges."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from delible import registry
from delible.bench.table import Number, TableRow

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
PAGES = sorted(RESULTS.glob("optimisation-*.json"))


@pytest.fixture(scope="module")
def effects() -> Any:
    spec = importlib.util.spec_from_file_location("effects", ROOT / "performance" / "effects.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["effects"] = module
    spec.loader.exec_module(module)
    return module


def row(effects: Any, forget: float | None, retain: float, near: float, garbage: float) -> TableRow:
    values = {
        effects.FORGET: forget, effects.RETAIN: retain, effects.NEIGHBOURS: near,
        effects.GARBAGE: garbage,
    }  # fmt: skip
    return TableRow("x", {key: Number(value) for key, value in values.items()})


@pytest.mark.parametrize(
    ("numbers", "earned"),
    [
        ((0.5, 0.9, 0.8, 0.0), True),
        ((0.0, 0.9, 0.8, 0.1), True),
        ((0.51, 0.9, 0.8, 0.0), False),  # less than half of the way from 0.9 to 0.1
        ((0.1, 0.8, 0.8, 0.0), False),  # retained people suffer
        ((0.1, 0.9, 0.7, 0.0), False),  # neighbours suffer
        ((0.1, 0.9, 0.8, 0.2), False),  # garbage is no forgetting
        ((None, 0.9, 0.8, 0.0), False),
    ],
)
def test_who_earns_the_badge(effects: Any, numbers: tuple[Any, ...], earned: bool) -> None:
    original = row(effects, 0.9, 0.9, 0.8, 0.0)
    reference = row(effects, 0.1, 0.9, 0.8, 0.0)
    assert effects.verdict(row(effects, *numbers), original, reference)[0] is earned


def test_a_claim_shows_only_when_intervals_are_apart(effects: Any) -> None:
    claim = effects.Claim("a", "b", "is lower", "key", -1)
    low, high = Number(0.2, 0.1, 0.3, 3), Number(0.5, 0.4, 0.6, 3)
    near = Number(0.3, 0.25, 0.45, 3)
    assert effects.holds(claim, low, high) == "shows"
    assert effects.holds(claim, high, low) == "**does not show**"
    assert effects.holds(claim, low, near) == "cannot be told"
    assert effects.holds(claim, Number(0.2, runs=1), high) == "one run: cannot be told"
    assert effects.holds(claim, Number(None), high) == "not run"


def test_claims_are_about_methods_that_exist(effects: Any) -> None:
    known = {card.name for card in registry.cards("recipe")}
    assert {name for claim in effects.CLAIMS for name in (claim.method, claim.against)} <= known


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_pages_follow_from_their_numbers(effects: Any, path: Path) -> None:
    found = json.loads(path.read_text("utf-8"))
    assert path.with_suffix(".md").read_text("utf-8") == effects.page(found)


#: Recipes that were written after the sweeps, which take hours.
LATER = (
    "attention_shifting", "cold_start", "elm", "fila", "ga_lat", "icku", "ihl", "kuda", "mcu",
    "mcu_rmu", "random_mapping", "reva", "rmu_lat", "rr", "sae_internal", "seuf_ga",
    "seuf_graddiff", "seuf_npo", "seuf_rmu", "simnpo_sam", "tar", "vila", "vila_graddiff",
    "vila_npo",
)  # fmt: skip


def test_badges_follow_from_the_sweeps(effects: Any) -> None:
    earned: set[str] = set()
    for path in PAGES:
        found = json.loads(path.read_text("utf-8"))
        earned |= effects.earned(found)
        swept = {str(cell["method"]) for cell in found["cells"]}
        missing = {card.name for card in registry.cards("recipe")} - swept
        assert missing == {"finetune", *LATER}, path.stem
    for card in registry.cards("recipe"):
        assert ("effect" in card.badges) == (card.name in earned), card.name
