"""What a component is, as data: for ``delible show`` and for its page of the documentation."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from delible.cards import Card


def facts(card: Card) -> dict[str, str]:
    """What a card says, by the names under which people read it, without what it leaves open."""
    from delible.cards import NEEDS

    words = {True: "yes", False: "no", None: None}
    fields = {
        "paper": card.paper and f"arXiv:{card.paper}{f' ({card.year})' if card.year else ''}",
        "family": card.family,
        "intention": card.intention,
        "mechanism": card.mechanism,
        "needs": "; ".join(NEEDS[need] for need in card.needs) or None,
        "asks for": card.capability,
        "range": card.range,
        "direction": card.direction,
        "misleads": card.misleads,
        "changes": card.changes,
        "reversible": words[card.reversible],
        "retraining": card.retrain_goal and "claims to equal retraining",
        "weakest": card.weakest,
        "advice": card.advice,
        "badges": ", ".join(card.badges) or None,
        "variant": card.variant,
        "file": card.module or None,
    }
    return {name: value for name, value in fields.items() if value}


def recipe_of(card: Card) -> dict[str, Any] | None:
    """What fills the slots of a recipe, by slot; None for other kinds."""
    if card.kind != "recipe":
        return None
    from delible.train.recipe import Recipe

    return Recipe.named(card.name).spec()


def presets_of_recipe(card: Card) -> dict[str, dict[str, Any]]:
    """A recipe's presets by name: what they are about, and the recipe with each."""
    if card.kind != "recipe":
        return {}
    from delible import registry
    from delible.train.recipe import Recipe, presets_of, read_yaml

    found = presets_of(read_yaml(registry.recipe_files()[card.name]), card.name)
    return {
        name: {
            "about": preset.get("about"), "recipe": Recipe.named(f"{card.name}@{name}").spec(),
        }
        for name, preset in found.items()
    }  # fmt: skip


def compared(recipe: dict[str, Any], other: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Options of two recipes that differ: full name, here and there."""
    rows = []
    for slot, spec in recipe.items():
        theirs = other[slot]
        if not isinstance(spec, dict):
            continue
        if spec.get("name") != theirs.get("name"):
            rows.append((slot, _part(spec), _part(theirs)))
            continue
        rows += [
            (f"{slot}.{key}", _told(value), _told(theirs[key]))
            for key, value in spec.items()
            if value != theirs[key]
        ]
    return rows


def settings(spec: dict[str, Any]) -> str:
    """The options of what fills a slot, in one line."""
    return ", ".join(f"{key} {value}" for key, value in spec.items() if key != "name") or "-"


def _part(spec: dict[str, Any]) -> str:
    chosen = settings(spec)
    return spec["name"] if chosen == "-" else f"{spec['name']}: {chosen}"


def _told(value: Any) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def options_of(component: Any) -> list[dict[str, Any]]:
    """The options of a component's class: name, default, type, range and description."""
    schema = component.model_json_schema()
    return [
        {
            "name": name,
            "default": _default(component, name),
            "type": _type(field, schema),
            "description": field.get("description", component.model_fields[name].description),
        }
        for name, field in schema.get("properties", {}).items()
    ]


def _default(component: Any, name: str) -> Any:
    field = component.model_fields[name]
    value = None if field.is_required() else field.get_default(call_default_factory=True)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _type(field: dict[str, Any], schema: dict[str, Any]) -> str:
    """The type and range of a field in words, from its JSON schema."""
    if "$ref" in field:
        return _type(schema["$defs"][field["$ref"].rpartition("/")[2]], schema)
    if "anyOf" in field:
        return " or ".join(_type(part, schema) for part in field["anyOf"])
    if "const" in field:
        return json.dumps(field["const"])
    if "enum" in field:
        return ", ".join(str(value) for value in field["enum"])
    words = {
        "integer": "whole number", "number": "number", "string": "text", "boolean": "true or false",
        "null": "null", "array": "list", "object": "mapping",
    }  # fmt: skip
    signs = (
        ("exclusiveMinimum", ">"), ("minimum", ">="), ("exclusiveMaximum", "<"), ("maximum", "<=")
    )  # fmt: skip
    limits = [f"{sign} {field[key]:g}" for key, sign in signs if key in field]
    return " ".join(
        [words.get(field.get("type", ""), "any"), *([", ".join(limits)] if limits else [])]
    )


__all__ = ["compared", "facts", "options_of", "presets_of_recipe", "recipe_of", "settings"]
