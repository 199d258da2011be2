"""A side memory: changed copies of one down-projection, and when one of them is used instead.

With D = W' - W the change of a copy and A what the down-projection reads at a token, the routing
activation is

    a = |D A|                                                  what the copy gives otherwise than W

and a copy is used where its a is the largest of all and above share * epsilon, its threshold.

    loss = CE of the target with the copy in use
           + mean relu(a_out - alpha) + mean relu(beta - a_in) + mean relu(a_out - a_in + gamma)

over tokens of edited questions (in) and of others (out), the last over all pairs: half of it over
the questions' ends, where an answer begins, half over the tokens behind them. D moves at the
entries of a fixed random mask only. Full copies are merged by TIES: of each the largest entries
stay, the sign with the larger sum is taken, and what agrees with it is averaged.

Paper: arXiv 2405.14768 (WISE), 2306.01708 (TIES).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from delible.edit.memory import Targets
from delible.edit.values import frozen
from delible.intervene.sites import Positions, Site
from delible.intervene.taps import Where
from delible.lm.lm import LM
from delible.lm.template import Encoded


@dataclass(frozen=True)
class Margins:
    """Bounds of routing activations.

    Attributes:
        alpha: Most at other questions.
        beta: Least at edited ones.
        gamma: Least difference of the two.
    """

    alpha: float
    beta: float
    gamma: float


def routing(
    received: Float[Tensor, "token width"], change: Float[Tensor, "hidden width"]
) -> Float[Tensor, " token"]:
    """a of each token."""
    moved = received @ change.T
    # the norm has no gradient at 0, where a copy begins
    return moved.square().sum(dim=1).clamp(min=torch.finfo(moved.dtype).tiny).sqrt()


def margin_loss(
    inside: Float[Tensor, " token"], outside: Float[Tensor, " other"], margins: Margins
) -> Float[Tensor, ""]:
    """The three terms that keep routing activations apart, in units of the margins."""
    apart = outside[None, :] - inside[:, None] + margins.gamma
    return (
        (outside - margins.alpha).relu().mean()
        + (margins.beta - inside).relu().mean()
        + apart.relu().mean()
    )


def margins_of(
    inside: Sequence[Float[Tensor, "token width"]],
    outside: Sequence[Float[Tensor, "token width"]],
    change: Float[Tensor, "hidden width"],
    margins: Margins,
) -> Float[Tensor, ""]:
    """The margin loss of texts: half over their first tokens, half over all others.

    Args:
        inside, outside: What is read at each text's tokens, from the question's end on.
    """
    first, behind = (
        margin_loss(
            routing(torch.cat([one[part] for one in inside]), change),
            routing(torch.cat([one[part] for one in outside]), change),
            margins,
        )
        for part in (slice(1), slice(1, None))
    )
    return (first + behind) / 2


def ties(
    changes: Float[Tensor, "copy hidden width"], density: float
) -> Float[Tensor, "hidden width"]:
    """One change of several.

    Args:
        changes: All weigh the same.
        density: Share of each one's entries that count, the largest ones.
    """
    flat = changes.reshape(len(changes), -1)
    kept = max(1, round(density * flat.shape[1]))
    least = flat.abs().topk(kept, dim=1).values[:, -1:]
    trimmed = torch.where(flat.abs() >= least, flat, 0.0)
    sign = trimmed.sum(dim=0).sign()
    agree = (trimmed.sign() == sign) & (trimmed != 0)
    merged = torch.where(agree, trimmed, 0.0).sum(0) / agree.sum(0).clamp(min=1)
    return merged.reshape(changes.shape[1:])


def fixed_mask(shape: Sequence[int], share: float, seed: int) -> Bool[Tensor, "hidden width"]:
    """Entries that may move: each with this probability, the same for the same seed."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < share


def chosen(
    received: Float[Tensor, "token width"],
    changes: Float[Tensor, "copy hidden width"],
    thresholds: Float[Tensor, " copy"],
) -> tuple[Float[Tensor, "token hidden"], Int[Tensor, " token"]]:
    """What is added to what W gives, and the copy in use; -1: none, and zeros are added."""
    moved = torch.einsum("chw,tw->cth", changes, received)
    activations = moved.norm(dim=2)
    largest, copy = activations.max(dim=0)
    used = largest > thresholds[copy]
    added = moved[copy, torch.arange(len(received), device=received.device)]
    return torch.where(used[:, None], added, torch.zeros_like(added)), torch.where(used, copy, -1)


@dataclass(frozen=True)
class Settings:
    """How a copy is trained.

    Attributes:
        steps: Updates at most.
        learning_rate: Of plain gradient descent on W'.
        weight_decay: Of it, on W'.
        margins: In units of the activations.
        unit: What margin losses are divided by.
        farthest: W' stays this near to W, entry by entry.
        enough, still: Training ends where the loss is below the first and changes by less than
            the second.
    """

    steps: int
    learning_rate: float
    weight_decay: float
    margins: Margins
    unit: float
    farthest: float
    enough: float
    still: float = 1e-4


def trained(
    lm: LM,
    rows: Sequence[Encoded],
    site: Site,
    positions: Positions,
    inside: Sequence[Float[Tensor, "token width"]],
    outside: Sequence[Float[Tensor, "token width"]],
    weight: Float[Tensor, "hidden width"],
    start: Float[Tensor, "hidden width"],
    mask: Bool[Tensor, "hidden width"],
    settings: Settings,
) -> tuple[Float[Tensor, "hidden width"], float]:
    """D after training, and its loss.

    Args:
        rows: Edited questions with targets.
        site, positions: Where the copy is in use.
        inside, outside: What the down-projection reads at the tokens of each edited question and
            each other one, from its end on.
        weight: W.
        start: D before.
        mask: Entries that may move.
    """
    weight, mask = weight.to(lm.device), mask.to(lm.device)
    inside, outside = ([one.to(lm.device) for one in texts] for texts in (inside, outside))
    change = start.to(lm.device).clone().requires_grad_()
    targets = Targets(lm, rows, site, positions)
    before, loss = float("inf"), float("inf")

    def using(states: Tensor, texts: Tensor, where: Where) -> Tensor:
        assert where.received is not None
        return states + (where.received.float() @ change.T).to(states.dtype)

    with frozen(lm):
        for step in range(settings.steps + 1):
            margin = margins_of(inside, outside, change, settings.margins) / settings.unit
            (gradient,) = torch.autograd.grad(margin, [change])
            loss = float(margin.detach())
            for _, nll in targets.nll(using):
                part = nll.sum() / len(rows)
                gradient = gradient + torch.autograd.grad(part, [change])[0]
                loss += float(part.detach())
            if step == settings.steps or (
                loss <= settings.enough and abs(loss - before) <= settings.still
            ):
                break
            before = loss
            with torch.no_grad():
                decayed = gradient + settings.weight_decay * (weight + change)
                change -= settings.learning_rate * torch.where(mask, decayed, 0.0)
                change.clamp_(-settings.farthest, settings.farthest)
    return change.detach().cpu(), loss
