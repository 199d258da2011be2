"""A learned choice: will showing this case lead to a right answer to this question?

    Q(q, c) = softmax(W2 dropout(relu(W1 [e(q); e(c)])))_1

trained by cross-entropy, rows of success weighing max(1, failures / successes). The encoder e stays
as it is, so training again from the start is exact and takes seconds for thousands of rows: rows
alone decide the weights, in the order that they are given in.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import nn

from delible.component import Config
from delible.errors import DataError


class ScorerOptions(Config):
    """How it is trained."""

    hidden: int = Field(512, ge=1, description="Width of the layer between.")
    dropout: float = Field(0.2, ge=0, lt=1, description="Share of that layer left out at a time.")
    learning_rate: float = Field(1e-3, gt=0, description="Of AdamW, after the warm-up.")
    epochs: int = Field(10, ge=1, description="Times that every row is seen.")
    batch_size: int = Field(32, ge=1, description="Rows of one step.")
    weight_decay: float = Field(0.01, ge=0, description="Of AdamW.")
    warmup_share: float = Field(0.06, ge=0, le=1, description="Share of steps until full speed.")
    seed: int = Field(0, description="Of first weights, order and dropout.")


class Scorer:
    """A network over pairs of vectors.

    Args:
        width: Numbers in one vector.
    """

    def __init__(self, width: int, options: ScorerOptions | None = None) -> None:
        self.width, self.options = width, options or ScorerOptions()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.options.seed)
            self.network = nn.Sequential(
                nn.Linear(2 * width, self.options.hidden), nn.ReLU(),
                nn.Dropout(self.options.dropout), nn.Linear(self.options.hidden, 2),
            )  # fmt: skip
        self.network.eval()

    def scores(
        self, questions: Float[np.ndarray, "row hidden"], cases: Float[np.ndarray, "row hidden"]
    ) -> Float[np.ndarray, row]:
        """Probability of success for each pair, [0, 1]."""
        pairs = torch.from_numpy(np.concatenate([questions, cases], axis=1).astype(np.float32))
        with torch.inference_mode():
            found: Any = self.network(pairs).softmax(-1)[:, 1].numpy()
        return np.asarray(found)

    def save(self, path: Path) -> None:
        save_file(self.network.state_dict(), path)

    @classmethod
    def open(cls, path: Path, options: ScorerOptions | None = None) -> Scorer:
        """From a file of :meth:`save`."""
        weights = load_file(path)
        found = cls(weights["0.weight"].shape[1] // 2, options)
        found.network.load_state_dict(weights)
        return found


def positive_weight(labels: Sequence[int]) -> float:
    """Of rows of success: max(1, failures / successes)."""
    right = sum(labels)
    return max(1.0, (len(labels) - right) / right) if right else 1.0


def trained(
    questions: Float[np.ndarray, "row hidden"], cases: Float[np.ndarray, "row hidden"],
    labels: Sequence[int], options: ScorerOptions | None = None,
) -> Scorer:  # fmt: skip
    """A scorer from the start.

    Raises:
        DataError: There is no row.
    """
    if not len(labels):
        raise DataError("there is no row to train on.", where="scorer")
    options = options or ScorerOptions()
    scorer = Scorer(questions.shape[1], options)
    pairs = torch.from_numpy(np.concatenate([questions, cases], axis=1).astype(np.float32))
    wanted = torch.tensor(labels)
    weights = torch.tensor([1.0, positive_weight(labels)])
    steps = options.epochs * -(-len(labels) // options.batch_size)
    warm = max(1, round(options.warmup_share * steps))
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(options.seed)
        optimiser = torch.optim.AdamW(
            scorer.network.parameters(), options.learning_rate, weight_decay=options.weight_decay
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda n: min(1.0, (n + 1) / warm))
        scorer.network.train()
        for _ in range(options.epochs):
            for rows in torch.randperm(len(labels)).split(options.batch_size):
                loss = nn.functional.cross_entropy(
                    scorer.network(pairs[rows]), wanted[rows], weights
                )
                optimiser.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(scorer.network.parameters(), 1.0)
                optimiser.step()
                schedule.step()
    scorer.network.eval()
    return scorer


__all__ = ["Scorer", "ScorerOptions", "positive_weight", "trained"]
