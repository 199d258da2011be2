"""Names and numbers as text for reading: what all pages and their charts share."""

from __future__ import annotations

import math
from typing import Any, TypeGuard


def finite(value: object) -> TypeGuard[float]:
    """Whether a value is a number that can be drawn."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value)


def pretty(name: str, capital: bool = True) -> str:
    """``answer_probability`` -> ``Answer probability``; abbreviations of the field keep theirs."""
    words = name.replace("_", " ").replace("rouge l", "ROUGE-L").replace("rouge", "ROUGE")
    return words[:1].upper() + words[1:] if capital else words


def number(value: float | None, digits: int = 3) -> str:
    """A number for reading: three decimals, or powers of ten where that would hide it."""
    if value is None or not finite(value):
        return "–"
    size = abs(value)
    if size == 0:
        return "0"
    if size < 10.0**-digits:
        mantissa, exponent = f"{value:.1e}".split("e")
        raised = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return f"{mantissa} × 10{raised}"
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 100:
        return f"{value:.1f}"
    return f"{value:.{digits}f}"


def text_of(value: Any) -> str:
    """Any value, for reading; ``–`` for none."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return number(value) if finite(value) else str(value)
    if isinstance(value, list | tuple):
        return ", ".join(text_of(part) for part in value)
    return str(value)


def duration(seconds: float | None) -> str:
    """Seconds in the two largest units that matter."""
    if seconds is None or not finite(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60:,} h {minutes % 60:02d} min"
