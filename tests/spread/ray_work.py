"""Work for a cluster under test; it imports next to nothing, so that workers begin soon."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any


def slow(piece: dict[str, Any]) -> dict[str, Any]:
    """Doubles a value, and notes where it begins, and its end, in a folder that all nodes see."""
    import ray

    notes, name = Path(piece["notes"]), piece["value"]
    with (notes / "begun").open("a") as handle:
        handle.write(f"{name} {ray.get_runtime_context().get_node_id()}\n")
    time.sleep(piece["seconds"])
    with (notes / "ended").open("a") as handle:
        handle.write(f"{name}\n")
    return {"value": 2 * piece["value"]}
