"""Rows written by a system: what it is asked, what it replies, what of that can be used.

Every reply is read, sifted and counted. Where too little is left, other random numbers are tried;
where it is still too little, the error says how much was thrown away, and why. Replies are cached
by (system, prompt, decoding), so that a run that is started again asks nothing twice.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

from delible.errors import DataError
from delible.kept import cache_folder
from delible.measure.cache import Cache
from delible.measure.engine import measure
from delible.prompts import read_text
from delible.records import RecordBase
from delible.system.asks import (
    Decoding,
    Generate,
    NoAnswer,
    Prompt,
)
from delible.system.base import System
from delible.watching import Stage, unwatched
from delible.world.filters import told

logger = logging.getLogger(__name__)

_Made = TypeVar("_Made")

_LIST_MARK = re.compile(r"^\s*(?:[-*\u2022]|\(?\d{1,2}[.):])\s+")
_THINKING = re.compile(r"<think>(.*?)</think>(.*)", re.DOTALL)
_REASONING = re.compile(
    r"reasoning\s*:\s*(.*?)\s*(?:\*\*)?(?:answer|response|refusal)\s*:(?:\*\*)?\s*(.*)",
    re.DOTALL | re.IGNORECASE,
)
_PAIR = re.compile(r"q(?:uestion)?\s*:\s*(.+?)\s*a(?:nswer)?\s*:\s*(.+)", re.IGNORECASE)


def filled(file: str, **values: object) -> str:
    """A prompt file with ``{name}`` replaced; other braces stay (prompts may hold JSON)."""
    text = "\n".join(line for line in read_text(file).split("\n") if not line.startswith("#"))
    for name, value in values.items():
        text = text.replace(f"{{{name}}}", str(value))
    return text.strip()


def read_list(text: str) -> list[str]:
    """The lines of a reply, without numbers and bullets."""
    lines = (_LIST_MARK.sub("", line).strip().strip('"') for line in text.splitlines())
    return [line for line in lines if line]


def read_pairs(text: str) -> list[tuple[str, str]]:
    """Question-answer pairs of a reply: a JSON list of objects, or lines "Q: … A: …".

    What is not a pair is left out.
    """
    start, end = text.find("["), text.rfind("]")
    if 0 <= start < end:
        try:
            rows = json.loads(text[start : end + 1])
        except json.JSONDecodeError:
            rows = []
        pairs = [
            (str(row.get("question", "")).strip(), str(row.get("answer", "")).strip())
            for row in rows
            if isinstance(row, dict)
        ]
        if pairs:
            return [(question, answer) for question, answer in pairs if question and answer]
    joined = re.sub(r"\n\s*(?=a(?:nswer)?\s*:)", " ", text, flags=re.IGNORECASE)
    found = (_PAIR.search(line) for line in joined.splitlines())
    return [(match.group(1).strip(), match.group(2).strip()) for match in found if match]


def read_reasoning(text: str) -> tuple[str, str] | None:
    """Reasoning and final answer of a reply; None where one of the two is missing."""
    found = _THINKING.search(text) or _REASONING.search(text)
    if found is None:
        return None
    reasoning, answer = (part.strip() for part in found.groups())
    return (reasoning, answer) if reasoning and answer else None


def written(
    system: System,
    records: Sequence[RecordBase],
    prompt: Callable[[int], Prompt],
    read: Callable[[int, str, Sequence[_Made]], Sequence[_Made]],
    *,
    wanted: int,
    decoding: Decoding,
    attempts: int,
    counts: Counter[str],
    stage: Stage = unwatched,
) -> list[list[_Made]]:
    """What a system writes for each record, at most ``wanted`` things.

    Args:
        prompt: What is asked about record number i.
        read: The usable things of a reply about record i, given what there is already; it counts
            what it drops in ``counts``.
        wanted: Things per record; a record that has them is not asked again.
        decoding: Attempt k draws with the seed plus k.
        attempts: How often a record is asked at most. A greedy system is asked once.

    Returns:
        One list per record, which may be short or empty.
    """
    cache = Cache(cache_folder() / "generated")
    made: list[list[_Made]] = [[] for _ in records]
    for attempt in range(attempts if decoding.temperature > 0 else 1):
        open_ = [index for index in range(len(records)) if len(made[index]) < wanted]
        if not open_:
            break
        drawn = replace(decoding, seed=decoding.seed + attempt)
        requests = {index: Generate(prompt(index), drawn) for index in open_}
        logger.info(
            f"generate: {system.name} is asked about {len(open_)} of {len(records)} records."
        )
        replies = measure(
            system, requests.values(), cache=cache, progress=partial(stage, "generated rows")
        )
        for index, request in requests.items():
            reply = replies[request]
            if isinstance(reply, NoAnswer) or not isinstance(reply, str):
                counts["no answer"] += 1
                continue
            usable = read(index, reply, made[index])
            made[index] += list(usable)[: wanted - len(made[index])]
    return made


def require_enough(
    made: Sequence[Sequence[object]],
    minimum: int,
    what: str,
    counts: Counter[str],
    where: str,
    writer: System | None,
) -> None:
    """Says what was made and dropped; refuses to go on with less than ``minimum`` per record.

    Raises:
        DataError: A record has fewer; says how many, and why.
    """
    total = sum(len(part) for part in made)
    logger.info(f"generate: {total} {what} for {len(made)} records; dropped: {told(counts)}.")
    short = [number for number, part in enumerate(made, start=1) if len(part) < minimum]
    if short:
        more = " …" if len(short) > 5 else ""
        hint = (
            "Give records with 'perturbed' answers, a larger forget set to borrow answers from, or "
            "a model to write them: --generator MODEL."
            if writer is None
            else "Use a more capable --generator, raise generate.attempts, or lower "
            "generate.minimum."
        )
        raise DataError(
            f"{len(short)} of {len(made)} records have fewer than {minimum} usable {what} "
            f"(records {', '.join(map(str, short[:5]))}{more}; dropped: {told(counts)}).",
            where=where,
            hint=hint,
        )
