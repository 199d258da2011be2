"""Memento in numbers: held-out questions with and without memory; a person is forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from delible.acting.word_vectors import WordVectors
from delible.acting.world_policy import WAYS, Searcher, planner
from delible.acting.world_tasks import Question, Search, passages, questions, search_tool
from delible.agents.memento import Memento, MementoOptions
from delible.errors import RunError
from delible.memory import Item, Memory
from delible.names import Names
from delible.system.role import Role
from delible.systems.scripted import Scripted
from delible.world import World

RETRIEVALS = ("likeness", "learned")


@dataclass(frozen=True)
class Sizes:
    """How much one seed takes.

    Attributes:
        held_out: Share of the questions that it never learns from.
        passes: Times that it goes through the others.
    """

    people: int = 6
    relations: int = 5
    held_out: float = 0.3
    passes: int = 2


@dataclass(frozen=True)
class Asked:
    """A world's questions: learned from and not, and whom it is told to forget."""

    world: World
    all: Sequence[Question]
    learned: Sequence[Question]
    held_out: Sequence[Question]
    subject: str

    @classmethod
    def of(cls, seed: int, sizes: Sizes) -> Asked:
        world = World(people=sizes.people, seed=seed, relations=sizes.relations)
        every = questions(world)
        order = np.random.default_rng(seed).permutation(len(every))
        out = {int(one) for one in order[: round(sizes.held_out * len(every))]}
        learned = [one for place, one in enumerate(every) if place not in out]
        return cls(
            world, every, [learned[int(one)] for one in np.random.default_rng(seed).permutation(
                len(learned))], [every[place] for place in sorted(out)], learned[0].subject,
        )  # fmt: skip


def agent(folder: Path, asked: Asked, **options: Any) -> Memento:
    library = Memory(folder / "library")
    library.add(passages(asked.world))
    return MementoOptions(**options).agent(
        Memory(folder / "bank", WordVectors()), Role("planner", Scripted(planner)),
        Role("writer", Scripted(Searcher(asked.all))), [search_tool(library)],
    )  # fmt: skip


def lived(folder: Path, asked: Asked, passes: int, without: str = "") -> Memento:
    """An agent that learned from all questions but those about somebody."""
    made = agent(folder, asked)
    for _ in range(passes):
        for one in asked.learned:
            if one.subject != without:
                made.solve(one.text, one.subject, one.reward)
    return made


def answered(made: Memento, asked: Sequence[Question], names: Names) -> dict[str, Any]:
    """Answers without learning; how often they are right; what of a person was retrieved, shown."""
    before, answers, retrieved, shown = len(prompts(made)), [], list[Item](), 0
    for one in asked:
        retrieved += made.retrieve(one.text)
        answers.append(made.solve(one.text).answer)
    for prompt in prompts(made)[before:]:
        told = prompt.messages[-1].text.partition("Question: ")[0]  # the cases alone
        shown += names.occur(told)
    about = sum(any(map(names.occur, (*one.says(), one.subject))) for one in retrieved)
    return {
        "answers": answers, "success": share([one.reward(a) for one, a in zip(asked, answers,
                                                                               strict=True)]),
        "retrieved": about / max(len(retrieved), 1), "shown": shown / max(len(asked), 1),
    }  # fmt: skip


def prompts(made: Memento) -> list[Any]:
    system = made.planner.system
    assert isinstance(system, Scripted)
    return system.prompts


def share(values: Sequence[int]) -> float:
    return sum(values) / len(values)


def ceiling(made: Memento, asked: Sequence[Question]) -> float:
    """Share of questions to which any of the ways leads."""
    tool, found = made.tools[0], []
    for one in asked:
        value = (one.record.aliases or (one.record.answer,))[0]
        queries = (one.subject, one.text, one.text.replace(one.subject, ""))
        assert len(queries) == len(WAYS)
        found.append(int(any(value in tool.use(Search(query=query)) for query in queries)))
    return share(found)


def apart(one: Memento, other: Memento) -> float:
    """The largest difference of a weight of two scorers that were trained now."""
    first, second = one.retrain(), other.retrain()
    assert first is not None
    assert second is not None
    pairs = zip(first.network.parameters(), second.network.parameters(), strict=True)
    return max(float((mine - its).detach().abs().max()) for mine, its in pairs)


def run(seed: int, folder: Path, sizes: Sizes = Sizes()) -> dict[str, Any]:
    """One world: learning, the same with a person forgotten, and without ever having met them."""
    asked = Asked.of(seed, sizes)
    names = Names([asked.subject])
    theirs = [one for one in asked.all if one.subject == asked.subject]
    others = [one for one in asked.all if one.subject != asked.subject]
    bare = agent(folder / "bare", asked, cases=0)
    made = lived(folder / "made", asked, sizes.passes)
    never = lived(folder / "never", asked, sizes.passes, without=asked.subject)
    found: dict[str, Any] = {
        "questions": len(asked.all), "held_out": len(asked.held_out),
        "ceiling": ceiling(bare, asked.held_out),
        "without": answered(bare, asked.held_out, names)["success"],
        "cases": sum(one.kind == "case" for one in made.memory.items()),
        "ways": {},
    }  # fmt: skip
    parts = {"theirs": theirs, "others": others}
    for way in RETRIEVALS:
        for one in (made, never):
            one.options = MementoOptions(retrieval=way)  # type: ignore[arg-type]
            one.retrain()
        found["ways"][way] = {
            "held_out": answered(made, asked.held_out, names)["success"],
            "before": {name: answered(made, part, names) for name, part in parts.items()},
            "never": {name: answered(never, part, names) for name, part in parts.items()},
        }
    before = len(made.memory)
    deletion = made.forget(subject=asked.subject)
    found["verdict"] = made.memory.certificate(deletion).verdict
    found["deleted"] = before - len(made.memory)
    try:
        made.retrieve(theirs[0].text)
        found["stale"] = False
    except RunError:
        found["stale"] = True
    rest = Memory(folder / "rest", WordVectors())
    rest.add(made.memory.items())
    copy = MementoOptions().agent(rest, made.planner, made.executor, made.tools)
    found["scorers_apart"] = apart(made, copy)
    for way in RETRIEVALS:
        made.options = MementoOptions(retrieval=way)  # type: ignore[arg-type]
        found["ways"][way]["after"] = {n: answered(made, part, names) for n, part in parts.items()}
    old = next(one for one in asked.learned if one.subject == asked.subject)
    new = [one for one in asked.held_out if one.subject == asked.subject]
    for name, some in (("learned_again", [old]), ("learned_anew", new[:1])):
        cases = [made.solve(one.text, one.subject, one.reward).case for one in some]
        found[name] = [one is not None for one in cases]
    return {**found, "ways": {way: _short(one) for way, one in found["ways"].items()}}


def _short(found: dict[str, Any]) -> dict[str, Any]:
    """Without answers: how many are those of the agent that never learned."""
    same = {
        part: share([int(a == b) for a, b in zip(found["after"][part]["answers"],
                                                 found["never"][part]["answers"], strict=True)])
        for part in found["after"]
    }  # fmt: skip
    times = ("before", "after", "never")
    kept = {
        time: {part: {key: value for key, value in one.items() if key != "answers"}
               for part, one in found[time].items()}
        for time in times
    }  # fmt: skip
    return {"held_out": found["held_out"], "same": same, **kept}
