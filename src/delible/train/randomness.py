"""Random numbers by purpose: every choice takes a generator made from (seed, purpose, …)."""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, *purpose: object) -> torch.Generator:
    """A CPU generator that depends on the seed and the purpose only.

    The same arguments give the same numbers on every machine, whatever was drawn before.
    """
    described = "/".join(str(part) for part in (seed, *purpose))
    number = int.from_bytes(hashlib.sha256(described.encode()).digest()[:8], "big")
    return torch.Generator().manual_seed(number % (2**63))
