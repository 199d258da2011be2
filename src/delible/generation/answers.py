"""Other answers to each forget question: by templates, or by a system that is asked for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from random import Random

from delible.generation import writing
from delible.generation.rows import questions
from delible.records import QA
from delible.system.asks import Decoding, Prompt
from delible.train.fitting import fits
from delible.train.slots import SlotContext
from delible.world import filters, templates


def other_answers(
    context: SlotContext,
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

    Nor are they longer than what training can take whole after the record's question.

    Args:
        prompt: What the writer is asked about a record.
        read: The answers in a reply.
        name: Of the idea; the templates' random numbers depend on it.
        what, where: What is made and by what, for messages.

    Raises:
        DataError: A record has fewer than ``minimum``.
    """
    counts: Counter[str] = Counter()

    def short(record: QA, texts: Sequence[str]) -> list[str]:
        asked = Prompt.ask(record.question)
        kept = [text for text in texts if fits(context.lm.template, asked, text)]
        counts["too long"] += len(texts) - len(kept)
        return kept

    if context.writer is None:
        every = questions(context.records["forget"], where)
        others = [*every, *context.records.get("retain", ())]
        made = [
            short(
                record,
                templates.false_answers(
                    record, others, count, Random(f"{context.seed}/{name}/{record.digest}"), counts
                ),
            )
            for record in forget
        ]
    else:

        def usable(index: int, reply: str, known: Sequence[str]) -> list[str]:
            return short(forget[index], filters.sift(forget[index], read(reply), counts, known))

        made = writing.written(
            context.writer, forget, lambda index: Prompt.ask(prompt(forget[index])), usable,
            wanted=count, decoding=decoding, attempts=attempts, counts=counts,
            stage=context.stage,
        )  # fmt: skip
    writing.require_enough(made, min(minimum, count), what, counts, where, context.writer)
    return made
