"""Surrogate texts: what a model knows because of forget texts, in words far from all of them.

    gain(x) = l(x) - l_f(x)
    L(x)    = - w_d mean over forget texts of d(e(x), e(y)) - w_g gain(x) + w_l l(x)

l is the mean loss by token of the original, l_f that of the original after light fine-tuning on
the forget texts, d one minus the cosine of a sentence encoder. Single tokens are replaced as in
greedy coordinate gradient: the gradient of the last two terms proposes (the encoder reads other
tokens and has none), L of the whole text chooses. After each round a text is taken only if its
nearest forget text is farther away than before and it still gains enough.

Paper: arXiv 2512.19025 (the loop and the first term; the other terms and all limits are ours, as
no code is public).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from delible.lm.encoder import Encoder
from delible.lm.forward import Batch, Forward
from delible.lm.hooks import steer
from delible.lm.lm import LM
from delible.search.suffix import usable_tokens
from delible.system.asks import Prompt, Score, TokenScores

#: Words in a row that a surrogate may not share with a forget text.
RUN = 6


@dataclass(frozen=True)
class Weights:
    """Of the three terms of L."""

    distance: float = 1.0
    gain: float = 1.0
    loss: float = 0.1


@dataclass(frozen=True)
class Scored:
    """What is known of texts, one value each.

    Attributes:
        mean_distance: To all forget texts, in [0, 2].
        least_distance: To the nearest one.
        gain: Nats by token that fine-tuning on the forget texts takes off the loss.
        loss: Nats by token of the original.
    """

    mean_distance: Float[np.ndarray, " text"]
    least_distance: Float[np.ndarray, " text"]
    gain: Float[np.ndarray, " text"]
    loss: Float[np.ndarray, " text"]

    def objective(self, weights: Weights) -> Float[np.ndarray, " text"]:
        """L of each text; lower = farther, more told, more fluent."""
        return (
            -weights.distance * self.mean_distance
            - weights.gain * self.gain
            + weights.loss * self.loss
        )


def losses(lm: LM, texts: Sequence[str]) -> Float[np.ndarray, " text"]:
    """Mean loss by token of each text, in nats; infinite where it has no tokens."""
    found = lm.score([Score(Prompt(text=""), text) for text in texts])
    return np.array([
        -float(one.logprobs.mean())
        if isinstance(one, TokenScores) and len(one.logprobs) else np.inf
        for one in found
    ])  # fmt: skip


@dataclass(frozen=True)
class Judge:
    """Scores texts against the forget texts.

    Attributes:
        original: Before unlearning.
        tuned: The original after light fine-tuning on the forget texts.
        forget: The forget texts.
    """

    original: LM
    tuned: LM
    encoder: Encoder
    forget: tuple[str, ...]

    @cached_property
    def _targets(self) -> Float[np.ndarray, "forget hidden"]:
        return self.encoder.encode(self.forget)

    def __call__(self, texts: Sequence[str]) -> Scored:
        """What is known of texts."""
        distances = 1 - self.encoder.encode(list(texts)) @ self._targets.T
        before, after = losses(self.original, texts), losses(self.tuned, texts)
        return Scored(distances.mean(axis=1), distances.min(axis=1), before - after, before)


def loss_gradient(lm: LM, ids: Sequence[int]) -> Float[Tensor, "token vocab"]:
    """Gradient of a text's mean loss at its one-hot tokens, as what is read and what is said."""
    before = lm.template.prompt_ids(Prompt(text=""))
    row = torch.tensor([[*before, *ids]], device=lm.device)
    ends = [torch.tensor([size], device=lm.device) for size in (row.shape[1], len(before))]
    batch = Batch(row, ends[0], ends[1], 0)
    embedded: list[Tensor] = []

    def cut(values: Tensor) -> Tensor:
        embedded.append(values.detach().requires_grad_(True))
        return embedded[0]

    with torch.enable_grad(), lm.evaluating():
        with lm.computing(), steer(lm.core, lm.anatomy.embedding, cut):
            states, _ = Forward(lm)(batch)
        assert states is not None
        said = lm.head(states).float().log_softmax(dim=1)
        loss = -said.gather(1, row[0, len(before) :, None]).mean()
        (gradient,) = torch.autograd.grad(loss, embedded)
    module = lm.core.get_submodule(lm.anatomy.embedding)
    with torch.no_grad():
        every = module(torch.arange(lm.core.get_input_embeddings().weight.shape[0]).to(lm.device))
        found = gradient[0, len(before) :].float() @ every.float().T
        width = min(found.shape[1], said.shape[1])
        found[:, :width] -= said.detach()[:, :width] / len(ids)
    return found.cpu()


def candidates(
    judge: Judge, text: str, weights: Weights, *, top_k: int, count: int, random: torch.Generator
) -> list[str]:
    """Texts with one token replaced by a promising one, each read back as its own tokens."""
    lm = judge.original
    ids = tuple(lm.tokenizer(text, add_special_tokens=False)["input_ids"])
    if not ids:
        return []
    before, after = loss_gradient(lm, ids), loss_gradient(judge.tuned, ids)
    slope = (weights.loss - weights.gain) * before + weights.gain * after
    allowed = usable_tokens(lm)
    slope = slope[:, : len(allowed)].masked_fill(~allowed, torch.inf)
    promising = (-slope).topk(min(top_k, int(allowed.sum())), dim=1).indices
    found: dict[str, None] = {}
    places = torch.randint(len(ids), (8 * count,), generator=random).tolist()
    ranks = torch.randint(promising.shape[1], (8 * count,), generator=random).tolist()
    for place, rank in zip(places, ranks, strict=True):
        tried = (*ids[:place], int(promising[place, rank]), *ids[place + 1 :])
        said = lm.tokenizer.decode(list(tried), clean_up_tokenization_spaces=False)
        read = tuple(lm.tokenizer(said, add_special_tokens=False)["input_ids"])
        if tried != ids and read == tried:
            found[said] = None
        if len(found) == count:
            break
    return list(found)


@dataclass(frozen=True)
class Round:
    """What one round made of a text.

    Attributes:
        taken: Whether it took the place of the one before.
    """

    text: str
    least_distance: float
    gain: float
    taken: bool


def push(
    judge: Judge,
    text: str,
    *,
    least_gain: float,
    random: torch.Generator,
    weights: Weights | None = None,
    rounds: int = 3,
    steps: int = 20,
    top_k: int = 64,
    batch: int = 64,
) -> tuple[str, list[Round]]:
    """A text moved away from the forget texts, and what its rounds made.

    The distances of the rounds that were taken rise from one to the next.

    Args:
        text: A paraphrase of a forget text, or one itself.
        least_gain: Nats by token that a text must gain to be taken.
        rounds: Rounds of so many steps each.
        batch: Substitutions that are scored per step.
    """
    weights = weights or Weights()
    nearest, history = float(judge([text]).least_distance[0]), list[Round]()
    for _ in range(rounds):
        tried = text
        best = float(judge([tried]).objective(weights)[0])
        for _ in range(steps):
            pool = candidates(judge, tried, weights, top_k=top_k, count=batch, random=random)
            if not pool:
                break
            values = judge(pool).objective(weights)
            place = int(np.argmin(values))
            if values[place] < best:
                tried, best = pool[place], float(values[place])
        scored = judge([tried])
        distance, gain = float(scored.least_distance[0]), float(scored.gain[0])
        taken = distance > nearest and gain >= least_gain
        history.append(Round(tried, distance, gain, taken))
        if taken:
            text, nearest = tried, distance
    return text, history
