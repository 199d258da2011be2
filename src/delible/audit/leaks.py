"""Rows of the attack x leak matrix: from the values of the systems to e, by measure.

All three systems are compared under the same attack, on the same records. Where an attack asks a
question in several forms, whoever attacks takes the form that works: for each record the form that
brings out most counts, for every system alike, and the form that leaks most over all records is
told besides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from delible.audit.erasure import (
    Erasure,
    Known,
    erasure,
    share_erased,
    untouched,
)
from delible.audit.relearning_speed import relearning_speed
from delible.audit.result import FactsLeft, FormLeak, Leak, Recovered, SubjectLeak, SystemRole
from delible.measure.attack import Findings
from delible.measure.facts import fact_numbers
from delible.measure.metric import Item, SystemValues
from delible.records import RecordBase
from delible.system.questions import ask

#: Knowledge scores, larger = more is known. The worst of those that have power decides.
LEAK_MEASURES = (
    "answer_probability",
    "paraphrase_probability",
    "extraction_strength",
    "rouge_l_recall",
    "outcome",
    "choice_accuracy",
)
#: What attacks measure that do not ask: from hidden states, and from outputs.
INSIDE, INFERRED = "inside", "inferred"
MEASURES = (*LEAK_MEASURES, INSIDE, INFERRED)
#: The row of a part that was taken away, and the plain question's.
WITHOUT_PART, PLAIN = "without_part", "none"
#: An attack on the weights that changes no value by more than this did nothing.
UNCHANGED = 1e-3
QUESTIONS_SHOWN = 3

Reads = Callable[[Mapping[str, SystemValues], Mapping[str, Sequence[RecordBase]]], Findings]


@dataclass
class Setting:
    """Values of one attack setting, by system.

    Attributes:
        records: The forget records that were asked.
        family: Kind of attack.
        control: See :attr:`delible.measure.attack.Attack.control`.
        changes: What the attack changes: "prompts" or "weights".
        weighs: Whether what it finds decides the verdict.
        queries: Questions to the unlearned system.
        steps: Steps of training or search on the unlearned system.
        tokens: Tokens that it trained on, read from the inside, or asked for beside the answers.
        layers: A score of each layer, by system.
        numbers: Findings for the whole system, by system.
        recovered: Questions that brought out what a plain one did not.
        splits: All records that the unlearned system was asked about, by split.
        reads: Reads more such numbers off the values; see :meth:`Attack.findings`.
    """

    attack: str
    variant: str
    title: str
    values: dict[SystemRole, SystemValues] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    curves: dict[SystemRole, list[tuple[int, float | None]]] = field(default_factory=dict)
    records: Sequence[RecordBase] = ()
    family: str = ""
    control: bool = False
    changes: str = ""
    weighs: bool = True
    queries: int = 0
    steps: int = 0
    tokens: int = 0
    layers: dict[SystemRole, list[tuple[int, float | None]]] = field(default_factory=dict)
    numbers: dict[SystemRole, dict[str, float | None]] = field(default_factory=dict)
    recovered: list[Recovered] = field(default_factory=list)
    splits: Mapping[str, Sequence[RecordBase]] = field(default_factory=dict)
    reads: Reads | None = None


#: Reads one number from an item.
Reading = Callable[[Item], float | None]


def most(item: Item) -> float | None:
    """The value of the form that brings out most."""
    return max((value for value in item.forms if value is not None), default=item.value)


def of_form(place: int) -> Reading:
    """The value of one form."""
    return lambda item: item.forms[place] if place < len(item.forms) else None


def places(all_of_them: Sequence[str], some: Sequence[str]) -> list[int]:
    """Where some records stand among all, by their digests.

    Of records that are given twice each takes a place of its own.
    """
    free: dict[str, list[int]] = {}
    for index, digest in enumerate(all_of_them):
        free.setdefault(digest, []).append(index)
    return [free[digest].pop(0) if len(free[digest]) > 1 else free[digest][0] for digest in some]


@dataclass(frozen=True)
class Compared:
    """What a measure found under an attack, ready to be compared.

    Attributes:
        known: The scores of the records that all systems have; None with ``reason``.
        records: These records.
    """

    known: Known | None
    records: Sequence[RecordBase] = ()
    reason: str = ""


def compared(
    place: Setting, measure: str, *, with_reference: bool, reading: Reading = most
) -> Compared:
    """The three systems' scores on the same records under the same attack.

    Args:
        with_reference: There is a reference; without one the floor is what the original scores on
            records that it never saw.
    """
    roles: tuple[SystemRole, ...] = ("unlearned", "original")
    if with_reference:
        roles = (*roles, "reference")
    columns = []
    for role in roles:
        found = place.values.get(role)
        items = found.items.get(measure, {}).get("forget") if found is not None else None
        if items is None:
            return Compared(None, reason=_missing(place, role, measure))
        columns.append([reading(item) for item in items])
    index = [i for i, row in enumerate(zip(*columns, strict=True)) if None not in row]
    if not index:
        return Compared(None, reason="no record has a value for all systems")
    unlearned, original, *reference = (
        np.asarray([column[i] for i in index], np.float64) for column in columns
    )
    records = [place.records[i] for i in index]
    labels = fact_numbers(records)
    if reference:
        return Compared(Known(unlearned, original, reference[0], groups=labels), records)
    unseen = place.values["original"].items.get(measure, {}).get("holdout", ())
    floor = np.asarray([value for one in unseen if (value := reading(one)) is not None], np.float64)
    if not floor.size:
        reason = "there is neither a reference nor a record that the original never saw"
        return Compared(None, reason=reason)
    return Compared(Known(unlearned, original, floor, paired=False, groups=labels), records)


def _missing(place: Setting, role: SystemRole, measure: str) -> str:
    if "skipped" in place.notes:
        return str(place.notes["skipped"])
    found = place.values.get(role)
    if found is not None and measure in found.skipped:
        return found.skipped[measure]
    return f"the {role} system was not measured"


def leak(place: Setting, plain: Setting, *, with_reference: bool, seed: int) -> Leak:
    """One row of the matrix.

    Args:
        place: What was measured under the attack.
        plain: What was measured without one.
    """
    attacked = place.attack not in (PLAIN, WITHOUT_PART)
    index = {record.digest: number for number, record in enumerate(plain.records)}
    found: dict[str, Compared] = {}
    scores: dict[str, Erasure] = {}
    for measure in MEASURES:
        if not any(measure in values.items for values in place.values.values()):
            continue
        found[measure] = compared(place, measure, with_reference=with_reference)
        known = found[measure].known
        if known is None:
            scores[measure] = Erasure(None, reason=found[measure].reason)
            continue
        gap = None
        if attacked and all(one.digest in index for one in found[measure].records):
            same = _only(plain, [index[one.digest] for one in found[measure].records])
            before = compared(same, measure, with_reference=with_reference).known
            gap = before.gap if before is not None else None
        scores[measure] = erasure(known, plain_gap=gap, seed=seed)
    powerful = {
        measure: one
        for measure, one in found.items()
        if one.known is not None and scores[measure].value is not None
    }
    notes = [str(place.notes[key]) for key in ("skipped", "note") if key in place.notes]
    if "collision_rate" in place.notes:
        notes.append(
            f"{float(place.notes['collision_rate']):.0%} of the quantized weights have the "
            "same code as in the original."
        )
    inert = place.changes == "weights" and _inert(place, plain)
    if inert:
        notes.append("The attack changed nothing, so that it brings nothing back says nothing.")
    return Leak(
        attack=place.attack,
        variant=place.variant,
        title=place.title,
        family=place.family,
        knowledge={measure: _means(place, measure, one.known) for measure, one in found.items()},
        erased={measure: score.value for measure, score in scores.items()},
        intervals={
            measure: (score.low, score.high)
            for measure, score in scores.items()
            if score.low is not None and score.high is not None
        },
        no_power={
            measure: score.reason for measure, score in scores.items() if score.reason is not None
        },
        forms=_forms(place, powerful, with_reference, seed) if attacked else [],
        subjects=_subjects(powerful),
        facts=_facts(powerful),
        retain={
            measure: {
                role: values.means[measure].get("retain")
                for role, values in place.values.items()
                if measure in values.means
            }
            for measure in found
        },
        records=max((len(one.records) for one in found.values()), default=0),
        control=place.control or inert,
        weighs=place.weighs,
        numbers=_numbers(place),
        recovered=place.recovered,
        cost_queries=place.queries,
        cost_steps=place.steps,
        cost_tokens=place.tokens,
        cost_seconds=round(place.seconds, 1),
        note=" ".join(notes) or None,
    )


def _numbers(place: Setting) -> dict[str, dict[SystemRole, float | None]]:
    """What the attack found for whole systems or reads off, and how fast knowledge came back."""
    names = dict.fromkeys(one for found in place.numbers.values() for one in found)
    own: dict[str, dict[SystemRole, float | None]] = {
        name: {role: found[name] for role, found in place.numbers.items() if name in found}
        for name in names
    }
    values = {str(role): one for role, one in place.values.items()}
    read = place.reads(values, place.splits) if place.reads is not None else {}
    more = {name: cast(dict[SystemRole, float | None], dict(row)) for name, row in read.items()}
    return {**own, **more, **relearning_speed(place.curves)}


def _means(place: Setting, measure: str, known: Known | None) -> dict[SystemRole, float | None]:
    """What each system knows: on the compared records, or else on all it was asked."""
    if known is not None:
        means: dict[SystemRole, float | None] = {
            "unlearned": float(known.unlearned.mean()),
            "original": float(known.original.mean()),
        }
        if known.paired:
            means["reference"] = float(known.floor.mean())
        return {role: means[role] for role in place.values if role in means}
    found: dict[SystemRole, float | None] = {}
    for role, values in place.values.items():
        read = [most(item) for item in values.items.get(measure, {}).get("forget", ())]
        there = [value for value in read if value is not None]
        if measure in values.items:
            found[role] = float(np.mean(there)) if there else None
    return found


def _only(plain: Setting, index: Iterable[int]) -> Setting:
    """The plain values of some of the forget records."""
    chosen = list(index)

    def cut(values: SystemValues) -> SystemValues:
        items = {
            measure: {
                split: [row[i] for i in chosen] if split == "forget" else row
                for split, row in by_split.items()
            }
            for measure, by_split in values.items.items()
        }
        return SystemValues(values.system, items, skipped=values.skipped)

    return Setting(
        plain.attack, plain.variant, plain.title,
        {role: cut(values) for role, values in plain.values.items()},
        records=[plain.records[i] for i in chosen],
    )  # fmt: skip


def _inert(place: Setting, plain: Setting) -> bool:
    """Whether an attack on the weights left every value of every system as it was."""
    index = {record.digest: number for number, record in enumerate(plain.records)}
    changes = []
    for role, values in place.values.items():
        for measure, by_split in values.items.items():
            before = plain.values[role].items.get(measure, {}).get("forget", ())
            for record, item in zip(place.records, by_split.get("forget", ()), strict=False):
                old = before[index[record.digest]].value if before else None
                if old is not None and item.value is not None:
                    changes.append(abs(item.value - old))
    return bool(changes) and max(changes) < UNCHANGED


def _forms(
    place: Setting, powerful: Mapping[str, Compared], with_reference: bool, seed: int
) -> list[FormLeak]:
    """Every form of the question by every measure, the one that leaks most first."""
    found = []
    for measure in powerful:
        items = place.values["unlearned"].items[measure]["forget"]
        for form in range(max((len(item.forms) for item in items), default=0)):
            reading = of_form(form)
            one = compared(place, measure, with_reference=with_reference, reading=reading).known
            score = erasure(one, seed=seed) if one is not None else Erasure(None)
            if score.value is not None:
                found.append(
                    FormLeak(
                        form=form + 1, measure=measure, erased=score.value, low=score.low,
                        high=score.high,
                    )
                )  # fmt: skip
    return sorted(found, key=lambda one: one.erased)


def _subjects(powerful: Mapping[str, Compared]) -> list[SubjectLeak]:
    """By every measure the subject that is forgotten least, and the one luck explains least."""
    found: list[SubjectLeak] = []
    for measure, one in powerful.items():
        assert one.known is not None
        names = sorted({record.subject for record in one.records if record.subject})
        mine: list[SubjectLeak] = []
        for subject in names if len(names) > 1 else ():
            rows = [i for i, record in enumerate(one.records) if record.subject == subject]
            left, score = untouched(one.known, rows), share_erased(one.known, rows)
            if left.comparable >= 2 and score is not None:
                mine.append(
                    SubjectLeak(
                        subject=subject, measure=measure, erased=score, records=left.comparable,
                        untouched=left.count, chance=min(1.0, left.chance * len(names)),
                    )
                )  # fmt: skip
        if mine:
            least = min(mine, key=lambda one: (one.erased, one.chance))
            unlikely = min(mine, key=lambda one: (one.chance, one.erased))
            found += [least] if unlikely == least else [unlikely, least]
    found.reverse()  # of equals the measure of what is said, which comes last
    return sorted(found, key=lambda one: (one.erased, one.chance))


def _facts(powerful: Mapping[str, Compared]) -> list[FactsLeft]:
    """The facts that were left as they were by every measure, first where luck explains least."""
    found: list[FactsLeft] = []
    for measure, one in powerful.items():
        assert one.known is not None
        left = untouched(one.known)
        if left.comparable:
            found.append(
                FactsLeft(
                    measure=measure, count=left.count, comparable=left.comparable,
                    guessed=left.guessed, chance=left.chance,
                    questions=[_question(one.records[i]) for i in left.where[:QUESTIONS_SHOWN]],
                )
            )  # fmt: skip
    found.reverse()
    return sorted(found, key=lambda one: (one.chance, -one.count / one.comparable))


def _question(record: RecordBase) -> str:
    prompt = ask(record)
    return prompt.messages[-1].text if prompt is not None and prompt.messages else ""
