"""Secure forgetting: an agent forgets a place, a routine or an environment on request.

    z  ->  u = C(z)                    a request becomes what the agent is told before every task
    pi(. | s, memory without z, u)  ~  pi(. | s, memory of an agent that never had z)

Memory is cleared of z and of what was made from it; the prompt u says how to behave (unknown, rule,
allowed, disclosure); a mask around the tools lets no hidden name in or out, by keyed hashes.

Paper: Secure Forgetting (arXiv 2604.00430), of which only the abstract was to be had: its three
kinds of request, the conversion and the adversary are the paper's, the rest is ours. No public
code. Differences, on purpose: conversion by rules, or by a role whose replies are checked, instead
of a trained model; by default the prompt names neither target nor category, because an agent may be
talked into repeating it ("named" and "category" are there to be attacked); the ledger keeps hashes.

A mask makes use of the target impossible, and can be noticed: one who looks for a hidden place in a
town never finds it. Without the mask the agent is like one that never knew it, and may learn it.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field

from delible.acting.conversion import Request, Type, Unlearning, Wording, composed, converted
from delible.acting.loop import Action, Budget, Episode, Step, act, canonical
from delible.acting.mask import Mask, holds, of_actions, of_names
from delible.acting.surroundings import Surroundings
from delible.component import Component
from delible.errors import DataError
from delible.files import read_json, write_json
from delible.memory import ENTRY, SUMMARY, Certificate, Deletion, Item, Memory
from delible.memory.closure import Descendants
from delible.memory.items import near
from delible.memory.place import LOCK
from delible.names import Names
from delible.registry import register
from delible.system.role import Role

#: Kinds besides notes: what was done, and an order of actions that has a name.
TRACE, ROUTINE = "trace", "routine"
LEDGER = "forgetting.json"
UNKNOWN = "I do not know."


@register(
    kind="agent",
    name="secure_forgetting",
    title="Secure Forgetting",
    summary="Forgets a place, a routine or an environment: memory, prompt and a mask on the tools.",
    paper="2604.00430",
    year=2026,
    family="Agent unlearning by prompts",
    intention="suppression",
    mechanism="agent-memory",
    changes="A memory of notes and traces, the system turn, and what the tools take and give.",
    reversible=True,
    retrain_goal=True,
    weakest="Looking for what is masked where it should be; what the model knows by itself.",
    badges=("variant", "experimental"),
    variant="Conversion by rules or a checked role instead of a trained model; the prompt names "
    "nothing by default; memory closure and a keyed mask are this project's.",
)
class SecureForgettingOptions(Component):
    """How it remembers and how it forgets."""

    notes: int = Field(12, ge=0, description="Notes that a task retrieves.")
    traces: bool = Field(True, description="Keep what was done, to be forgotten with its notes.")
    wording: Wording = Field(
        "neutral", description="What the prompt says of the target: nothing, its kind, its name."
    )
    prompted: bool = Field(True, description="Tell the agent how to behave.")
    masked: bool = Field(True, description="Let no hidden name into a tool, or out of it.")
    memory: Literal["delete", "quarantine", "keep"] = Field(
        "delete", description="What was made from the target; keep: touch no memory (to compare)."
    )
    likeness: float = Field(
        0.8, gt=0, le=1, description="Cosine from which a note is about the target, with vectors."
    )
    prompt_tokens: int = Field(150, ge=40, description="Tokens that one request may add.")
    rules_tokens: int = Field(600, ge=40, description="Tokens of all requests together.")
    budget: Budget = Field(Budget(), description="Of each task.")

    def agent(self, memory: Memory, actor: Role, converter: Role | None = None) -> Forgetful:
        """The agent, on a memory."""
        return Forgetful(memory, actor, self, converter)


class Entry(BaseModel):
    """A request that was carried out, without what it was about unless its wording names it.

    Attributes:
        names: Hashes of hidden names; ``lengths``: their words.
        sequence: Hashes of a trajectory's actions.
        environment: Hash of an environment's name.
        by: Who wrote the prompt: rules, or a role.
        reason: Why a role's reply was not used.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    type: Type
    created: str
    names: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    sequence: tuple[str, ...] = ()
    environment: str = ""
    prompt: Unlearning
    by: str = "rules"
    reason: str = ""


@dataclass(frozen=True)
class Forgotten:
    """What came of a request; no deletion if the memory held nothing of it."""

    entry: Entry
    deletion: Deletion | None
    certificate: Certificate | None


# ---- the agent


class Forgetful:
    """An agent with notes, that can be told to forget.

    Args:
        memory: Of notes, summaries and traces; the ledger lies in its folder.
        actor: Acts.
        converter: Writes prompts; None: fixed sentences.
    """

    def __init__(
        self, memory: Memory, actor: Role, options: SecureForgettingOptions | None = None,
        converter: Role | None = None,
    ) -> None:  # fmt: skip
        self.memory, self.actor, self.converter = memory, actor, converter
        self.options = options or SecureForgettingOptions()

    # ---- acting

    def solve(self, task: str, surroundings: Surroundings, *, learn: bool = True) -> Episode:
        """Works on a task with what it remembers.

        Args:
            learn: Note what is seen and done.
        """
        entries = self.entries()
        mask = self._mask(entries)
        fresh = self.memory.hashed(surroundings.name) in {one.environment for one in entries}
        recalled = [] if fresh else self.recalled(task, surroundings.name)
        told = [mask.without(one.text) for one in recalled]
        told = [surroundings.opening(), *(["Your notes:", *told] if told else [])]
        told[0] = mask.without(told[0])
        episode = act(
            self.actor, task, mask.wrapped(surroundings.tools()), self.options.budget,
            "\n".join(told), self.rules(entries),
        )  # fmt: skip
        if mask.names_any(episode.answer):
            last = Step(Action(answer=UNKNOWN), "")
            steps = (*episode.steps[:-1], last)
            episode = Episode(task, steps, UNKNOWN, episode.ended, episode.reason)
        if learn and not fresh:
            self._learn(episode, surroundings, recalled)
        return episode

    def recalled(self, task: str, environment: str) -> list[Item]:
        """Notes and summaries that fit a task, of one environment or of none."""
        count = self.options.notes
        look = self.memory.search_words if self.memory.encoder is None else self.memory.search
        found = [one for kind in (ENTRY, SUMMARY) for one in look(task, count, kind) if count]
        fitting = [one for one in found if one.item.source in ("", environment)]
        return [one.item for one in sorted(fitting, key=lambda one: -one.score)[:count]]

    def routine(self, name: str, actions: Iterable[Action], source: str = "") -> str:
        """Notes an order of actions by a name; returns its id."""
        done = list(actions)
        text = "\n".join([f"{name}:", *map(canonical, done)])
        data = {"actions": [one.model_dump(mode="json") for one in done]}
        item = Item(text=text, kind=ROUTINE, subject=name, source=source, data=data)  # type: ignore[arg-type]
        return self.memory.add([item])[0]

    def _learn(self, episode: Episode, surroundings: Surroundings, recalled: list[Item]) -> None:
        entries = self.entries()  # somebody may have asked to forget meanwhile
        mask = self._mask(entries)
        if self.memory.hashed(surroundings.name) in {one.environment for one in entries}:
            return
        there = {one.id for one in self.memory.items()}
        done = [one.action for one in episode.steps]
        trace = Item(
            text=episode.lines(), kind=TRACE, source=surroundings.name,
            data={"actions": [one.model_dump(mode="json") for one in done]},  # type: ignore[dict-item]
            parents=tuple(one.id for one in recalled),
        )  # fmt: skip
        noted = {near(one.text) for one in self.memory.items(ENTRY)}
        new = [one for one in surroundings.notes(episode) if near(one.text) not in noted]
        new += [trace] * (self.options.traces and there.issuperset(trace.parents))
        self.memory.add([
            one for one in new
            if not self.memory.knows_deleted(one.text) and not any(map(mask.names_any, one.says()))
        ])  # fmt: skip

    # ---- forgetting

    def entries(self) -> list[Entry]:
        """The ledger: what was asked to be forgotten, in order."""
        if not self._file.exists():
            return []
        return [Entry.model_validate(one) for one in read_json(self._file)]

    def rules(self, entries: Iterable[Entry] | None = None) -> str:
        """What the agent is told before every task; empty if nothing was forgotten."""
        chosen = list(self.entries() if entries is None else entries)
        if not self.options.prompted:
            return ""
        return composed([(one.type, one.prompt) for one in chosen], self.options.rules_tokens)

    def understood(self, words: str) -> Request:
        """A request in a user's words: what they name that the memory knows.

        Raises:
            DataError: They name nothing, or several things, that the memory knows.
        """
        items = self.memory.items()
        routines = {one.subject: one for one in items if one.kind == ROUTINE}
        named: dict[str, Type] = {one.source: "environment" for one in items if one.source}
        named |= {one.subject: "state" for one in items if one.subject}
        named |= dict.fromkeys(routines, "trajectory")
        found = [one for one in named if Names([one]).occur(words)]
        longest = [
            one
            for one in found
            if not any(one != other and Names([one]).occur(other) for other in found)
        ]
        if len(longest) != 1:
            shown = f": {', '.join(longest)}" if longest else ""
            raise DataError(
                f"{'nothing' if not longest else 'more than one thing'} that is remembered is named"
                f"{shown}.",
                where="a request to forget",
                hint="Name one place, routine or environment as the memory has it.",
            )
        name = longest[0]
        actions = routines[name].data["actions"] if named[name] == "trajectory" else []
        return Request.model_validate({"type": named[name], "target": name, "actions": actions})

    def forget(self, request: Request | str, card: str = "") -> Forgotten:
        """Carries a request out: the ledger first, so that a kill leaves nothing open; then memory.

        Args:
            request: Or a user's words.
            card: What the agent can do, for a converter.

        Raises:
            DataError: The words name nothing or several things.
        """
        asked = self.understood(request) if isinstance(request, str) else request
        prompt, by, reason = converted(
            asked, self.options.wording, self.options.prompt_tokens, self.converter, card
        )
        hashed = self.memory.hashed
        names, lengths = of_names(hashed, [asked.target] if asked.type == "state" else [])
        entry = Entry(
            id=uuid.uuid4().hex, type=asked.type, prompt=prompt, by=by, reason=reason,
            created=datetime.now(UTC).isoformat(timespec="seconds"), names=tuple(names),
            lengths=tuple(lengths), sequence=tuple(of_actions(hashed, asked.actions)),
            environment=hashed(asked.target) if asked.type == "environment" else "",
        )  # fmt: skip
        with self._changing():
            self._write([*self.entries(), entry])
        ids, subject = self._located(asked)
        way = self.options.memory
        if way == "keep" or not (ids or subject):
            return Forgotten(entry, None, None)
        descendants: Descendants = way
        deletion = self.memory.forget(ids=ids, subject=subject, descendants=descendants)
        return Forgotten(entry, deletion, self.memory.certificate(deletion))

    def lift(self, id_: str) -> None:
        """Takes a request's rule and mask back; what the memory lost is not brought back.

        Raises:
            DataError: There is no such request.
        """
        with self._changing():
            entries = self.entries()
            left = [one for one in entries if one.id != id_]
            if len(left) == len(entries):
                raise DataError(f"no request has the id '{id_}'.", where=str(self._file))
            self._write(left)

    def _located(self, request: Request) -> tuple[list[str], str | None]:
        """Ids of items of what is forgotten, and a name by which others are found."""
        items = [one for state in ("active", "quarantined") for one in self.memory.items(None, None,
                 state)]  # type: ignore[arg-type]  # fmt: skip
        if request.type == "environment":
            return [one.id for one in items if near(one.source) == near(request.target)
                    or (not one.source and _tells_of(one, request.target))], None  # fmt: skip
        if request.type == "trajectory":
            return [one.id for one in items if holds(_actions(one), request.actions)
                    or _tells_of(one, request.target)], None  # fmt: skip
        like = [] if self.memory.encoder is None else [
            one.item.id for one in self.memory.search(request.target, len(items))
            if one.score >= self.options.likeness
        ]  # fmt: skip
        names = Names([request.target])
        there = any(names.occur(text) for one in items for text in (*one.says(), one.subject))
        return like, request.target if there else None

    def _mask(self, entries: Iterable[Entry]) -> Mask:
        chosen = list(entries) if self.options.masked else []
        return Mask(
            self.memory.hashed,
            frozenset(name for one in chosen for name in one.names),
            frozenset(length for one in chosen for length in one.lengths),
            tuple(one.sequence for one in chosen if one.sequence),
        )

    def _changing(self) -> FileLock:
        """Two who write the ledger at once would lose a request."""
        return FileLock(self.memory.folder / LOCK)

    def _write(self, entries: Iterable[Entry]) -> None:
        write_json(self._file, [one.model_dump(mode="json") for one in entries])

    @property
    def _file(self) -> Path:
        return self.memory.folder / LEDGER


def _tells_of(item: Item, name: str) -> bool:
    """Whether an item is about a name, or a note or summary says it (a trace only does things)."""
    if not name:
        return False
    told = item.says() if item.kind in (ENTRY, SUMMARY) else ()
    return any(map(Names([name]).occur, (*told, item.subject)))


def _actions(item: Item) -> list[Action]:
    given = item.data.get("actions")
    return [Action.model_validate(one) for one in given] if isinstance(given, list) else []


__all__ = [
    "LEDGER", "ROUTINE", "TRACE", "UNKNOWN", "Entry", "Forgetful", "Forgotten", "Request",
    "SecureForgettingOptions",
]  # fmt: skip
