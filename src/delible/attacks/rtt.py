"""Retraining on T (RTT): learns some facts again, and is asked about others, every part in turn.

The forget facts are dealt into five parts that say nothing of each other. A copy is fine-tuned on
all parts but one and judged on that one; then the next part is left out. Nothing in the training
rows teaches what is asked, so what comes back was there:

    for each part V_k:   theta_k = AdamW(theta, mean of -log p(T_k)),  T_k = all other parts;
                         leak on V_k with theta_k;     one row: every record by the model that
                                                       did not train on its part

The retrained reference goes through the same; its rise on V is what the form of questions and
answers teaches, and is not counted.

For multiple choice the accuracy with calibrated letters is told besides: from each letter's log
probability its mean over the records is taken away before the largest wins, so that a model that
came to love one letter is judged by the rest of what it says.

Paper: arXiv 2410.08827. Reference code: github.com/aghyad-deeb/unlearning_evaluation. Deviations:
AdamW instead of Lion, with the rate of our relearning attack, as Lion's rates are not comparable;
the loss is on answer tokens, without padding (the reference averages over the question and over
padding too); multiple choice is trained as its own answer; one rate instead of the doubling sweep,
which options allow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Float
from pydantic import Field

from delible.cards import Depth
from delible.lm.lm import LM
from delible.measure.attack import AttackContext, Budget, ModelAttack
from delible.measure.scoring.choices import (
    letter_prompt,
    letter_scores,
    most_likely,
    text_log_probability,
)
from delible.records import Choice, RecordBase
from delible.registry import register
from delible.system.asks import NoAnswer
from delible.train.splits import parts_by_fact
from delible.train.tuning import FineTuning

Letters = list[tuple[Float[np.ndarray, " option"], int]]


def calibrated_accuracy(letters: Sequence[tuple[Float[np.ndarray, " option"], int]]) -> float:
    """Share of questions whose right letter wins after each letter's mean is taken away.

    Args:
        letters: Per question the letters' log-probabilities, and the place of the right one.
    """
    longest = max(len(logs) for logs, _ in letters)
    table = np.full((len(letters), longest), np.nan)
    for row, (logs, _) in zip(table, letters, strict=True):
        row[: len(logs)] = logs
    centred = table - np.nanmean(table, axis=0)
    picked = np.nanargmax(centred, axis=1)
    return float(
        np.mean([place == right for place, (_, right) in zip(picked, letters, strict=True)])
    )


@register(
    kind="attack",
    name="rtt",
    title="Retraining on other facts",
    summary="Fine-tunes on four fifths of the forgotten facts and asks about the last, in turns.",
    paper="2410.08827",
    year=2024,
    family="relearning",
    needs=("forget", "weights"),
    changes="weights",
    reversible=True,
    capability="weights",
    depth="deep",
    badges=("variant",),
    variant="AdamW instead of Lion, one rate, and the loss on answer tokens only.",
)
class RetrainOnT(ModelAttack):
    """Options of RTT."""

    parts: int = Field(5, ge=2, description="Parts into which the facts are dealt.")
    rotations: int = Field(
        5, ge=1, description="How many parts are left out in turn; only these are judged."
    )
    whole_subjects: bool = Field(
        False, description="Keep all facts of a subject in one part, instead of single facts."
    )
    epochs: int = Field(6, ge=1, description="Passes over the training parts.")
    learning_rate: float = Field(2e-5, gt=0, le=1, description="Peak rate of AdamW.")
    batch_size: int = Field(4, ge=1, description="Rows per optimiser step.")

    def variants(self, depth: Depth = "standard") -> Sequence[Mapping[str, object]]:
        """One setting, of half the paper's epochs: the turns make it dear."""
        return ({"epochs": max(1, self.epochs // 2)},)

    def variant_title(self) -> str:
        """Such as "5 parts, 3 epochs"."""
        few = f" of {self.parts}" if self.rotations < self.parts else ""
        turns = min(self.rotations, self.parts)
        return f"{turns}{few} parts, {self.epochs} epoch{'s' * (self.epochs > 1)}"

    def _parts(self, context: AttackContext) -> list[list[RecordBase]]:
        return parts_by_fact(
            context.forget, self.parts, context.seed, whole_subjects=self.whole_subjects
        )

    def held_out(self, context: AttackContext) -> Sequence[RecordBase]:
        """The parts that are left out, one after the other.

        Raises:
            DataError: All forget rows are of one fact.
        """
        return [record for part in self._parts(context)[: self.rotations] for record in part]

    def trained_on(self, context: AttackContext, turn: int) -> list[RecordBase]:
        """The rows of one turn: all parts but the one that is left out."""
        parts = self._parts(context)
        return [record for place, part in enumerate(parts) if place != turn for record in part]

    def _steps(self, rows: int) -> int:
        return self.epochs * math.ceil(rows / self.batch_size)

    def budget(self, context: AttackContext) -> Budget:
        """The steps of all turns."""
        turns = range(min(self.rotations, len(self._parts(context))))
        return Budget(steps=sum(self._steps(len(self.trained_on(context, turn))) for turn in turns))

    def apply(self, lm: LM, context: AttackContext) -> LM:
        """The copy of the first turn."""
        return self._tuned(lm, context, 0)

    def each(self, lm: LM, context: AttackContext) -> Iterator[tuple[LM, Sequence[RecordBase]]]:
        """The copies of all turns, each with the part that it did not see.

        Raises:
            DataError: All forget rows are of one fact.
            RunError: Training collapsed or moved nothing.
        """
        parts = self._parts(context)
        out = len(context.forget) - sum(map(len, parts))
        if out:
            context.notes["note"] = (
                f"{out} forget row{'s' * (out > 1)} tell{'s' * (out == 1)} facts of several "
                "parts, and took no part."
            )
        letters: Letters = []
        for turn, part in enumerate(parts[: self.rotations]):
            tuned = self._tuned(lm, context, turn)
            letters += self._letters(tuned, part)
            yield tuned, part
        if letters:
            context.numbers["calibrated choice accuracy"] = calibrated_accuracy(letters)

    def _tuned(self, lm: LM, context: AttackContext, turn: int) -> LM:
        rows = self.trained_on(context, turn)
        steps = self._steps(len(rows))
        turns = min(self.rotations, len(self._parts(context)))

        def watch(twin: LM, step: int, total: int) -> None:
            if context.progress is not None and step:
                context.progress(turn * total + step, turns * total)

        tuning = FineTuning(steps, self.learning_rate, self.batch_size)
        return tuning.tuned(lm, rows, context.seed, watch).lm

    @staticmethod
    def _letters(lm: LM, records: Sequence[RecordBase]) -> Letters:
        """The letters' log-probabilities of the questions that have options."""
        choices = [record for record in records if isinstance(record, Choice)]
        asked = [letter_scores(record, letter_prompt(record, "chat")) for record in choices]
        answers = iter(lm.score([score for row in asked for score in row]))
        found: Letters = []
        for record, row in zip(choices, asked, strict=True):
            scores = [next(answers) for _ in row]
            if any(isinstance(one, NoAnswer) for one in scores):
                continue  # a question that does not fit has no letters
            logs = np.array([text_log_probability(one) for one in scores])
            if most_likely(logs) is not None:
                found.append((logs, record.correct))
        return found
