"""Runs lm-evaluation-harness on a system.

Reference: EleutherAI/lm-evaluation-harness (package ``lm_eval``, 0.4.13).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delible.benchmarks.utility.bridge import harness_model, required
from delible.errors import DataError, RecipeError, nearest
from delible.measure.engine import Progress
from delible.system.base import System

if TYPE_CHECKING:
    from delible.measure.cache import Cache

logger = logging.getLogger(__name__)


def run_harness(
    system: System,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    shots: int | None = None,
    include: Path | None = None,
    cache: Cache | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Runs tasks of the harness on a system.

    Args:
        system: What is measured.
        tasks: Names, such as ``arc_easy``.
        limit: Documents per task.
        shots: Solved examples before each; ``None``: as each task has it.
        include: Folder with more tasks, such as :func:`export_tasks` writes.

    Returns:
        The harness's results with samples; :func:`read_results` reads them.

    Raises:
        MissingExtraError: The harness is not installed.
        RecipeError: An unknown task; offers the nearest.
        DataError: A task's data cannot be loaded.
        RunError: The system cannot answer a task.
    """
    evaluate = required("lm_eval.evaluator").simple_evaluate
    manager = required("lm_eval.tasks").TaskManager(
        include_path=None if include is None else str(include)
    )
    known = list(manager.all_tasks)
    for task in tasks:
        if task not in known:
            raise RecipeError(
                f"lm-evaluation-harness has no task '{task}'.",
                hint=_closest(task, known),
            )
    bridge = harness_model(system, cache=cache, progress=progress)
    logger.info(f"lm-evaluation-harness loads the data of {', '.join(tasks)}.")
    try:
        results = evaluate(
            model=bridge,
            tasks=list(tasks),
            num_fewshot=shots,
            limit=limit,
            task_manager=manager,
            log_samples=True,
            bootstrap_iters=1000,
        )
    except (OSError, ValueError) as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise DataError(
            f"the harness cannot run its tasks ({reason}).",
            where=", ".join(tasks),
            hint="Its data comes from the Hugging Face hub: is there a network, or a filled cache?",
        ) from error
    if bridge.unanswered:
        logger.warning(
            f"{len(bridge.unanswered)} texts had no answer and count as impossible "
            f"({bridge.unanswered[0]})."
        )
    plain = {
        task: {
            key: float(value) if hasattr(value, "dtype") else value
            for key, value in numbers.items()
        }
        for task, numbers in results["results"].items()
    }
    return {**results, "results": plain, "model_name": system.name}


def _closest(name: str, known: Sequence[str]) -> str:
    hint = nearest(name, known)
    return hint if hint.startswith("Did") else "'lm_eval --tasks list' names them all."
