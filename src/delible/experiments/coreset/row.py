"""One unlearning run of the coreset experiment, and what it left."""

from __future__ import annotations

from dataclasses import dataclass, field

#: The metric of every probability here.
METRIC = "answer_probability"


@dataclass(frozen=True)
class CoresetRow:
    """One unlearning run and what it left.

    Attributes:
        selector: How rows were chosen; ``start``: the model before, ``all``: every row,
            otherwise a selector or a variant of the keyword analysis.
        fraction: Share of the forget rows that was asked for; ``rows``: how many that are.
        steps, epochs, tokens: Optimiser updates, passes over the rows, tokens seen.
        seconds: Of unlearning, without selection and measurement (of the last part of a run
            that was interrupted).
        selection_seconds: Of choosing the rows.
        forget_probability: Mean answer probability of all forget records, in [0, 1]; low =
            forgotten.
        selected_probability, unselected_probability: Of those trained on, and of the others.
        retain_probability: Of the retain and neighbour records; high = kept.
        selected_extraction, unselected_extraction: Mean extraction strength of the forget
            records trained on, and of the others, in [0, 1]; high = said word for word.
        chosen: Which forget records were trained on, from 0.
        forget_values: Answer probability of each forget record.
        others: Of further splits by name.
        barriers: With ``connect``: per split the largest dip between this model and the one
            from all rows; at most 0.02 = connected. The forget value that may not dip is
            1 - probability.
        reached: With the length ``shortest``: whether the run has enough of the full set's
            effect. If not, it is that with most of it. None: not asked, or the full set had no
            effect. The shorter runs before it count in no number of this row.
    """

    selector: str
    fraction: float
    seed: int
    rows: int
    steps: int
    epochs: float
    tokens: int
    seconds: float
    selection_seconds: float
    forget_probability: float | None
    selected_probability: float | None
    unselected_probability: float | None
    retain_probability: float | None
    others: dict[str, float | None] = field(default_factory=dict)
    stopped: str | None = None
    barriers: dict[str, float] | None = None
    selected_extraction: float | None = None
    unselected_extraction: float | None = None
    chosen: list[int] = field(default_factory=list)
    forget_values: list[float | None] = field(default_factory=list)
    reached: bool | None = None
