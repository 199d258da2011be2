"""Values to write: for each edit a vector that makes the model answer with the target.

A vector d is added to what a module gives at the subject's last token, in every text of an edit:

    loss = mean over texts of (mean over target tokens of -log p)
           + kl KL(p_d || p_0)      the next token after the subject in "SUBJECT is a"
           + weight_decay |d| / |z_0|

by Adam from d = 0, with |d| <= clamp |z_0| after each step; z_0 is what the module gave before.
Steps are of d / rms(z_0), so that no number hangs on the size of a model's states.
Weights are frozen. All texts of all edits go through the model together, in batches of whole edits:
an edit's vector reaches no other edit's texts, so the sum of the losses has each one's gradient.

Paper: arXiv 2202.05262, 2210.07229. Deviations: texts are in the chat template, the essence too;
targets end with the end of the turn; an edit that has reached its target leaves the batch. The
authors' learning rate is r for d itself, r / rms(z_0) here, and their weight decay is over |z_0|^2,
so theirs is w / |z_0| here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from delible.edit.requests import Edit, Text
from delible.intervene.sites import Positions, Site
from delible.intervene.taps import Tap, Taps, Where
from delible.lm.body import SHORTEST_SHARED_PREFIX
from delible.lm.forward import Batch, Forward, collate, map_logits, target_logprobs
from delible.lm.lm import LM

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """How values are found.

    Attributes:
        steps: Evaluations of the loss at most; one update fewer.
        learning_rate: Of Adam, in units of rms(z_0).
        clamp: Longest d, as a share of \\|z_0\\|.
        weight_decay, kl: Weights of the loss's other terms.
        enough: An edit with a smaller loss is done.
    """

    steps: int = 25
    learning_rate: float = 0.5
    clamp: float = 4.0
    weight_decay: float = 1e-3
    kl: float = 0.0625
    enough: float = 0.05


@dataclass(frozen=True)
class Values:
    """What was found.

    Attributes:
        delta: d of each edit, [edits, hidden], float64.
        losses: The loss of each at its d.
        steps: Updates of each.
        probabilities: exp of the mean log-probability of the target's tokens, mean over texts.
    """

    delta: Float[Tensor, "edits hidden"]
    losses: list[float]
    steps: list[int]
    probabilities: list[float]


def edit_losses(
    logprobs: Float[Tensor, " tokens"],
    texts: Int[Tensor, " tokens"],
    owners: Int[Tensor, " texts"],
    essence: Float[Tensor, "edits vocab"],
    essence_before: Float[Tensor, "edits vocab"],
    delta: Float[Tensor, "edits hidden"],
    norms: Float[Tensor, " edits"],
    settings: Settings,
) -> tuple[Float[Tensor, " edits"], Float[Tensor, " texts"]]:
    """The loss of each edit, and the mean -log p of each text.

    Args:
        logprobs: log p of the target's tokens, of all texts.
        texts: Which text each token is of.
        owners: Which edit each text is of.
        essence, essence_before: Log-probabilities of the next token, with d and without.
        norms: \\|z_0\\|.
    """
    count = logprobs.new_zeros(len(owners)).index_add(0, texts, torch.ones_like(logprobs))
    nll = logprobs.new_zeros(len(owners)).index_add(0, texts, -logprobs) / count
    each = nll.new_zeros(len(delta)).index_add(0, owners, torch.ones_like(nll))
    mean = nll.new_zeros(len(delta)).index_add(0, owners, nll) / each
    kl = (essence.exp() * (essence - essence_before)).sum(dim=1)
    # the norm has no gradient at 0, where every search starts
    length = delta.square().sum(dim=1).clamp(min=torch.finfo(delta.dtype).tiny).sqrt()
    return mean + settings.kl * kl + settings.weight_decay * length / norms, nll


def clamped(
    delta: Float[Tensor, "edits hidden"], norms: Float[Tensor, " edits"], clamp: float
) -> Float[Tensor, "edits hidden"]:
    """d, shortened to clamp |z_0| where it is longer."""
    length = delta.norm(dim=1)
    return delta * (clamp * norms / length.clamp(min=1e-30)).clamp(max=1)[:, None]


def find_values(
    lm: LM,
    edits: Sequence[Edit],
    site: Site,
    start: Float[Tensor, "edits hidden"],
    settings: Settings,
) -> Values:
    """The vectors of edits.

    Args:
        lm: The model; its weights stay as they are.
        edits: Any number; batches are as large as the model's budget of tokens.
        site: One module: what d is added to.
        start: z_0.
        settings: How.
    """
    found: dict[int, tuple[Tensor, float, int, float]] = {}
    for places in _batches(lm, edits):
        part = _search(lm, [edits[place] for place in places], site, start[places], settings)
        columns = zip(part.delta, part.losses, part.steps, part.probabilities, strict=True)
        found |= dict(zip(places, columns, strict=True))
        if len(found) < len(edits):
            logger.info(f"edit: values of {len(found)} of {len(edits)} edits are found")
    delta, losses, steps, probabilities = zip(
        *(found[place] for place in range(len(edits))), strict=True
    )
    return Values(torch.stack(delta), list(losses), list(steps), list(probabilities))


def _batches(lm: LM, edits: Sequence[Edit]) -> Iterator[list[int]]:
    """Whole edits, as many as fit the budget of tokens; those of like length together."""
    longest = [max(len(text.row.ids) for text in edit.texts) for edit in edits]
    sizes = [size * (len(edit.texts) + 1) for size, edit in zip(longest, edits, strict=True)]
    batch: list[int] = []
    total = 0
    for place in sorted(range(len(edits)), key=lambda place: longest[place]):
        if batch and total + sizes[place] > lm.budget.tokens:
            yield sorted(batch)
            batch, total = [], 0
        batch.append(place)
        total += sizes[place]
    yield sorted(batch)


def _search(lm: LM, edits: Sequence[Edit], site: Site, start: Tensor, settings: Settings) -> Values:
    """The vectors of the edits of one batch."""
    norms = start.norm(dim=1).float().to(lm.device)
    unit = (norms / start.shape[1] ** 0.5)[:, None]  # rms(z_0)
    delta = torch.zeros(len(edits), start.shape[1], device=lm.device, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=settings.learning_rate)  # of d / unit
    losses = torch.full((len(edits),), float("inf"))
    steps, probabilities = [0] * len(edits), [0.0] * len(edits)
    before: Tensor | None = None
    active = list(range(len(edits)))
    with frozen(lm), lm.evaluating():
        forward = Passing(lm, [edits[place] for place in active], site)
        for step in range(settings.steps):
            chosen = torch.tensor(active, device=lm.device)
            added = delta[chosen] * unit[chosen]
            logprobs, essence = forward(added)
            if before is None:
                before = essence.detach()
            found, nll = edit_losses(
                logprobs, forward.text_of_token, forward.owners, essence, before[chosen],
                added, norms[chosen], settings,
            )  # fmt: skip
            going = []
            for place, active_place in enumerate(active):
                losses[active_place] = found[place].detach().float().cpu()
                texts = nll.detach()[forward.owners == place]
                probabilities[active_place] = float((-texts).exp().mean())
                if losses[active_place] >= settings.enough:
                    going.append(active_place)
            if step == settings.steps - 1 or not going:
                break
            kept = delta.detach().clone()
            (delta.grad,) = torch.autograd.grad(found.sum(), [delta])
            adam.step()
            with torch.no_grad():
                moves = torch.zeros(len(edits), 1, dtype=torch.bool, device=lm.device)
                moves[going] = True
                delta.copy_(
                    torch.where(moves, clamped(delta, norms / unit[:, 0], settings.clamp), kept)
                )
            for place in going:
                steps[place] += 1
            if len(going) < len(active):
                active = going
                forward = Passing(lm, [edits[place] for place in active], site)
    return Values((delta * unit).detach().double(), losses.tolist(), steps, probabilities)


class Passing:
    """A forward pass over the texts of edits in which each one's vector is added.

    Attributes:
        owners: Which edit each text is of.
        text_of_token: Which text each of the target's tokens is of.
    """

    def __init__(self, lm: LM, edits: Sequence[Edit], site: Site) -> None:
        self.lm, self._site, self._count = lm, site, len(edits)
        texts: list[tuple[int, Text]] = [
            (owner, text) for owner, edit in enumerate(edits) for text in edit.texts
        ]
        every = [*texts, *((owner, edit.essence) for owner, edit in enumerate(edits))]
        first = min(place for _, text in every for place in text.places)
        batch = collate([text.row for _, text in every], lm.pad_id, lm.device)
        shared = min(batch.prefix, first)
        self._batch: Batch = replace(
            batch, prefix=shared if shared >= SHORTEST_SHARED_PREFIX else 0
        )
        self._table = torch.full(batch.ids.shape, len(edits), device=lm.device)
        for row, (owner, text) in enumerate(every):
            self._table[row, list(text.places)] = owner
        lengths = torch.tensor([text.row.answer_tokens for _, text in texts])
        self.owners = torch.tensor([owner for owner, _ in texts], device=lm.device)
        self.text_of_token = torch.arange(len(texts)).repeat_interleave(lengths).to(lm.device)
        self._forward = Forward(lm)

    def __call__(self, delta: Float[Tensor, "edits hidden"]) -> tuple[Tensor, Tensor]:
        """log p of the target's tokens [tokens], and of the next ones after essences [edits, …]."""

        def add(states: Tensor, where: Where) -> Tensor:
            owner = self._table[where.text, where.place]
            return states + torch.cat([delta, delta.new_zeros(1, delta.shape[1])])[owner].to(states)

        taps = Taps(self.lm, [Tap(self._site, Positions(), add)])
        with taps.on(), self.lm.computing():
            states = self._forward(self._batch)[0]
            count = len(self.text_of_token)
            logprobs = map_logits(
                self.lm.head, states[:count], self._batch.targets[:count], target_logprobs,
                self.lm.vocabulary,
            )  # fmt: skip
            essence = self.lm.head(states[count:]).float().log_softmax(dim=1)
        return logprobs, essence


@contextmanager
def frozen(lm: LM) -> Iterator[None]:
    """Within it no weight takes part in gradients."""
    moving = [one for one in lm.model.parameters() if one.requires_grad]
    for one in moving:
        one.requires_grad_(False)
    try:
        yield
    finally:
        for one in moving:
            one.requires_grad_(True)
