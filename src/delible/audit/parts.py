"""Parts of a system that can be taken away: guards, interventions, an adapter that is not merged.

Whoever holds the model takes them away in one line. What is known without them is measured in a
row of its own, and a verdict on the whole can be no better than what is left.
"""

from __future__ import annotations

from collections.abc import Iterator

from delible.intervene.system import Intervened
from delible.lm.lm import LM
from delible.system.base import System
from delible.systems.guarded import GuardedSystem


def without_parts(system: System) -> Iterator[tuple[str, System]]:
    """What is left when the outermost part is taken away, then the next one, and so on.

    Yields:
        What was taken away, in words, and the system without it (and without those before it).
    """
    while True:
        if isinstance(system, GuardedSystem):
            name = system.name.removeprefix(f"{system.system.name} + ")
            system = system.system
            yield f"guard '{name}'", system
        elif isinstance(system, Intervened):
            names = ", ".join(f"'{one.intervention.card.name}'" for one in system.interventions)
            system = system.bare
            yield f"intervention {names}", system
        elif isinstance(system, LM) and system.wears_adapter:
            bare = system.copy(f"{system.name} without its adapter")
            bare.wear(bare.model.unload())
            system = bare
            yield "adapter", system
        else:
            return
