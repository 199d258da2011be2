"""A graph of facts that is elicited from a model, breadth first from a name.

For every name up to a depth: the writer asks ``questions`` different questions about it, the model
answers each, the writer cuts the answers into triples. Names are one node where they are written
alike, or where they share a word and the writer says that they stand for the same. What the model
says it knows; whether it is true does not matter.

Paper: arXiv 2603.11266. Reference code: llm2graph. Deviations: names without a common word are
never compared, where the original asks about every pair; no relevance filter.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from pydantic import BaseModel, Field

from delible.names import fold
from delible.prompts import read_text
from delible.records import QA
from delible.system.asks import Decoding, NoAnswer, Prompt
from delible.system.base import System
from delible.system.role import Role
from delible.world import filters

_TRIPLE = re.compile(r"\(\s*([^;()]+?)\s*;\s*([^;()]+?)\s*;\s*([^;()]+?)\s*\)")
ANSWER = Decoding(max_new_tokens=80)
TRIPLES = Decoding(max_new_tokens=200)
YES_OR_NO = Decoding(max_new_tokens=4)


class Lines(BaseModel):
    """What a writer replies with: one thing a line."""

    lines: list[str]


class Asked(BaseModel):
    """A question over a path, as a writer replies with it."""

    question: str
    answer: str
    paraphrases: list[str] = Field(default_factory=list)


@dataclass(frozen=True)
class Triple:
    """A fact that the model told."""

    subject: str
    name: str
    value: str


def read_triples(text: str) -> list[Triple]:
    """The triples of a text: lines that are one from end to end; the others are dropped."""
    matches = (_TRIPLE.fullmatch(line.strip()) for line in text.splitlines())
    return [Triple(*match.groups()) for match in matches if match is not None]


def filled(prompt_file: str, **values: str) -> str:
    """A prompt file with its fields filled in."""
    text = read_text(prompt_file)
    for key, value in values.items():
        text = text.replace(f"{{{key}}}", value)
    return text


@dataclass
class Nodes:
    """Names as nodes: what is written alike is one, and what the writer calls the same."""

    writer: Role
    known: dict[str, str] = field(default_factory=dict)
    _same: dict[tuple[str, str], bool] = field(default_factory=dict)

    def node(self, name: str) -> str:
        """The node of a name, perhaps a new one."""
        key = " ".join(fold(name).words()) or name
        if key not in self.known:
            alike = (
                node for node in dict.fromkeys(self.known.values())
                if set(fold(node).words()) & set(fold(name).words()) and self._are_same(node, name)
            )  # fmt: skip
            self.known[key] = next(alike, name)
        return self.known[key]

    def _are_same(self, one: str, other: str) -> bool:
        pair = (min(one, other), max(one, other))
        if pair not in self._same:
            asked = Prompt.ask(filled("graph_same.txt", one=pair[0], other=pair[1]))
            (reply,) = self.writer.generate([asked], YES_OR_NO)
            first = [] if isinstance(reply, NoAnswer) else fold(reply).words()[:1]
            self._same[pair] = first == ["yes"]
        return self._same[pair]


def elicit_graph(
    model: System, writer: Role, seeds: Sequence[str], *, questions: int = 10, depth: int = 2,
    decay: float = 1.0,
) -> list[Triple]:  # fmt: skip
    """What a model tells of some names, and of the names that it mentions with them.

    Args:
        questions: Asked about each name.
        depth: Steps away from the seeds up to which names are asked about.
        decay: Share of a name's new neighbours that is followed, to the power of the depth.

    Returns:
        Different triples, in the order in which they were told.
    """
    nodes = Nodes(writer)
    found: dict[Triple, None] = {}
    frontier = [(nodes.node(seed), 0) for seed in seeds]
    seen: set[str] = set()
    while frontier:
        name, at = frontier.pop(0)
        if name in seen:
            continue
        seen.add(name)
        children: dict[str, None] = {}
        for triple in _told(model, writer, name, questions):
            about = name if _alike(triple.subject, name) else nodes.node(triple.subject)
            value = nodes.node(triple.value)
            if value != about:
                found[Triple(about, triple.name, value)] = None
            if about == name and value != name:
                children[value] = None
        if at < depth:
            kept = len(children) if at == 0 else round(len(children) * decay**at)
            frontier += [(child, at + 1) for child in list(children)[:kept]]
    return list(found)


def _alike(one: str, other: str) -> bool:
    return fold(one).words() == fold(other).words()


def _told(model: System, writer: Role, name: str, questions: int) -> list[Triple]:
    """Triples of the model's answers to the writer's questions; failures give none."""
    asked = writer.ask(filled("graph_questions.txt", name=name, count=str(questions)), Lines)
    if isinstance(asked, NoAnswer):
        return []
    lines = [line.strip() for line in asked.lines if line.strip()][:questions]
    answers = model.generate([Prompt.ask(line) for line in lines], ANSWER)
    texts = [
        filled("graph_triples.txt", question=line, answer=answer)
        for line, answer in zip(lines, answers, strict=True)
        if not isinstance(answer, NoAnswer) and answer.strip()
    ]
    replies = writer.generate([Prompt.ask(text) for text in texts], TRIPLES)
    return [
        triple for reply in replies if not isinstance(reply, NoAnswer)
        for triple in read_triples(reply)
    ]  # fmt: skip


def written_probe(
    writer: Role, path: Sequence[Triple], kind: str, paraphrases: int, other: str = ""
) -> QA | None:
    """A question over a path, written by a writer.

    Args:
        kind: The group that the probe is put into.
        paraphrases: Other wordings that are asked for.
        other: Another name of the start; the last wording has it.

    Returns:
        None where the reply cannot be used: its answer is another one, the start is not named, or
        what is on the way or at the end is.
    """
    start, end = path[0].subject, path[-1].value
    told = "\n".join(f"({one.subject} ; {one.name} ; {one.value})" for one in path)
    reply = writer.ask(
        filled("graph_probe.txt", triples=told, start=start, end=end, count=str(paraphrases)), Asked
    )
    if isinstance(reply, NoAnswer) or not _agree(reply.answer, end):
        return None
    wordings = [reply.question, *reply.paraphrases][: 1 + paraphrases]
    if len(wordings) < 1 + paraphrases or len(set(wordings)) < len(wordings):
        return None
    for text in wordings:
        named = any(filters.says(text, one.value) for one in path)
        if named or not filters.says(text, start):
            return None
    if other:
        pattern = rf"(?<!\w){re.escape(start)}(?!\w)"
        wordings.append(re.sub(pattern, lambda _: other, wordings[0]))
    relations = (re.sub(r"\W+", "_", one.name.casefold()) for one in path)
    return QA(
        question=wordings[0], answer=end, paraphrases=tuple(wordings[1:]), subject=start,
        group="/".join((kind, str(len(path)), *relations)),
    )  # fmt: skip


def _agree(answer: str, end: str) -> bool:
    return filters.says(answer, end) or filters.says(end, answer)
