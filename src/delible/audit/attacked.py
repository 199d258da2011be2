"""What attacks found on a system, kept from one audit to the next.

The key holds everything that the kept content depends on: weights, attack, seed, every record
that was trained on or asked, the metrics, and the original where the attack notes a comparison
with it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from delible import kept
from delible.measure.attack import Attack, AttackContext
from delible.measure.cache import Cache
from delible.measure.metric import ItemMetric, SystemValues
from delible.records import RecordBase, digest

#: Raised when what is kept has another form or another meaning.
VERSION = 5


@dataclass(frozen=True)
class Attacked:
    """What one attack found on one system.

    Attributes:
        curve: Knowledge by step of an attack that takes steps, or by layer.
        numbers: Findings for the whole system.
        tokens: Read of the system from the inside.
    """

    values: SystemValues
    curve: list[tuple[int, float | None]]
    notes: dict[str, Any]
    numbers: dict[str, float | None] = field(default_factory=dict)
    tokens: int = 0


def attacked_key(
    fingerprint: str,
    attack: Attack,
    context: AttackContext,
    splits: Mapping[str, Sequence[RecordBase]],
    metrics: Sequence[ItemMetric],
) -> str:
    """Name of what an attack on weights found.

    Args:
        fingerprint: Of the attacked system.
        splits: What is asked after the attack.
    """
    original, reference = context.original, context.reference
    return _digest(
        {
            "fingerprint": fingerprint,
            "original": original.fingerprint if original is not None else None,
            "reference": reference.fingerprint if reference is not None else None,
            "attack": attack.spec(),
            "seed": context.seed,
            "splits": {name: digest(records) for name, records in splits.items()},
            "forget": digest(context.forget),
            "retain": digest(context.retain),
            "metrics": [metric.spec() for metric in metrics],
        }
    )


def preparation_key(fingerprint: str, attack: Attack, context: AttackContext) -> str:
    """Name of what a prompt attack's search found on a system."""
    return _digest(
        {
            "prepared on": fingerprint,
            "attack": attack.spec(),
            "seed": context.seed,
            "forget": digest(context.forget),
            "retain": digest(context.retain),
            "roles": context.roles.named(),
        }
    )


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps({"version": VERSION, **content}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class Kept:
    """Files of what attacks found; without a cache only this audit's searches are remembered."""

    def __init__(self, cache: Cache | None) -> None:
        self.cache = cache
        self._known: dict[str, dict[str, Any]] = {}

    def alone(self, key: str | None) -> AbstractContextManager[object]:
        """While it is open no other audit makes what a key stands for: it waits."""
        if key is None or self.cache is None or not self.cache.writes:
            return nullcontext()
        return kept.alone(self._place(self.cache, key), required=False)

    def attacked(self, key: str) -> Attacked | None:
        """What is known under a key."""
        content = self._read(key)
        if content is None:
            return None
        curve = [(int(step), value) for step, value in content["curve"]]
        values = SystemValues.from_json(content["values"])
        return Attacked(values, curve, content["notes"], content["numbers"], content["tokens"])

    def keep_attacked(self, key: str, found: Attacked) -> None:
        """Keeps it for later audits."""
        content = {
            "values": found.values.as_json(), "curve": found.curve, "notes": found.notes,
            "numbers": found.numbers, "tokens": found.tokens,
        }  # fmt: skip
        self._write(key, content)

    def preparation(self, key: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """A prepared attack's spec and its notes."""
        content = self._known.get(key) or self._read(key)
        if content is None:
            return None
        self._known[key] = content
        return content["prepared"], content["notes"]

    def keep_preparation(self, key: str, prepared: Attack, notes: Mapping[str, Any]) -> None:
        """Keeps it for the other systems and for later audits."""
        self._known[key] = {"prepared": prepared.spec(), "notes": dict(notes)}
        self._write(key, self._known[key])

    def _read(self, key: str) -> dict[str, Any] | None:
        if self.cache is None:
            return None
        try:
            content = json.loads(self._place(self.cache, key).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None  # not there, or half of it: it is made again
        return content if isinstance(content, dict) else None

    @staticmethod
    def _place(cache: Cache, key: str) -> Path:
        return cache.folder / "attacks" / f"{key}.json"

    def _write(self, key: str, content: Mapping[str, Any]) -> None:
        if self.cache is not None:
            self.cache.write_json(f"attacks/{key}.json", dict(content))
