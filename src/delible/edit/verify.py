"""Whether an edit does what it should, and no more, before it is committed.

Efficacy: how likely the targets are at the edited questions, and whether each of their tokens is
the likeliest. Locality: KL(before || after) of the next-token distributions at the answers of
other questions, and how often the likeliest token changes. Size: |W' - W| / |W| of each matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from delible.edit.statistics import naming
from delible.errors import ModelError
from delible.records import QA, ForgetRequest, RecordBase
from delible.system.asks import Distribution, NoAnswer, Prompt, Score
from delible.system.questions import answer_of, ask, has_answer
from delible.world import general

if TYPE_CHECKING:
    from delible.lm.lm import LM

#: Other questions that are asked, at most.
OTHERS = 24


@dataclass(frozen=True)
class Bounds:
    """What an edit may cost.

    Attributes:
        divergence: Mean KL at other questions, in nats.
        change: |W' - W| / |W| of any matrix, Frobenius norms.
    """

    divergence: float
    change: float


@dataclass(frozen=True)
class Checked:
    """What an edit did.

    Attributes:
        target_before, target_after: Mean probability of the targets, per token (geometric mean).
        said: Share of questions at which each token of the target is the likeliest.
        divergence: Mean KL(before || after) over the tokens of other questions' answers, nats.
        moved: Share of those tokens whose likeliest one is another.
        others: How many other questions were asked.
        changes: Size of the change by layer.
    """

    target_before: float
    target_after: float
    said: float
    divergence: float
    moved: float
    others: int
    changes: Mapping[str, float]

    def notes(self) -> dict[str, object]:
        """As plain data."""
        return {
            name: float(f"{value:.4g}") if isinstance(value, float) else value
            for name, value in asdict(self).items()
        }

    def require(self, bounds: Bounds, where: str) -> None:
        """Refuses an edit that costs more than it may.

        Raises:
            ModelError: It does; says what and by how much.
        """
        size = max(self.changes.values())
        # a number that is none is within no bound
        if not self.divergence <= bounds.divergence:
            raise ModelError(
                f"the edit was refused and nothing was changed: at {self.others} other questions "
                f"it moves the model by {self.divergence:.3g} nats, {bounds.divergence:g} at most "
                "are allowed.",
                where=where,
                hint="Edit less (a larger rho, a smaller clamp, fewer questions at once), or allow "
                "more: most_divergence.",
            )
        if not size <= bounds.change:
            raise ModelError(
                f"the edit was refused and nothing was changed: it is {size:.3g} times as large as "
                f"the weights, {bounds.change:g} at most is allowed.",
                where=where,
                hint="Edit less (a larger rho, a smaller clamp, fewer questions at once), or allow "
                "more: most_change.",
            )


def other_questions(request: ForgetRequest, names: Sequence[str]) -> list[RecordBase]:
    """Questions that an edit should leave alone: what is kept, else general knowledge.

    Args:
        request: Its neighbours and retain records, in turn.
        names: Whoever is edited; questions that name them do not count.
    """
    named = naming(names)
    near: list[RecordBase] = [one for one in request.neighbours if usable(one, named)]
    kept = [one for one in request.retain if usable(one, named)]
    half = max(OTHERS // 2, OTHERS - len(kept))
    chosen = near[:half]
    chosen += kept[: OTHERS - len(chosen)]
    if not chosen:
        chosen += islice((one for one in general() if usable(one, named)), OTHERS)
    return chosen


def usable(record: RecordBase, named: Callable[[str], bool]) -> bool:
    """Whether a record asks something, knows the answer, and names nobody who is edited."""
    prompt = ask(record)
    if prompt is None or not prompt.messages or not has_answer(record):
        return False
    return not named(prompt.messages[-1].text)


class Before:
    """What a model says before an edit.

    Args:
        lm: The model.
        edited: Questions with their targets.
        others: Questions that should be left alone.
        ends: Whether the turn is to end behind a target.
    """

    def __init__(
        self,
        lm: LM,
        edited: Sequence[tuple[QA, str]],
        others: Sequence[RecordBase],
        *,
        ends: bool = True,
    ) -> None:
        self._ends = ends
        self._targets = [Score(Prompt.ask(record.question), target) for record, target in edited]
        asked = [(ask(record), answer_of(record)) for record in others]
        self._others = [Distribution(prompt, answer) for prompt, answer in asked if prompt]
        self._target = _probabilities(lm, self._targets, ends=ends)[0]
        self._said = _distributions(lm, self._others)

    def after(self, lm: LM, changes: Mapping[int, float]) -> Checked:
        """What the model says now, and what it has cost."""
        target, said = _probabilities(lm, self._targets, ends=self._ends)
        now = _distributions(lm, self._others)
        pairs = [
            (one, other)
            for one, other in zip(self._said, now, strict=True)
            if one is not None and other is not None
        ]
        broken = any(one is not None and other is None
                     for one, other in zip(self._said, now, strict=True))  # fmt: skip
        divergence = [divergences(one, other) for one, other in pairs]
        moved = [one.argmax(1) != other.argmax(1) for one, other in pairs]
        return Checked(
            self._target, target, said,
            float("nan") if broken else _mean(divergence), _mean(moved), len(pairs),
            {str(layer): float(f"{value:.4g}") for layer, value in changes.items()},
        )  # fmt: skip


def divergences(
    before: npt.NDArray[np.float32], after: npt.NDArray[np.float32]
) -> npt.NDArray[np.float64]:
    """KL(before || after) of log-probabilities [token, vocab], natural log, per token."""
    one, other = before.astype(np.float64), after.astype(np.float64)
    found: npt.NDArray[np.float64] = (np.exp(one) * (one - other)).sum(axis=1)
    return found


def _mean(parts: Sequence[npt.NDArray[np.generic]]) -> float:
    return float(np.concatenate(parts).mean()) if parts else 0.0


def _probabilities(lm: LM, asked: Sequence[Score], *, ends: bool = True) -> tuple[float, float]:
    """Mean probability of the answers, and the share whose every token is the likeliest.

    Args:
        ends: With the end of the turn behind them.
    """
    if not asked:
        return 0.0, 0.0
    means, hits = zip(*spoken(lm, asked, ends=ends), strict=True)
    return float(np.mean(means)), float(np.mean(hits))


def spoken(lm: LM, asked: Sequence[Score], *, ends: bool = True) -> list[tuple[float, bool]]:
    """Each answer's probability, per token (geometric mean), and whether every token is likeliest.

    Args:
        ends: With the end of the turn behind them.
    """
    found = []
    for one in lm.score(asked) if asked else []:
        if isinstance(one, NoAnswer):  # it counts: as nothing
            found.append((0.0, False))
            continue
        count = len(one.logprobs) - (one.has_end and not ends)
        found.append((float(np.exp(one.logprobs[:count].mean())), bool(one.hits[:count].all())))
    return found


def _distributions(lm: LM, asked: Sequence[Distribution]) -> list[npt.NDArray[np.float32] | None]:
    found = lm.inspect(asked) if asked else []
    return [None if isinstance(one, NoAnswer) else one for one in found]
