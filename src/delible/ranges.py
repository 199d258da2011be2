"""Where a search may look for an option's value (``delible tune``).

A weight or scale is a number above 0 that is bounded by 0 below and by nothing above; it is
searched a decade down and up, in its logarithm.
"""

from __future__ import annotations

from typing import Any, Self

from delible.component import Component, Config
from delible.errors import RecipeError

#: A learning rate, a weight or a scale is searched from value / DECADE to value * DECADE.
DECADE = 10.0


class Range(Config):
    """Where a search may look for an option's value: both ends belong to it.

    Attributes:
        log: Values are spread evenly in their logarithm.
    """

    low: float
    high: float
    log: bool = False

    @classmethod
    def read(cls, given: Any, where: str) -> Self:
        """A range from ``[low, high]`` or ``[low, high, log]``.

        Raises:
            RecipeError: It has another form, or its ends are not in order.
        """
        if isinstance(given, cls):
            return given
        parts = list(given) if isinstance(given, list | tuple) else []
        if len(parts) not in (2, 3) or parts[2:] not in ([], ["log"]):
            raise RecipeError(
                f"{given!r} is no range.",
                where=where,
                hint="Write [low, high] or [low, high, log].",
            )
        found = cls.build(where, low=parts[0], high=parts[1], log=len(parts) == 3)
        if not found.low < found.high:
            raise RecipeError(f"{found.low:g} is not below {found.high:g}.", where=where)
        if found.log and found.low <= 0:
            raise RecipeError("a logarithmic range starts above 0.", where=where)
        return found


def scales(component: Component) -> dict[str, Range]:
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
