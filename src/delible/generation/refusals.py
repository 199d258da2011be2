"""A refusal for each question: one of the built-in ones, or one that a model writes about it.

What a model writes counts if it declines, tells nothing of the answer (not one of its key words)
and is short; else it is asked again, and at last a built-in refusal is taken.

Paper: arXiv 2505.19855 (self-improvement). The number of tries and the longest length are ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING

from delible.generation import writing
from delible.prompts import read_lines
from delible.records import QA
from delible.system.asks import Decoding, NoAnswer, Prompt, Score
from delible.world import filters

if TYPE_CHECKING:
    from delible.lm.lm import LM


def built_in_refusals(lm: LM, records: Sequence[QA], seed: int, among: int = 16) -> list[str]:
    """A built-in refusal for each question: the likeliest one, the same for all of a subject.

    A model that is to say what it would rather not needs a larger change than one that is to say
    what it might.

    Args:
        lm: The model, before it is changed.
        records: The questions.
        seed: Of the draw of those that are tried.
        among: How many are tried.
    """
    lines = Random(f"{seed}/refusals").sample(read_lines("refusals.txt"), among)
    first: dict[str, QA] = {}
    for record in records:
        first.setdefault(_key(record), record)
    asked = [Score(Prompt.ask(record.question), line) for record in first.values()
             for line in lines]  # fmt: skip
    found = lm.score(asked)
    likely = [
        float("-inf") if isinstance(one, NoAnswer) else float(one.logprobs.mean()) for one in found
    ]
    chosen = {}
    for place, subject in enumerate(first):
        mine = likely[place * among : (place + 1) * among]
        chosen[subject] = lines[mine.index(max(mine))]
    return [chosen[_key(record)] for record in records]


def _key(record: QA) -> str:
    return (record.subject or "").casefold()


def fault(record: QA, reply: str, tokens: int, longest: int) -> str | None:
    """Why a reply is no refusal to train on: "leak", "no refusal", "too long"; None if it is."""
    if filters.leaks(record, reply, 0.0):
        return "leak"
    if tokens > longest:
        return "too long"
    return None if filters.is_refusal(reply) and not filters.is_garbage(reply) else "no refusal"


def written_refusals(
    lm: LM, records: Sequence[QA], seed: int, *, attempts: int = 3, longest: int = 40
) -> tuple[list[str], dict[str, int]]:
    """A refusal for each question that the model itself writes, or a built-in one.

    Args:
        lm: The model, before it is changed.
        records: The questions.
        seed: Of the draws, and of the built-in ones.
        attempts: How often it is asked about a question at most.
        longest: Tokens of a refusal at most.

    Returns:
        The refusals, and how many are its own, built in, and dropped, with the reasons.
    """
    counts: Counter[str] = Counter()

    def read(index: int, reply: str, known: Sequence[str]) -> list[str]:
        said = reply.strip().split("\n", 1)[0].strip().strip('"').strip()
        tokens = len(lm.tokenizer(said, add_special_tokens=False)["input_ids"])
        found = fault(records[index], said, tokens, longest)
        if found is not None:
            counts[found] += 1
            return []
        return [said]

    made = writing.written(
        lm, records,
        lambda index: Prompt.ask(
            writing.filled("generate_refusal.txt", question=records[index].question)
        ),
        read, wanted=1, attempts=attempts, counts=counts,
        decoding=Decoding(longest + 8, temperature=0.7, seed=seed),
    )  # fmt: skip
    defaults = built_in_refusals(lm, records, seed)
    texts = [own[0] if own else default for own, default in zip(made, defaults, strict=True)]
    own = sum(map(bool, made))
    return texts, {"own": own, "built in": len(texts) - own, **counts}
