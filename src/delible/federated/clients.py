"""Whose records are whose: as the records say, or dealt out.

Every record may name its client. Where none does, the records of a request are dealt: what is to
be forgotten lies at one client, what is kept in parts at all of them.

    contiguous   in order, in parts that differ by one at most (the paper's unlearning phase)
    shuffled     the same after a shuffle (the paper's learning phase: identically distributed)
    subjects     subject by subject, with shares of the clients from a Dirichlet distribution

Reference code: fyzhang1/Oblivionis. Deviation: dealing by subjects, which it does not have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from pydantic import Field

from delible.component import Config
from delible.errors import DataError, RecipeError
from delible.federated.messages import Holding
from delible.records import ForgetRequest, Record
from delible.train.randomness import generator, shuffled

Deal = Literal["records", "contiguous", "shuffled", "subjects"]


@dataclass(frozen=True)
class Held:
    """A client's records."""

    forget: tuple[Record, ...] = ()
    retain: tuple[Record, ...] = ()

    @property
    def holding(self) -> Holding:
        return Holding(len(self.forget), len(self.retain))


class Dealing(Config):
    """Whose records are whose."""

    deal: Deal = Field(
        "records", description="How records come to clients: as the field 'client' of the "
        "'records' says; or dealt out: 'contiguous', 'shuffled', by 'subjects'.",
    )  # fmt: skip
    clients: int = Field(3, ge=1, description="Dealt out: how many clients.")
    target: int = Field(0, ge=0, description="Dealt out: which client holds the forget records.")
    level: Literal["sample", "client"] = Field(
        "sample", description="Dealt out: the client that asks keeps a part of what is kept "
        "('sample'), or holds the forget records alone ('client').",
    )  # fmt: skip
    concentration: float = Field(
        0.5, gt=0, description="Of the Dirichlet distribution: the smaller, the less alike are "
        "the clients.",
    )  # fmt: skip

    def of(self, request: ForgetRequest, seed: int) -> dict[str, Held]:
        """The clients by name.

        Raises:
            DataError: Records do not say whose they are, or are too few.
            RecipeError: The options do not fit together.
        """
        kept = (*request.retain, *request.neighbours)
        if self.deal == "records":
            return by_record(request.forget, kept)
        if self.target >= self.clients:
            raise RecipeError(
                f"there is no client {self.target} among {self.clients}, counted from 0.",
                where="target",
            )
        if self.level == "client" and self.clients < 2:
            raise RecipeError("a client that is forgotten wholly leaves nobody behind.",
                              where="level 'client'", hint="Choose more --clients.")  # fmt: skip
        names = [f"client-{number}" for number in range(self.clients)]
        holders = [name for number, name in enumerate(names)
                   if self.level == "sample" or number != self.target]  # fmt: skip
        parts = self._parts(kept, len(holders), seed)
        found = {name: Held(retain=tuple(part)) for name, part in zip(holders, parts, strict=True)}
        asking = names[self.target]
        found[asking] = Held(request.forget, found.get(asking, Held()).retain)
        return {name: found[name] for name in names}

    def _parts(self, kept: Sequence[Record], count: int, seed: int) -> list[list[Record]]:
        if len(kept) < count:
            raise DataError(
                f"{len(kept)} records to keep are too few for {count} clients.",
                hint="Give more --retain records, or fewer --clients.",
            )
        if self.deal == "subjects":
            return by_subject(kept, count, self.concentration, seed)
        random = generator(seed, "clients", "shuffled")
        return in_parts(shuffled(kept, random) if self.deal == "shuffled" else kept, count)


def by_record(forget: Sequence[Record], kept: Sequence[Record]) -> dict[str, Held]:
    """Every record at the client that it names.

    Raises:
        DataError: Some name none.
    """
    every = (*forget, *kept)
    nobodys = [record for record in every if record.client is None]
    if nobodys:
        raise DataError(
            f"{len(nobodys)} of {len(every)} records do not say whose they are.",
            where=nobodys[0].where or None,
            hint="Give each record a field 'client', or have them dealt out: --deal contiguous, "
            "shuffled or subjects, with --clients N.",
        )
    found: dict[str, tuple[list[Record], list[Record]]] = {}
    for place, records in enumerate((forget, kept)):
        for record in records:
            found.setdefault(str(record.client), ([], []))[place].append(record)
    return {name: Held(tuple(gone), tuple(rest)) for name, (gone, rest) in sorted(found.items())}


def in_parts(records: Sequence[Record], count: int) -> list[list[Record]]:
    """Contiguous parts that differ by one record at most, the larger ones first."""
    size, more = divmod(len(records), count)
    ends = [size * part + min(part, more) for part in range(count + 1)]
    return [list(records[start:end]) for start, end in pairwise(ends)]


def by_subject(
    records: Sequence[Record], count: int, concentration: float, seed: int
) -> list[list[Record]]:
    """All of a subject at one client: the first ones one each, the others by drawn shares.

    Raises:
        DataError: Records without a subject, or fewer subjects than clients.
    """
    nameless = [record for record in records if record.subject is None]
    if nameless:
        raise DataError(
            f"{len(nameless)} of {len(records)} records to keep have no subject.",
            where=nameless[0].where or None, hint="Choose --deal shuffled.",
        )  # fmt: skip
    subjects: dict[str, list[Record]] = {}
    for record in records:
        subjects.setdefault(str(record.subject), []).append(record)
    if len(subjects) < count:
        raise DataError(
            f"{len(subjects)} subjects are too few for {count} clients.",
            hint="Choose fewer --clients, or --deal shuffled.",
        )
    numbers = np.random.default_rng(generator(seed, "clients", "subjects").initial_seed())
    shares = numbers.dirichlet([concentration] * count)
    parts: list[list[Record]] = [[] for _ in range(count)]
    order = shuffled(list(subjects), generator(seed, "clients", "order"))
    for place, subject in enumerate(order):
        at = place if place < count else int(numbers.choice(count, p=shares))
        parts[at] += subjects[subject]
    return parts


def holdings(clients: Mapping[str, Held]) -> dict[str, Holding]:
    """What each client holds, in numbers."""
    return {name: held.holding for name, held in clients.items()}
