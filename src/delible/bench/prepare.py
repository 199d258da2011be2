"""Models that a benchmark starts from: fine-tuned once, kept in the user's cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from delible.api import unlearn
from delible.lm.embedded import cache_folder
from delible.records import ForgetRequest, Record, digest
from delible.rundir import identity
from delible.train.engine import Progress

Say = Callable[[str], None]


def learned(
    model: str,
    records: Sequence[Record],
    *,
    options: Mapping[str, Any],
    slots: Mapping[str, Any] | None = None,
    seed: int = 0,
    title: str = "target",
    say: Say = lambda _: None,
    progress: Progress | None = None,
) -> Path:
    """The folder of a model that has learned records by plain fine-tuning.

    The run lies in the cache under everything that decides its weights (model, records in
    order, options, seed); a killed one goes on, and a second process waits for the first.

    Args:
        model: What learns.
        options: Options of the method ``finetune``, such as ``{"epochs": 5}``.
        slots: Other components of it.
        title: For people, in the folder's name.
    """
    described = {
        "model": model, "data": digest(records), "seed": seed, "learning": dict(options),
        "slots": dict(slots or {}),
    }  # fmt: skip
    folder = cache_folder() / "learned" / f"{title}-{identity(described)[:12]}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        result = unlearn(
            model,
            ForgetRequest(forget=tuple(records)),
            method="finetune",
            slots=dict(slots or {}),
            out=folder,
            seed=seed,
            shown=0,
            measured=False,
            verify=False,
            say=say,
            progress=progress,
            **options,
        )
    if result.resumed_finished:
        say(f"{title} taken from the cache: {folder}.")
    return folder / "model"
