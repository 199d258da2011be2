"""ORT: the facts of RWKU in other forms than the trained one.

Forgetting that depends on the form shows when the same facts are asked as a blank to fill, an
open question, a choice, a statement (true or false) and an answer that is spelled. Targets,
corpora and utility sets are those of the benchmark ``rwku``.

Paper: ORT (arXiv 2506.07795). Reference code: Acruxos/ORT.
Deviations: the released data lies on file-sharing sites only and its choices were written by a
language model, so the forms are made here, by rules, from RWKU's own probes: wrong options are
answers to other probes of the same target and neighbours, of the same kind (date, number, name,
other words) where there are enough. Statements are half true and half false (there: all true,
and dropped); they are not in the mean over forms. Values are probabilities; the paper's change
relative to the model before is read against the row of the original.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from random import Random
from typing import TYPE_CHECKING, cast

from pydantic import Field

from delible.component import build
from delible.errors import DataError
from delible.measure.benchmark import (
    Axis,
    Benchmark,
    Better,
    Column,
    Data,
    Task,
)
from delible.measure.evaluate import Ask
from delible.records import QA, Choice, ForgetRequest, RecordBase
from delible.registry import register

if TYPE_CHECKING:
    from delible.lm.lm import LM

SIDES = ("forget", "neighbour")
FORMS = ("blank", "question", "choice", "spelled")
#: Options of a choice, the right one included.
OPTIONS = 4
UTILITY = ("general", "truthfulness", "factuality", "fluency")
_BLANK = re.compile(r"_{2,}")
_MONTH = re.compile(
    r"\b(?:january|february|march|april|may|june|july|august|september|october|november|december)\b"
)


@lru_cache(maxsize=4096)  # every probe of a target looks at the answers of all others
def answer_kind(answer: str) -> str:
    """Date, number, name or words: what wrong options should have in common with it."""
    if re.search(r"\b[12]\d{3}\b", answer) or (
        _MONTH.search(answer.lower()) and re.search(r"\d", answer)
    ):
        return "date"
    if re.search(r"\d", answer):
        return "number"
    return "name" if answer[:1].isupper() else "words"


@lru_cache(maxsize=4096)
def plain(text: str) -> str:
    """Letters and digits in lower case, one space between words."""
    return " ".join(re.findall(r"\w+", text.lower()))


def wrong_options(
    record: QA, probes: Sequence[Sequence[QA]], count: int, draw: Random
) -> tuple[str, ...]:
    """Answers of other probes that are wrong here and alike in kind.

    Args:
        record: The probe.
        probes: Where options come from, the best source first (its own side, then the other).
        count: Options wanted.

    Raises:
        DataError: There are fewer other answers.
    """
    right, asked = f" {plain(record.answer)} ", f" {plain(record.question)} "
    tiers: dict[tuple[bool, int], dict[str, str]] = {}
    for place, source in enumerate(probes):
        for other in source:
            text = f" {plain(other.answer)} "
            # neither the answer with more or fewer words, nor what the question itself says
            if not text.strip() or text in right or right in text or text in asked:
                continue
            unlike = answer_kind(other.answer) != answer_kind(record.answer)
            tiers.setdefault((unlike, place), {}).setdefault(text, other.answer)
    found: dict[str, str] = {}
    for _, tier in sorted(tiers.items()):
        names = sorted(tier)
        draw.shuffle(names)
        found |= {name: tier[name] for name in names if name not in found}
    if len(found) < count:
        raise DataError(
            f"there are {len(found)} wrong answers for the choice '{record.question}'.",
            where=f"ort/{record.neighbour_of or record.subject}",
            hint=f"A target needs probes with at least {count} other answers.",
        )
    return tuple(found.values())[:count]


def as_choice(record: QA, wrong: Sequence[str], draw: Random) -> Choice:
    """The probe with its answer among wrong ones, at a random place."""
    options = list(wrong)
    correct = draw.randrange(len(options) + 1)
    options.insert(correct, record.answer)
    return Choice(
        question=record.question,
        options=tuple(options),
        correct=correct,
        subject=record.subject,
        neighbour_of=record.neighbour_of,
        group="choice",
    )


def as_statement(record: QA, wrong: str | None) -> QA:
    """The sentence with its blank filled, rightly or with a wrong answer; true or false?"""
    right = "True" if wrong is None else "False"
    said = wrong or record.answer
    return record.model_copy(
        update={
            "question": _BLANK.sub(lambda _: said, record.question),
            "answer": right,
            "perturbed": ("False" if right == "True" else "True",),
            "group": "statement",
        }
    )


def in_all_forms(
    blanks: Sequence[QA], questions: Sequence[QA], others: Sequence[QA], seed: int
) -> dict[str, tuple[RecordBase, ...]]:
    """The probes of one side in every form; the same seed gives the same ones.

    Args:
        blanks: Sentences with a blank; choices and statements are made of them.
        questions: Open questions.
        others: Probes of the other side, whose answers can be wrong options too.
        seed: Of the options, their places, and which statements are true.
    """
    sources = ((*blanks, *questions), others)
    # every probe draws for itself, so that the order of the probes does not matter
    draws = [Random(f"{seed}/{one.neighbour_of or one.subject}/{one.question}") for one in blanks]
    wrong = [
        wrong_options(one, sources, OPTIONS - 1, draw)
        for one, draw in zip(blanks, draws, strict=True)
    ]
    filled = [place for place, one in enumerate(blanks) if _BLANK.search(one.question)]
    return {
        "blank": tuple(blanks),
        "question": tuple(questions),
        "choice": tuple(
            as_choice(one, options, draw)
            for one, options, draw in zip(blanks, wrong, draws, strict=True)
        ),
        "spelled": tuple(
            one.model_copy(update={"group": "spelled"}) for one in (*blanks, *questions)
        ),
        "statement": tuple(
            as_statement(blanks[place], wrong[place][0] if (number + seed) % 2 else None)
            for number, place in enumerate(filled)
        ),
    }


@register(
    kind="benchmark",
    name="ort",
    title="ORT",
    summary="Forget famous people in every form that their facts can be asked in.",
    paper="2506.07795",
    year=2025,
    family="real",
    needs=("names",),
    capability="score",
    misleads="A method that redirects a name to another one scores well and states falsehoods. "
    "Forms have levels of their own: compare each with the original's row. Choices are made by "
    "rules, so some wrong options are easy to tell.",
    variant="Choices, statements and spelled answers are made from RWKU's probes by rules.",
    badges=("variant",),
)
class ORT(Benchmark):
    """One task per target, as in RWKU; the same facts in five forms, for targets and neighbours.

    Columns are 100 times the value.
    """

    targets: tuple[str, ...] = Field(
        (), description="Names such as 'Stephen King'; none: the first 100, as in the paper."
    )
    limit: int | None = Field(
        None, ge=1, description="Measure at most this many rows of each split and target."
    )
    utility: bool = Field(True, description="Also measure four utility sets.")
    forms_seed: int = Field(0, ge=0, description="Seed of the options and statements.")
    passages: int = Field(
        16, ge=1, description="Biographies per target; the paper has hundreds, small machines few."
    )
    passage_tokens: int = Field(512, ge=8, description="Length of a biography the model writes.")

    def _rwku(self) -> Benchmark:
        options = {
            name: getattr(self, name)
            for name in ("targets", "utility", "passages", "passage_tokens")
        }
        return cast(Benchmark, build("benchmark", {"name": "rwku", **options}))

    def tasks(self, data: Data) -> list[Task]:
        return [self._in_forms(task) for task in self._rwku().tasks(data)]

    def _in_forms(self, task: Task) -> Task:
        probes = {
            side: tuple(
                cast("Sequence[QA]", task.splits.get(f"{side}_{form}", ()))
                for form in ("blank", "question")
            )
            for side in SIDES
        }
        splits: dict[str, Sequence[RecordBase]] = {
            name: task.splits[name] for name in ("forget", *UTILITY) if name in task.splits
        }
        for side, other in zip(SIDES, reversed(SIDES), strict=True):
            blanks, questions = probes[side]
            others = [record for row in probes[other] for record in row]
            made = in_all_forms(blanks, questions, others, self.forms_seed)
            splits |= {f"{side}_{form}": rows for form, rows in made.items() if rows}
        return replace(task, splits={name: rows[: self.limit] for name, rows in splits.items()})

    def corpus(self, lm: LM, task: Task, data: Data) -> ForgetRequest:
        """As in RWKU: the model before unlearning writes about each target itself."""
        return self._rwku().corpus(lm, task, data)

    def asks(self) -> list[Ask]:
        forms = tuple(f"{side}_{form}" for side in SIDES for form in (*FORMS, "statement"))
        offered = tuple(f"{side}_{form}" for side in SIDES for form in ("choice", "statement"))
        utility = [
            ask for ask in self._rwku().asks() if ask.splits and set(ask.splits) <= set(UTILITY)
        ]
        return [
            Ask(build("metric", "form_probability"), forms),
            Ask(build("metric", {"name": "form_probability", "share": True}), offered, "share"),
            Ask(build("metric", "form_means")),
            *utility,
        ]

    def columns(self) -> list[Column]:
        sides: tuple[tuple[str, Better, Axis], ...] = (
            ("forget", "lower", "forget"),
            ("neighbour", "higher", "utility"),
        )
        found = []
        for side, better, axis in sides:
            mean, statement = f"form_means/{side}", f"share/{side}_statement"
            found += [
                Column(f"{side} mean", mean, better, axis, percent=True),
                *(
                    Column(
                        f"{side} {form}", f"form_probability/{side}_{form}", better, percent=True
                    )
                    for form in FORMS
                ),
                Column(f"{side} statement", statement, better, percent=True),
            ]
        found.append(Column("forget highest", "form_means/forget_highest", "lower", percent=True))
        kept = {f"{ask.name}/{split}" for ask in self.asks() for split in ask.splits or ()}
        return [*found, *(column for column in self._rwku().columns() if column.key in kept)]
