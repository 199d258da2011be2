"""Latent adversarial training (LAT): forget while an optimised perturbation brings the facts back.

    delta = argmin over |delta_t| <= epsilon of  toward * CE(y | x; h + delta)
                                                + away * -log(1 - p(z | x; h + delta))
    gradient = gradient of the forget loss (any) at h + delta + (retain gradient at h)

h is what the MLPs of a few blocks give, y the forget answer and z what an objective would have said
instead, if it reads such rows (a refusal, another answer). Each row has its own delta at its masked
tokens, found from 0 by AdamW and shortened to epsilon token by token after every iteration. It then
stays for ``outer_steps`` optimiser steps on the same rows; what is kept is never perturbed. Away
terms of tokens with log p below -5 count 0. Costs ``inner_steps`` more forward and backward passes
per ``outer_steps``, and memory for one perturbation of a step's rows.

Paper: arXiv 2407.15549. Reference code: github.com/aengusl/latent-adversarial-training.
Deviations: the radius is by default relative, epsilon times the median length of the row's states
behind each attacked block at masked tokens (the code: absolute, 2 on a 7B model). The search
runs in units of the radius, so that its rate does not depend on width either: ``inner_rate`` is the
length of a first step in radii, and 1.6 is the code's rate of 0.05 per entry at width 4096 and
radius 2. No weight decay on delta (the code: AdamW's 0.01). All tokens are perturbed, as the code
does with corpora; ``tokens`` prompt or answer restricts it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from delible.errors import RecipeError
from delible.lm.forward import Batch, TokenFunction, complement_logprobs, target_logprobs
from delible.lm.hooks import capture
from delible.lm.lm import LM
from delible.registry import register
from delible.train.passes import Passes
from delible.train.perturbation import (
    States,
    adding,
    answer_sum,
    attacked_role,
    check_seen,
    rows_apart,
    rows_around,
)
from delible.train.processes import gathered
from delible.train.row import Row
from delible.train.slots import Harden
from delible.train.step import Group, Step

Perturbation = Float[Tensor, "layers rows sequence hidden"]
Tokens = Literal["all", "prompt", "answer"]
Depth = Annotated[float, Field(ge=0, le=1)]
#: Away terms of tokens less likely than this are 0.
LEAST_LOGPROB = -5.0
#: Where a search leaves its result for the steps that follow.
ROWS, FOUND = "lat.rows", "lat.perturbations"


def away(
    logits: Float[Tensor, "tokens vocab"], targets: Int[Tensor, " tokens"]
) -> Float[Tensor, " tokens"]:
    """-log(1 - p) in nats, 0 or more; 0 where log p is below :data:`LEAST_LOGPROB`."""
    likely = target_logprobs(logits, targets) >= LEAST_LOGPROB
    return torch.where(likely, -complement_logprobs(logits, targets), 0.0)


def projected(u: Float[Tensor, "*any hidden"]) -> Float[Tensor, "*any hidden"]:
    """Each token's vector, shortened to length 1 where it is longer."""
    return u / torch.linalg.vector_norm(u, dim=-1, keepdim=True).clamp_min(1.0)


def chosen(batch: Batch, tokens: Tokens) -> Bool[Tensor, "rows sequence"]:
    """Which tokens are perturbed."""
    behind = torch.arange(batch.ids.shape[1], device=batch.ids.device) >= batch.starts[:, None]
    if tokens == "all":
        return batch.position_mask
    return batch.position_mask & (behind if tokens == "answer" else ~behind)


def median_length(states: States, mask: Bool[Tensor, "rows sequence"]) -> Float[Tensor, "rows 1 1"]:
    """Median length of each row's states at masked tokens; 0 where there are none."""
    lengths = torch.linalg.vector_norm(states.float(), dim=2).masked_fill(~mask, torch.nan)
    return lengths.nanmedian(dim=1).values.nan_to_num(0.0)[:, None, None]


def alone(group: Group) -> Batch:
    """A group's rows as a batch without a shared beginning."""
    whole = group.batch
    return Batch(whole.ids, whole.lengths, whole.starts, prefix=0)


def recalled(known: Mapping[int, Tensor], rows: Sequence[Row]) -> Perturbation:
    """The perturbations of rows, padded to the longest."""
    parts = [known[key_of(row)].transpose(0, 1) for row in rows]
    padded: Tensor = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
    return padded.permute(2, 0, 1, 3)


def key_of(row: Row) -> int:
    """A row's key as a number, for a tensor of them."""
    return int(row.key[:15], 16)


@register(
    kind="harden",
    name="lat",
    title="Latent adversarial training (LAT)",
    summary="Takes the forget gradient while an optimised perturbation brings the facts back.",
    paper="2407.15549",
    year=2024,
    family="adversarial training",
    intention="as host",
    mechanism="wrapper",
    needs=("forget", "weights"),
    changes="weights",
    reversible=False,
    weakest="relearning on other data; perturbations elsewhere than at the trained layers",
    badges=("variant",),
    variant="Radius and rate of the search relative to the hidden states.",
)
class LAT(Harden):
    """Options of latent adversarial training."""

    depths: Annotated[tuple[Depth, ...], Field(min_length=1)] = Field(
        (7 / 32,), description="Depths of the blocks whose MLP is perturbed: 0 first, 1 last."
    )
    epsilon: float = Field(0.3, ge=0, description="Longest perturbation of a token; 0 is none.")
    radius: Literal["relative", "absolute"] = Field(
        "relative", description="Epsilon in median lengths of the hidden states, or as it is."
    )
    tokens: Tokens = Field("all", description="Which tokens of a row are perturbed.")
    inner_steps: int = Field(16, ge=1, description="Iterations of the search.")
    inner_rate: float = Field(
        1.6, gt=0, description="AdamW's rate in the search: a first step's length in radii."
    )
    outer_steps: int = Field(
        4, ge=1, description="Optimiser steps on the same rows with one perturbation."
    )
    toward: float = Field(1.0, ge=0, description="Weight of the forget answer in the search.")
    away: float = Field(
        1.0, ge=0, description="Weight of what is said instead, where the objective reads it."
    )

    def repeats(self) -> int:
        return self.outer_steps

    def forget(self, passes: Passes) -> None:
        if passes.objective is None or self.epsilon == 0:
            passes.forget()
            return
        for layer in self._layers(passes.lm):
            check_seen(passes, layer, "lat", "leaves the MLP of", "depths")
        known, found = self._remembered(passes), dict[int, Tensor]()

        @contextmanager
        def perturbed(step: Step) -> Iterator[None]:
            rows = step.groups[attacked_role(passes)].rows
            with rows_apart(passes.lm), ExitStack() as stack:
                delta = recalled(known, rows) if known else self.perturbation(passes, step)
                for place, row in enumerate(rows):
                    found[key_of(row)] = delta[:, place, : len(row.encoded.ids)].cpu().clone()
                for name in step.groups:
                    self._add(stack, passes, step, name, delta, rows_around(step, name))
                yield

        passes.forget(around=perturbed)
        if not known and self.outer_steps > 1:
            every = dict(gathered(list(found.items()), passes.world))
            passes.memory[ROWS] = [torch.tensor(list(every))]
            passes.memory[FOUND] = list(every.values())

    def perturbation(self, passes: Passes, step: Step) -> Perturbation:
        """The perturbation of the attacked rows: fp32, without graph, 0 at tokens left alone.

        The gradients of the parameters stay as they are.
        """
        batch = alone(step.groups[attacked_role(passes)])
        mask = chosen(batch, self.tokens)
        terms = self._terms(passes, step)
        # processes exchange no gradients of these passes
        with passes.accumulating(True) if passes.accumulating else nullcontext():
            space = self._radius(passes, batch, mask) * mask[..., None]
            width = passes.lm.anatomy.hidden_size
            u = space.new_zeros(*space.shape[:-1], width).requires_grad_(True)
            optimizer = torch.optim.AdamW(
                [u], lr=self.inner_rate / math.sqrt(width), weight_decay=0.0
            )
            for _ in range(self.inner_steps):
                loss = u.new_zeros(())
                for name, weight, function in terms:
                    with ExitStack() as stack:
                        self._add(stack, passes, step, name, space * u, blocks_below=False)
                        values = answer_sum(passes, alone(step.groups[name]), function)
                    loss = loss + weight * values
                (u.grad,) = torch.autograd.grad(loss, u)
                optimizer.step()
                with torch.no_grad():
                    u.copy_(projected(u))
        return (space * u).detach()

    def _terms(self, passes: Passes, step: Step) -> list[tuple[str, float, TokenFunction]]:
        """What the search descends: rows, weight and value of each answer token.

        Raises:
            RecipeError: Nothing has weight.
        """
        attacked = attacked_role(passes)
        wanted: list[tuple[str, float, TokenFunction]] = [
            (name, -self.toward, target_logprobs) if name == "forget" else (name, self.away, away)
            for name in step.groups
            if name == attacked or self.tokens != "answer"
        ]
        terms = [term for term in wanted if term[1]]
        if not terms:
            raise RecipeError(
                "the search has nothing to bring back: its terms have weight 0.",
                where="harden 'lat'",
                hint="Set harden.toward (forget answers) or harden.away (what is said instead).",
            )
        return terms

    def _radius(
        self, passes: Passes, batch: Batch, mask: Bool[Tensor, "rows sequence"]
    ) -> Float[Tensor, "layers rows 1 1"]:
        """The longest perturbation of a token, by attacked block and row."""
        layers = self._layers(passes.lm)
        if self.radius == "absolute":
            return torch.full((len(layers), len(mask), 1, 1), self.epsilon, device=mask.device)
        paths = [passes.lm.anatomy.block_path(layer) for layer in layers]
        with torch.no_grad(), capture(passes.lm.core, paths) as seen:
            answer_sum(passes, batch)
        return self.epsilon * torch.stack([median_length(seen[path], mask) for path in paths])

    def _add(
        self,
        stack: ExitStack,
        passes: Passes,
        step: Step,
        name: str,
        delta: Perturbation,
        around: tuple[int, int] = (0, 0),
        *,
        blocks_below: bool = True,
    ) -> None:
        """Perturbs rows of a role; aligned rows get what stands at the beginning they share."""
        attacked = attacked_role(passes)
        if name != attacked:
            mine, other = step.groups[name].batch.ids, step.groups[attacked].batch.ids
            delta = delta * (mine == other).cumprod(dim=1)[..., None]
        layers = self._layers(passes.lm)
        for layer, part in zip(layers, delta, strict=True):
            path = passes.lm.anatomy.path(layer, passes.lm.anatomy.mlp)
            below = blocks_below or layer != layers[0]
            stack.enter_context(adding(passes.lm, path, "output", part, around, blocks_below=below))

    def _layers(self, lm: LM) -> list[int]:
        return sorted({lm.anatomy.layer_at(depth) for depth in self.depths})

    def _remembered(self, passes: Passes) -> Mapping[int, Tensor]:
        """The perturbations of an earlier step on the same rows; none: they are searched now."""
        if passes.step % self.outer_steps == 0 or ROWS not in passes.memory:
            return {}
        keys = passes.memory[ROWS][0].tolist()
        return dict(zip(keys, passes.memory[FOUND], strict=True))
