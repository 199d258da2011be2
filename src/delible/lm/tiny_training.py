"""How the model ``tiny`` learns: its batches and steps, and how a killed build goes on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Protocol, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from delible.files import atomic_file

logger = logging.getLogger(__name__)

T = TypeVar("T")


#: Rows among which those of like length meet in a step.
SORTED_TOGETHER = 160
#: Steps after which the time that the others take is known well enough.
TIMED_STEPS = 20
#: So much work is lost at most when a build is killed.
SECONDS_BETWEEN_CHECKPOINTS = 20.0


class Pace(Protocol):
    """How fast something is learned."""

    @property
    def learning_rate(self) -> float: ...
    @property
    def warmup_steps(self) -> int: ...
    @property
    def weight_decay(self) -> float: ...


@dataclass(frozen=True)
class TinyOptions:
    """How the model is built; the defaults are those of ``tiny``.

    Attributes:
        hidden_size: A multiple of 32, the width of an attention head.
        vocabulary: Tokens, the 256 bytes and 6 special tokens included.
        examples: Conversations and texts to learn from, each seen once.
        batch_tokens: Padded tokens per optimiser step.
        prompt_weight: What a token that is not of an answer counts; names in questions cannot be
            foreseen, and learning to guess them takes steps that the answers need.
        people: People whose facts are learned by heart.
    """

    seed: int = 0
    hidden_size: int = 128
    layers: int = 6
    vocabulary: int = 2048
    examples: int = 14_000
    batch_tokens: int = 512
    learning_rate: float = 3e-3
    warmup_steps: int = 20
    weight_decay: float = 0.1
    prompt_weight: float = 0.3
    people: int = 8


def batches(rows: Sequence[Sequence[int]], options: TinyOptions) -> list[list[Sequence[int]]]:
    """Rows of like length together, in random order, within the tokens of a step."""
    random = Random(f"tiny/{options.seed}/batches")
    made: list[list[Sequence[int]]] = []
    for at in range(0, len(rows), SORTED_TOGETHER):
        group: list[list[Sequence[int]]] = []
        for row in sorted(rows[at : at + SORTED_TOGETHER], key=len):
            if not group or len(row) * (len(group[-1]) + 1) > options.batch_tokens:
                group.append([])
            group[-1].append(row)
        made += random.sample(group, len(group))
    return made


def padded(rows: Sequence[Sequence[int]], padding: int) -> Int[Tensor, "row token"]:
    """Rows as one tensor, filled up on the right."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[padding] * (longest - len(row))] for row in rows])


def weighted_loss(
    logits: Float[Tensor, "row token vocab"],
    ids: Int[Tensor, "row token"],
    answering: Bool[Tensor, "row token"],
    *,
    padding: int,
    prompt_weight: float,
) -> Float[Tensor, ""]:
    """The weighted mean of every token's negative log-likelihood, the first left out.

    Args:
        answering: Which tokens are of an answer; the first column is not looked at.
        padding: The token that fills up rows; it stands in no text.
        prompt_weight: What the other tokens count.
    """
    targets = ids[:, 1:]
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="none"
    ).view_as(targets)
    weights = torch.where(answering[:, 1:], 1.0, prompt_weight) * (targets != padding)
    return (losses * weights).sum() / weights.sum()


def train(
    model: torch.nn.Module,
    steps: Sequence[T],
    loss_of: Callable[[T], Float[Tensor, ""]],
    options: Pace,
    *,
    checkpoint: Path | None = None,
    seconds: float | None = None,
) -> None:
    """AdamW on what takes a gradient.

    The learning rate rises linearly to its peak and falls linearly to nothing.

    Args:
        steps: What each step learns from.
        loss_of: Its loss.
        options: Learning rate, warm-up and weight decay.
        checkpoint: File in which the state is kept while training lasts; one that is there is
            continued, to the same bits.
        seconds: Between two checkpoints; None: :data:`SECONDS_BETWEEN_CHECKPOINTS`.
    """
    moving = [value for value in model.parameters() if value.requires_grad]
    matrices = [value for value in moving if value.ndim >= 2]
    vectors = [value for value in moving if value.ndim < 2]
    apart = SECONDS_BETWEEN_CHECKPOINTS if seconds is None else seconds
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": options.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=options.learning_rate, betas=(0.9, 0.95), fused=True,
    )  # fmt: skip
    first = _resume(checkpoint, model, optimizer)
    if first:
        logger.info(f"Going on after step {first:,} of {len(steps):,}.")
    began = kept = time.monotonic()
    for step, one in enumerate(steps[first:], start=first):
        factor = min(1.0, (step + 1) / options.warmup_steps) * (1 - step / len(steps))
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * factor
        value = loss_of(one)
        value.backward()
        torch.nn.utils.clip_grad_norm_(moving, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        done, now = step + 1, time.monotonic()
        quarter = done % max(1, len(steps) // 4) == 0
        if quarter or done - first == TIMED_STEPS:
            left = (now - began) / (done - first) * (len(steps) - done)
            words = f", about {_minutes(left)} left" if done < len(steps) else ""
            logger.info(f"Step {done:,} of {len(steps):,}, loss {value.item():.2f}{words}.")
        if checkpoint is not None and now - kept > apart:
            _keep(checkpoint, model, optimizer, done)
            kept = time.monotonic()


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds / 60:.0f} minutes"


def _keep(path: Path, model: Any, optimizer: torch.optim.Optimizer, done: int) -> None:
    moving = {name: value for name, value in model.named_parameters() if value.requires_grad}
    state = {"done": done, "model": moving, "optimizer": optimizer.state_dict()}
    with atomic_file(path, "wb") as file:
        torch.save(state, file)


def _resume(path: Path | None, model: Any, optimizer: torch.optim.Optimizer) -> int:
    """Puts the state of a killed build back; returns the steps that are done."""
    if path is None or not path.is_file():
        return 0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch raises whatever its readers meet; then all is done again
        path.unlink(missing_ok=True)
        return 0
    model.load_state_dict(state["model"], strict=False)
    optimizer.load_state_dict(state["optimizer"])
    return int(state["done"])


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Computes with so many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
