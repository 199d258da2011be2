"""What a system says it knows: names that are asked for, with and without a forced beginning, and
facts that are asked for with nothing, with what belongs to them, or with themselves before them.

    denial     share of questions by name whose answer says that it is not known
    names it   share of descriptions whose answer has the name, between word boundaries
    use        share of questions answered rightly at a hint level
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from delible.component import build
from delible.errors import DelibleError
from delible.generation.ignorance import denies, questions_about
from delible.measure.attack import AttackContext, ConversationAttack
from delible.measure.scoring.text import gold_answers, rouge_l_recall
from delible.names import Names
from delible.prompts import read_named
from delible.records import QA
from delible.system.asks import Decoding, NoAnswer, Prompt
from delible.system.base import System
from delible.system.questions import ask
from delible.world import filters

#: What stands before a fact's question, by hint level: nothing, other facts of its subject, itself.
PASSAGES: Mapping[int, Mapping[str, object] | None] = {
    0: None,
    1: {"name": "in_context", "passages": "icl", "count": 2},
    2: {"name": "in_context", "passages": "doc", "count": 1},
}


def share(values: Sequence[bool | None]) -> float | None:
    """Share of those that are true, [0, 1], among those that are known."""
    known = [one for one in values if one is not None]
    return sum(known) / len(known) if known else None


def asked_by_name(name: str, prefix: str = "") -> list[Prompt]:
    """Questions that name it; with a beginning that the answer is forced to have."""
    texts = questions_about(name, methods=True)
    return [Prompt.ask(one, prefill=prefix) for one in texts]


def denial(system: System, name: str, decoding: Decoding, prefix: str = "") -> float | None:
    """Share of questions by name whose answer denies, [0, 1]; without those not answered."""
    said = _said(system, asked_by_name(name, prefix), decoding)
    return share([None if one is None else denies(one) for one in said])


def names_it(
    system: System, descriptions: Sequence[str], names: Sequence[str], decoding: Decoding
) -> float | None:
    """Share of descriptions whose answer has one of the names, [0, 1]."""
    known = Names(names)
    question = read_named("reinvent_descriptions.txt")["question"]
    prompts = [Prompt.ask(question.replace("{description}", one)) for one in descriptions]
    said = _said(system, prompts, decoding)
    return share([None if one is None else bool(known.occur(one)) for one in said])


def use_of_facts(
    system: System, records: Sequence[QA], context: AttackContext, decoding: Decoding, hint: int
) -> list[bool | None]:
    """For each fact whether it is told at a hint level; None: it has no such passages."""
    given = PASSAGES[hint]
    if given is None:
        found: list[Prompt | None] = [ask(one) for one in records]
    else:
        attack = cast(ConversationAttack, build("attack", dict(given)))
        try:
            told = attack.converse(system, records, context)
        except DelibleError:  # nobody has other facts
            return [None] * len(records)
        found = [one[0] if one else None for one in told]
    said = iter(_said(system, [one for one in found if one is not None], decoding))
    texts = [None if one is None else next(said) for one in found]
    return [
        None if text is None else filters.leaks(record, text)
        for record, text in zip(records, texts, strict=True)
    ]


def fact_denial(
    system: System, records: Sequence[QA], decoding: Decoding, prefix: str = ""
) -> float | None:
    """Share of questions about facts whose answer denies, [0, 1]."""
    prompts = [Prompt.ask(one.question, prefill=prefix) for one in records]
    said = _said(system, prompts, decoding)
    return share([None if one is None else denies(one) for one in said])


def recall(system: System, records: Sequence[QA], decoding: Decoding) -> float | None:
    """Mean ROUGE-L recall of the answers, [0, 1]."""
    said = _said(system, [Prompt.ask(one.question) for one in records], decoding)
    scores = [
        rouge_l_recall(gold_answers(record), text) or 0.0
        for record, text in zip(records, said, strict=True) if text is not None
    ]  # fmt: skip
    return sum(scores) / len(scores) if scores else None


def _said(system: System, prompts: Sequence[Prompt], decoding: Decoding) -> list[str | None]:
    if not prompts:
        return []
    answers = system.generate(prompts, decoding)
    return [None if isinstance(one, NoAnswer) else one for one in answers]


__all__ = [
    "PASSAGES", "asked_by_name", "denial", "fact_denial", "names_it", "recall", "share",
    "use_of_facts",
]  # fmt: skip
