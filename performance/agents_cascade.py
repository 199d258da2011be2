"""Cascades in numbers: a student, its teacher, both together, and a thing that is forgotten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from delible.acting.cost import Usage
from delible.acting.loop import Budget
from delible.acting.town import SOLD, Goal, Town, Visit
from delible.acting.town_teaching import Student, Teacher
from delible.acting.word_vectors import WordVectors
from delible.agents.icd_cascade import Cascade, IcdCascadeOptions, Solved
from delible.memory import DEMONSTRATION, Memory
from delible.names import Names
from delible.system.role import Role, RoleOptions

SUBJECT = "nails"
BUDGET = Budget(steps=40, tokens=40 * 64, step_tokens=64)


@dataclass(frozen=True)
class Sizes:
    """How much one seed takes.

    Attributes:
        shown: Goals that are demonstrated.
        asked: Other goals.
        slips: Share of the student's samples that are another action.
    """

    shown: int = 16
    asked: int = 15
    slips: float = 0.08
    samples: int = 3
    demonstrations: int = 6


def goals(town: Town, seed: int, sizes: Sizes) -> tuple[list[Goal], list[Goal]]:
    """To demonstrate, and to ask: none is both, and one at least is about what is forgotten."""
    names = [one.name for one in town.places]
    bring = [Goal(thing, name) for name in names for thing in SOLD.values()]
    drawn = [bring[int(one)] for one in np.random.default_rng(seed).permutation(len(bring))]
    easy = [Goal(place=one) for one in names] + [Goal(one) for one in SOLD.values()]
    left = easy + drawn[sizes.shown :]
    order = np.random.default_rng(seed).permutation(len(left))
    asked = [Goal(SUBJECT), *(left[int(one)] for one in order if left[int(one)] != Goal(SUBJECT))]
    return drawn[: sizes.shown], asked[: sizes.asked]


def cascade(
    folder: Path, student: Student, teacher: Teacher | None, sizes: Sizes, **options: Any
) -> Cascade:
    once = RoleOptions(attempts=1)
    settings = IcdCascadeOptions(**{
        "budget": BUDGET, "alarm": 1.0, "samples": sizes.samples,
        "demonstrations": sizes.demonstrations, **options,
    })  # fmt: skip
    above = Role("writer", teacher, once) if teacher else None
    return settings.agent(Memory(folder, WordVectors()), Role("planner", student, once), above)


def taught(agent: Cascade, town: Town, shown: Sequence[Goal]) -> Usage:
    """Tokens of the teacher for its demonstrations."""
    spent = Usage()
    for goal in shown:
        visit = Visit(town)
        solved, _ = agent.demonstrate(
            goal.text, visit, lambda _, v=visit, g=goal: v.reached(g), subject=goal.thing
        )
        spent += solved.teacher
    return spent


def tried(agent: Cascade, town: Town, asked: Sequence[Goal]) -> dict[str, Any]:
    """Which goals are reached, what was done, who decided, and tokens of all of it."""
    reached, by, student, teacher = list[bool](), list[str](), Usage(), Usage()
    done = list[Solved]()
    for goal in asked:
        visit = Visit(town)
        done.append(agent.solve(goal.text, visit))
        reached.append(visit.reached(goal))
        by += [one.by for one in done[-1].decisions]
        student, teacher = student + done[-1].student, teacher + done[-1].teacher
    return {
        "reached": reached, "escalated": by.count("teacher") / len(by), "episodes": len(asked),
        "student": tokens(student), "teacher": tokens(teacher), "done": done,
    }  # fmt: skip


def tokens(used: Usage) -> dict[str, int]:
    """What is billed of some calls; a prompt that was the one before is not paid again."""
    return {"in": used.input_tokens - used.repeated_tokens, "out": used.output_tokens}


def run(seed: int, folder: Path, sizes: Sizes = Sizes()) -> dict[str, Any]:
    """One town: alone, shown, together, with more samples and demonstrations; then without some."""
    town = Town.made(seed, width=6, height=6, each=2)
    shown, asked = goals(town, seed, sizes)
    teacher = Teacher(town)

    def made(name: str, **options: Any) -> Cascade:
        return cascade(folder / name, Student(sizes.slips), teacher, sizes, **options)

    both = made("both")
    demonstrations = taught(both, town, shown)
    ways = {
        "student": made("bare", demonstrations=0, samples=1),
        "shown": made("both", samples=1), "cascade": both,
        "larger": made("both", samples=sizes.samples + 2, demonstrations=2 * sizes.demonstrations),
    }  # fmt: skip
    found = {name: tried(agent, town, asked) for name, agent in ways.items()}
    alone = Role("planner", teacher, RoleOptions(attempts=1))
    only = IcdCascadeOptions(budget=BUDGET, samples=1, demonstrations=0).agent(
        Memory(folder / "teacher", WordVectors()), alone
    )
    found["teacher"] = tried(only, town, asked)
    found["teacher"] |= {"student": tokens(Usage()), "teacher": found["teacher"]["student"]}
    others = [n for n, one in enumerate(asked) if not about(town, one)]
    kept = [asked[n] for n in others]
    before = {one.key for one in both.memory.items(DEMONSTRATION)}
    deletion = both.forget(subject=SUBJECT)
    left = {one.key for one in both.memory.items(DEMONSTRATION)}
    never = made("never")
    taught(never, town, [one for one in shown if one.text in left])
    after, reference = tried(both, town, kept), tried(never, town, kept)
    theirs = [one for one in asked if about(town, one)]
    lost, unknown = tried(both, town, theirs), tried(never, town, theirs)
    had = found["cascade"]["reached"]
    return {
        "demonstrations": {"count": len(before), **tokens(demonstrations)},
        "ways": {name: _short(one) for name, one in found.items()},
        "forgotten": {
            "verdict": both.memory.certificate(deletion).verdict,
            "demonstrations": len(before) - len(left),
            "retrieved": about_retrieved(both, theirs),
            "others": len(kept), "theirs": len(theirs),
            "before": {"others": share([had[n] for n in others]),
                       "theirs": share([had[n] for n in range(len(asked)) if n not in others])},
            "after": {"others": share(after["reached"]), "theirs": share(lost["reached"])},
            "never": {"others": share(reference["reached"]), "theirs": share(unknown["reached"])},
            "escalated": {"before": found["cascade"]["escalated"], "after": after["escalated"]},
            "same": share([
                a.episode == b.episode
                for a, b in zip([*after["done"], *lost["done"]],
                                [*reference["done"], *unknown["done"]], strict=True)
            ]),
        },
    }  # fmt: skip


def about(town: Town, goal: Goal) -> bool:
    """Whether a goal is about the thing that is forgotten, or a place that sells it."""
    place = town.named(goal.place)
    return goal.thing == SUBJECT or (place is not None and place.sells == SUBJECT)


def about_retrieved(agent: Cascade, asked: Sequence[Goal]) -> float:
    """Share of retrieved snippets in which the forgotten thing is named."""
    names, found = Names([SUBJECT]), list[bool]()
    for goal in (*(one.text for one in asked), f"Where are {SUBJECT} sold?"):
        for one in agent.retrieved(goal, "", "You are at 0,0."):
            found.append(names.occur("\n".join((one.goal, *one.steps))))
    return share(found)


def share(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None


def _short(found: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: found[key] for key in ("escalated", "episodes", "student", "teacher")}
    return {"success": share(found["reached"]), **kept}
