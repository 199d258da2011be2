"""What a sequence of requests left in its folder, request by request.

OUT/manifest.json            what determines it, and at the end the whole result
OUT/requests/001-ID/         an ordinary run of ``unlearn`` for each request that was done
OUT/after/000.json           what was measured before the first request
OUT/after/001.json           what became of the first request, and what was measured after it
OUT/sequence.parquet         all values, record by record
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from delible.errors import RunError
from delible.files import read_json, write_json
from delible.rundir import RunDirectory

#: Said in the manifest of a sequence.
COMMAND = "unlearn --requests"
AFTER, REQUESTS = "after", "requests"
#: Split of the records that are to be kept.
RETAIN = "retain"

What = Literal["start", "done", "covered", "skipped"]


@dataclass(frozen=True)
class Step:
    """One request of a sequence, and what was measured after it.

    Attributes:
        number: From 1; 0 is before the first one.
        what: ``done``; ``covered``: all that it holds was done before; ``skipped``: the method
            found nothing to do.
        told: What happened, in a sentence.
        state: Folder of the run whose result the model is now; the start model's name before.
        seconds: Of the method alone; 0 where nothing was done.
        seconds_in_all: With loading, measuring and saving; None in a part that was resumed.
        peak_bytes: Most memory of the process, or of the GPU; None likewise.
        values: Answer probability in [0, 1] (or 1 for a right answer where a system gives no
            probabilities) of each record, by request and under ``retain``; None where a record
            cannot be asked.
        before: The same of this request's records, before anything was done, where the records
            were only known when its turn came.
        by: Ids of the requests that cover this one.
    """

    number: int
    id: str
    what: What
    told: str
    state: str
    seconds: float = 0.0
    seconds_in_all: float | None = None
    peak_bytes: int | None = None
    steps: int = 0
    tokens: int = 0
    values: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    before: float | None = None
    by: Sequence[str] = ()

    def mean(self, split: str) -> float | None:
        """Mean over the records that have a value."""
        known = [value for value in self.values.get(split, ()) if value is not None]
        return fmean(known) if known else None

    def save(self, folder: Path) -> None:
        """Writes it into the folder of its sequence."""
        write_json(place_of(folder, self.number), asdict(self))

    @classmethod
    def load(cls, folder: Path, number: int) -> Step | None:
        """What :meth:`save` wrote; None: this request's turn has not come."""
        path = place_of(folder, number)
        return cls(**read_json(path)) if path.exists() else None


def place_of(folder: Path, number: int) -> Path:
    """The file of a step."""
    return folder / AFTER / f"{number:03d}.json"


@dataclass(frozen=True)
class SequenceResult:
    """A sequence of requests, as far as it went.

    Attributes:
        steps: The start, then every request in order.
        ids: Of all requests, those that are still to come among them.
        resumed_finished: All of it had been done before.
    """

    folder: Path
    method: str
    model: str
    ids: tuple[str, ...]
    steps: tuple[Step, ...]
    seed: int = 0
    resumed_finished: bool = False

    @property
    def state(self) -> str:
        """The folder of the result after the last request; the model's name if nothing was done."""
        return self.steps[-1].state

    def left(self, number: int, id_: str) -> float | None:
        """Share of a request's answer probability that is left after so many requests.

        1: as at the start; 0: nothing; None where it was not measured, or there was nothing.
        """
        now, start = self.steps[number].mean(id_), self.start_of(id_)
        return None if now is None or not start else now / start

    def start_of(self, id_: str) -> float | None:
        """Mean answer probability of a request's records before anything was forgotten."""
        known = self.steps[0].mean(id_)
        if known is not None:
            return known
        return next((one.before for one in self.steps if one.id == id_), None)

    def kept(self, number: int) -> float | None:
        """Share of the retained answers' probability that is left after so many requests."""
        return self.left(number, RETAIN)

    def cells(self) -> list[dict[str, Any]]:
        """The steps as cells of a table that is kept as Parquet."""
        return [
            {
                "task": f"after {step.number:03d}", "method": self.method, "seed": self.seed,
                "numbers": {
                    **{f"left/{one}": self.left(step.number, one) for one in step.values},
                    "steps": step.steps,
                },
                "seconds": step.seconds,
                "peak_bytes": step.peak_bytes,
                "values": {"items": {"answer": {
                    split: [(value, None, None) for value in values]
                    for split, values in step.values.items()
                }}},
            }
            for step in self.steps
        ]  # fmt: skip

    def rows(self) -> list[dict[str, Any]]:
        """One row for each record, and each step after which it was measured."""
        return [
            {
                "after": step.number, "request": step.id, "of": split, "record": place,
                "value": value, "what": step.what,
            }
            for step in self.steps
            for split, values in step.values.items()
            for place, value in enumerate(values)
        ]  # fmt: skip


def is_sequence(folder: Path) -> bool:
    """Whether a folder holds a sequence of requests."""
    return RunDirectory(folder).manifest.get("run", {}).get("command") == COMMAND


def read_sequence(folder: Path | str) -> SequenceResult:
    """A sequence from its folder, as far as it went.

    Raises:
        RunError: There is none, or a part of it is missing.
    """
    folder = Path(folder).expanduser()
    if not is_sequence(folder):
        raise RunError(
            "there is no sequence of requests in this folder.",
            where=str(folder),
            hint="Give the folder of 'delible unlearn --requests'.",
        )
    run = RunDirectory(folder).manifest["run"]
    ids = tuple(name for name, _ in run["requests"])
    steps: list[Step] = []
    while len(steps) <= len(ids) and (step := Step.load(folder, len(steps))) is not None:
        steps.append(step)
    if not steps:
        raise RunError("the sequence has not begun.", where=str(folder))
    return SequenceResult(
        folder, run["method"]["name"], run["model"], ids, tuple(steps), run["seed"]
    )


def state_of(folder: Path | str) -> str:
    """What opens the result of a sequence so far: the run folder of the last request done."""
    return read_sequence(folder).state


__all__ = [
    "AFTER", "COMMAND", "REQUESTS", "RETAIN", "SequenceResult", "Step", "is_sequence",
    "read_sequence", "state_of",
]  # fmt: skip
