"""From what is to be forgotten to questions that an edit can move."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from delible.generation.elicit import built_in_topics
from delible.lm.lm import LM
from delible.messages import Message
from delible.records import QA, Dialogue, Record
from delible.repair.watchdog import is_about
from delible.repair.wishes import Pair, Wish
from delible.system.asks import Decoding, Prompt

#: Length of an answer that the model is asked for, in tokens.
ANSWER_TOKENS = 24
#: In the place of an empty answer.
SILENCE = "(nothing)"


def questions_of(wish: Wish) -> tuple[Pair, ...]:
    """The pairs of a wish that ask something: what is told is in no weights."""
    return tuple(pair for pair in wish.pairs if pair.prompt.rstrip().endswith("?"))


def is_told_only(wish: Wish) -> bool:
    """Whether it is about what was said in this conversation, and asks nothing of the weights."""
    return not _is_known(wish.subject) and not questions_of(wish)


def count_of(wish: Wish) -> int:
    """How many questions an edit would move; 0 for what was only told here."""
    if is_told_only(wish):
        return 0
    found = {pair.prompt for pair in questions_of(wish)}
    if _is_known(wish.subject):
        found |= {topic.wordings[0] for topic in built_in_topics(wish.subject)}
    return len(found)


def _is_known(subject: str) -> bool:
    """Whether weights may know it: it is a name or a topic, and nothing of the user's own."""
    return bool(subject) and not subject.casefold().startswith(("my ", "mein"))


def rows_of(lm: LM, wish: Wish, system: str | None) -> tuple[Record, ...]:
    """Records to forget: the pairs of the conversation, and questions about the subject.

    Args:
        lm: Fills answers that are missing: what it says now.
        system: The system prompt of the conversation; its questions are moved too.
    """
    found: dict[str, QA] = {}
    empty: list[str] = []
    for pair in questions_of(wish):
        if pair.response.strip():
            answer = pair.response
        else:
            answer, empty = SILENCE, [*empty, pair.prompt]
        found[pair.prompt] = QA(question=pair.prompt, answer=answer, subject=wish.subject or None)
    if _is_known(wish.subject):
        for topic in built_in_topics(wish.subject):
            first, *others = topic.wordings
            found.setdefault(
                first,
                QA(
                    question=first, answer=SILENCE, subject=wish.subject, group=topic.name,
                    paraphrases=tuple(others),
                ),
            )  # fmt: skip
            empty.append(first)
    replies = lm.generate([_ask(one, system) for one in empty], Decoding(ANSWER_TOKENS))
    for question, reply in zip(empty, replies, strict=True):
        answer = str(reply).strip() or SILENCE
        found[question] = found[question].model_copy(update={"answer": answer})
    rows: list[Record] = list(found.values())
    if system:
        rows += [Dialogue(messages=_ask(question, system).messages) for question in found]
    return tuple(rows)


def _ask(question: str, system: str | None) -> Prompt:
    return Prompt.ask(question, system=system or None)


def without(messages: Sequence[Message], wish: Wish) -> tuple[Message, ...]:
    """The conversation without the exchanges that a wish is about; the system turn stays."""
    prompts = {pair.prompt for pair in wish.pairs}
    left: list[Message] = []
    dropping = False
    for turn in messages:
        if turn.role == "user":
            about = bool(wish.subject) and is_about(turn.text, wish.subject)
            dropping = turn.text in prompts or about
        elif turn.role == "assistant" and not dropping and wish.subject:
            if is_about(turn.text, wish.subject):  # the reply tells it: the question goes, too
                while left and left[-1].role != "user":
                    left.pop()
                if left and left[-1].role == "user":
                    left.pop()
                dropping = True
        elif turn.role == "system":
            dropping = False
        if not dropping:
            left.append(turn)
    return tuple(left)


def kept_of(messages: Sequence[Message], wish: Wish) -> tuple[QA, ...]:
    """Questions of the conversation that are about something else, with the replies to them."""
    pairs = pairwise(messages)
    return tuple(
        QA(question=turn.text, answer=reply.text)
        for turn, reply in pairs
        if turn.role == "user" and reply.role == "assistant"
        and turn.text.strip().endswith("?") and reply.text.strip()
        and turn.text not in {pair.prompt for pair in wish.pairs}
        and not (wish.subject and is_about(f"{turn.text} {reply.text}", wish.subject))
    )  # fmt: skip


__all__ = ["count_of", "is_told_only", "kept_of", "questions_of", "rows_of", "without"]
