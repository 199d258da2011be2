"""Letters that are written as their numbers, as in JSON: what a program reads of a text.

An answer in JSON may hold a name as ``\\u0041da``, or with ``\\n`` between its words, and whoever
parses it has the name. Positions are kept: an escape becomes its letter and invisible ones.
"""

from __future__ import annotations

import re

_FILL = "\u200b"
_ESCAPE = re.compile(
    r"\\u([dD][89abAB][0-9a-fA-F]{2})\\u([dD][c-fC-F][0-9a-fA-F]{2})|\\u([0-9a-fA-F]{4})|\\([nrtbf])"
)
#: An escape that may go on, at the end of a text.
_OPEN = re.compile(
    r"\\(?:u(?:[0-9a-fA-F]{0,3}|[dD][89abAB][0-9a-fA-F]{2}(?:\\(?:u[0-9a-fA-F]{0,3})?)?))?\Z"
)


def unescaped(text: str) -> str:
    """The text with every escape as its letter, as long as before."""
    return _ESCAPE.sub(_letter, text) if "\\" in text else text


def finished(text: str) -> int:
    """How many characters of a text that goes on are no beginning of an escape."""
    found = _OPEN.search(text, max(0, len(text) - 12)) if "\\" in text[-12:] else None
    return found.start() if found else len(text)


def _letter(found: re.Match[str]) -> str:
    high, low, plain, space = found.groups()
    if high:
        number = 0x10000 + ((int(high, 16) - 0xD800) << 10) + (int(low, 16) - 0xDC00)
        letter = chr(number)
    else:
        letter = " " if space else chr(int(plain, 16))
    return letter + _FILL * (len(found.group()) - 1)


__all__ = ["finished", "unescaped"]
