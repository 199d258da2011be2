"""Whether actions do the same: as texts, or as programs; and what agreement is worth."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Sequence
from typing import Literal

from delible.acting.loop import Action, canonical
from delible.memory.items import near
from delible.system.asks import NoAnswer

Compare = Literal["text", "code"]


def consistent(samples: Sequence[Action | NoAnswer], compare: Compare = "text") -> bool:
    """Whether all samples do the same; an unreadable one agrees with none, not even itself."""
    forms = {same(one, compare) for one in samples if isinstance(one, Action)}
    return len(forms) == 1 and not any(isinstance(one, NoAnswer) for one in samples)


def same(action: Action, compare: Compare) -> str:
    """A form that is equal for actions that do the same; their reasoning counts for nothing."""
    if compare == "text":
        return canonical(action)
    if action.answer:
        return canonical_code(action.answer)
    values = {key: canonical_code(one) if isinstance(one, str) else one
              for key, one in action.arguments.items()}  # fmt: skip
    parts = [f"{key}={values[key]!r}" for key in sorted(values)]
    return f"{near(action.tool)}({', '.join(parts)})"


def canonical_code(text: str) -> str:
    """A program without comments, spacing and names of its variables; or a text's near form."""
    try:
        tree = ast.parse(textwrap.dedent(text))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return near(text)
    own: dict[str, str] = {}
    names = [one for one in ast.walk(tree) if isinstance(one, ast.Name)]
    for one in sorted(names, key=lambda one: (one.lineno, one.col_offset)):
        if isinstance(one.ctx, ast.Store):
            own.setdefault(one.id, f"#{len(own)}")
    for one in names:
        one.id = own.get(one.id, one.id)
    return ast.dump(tree)


def reliability(agreed: Sequence[bool], right: Sequence[bool]) -> float | None:
    """P(right | agreed): what agreement is worth here; None if samples never agreed."""
    chosen = [good for good, one in zip(right, agreed, strict=True) if one]
    return sum(chosen) / len(chosen) if chosen else None


__all__ = ["Compare", "canonical_code", "consistent", "reliability", "same"]
