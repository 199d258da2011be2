"""Whom an audit asks: the unlearned system, the original and the reference, loaded one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from delible.audit.result import SystemRole
from delible.context import Context
from delible.records import ForgetRequest
from delible.system.base import System
from delible.systems.opening import is_address, open_system

_TEXTS_ONLY = (
    "An endpoint gives texts only: log-probabilities, hidden states and weights were not looked "
    "at, so metrics that read them and attacks that change weights were left out."
)
_PREFILLED = (
    "Whether the endpoint went on from a prefilled answer is not known: some servers begin anew."
)
_WITHOUT = {
    "original": "The original model was not given (--before), so nothing is compared with it.",
    "reference": (
        "No model trained without the forgotten records was given (--reference), so what "
        "unlearning should reach is not known exactly."
    ),
}


class Systems:
    """Systems by role, in the order in which they are asked.

    They are loaded when they are asked for, so that no more are in memory
    at once than an attack compares.

    Args:
        system: The unlearned one.
        request: What the guard is to keep back.
        model: Name of the unlearned model at its address.
        guard: Name of a guard to put before the unlearned system.
        prefills: Whether something will be asked that begins the answer.
        context: Whom guards consult by talking.

    Attributes:
        notes: What cannot be tested without the ones that were not given, or on an endpoint.
    """

    def __init__(
        self,
        system: str | System,
        request: ForgetRequest,
        *,
        model: str | None,
        before: str | System | None,
        reference: str | System | None,
        guard: str | None,
        prefills: bool,
        context: Context,
    ) -> None:
        self.notes: list[str] = []
        self._prefills, self._context = prefills, context
        unlearned = self._loader(system, model)
        if guard is not None:
            unlearned = _guarded(unlearned, request, guard, context)
        self._loaders: dict[SystemRole, Callable[[], System]] = {"unlearned": unlearned}
        for role, given in (("original", before), ("reference", reference)):
            if given is None:
                self.notes.append(_WITHOUT[role])
            else:
                self._loaders[cast(SystemRole, role)] = self._loader(given)
        self._kept: dict[SystemRole, System] = {}

    @property
    def roles(self) -> Sequence[SystemRole]:
        """Who there is."""
        return tuple(self._loaders)

    def load(self, role: SystemRole) -> System:
        """The system of a role; it is the caller's, and loaded anew the next time."""
        return self._kept[role] if role in self._kept else self._loaders[role]()

    def kept(self, role: SystemRole) -> System:
        """The system of a role, which then stays."""
        if role not in self._kept:
            self._kept[role] = self._loaders[role]()
        return self._kept[role]

    def _loader(self, given: str | System, model: str | None = None) -> Callable[[], System]:
        if not isinstance(given, str):
            return lambda: given
        if is_address(given) or model is not None:
            # takes no memory, and a wrong address or key is told before anything is asked
            endpoint = open_system(given, model=model, context=self._context)
            lines = [_TEXTS_ONLY, _PREFILLED] if self._prefills else [_TEXTS_ONLY]
            self.notes += [line for line in lines if line not in self.notes]
            return lambda: endpoint
        return lambda: open_system(given, context=self._context)


def _guarded(
    unguarded: Callable[[], System], request: ForgetRequest, name: str, context: Context
) -> Callable[[], System]:
    def guarded() -> System:
        from delible.systems.guarded import guard

        return guard(unguarded(), request, name, context=context)

    return guarded
