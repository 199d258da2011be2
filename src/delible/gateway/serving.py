"""``delible.serve``: a gateway from Python, until it is told to end or beside other work."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from delible.errors import RecipeError, RunError
from delible.gateway.running import address, listening, needs_extra, run, server
from delible.gateway.settings import GatewaySettings

if TYPE_CHECKING:
    from delible.context import Context
    from delible.records import ForgetRequest
    from delible.system.base import Responder, System

_START_SECONDS = 60.0


class Serving:
    """A gateway that serves beside other work; made by :func:`serve`.

    Use it as a context, or close it.

    Attributes:
        url: Where its API is, ending in ``/v1``.
    """

    def __init__(self, models: Sequence[Any], settings: GatewaySettings) -> None:
        self._server = server(models, settings)
        self._place = listening(settings)
        self.url = address(settings, self._place)
        self._thread = threading.Thread(
            target=self._server.run,
            kwargs={"sockets": [self._place]},
            name="delible-gateway",
            daemon=True,
        )
        self._thread.start()
        ends = time.monotonic() + _START_SECONDS
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > ends:
                self.close()
                raise RunError("the gateway did not start.", where=self.url)
            time.sleep(0.005)

    def close(self) -> None:
        """Lets answers under way end, and ends."""
        self._server.should_exit = True
        self._thread.join()
        self._place.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def serve(
    target: str | System | Responder = "default",
    *,
    request: ForgetRequest | None = None,
    targets: str | Path | None = None,
    guards: Sequence[str | Mapping[str, Any]] = (),
    model: str | None = None,
    name: str | None = None,
    context: Context | None = None,
    background: bool = False,
    **settings: Any,
) -> Serving | None:
    """Serves a system to OpenAI clients, behind guards: ``delible serve`` in Python.

    Args:
        target: A system, or its name: a model, a run or any artefact, ``vllm:MODEL``, or the
            address of a server.
        request: What guards go by.
        targets: Or a file of targets, which they follow.
        guards: Names of guards, or mappings with ``name`` and options; the first one is innermost.
        model: Name of the model at an address.
        name: What clients call it.
        context: Who judges or writes for guards by talking.
        background: Come back at once, with what ends it; else it serves until a signal ends it.
        **settings: Of :class:`~delible.gateway.settings.GatewaySettings`: host, port, keys, limits.

    Returns:
        With ``background`` the gateway at work.

    Raises:
        MissingExtraError: The extra ``gateway`` is not installed.
        RecipeError: An unknown guard or setting, or guards without anything to go by.
        RunError: The address cannot be used.
        DelibleError: The target cannot be opened, or the file of targets cannot be used.
    """
    needs_extra()
    made = GatewaySettings.build("delible.serve", **settings)
    if guards and (request is None) == (targets is None):
        raise RecipeError(
            "guards go by a request or by a file of targets.",
            where="delible.serve",
            hint="Give either request= or targets=.",
        )
    if not guards and (request is not None or targets is not None):
        raise RecipeError(
            "nothing goes by a request or by targets without a guard.",
            where="delible.serve",
            hint="Give guards=['target_detector'].",
        )
    from delible.gateway.models import ServedModel, name_for
    from delible.systems.guarded import guard
    from delible.systems.opening import open_system
    from delible.systems.targeted import guard_by_targets

    known: dict[str, Any] = {} if context is None else {"context": context}
    system: Any = target
    if isinstance(target, str):
        system = open_system(target, model=model, serving=True, **known)
    called = name or name_for(target if isinstance(target, str) else system.name, system)
    for given in guards:
        options = {"name": given} if isinstance(given, str) else dict(given)
        if targets is not None:
            system = guard_by_targets(system, targets, context=context, **options)
        else:
            assert request is not None
            system = guard(system, request, context=context, **options)
    models = [ServedModel(called, system, made)]
    if background:
        return Serving(models, made)
    run(models, made)
    return None


__all__ = ["Serving", "serve"]
