"""Neuron Adjust: pre-activations that look like a forgotten skill's are mirrored about the rest's.

For each chosen neuron of an MLP, with value x before the activation function, at every token:

    p_f = N(x; m_f, s_f),  p_r = N(x; m_r, s_r),  u ~ U(0, 1)
    x' = m_r - s_r (x - m_f) / s_f      if p_r <= p_f and u >= p_r / (p_r + p_f);  else x' = x

m and s: mean and standard deviation on forget (f) and retain (r) texts. Chosen are the neurons, of
all layers together, with the `percent` largest m_f - m_r, as far as they are positive.

Paper: Li, Sun, Weng 2025, "Effective Skill Unlearning through Intervention and Abstention" (arXiv
2503.21730). Reference code: Trustworthy-ML-Lab/effective_skill_unlearning.

Deviations: the released code keeps variances under the name of standard deviations, puts the
forget mean in the place of the forget deviation, and tosses one coin for a whole tensor;
`compat` does the first two and one coin per token, otherwise the formula above holds. The numbers u
are functions of seed, layer, neuron and the token's place in its prompt, not of a global state: an
answer does not depend on what else is in the batch. What stands before all texts alike (a system
prompt) is not counted, and neither are neurons that hardly move.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from delible.intervene.base import Intervention
from delible.intervene.draws import uniform
from delible.intervene.moments import Moments
from delible.intervene.reading import read
from delible.intervene.rows import behind_shared, rows_of
from delible.intervene.sites import Site
from delible.intervene.taps import Where
from delible.lm.lm import LM
from delible.ranges import Range
from delible.records import ForgetRequest
from delible.registry import register

#: A neuron that moves less than this share of the median deviation is left alone.
STILL = 1e-4


def reflected(
    values: Float[Tensor, "token neuron"],
    forget: tuple[Float[Tensor, " neuron"], Float[Tensor, " neuron"]],
    retain: tuple[Float[Tensor, " neuron"], Float[Tensor, " neuron"]],
) -> Float[Tensor, "token neuron"]:
    """Standardised as forgotten values, taken as kept ones, and mirrored at their mean.

    Args:
        values: Pre-activations.
        forget, retain: Mean and standard deviation.
    """
    return retain[0] - retain[1] * (values - forget[0]) / forget[1]


def changed(
    values: Float[Tensor, "token neuron"],
    forget: tuple[Float[Tensor, " neuron"], Float[Tensor, " neuron"]],
    retain: tuple[Float[Tensor, " neuron"], Float[Tensor, " neuron"]],
    draws: Float[Tensor, "token neuron"] | None,
) -> Bool[Tensor, "token neuron"]:
    """Which values are taken for forgotten ones.

    Args:
        values: Pre-activations.
        forget, retain: Mean and standard deviation; below 0 (in `compat`) it is never likelier.
        draws: In [0, 1); None: whatever is likelier decides.
    """
    odds = _log_density(values, *retain) - _log_density(values, *forget)
    likelier = (odds <= 0) & (forget[1] > 0)
    return likelier if draws is None else likelier & (draws >= torch.sigmoid(odds))


def _log_density(values: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Of a normal law, without the constant that all have."""
    return -0.5 * ((values - mean) / deviation).pow(2) - deviation.abs().log()


def most_shifted(
    shifts: Mapping[int, Float[Tensor, " neuron"]], percent: float
) -> dict[int, Bool[Tensor, " neuron"]]:
    """The neurons with the largest shifts, over all layers; none whose shift is not positive."""
    every = torch.cat([shifts[layer] for layer in sorted(shifts)])
    count = round(percent / 100 * len(every))
    bar = every.sort(descending=True).values[count - 1] if count else torch.tensor(math.inf)
    return {layer: (shift >= bar) & (shift > 0) for layer, shift in shifts.items()}


@register(
    kind="intervention",
    name="neuron_adjust",
    title="Neuron Adjust",
    summary="Mirrors pre-activations that look like the forgotten skill's about the kept ones.",
    paper="2503.21730",
    year=2025,
    family="representation",
    intention="suppression",
    mechanism="activation",
    needs=("forget", "retain", "activations"),
    changes="activations",
    reversible=True,
    weakest="relearn",
    advice="made for skills; a larger --percent forgets more of single facts and keeps less",
    badges=("variant",),
    variant="Deviations and draws are those of the formula, not of the released code; the draws "
    "depend on the token and its prompt alone.",
)
class NeuronAdjust(Intervention):
    """Options of Neuron Adjust."""

    percent: float = Field(
        3.0, ge=0, le=100, description="Percent of all neurons that are adjusted: the most shifted."
    )
    layers: tuple[int, ...] = Field((), description="Indices of the layers; empty: all.")
    stochastic: bool = Field(
        True, description="Draw for each value as published; False: change it where forgotten is "
        "likelier.",
    )  # fmt: skip
    seed: int = Field(0, ge=0, description="Of the draws.")
    compat: bool = Field(
        False, description="As the released code: variances for deviations, the forget mean for "
        "the forget deviation.",
    )  # fmt: skip

    def ranges(self) -> dict[str, Range]:
        return {"percent": Range(low=0.1, high=20.0, log=True)}

    @property
    def sites(self) -> Sequence[Site]:
        return (Site(what="mlp_gate", layers=self.layers),)

    def learn(self, lm: LM, request: ForgetRequest, *, seed: int) -> Mapping[str, Tensor]:
        rows = {role: rows_of(lm, request, role) for role in ("forget", "retain")}
        first = behind_shared([row for part in rows.values() for row in part])
        found: dict[str, dict[int, Moments]] = {}
        for role, part in rows.items():
            found[role] = {}
            for _, states in read(lm, part, self.sites[0]):
                for layer, values in states.items():
                    found[role].setdefault(layer or 0, Moments()).add(values[first:].cpu())
        forget, retain = found["forget"], found["retain"]
        laws = {
            layer: [_mean(one), _mean(retain[layer]), one.deviation(), retain[layer].deviation()]
            for layer, one in forget.items()
        }
        shifts = {}
        for layer, (mine, other, *deviations) in laws.items():
            least = torch.minimum(*deviations)
            shifts[layer] = torch.where(least > STILL * least.median(), mine - other, -math.inf)
        tensors: dict[str, Tensor] = {}
        for layer, mask in most_shifted(shifts, self.percent).items():
            if bool(mask.any()):
                tensors[f"{layer}.neurons"] = mask.nonzero()[:, 0]
                law = laws[layer]
                if self.compat:
                    law[2:] = [law[0], law[3].pow(2)]
                tensors[f"{layer}.laws"] = torch.stack([one[mask] for one in law])
        return tensors

    def change(
        self, states: Float[Tensor, "token width"], where: Where, tensors: Mapping[str, Tensor]
    ) -> Float[Tensor, "token width"]:
        neurons = tensors.get(f"{where.layer}.neurons")
        if neurons is None:
            return states
        laws = tensors[f"{where.layer}.laws"].float()
        forget, retain = (laws[0], laws[2]), (laws[1], laws[3])
        values = states[:, neurons].float()
        draws = None
        if self.stochastic:
            # the released code tosses one coin for all values of a token
            drawn = neurons[:1] * 0 if self.compat else neurons
            draws = uniform(self.seed, where, drawn).to(values)
        taken = changed(values, forget, retain, draws)
        new = torch.where(taken, reflected(values, forget, retain), values)
        return states.index_copy(1, neurons, new.to(states.dtype))


def _mean(moments: Moments) -> Tensor:
    assert moments.mean is not None  # every text has tokens
    return moments.mean
