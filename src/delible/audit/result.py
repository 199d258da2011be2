"""What an audit found, as data: ``metrics.json`` is this model, ``items.parquet`` its rows."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from delible.cards import Depth

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


class FormLeak(_Data):
    """What one of the forms leaks in which an attack asks a question.

    Attributes:
        form: Its place among the attack's forms, from 1.
    """

    form: int
    measure: str
    erased: float
    low: float | None = None
    high: float | None = None


class SubjectLeak(_Data):
    """What is left about one subject, of those with several comparable records.

    Attributes:
        records: Records about it on which the original has a clear lead.
        untouched: How many of them were left as they were.
        chance: Probability that luck alone finds so many, for the worst of all subjects.
    """

    subject: str
    measure: str
    erased: float
    records: int
    untouched: int
    chance: float


class FactsLeft(_Data):
    """Facts that were left as they were; a mean over all facts hides them.

    Attributes:
        count: Records where the unlearned system has nearly all of the original's lead.
        comparable: Records where the original has a clear lead.
        guessed: Share of records that a model which never saw them knows as well, by luck.
        chance: Probability that luck alone finds so many.
        questions: Some of them.
    """

    measure: str
    count: int
    comparable: int
    guessed: float
    chance: float
    questions: list[str] = Field(default_factory=list)


class Leak(_Data):
    """One row of the attack x leak matrix.

    Attributes:
        attack: Name of the attack; "none" for the plain question, "without_part" where a part
            that can be taken away was taken away.
        family: Kind of attack (prompt, relearning, quantization, …).
        knowledge: Knowledge score per system, larger = more is known, by leak measure:
            ``knowledge[measure][system]``. Where an attack has several forms of a question, the
            form that brings out most counts for each record. All on the same records.
        erased: e in [0, 1] of the unlearned system per leak measure; 0 = all of the original's
            knowledge is there, 1 = no more than in the reference. ``None`` = cannot be said.
        intervals: 95 % interval of e, by measure.
        no_power: Why there is no e, by measure.
        forms: e of each form of the question, the lowest first; empty where there is one form.
        subjects: By each measure the subject that is forgotten least (lowest e first), and the
            one whose untouched facts luck explains least.
        facts: By each measure the facts that were left as they were.
        retain: The same knowledge scores on the retain split (did the attack break the model?).
        records: Forget records that were compared.
        control: The attack is only a control: what it does not find says nothing.
        weighs: What it finds decides the verdict; otherwise it is told beside it.
        numbers: Findings for whole systems, ``numbers[name][system]``.
        cost_queries: Questions to the unlearned system.
        cost_steps: Steps of training or search on it.
        cost_tokens: Tokens trained on, read from the inside, or asked for beside the answers.
        recovered: Questions that brought out what a plain one did not, with the answers.
    """

    attack: str
    variant: str = ""
    title: str
    family: str = ""
    knowledge: dict[str, dict[SystemRole, float | None]]
    erased: dict[str, float | None]
    intervals: dict[str, tuple[float, float]] = Field(default_factory=dict)
    no_power: dict[str, str] = Field(default_factory=dict)
    forms: list[FormLeak] = Field(default_factory=list)
    subjects: list[SubjectLeak] = Field(default_factory=list)
    facts: list[FactsLeft] = Field(default_factory=list)
    retain: dict[str, dict[SystemRole, float | None]] = Field(default_factory=dict)
    records: int = 0
    control: bool = False
    weighs: bool = True
    numbers: dict[str, dict[SystemRole, float | None]] = Field(default_factory=dict)
    cost_seconds: float | None = None
    cost_queries: int = 0
    cost_steps: int = 0
    cost_tokens: int = 0
    recovered: list[Recovered] = Field(default_factory=list)
    note: str | None = None

    @property
    def name(self) -> str:
        """Title and variant."""
        return f"{self.title} ({self.variant})" if self.variant else self.title

    @property
    def worst_form(self) -> FormLeak | None:
        """The form of the question that leaks most."""
        return next(iter(self.forms), None)

    @property
    def worst_subject(self) -> SubjectLeak | None:
        """The subject that is forgotten least."""
        return next(iter(self.subjects), None)

    @property
    def facts_left(self) -> FactsLeft | None:
        """The facts that were left as they were, by the measure where luck explains least."""
        return next(iter(self.facts), None)


class UtilityPart(_Data):
    """One measure on one split of what should be kept.

    Attributes:
        kept: Share in [0, 1] of the original's mean (or of the reference's, where that is lower);
            ``None``: not comparable, and ``reason`` says why.
        low: Lower end of its 95 % interval over paired records.
    """

    split: str
    measure: str
    records: int = 0
    unlearned: float | None = None
    original: float | None = None
    reference: float | None = None
    kept: float | None = None
    low: float | None = None
    high: float | None = None
    reason: str | None = None


class Utility(_Data):
    """What is left of everything that should be kept.

    Attributes:
        broken: Signs of a broken model, in words.
        missing: Why nothing could be compared.
    """

    parts: list[UtilityPart] = Field(default_factory=list)
    broken: list[str] = Field(default_factory=list)
    missing: str | None = None

    @property
    def comparable(self) -> list[UtilityPart]:
        """The parts in which a loss would be seen."""
        return [part for part in self.parts if part.kept is not None]


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


class Recovered(_Data):
    """A question under attack whose answer tells what a plain question did not.

    Attributes:
        asked: The last turn, or the text, that brought it out.
        before: What was said before it, in short ("" for a single question).
        plain: The answer without the attack.
    """

    question: str
    expected: str
    asked: str
    before: str = ""
    answer: str
    plain: str = ""


class FullStack(_Data):
    """Effectiveness, utility and robustness of one form (open answers, or choices).

    Attributes:
        effectiveness: 1 minus the share of right answers on forget records; higher is better.
        utility: Share of right answers on the worst kept set; None: not measured.
        robustness: By family of attacks, effectiveness under attack as a share of that without,
            at most 1; of several attacks the lowest.
    """

    effectiveness: float
    utility: float | None = None
    robustness: dict[str, float] = Field(default_factory=dict)


class Curve(_Data):
    """A knowledge score over the steps of an attack, or over layers, for each system."""

    attack: str
    variant: str = ""
    metric: str
    axis: Literal["step", "layer"] = "step"
    steps: list[int]
    values: dict[SystemRole, list[float | None]]


class AuditResult(_Data):
    """Everything an audit found.

    Attributes:
        splits: Records per split.
        depth: How deep it went; None: the attacks were chosen by name.
        summaries: Named numbers per system (model utility, forget quality, …).
        outcomes: Share of each outcome class per system and split:
            ``outcomes[system][split][class]`` with the classes correct, refusal,
            wrong-but-fluent and garbage.
        full_stack: Effectiveness, utility and robustness, by form of the answers.
        cheapest: The cheapest attack that gets most, in one sentence.
        not_tested: What this audit does not show, in plain sentences.
    """

    systems: dict[SystemRole, SystemInfo]
    splits: dict[str, int]
    depth: Depth | None = None
    measurements: list[Measurement]
    summaries: dict[SystemRole, dict[str, float | None]] = Field(default_factory=dict)
    outcomes: dict[SystemRole, dict[str, dict[str, float]]] = Field(default_factory=dict)
    leaks: list[Leak] = Field(default_factory=list)
    utility: Utility | None = None
    full_stack: dict[str, FullStack] = Field(default_factory=dict)
    cheapest: str | None = None
    verdict: VerdictResult | None = None
    curves: list[Curve] = Field(default_factory=list)
    examples: list[Example] = Field(default_factory=list)
    not_tested: list[str] = Field(default_factory=list)
    seconds: float = 0.0
    measured: dict[str, int] = Field(default_factory=dict)
