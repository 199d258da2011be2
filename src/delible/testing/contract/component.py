"""Every component: its card, its options, its spec."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from pydantic import ValidationError

from delible import registry
from delible.cards import Kind
from delible.component import Component, build
from delible.errors import RecipeError
from delible.testing.contract.trial import ContractError, require

#: Fields that the card of a kind must fill, besides title and summary.
CARD_FIELDS: Mapping[Kind, tuple[str, ...]] = {
    "place": ("needs", "changes"),
    "objective": ("family", "needs", "changes", "reversible"),
    "editor": ("needs", "changes", "reversible", "weakest"),
    "intervention": ("needs", "changes", "reversible", "weakest", "mechanism"),
    "procedure": ("needs", "changes", "reversible", "weakest", "mechanism"),
    "guard": ("needs", "changes", "reversible", "weakest", "capability"),
    "attack": ("family", "needs", "changes", "capability"),
    "metric": ("family", "range", "direction", "misleads", "capability"),
    "benchmark": ("misleads",),
    "reward": ("range", "direction", "misleads"),
}


def _discoverable(component: Component) -> bool:
    """Whether `delible list` finds something of this kind and name."""
    card = component.card
    return any((other.kind, other.name) == (card.kind, card.name) for other in registry.cards())


def card_is_complete(component: Component) -> None:
    """What `delible list` and `delible show` tell a reader."""
    card = component.card
    for field in ("title", "summary", *CARD_FIELDS.get(card.kind, ())):
        require(getattr(card, field) not in (None, "", ()), f"the card has no '{field}'")
    require(card.summary.endswith("."), "the card's summary is not a sentence (no full stop)")
    require(("variant" in card.badges) == bool(card.variant), "badge and text 'variant' disagree")
    if card.paper is not None:
        require(re.fullmatch(r"\d{4}\.\d{4,5}", card.paper), "'paper' is no arXiv identifier")
        require(card.year, "the card has a paper and no year")
    if _discoverable(component):
        mine = registry.load(card.kind, card.name) is type(component)
        require(mine, "another class has the name")
        require(registry.card(card.kind, card.name) == card, "the card is not made of literals")


def options_are_described(component: Component) -> None:
    """Each option's description is its help text."""
    for name, field in type(component).model_fields.items():
        require(field.description, f"option '{name}' has no description")


def config_comes_back_from_its_spec(component: Component) -> None:
    """Also after JSON, as in a manifest."""
    card, options = component.card, dict(component.spec())
    require(options.pop("name") == card.name, "spec() has another name than the card")
    plain = json.loads(json.dumps(options))
    where = f"{card.kind} '{card.name}'"
    same = type(component).build(where, **plain) == component
    require(same, "spec() does not build an equal one")
    if _discoverable(component):
        require(build(card.kind, component.spec()) == component, "build(spec()) is not equal")


def unknown_option_is_refused(component: Component) -> None:
    """With the nearest name."""
    name = next(iter(type(component).model_fields), "option")
    try:
        type(component).build("contract", **{f"{name}x": 1})
    except RecipeError as error:
        expected = f"'{name}'" if type(component).model_fields else "no options"
        require(expected in str(error), f"the error offers no name: {error}")
        return
    raise ContractError(f"the unknown option '{name}x' was accepted")


def config_is_frozen(component: Component) -> None:
    """What ran is what the manifest says."""
    name = next(iter(type(component).model_fields), "option")
    try:
        setattr(component, name, getattr(component, name, None))
    except (ValidationError, TypeError, AttributeError):
        return
    raise ContractError(f"option '{name}' can be changed after the component is built")
