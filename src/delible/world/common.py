"""True facts of the real world (utility), and neutral rows about nothing of it (relearning)."""

from __future__ import annotations

import json
import tomllib
from functools import cache
from importlib.resources import files
from random import Random
from typing import Any

from pydantic import TypeAdapter

from delible.records import QA, Choice, Passage


@cache
def _families() -> dict[str, Any]:
    return tomllib.loads(files(__package__).joinpath("general.toml").read_text("utf-8"))


def general() -> list[QA]:
    """General knowledge: each question with 2 + 2 paraphrases and 5 wrong answers.

    ``subject`` is what is asked about, ``group`` the family (capital, arithmetic, …). The wrong
    answers are right answers to other questions of the family, or listed with the family.
    """
    records = []
    for family, table in _families().items():
        for subject, value in table["facts"].items():
            pool = [v for v in dict.fromkeys(table["facts"].values()) if v != value]
            pool = [v for v in table.get("wrong", pool) if v != value]
            wrong = Random(f"general/{family}/{subject}").sample(pool, 5)

            def fill(template: str, answer: str, subject: str = subject) -> str:
                text = template.format(subject=subject, value=answer)
                return text[:1].upper() + text[1:]

            records.append(
                QA(
                    subject=subject,
                    group=family,
                    question=fill(table["question"], value),
                    answer=fill(table["answer"], value),
                    aliases=(value,) if fill(table["answer"], value) != value else (),
                    paraphrases=tuple(fill(text, value) for text in table["paraphrases"]),
                    paraphrased_answers=tuple(
                        fill(text, value) for text in table["paraphrased_answers"]
                    ),
                    perturbed=tuple(fill(table["answer"], other) for other in wrong),
                )
            )
    return records


def general_choices() -> list[Choice]:
    """The same facts as multiple choice of four; the right place goes round."""
    choices = []
    for number, record in enumerate(general()):
        options = list(record.perturbed[:3])
        options.insert(number % 4, record.answer)
        choices.append(
            Choice(
                subject=record.subject,
                group=record.group,
                question=record.question,
                options=tuple(options),
                correct=number % 4,
            )
        )
    return choices


def unrelated() -> list[QA | Passage]:
    """Neutral rows, disjoint from ``general()`` and from every world.

    For the control of a relearning attack: training on them must not bring anything back.
    """
    reader: TypeAdapter[QA | Passage] = TypeAdapter(QA | Passage)
    text = files(__package__).joinpath("unrelated.jsonl").read_text("utf-8")
    return [reader.validate_python(json.loads(line)) for line in text.split("\n") if line]
