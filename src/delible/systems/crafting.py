"""Entries of a store that make a model keep silent: what is retrieved, and what it demands.

    entry(c, i) = P_i + Q       P_i: a description of the target c, or a question about it;
                                Q: a demand for confidentiality, written and tried out

Q is asked for until the model, given P and Q as it will be given them, no longer speaks of c; the
last try stays. An answer speaks of c if it names c, or tells one of c's answers, and is no refusal.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from delible.messages import Message
from delible.prompts import read_lines
from delible.system.asks import Decoding, Prompt
from delible.system.base import System
from delible.systems.forbidden import Forbidden
from delible.world.filters import is_refusal

#: How clauses, descriptions and answers are drawn.
WRITTEN = Decoding(384)
_NUMBERED = re.compile(r"(?m)^\s*\d+[.):]\s*")
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")


@dataclass(frozen=True)
class Target:
    """What must not be spoken of.

    Attributes:
        name: What it is called, in clauses.
        questions: Questions about it.
        forbidden: Its names, and what its answers tell.
    """

    name: str
    questions: tuple[str, ...]
    forbidden: Forbidden


@dataclass(frozen=True)
class Crafted:
    """A target's clause.

    Attributes:
        clause: Its text.
        tries: How often it was written.
        obeyed: Whether the model kept silent in the end.
    """

    clause: str
    tries: int
    obeyed: bool


def template(name: str) -> str:
    """The text of a prompt file, as one line."""
    return " ".join(read_lines(name))


def cut(text: str, words: int) -> str:
    """At most so many words of a text."""
    return " ".join(text.split()[:words])


def with_item(prompt: Prompt, item: str, *, in_system: bool = False) -> Prompt:
    """The prompt in which a model sees an item: its last user turn, or a text, with it.

    Args:
        prompt: As it came.
        item: What was retrieved.
        in_system: The item stands in the system turn, where a long conversation cannot push it out.
    """
    line = template("rag_system.txt")
    if prompt.text is not None:
        return replace(prompt, text=f"{line}\n\nKnowledge item: {item}\n\n{prompt.text}")
    turns = list(prompt.messages)
    last = max((place for place, one in enumerate(turns) if one.role == "user"), default=None)
    if last is None or in_system:
        line = f"{line}\n\nKnowledge item: {item}"
    else:
        text = f"Original input: {turns[last].text}\n\nKnowledge item: {item}"
        turns[last] = turns[last].with_text(text)
    if turns and turns[0].role == "system":
        turns[0] = turns[0].with_text(f"{turns[0].text}\n\n{line}")
    else:
        turns.insert(0, Message(role="system", content=line))
    return replace(prompt, messages=tuple(turns))


def aspects_of(text: str, count: int, words: int) -> list[str]:
    """The items of a numbered list, or else the sentences of a text; at most ``count``."""
    items = _NUMBERED.split(text)[1:] or _SENTENCE.split(text)
    found = [cut(one, words) for one in items if one.strip()]
    return list(dict.fromkeys(found))[:count]


def described(
    system: System, targets: Sequence[Target], aspects: int, words: int
) -> list[list[str]]:
    """What a system says of each target, in parts; in its words the target is asked about."""
    line = template("rag_describe.txt")
    prompts = [
        Prompt.ask(line.format(target=one.name, aspects=aspects, words=words)) for one in targets
    ]
    replies = system.generate(prompts, WRITTEN) if prompts else []
    return [aspects_of(str(reply), aspects, words) for reply in replies]


def related(target: Target, answer: str) -> bool:
    """Whether an answer speaks of a target: no refusal, and it holds what is the target's."""
    return not is_refusal(answer) and target.forbidden.holds(answer)


def crafted(
    targets: Sequence[Target],
    described_as: Sequence[str],
    writer: System,
    model: System,
    asked: Callable[[Prompt, str, str], Prompt],
    *,
    words: int,
    tries: int,
) -> list[Crafted]:
    """A clause for each target; all are written, and tried out, side by side.

    Args:
        targets: What must not be spoken of.
        described_as: What stands before each one's clause when it is tried out.
        writer: Writes the clauses.
        model: Must obey them.
        asked: The prompt in which a model sees a question, a description and a clause.
        words: A clause's words at most.
        tries: How often a clause is written at most.
    """
    built_in, write, again = map(
        template, ("rag_clause.txt", "rag_write.txt", "rag_write_again.txt")
    )
    found = [Crafted(built_in.format(target=one.name), 0, False) for one in targets]
    pending = list(range(len(targets)))
    for number in range(1, tries + 1):
        requests: list[Prompt] = []
        for place in pending:
            known: Mapping[str, object] = {"target": targets[place].name, "words": words}
            line = write.format(**known)
            if number > 1:
                line = again.format(**known, clause=found[place].clause)
            requests.append(Prompt.ask(line))
        for place, reply in zip(pending, writer.generate(requests, WRITTEN), strict=True):
            clause = cut(str(reply), words) or found[place].clause  # no reply: the one before stays
            found[place] = Crafted(clause, number, False)
        questions = [(place, text) for place in pending for text in targets[place].questions]
        answers = model.generate(
            [
                asked(Prompt.ask(text), described_as[place], found[place].clause)
                for place, text in questions
            ],
            WRITTEN,
        )
        failed = {
            place
            for (place, _), answer in zip(questions, answers, strict=True)
            # no answer shows nothing about the clause
            if not isinstance(answer, str) or related(targets[place], answer)
        }
        for place in pending:
            if place not in failed:
                found[place] = Crafted(found[place].clause, number, True)
        pending = [place for place in pending if place in failed]
        if not pending:
            break
    return found


__all__ = [
    "Crafted",
    "Target",
    "aspects_of",
    "crafted",
    "described",
    "related",
    "template",
    "with_item",
]
