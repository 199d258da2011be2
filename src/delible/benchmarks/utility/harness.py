"""Bridge to lm-evaluation-harness: our records as its tasks, its results as our values.

The harness is the extra ``utility``; nothing here imports it before it is used.

Reference: EleutherAI/lm-evaluation-harness (package ``lm_eval``, 0.4.13).
"""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from delible.errors import DataError, MissingExtraError, RecipeError, RunError, nearest
from delible.files import atomic_file, read_json
from delible.measure.engine import Progress, measure
from delible.measure.metric import Item, SystemValues
from delible.records import QA, Choice, Passage, RecordBase
from delible.system.asks import (
    Decoding,
    Generate,
    NoAnswer,
    Prompt,
    Score,
)
from delible.system.base import System
from delible.system.questions import LETTERS

if TYPE_CHECKING:
    from delible.measure.cache import Cache

logger = logging.getLogger(__name__)

#: How a choice is asked: its letters are compared, or its options' texts.
Form = Literal["letter", "cloze"]
EXTRA = "utility"
#: Length of a piece of a long text without a tokenizer, in characters.
PIECE = 2000
#: What the harness generates at most where a task does not say.
DEFAULT_NEW_TOKENS = 256


def required(part: str = "lm_eval") -> Any:
    """The harness, or a module of it.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        return importlib.import_module(part)
    except ImportError:
        raise MissingExtraError("Measuring with lm-evaluation-harness", EXTRA) from None


# ---- our records as tasks of the harness


def _mean(metric: str, **more: Any) -> dict[str, Any]:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True, **more}


def _choice_row(record: Choice, form: Form, head: str) -> dict[str, Any]:
    if form == "cloze":
        prompt, options = f"{head}{record.question}\nAnswer:", list(record.options)
    else:
        letters = LETTERS[: len(record.options)]
        lines = [f"{one}. {text}" for one, text in zip(letters, record.options, strict=True)]
        prompt = "\n".join([f"{head}{record.question}", *lines, "Answer:"])
        options = list(letters)
    return {"prompt": prompt, "choices": options, "correct": record.correct}


def _qa_row(record: QA, head: str) -> dict[str, Any]:
    return {
        "prompt": f"{head}Question: {record.question}\nAnswer:",
        "answers": [record.answer, *record.aliases],
    }


_EXACT = _mean("exact_match", ignore_case=True, ignore_punctuation=True)
#: Kind of record -> what its task says, besides names and files.
_TASKS: dict[str, dict[str, Any]] = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "choices",
        "doc_to_target": "correct",
        "metric_list": [_mean("acc"), _mean("acc_norm")],
    },
    "qa": {
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "answers",
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 64},
        "metric_list": [_EXACT],
    },
    "passage": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [
            {"metric": name, "aggregation": how, "higher_is_better": False}
            for name, how in (
                ("word_perplexity", "weighted_perplexity"),
                ("bits_per_byte", "bits_per_byte"),
            )
        ],
    },
}


def export_tasks(
    folder: Path | str,
    splits: Mapping[str, Sequence[RecordBase]],
    *,
    form: Form = "letter",
    description: str = "",
) -> list[str]:
    """Writes records as tasks of the harness: one YAML and one JSONL file per task.

    Choices are compared by likelihood (acc, acc_norm), questions answered and compared with every
    right answer (exact_match without case and punctuation), passages scored (word_perplexity,
    bits_per_byte). A split with several kinds of records becomes several tasks. The YAML names
    its JSONL by absolute path, as the harness wants it: export again after moving the folder.

    Args:
        folder: For ``lm_eval --include_path FOLDER --tasks NAME``.
        splits: Records by the name of the task.
        form: How choices are asked.
        description: A first line before every choice or question.

    Returns:
        Names of the tasks.

    Raises:
        DataError: A dialogue, which the harness cannot ask, or a split without records.
    """
    folder = Path(folder).resolve()
    head = f"{description}\n\n" if description else ""
    names: list[str] = []
    for split, records in splits.items():
        rows: dict[str, list[dict[str, Any]]] = {}
        for record in records:
            if isinstance(record, Choice):
                rows.setdefault("choice", []).append(_choice_row(record, form, head))
            elif isinstance(record, QA):
                rows.setdefault("qa", []).append(_qa_row(record, head))
            elif isinstance(record, Passage):
                rows.setdefault("passage", []).append({"text": record.text})
            else:
                raise DataError(
                    f"a {type(record).__name__} cannot be a task of the harness.",
                    where=split,
                    hint="Export questions (QA), choices and passages.",
                )
        if not rows:
            raise DataError("there are no records to export.", where=split)
        for kind, documents in rows.items():
            name = split if len(rows) == 1 else f"{split}_{kind}"
            names.append(name)
            _write_task(folder, name, _TASKS[kind], documents)
    return names


def _write_task(
    folder: Path, name: str, task: Mapping[str, Any], documents: Sequence[Mapping[str, Any]]
) -> None:
    path = folder / f"{name}.jsonl"
    with atomic_file(path) as handle:
        handle.writelines(f"{json.dumps(row, ensure_ascii=False)}\n" for row in documents)
    described = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        **task,
        "metadata": {"version": 1.0},
    }
    with atomic_file(folder / f"{name}.yaml") as handle:
        yaml.safe_dump(described, handle, sort_keys=False, allow_unicode=True)


# ---- results of the harness as our values


def read_results(source: Path | str | Mapping[str, Any]) -> SystemValues:
    """What the harness measured, as values of a system.

    Args:
        source: A results file of the harness, the folder that holds one (the newest is read), or
            what ``simple_evaluate`` returns. Values of single documents are in ``samples``, or in
            the files ``samples_TASK_….jsonl`` beside.

    Returns:
        ``means[metric][task]`` of tasks and groups, ``items[metric][task]`` where there are
        samples. A metric behind a filter is called ``"metric (filter)"``.

    Raises:
        DataError: It is no result of the harness.
    """
    path = None if isinstance(source, Mapping) else _results_file(Path(source))
    content = source if isinstance(source, Mapping) else read_json(path)  # type: ignore[arg-type]
    results = content.get("results") if isinstance(content, Mapping) else None
    if not isinstance(results, Mapping):
        raise DataError(
            "is no result of lm-evaluation-harness: it has no 'results'.",
            where=str(path or "results"),
            hint="It writes one with --output_path.",
        )
    means: dict[str, dict[str, float | None]] = {}
    for task, numbers in results.items():
        for key, mean in numbers.items():
            metric, _, kept = key.partition(",")
            if not kept or metric.endswith("_stderr") or not _is_number(mean):
                continue  # the task's names, sizes and standard errors
            means.setdefault(_label(metric, kept), {})[str(task)] = float(mean)
    items: dict[str, dict[str, list[Item]]] = {}
    for task, samples in _samples(content, path).items():
        for sample in sorted(samples, key=lambda one: int(one["doc_id"])):
            for metric in sample.get("metrics", ()):
                value: Any = sample.get(metric)
                if _is_number(value):  # others (perplexities) exist for all documents only
                    label = _label(metric, str(sample.get("filter", "none")))
                    items.setdefault(label, {}).setdefault(task, []).append(Item(float(value)))
    sizes = content.get("n-samples", {})
    return SystemValues(
        system=str(content.get("model_name") or content.get("model_source") or "model"),
        items=items,
        means=means,
        measured={str(task): int(count["effective"]) for task, count in sizes.items()},
    )


def standard_errors(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The harness's standard errors: ``[metric][task]``, where it has one."""
    found: dict[str, dict[str, float]] = {}
    for task, numbers in results["results"].items():
        for key, value in numbers.items():
            metric, _, kept = key.partition(",")
            if metric.endswith("_stderr") and _is_number(value):
                label = _label(metric.removesuffix("_stderr"), kept)
                found.setdefault(label, {})[task] = float(value)
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (
        hasattr(value, "dtype") and getattr(value, "shape", None) == ()
    )


def _label(metric: str, kept: str) -> str:
    return metric if kept in ("", "none") else f"{metric} ({kept})"


def _results_file(path: Path) -> Path:
    if path.is_file():
        return path
    found = sorted(path.rglob("results*.json"), key=lambda one: one.name)
    if not found:
        raise DataError(
            "holds no results of lm-evaluation-harness (results….json).",
            where=str(path),
            hint="It writes them with --output_path.",
        )
    return found[-1]


def _samples(content: Mapping[str, Any], path: Path | None) -> dict[str, list[dict[str, Any]]]:
    """Documents with their values, by task."""
    if "samples" in content or path is None:
        return dict(content.get("samples", {}))
    stamp = path.stem.removeprefix("results").lstrip("_")
    found: dict[str, list[dict[str, Any]]] = {}
    for task in content["results"]:
        beside = path.parent / f"samples_{task}{f'_{stamp}' if stamp else ''}.jsonl"
        if beside.is_file():
            lines = beside.read_text(encoding="utf-8").split("\n")
            found[task] = [json.loads(line) for line in lines if line.strip()]
    return found


# ---- our systems as models of the harness


def harness_model(
    system: System,
    *,
    cache: Cache | None = None,
    progress: Progress | None = None,
) -> Any:
    """A system as a model of the harness; prompts are plain text, as its leaderboards have them.

    Texts go through :mod:`delible.measure`: equal ones are asked once, answers are cached.

    Raises:
        MissingExtraError: The harness is not installed.
    """
    base = required("lm_eval.api.model").LM
    unanswered: list[str] = []

    def answered(requests: Sequence[Any]) -> list[Any]:
        answers = measure(system, requests, cache=cache, progress=progress)
        return [answers[request] for request in requests]

    def scores(requests: Sequence[Score]) -> list[tuple[float, bool]]:
        if "score" not in system.capabilities:
            raise RunError(
                f"'{system.name}' gives no scores, and this task compares likelihoods.",
                where="lm-evaluation-harness",
                hint="Choose tasks that generate, such as gsm8k.",
            )
        found: list[tuple[float, bool]] = []
        for answer in answered(requests):
            if isinstance(answer, NoAnswer):
                unanswered.append(answer.reason)
                found.append((float("-inf"), False))
            else:
                found.append((float(answer.logprobs.sum()), bool(answer.hits.all())))
        return found

    class Bridge(base):  # type: ignore[misc, valid-type]
        """The system behind the harness's interface."""

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            return scores([_score(*one.args) for one in requests])

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            parts = [text_in_pieces(system, one.args[0]) for one in requests]
            found = iter(scores([one for part in parts for one in part]))
            return [sum(next(found)[0] for _ in part) for part in parts]

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            asked = [Generate(Prompt(text=one.args[0]), _decoding(one.args[1])) for one in requests]
            return [str(answer) for answer in answered(asked)]

    bridge = Bridge()
    bridge.unanswered = unanswered
    return bridge


def _score(context: str, continuation: str) -> Score:
    """White space between the two belongs to the continuation, as tokenizers split words."""
    bare = context.rstrip()
    return Score(Prompt(text=bare), context[len(bare) :] + continuation)


def _decoding(options: Mapping[str, Any]) -> Decoding:
    until = options.get("until") or ()
    temperature = float(options.get("temperature") or 0.0)
    return Decoding(
        int(options.get("max_gen_toks") or options.get("max_new_tokens") or DEFAULT_NEW_TOKENS),
        stop=(until,) if isinstance(until, str) else tuple(until),
        temperature=temperature if options.get("do_sample") else 0.0,
        top_p=float(options.get("top_p", 1.0)),
    )


def text_in_pieces(system: System, text: str) -> list[Score]:
    """A text as scores that together are its likelihood, each within the model's context.

    A piece is half a context long and is scored after the piece before it.
    """
    tokenizer, template = getattr(system, "tokenizer", None), getattr(system, "template", None)
    if tokenizer is None or template is None:
        cuts = list(range(PIECE, len(text), PIECE))
    else:
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        half = max(1, template.max_length // 2 - 2)
        starts = [start for start, _ in found["offset_mapping"]]
        # a character of several tokens is not cut
        cuts = sorted({place for place in starts[half::half] if place})
    edges = [0, *cuts, len(text)]
    pieces = [text[start:end] for start, end in pairwise(edges) if end > start]
    return [
        Score(Prompt(text=before), piece)
        for before, piece in zip(("", *pieces), pieces, strict=False)
    ]


# ---- running it


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


__all__ = [
    "export_tasks", "harness_model", "read_results", "required", "run_harness", "standard_errors",
    "text_in_pieces",
]  # fmt: skip
