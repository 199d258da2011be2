"""Utility: what a model can still do, on the tasks of lm-evaluation-harness.

Any task of the harness (arc_easy, hellaswag, piqa, gsm8k, …) is asked of a model, an unlearned one
or a run directory, and, where it is given, of the model before; what matters is the difference.
Without names, delible's own general knowledge is written as a task of the harness and asked.

Reference code: EleutherAI/lm-evaluation-harness, which needs the extra ``utility``. Prompts are
plain text, as on its leaderboards; numbers are the harness's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from delible.errors import RecipeError
from delible.kept import cache_folder, cell, identity
from delible.measure.benchmark import (
    Chart,
    Curve,
    Experiment,
    Findings,
    Setting,
)
from delible.registry import register
from delible.world import general, general_choices

#: Our own tasks, made without any download.
OWN = ("delible_general", "delible_general_choice")
#: Of the metrics that say the same in two ways, what a chart shows.
FIRST = ("acc", "exact_match", "acc_norm", "word_perplexity")


def rows_of(
    now: Mapping[str, Any], before: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """One row per task and metric.

    Args:
        now: Results of the harness.
        before: The same of the model before.

    Returns:
        Rows with task, metric, value and standard error; with ``before`` also its value and the
        change.
    """
    from delible.benchmarks.utility.results import read_results, standard_errors

    means, errors = read_results(now).means, standard_errors(now)
    earlier = read_results(before).means if before is not None else {}
    rows = []
    for metric, by_task in means.items():
        for task, value in by_task.items():
            row: dict[str, Any] = {"task": task, "metric": metric, "value": value}
            row["standard error"] = errors.get(metric, {}).get(task)
            if before is not None:
                old = earlier.get(metric, {}).get(task)
                row["before"] = old
                row["change"] = None if old is None or value is None else value - old
            rows.append(row)
    return sorted(rows, key=lambda row: (row["task"], row["metric"]))


@register(
    kind="benchmark",
    name="utility",
    title="Utility (lm-evaluation-harness)",
    summary="What a model can still do: any task of lm-evaluation-harness, before and after.",
    year=2023,
    family="utility",
    capability="score",
    misleads="Tasks of likelihood do not see that a model no longer speaks: add one that generates "
    "(gsm8k). Differences within two standard errors are noise.",
)
class Utility(Experiment):
    """Measures one model, or two. The folder of ``--data`` may hold more tasks of the harness."""

    tasks: tuple[str, ...] = Field(
        (), description="Names of tasks, such as arc_easy,piqa; none: delible's general knowledge."
    )
    before: str | None = Field(
        None, description="The model before unlearning, measured too: a name, folder or hub id."
    )
    limit: int | None = Field(None, ge=1, description="Documents per task.")
    shots: int | None = Field(
        None, ge=0, description="Solved examples before each question (default: the task's own)."
    )

    def run(self, setting: Setting) -> Findings:
        from delible.benchmarks.utility.bridge import required
        from delible.benchmarks.utility.export import export_tasks

        if setting.methods:
            raise RecipeError(
                "this measures models as they are.",
                where="utility",
                hint="Unlearn first ('delible unlearn … --out DIR'), then give --model DIR and "
                "--before MODEL.",
            )
        required()  # says what is missing before anything is loaded
        include, names = setting.data.folder, self.tasks
        if not names:
            include = setting.folder / "tasks"
            names = tuple(
                export_tasks(include, dict(zip(OWN, (general(), general_choices()), strict=True)))
            )
        models = [setting.model, *([self.before] if self.before else [])]
        found = []
        for number, model in enumerate(models):
            setting.progress(f"{model}: {', '.join(names)}", number, len(models))
            found.append(self._measured(setting, model, names, include))
        setting.progress("done", len(models), len(models))
        rows = rows_of(*found)
        return Findings(rows, _charts(rows), _notes(rows))

    def _measured(
        self, setting: Setting, model: str, names: Sequence[str], include: Any
    ) -> dict[str, Any]:
        """The harness's results on a model, from an earlier run if there is one."""
        from delible.benchmarks.utility.harness import run_harness
        from delible.lm.lm import LM
        from delible.measure.cache import Cache

        lm = LM.load(model)
        described = {
            "model": lm.fingerprint,
            "tasks": list(names),
            "limit": self.limit,
            "shots": self.shots,
        }
        place = setting.folder / f"results_{identity(described)[:12]}.json"

        def made() -> dict[str, Any]:
            results = run_harness(
                lm,
                names,
                limit=self.limit,
                shots=self.shots,
                include=include,
                cache=Cache(cache_folder() / "answers"),
            )
            told = ("results", "n-samples", "model_name")
            return {key: results[key] for key in told if key in results}

        return cell(place, made)


def _charts(rows: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """One bar-like curve per model over the tasks, where there are two models."""
    shown = _first_metric(rows)
    if not shown or "before" not in shown[0]:
        return []
    curves = [
        Curve(name, [(float(place), float(row[key])) for place, row in enumerate(shown, 1)])
        for name, key in (("before", "before"), ("now", "value"))
        if all(row[key] is not None for row in shown)
    ]
    titles = ", ".join(f"{place}: {row['task']}" for place, row in enumerate(shown, 1))
    return [Chart("Before and now", titles, "value", curves)] if len(curves) == 2 else []


def _first_metric(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    by_task: dict[str, Mapping[str, Any]] = {}
    for metric in reversed(FIRST):
        by_task |= {row["task"]: row for row in rows if row["metric"] == metric}
    return [by_task[task] for task in sorted(by_task)]


def _notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which tasks changed by more than two standard errors."""
    changed = [
        f"{row['task']} {row['change']:+.3f}"
        for row in _first_metric(rows)
        if row.get("change") is not None
        and row["standard error"] is not None
        and abs(row["change"]) > 2 * row["standard error"]
    ]
    if not any("before" in row for row in rows):
        return []
    if not changed:
        return ["No task changed by more than two standard errors."]
    return [f"Changed by more than two standard errors: {', '.join(changed)}."]
