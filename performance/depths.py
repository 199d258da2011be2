"""What an audit of each depth takes, and what each attack in it: the demo's world after NPO.

One process, one depth after the other, with a cache of its own, so that attacks on the original
and on the reference are paid for too (once: a deeper audit finds what a shallower one has asked).
Writes a JSON file after every depth; the seconds of an attack are those of all three systems.

Run: taskset -c 0,1 python performance/depths.py depths.json --depths quick,standard
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from delible.api import unlearn
from delible.audit.run import audit
from delible.cards import Depth
from delible.context import Context
from delible.demo import learn, request_of, world_of
from delible.files import write_json
from delible.rundir import RunDirectory, git_revision, hardware, versions
from delible.watching import shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("numbers", type=Path, help="the JSON file to write")
    parser.add_argument("--depths", default="quick,standard,deep")
    parser.add_argument("--model", default="default")
    given = parser.parse_args()
    split = world_of()
    request = request_of(split)
    target = learn(given.model, split.records("known"), 0, "target")
    reference = learn(given.model, split.records("kept"), 0, "reference")
    found: dict[str, Any] = {
        "model": given.model, "hardware": hardware(), "versions": versions(),
        "git": git_revision(), "depths": {},
    }  # fmt: skip
    with TemporaryDirectory() as folder, shown(print):
        system = Path(folder) / "unlearned"
        unlearn(str(target), request, method="npo", out=system, shown=0, measured=False)
        steps: list[tuple[str, float]] = []
        for depth in given.depths.split(","):
            steps.clear()

            def told(what: str, done: int, of: int) -> None:
                if not steps or steps[-1][0] != what:
                    steps.append((what, time.perf_counter()))

            began = time.perf_counter()
            context = Context(
                run=RunDirectory(Path(folder) / "audit"), stage=told, cache=Path(folder) / "cache"
            )
            result = audit(
                str(system), request, before=str(target), reference=str(reference),
                depth=cast(Depth, depth), context=context,
            )  # fmt: skip
            seconds = time.perf_counter() - began
            ends = [*(at for _, at in steps[1:]), began + seconds]
            each: dict[str, float] = {}
            for (what, at), end in zip(steps, ends, strict=True):
                name = what.partition(": ")[2] or what
                each[name] = round(each.get(name, 0.0) + end - at, 1)
            found["depths"][depth] = {
                "seconds": round(seconds, 1),
                "settings": len(result.leaks),
                "each": dict(sorted(each.items(), key=lambda one: -one[1])),
            }
            write_json(given.numbers, found)
            print(f"{depth}: {seconds / 60:.1f} minutes", flush=True)


if __name__ == "__main__":
    main()
