"""Who notices that a turn asks to forget: rules, and a role that is asked in a form.

What a role reports is held against the conversation before anybody acts on it: the words that ask
must be the user's own in the last turn, and what is to be forgotten must have been said. So text
in a document, a reply of a tool or of the assistant cannot make the model forget.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence

from delible.messages import Message
from delible.prompts import read_text
from delible.repair.own_words import own_words, sentences
from delible.repair.wishes import NO_WISH, Pair, Wish, wish_by_rules
from delible.system.asks import NoAnswer
from delible.system.role import Role

logger = logging.getLogger(__name__)


def notice(messages: Sequence[Message], line: str, role: Role | None = None) -> Wish:
    """What a turn asks to forget.

    Args:
        messages: The conversation before it.
        line: The user's turn.
        role: Asked where the rules find nothing; None: rules alone.

    Raises:
        RunError: The role's budget is spent.
    """
    wish = wish_by_rules(line)
    if wish.intent or role is None:
        return wish.model_copy(update={"pairs": pairs_about(wish.subject, messages)})
    reported = role.ask(asked(messages, line), Wish)
    if isinstance(reported, NoAnswer):
        logger.warning(f"The watchdog could not be read: {reported.reason}")
        return NO_WISH
    if not reported.intent:
        return NO_WISH
    fault = fault_of(reported, messages, line)
    if fault is not None:
        logger.warning(f"What the watchdog reported is not acted on: {fault}")
        return NO_WISH
    return reported


def asked(messages: Sequence[Message], line: str) -> str:
    """The question to the role: the conversation is data between marks that it cannot know."""
    turns = [{"role": turn.role, "text": turn.text} for turn in messages]
    content = json.dumps([*turns, {"role": "user", "text": line}], ensure_ascii=False, indent=1)
    return marked(read_text("repair_watchdog.txt"), "conversation", content)


def marked(template: str, name: str, content: str, **values: str) -> str:
    """A template with content between marks made of the content itself."""
    mark = f"=== {name} {hashlib.sha256(content.encode()).hexdigest()[:8]} ==="
    for key, value in values.items():
        template = template.replace(f"{{{key}}}", value)
    return template.replace("{mark}", mark).replace(f"{{{name}}}", content)


def fault_of(wish: Wish, messages: Sequence[Message], line: str) -> str | None:
    """Why a reported wish is not the user's; None if it is."""
    own = " ".join(sentences(line))
    if not _plain(wish.asked) or _plain(wish.asked) not in _plain(own):
        return "the words that ask are not the user's own in the last turn."
    said = [own_words(turn.text) for turn in messages if turn.role == "user"]
    everything = _plain(" ".join([*said, own]))
    if wish.subject and _plain(wish.subject) not in everything:
        return "the user never named what is to be forgotten."
    replies = [_plain(turn.text) for turn in messages if turn.role == "assistant"]
    questions = [_plain(turn.text) for turn in messages if turn.role == "user"]
    for pair in wish.pairs:
        if pair.response:
            if _plain(pair.prompt) not in questions or _plain(pair.response) not in replies:
                return "a quoted pair is not in the conversation."
        elif not wish.subject or _plain(wish.subject) not in _plain(pair.prompt):
            return "a question is not about what is to be forgotten."
    if not wish.subject and not wish.pairs:
        return "it does not say what."
    return None


def pairs_about(subject: str, messages: Sequence[Message]) -> tuple[Pair, ...]:
    """User turns with the replies to them: those about a subject; of nothing, the last one."""
    pairs = []
    for place, turn in enumerate(messages[:-1]):
        reply = messages[place + 1]
        if turn.role == "user" and reply.role == "assistant" and turn.text.strip():
            pairs.append(Pair(prompt=turn.text, response=reply.text))
    if not subject:
        return tuple(pairs[-1:])
    return tuple(one for one in pairs if is_about(f"{one.prompt} {one.response}", subject))[-32:]


def is_about(text: str, subject: str) -> bool:
    """Whether a text says a subject; of "my phone number", the phone number."""
    wanted = _plain(subject)
    for start in ("my ", "mein ", "meine ", "the "):
        wanted = wanted.removeprefix(start)
    return bool(wanted) and wanted in _plain(text)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


__all__ = ["asked", "fault_of", "is_about", "marked", "notice", "pairs_about"]
