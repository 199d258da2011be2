"""What an audit found, as data: ``metrics.json`` is this model, ``items.parquet`` its rows."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

#: The three systems an audit compares; only ``unlearned`` is always there.
SystemRole = Literal["unlearned", "original", "reference"]

Verdict = Literal[
    "incomplete", "destructive", "suppression", "removal-consistent", "undetermined"
]  # fmt: skip


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid")


class SystemInfo(_Data):
    """One audited system."""

    name: str
    capabilities: list[str]
    fingerprint: str | None = None


class Measurement(_Data):
    """One number of the long table.

    Attributes:
        attack: Name of the attack, ``"none"`` for the plain question.
        variant: Setting of the attack ("4 bit", "LoRA, unrelated rows, 20 steps"), "" if one.
        low: Lower end of the 95 % bootstrap interval over records.
        n: Records that were averaged.
        skipped: Records without a value (``reason`` says why).
    """

    system: SystemRole
    attack: str = "none"
    variant: str = ""
    split: str
    metric: str
    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0
    skipped: int = 0
    reason: str | None = None


class Leak(_Data):
    """One row of the attack x leak matrix.

    Attributes:
        knowledge: Knowledge score per system, larger = more is known, by leak measure:
            ``knowledge[measure][system]``.
        erased: e in [0, 1] of the unlearned system per leak measure; 0 = all of the original's
            knowledge is there, 1 = no more than in the reference. ``None`` = cannot be said.
        retain: The same knowledge scores on the retain split (did the attack break the model?).
    """

    attack: str
    variant: str = ""
    title: str
    knowledge: dict[str, dict[SystemRole, float | None]]
    erased: dict[str, float | None]
    retain: dict[str, dict[SystemRole, float | None]] = Field(default_factory=dict)
    cost_seconds: float | None = None
    note: str | None = None


class Example(_Data):
    """One question with every system's answer."""

    split: str
    question: str
    expected: str
    answers: dict[SystemRole, str]
    outcomes: dict[SystemRole, str] = Field(default_factory=dict)


class VerdictResult(_Data):
    """The verdict of the removal-or-suppression battery, with its reasons."""

    label: Verdict
    reasons: list[str]
    thresholds: dict[str, float]
    without_reference: bool = False


class Curve(_Data):
    """A knowledge score over the steps of an attack, for each system."""

    attack: str
    variant: str = ""
    metric: str
    steps: list[int]
    values: dict[SystemRole, list[float | None]]


class AuditResult(_Data):
    """Everything an audit found.

    Attributes:
        splits: Records per split.
        summaries: Named numbers per system (model utility, forget quality, …).
        outcomes: Share of each outcome class per system and split:
            ``outcomes[system][split][class]`` with the classes correct, refusal,
            wrong-but-fluent and garbage.
        not_tested: What this audit does not show, in plain sentences.
    """

    systems: dict[SystemRole, SystemInfo]
    splits: dict[str, int]
    measurements: list[Measurement]
    summaries: dict[SystemRole, dict[str, float | None]] = Field(default_factory=dict)
    outcomes: dict[SystemRole, dict[str, dict[str, float]]] = Field(default_factory=dict)
    leaks: list[Leak] = Field(default_factory=list)
    verdict: VerdictResult | None = None
    curves: list[Curve] = Field(default_factory=list)
    examples: list[Example] = Field(default_factory=list)
    not_tested: list[str] = Field(default_factory=list)
    seconds: float = 0.0
    measured: dict[str, int] = Field(default_factory=dict)
