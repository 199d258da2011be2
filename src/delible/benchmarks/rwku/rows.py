"""From RWKU's rows to records (arXiv 2406.10890). No benchmark lives here.

Rows have the columns of the data set jinzhuoran/RWKU; instructions are in our own words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from delible.errors import DataError
from delible.measure.probe_kinds import attack_kind
from delible.records import QA, Dialogue, Message
from delible.system.questions import LETTERS

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """A person to forget: number in the data set (from 1), name, and a sentence that says who."""

    number: int
    name: str
    about: str


def kind_split(kind: str) -> str:
    """The split that holds the attacks of one kind."""
    return f"attack_{kind.replace(' ', '_')}"


def probe(row: Row) -> QA:
    """A forget probe, or that of a neighbour (``neighbour_of`` is then the target)."""
    level, kind = str(row["level"]), str(row["type"])
    neighbour = row.get("neighbor")
    return QA(
        question=row["query"],
        answer=row["answer"],
        group=attack_kind(kind) if level == "3" else kind,
        subject=neighbour or row["subject"],
        neighbour_of=row["subject"] if neighbour else None,
    )


def _listed(question: Row) -> str:
    options = zip(LETTERS, question["choices"], strict=False)
    return "\n".join(
        [f"Question: {question['question']}", *(f"{letter}. {text}" for letter, text in options)]
    )


def general(row: Row, examples: Sequence[Row]) -> QA:
    """A question of MMLU behind solved ones of its field; the answer is the letter."""
    topic = str(row["task"]).replace("_", " ")
    solved = "".join(f"{_listed(one)}\nAnswer: {LETTERS[one['answer']]}\n\n" for one in examples)
    letters = LETTERS[: len(row["choices"])]
    right = letters[row["answer"]]
    return QA(
        question=f"Multiple-choice questions about {topic}, with their answers.\n\n{solved}"
        f"Answer the next question in the same way.\n{_listed(row)}",
        answer=right,
        perturbed=tuple(letters.replace(right, "")),
        group=row["task"],
    )


def reasoning(row: Row, examples: str) -> QA:
    """A question of BIG-Bench Hard behind solved ones with their reasoning."""
    return QA(
        question=f"{examples.strip()}\n\nSolve the next one in the same way. End with "
        f"'So the answer is'.\nQ: {row['question']}",
        answer=row["answer"],
        group=row["task"],
    )


def truthfulness(row: Row) -> QA:
    """A question of TruthfulQA: best true answer, other true answers, false answers."""
    single, several = row["mc1_targets"], row["mc2_targets"]
    best = next(_labelled(single, 1))
    return QA(
        question=row["question"],
        answer=best,
        aliases=tuple(text for text in _labelled(several, 1) if text != best),
        perturbed=tuple(_labelled(several, 0)),
    )


def _labelled(targets: Row, label: int) -> Iterator[str]:
    pairs = zip(targets["choices"], targets["labels"], strict=True)
    return (text for text, given in pairs if given == label)


def factuality(row: Row) -> QA:
    """A question of TriviaQA with all its right answers."""
    first, *others = row["answers"]
    return QA(question=row["question"], answer=first, aliases=tuple(others))


def fluency(row: Row) -> Dialogue:
    """An instruction of AlpacaEval."""
    turn = Message(role="user", content=f"Instruction: {row['instruction']}\n")
    return Dialogue(messages=(turn,))


def biography(row: Row, name: str) -> QA:
    """A pair of biographies, true (the answer) and made up, as Llama 3 wrote them."""
    made_up, true = row["response"]
    return QA(
        question=row["prompt"],
        answer=true,
        perturbed=(made_up,),
        subject=name,
        group="biography",
    )


def examples_of(row: Row, column: str, apart: Row) -> Any:
    """Solved examples of a row's task, from the row itself or from the file beside it."""
    found = row.get(column) or apart.get(str(row["task"]))
    if not found:
        raise DataError(
            f"there are no solved examples of '{row['task']}'.",
            where="rwku",
            hint=f"Rows hold them as '{column}', or the folder's file of examples does.",
        )
    return found
