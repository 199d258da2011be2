"""Between a run's start and its result: a question is answered anywhere on the line of weights."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from pathlib import Path

from delible.errors import RunError
from delible.lm.between import move_between
from delible.lm.lm import LM
from delible.records import QA
from delible.system.asks import Decoding, NoAnswer
from delible.system.questions import ask
from delible.systems.opening import merged_model, open_base
from delible.train.monitor import answer_probability

MAX_NEW_TOKENS = 48


@dataclass(frozen=True)
class Said:
    """What one model says.

    Attributes:
        text: Its answer, or why there is none.
        probability: Geometric mean over the tokens of the expected answer; None: none is known.
    """

    text: str
    probability: float | None


class Line:
    """The models between a run's start and its result.

    Three sets of weights are in memory: both ends, and the one in between that answers.

    Args:
        folder: Of a run whose artefact is in weights (a model, an adapter, a patch).

    Raises:
        RunError: It is not, or its start is gone or of another form.
    """

    def __init__(self, folder: Path) -> None:
        start = open_base(folder)
        if not isinstance(start, LM):
            raise RunError(
                f"what it was made from ('{start.name}') has no weights here.", where=str(folder)
            )
        self.start, self.result = start.merged(), merged_model(str(folder))
        self._between = self.start.copy("in between")
        self._lock = threading.Lock()

    def said(self, question: str, share: float, expected: str | None = None) -> list[Said]:
        """Answers of the start, of the model at ``share`` of the way, and of the result.

        Args:
            share: In [0, 1]; 0 is the start.
            expected: The right answer, if it is known.

        Raises:
            RecipeError: The result has other parameters than the start.
        """
        with self._lock:
            move_between(self._between, self.start, self.result, share)
            models = (self.start, self._between, self.result)
            return [_said(lm, question, expected) for lm in models]


def _said(lm: LM, question: str, expected: str | None) -> Said:
    record = QA(question=question, answer=expected or "-")
    prompt = ask(record)
    if prompt is None:
        raise RunError("this is no question.")
    text = lm.generate([prompt], Decoding(MAX_NEW_TOKENS))[0]
    found = answer_probability(lm, [record]) if expected else math.nan
    return Said(
        text.reason if isinstance(text, NoAnswer) else text, found if math.isfinite(found) else None
    )
