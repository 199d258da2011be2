"""Latent adversarial unlearning (LAU): forget while hidden states are pushed towards recall.

    delta = argmin over |delta| <= epsilon, lo <= h + delta <= hi  of  -log p(y | x; h + delta)
    gradient = gradient of the forget loss (any) at h + delta + (retain gradient at h)

h is the residual stream entering one block (or what its query, key or value matrix gives), lo and
hi its extremes in the row. Each row has its own delta, found by K steps of projected descent,

    u <- project(u - (epsilon / K) * g / (|g| + 1e-6)),   delta = u * scale,

from a random start of length r * epsilon, r ~ U(0, 1), and then held fixed. With an objective
that trains refusals only, delta climbs the loss of the refusal instead. The reference is
unperturbed, and so is what is kept. Costs K + 1 more forward and K more backward passes.

Paper: arXiv 2408.10682 (AdvNPO, AdvRMU; AdvGA, which its authors advise against).
Reference code: github.com/HongbangYuan/RobustUnlearning.
Deviations: lo, hi and the neuron scale are those of a row and padding is left out of everything,
so that no batch decides a perturbation (the code takes them over the batch). The radius is by
default relative: epsilon times the median length of the row's hidden states (a mean would be
ruled by the attention sink), times sqrt(tokens) for the norm of a whole row; the code's fixed
length is ``radius="absolute"``. AdvRMU's control vector is that of the objective, not redrawn at
every step and position, and its four backward passes on the same weights are one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from delible.errors import ModelError
from delible.lm.forward import Batch
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
from delible.train.randomness import generator
from delible.train.slots import Harden
from delible.train.step import Group, Step

Norm = Literal["row", "token"]
Target = Literal["residual", "query", "key", "value"]

#: Position of a projection among the matrices that read the hidden state.
PROJECTIONS = {"query": 0, "key": 1, "value": 2}
#: Keeps a direction finite where the gradient is zero.
TINY = 1e-6


def lengths(values: States, norm: Norm) -> Float[Tensor, "rows tokens 1"]:
    """Euclidean length of each row (one number, ``tokens`` = 1) or of each of its tokens."""
    dimensions = (1, 2) if norm == "row" else (2,)
    found: Tensor = torch.linalg.vector_norm(values, dim=dimensions, keepdim=True)
    return found


@dataclass(frozen=True)
class Ball:
    """Where a perturbation may be: no longer than the radius, and within the row's extremes.

    Attributes:
        positions: Real tokens, shape [rows, sequence, 1]; elsewhere a perturbation is 0.
        radius: Longest perturbation of a row, or of each of its tokens.
        lower, upper: Bounds of each entry of u, so that lo <= h + u * scale <= hi.
        scale: What u is multiplied by, per hidden dimension; 1 without neuron scaling.
    """

    norm: Norm
    positions: Bool[Tensor, "rows sequence 1"]
    radius: Float[Tensor, "rows 1 1"]
    lower: States
    upper: States
    scale: Float[Tensor, "rows 1 hidden"]

    def project(self, u: States) -> States:
        """The given perturbation, shortened and clipped into the ball."""
        u = torch.where(self.positions, u, 0.0)
        shorter = (self.radius / lengths(u, self.norm).clamp_min(TINY)).clamp(max=1.0)
        return torch.where(self.positions, (u * shorter).clamp(self.lower, self.upper), 0.0)


def ball(
    states: States,
    positions: Bool[Tensor, "rows sequence"],
    epsilon: float,
    *,
    relative: bool,
    norm: Norm,
    neuron_scaling: bool,
) -> Ball:
    """The allowed perturbations around hidden states."""
    real, states = positions[..., None], states.float()
    width = states.shape[2]
    low = states.masked_fill(~real, torch.inf).amin(dim=(1, 2), keepdim=True)
    high = states.masked_fill(~real, -torch.inf).amax(dim=(1, 2), keepdim=True)
    tokens = real.sum(dim=1, keepdim=True)
    scale = states.new_ones(len(states), 1, width)
    if neuron_scaling:
        mean = torch.where(real, states, 0.0).sum(dim=1, keepdim=True) / tokens
        squares = torch.where(real, states - mean, 0.0).square().sum(dim=1, keepdim=True)
        spread = (squares / tokens).sqrt()
        scale = spread / spread.mean(dim=2, keepdim=True).clamp_min(TINY)
    radius = states.new_full((len(states), 1, 1), epsilon)
    if relative:
        of_tokens = lengths(states, "token").masked_fill(~real, torch.nan)
        radius = radius * of_tokens.nanmedian(dim=1, keepdim=True).values
        if norm == "row":
            radius = radius * tokens.sqrt()
    bound = scale.clamp_min(TINY)  # a neuron that never changes is not perturbed: scale 0
    return Ball(norm, real, radius, (low - states) / bound, (high - states) / bound, scale)


@register(
    kind="harden",
    name="lau",
    title="Latent adversarial unlearning (LAU)",
    summary="Takes the forget gradient while hidden states are pushed towards recall.",
    paper="2408.10682",
    year=2024,
    family="adversarial training",
    intention="as host",
    mechanism="wrapper",
    needs=("forget", "weights"),
    changes="weights",
    reversible=False,
    weakest="retained neighbours lose more than with the host alone",
    badges=("variant",),
    variant="Radius relative to the hidden states; extremes per row, without padding.",
)
class LAU(Harden):
    """Options of latent adversarial unlearning."""

    depth: float = Field(
        4 / 32, ge=0, le=1, description="Depth of the perturbed block: 0 the first, 1 the last."
    )
    target: Target = Field("residual", description="What is perturbed at that block.")
    epsilon: float = Field(0.1, ge=0, description="Longest perturbation; 0 is no hardening.")
    radius: Literal["relative", "absolute"] = Field(
        "relative", description="Epsilon in median lengths of the hidden states, or as it is."
    )
    norm: Norm = Field("row", description="Epsilon bounds a whole row, or each of its tokens.")
    inner_steps: int = Field(6, ge=0, description="Steps of the search; 0 keeps the start.")
    random_start: bool = Field(True, description="Start at a random place instead of at 0.")
    neuron_scaling: bool = Field(
        False, description="Perturb each hidden dimension in proportion to its spread."
    )

    def forget(self, passes: Passes) -> None:
        unperturbed = self.epsilon == 0 or (self.inner_steps == 0 and not self.random_start)
        if passes.objective is None or unperturbed:
            passes.forget()
            return
        check_seen(passes, passes.lm.anatomy.layer_at(self.depth), "lau", "enters", "depth")

        @contextmanager
        def perturbed(step: Step) -> Iterator[None]:
            name = attacked_role(passes)
            path, which = self._place(passes.lm)
            with rows_apart(passes.lm):
                delta = self.perturbation(passes, step.groups[name])
                with adding(passes.lm, path, which, delta, rows_around(step, name)):
                    yield

        passes.forget(around=perturbed)

    def perturbation(self, passes: Passes, group: Group) -> States:
        """The perturbation of a group's rows: fp32, without graph, zero at padding.

        The gradients of the parameters stay as they are.
        """
        whole = group.batch
        batch = Batch(whole.ids, whole.lengths, whole.starts, prefix=0)
        path, which = self._place(passes.lm)
        sign = 1.0 if group.name == "forget" else -1.0
        # processes exchange no gradients of these passes
        with passes.accumulating(True) if passes.accumulating else nullcontext():
            with torch.no_grad(), capture(passes.lm.core, [path], which) as seen:
                answer_sum(passes, batch)
            space = ball(
                seen[path].detach(), batch.position_mask, self.epsilon,
                relative=self.radius == "relative", norm=self.norm,
                neuron_scaling=self.neuron_scaling,
            )  # fmt: skip
            u = space.project(self._start(passes, group, space))
            for _ in range(self.inner_steps):
                u.requires_grad_(True)
                delta = u * space.scale
                with adding(passes.lm, path, which, delta, blocks_below=False):
                    (gradient,) = torch.autograd.grad(-sign * answer_sum(passes, batch), u)
                direction = gradient / (lengths(gradient, self.norm) + TINY)
                u = space.project(u.detach() - space.radius / self.inner_steps * direction)
        return u * space.scale

    def _start(self, passes: Passes, group: Group, space: Ball) -> States:
        """A random direction per row, or per token, with a random share of the radius."""
        u = torch.zeros_like(space.lower)
        for place, row in enumerate(group.rows if self.random_start else ()):
            random = generator(passes.seed, "lau", passes.step, row.key)
            tokens = len(row.encoded.ids)
            drawn = torch.randn(1, tokens, u.shape[2], generator=random)
            share = torch.rand(1 if self.norm == "row" else tokens, 1, generator=random)
            u[place, :tokens] = (drawn / lengths(drawn, self.norm))[0].mul(share).to(u)
        return u * space.radius

    def _place(self, lm: LM) -> tuple[str, Literal["input", "output"]]:
        """The module whose input or output is perturbed."""
        anatomy, layer = lm.anatomy, lm.anatomy.layer_at(self.depth)
        if self.target == "residual":
            return anatomy.block_path(layer), "input"
        if len(anatomy.attention_in) != len(PROJECTIONS):
            raise ModelError(
                f"query, key and value are not three matrices, so '{self.target}' cannot be "
                "perturbed alone.",
                where=anatomy.class_name,
                hint="Perturb the residual stream: target residual.",
            )
        return anatomy.path(layer, anatomy.attention_in[PROJECTIONS[self.target]]), "output"
