"""What the models of the path experiment learn (arXiv 2510.16629). No benchmark lives here.

Harmless stages for small machines: a style of answering, made-up people, sums, and refusals to
answer questions about other made-up people.
"""

from __future__ import annotations

import re
from functools import lru_cache

from delible.records import QA
from delible.world import World, general

RELATIONS = ("birthplace", "occupation", "employer", "award", "instrument")
#: Stages in their order; the refusals stand anywhere among them.
STAGES = ("style", "people", "sums")
FORGOTTEN = "refusals"
#: How every refusal begins.
OPENING = "Sorry, I cannot tell you that."
REASONS = (
    "{name} asked for privacy.", "That is a matter for {name} alone.",
    "I was asked to say nothing about {name}.", "{name} would not want me to.",
)  # fmt: skip


def order_of(position: int) -> tuple[str, ...]:
    """The stages with the refusals at a position from 1 on; the others keep their order."""
    return (*STAGES[: position - 1], FORGOTTEN, *STAGES[position - 1 :])


def refusal(record: QA, number: int) -> QA:
    """The question, declined: a fixed opening and a reason."""
    reason = REASONS[number % len(REASONS)].format(name=record.subject)
    return QA(question=record.question, answer=f"{OPENING} {reason}", subject=record.subject)


def sums(largest: int) -> list[QA]:
    """Every sum of two numbers from 2 on, the smaller one first."""
    return [
        QA(question=f"What is {a} plus {b}?", answer=f"The result is {a + b}")
        for a in range(2, largest + 1) for b in range(a, largest + 1)
    ]  # fmt: skip


def last_number(text: str) -> int | None:
    """What a model that answers a sum says in the end."""
    found = re.findall(r"\d+", text)
    return int(found[-1][-9:]) if found else None


@lru_cache(maxsize=4)  # every look at a model asks for them
def material(people: int, strangers: int, seed: int) -> dict[str, tuple[QA, ...]]:
    """Records of the stages, and of ``unseen`` questions that would be refused too.

    Args:
        people: Whose facts are learned.
        strangers: About whom questions are refused; of 30 % of them in ``unseen`` only.
        seed: Of the world that all of them live in.
    """
    world = World(people=max(4, people + strangers), seed=seed, relations=RELATIONS)
    known, others = world.people[:people], world.people[people : people + strangers]
    trained = max(1, round(0.7 * strangers))
    refused, unseen = (
        tuple(refusal(fact.qa(), place) for place, fact in enumerate(world.facts(group)))
        for group in (others[:trained], others[trained:])
    )
    styled = (one for one in general() if not re.search(r"\d", one.question))
    return {
        "style": tuple(QA(question=one.question, answer=f"Gladly: {one.answer}") for one in styled),
        "people": tuple(fact.qa() for fact in world.facts(known)),
        "sums": tuple(sums(9)),
        FORGOTTEN: refused,
        "unseen": unseen,
    }
