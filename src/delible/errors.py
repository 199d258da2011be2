"""Errors a user can cause: what is wrong, where, and what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

EXIT_DONE = 0
EXIT_THRESHOLD_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


class DelibleError(Exception):
    """A mistake in the input or the environment, told in one message.

    Args:
        problem: What is wrong.
        where: File, line, flag or component it concerns.
        hint: What to do next.
    """

    exit_code = EXIT_BAD_INPUT

    def __init__(self, problem: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.problem, self.where, self.hint = problem, where, hint
        super().__init__(
            "".join([f"{where}: " if where else "", problem, f" {hint}" if hint else ""])
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as it is, whatever its class is made with: it may come from another process."""
        return _unpickled, (type(self), self.args), self.__dict__


def _unpickled(kind: type[DelibleError], args: tuple[Any, ...]) -> DelibleError:
    """An error without its attributes, which come next."""
    error = kind.__new__(kind)
    error.args = args
    return error


class DataError(DelibleError):
    """A record, a file of records or a forget request that cannot be used."""


class ModelError(DelibleError):
    """A model, tokenizer or architecture that cannot be used."""


class RefusedConversationError(ModelError):
    """A conversation that a model's chat template does not take.

    Args:
        conversation: Its turns, by which whoever knows the records can tell the record.
    """

    def __init__(
        self,
        problem: str,
        *,
        where: str | None = None,
        hint: str | None = None,
        conversation: tuple[Any, ...] = (),
    ) -> None:
        super().__init__(problem, where=where, hint=hint)
        self.conversation = conversation


class RecipeError(DelibleError):
    """An unknown component, key or value, or a composition that makes no sense."""


class RunError(DelibleError):
    """A run that cannot start, go on or be read."""


class MissingExtraError(DelibleError):
    """A feature whose optional dependency is not installed."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(
            f"{feature} needs the extra '{extra}'.", hint=f"Run: pip install 'delible[{extra}]'."
        )


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint that offers the closest of the known names, or lists them all."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"Did you mean '{close[0]}'?"
    return f"Known: {', '.join(known)}."
