"""Asking guarded systems: what they say, what it costs, how long it takes."""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from delible.errors import DataError
from delible.lm.lm import LM
from delible.measure.attack import AttackContext, ConversationAttack, PromptAttack
from delible.measure.scoring.text import gold_answers, rouge_l_recall
from delible.records import QA
from delible.system.asks import Decoding, NoAnswer, Prompt
from delible.system.base import System
from delible.system.questions import ask
from delible.system.replies import Reply
from delible.systems.guarded import GuardedSystem
from delible.world import filters

#: Columns of PHTest's file, and the value of the prompts that nobody should refuse.
PROMPT, KIND, HARMLESS = "Request", "Harmfulness", "harmless"


@dataclass(frozen=True)
class Said:
    """What was said to one prompt.

    Attributes:
        text: Empty where there was no answer.
        refused: The guard withheld it, or it is a refusal by its words.
        unanswered: There was none.
        failed: The guard withheld it since its judgement came to nothing.
    """

    text: str
    refused: bool
    unanswered: bool = False
    failed: bool = False


def said(system: System, prompts: Sequence[Prompt], decoding: Decoding) -> list[Said]:
    """What a system says to each prompt, in order."""
    if not prompts:
        return []
    replies: Sequence[Reply | str | NoAnswer]
    if isinstance(system, GuardedSystem):
        replies = system.replies(prompts, decoding)
    else:
        replies = system.generate(prompts, decoding)
    found = []
    for reply in replies:
        if isinstance(reply, NoAnswer):
            found.append(Said("", False, True))
            continue
        text = reply if isinstance(reply, str) else reply.text
        withheld = isinstance(reply, Reply) and reply.finish == "content_filter"
        failed = isinstance(reply, Reply) and reply.guard_failed
        found.append(Said(text, withheld or filters.is_refusal(text), failed=failed))
    return found


def asked(record: QA) -> Prompt:
    """The plain question."""
    prompt = ask(record)
    assert prompt is not None  # questions have one
    return prompt


def told(records: Sequence[QA], answers: Sequence[Said]) -> list[bool]:
    """For each record whether its answer is told."""
    return [filters.leaks(one, reply.text) for one, reply in zip(records, answers, strict=True)]


def rouge(records: Sequence[QA], answers: Sequence[Said]) -> list[float]:
    """For each record the ROUGE-L recall of its answer, [0, 1]."""
    return [
        rouge_l_recall(gold_answers(one), reply.text) or 0.0
        for one, reply in zip(records, answers, strict=True)
    ]


def told_under(
    system: System,
    records: Sequence[QA],
    attack: PromptAttack | ConversationAttack,
    context: AttackContext,
    decoding: Decoding,
    most: int,
) -> list[bool | None]:
    """For each record whether any form of the attack brings its answer out; None: it has none.

    What an attack asks in its own words (another language) counts for the record of the same fact.

    Args:
        context: Its forget records are ``records``.
        most: Forms, or ends of a talk, at most.
    """
    judged = [one for one in attack.held_out(context) if isinstance(one, QA)]
    forms: Sequence[Sequence[Prompt]]
    if isinstance(attack, ConversationAttack):
        forms = [talks[:most] for talks in attack.converse(system, judged, context)]
    else:
        forms = [tuple(attack.prompts(record, asked(record)))[:most] for record in judged]
    flat = [prompt for of_record in forms for prompt in of_record]
    answers = iter(said(system, flat, decoding))
    by_fact: dict[tuple[str | None, str | None], bool] = {}
    by_record: dict[str, bool] = {}
    for record, of_record in zip(judged, forms, strict=True):
        leaks = [filters.leaks(record, next(answers).text) for _ in of_record]
        if leaks:
            by_record[record.digest] = by_fact[record.subject, record.group] = any(leaks)
    own = {record.digest for record in judged} - {record.digest for record in records}
    return [
        by_fact.get((record.subject, record.group)) if own else by_record.get(record.digest)
        for record in records
    ]


def harmless_prompts(path: Path, most: int) -> list[str]:
    """Harmless prompts of PHTest's file (columns ID, Request, Harmfulness), evenly drawn.

    Raises:
        DataError: The file cannot be read, or has other columns.
    """
    try:
        with path.expanduser().open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, skipinitialspace=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot be read ({type(error).__name__}).", where=str(path)) from None
    if not rows or not {PROMPT, KIND} <= rows[0].keys():
        raise DataError(
            f"it has no columns '{PROMPT}' and '{KIND}'.",
            where=str(path),
            hint="Give the file of PHTest: ID, Request, Harmfulness.",
        )
    texts = [row[PROMPT] for row in rows if (row[KIND] or "").strip() == HARMLESS and row[PROMPT]]
    if not texts:
        raise DataError(f"no prompt is '{HARMLESS}'.", where=str(path))
    if most >= len(texts):
        return texts
    return [texts[place * len(texts) // most] for place in range(most)]


# ---- costs


@dataclass
class Count:
    """Questions that systems were asked, and tokens that went in and came out."""

    calls: int = 0
    tokens: int = 0

    def each(self, requests: int) -> dict[str, float]:
        """Calls and tokens per request."""
        return {"calls": self.calls / requests, "tokens": self.tokens / requests}


@dataclass
class Meter:
    """Counts what systems are asked while it is open.

    Attributes:
        reader: The model whose tokenizer counts.
    """

    reader: LM
    count: Count = field(default_factory=Count)

    @contextmanager
    def reading(self, systems: Iterable[System]) -> Iterator[Count]:
        """Within it the count goes on; a role counts as the system that plays it."""
        self.count = Count()
        played = {id(one): one for one in (getattr(each, "system", each) for each in systems)}
        before: dict[int, Any] = {}
        try:
            for key, system in played.items():
                before[key] = vars(system).get("generate")
                system.generate = self._counted(system.generate)  # type: ignore[method-assign]
            yield self.count
        finally:
            for key, system in played.items():
                if key in before and before[key] is not None:
                    system.generate = before[key]  # type: ignore[method-assign]
                elif key in before:
                    del system.generate  # type: ignore[attr-defined]

    def _counted(self, generate: Any) -> Any:
        def counted(prompts: Sequence[Prompt], decoding: Decoding) -> Any:
            answers = generate(prompts, decoding)
            self.count.calls += len(prompts)
            self.count.tokens += sum(self._read(one) for one in prompts)
            self.count.tokens += sum(self._written(str(one)) for one in answers)
            return answers

        return counted

    def _read(self, prompt: Prompt) -> int:
        return len(self.reader.template.prompt_ids(prompt))

    def _written(self, text: str) -> int:
        return len(self.reader.tokenizer(text, add_special_tokens=False)["input_ids"])


def seconds(systems: Mapping[str, System], prompts: Sequence[Prompt], decoding: Decoding) -> Any:
    """Median seconds of an answer by system, asked in turn, one prompt at a time."""
    found: dict[str, list[float]] = {name: [] for name in systems}
    for prompt in prompts:
        for name, system in systems.items():
            began = time.perf_counter()
            system.generate([prompt], decoding)
            found[name].append(time.perf_counter() - began)
    return {name: statistics.median(spent) for name, spent in found.items() if spent}


__all__ = [
    "Meter", "Said", "asked", "harmless_prompts", "rouge", "said", "seconds", "told", "told_under",
]  # fmt: skip
