"""What a search may change: the options that say how far and how hard a method goes.

One rule for every method, so that all of them are searched alike:

- the learning rate: a decade down and a decade up from the method's own value, in its logarithm;
- the length (``epochs``, or ``max_steps`` where it is set): half of it to twice as much;
- every weight or scale of the objective, the balance, the hardening and the finish, or of an
  editor or a guard: a decade down and up, in its logarithm.

A recipe's own ``tune:`` says more: ``tune: {beta: [0.05, 0.5, log], steering: null}``. Options
that are held are left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from delible.errors import RecipeError
from delible.method import Method
from delible.ranges import Range

#: Digits of a value that is tried: the rest would say nothing.
DIGITS = 3

Value = int | float


def space(method: Method, hold: Iterable[str] = ()) -> dict[str, Range]:
    """The ranges of a method by the full names of its options.

    Args:
        hold: Options to leave as they are.

    Raises:
        RecipeError: ``hold`` names no option, or nothing is left to search.
    """
    held = {name for option in hold for name in method.held(option)}
    ranges = {option: one for option, one in method.ranges().items() if option not in held}
    if not ranges:
        raise RecipeError(
            "there is nothing to search: no option is free and has a range.",
            where=f"method '{method.name}'",
            hint="Hold fewer options, or give ranges under 'tune:' in a recipe file.",
        )
    return {option: _around(one, method.value(option)) for option, one in ranges.items()}


def rounded(value: Value, bounds: Range) -> Value:
    """A value to three digits, inside its range; whole numbers stay as they are."""
    if isinstance(value, int) or value == 0:
        return value
    place = DIGITS - 1 - math.floor(math.log10(abs(value)))
    return min(max(round(value, place), bounds.low), bounds.high)


def _around(bounds: Range, value: Value) -> Range:
    """The range, widened to hold the method's own value: the search starts there."""
    return bounds.model_copy(
        update={"low": min(bounds.low, value), "high": max(bounds.high, value)}
    )
