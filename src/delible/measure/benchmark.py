"""What a benchmark is: tasks (what to forget, what to ask), measures, and columns of a table.

A benchmark declares; it runs nothing. :mod:`delible.bench.run` makes the models, measures them
and fills the table. The same classes serve every benchmark of the field.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from delible.cards import METHODS, Kind
from delible.component import Component
from delible.errors import DataError, DelibleError
from delible.kept import cell, identity
from delible.loaders.mapping import read_records
from delible.loaders.sources import READERS, read_rows
from delible.measure.evaluate import Ask
from delible.records import ForgetRequest, Record, RecordBase

if TYPE_CHECKING:
    from delible.lm.lm import LM

#: What a column is good for: how a method is read from it, and where it stands in the plot.
Better = Literal["lower", "higher", "reference"]
Axis = Literal["forget", "utility"]


@dataclass(frozen=True)
class Data:
    """Where a benchmark's files come from: a folder, or the Hugging Face hub.

    Attributes:
        folder: Holds the files under the benchmark's own names; ``None`` loads from the hub.
    """

    folder: Path | None = None

    def source(self, name: str, hub: str) -> str | Path:
        """What a loader takes: the file of that name, or ``hf:…``.

        Args:
            name: Name without ending, such as ``"forget01"``; any known ending is found.
            hub: ``"owner/name[:config][:split]"``.

        Raises:
            DataError: The folder has no such file.
        """
        if self.folder is None:
            return f"hf:{hub}"
        for ending in READERS:
            for path in (self.folder / f"{name}{ending}", self.folder / f"{name}{ending}.gz"):
                if path.is_file():
                    return path
        raise DataError(
            f"no file '{name}' (.jsonl, .json, …).",
            where=str(self.folder),
            hint="--data names the folder that holds the benchmark's files; without it they come "
            "from the Hugging Face hub.",
        )

    def records(self, name: str, hub: str) -> list[Record]:
        """Records of a file whose columns the loaders know."""
        return read_records(self.source(name, hub))

    def rows(self, name: str, hub: str) -> list[Mapping[str, Any]]:
        """Rows as they are, for files that only their benchmark understands."""
        rows = read_rows(self.source(name, hub))
        return [row.content for row in rows if not isinstance(row.content, RecordBase)]


@dataclass(frozen=True)
class Task:
    """One thing to forget, and everything that is asked about it.

    Attributes:
        name: Unique in the benchmark, such as ``"forget01"`` or a target's name.
        request: What a method is given.
        splits: What is measured, by split name; ``Ask`` entries and columns name these.
        learn: What the model to be unlearned is fine-tuned on first; empty: the model as it is.
        relearned: What the reference is fine-tuned on (the same without the forget records);
            empty: there is no reference.
        after: Name of the task whose result is unlearned further (successive requests).
        unwritten: The forget records are still to be written by the model itself: methods that
            need any get what :meth:`Benchmark.corpus` gives.
    """

    name: str
    request: ForgetRequest
    splits: Mapping[str, Sequence[RecordBase]]
    learn: Sequence[RecordBase] = ()
    relearned: Sequence[RecordBase] = ()
    after: str | None = None
    unwritten: bool = False


@dataclass(frozen=True)
class Column:
    """One number of the table.

    Attributes:
        title: Above the column.
        key: ``"label/split"`` of an item metric (its mean over the split), or the name of a
            summary metric's number, such as ``"forget_quality"``.
        better: ``"lower"``, ``"higher"``, or ``"reference"``: as near as possible to the
            reference (retrained) model's value.
        axis: The column is an axis of the forget-versus-utility plot (one of each).
        percent: Show 100 times the number.
    """

    title: str
    key: str
    better: Better
    axis: Axis | None = None
    percent: bool = False


@dataclass(frozen=True)
class Learning:
    """How a model learns a benchmark's records.

    Attributes:
        options: Of the method ``finetune``.
        slots: Other components of it, such as ``{"place": {"name": "layers", …}}``.
    """

    options: Mapping[str, Any] = field(
        default_factory=lambda: {"learning_rate": 1e-5, "epochs": 5, "batch_size": 32}
    )
    slots: Mapping[str, Any] = field(default_factory=dict)


class Benchmark(Component):
    """A benchmark's options (which split, which targets, how many), and what follows from them.

    Idea files are ``benchmarks/NAME.py``: a frozen config with these methods, each pure.
    """

    def tasks(self, data: Data) -> list[Task]:
        """What is to be forgotten; several tasks are averaged in the table.

        Raises:
            DataError: Files are missing or not of the benchmark's form.
        """
        raise NotImplementedError

    def asks(self) -> list[Ask]:
        """Which metrics are asked on which splits (summary metrics included)."""
        raise NotImplementedError

    def columns(self) -> list[Column]:
        """The table, in order. Exactly one column has the axis ``forget``, one ``utility``."""
        raise NotImplementedError

    def along(self) -> str | None:
        """What grows from task to task, for curves over the numbers at the ends of their names.

        ``None``: the tasks have no order.
        """
        return None

    def corpus(self, lm: LM, task: Task, data: Data) -> ForgetRequest:
        """The request of an unwritten task, with forget records that the model writes itself.

        Asked once per task, with the model before unlearning, if a method needs forget records.
        """
        return task.request

    def learning(self, model: str) -> Learning:
        """How target and reference are trained from the model of that name."""
        return Learning()

    def budget(self, model: str) -> Mapping[str, Any]:
        """Training options of every recipe and procedure that takes them, so that all get the same
        budget; none by default: every method trains as its file says. Editors and interventions
        train nothing: they keep their own.
        """
        return {}


@dataclass(frozen=True)
class Curve:
    """Numbers along an axis, for a chart: ``points`` are (x, y)."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """Curves that share their axes."""

    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]


@dataclass(frozen=True)
class Findings:
    """What an experiment found.

    Attributes:
        rows: One mapping of column title to value per row; all rows have the same columns.
        charts: What one would rather look at.
        notes: Sentences that say what the numbers show, each computed from them.
        runs: What the rows are means of, one mapping per run with its seed or its title, for
            intervals; a list stands for the values of single records.
        shaded: Columns of the rows with shares in [0, 1] of what is erased, coloured on a page.
    """

    rows: Sequence[Mapping[str, Any]]
    charts: Sequence[Chart] = ()
    notes: Sequence[str] = ()
    runs: Sequence[Mapping[str, Any]] = ()
    shaded: Sequence[str] = ()


@dataclass(frozen=True)
class Setting:
    """What an experiment may use.

    Attributes:
        model: Name of the model that learns and unlearns.
        methods: Names of methods; empty: the experiment's own choice.
        seeds: Runs with seeds 0, 1, …
        folder: Where intermediate results are kept, so that a killed experiment goes on.
        progress: Called with (what is being done, done, in all).
        attacks: Names or mappings of attacks; empty: the experiment's own choice.
        roles: Who plays a part by talking, by role.
    """

    model: str
    methods: Sequence[str]
    seeds: int
    folder: Path
    data: Data = field(default_factory=Data)
    progress: Callable[[str, int, int], None] = lambda what, done, total: None
    attacks: Sequence[Any] = ()
    roles: Mapping[str, Any] = field(default_factory=dict)


class Experiment(Component):
    """A question about methods or metrics that is not a leaderboard; also ``delible bench NAME``.

    Idea files are ``benchmarks/NAME.py`` too, registered with the kind ``benchmark``.

    Attributes:
        attacked: It takes attacks.
        casts: It takes roles.
        compares: The kinds of methods that ``all`` stands for.
    """

    attacked: ClassVar[bool] = False
    casts: ClassVar[bool] = False
    compares: ClassVar[tuple[Kind, ...]] = METHODS

    def run(self, setting: Setting) -> Findings:
        """Answers the question.

        Raises:
            DelibleError: Bad input; told before anything is trained.
        """
        raise NotImplementedError

    def kept(
        self,
        setting: Setting,
        name: str,
        described: Mapping[str, Any],
        work: Any,  # a function; a lambda with defaults has no type that could be written
    ) -> dict[str, Any]:
        """A cell of results from the folder, or made now and kept there.

        Args:
            name: Of the cell's file, besides a hash of all that decides it.
            described: What decides it, besides the experiment's own options and the model.

        Returns:
            What ``work`` returns, or ``failed`` with the reason; that is tried again next time.
        """
        key = identity({"experiment": self.spec(), "model": setting.model, **described})[:8]
        file = setting.folder / "cells" / f"{name.replace(' ', '-')}-{key}.json"

        def made() -> Mapping[str, Any]:
            try:
                return cast(Mapping[str, Any], work())
            except DelibleError as error:  # one method that cannot do it must not end the others'
                return {"failed": str(error)}

        return cell(file, made)


__all__ = [
    "Axis", "Benchmark", "Better", "Chart", "Column", "Curve", "Data", "Experiment", "Findings",
    "Learning", "Setting", "Task",
]  # fmt: skip
