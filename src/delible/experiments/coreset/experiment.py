"""Coreset effect: does a small part of the forget set do what all of it does?

Unlearns with each selection at each share of the forget rows, at equal optimiser updates or for
the shortest time that forgets as much as the full set (``length``), on two kinds of data side by
side: *one theme* (the same facts in many wordings, as in corpora on a topic), where a few rows
stand for all, and *independent facts* (each told once), where they cannot. The honest column is
what remains of the rows that were not chosen.

    share of effect = (p_start - p) / (p_start - p_full)

for the mean answer probability p of all forget rows: 1 = as much forgotten as with the full set.
The runs are those of :mod:`delible.experiments.coreset.runs`.

Paper: arXiv 2504.10185. Reference code: OPTML-Group/MU-Coreset.
Deviations: made-up people instead of WMDP and MUSE; by default the number of updates is that of
the full set, where the paper trains a coreset longer until it forgets. ``length="shortest"`` does
that; the paper does not say by which rule it chooses the length. Here: E to ceil(E / share)
epochs, a few of them at equal ratios, and the first that has 95 % of the full set's effect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from delible.bench.prepare import learned
from delible.bench.stages import mean
from delible.component import build
from delible.experiments.coreset.connectivity import CONNECTED
from delible.experiments.coreset.length import Length, share_of_effect
from delible.experiments.coreset.row import CoresetRow
from delible.experiments.coreset.runs import run
from delible.measure.benchmark import (
    Chart,
    Curve,
    Experiment,
    Findings,
    Setting,
)
from delible.records import QA, ForgetRequest, Record
from delible.registry import register
from delible.train.keywords import Variant
from delible.world import World

RELATIONS = ("birthplace", "occupation", "employer", "award", "instrument")
METHODS = ("npo",)
Kind = Literal["one theme", "independent facts"]
KINDS: tuple[Kind, ...] = ("one theme", "independent facts")
#: Columns that are fields of a run's row, by title.
COLUMNS = {
    "rows": "rows",
    "updates": "steps",
    "epochs": "epochs",
    "tokens": "tokens",
    "forget probability": "forget_probability",
    "of chosen rows": "selected_probability",
    "of other rows": "unselected_probability",
    "extraction, chosen": "selected_extraction",
    "extraction, others": "unselected_extraction",
    "retain probability": "retain_probability",
}
#: Title of the share of seeds that forgot as much as with the full set.
REACHED = "full effect reached"
Row = dict[str, Any]


@dataclass(frozen=True)
class Material:
    """What the model learns first, and what it is to forget of that."""

    learned: tuple[Record, ...]
    request: ForgetRequest


def wordings(record: QA) -> list[QA]:
    """The fact with every question and every answer that it has."""
    questions = (record.question, *record.paraphrases)
    answers = (record.answer, *record.paraphrased_answers)
    return [
        record.model_copy(update={"question": question, "answer": answer, "paraphrases": (),
                                  "paraphrased_answers": (), "perturbed": ()})
        for question in questions for answer in answers
    ]  # fmt: skip


@register(
    kind="benchmark",
    name="coreset",
    title="Coreset effect",
    summary="Compares unlearning with a few of the forget rows to unlearning with all of them.",
    paper="2504.10185",
    year=2025,
    family="fictional",
    needs=("forget", "retain"),
    capability="score",
    misleads="An effect can also say that the rows repeat each other, or that the measure is too "
    "easy: look at the rows that were not chosen. With few rows a share of them is one or two.",
    badges=("variant",),
    variant="Made-up people; the updates of the full set, unless length is 'shortest': then the "
    "first length of a grid with 95 % of its effect (the paper tells no rule).",
)
class CoresetEffect(Experiment):
    """Both kinds of data, every share and selection; finished runs are kept under the folder."""

    fractions: tuple[float, ...] = Field(
        (0.05, 0.1, 1.0), description="Shares of the forget rows; the full set is always run."
    )
    selectors: tuple[str, ...] = Field(
        ("random_coreset", "grand", "moderate", "min_k"),
        description="Components of the slot 'select' that take a share.",
    )
    kinds: tuple[Kind, ...] = Field(KINDS, description="Kinds of data, separated by commas.")
    rows: int = Field(60, ge=8, description="Forget rows of each kind of data, about.")
    analyses: tuple[Variant, ...] = Field(
        (), description="Also unlearn on: keywords, without_keywords, random_words."
    )
    connect: bool = Field(
        False, description="Also measure the straight line of weights to the full set's model."
    )
    length: Length = Field(
        "equal updates",
        description="How long a part trains: 'equal updates', as many as the full set; 'shortest', "
        "the first length of a grid that forgets as much.",
    )
    grid: int = Field(4, ge=2, description="Lengths to try with 'shortest', at most.")
    least_effect: float = Field(
        0.95, gt=0, le=1, description="Share of the full set's effect that ends 'shortest'."
    )
    epochs: int = Field(5, ge=1, description="Of unlearning with the full set.")
    batch_size: int = Field(8, ge=1, description="Forget rows per step.")
    learning_rate: float | None = Field(
        None, gt=0, description="Of unlearning; none: by the model."
    )
    world_seed: int = Field(0, ge=0, description="Seed of the people.")

    def material(self, kind: Kind) -> Material:
        """Rows of one kind: about as many to forget as asked for, and as many to keep."""
        facts_each = len(RELATIONS)
        people = -(-self.rows // facts_each)
        world = World(people=max(4, 2 * people), seed=self.world_seed, relations=RELATIONS)
        every = [[fact.qa() for fact in world.facts(person)] for person in world.people]
        if kind == "one theme":
            each = facts_each * len(wordings(every[0][0]))
            few = max(1, round(self.rows / each))
            gone = [row for person in every[:few] for fact in person for row in wordings(fact)]
        else:
            gone = [row for person in every[:people] for row in person]
        kept = [row for person in every[people : 2 * people] for row in person]
        return Material((*gone, *kept), ForgetRequest(forget=tuple(gone), retain=tuple(kept)))

    def learning(self, model: str) -> dict[str, Any]:
        """How the model learns the rows first: options of the method ``finetune``."""
        if model == "tiny":
            return {"learning_rate": 1e-3, "epochs": 20, "batch_size": 8, "schedule": "cosine"}
        return {"learning_rate": 3e-4, "epochs": 6, "batch_size": 8, "schedule": "cosine"}

    def run(self, setting: Setting) -> Findings:
        methods = tuple(setting.methods) or METHODS
        for name in self.selectors:  # told before anything is trained
            build("select", {"name": name, "share": 0.5})
        rate = self.learning_rate or (1e-4 if setting.model == "tiny" else 2e-5)
        options: dict[str, Any] = {
            "epochs": self.epochs, "batch_size": self.batch_size, "learning_rate": rate,
        }  # fmt: skip
        found: dict[tuple[str, str], list[CoresetRow]] = {}
        total = len(self.kinds) * len(methods)
        for kind in self.kinds:
            material = self.material(kind)
            setting.progress(f"learning {kind}", len(found), total)
            start = learned(
                setting.model, material.learned, options=self.learning(setting.model),
                title=kind.replace(" ", "-"),
            )  # fmt: skip
            for method in methods:
                setting.progress(f"{kind}, {method}", len(found), total)
                found[kind, method] = run(
                    str(start), material.request, method=method, fractions=self.fractions,
                    selectors=self.selectors, seeds=range(setting.seeds), analyses=self.analyses,
                    connect=self.connect, length=self.length, grid=self.grid,
                    least_effect=self.least_effect, **options,
                    out=setting.folder / kind.replace(" ", "-") / Path(method).stem,
                )  # fmt: skip
        setting.progress("done", total, total)
        return findings(found, connect=self.connect, length=self.length)


def table(
    rows: Sequence[CoresetRow], *, connect: bool, length: Length = "equal updates"
) -> list[Row]:
    """One row per selection and share, each number the mean over seeds.

    With the length ``shortest`` there is also the share of seeds that reached the full effect;
    None where there was none to reach.
    """
    groups: dict[tuple[str, float], list[CoresetRow]] = {}
    for row in rows:
        groups.setdefault((row.selector, row.fraction), []).append(row)
    start = mean([row.forget_probability for row in groups["start", 0.0]])
    full = mean([row.forget_probability for row in groups["all", 1.0]])
    made: list[Row] = []
    for (selector, fraction), group in groups.items():
        line: Row = {"selection": selector, "share": fraction}
        for title, field in COLUMNS.items():
            line[title] = mean([getattr(row, field) for row in group])
        if selector == "start":  # nothing was chosen yet
            line |= dict.fromkeys(("of chosen rows", "of other rows"))
            line |= dict.fromkeys(("extraction, chosen", "extraction, others"))
        part = line["forget probability"]
        known = None not in (start, full, part)
        line["share of effect"] = share_of_effect(start, full, part) if known else None  # type: ignore[arg-type]
        if length == "shortest":
            line[REACHED] = mean([row.reached for row in group])
        if connect:
            for split in ("forget", "retain"):
                line[f"barrier, {split}"] = mean([(row.barriers or {}).get(split) for row in group])
        made.append(line)
    return made


def findings(
    found: Mapping[tuple[str, str], Sequence[CoresetRow]],
    *,
    connect: bool = False,
    length: Length = "equal updates",
) -> Findings:
    """Table, charts and notes of all runs.

    Args:
        found: Rows by (kind of data, method).
    """
    rows: list[Row] = []
    charts: list[Chart] = []
    notes: list[str] = []
    for (kind, method), runs in found.items():
        lines = table(runs, connect=connect, length=length)
        rows += [{"data": kind, "method": method, **line} for line in lines]
        for title in ("forget probability", "of other rows"):
            charts.append(
                Chart(f"{kind}, {method}: {title}", "share of the forget rows", title,
                      _curves(lines, title))
            )  # fmt: skip
        notes += [f"{kind}, {method}: {note}" for note in _notes(lines)]
    every = [
        {"data": kind, "method": method, **asdict(row)}
        for (kind, method), runs in found.items() for row in runs
    ]  # fmt: skip
    return Findings(rows, [chart for chart in charts if chart.curves], notes, every)


def _curves(lines: Sequence[Row], title: str) -> list[Curve]:
    """By selection over shares; every curve of a mean over all rows ends at the full set."""
    ends = [
        (line["share"], line[title])
        for line in lines if line["selection"] == "all" and line[title] is not None
    ]  # fmt: skip
    points: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        if line["share"] < 1 and line["selection"] != "start" and line[title] is not None:
            points.setdefault(line["selection"], []).append((line["share"], line[title]))
    return [Curve(name, [*sorted(values), *ends]) for name, values in points.items()]


def _notes(lines: Sequence[Row]) -> list[str]:
    start, full = (next(x for x in lines if x["selection"] == name) for name in ("start", "all"))
    parts = [line for line in lines if line["share"] < 1 and line["selection"] != "start"]
    told = [
        f"all rows bring the forget probability from {_said(start['forget probability'])} to "
        f"{_said(full['forget probability'])} in {_said(full['updates'])} updates."
    ]
    for line in parts:
        told.append(
            f"{100 * line['share']:g} % by {line['selection']}: "
            f"{_said(line['share of effect'])} of the effect; "
            f"rows not chosen are left at {_said(line['of other rows'])}."
            f"{_length(line)}"
        )
    return told + [
        f"{line['selection']} at {100 * line['share']:g} % is "
        f"{'' if max(barriers) <= CONNECTED else 'not '}linearly connected with the full set's "
        f"model (largest dip {max(barriers):.3f})."
        for line in parts
        if (barriers := [line[key] for key in line if key.startswith("barrier") and line[key] is
                         not None])
    ]  # fmt: skip


def _length(line: Row) -> str:
    """What the search for the shortest length found, if there was one."""
    if REACHED not in line:
        return ""
    reached, spent = line[REACHED], f"{_said(line['epochs'])} epochs"
    if reached is None:
        return " All rows forgot nothing that was measured: there was no effect to reach."
    if reached == 1:
        return f" The full set's effect is reached in {spent}."
    if reached == 0:
        return f" The full set's effect is never reached; most of it in {spent}."
    return (
        f" The full set's effect is reached with {100 * reached:.0f} % of the seeds; "
        f"{spent} on average."
    )


def _said(value: float | None) -> str:
    return "an unknown part" if value is None else f"{value:.3g}"
