"""What a search may change: the options that say how far and how hard a method goes.

One rule for every method, so that all of them are searched alike:

- the learning rate: a decade down and a decade up from the method's own value, in its logarithm;
- the length (``epochs``, or ``max_steps`` where it is set): half of it to twice as much;
- every weight or scale of the objective, the balance, the hardening and the finish, or of an
  editor: a decade down and up, in its logarithm. A weight or scale is a number above 0 that is
  bounded by 0 below and by nothing above. The balance only counts where there is a retain loss,
  and of the two weights of a sum only the retain loss's.

A recipe's own ``tune:`` says more: ``tune: {beta: [0.05, 0.5, log], steering: null}``. Options
that are held are left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from delible.component import Component
from delible.edit.base import Editor
from delible.errors import RecipeError, nearest
from delible.train.recipe import Range, Recipe

#: A learning rate, a weight or a scale is searched from value / DECADE to value * DECADE.
DECADE = 10.0
#: Slots whose weights and scales say how hard a method goes.
SLOTS = ("objective", "balance", "harden", "finish")
#: Digits of a value that is tried: the rest would say nothing.
DIGITS = 3

Value = int | float


def space(method: Recipe | Editor, hold: Iterable[str] = ()) -> dict[str, Range]:
    """The ranges of a method by option: full names for a recipe, plain ones for an editor.

    Args:
        hold: Options to leave as they are.

    Raises:
        RecipeError: ``hold`` names no option, or nothing is left to search.
    """
    if isinstance(method, Editor):
        known = type(method).model_fields
        for option in hold:
            if option not in known:
                raise RecipeError(f"unknown option '{option}'.", hint=nearest(option, known))
        found = _scales(method)
        held = set(hold)
        name = method.card.name
    else:
        found = _of_recipe(method)
        held = {method.place_of(option) for option in hold}
        if held & {"training.epochs", "training.max_steps"}:
            held |= {"training.epochs", "training.max_steps"}
        name = method.name
    ranges = {option: one for option, one in found.items() if option not in held}
    if not ranges:
        raise RecipeError(
            "there is nothing to search: no option is free and has a range.",
            where=f"method '{name}'",
            hint="Hold fewer options, or give ranges under 'tune:' in a recipe file.",
        )
    return {option: _around(one, value_of(method, option)) for option, one in ranges.items()}


def value_of(method: Recipe | Editor, option: str) -> Value:
    """The method's own value of an option of :func:`space`."""
    slot, _, key = option.rpartition(".")
    value: Value = getattr(getattr(method, slot) if slot else method, key)
    return value


def rounded(value: Value, bounds: Range) -> Value:
    """A value to three digits, inside its range; whole numbers stay as they are."""
    if isinstance(value, int) or value == 0:
        return value
    place = DIGITS - 1 - math.floor(math.log10(abs(value)))
    return min(max(round(value, place), bounds.low), bounds.high)


def _of_recipe(recipe: Recipe) -> dict[str, Range]:
    training = recipe.training
    rate = training.learning_rate
    length = "epochs" if training.max_steps is None else "max_steps"
    times = int(getattr(training, length))
    found = {
        "training.learning_rate": Range(low=rate / DECADE, high=min(1.0, rate * DECADE), log=True),
        f"training.{length}": Range(low=max(1, times // 2), high=2 * times, log=True),
    }
    for slot in SLOTS:
        if slot == "balance" and recipe.keep.card.name == "none":
            continue
        for key, one in _scales(getattr(recipe, slot)).items():
            if (slot, key) != ("balance", "forget_weight"):
                found[f"{slot}.{key}"] = one
    for option, declared in recipe.tune.items():
        if declared is None:
            found.pop(option, None)
        else:
            found[option] = declared
    return found


def _scales(component: Component) -> dict[str, Range]:
    """A decade around every weight and scale of a component."""
    found = {}
    for name, field in type(component).model_fields.items():
        value = getattr(component, name)
        bounds = {
            kind: bound
            for one in field.metadata
            for kind in ("gt", "ge", "lt", "le")
            if (bound := getattr(one, kind, None)) is not None
        }
        above_zero = bounds.get("gt", bounds.get("ge")) == 0
        if (
            isinstance(value, float)
            and value > 0
            and above_zero
            and not bounds.keys() & {"lt", "le"}
        ):
            found[name] = Range(low=value / DECADE, high=value * DECADE, log=True)
    return found


def _around(bounds: Range, value: Value) -> Range:
    """The range, widened to hold the method's own value: the search starts there."""
    return bounds.model_copy(
        update={"low": min(bounds.low, value), "high": max(bounds.high, value)}
    )
