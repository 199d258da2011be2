"""What a search measures, and on which records: those that decide are kept apart.

    leak     = mean of answer probability, extraction strength and (with paraphrased answers)
               paraphrase probability on forget records; 0 = nothing is left, lower = forgotten
    utility  = harmonic mean, over retain and neighbour records, answer probability and ROUGE-L
               recall, of min(1, value after / value before); 1 = as useful as the start model

Both means are taken over records first. Every forget record is unlearned in every trial, since
what is not asked to be forgotten cannot be expected to be; the first of every two decides, the
second is only reported. Of retain and neighbour records, every second one is trained on; of the
others, the first of every two decides and the second is only reported. So the winner has numbers
that no choice was made on. (Options only see a handful of trials, so the two hardly differ.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from delible.component import build
from delible.errors import DataError
from delible.measure.evaluate import Ask, evaluate
from delible.measure.metric import SystemValues
from delible.records import QA, ForgetRequest, RecordBase
from delible.system.base import System

#: Records of one kind that decide, and as many that are only reported; more are spread evenly.
ROWS = 64
FORGET_METRICS = ("answer_probability", "extraction_strength")
PARAPHRASES = "paraphrase_probability"
UTILITY_METRICS = ("answer_probability", "rouge_l_recall")
#: After the name of a split that decides nothing.
ASIDE = " (aside)"

Means = Mapping[str, float | None]


@dataclass(frozen=True)
class Parts:
    """A request, cut for a search.

    Attributes:
        request: What every trial unlearns.
        splits: What is measured; names that end in :data:`ASIDE` decide nothing.
        shared: Splits too small to be cut: what is trained on is also measured.
    """

    request: ForgetRequest
    splits: Mapping[str, Sequence[RecordBase]]
    shared: tuple[str, ...] = ()


def cut(request: ForgetRequest) -> Parts:
    """Cuts a request into what is unlearned and what is measured.

    Raises:
        DataError: No forget records, or neither retain nor neighbour records.
    """
    if not request.forget:
        raise DataError(
            "a search measures how much is left of forget records, and there are none.",
            hint="Add --forget FILE with questions about what is to be forgotten.",
        )
    if not (request.retain or request.neighbours):
        raise DataError("there are no retain records to measure the utility on.")
    splits: dict[str, Sequence[RecordBase]] = {
        "forget": _some(request.forget[::2]),
        f"forget{ASIDE}": _some(request.forget[1::2]),
    }
    trained, shared = {}, []
    for name in ("retain", "neighbours"):
        records = getattr(request, name)
        trained[name] = records[::2]
        held = records[1::2]
        if records and not held:
            shared.append(name)
            held = records
        splits[name] = _some(held[::2])
        splits[f"{name}{ASIDE}"] = _some(held[1::2])
    kept = {name: rows for name, rows in splits.items() if rows}
    return Parts(request.model_copy(update=trained), kept, tuple(shared))


def _some(records: Sequence[RecordBase]) -> Sequence[RecordBase]:
    if len(records) <= ROWS:
        return records
    return [records[index * len(records) // ROWS] for index in range(ROWS)]


def measured(
    system: System,
    splits: Mapping[str, Sequence[RecordBase]],
    progress: Callable[[int, int], None] | None = None,
) -> Means:
    """Means over records by ``metric/split``."""
    forget = tuple(name for name in splits if _plain(name) == "forget")
    others = tuple(name for name in splits if _plain(name) != "forget")
    asks = [
        Ask(build("metric", "answer_probability")),
        Ask(build("metric", "extraction_strength"), forget),
        Ask(build("metric", "rouge_l_recall"), others),
    ]
    if any(isinstance(one, QA) and one.paraphrased_answers for one in splits["forget"]):
        asks.append(Ask(build("metric", PARAPHRASES), forget))
    values: SystemValues = evaluate(system, splits, asks, progress=progress)
    return {
        f"{label}/{split}": mean
        for label, by_split in values.means.items()
        for split, mean in by_split.items()
    }


def leak(after: Means, aside: bool = False) -> float | None:
    """How much is left of the forget records, in [0, 1]; lower = more is forgotten.

    Args:
        aside: Of the records that decide nothing.

    Returns:
        ``None`` when there is no value: the model gives no finite numbers any more.
    """
    split = f"forget{ASIDE if aside else ''}"
    values = [after.get(f"{name}/{split}") for name in (*FORGET_METRICS, PARAPHRASES)]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def utility(before: Means, after: Means, aside: bool = False) -> float | None:
    """What is kept of the start model's values on retain records, in [0, 1]; higher = more.

    A measure that got better counts as kept, not as a credit for another. Measures at which the
    start model has 0 say nothing and are left out.

    Returns:
        ``None`` when no measure is left.
    """
    shares = []
    for name in UTILITY_METRICS:
        for split in ("retain", "neighbours"):
            key = f"{name}/{split}{ASIDE if aside else ''}"
            start = before.get(key)
            if start:
                shares.append(min(1.0, (after.get(key) or 0.0) / start))
    if not shares:
        return None
    return 0.0 if min(shares) == 0 else len(shares) / sum(1 / share for share in shares)


def _plain(split: str) -> str:
    return split.removesuffix(ASIDE)
