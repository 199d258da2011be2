"""Random numbers by purpose: every choice takes a generator made from (seed, purpose, …)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

import torch

_Item = TypeVar("_Item")


def generator(seed: int, *purpose: object) -> torch.Generator:
    """A CPU generator that depends on the seed and the purpose only.

    The same arguments give the same numbers on every machine, whatever was drawn before.
    """
    described = "/".join(str(part) for part in (seed, *purpose))
    number = int.from_bytes(hashlib.sha256(described.encode()).digest()[:8], "big")
    return torch.Generator().manual_seed(number % (2**63))


def shuffled(items: Sequence[_Item], generator: torch.Generator) -> list[_Item]:
    """All items in random order; ``range(count)`` gives a permutation of indices."""
    order = torch.randperm(len(items), generator=generator).tolist()
    return [items[place] for place in order]
