"""A small network that tells vectors of two kinds apart: is a prompt about what is forgotten?

One hidden layer, cross-entropy with both kinds of equal weight, on standardised vectors, after
GUARD (arXiv 2505.13312), which publishes no code: sizes and rates are our choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from delible.errors import ModelError
from delible.lm.encoder import Encoder
from delible.lm.lm import LM
from delible.system.asks import Hidden, NoAnswer, Prompt

WIDTH, DROPOUT, LEARNING_RATE, EPOCHS, BATCH, PATIENCE = 512, 0.1, 1e-3, 20, 32, 3
#: Of fewer forgotten questions none is held back to tell when training should end.
FEW = 10

#: Stands for a question; no template holds it.
MARK = "\u2402question\u2403"
#: States are those that predict something; this follows a question, so that its last has one too.
AFTER = "."
#: Questions whose states are looked at together.
BLOCK = 64

#: Vectors of questions.
Features = Callable[[Sequence[str]], Float[np.ndarray, "text hidden"]]
Pooling = Literal["mean", "last"]


class Detector:
    """A network of one hidden layer: is a prompt about what is forgotten?

    Args:
        forgotten: Features of forgotten questions.
        others: Features of questions that should pass.
        seed: Of the first weights, the order and the dropout.
    """

    def __init__(
        self,
        forgotten: Float[np.ndarray, "text hidden"],
        others: Float[np.ndarray, "text hidden"],
        seed: int,
    ) -> None:
        inputs = np.concatenate([forgotten, others])
        self.mean, self.spread = inputs.mean(axis=0), inputs.std(axis=0) + 1e-6
        labels = torch.arange(len(inputs)) < len(forgotten)
        balance = torch.tensor([0.5 / len(others), 0.5 / len(forgotten)]) * len(inputs)
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
            torch.manual_seed(seed)
            self.network = nn.Sequential(
                nn.Linear(inputs.shape[1], WIDTH),
                nn.ReLU(),
                nn.Dropout(DROPOUT),
                nn.Linear(WIDTH, 2),
            )
            self._train(self._standard(inputs), labels.long(), balance)
        self.network.eval()

    def _train(self, inputs: torch.Tensor, labels: torch.Tensor, balance: torch.Tensor) -> None:
        """At most EPOCHS; ends when every fifth row's loss no longer falls, and keeps the best."""
        held = torch.arange(len(inputs)) % 5 == 4
        held &= (labels == 0) | (int(labels.sum()) >= FEW)  # of few forgotten ones all are needed
        rows, tested = (~held).nonzero()[:, 0], held.nonzero()[:, 0]
        tested = tested if len(tested) else rows
        optimiser = torch.optim.AdamW(self.network.parameters(), lr=LEARNING_RATE)
        best, kept, worse = math.inf, self._weights(), 0
        for _ in range(EPOCHS):
            self.network.train()
            for batch in rows[torch.randperm(len(rows))].split(BATCH):
                loss = nn.functional.cross_entropy(
                    self.network(inputs[batch]), labels[batch], weight=balance
                )
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
            self.network.eval()
            with torch.no_grad():
                value = float(
                    nn.functional.cross_entropy(
                        self.network(inputs[tested]), labels[tested], weight=balance
                    )
                )
            if value < best:
                best, kept, worse = value, self._weights(), 0
            else:
                worse += 1
                if worse == PATIENCE:
                    break
        self.network.load_state_dict(kept)

    def _weights(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in self.network.state_dict().items()}

    def _standard(self, inputs: Float[np.ndarray, "text hidden"]) -> torch.Tensor:
        return torch.from_numpy(((inputs - self.mean) / self.spread).astype(np.float32))

    def scores(self, inputs: Float[np.ndarray, "text hidden"]) -> list[float]:
        """Log-odds of each text to be about what is forgotten."""
        with torch.inference_mode():
            found = self.network(self._standard(np.asarray(inputs)))
        odds: list[float] = (found[:, 1] - found[:, 0]).tolist()
        if not all(map(math.isfinite, odds)):  # NaN is below every threshold: it would be a pass
            raise ModelError("the detector gave a value that is not finite.")
        return odds


def states_of(lm: LM, pooling: Pooling = "mean") -> Features:
    """Hidden states of the last but one block, where a text stands as a question.

    Args:
        lm: The model.
        pooling: The mean over the question's tokens and the start of the answer's turn (what stands
            before every question is left out), or the state of the last token.
    """
    layer = max(0, lm.anatomy.layers - 2)
    beginning = lm.template.render(Prompt.ask(MARK)).partition(MARK)[0]

    def features(texts: Sequence[str]) -> Float[np.ndarray, "text hidden"]:
        found: list[Float[np.ndarray, hidden]] = []
        for start in range(0, len(texts), BLOCK):
            asks = [
                Hidden(Prompt(text=beginning), f"{one.removeprefix(beginning)}{AFTER}", layer)
                for text in texts[start : start + BLOCK]
                for one in [lm.template.render(Prompt.ask(text))]
            ]
            for states in lm.inspect(asks):
                if isinstance(states, NoAnswer):
                    raise ModelError("the model cannot read a question: it is too long, or broken.")
                own = states[1:] if len(states) > 1 else states  # the first one is the beginning's
                found.append(own[-1] if pooling == "last" else own.mean(axis=0))
        return np.stack(found)

    return features


def vectors_of(encoder: Encoder) -> Features:
    """A sentence encoder's vectors."""
    return lambda texts: np.asarray(encoder.encode(list(texts)))


def log_odds(probability: float) -> float:
    """The log-odds of a probability; infinite for 1, so that nothing reaches it."""
    return math.inf if probability >= 1 else math.log(probability / (1 - probability))


__all__ = ["Detector", "Features", "Pooling", "log_odds", "states_of", "vectors_of"]
