"""Our records as tasks of lm-evaluation-harness."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from delible.errors import DataError
from delible.files import atomic_file
from delible.records import QA, Choice, Passage, RecordBase
from delible.system.questions import LETTERS

if TYPE_CHECKING:
    pass


#: How a choice is asked: its letters are compared, or its options' texts.
Form = Literal["letter", "cloze"]


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
