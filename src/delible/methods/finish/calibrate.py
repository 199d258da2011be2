"""Calibration by mixing: give back what was retained, then see how much stays forgotten.

    theta(alpha) = (1 - alpha) theta_start + alpha theta_trained

alpha is the largest value in the region that is connected to 0 in which the extraction strength
of the retain records is at least ``retention`` times that of the start model. So methods that
forget more and methods that retain more become comparable at equal retention. alpha near 0 means
that the method ruined the model: the values before calibration are kept beside those after it.

Paper: arXiv 2406.09179. Reference code: github.com/tmlr-group/Unlearning-with-Control.
Deviations: the released code evaluates the end points only; here a grid is walked from 0 to the
first failure and refined by bisection (retention does not always fall steadily with alpha).
The trained weights lie on disk during the search, so two copies of the model are in memory.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from delible import registry
from delible.errors import RunError
from delible.files import explain_disk, write_json
from delible.lm.lm import LM
from delible.measure.evaluate import evaluate
from delible.records import RecordBase
from delible.registry import register
from delible.train.slots import Finish, FinishContext

logger = logging.getLogger(__name__)


def mix(start: Tensor, trained: Tensor, alpha: float) -> Tensor:
    """(1 - alpha) start + alpha trained in fp32; exactly either one at 0 and at 1."""
    return torch.lerp(start.float(), trained.float(), alpha).to(trained.dtype)


def largest_connected(holds: Callable[[float], bool], grid: float, resolution: float) -> float:
    """The largest alpha in [0, 1] up to which ``holds`` was never seen to fail.

    Args:
        holds: The condition; taken for granted at 0.
        grid: Step of the walk from 0 to the first failure.
        resolution: Length at which the bisection before that failure stops.
    """
    passed, failed = 0.0, None
    for index in range(1, int(1 / grid - 1e-9) + 2):
        alpha = min(1.0, index * grid)
        if not holds(alpha):
            failed = alpha
            break
        passed = alpha
    while failed is not None and failed - passed > resolution:
        middle = (passed + failed) / 2
        if holds(middle):
            passed = middle
        else:
            failed = middle
    return passed


def spread(records: Sequence[RecordBase], count: int) -> list[RecordBase]:
    """At most ``count`` records, evenly spaced over all of them."""
    if len(records) <= count:
        return list(records)
    return [records[index * len(records) // count] for index in range(count)]


class _Line:
    """The models between the start and the trained one; ``lm`` is moved along it in place."""

    def __init__(self, lm: LM, start: LM, path: Path) -> None:
        self.lm, self.path = lm, path
        self.start = dict(start.core.named_parameters())
        self.moving = {
            name: value for name, value in lm.core.named_parameters() if value.is_floating_point()
        }
        for name, value in self.moving.items():
            if name not in self.start or self.start[name].shape != value.shape:
                raise RunError(
                    f"the start model has no tensor '{name}' of shape {tuple(value.shape)}.",
                    where="finish 'calibrate'",
                    hint="Both models must have the same architecture; merge adapters first.",
                )
        with explain_disk(path):
            save_file({name: v.detach().contiguous() for name, v in self.moving.items()}, path)

    @torch.no_grad()
    def move(self, alpha: float) -> None:
        with safe_open(self.path, framework="pt") as trained:
            for name, value in self.moving.items():
                there = trained.get_tensor(name).to(value.device)
                value.copy_(mix(self.start[name].to(value.device), there, alpha))
        self.lm.touch()


@register(
    kind="finish",
    name="calibrate",
    title="Calibration by mixing (UWC)",
    summary="Mixes the trained with the start model until the retain records are kept.",
    paper="2406.09179",
    year=2024,
    family="model mixing",
    intention="as host",
    mechanism="wrapper",
    needs=("retain", "weights"),
    changes="weights",
    reversible=False,
    weakest="as host",
    badges=("variant",),
    variant="Searches for the mixture, from the start model upwards, at a finer resolution.",
)
class Calibrate(Finish):
    """Options of calibration."""

    needs_start: ClassVar[bool] = True

    retention: float = Field(
        0.95, gt=0, le=1, description="Share of the start's retain extraction strength to keep."
    )
    grid: float = Field(0.1, gt=0, le=1, description="Step of the walk away from the start.")
    resolution: float = Field(0.01, gt=0, le=1, description="Where the bisection stops.")
    records: int = Field(200, ge=1, description="At most this many records of each role count.")

    def needs_whole(self) -> str | None:
        return "it walks along the line between two whole models"

    def apply(self, context: FinishContext) -> LM:
        lm = context.lm
        if lm.wears_adapter:
            lm.merge_adapter()
            logger.info("finish: the adapter is merged before mixing")
        splits = {
            role: spread(context.records[role], self.records)
            for role in ("retain", "forget")
            if context.records.get(role)
        }
        metric = registry.load("metric", "extraction_strength")()

        def strengths(*roles: str) -> dict[str, float | None]:
            chosen = {role: splits[role] for role in roles if role in splits}
            values = evaluate(lm, chosen, [metric], progress=partial(context.stage, "calibrating"))
            return dict(values.means["extraction_strength"])

        with tempfile.TemporaryDirectory(dir=context.folder, prefix=".calibrate.") as folder:
            trained = strengths("retain", "forget")
            line = _Line(lm, context.start(), Path(folder) / "trained.safetensors")
            line.move(0.0)
            start = strengths("retain", "forget")
            notes: dict[str, Any] = {"retention": self.retention, "start": start}
            notes["trained"] = trained
            goal = start.get("retain")
            if not goal:
                line.move(1.0)
                notes |= {"alpha": 1.0, "calibrated": trained, "skipped": True}
                logger.warning(
                    "finish: not calibrated: the start model extracts nothing of the retain "
                    "records, so there is nothing to keep; the model is as trained."
                )
            else:
                curve: dict[float, float | None] = {0.0: goal}

                def holds(alpha: float) -> bool:
                    line.move(alpha)
                    curve[alpha] = value = strengths("retain")["retain"]
                    return value is not None and value >= self.retention * goal

                alpha = largest_connected(holds, self.grid, self.resolution)
                line.move(alpha)
                notes |= {"alpha": alpha, "calibrated": strengths("retain", "forget")}
                notes["curve"] = [[at, curve[at]] for at in sorted(curve)]
                logger.info(_summary(alpha, notes))
        context.notes["calibration"] = notes
        if context.folder is not None:
            write_json(context.folder / "calibration.json", notes)
        return lm


def _summary(alpha: float, notes: dict[str, Any]) -> str:
    def say(values: dict[str, float | None]) -> str:
        return ", ".join(
            f"{role} {'?' if value is None else format(value, '.3f')}"
            for role, value in values.items()
        )

    return (
        f"finish: alpha = {alpha:.3f}; extraction strength at the start {say(notes['start'])}; "
        f"as trained {say(notes['trained'])}; calibrated {say(notes['calibrated'])}"
    )
