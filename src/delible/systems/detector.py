"""A small network that tells vectors of two kinds apart: is a prompt about what is forgotten?

One hidden layer, cross-entropy with both kinds of equal weight, on standardised vectors. Its sizes
and rates are those of GUARD (arXiv 2505.13312), as far as they are known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

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

#: Vectors of prompts.
Features = Callable[[Sequence[Prompt]], Float[np.ndarray, "prompt hidden"]]


class Detector:
    """A network of one hidden layer: is a prompt about what is forgotten?

    Args:
        forgotten: Features of forgotten questions.
        others: Features of questions that should pass.
        seed: Of the first weights, the order and the dropout.
    """

    def __init__(
        self,
        forgotten: Float[np.ndarray, "prompt hidden"],
        others: Float[np.ndarray, "prompt hidden"],
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
                    nn.functional.cross_entropy(self.network(inputs[tested]), labels[tested])
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

    def _standard(self, inputs: Float[np.ndarray, "prompt hidden"]) -> torch.Tensor:
        return torch.from_numpy(((inputs - self.mean) / self.spread).astype(np.float32))

    def scores(self, inputs: Float[np.ndarray, "prompt hidden"]) -> list[float]:
        """Log-odds of each prompt to be about what is forgotten."""
        with torch.inference_mode():
            found = self.network(self._standard(np.asarray(inputs)))
        odds: list[float] = (found[:, 1] - found[:, 0]).tolist()
        if not all(map(math.isfinite, odds)):  # NaN is below every threshold: it would be a pass
            raise ModelError("the detector gave a value that is not finite.")
        return odds


def states_of(lm: LM) -> Features:
    """The hidden state of the last but one block at each prompt's last token."""
    layer = max(0, lm.anatomy.layers - 2)

    def features(prompts: Sequence[Prompt]) -> Float[np.ndarray, "prompt hidden"]:
        found = lm.inspect([Hidden(prompt, ".", layer) for prompt in prompts])
        missing = next((one.reason for one in found if isinstance(one, NoAnswer)), None)
        if missing is not None:
            raise ModelError(f"the model cannot read a prompt: {missing}.")
        return np.stack([one[0] for one in found if not isinstance(one, NoAnswer)])

    return features


def vectors_of(encoder: Encoder) -> Features:
    """The sentence encoder's vector of each prompt's last turn."""

    def features(prompts: Sequence[Prompt]) -> Float[np.ndarray, "prompt hidden"]:
        return np.asarray(encoder.encode([prompt.messages[-1].text for prompt in prompts]))

    return features


def log_odds(probability: float) -> float:
    """The log-odds of a probability; infinite for 1, so that nothing reaches it."""
    return math.inf if probability >= 1 else math.log(probability / (1 - probability))


__all__ = ["Detector", "Features", "log_odds", "states_of", "vectors_of"]
