"""The known forms of a row, as a table: which columns make which record.

A row takes the first form whose required columns it has; nothing is guessed from values.
Sources of the foreign forms: TOFU (arXiv 2401.06121), MUSE (2407.06460), RWKU (2406.10890),
WMDP (2403.03218), and the general sets MMLU, ARC, CommonsenseQA, TriviaQA, TruthfulQA, GSM8K;
and ShareGPT's conversations.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from delible.loaders.formats import describe
from delible.records import QA, Choice, Dialogue, Passage, RecordBase

#: Columns whose cell in a text-only format (CSV) holds JSON when it opens a list or object.
JSON_COLUMNS = frozenset({
    "aliases", "paraphrases", "paraphrased_answers", "perturbed", "perturbed_answer",
    "options", "choices", "messages", "conversations", "answers", "mc1_targets", "images",
})  # fmt: skip


class FormError(Exception):
    """A value that a form cannot use: what is wrong, and what to do."""

    def __init__(self, problem: str, hint: str | None = None) -> None:
        super().__init__(problem)
        self.problem, self.hint = problem, hint


#: Turns the values (by field) of one row into a record's fields. The flag says whether every
#: value is text because the format knows nothing else.
Prepare = Callable[[dict[str, Any], bool], dict[str, Any]]


@dataclass(frozen=True)
class Form:
    """One known form.

    Attributes:
        title: For messages.
        model: The record that comes of it.
        required: Field -> column that a row must have.
        optional: (field, column) pairs that are taken if present; several columns of one
            field are joined to one list.
        prepare: What remains to be done with the values.
    """

    title: str
    model: type[RecordBase]
    required: Mapping[str, str]
    optional: tuple[tuple[str, str], ...] = ()
    prepare: Prepare | None = None


def fold(text: str) -> str:
    """A text without differences of white space and case."""
    return " ".join(text.split()).casefold()


def find_option(answer: Any, options: list[str], *, is_text: bool = False) -> int:
    """The index of the right option, from an index (counted from 0), a letter or its text.

    An integer is an index. A text is the text of an option, else a letter, else an index in
    digits. Where a text can be read in two ways that disagree, nothing is guessed.

    Args:
        is_text: The format has no integers, so that digits may be an index *or* a text.

    Raises:
        FormError: No option fits, or two do.
    """
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    if isinstance(answer, int) and not isinstance(answer, bool):
        return answer
    if answer is None or (isinstance(answer, str) and not answer.strip()):
        raise FormError("the answer is empty.")
    if not isinstance(answer, str):
        raise FormError(f"the answer must be an index, a letter or a text, not {describe(answer)}.")
    answer = answer.strip()
    by_text = [i for i, option in enumerate(options) if option.strip() == answer]
    by_text = by_text or [i for i, option in enumerate(options) if fold(option) == fold(answer)]
    found = set(by_text[:1])
    if answer.upper() in string.ascii_uppercase and len(answer) == 1:
        found |= {string.ascii_uppercase.index(answer.upper())} & set(range(len(options)))
    if re.fullmatch(r"[0-9]{1,9}", answer) and (is_text or not by_text):
        found |= {int(answer)} if not by_text else {int(answer)} & set(range(len(options)))
    if not found:
        raise FormError(
            f"the answer is none of the {len(options)} options.",
            "Give its index (counted from 0), its letter or its exact text.",
        )
    if len(found) > 1:
        raise FormError(
            f"the answer '{answer}' can be read as option {' or '.join(map(str, sorted(found)))} "
            "(counted from 0).",
            "Give the row as type 'choice' with the index in 'correct'.",
        )
    return found.pop()


def _texts(values: Any, what: str) -> list[str]:
    if not isinstance(values, list | tuple) or not all(isinstance(v, str) for v in values):
        raise FormError(f"the {what} must be a list of texts.")
    return list(values)


def _choice(values: dict[str, Any], is_text: bool) -> dict[str, Any]:
    options = _texts(values.get("options"), "options")
    correct = find_option(values["correct"], options, is_text=is_text)
    return {**values, "options": options, "correct": correct}


def _numbered_options(values: dict[str, Any], is_text: bool) -> dict[str, Any]:
    options = [values.pop(f"option{i}") for i in range(1, 5)]
    return _choice({**values, "options": options}, is_text)


def _labelled(values: dict[str, Any], is_text: bool) -> dict[str, Any]:
    """Choices with labels: ``[{label, text}]``, or ``{label: […], text: […]}`` as on the hub."""
    if isinstance(question := values["question"], Mapping):
        stem, choices = question.get("stem"), question.get("choices")
        values = {**values, "question": stem, "options": choices}
    choices = values.get("options")
    if isinstance(choices, Mapping):
        labels, options = choices.get("label"), choices.get("text")
    elif isinstance(choices, list) and all(isinstance(choice, Mapping) for choice in choices):
        labels = [choice.get("label") for choice in choices]
        options = [choice.get("text") for choice in choices]
    else:
        return _choice(values, is_text)
    labels, options = _texts(labels, "labels"), _texts(options, "options")
    if (key := values["correct"]) not in labels:
        raise FormError(f"the answer {key!r} is none of the labels {', '.join(labels)}.")
    return {**values, "options": options, "correct": labels.index(key)}


def _mc1_targets(values: dict[str, Any], is_text: bool) -> dict[str, Any]:
    """TruthfulQA: ``{option: 1 or 0}``, or ``{choices: […], labels: […]}``; one option is 1."""
    targets = values.pop("targets")
    if not isinstance(targets, Mapping):
        raise FormError(f"'mc1_targets' must be an object, not {describe(targets)}.")
    if set(targets) == {"choices", "labels"}:
        options, labels = _texts(targets["choices"], "options"), targets["labels"]
    else:
        options, labels = list(targets), list(targets.values())
    if not isinstance(labels, list) or len(labels) != len(options) or labels.count(1) != 1:
        raise FormError("'mc1_targets' must mark exactly one option with 1.")
    return {**values, "options": options, "correct": labels.index(1)}


def _answers(values: dict[str, Any], is_text: bool) -> dict[str, Any]:
    answers = values.pop("answers")
    if not isinstance(answers, list | tuple) or not answers:
        raise FormError("'answers' must be a list with at least one text.")
    # Sources repeat answers; a repeated alias says nothing.
    first, *others = dict.fromkeys(_texts(answers, "answers"))
    return {**values, "answer": first, "aliases": others}


def _truthful(values: dict[str, Any], is_text: bool) -> dict[str, Any]:
    for field in ("aliases", "perturbed"):
        if isinstance(joined := values.get(field), str):
            parts = dict.fromkeys(part.strip() for part in joined.split(";"))
            values[field] = [part for part in parts if part and part != values["answer"]]
    return values


def _instruction(values: dict[str, Any], is_text: bool) -> dict[str, Any]:
    question, extra = values["question"], values.pop("input", None)
    if isinstance(question, str) and isinstance(extra, str) and extra.strip():
        values["question"] = f"{question}\n\n{extra}"
    return values


_ABOUT = (("subject", "subject"), ("group", "group"), ("client", "client"))
_SHOWN = (("images", "images"),)
_QA = (
    *_ABOUT,
    *_SHOWN,
    ("aliases", "aliases"),
    ("paraphrases", "paraphrases"),
    ("paraphrases", "paraphrased_question"),
    ("paraphrased_answers", "paraphrased_answers"),
    ("paraphrased_answers", "paraphrased_answer"),
    ("perturbed", "perturbed"),
    ("perturbed", "perturbed_answer"),
)
_TASK = (*_ABOUT, *_SHOWN, ("group", "task"))


def _choice_form(options: str, correct: str) -> Form:
    required = {"question": "question", "options": options, "correct": correct}
    return Form(f"multiple choice ({options}, {correct})", Choice, required, _TASK, _choice)


def _pair_form(title: str, question: str, answer: str, *optional: tuple[str, str]) -> Form:
    return Form(title, QA, {"question": question, "answer": answer}, (*_QA, *optional))


#: Most particular first.
FORMS: tuple[Form, ...] = (
    Form(
        "labelled choices (ARC, CommonsenseQA on the hub)",
        Choice,
        {"question": "question", "options": "choices", "correct": "answerKey"},
        _TASK,
        _labelled,
    ),
    Form(
        "CommonsenseQA (a question object)",
        Choice,
        {"question": "question", "correct": "answerKey"},
        _TASK,
        _labelled,
    ),
    _choice_form("options", "correct"),
    _choice_form("choices", "answer"),
    _choice_form("choices", "correct"),
    _choice_form("options", "answer"),
    Form(
        "TOFU options",
        Choice,
        {
            "question": "question",
            **{f"option{i}": f"option{i}" for i in range(1, 5)},
            "correct": "answer",
        },
        _ABOUT,
        _numbered_options,
    ),
    Form(
        "TruthfulQA multiple choice",
        Choice,
        {"question": "question", "targets": "mc1_targets"},
        _ABOUT,
        _mc1_targets,
    ),
    Form(
        "TruthfulQA",
        QA,
        {"question": "Question", "answer": "Best Answer", "perturbed": "Incorrect Answers"},
        (("aliases", "Correct Answers"), ("group", "Category")),
        _truthful,
    ),
    Form(
        "RWKU neighbour",
        QA,
        {"question": "query", "answer": "answer", "subject": "neighbor"},
        (("group", "type"),),
    ),
    _pair_form("RWKU", "query", "answer", ("group", "type")),
    _pair_form(
        "question and answer (also TOFU, MUSE, GSM8K)", "question", "answer", ("group", "task")
    ),
    Form("TriviaQA", QA, {"question": "question", "answers": "answers"}, _ABOUT, _answers),
    _pair_form("prompt and completion", "prompt", "completion"),
    _pair_form("prompt and response", "prompt", "response"),
    Form(
        "instruction and output",
        QA,
        {"question": "instruction", "answer": "output"},
        (*_ABOUT, *_SHOWN, ("input", "input")),
        _instruction,
    ),
    Form("dialogue", Dialogue, {"messages": "messages"}, _ABOUT),
    Form("ShareGPT", Dialogue, {"messages": "conversations"}, _ABOUT),
    Form("RWKU target", Passage, {"subject": "target", "text": "intro"}),
    Form("passage", Passage, {"text": "text"}, _ABOUT),
)
