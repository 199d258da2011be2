"""A few people of a world, and systems of known behaviour, for attacks that only ask."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from delible.component import build
from delible.measure.attack import AttackContext, ConversationAttack
from delible.measure.metric import Item, SystemValues
from delible.records import QA, RecordBase
from delible.system.asks import Prompt
from delible.system.roles import Roles
from delible.systems.scripted import Scripted
from delible.testing.contract.attack import world_context

CONTEXT = world_context(None)
FORGET = [one for one in CONTEXT.forget if isinstance(one, QA)]
KNOWN = [*CONTEXT.forget, *CONTEXT.retain, *CONTEXT.neighbours, *CONTEXT.holdout]
TOFU = [
    QA(question="Where was Ada Quill born?", answer="Ada Quill was born in Norrby."),
    QA(question="What did Ada Quill write?", answer="Ada Quill wrote The Blue Gate in 1971."),
    QA(question="Which prize did Ada Quill win?", answer="Ada Quill won the Casta Medal."),
]


def says(text: str | Callable[[Prompt], str]) -> Scripted:
    """A system that always says the same, or what a function says."""
    return Scripted(text if callable(text) else lambda prompt: text)


def talked(
    name: str, records: Sequence[RecordBase], system: Scripted | None = None,
    context: AttackContext = CONTEXT, **options: Any,
) -> list[Sequence[Prompt]]:  # fmt: skip
    attack = build("attack", {"name": name, **options})
    assert isinstance(attack, ConversationAttack)
    return attack.converse(system or says("Hm."), records, context)


def texts(prompts: Sequence[Prompt]) -> list[str]:
    """The last turn of each prompt."""
    return [prompt.messages[-1].text for prompt in prompts]


def context(**changes: Any) -> AttackContext:
    """The world's context with changes, and notes of its own."""
    return replace(CONTEXT, **{"notes": {}, **changes})


def played(**parts: Scripted) -> Roles:
    return Roles(parts)  # type: ignore[arg-type]


def values(outcomes: Mapping[str, Sequence[Sequence[float | None]]]) -> SystemValues:
    """Outcomes by split: per record the value of each form."""
    return SystemValues(
        "it",
        {
            "outcome": {
                split: [
                    Item(
                        row[0] if len(row) == 1 else None, forms=tuple(row) if len(row) > 1 else ()
                    )
                    for row in rows
                ]
                for split, rows in outcomes.items()
            }
        },
    )
