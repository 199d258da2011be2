"""``delible list`` and ``delible show``, for people and for programs."""

from __future__ import annotations

import json
from typing import Any

import pytest

from delible import registry
from delible.cards import METHODS


@pytest.mark.parametrize(
    ("word", "kinds"),
    [
        ("methods", set(METHODS)), ("method", set(METHODS)),
        ("metrics", {"metric"}), ("metric", {"metric"}), ("guards", {"guard"}),
        ("attacks", {"attack"}), ("objectives", {"objective"}), ("finishes", {"finish"}),
        ("harden", {"harden"}),
    ],
)  # fmt: skip
def test_kinds_in_the_singular_and_the_plural(run: Any, word: str, kinds: set[str]) -> None:
    found = json.loads(run("list", word, "--json").out)
    assert {(card["kind"], card["name"]) for card in found} == {
        (card.kind, card.name) for card in registry.cards() if card.kind in kinds
    }


def test_without_a_kind_everything_is_listed(run: Any) -> None:
    assert len(json.loads(run("list", "--json").out)) == len(registry.cards())
    table = run("list")
    assert table.code == 0
    for card in registry.cards("metric", "guard"):
        assert card.name in table.out


def test_kind_without_components_says_so(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "cards", lambda *kinds: [])
    assert "no benchmarks yet" in run("list", "benchmarks").out


def test_show_a_component_with_its_options(run: Any) -> None:
    shown = json.loads(run("show", "sam", "--json").out)
    assert shown["kind"] == "harden"
    assert shown["paper"] == "2502.05374"
    (rho,) = shown["options"]
    assert (rho["name"], rho["default"], rho["type"]) == ("rho", 0.01, "number >= 0")
    words = run("show", "sam").out
    assert "number >= 0" in words
    assert rho["description"] in words


def test_show_a_recipe_with_its_slots(run: Any) -> None:
    shown = json.loads(run("show", "npo", "--json").out)
    assert shown["kind"] == "recipe"
    assert shown["also"] == ["objective"]
    assert shown["recipe"]["objective"] == {"name": "npo", "beta": 0.1}
    assert shown["recipe"]["training"]["epochs"] >= 1
    words = run("show", "npo").out
    assert "weighted_sum" in words
    assert "delible show npo --kind objective" in words
    assert (
        json.loads(run("show", "npo", "--kind", "objective", "--json").out)["kind"] == "objective"
    )


def test_show_tells_a_papers_numbers_beside_the_defaults(run: Any) -> None:
    shown = json.loads(run("show", "satimp", "--json").out)
    paper = shown["presets"]["paper"]
    assert "Llama-2-7B" in paper["about"]
    assert paper["recipe"]["objective"]["beta2"] == 0.1
    assert paper["recipe"]["training"]["schedule"] == "linear"
    for name in ("satimp", "satimp@paper"):
        words = run("show", name).out
        assert "--method satimp@paper" in words
        rows = [line.split() for line in words.splitlines()]
        assert ["objective.beta2", "1", "0.1"] in rows
        assert ["training.schedule", "constant", "linear"] in rows
        assert not any(row[:1] == ["objective.beta1"] for row in rows), "it is the same in both"
    assert json.loads(run("show", "novice", "--json").out)["presets"] == {}
    assert "no preset 'paper'" in run("show", "novice").out


def test_a_recipe_tells_the_variants_of_its_components(run: Any) -> None:
    from delible.cards import SLOTS
    from delible.train.recipe import Recipe

    for card in registry.cards("recipe"):
        parts = {slot: getattr(Recipe.named(card.name), slot).card for slot in SLOTS}
        for slot, part in parts.items():
            if part.variant:
                assert f"{slot} {part.name}: {part.variant}" in str(card.variant), card.name
        assert ("variant" in card.badges) == bool(card.variant)
    assert registry.card("recipe", "npo").variant is None
    assert "sequence sums" in str(registry.card("recipe", "npo_sam").variant).lower()
    assert "The zero point is the row's own" in " ".join(run("show", "kto").out.split())


def test_every_component_can_be_shown(run: Any) -> None:
    for card in registry.cards():
        done = run("show", card.name, "--kind", card.kind, "--json")
        assert done.code == 0, f"{card.kind} {card.name}: {done.err}"
        shown = json.loads(done.out)
        assert (shown["kind"], shown["name"]) == (card.kind, card.name)
        for option in shown["options"]:
            assert option["description"], f"{card.kind} {card.name}: {option['name']} says nothing"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["list", "metrix"], "unknown kind 'metrix'. Did you mean 'metrics'?"),
        (["show", "nppo"], "unknown component 'nppo'. Did you mean 'npo'?"),
        (["show", "npo", "--kind", "guard"], "unknown guard 'npo'."),
        (["show"], "NAME is missing."),
        (["list", "--jsn"], "unknown option '--jsn'. Did you mean '--json'?"),
    ],
)
def test_what_is_not_there(run: Any, words: list[str], message: str) -> None:
    done = run(*words)
    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") == 1
