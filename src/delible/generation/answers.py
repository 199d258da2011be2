"""Other answers to each forget question: by templates, or by a system that is asked for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from random import Random

from delible.generation import filters, templates, writing
from delible.generation.rows import questions
from delible.measure.requests import Decoding, Prompt
from delible.records import QA
from delible.train.slots import Context


def other_answers(
    context: Context,
    forget: Sequence[QA],
    prompt: Callable[[QA], str],
    read: Callable[[str], Sequence[str]],
    *,
    name: str,
    what: str,
    where: str,
    count: int,
    minimum: int,
    attempts: int,
    decoding: Decoding,
) -> list[list[str]]:
    """At most ``count`` answers per record that neither tell its facts, refuse nor repeat.

    Args:
        prompt: What the writer is asked about a record.
        read: The answers in a reply.
        name: Of the idea; the templates' random numbers depend on it.
        what, where: What is made and by what, for messages.

    Raises:
        DataError: A record has fewer than ``minimum``.
    """
    counts: Counter[str] = Counter()
    if context.writer is None:
        every = questions(context.records["forget"], where)
        others = [*every, *context.records.get("retain", ())]
        made = [
            templates.false_answers(
                record, others, count, Random(f"{context.seed}/{name}/{record.digest}"), counts
            )
            for record in forget
        ]
    else:

        def usable(index: int, reply: str, known: Sequence[str]) -> list[str]:
            return filters.sift(forget[index], read(reply), counts, known)

        made = writing.written(
            context.writer, forget, lambda index: Prompt.ask(prompt(forget[index])), usable,
            wanted=count, decoding=decoding, attempts=attempts, counts=counts, say=context.say,
            stage=context.stage,
        )  # fmt: skip
    writing.require_enough(
        made, min(minimum, count), what, counts, context.say, where, context.writer
    )
    return made
