"""Parts of a system that can be taken away: a guard, an adapter, a patch, a hook; it names them.

Whoever holds the model takes them away in one line. What is known without them is measured in a
row of its own, and a verdict on the whole can be no better than what is left.
"""

from __future__ import annotations

from collections.abc import Iterator

from delible.system.base import Composed, System


def without_parts(system: System) -> Iterator[tuple[str, System]]:
    """What is left when the outermost part is taken away, then the next one, and so on.

    Yields:
        What was taken away, in words, and the system without it (and without those before it).
    """
    while isinstance(system, Composed):
        found = system.taken_off()
        if found is None:
            return
        system = found[1]
        yield found
