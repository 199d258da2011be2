"""Models that a benchmark starts from: fine-tuned once, kept in the user's cache."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from delible import kept
from delible.api import unlearn
from delible.records import ForgetRequest, Record, digest
from delible.rundir import OtherRunError, RunDirectory
from delible.train.recipe import Recipe
from delible.watching import Steps

logger = logging.getLogger(__name__)


def learned(
    model: str,
    records: Sequence[Record],
    *,
    options: Mapping[str, Any],
    slots: Mapping[str, Any] | None = None,
    seed: int = 0,
    title: str = "target",
    progress: Steps | None = None,
) -> Path:
    """The folder of a model that has learned records by plain fine-tuning.

    The run lies in the cache under everything that decides its weights (model, records in
    order, the resolved method, seed); a killed one goes on, and a second process waits for the
    first.

    Args:
        model: What learns.
        options: Options of the method ``finetune``, such as ``{"epochs": 5}``.
        slots: Other components of it.
        title: For people, in the folder's name.
    """
    method = Recipe.named("finetune").changed(dict(slots or {}), dict(options))
    described = {
        "model": model, "data": digest(records), "seed": seed, "method": method.spec(),
    }  # fmt: skip
    folder = kept.place("learned", described, title=title, digits=12)
    with kept.alone(folder):
        is_done = RunDirectory(folder).manifest.get("status") == "done"
        damage = kept.damage(folder / "model") if is_done else None
        if damage is not None:
            logger.warning(f"{title} in the cache is damaged ({damage}): it is learned anew.")
            kept.remove(folder)
        teach = partial(
            unlearn, model, ForgetRequest(forget=tuple(records)), method=method, out=folder,
            seed=seed, shown=0, measured=False, verify=False, progress=progress,
        )  # fmt: skip
        try:
            result = teach()
        except OtherRunError:  # an earlier version knew models, or what is decisive, otherwise
            logger.warning(f"{title} in the cache is of an earlier version: it is learned anew.")
            kept.remove(folder)
            result = teach()
        if not result.resumed_finished:
            kept.seal(folder / "model")
    if result.resumed_finished:
        logger.info(f"{title} taken from the cache: {folder}.")
    return folder / "model"
