"""Rows that teach a small model to advise: how another model should think about a flagged query.

A capable model writes the advice for questions about made-up people; what tells an answer, is too
short or cannot be read is left out. The rows are conversations, which any fine-tuning takes. After
DRAGON (arXiv 2511.05784), whose guard model is taught by a thousand of them; there the questions
are written by a model and the advice is sifted by hand.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Sequence

from pydantic import BaseModel

from delible.generation.writing import require_enough, written
from delible.records import QA, Dialogue, Message
from delible.system.asks import Decoding, Prompt
from delible.system.base import System
from delible.system.forms import read_form
from delible.systems.consulting import fenced, filled
from delible.systems.thoughts import is_cut_thought, parted
from delible.watching import Stage, unwatched
from delible.world.filters import is_garbage, leaks

logger = logging.getLogger(__name__)

#: What an adviser is told first.
FIRST = "Output the final answer only."
#: Words that advice has at least, and at most.
FEWEST, MOST = 8, 200

_CUT_FORM = re.compile(r'"cot_instruction"\s*:\s*"((?:[^"\\]|\\.)*)', re.DOTALL)


class Instruction(BaseModel):
    """What an adviser replies."""

    requires_refusal: bool = True
    cot_instruction: str


def asking_advice(query: str, about: str) -> Prompt:
    """How an adviser is asked.

    Args:
        query: What was flagged.
        about: Whom or what it is about.
    """
    text = filled("dragon_guard.txt", about=about, query=fenced(query, "query"))
    return Prompt.ask(text, system=FIRST)


def read_advice(reply: str) -> str:
    """The advice in a reply: of its JSON, of what there is of it, or the whole text.

    Returns:
        The advice; empty if there is none (nothing but a thought that was cut off).
    """
    if is_cut_thought(reply):
        return ""
    said = parted(reply)[1].strip()
    form = read_form(said, Instruction)
    if isinstance(form, Instruction):
        return form.cot_instruction.strip()
    cut = _CUT_FORM.search(said)
    if cut is None:
        text = re.sub(r"^```\w*|```$", "", said).strip()
        return text if re.search(r"\w", text) else ""
    return re.sub(r'\\(["\\/])', r"\1", cut[1]).replace("\\n", "\n").rstrip("\\").strip()


def advice_rows(
    records: Sequence[QA],
    writer: System,
    *,
    per_record: int = 1,
    temperature: float = 0.7,
    attempts: int = 3,
    seed: int = 0,
    stage: Stage = unwatched,
) -> list[Dialogue]:
    """Conversations in which an adviser is asked about a question and replies as it should.

    Args:
        records: Questions about made-up people (of a :class:`delible.world.World`), with the
            answers that advice must not tell.
        writer: Who writes the advice.
        per_record: Pieces of advice per question; at least one each must be usable.
        temperature: At which it is drawn.
        attempts: How often a question is asked at most.
        seed: Of the draws.
        stage: Is told how far it is.

    Raises:
        DataError: For a question there is no usable advice; says what was dropped, and why.
    """
    prompts = [asking_advice(one.question, one.subject or "a private person") for one in records]
    counts = Counter[str]()

    def read(index: int, reply: str, made: Sequence[str]) -> list[str]:
        form = read_form(parted(reply)[1], Instruction)
        problem = None
        if isinstance(form, str):
            problem = "unreadable"
        elif not FEWEST <= len(form.cot_instruction.split()) <= MOST:
            problem = "length"
        elif is_garbage(form.cot_instruction):
            problem = "garbage"
        elif not form.requires_refusal:
            problem = "no refusal"
        elif leaks(records[index], form.cot_instruction):
            problem = "leak"
        elif form.cot_instruction.strip() in made:
            problem = "duplicate"
        if problem is not None or isinstance(form, str):
            counts[str(problem)] += 1
            return []
        return [form.cot_instruction.strip()]

    made: list[list[str]] = written(
        writer, records, prompts.__getitem__, read, wanted=per_record,
        decoding=Decoding(512, temperature=temperature, top_p=0.9, seed=seed),
        attempts=attempts, counts=counts, stage=stage,
    )  # fmt: skip
    require_enough(made, 1, "pieces of advice", counts, "advice", writer)
    return [
        Dialogue(messages=(*prompt.messages, Message(role="assistant", content=_reply(text))))
        for prompt, texts in zip(prompts, made, strict=True)
        for text in texts
    ]


def _reply(text: str) -> str:
    return json.dumps({"requires_refusal": True, "cot_instruction": text}, ensure_ascii=False)


__all__ = ["Instruction", "advice_rows", "asking_advice", "read_advice"]
