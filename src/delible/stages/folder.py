"""The folder of one stage: a run directory of its own inside the run's, with a manifest.

    RUN/stages/NAME/        or NAME-003 for the third part of a stage that is done in parts
      manifest.json         what determines the stage, its cost, and the digest of its result
      result/               data and tensors, written when the stage ends
      partial/, checkpoint/ while it runs

What it tells of its progress goes into the run's own ``events.jsonl``, with the stage's name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from delible.rundir import RunDirectory

#: Folder of the stages in a run.
STAGES = "stages"
RESULT, PARTIAL = "result", "partial"


class StageFolder(RunDirectory):
    """One stage on disk.

    Args:
        outer: The run that it is a stage of.
        name: Of the stage; of a part of it, with its number.
    """

    def __init__(self, outer: RunDirectory, name: str) -> None:
        super().__init__(outer.path / STAGES / name)
        self.outer, self.name = outer, name

    def event(self, kind: str, **fields: Any) -> None:
        """Appends a line to the run's events."""
        self.outer.event(kind, stage=self.name, **fields)

    @property
    def result(self) -> Path:
        return self.path / RESULT

    @property
    def partial(self) -> Path:
        return self.path / PARTIAL


def stages_of(run: RunDirectory) -> list[dict[str, Any]]:
    """The stages of a run as its manifest tells them, in the order in which they ended."""
    found: list[dict[str, Any]] = run.manifest.get("stages", [])
    return found


__all__ = ["STAGES", "StageFolder", "stages_of"]
