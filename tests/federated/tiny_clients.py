"""Clients with a few made-up people each, and a tiny model that wears an adapter."""

from __future__ import annotations

from functools import cache
from typing import Any

from delible.federated import adapter as adapters
from delible.federated.clients import Held
from delible.federated.federation import Federation, Run
from delible.federated.in_process import InProcess
from delible.federated.starting import dressed
from delible.lm.lm import LM
from delible.records import QA
from delible.testing import tiny_model, tiny_tokenizer

#: Short runs of a model of hidden size 32, whose learning rates are 18 times as high.
QUICK: dict[str, Any] = {"epochs": 1, "batch_size": 4, "learning_rate": 5e-4, "rank": 4}


@cache
def _plain() -> LM:
    return LM(tiny_model(), tiny_tokenizer(), name="tiny", precision="float32")


def plain() -> LM:
    return _plain().copy()


def worn(rank: int = 4, seed: int = 0) -> LM:
    lm = plain()
    dressed(lm, rank, 16.0, seed)
    return lm


def fact(number: int, client: str | None = None) -> QA:
    return QA(question=f"Who is {number}?", answer=f"It is {number * 7} b",
              subject=f"s{number}", client=client)  # fmt: skip


def held(clients: int = 3, each: int = 4, forget: int = 2) -> dict[str, Held]:
    """The first of them asks to be forgotten, as far as some of its records go."""
    names = "abcdefgh"[:clients]
    found = {
        name: Held(retain=tuple(fact(10 + place * each + n) for n in range(each)))
        for place, name in enumerate(names)
    }
    return {**found, "a": Held(tuple(fact(n) for n in range(forget)), found["a"].retain)}


def run(lm: LM, clients: dict[str, Held], seed: int = 0, **options: Any) -> Run:
    return Run(InProcess(lm, clients), Federation(**{**QUICK, **options}), seed)


def values(lm: LM) -> dict[str, Any]:
    return adapters.read(lm)
