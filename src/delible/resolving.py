"""From a name, a file or an object to a method with its options."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from delible import registry
from delible.cards import METHODS
from delible.component import build
from delible.errors import RecipeError, nearest
from delible.method import Method
from delible.train.method import GradientMethod
from delible.train.recipe import Recipe, Strength, read_yaml


def resolve_method(
    method: str | Method | Recipe | Path,
    *,
    slots: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    strength: Strength | None = None,
) -> Method:
    """A method by name, from a YAML file or from an object, with slots and options changed.

    ``npo@paper`` is the method with its paper's own schedule and weights.

    Raises:
        RecipeError: Unknown method, slot value or option (the nearest name is offered), slots or
            a strength for a method that has none, or a strength next to options that it would set.
    """
    found, options = _found(method), dict(options or {})
    if not isinstance(found, GradientMethod):
        # an option may be called as a slot: --place says which weights a procedure moves
        own = {name: value for name, value in (slots or {}).items() if found.takes(name)}
        options = {**own, **options}
        _without(found, "slots", sorted((slots or {}).keys() - own.keys()))
        _without(found, "strength", [] if strength is None else ["--strength"])
        return found.with_options(options) if options else found
    if strength is not None:
        taken = {key.rpartition(".")[2] for key in options} & {"learning_rate", "epochs"}
        if taken:
            raise RecipeError(
                f"--strength sets {' and '.join(sorted(taken))} already.",
                hint="Give either the strength or the numbers.",
            )
        found = found.with_strength(strength)
    return found.with_slots(slots or {}, options)


def _found(method: str | Method | Recipe | Path) -> Method:
    if isinstance(method, Method):
        return method
    if isinstance(method, Recipe):
        return GradientMethod(method)
    name, preset = registry.split_preset(str(method))
    if name.endswith((".yaml", ".yml")):
        content = read_yaml(Path(name))
        for kind in METHODS:
            if kind != "recipe" and kind in content:
                return _component(cast(Any, kind), content[kind], preset)
        return GradientMethod(Recipe.from_file(str(method)))
    kinds = {card.name: card.kind for card in registry.cards(*METHODS)}
    if name not in kinds:
        raise RecipeError(f"unknown method '{name}'.", hint=nearest(name, kinds))
    if kinds[name] == "recipe":
        return GradientMethod(Recipe.named(str(method)))
    return _component(kinds[name], name, preset)


def _component(kind: Any, spec: Any, preset: str | None) -> Method:
    found: Method = build(kind, spec)
    if preset is not None:
        raise RecipeError(
            f"'{found.name}' is no recipe: it has no presets.", hint=f"Say '{found.name}' alone."
        )
    return found


def _without(method: Method, what: str, given: list[str]) -> None:
    if given:
        raise RecipeError(
            f"'{method.name}' is no recipe: it has no {what}.", hint=f"Drop {', '.join(given)}."
        )


def recipe_named(
    method: str | Method | Recipe | Path,
    why: str,
    *,
    slots: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Recipe:
    """The recipe of a method, for what follows or changes its training.

    Args:
        why: What cannot be done with a method that takes no training steps, in words.

    Raises:
        RecipeError: The method is none; or as for :func:`resolve_method`.
    """
    found = resolve_method(method)
    if not isinstance(found, GradientMethod):
        raise RecipeError(
            f"'{found.name}' takes no training steps, so {why}.",
            hint="Name recipes ('delible list recipes').",
        )
    return found.with_slots(slots or {}, options or {}).recipe
