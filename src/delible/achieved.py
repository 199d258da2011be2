"""What a run of unlearning achieved: answers before and after, and in one sentence.

Two measures: how probable the right answers are, and how many the model still says. The first alone
would call forgotten what is said as before, in other words or because nothing is more probable.
Measured on a few rows of each split, so that it costs little beside the training. It is no audit:
it tells whether the run did what it was to do, not how deep the forgetting goes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, Literal

from delible.component import build
from delible.measure.evaluate import bootstrap_interval, evaluate
from delible.measure.metric import Item, SystemValues

if TYPE_CHECKING:
    from delible.audit.result import AuditResult, SystemRole
    from delible.records import ForgetRequest, RecordBase
    from delible.system.base import System

#: Rows of a split that are asked, evenly spaced.
ROWS = 50
METRIC = "answer_probability"
#: Rows of a split whose answers are generated, the longest answer in tokens, and the measure.
SAID_ROWS, SAID_TOKENS, SAID = 20, 32, "outcome"
#: More of what only the start model said right may not be said any more.
STILL_SAID = 0.2
#: Splits that are measured, with the words for their answers.
SPLITS = {"forget": "forget", "retain": "retained", "neighbours": "neighbouring"}
#: Forget answers that lost a smaller share of their probability than this were not forgotten.
NOTHING = 0.1
#: Without a reference: forgotten in part where the loss is smaller than this; with one: where
#: less than this share of the way is behind.
PART = {False: 0.25, True: 0.5}
#: At least this share of the retained (and of the neighbouring) probability should be left.
KEPT = 0.9
#: Further than the reference by this share of the way is too far.
BEYOND = 1.25
#: Smaller differences of mean probabilities are not told apart, nor such between two errors.
SMALLEST, ERRORS = 0.02, 2.0

State = Literal["unmeasured", "taught", "unknown", "nothing", "part", "forgotten", "too much"]


@dataclass(frozen=True)
class Said:
    """How many answers are right, among the rows that were answered.

    Attributes:
        never: Of the reference; None without one.
    """

    before: int
    after: int
    never: int | None
    rows: int

    @property
    def left(self) -> float | None:
        """Share of what the start model says beyond the reference that is said still, in [0, ...).

        None where it says no more.
        """
        never = self.never or 0
        return (self.after - never) / (self.before - never) if self.before > never else None

    def __str__(self) -> str:
        never = f", the reference {self.never}" if self.never is not None else ""
        return f"{self.after} of {self.rows} are still said ({self.before} before{never})"


@dataclass(frozen=True)
class Change:
    """What became of one split, on the rows that all systems could be asked.

    Attributes:
        before, after: Mean answer probability, or the share of right answers where a system gives
            no probabilities (:attr:`texts_only`).
        never: Of the reference, a model that never saw the forget rows; None without one.
        error: Standard error of the mean difference (paired rows); 0 for a single row.
        said: How many answers are right when they are generated; None if nothing was generated.
        texts_only: A guard or a server gives texts, no probabilities.
    """

    before: float
    after: float
    never: float | None
    rows: int
    error: float
    said: Said | None = None
    texts_only: bool = False

    @property
    def kept(self) -> float:
        """Share of what there was that is left, in [0, ...)."""
        return self.after / self.before if self.before > 0 else math.nan

    @property
    def fell(self) -> bool:
        """Whether less than :data:`KEPT` is left, by more than rows differ by chance."""
        lost = self.before - self.after
        return self.kept < KEPT and lost > max(SMALLEST, ERRORS * self.error)

    @property
    def way(self) -> float | None:
        """How far from the start to the reference: 0 as at the start, 1 there, more: beyond."""
        if self.never is None or self.before - self.never < SMALLEST:
            return None
        return (self.before - self.after) / (self.before - self.never)


@dataclass(frozen=True)
class Achieved:
    """What changed, split by split, and what there is to do about it.

    Attributes:
        changes: By split; a split without questions is missing.
        further: What makes the method forget more, in words.
        gentler: What makes it forget less.
        teaches: The method teaches its rows, and forgets nothing.
        earlier: What became of earlier requests, in words; empty where none was asked about.
    """

    changes: Mapping[str, Change]
    further: str = ""
    gentler: str = ""
    teaches: bool = False
    earlier: str = ""

    @property
    def damaged(self) -> list[str]:
        """The kept splits that lost too much."""
        return [name for name, one in self.changes.items() if name != "forget" and one.fell]

    @property
    def state(self) -> State:
        """The one word for it."""
        forget = self.changes.get("forget")
        if forget is None:
            return "unmeasured"
        if self.teaches:
            return "taught"
        if forget.before < SMALLEST or (
            forget.never is not None and forget.way is None
        ):  # nobody forgets what was never known
            return "too much" if self.damaged else "unknown"
        beyond = forget.way is not None and forget.way > BEYOND
        if self.damaged or beyond:
            return "too much"
        lost = 1 - forget.kept
        said = forget.said.left if forget.said is not None else None
        if lost < NOTHING or (said is not None and said > 1 - NOTHING):
            return "nothing"
        if said is not None and said > STILL_SAID:
            return "part"
        share = lost if forget.way is None else forget.way
        return "part" if share < PART[forget.way is not None] else "forgotten"

    def sentence(self) -> str:
        """What was achieved, and what to change where it was too little or too much."""
        return f"{self._sentence()} {self.earlier}".rstrip()

    def _sentence(self) -> str:
        state = self.state
        if state == "unmeasured":
            return (
                "What was forgotten was not measured: there are no forget records with questions "
                "and answers (--forget FILE)."
            )
        if state == "taught":
            one = self.changes["forget"]
            return (
                f"Taught: the answers went from a probability of {one.before:.3f} to "
                f"{one.after:.3f}."
            )
        told = f"{self._forgotten()}; {self._retained()}"
        if state == "unknown":
            return f"There was little to forget: {told}."
        if state == "nothing":
            return f"Nothing was forgotten: {told}. To forget more: {self.further}."
        if state == "part":
            return f"Only a part was forgotten: {told}. To forget more: {self.further}."
        if state == "too much":
            untouched = 1 - self.changes["forget"].kept < NOTHING
            head = (
                "The rest was damaged and nothing was forgotten"
                if untouched
                else ("Too much was forgotten")
            )
            return f"{head}: {told}. To lose less: {self.gentler}."
        return f"Forgotten: {told}."

    def _forgotten(self) -> str:
        forget = self.changes["forget"]
        if forget.texts_only:
            return f"of the forget answers {forget.said}"
        words = (
            f"forget answers went from a probability of {forget.before:.3f} to {forget.after:.3f}"
        )
        if forget.way is not None:
            words += f" ({_way(forget.way)} of the way to the reference's {forget.never:.3f})"
        elif forget.never is not None:
            words += f" (the reference, which never saw them, gives them {forget.never:.3f})"
        return f"{words}, {forget.said}" if forget.said is not None else words

    def _retained(self) -> str:
        parts = [
            f"of the {SPLITS[name]} ones {one.said}"
            if one.texts_only
            else f"{SPLITS[name]} answers from {one.before:.3f} to {one.after:.3f} "
            f"({min(one.kept, 1.0):.0%} kept)" + (f", {one.said}" if one.said is not None else "")
            for name, one in self.changes.items()
            if name != "forget"
        ]
        return " and ".join(parts) or "no retained records were there to be measured"

    def as_json(self) -> dict[str, Any]:
        """Plain data; :meth:`from_json` reads it."""
        return {**asdict(self), "changes": {k: asdict(v) for k, v in self.changes.items()}}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Achieved:
        """What :meth:`as_json` made."""
        changes = {
            name: Change(**{**one, "said": Said(**told) if (told := one.get("said")) else None})
            for name, one in content["changes"].items()
        }
        return cls(**{**content, "changes": changes})


def _way(share: float) -> str:
    return f"{max(0.0, share):.0%}"


# ---- measuring


def asked(request: ForgetRequest, rows: int = ROWS) -> dict[str, Sequence[RecordBase]]:
    """At most ``rows`` evenly spaced records of every split that is measured."""
    found: dict[str, Sequence[RecordBase]] = {}
    for name in SPLITS:
        records = getattr(request, name)
        if len(records) > rows:
            records = [records[int(place * len(records) / rows)] for place in range(rows)]
        if records:
            found[name] = records
    return found


@dataclass(frozen=True)
class Measured:
    """One system's answers, and which system it was at that time.

    Attributes:
        values: Answer probabilities, and (on fewer rows) which generated answers are right.
    """

    name: str
    fingerprint: str | None
    capabilities: tuple[str, ...]
    values: SystemValues


def probabilities(system: System, request: ForgetRequest) -> Measured:
    """Answer probabilities of the rows of :func:`asked`, and what is said to some of them."""
    values = evaluate(system, asked(request), [build("metric", METRIC)])
    outcome = build("metric", {"name": SAID, "max_new_tokens": SAID_TOKENS})
    said = evaluate(system, asked(request, SAID_ROWS), [outcome])
    both = replace(values, items={**values.items, **said.items})
    return Measured(system.name, system.fingerprint, tuple(sorted(system.capabilities)), both)


def compare(before: Measured, after: Measured, never: Measured | None = None) -> dict[str, Change]:
    """The changes by split, on the rows that have a value in all systems."""
    changes = {}
    systems = [before, after, *([] if never is None else [never])]
    texts_only = not all("score" in one.capabilities for one in systems)
    for split in SPLITS:
        measure = SAID if texts_only else METRIC
        columns = [one.values.items.get(measure, {}).get(split, ()) for one in systems]
        rows = [
            [float(item.value) for item in row if item.value is not None]
            for row in zip(*columns, strict=True)
        ]
        rows = [row for row in rows if len(row) == len(systems)]
        if not rows:
            continue
        lost = [row[0] - row[1] for row in rows]
        error = stdev(lost) / math.sqrt(len(lost)) if len(lost) > 1 else 0.0
        means = [fmean(column) for column in zip(*rows, strict=True)]
        changes[split] = Change(
            means[0], means[1], means[2] if never is not None else None, len(rows), error,
            _said(systems, split), texts_only,
        )  # fmt: skip
    return changes


def _said(systems: Sequence[Measured], split: str) -> Said | None:
    """Right answers of the start, the result and perhaps the reference, on the same rows."""
    columns = [one.values.items.get(SAID, {}).get(split, ()) for one in systems]
    rows = [
        [item.value == 1 for item in row]
        for row in zip(*columns, strict=True)
        if all(item.value is not None for item in row)
    ]
    if not rows:
        return None
    before, after, *never = map(sum, zip(*rows, strict=True))
    return Said(before, after, never[0] if never else None, len(rows))


# ---- as an audit's data


def as_metrics(
    found: Mapping[SystemRole, Measured], request: ForgetRequest, seed: int
) -> AuditResult:
    """The measurements as the content of ``metrics.json``: an audit of plain questions alone.

    Args:
        found: By role: original, unlearned, reference.
    """
    from delible.audit.result import AuditResult, Measurement, SystemInfo

    rows = []
    for role, one in found.items():
        for metric, split, items in _columns(one):
            numbers = [float(item.value) for item in items if item.value is not None]
            low, high = bootstrap_interval(numbers, seed)
            rows.append(
                Measurement(
                    system=role, split=split, metric=metric,
                    value=fmean(numbers) if numbers else None, low=low, high=high,
                    n=len(numbers), skipped=len(items) - len(numbers),
                    reason=next((item.reason for item in items if item.value is None), None),
                )
            )  # fmt: skip
    return AuditResult(
        systems={
            role: SystemInfo(
                name=one.name, capabilities=list(one.capabilities), fingerprint=one.fingerprint
            )
            for role, one in found.items()
        },
        splits={split: len(records) for split, records in asked(request).items()},
        measurements=rows,
        not_tested=["Nothing was attacked: the same questions were asked before and after."],
    )


def _columns(one: Measured) -> Iterator[tuple[str, str, Sequence[Item]]]:
    for metric in (METRIC, SAID):
        for split, items in one.values.items.get(metric, {}).items():
            yield metric, split, items
