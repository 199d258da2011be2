"""The nine kinds of probes of RWKU (arXiv 2406.10890), as its data spell them."""

from __future__ import annotations

from delible.errors import DataError, nearest

#: Attack kind -> how its spellings in the data begin.
KINDS = {
    "prefix injection": ("prefix",),
    "affirmative suffix": ("affirmative",),
    "role playing": ("role",),
    "multiple choice": ("multiple",),
    "reverse query": ("reverse",),
    "synonym manipulation": ("synonym",),
    "background hint": ("background", "context"),
    "incontext learning": ("incontext", "in-context"),
    "cross lingual": ("cross",),
}


def attack_kind(written: str) -> str:
    """One of the nine kinds, however the data spells it.

    Raises:
        DataError: None of them.
    """
    for kind, beginnings in KINDS.items():
        if written.lower().startswith(beginnings):
            return kind
    raise DataError(f"'{written}' is no kind of attack.", hint=nearest(written, KINDS))


__all__ = ["KINDS", "attack_kind"]
