"""A benchmark's options for a method: searched once, kept in the cache for all its seeds."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from typing import Any

from delible import kept
from delible.measure.starting import roles_of
from delible.records import ForgetRequest
from delible.resolving import resolve_method
from delible.system.roles import Player
from delible.systems.opening import open_system
from delible.tune.measuring import ROWS
from delible.tune.search import tune
from delible.tune.study import optuna_or_extra

#: Seed of the search: none of those that a benchmark reports.
TUNING_SEED = 20_240


def tuned_options(
    start: str,
    request: ForgetRequest,
    method: str,
    trials: int,
    options: Mapping[str, Any],
    roles: Mapping[str, Player] | None = None,
) -> dict[str, Any]:
    """A benchmark's options for a method, with those that a search found for it.

    What is given is held, so that every method has the same budget; only the learning rate is
    searched even then, around the given one. The result is kept in the user's cache, by the
    weights, the records, the method and the options.

    Args:
        start: Name or folder of the model that is to forget.
        options, roles: Of :func:`delible.unlearn`.

    Returns:
        Options of :func:`delible.unlearn`.

    Raises:
        DelibleError: As for :func:`tune`.
    """
    optuna_or_extra()  # told before a model is loaded
    chosen = resolve_method(method, options=options)
    system = open_system(start)
    described = {
        "model": system.fingerprint,
        "request": request.id,
        "method": chosen.spec(),
        "hold": sorted(options),
        "trials": trials,
        "seed": TUNING_SEED,
        "rows": ROWS,
        **({"roles": roles_of(roles).named()} if roles else {}),
    }
    del system
    gc.collect()
    folder = kept.place("tune", described)

    def searched() -> dict[str, Any]:
        hold = [name for name in options if name.rpartition(".")[2] != "learning_rate"]
        return tune(
            start,
            request,
            method=chosen,
            trials=trials,
            seed=TUNING_SEED,
            out=folder,
            hold=hold,
            roles=roles,
        ).best_options

    # the other seeds of the method wait for this search
    best = kept.cell(folder / "options.json", searched, entry=folder)
    held = {name: value for name, value in options.items() if chosen.option(name) not in best}
    return {**held, **best}
