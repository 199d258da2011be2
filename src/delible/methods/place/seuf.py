"""SEUF: of a mixture of experts only the expert that forget rows use most, and its router, move.

    s_i = mean over rows of mean over tokens of g_i,   (l*, i*) = argmax over all layers and experts

g_i is the router's weight of expert i, 0 where it is not among the chosen ones. Otherwise routers
shift forget tokens to experts that know nothing, which looks like forgetting, and these are
damaged. ``keep: seuf`` holds the forget tokens at the expert. Shared experts are never chosen.

Paper: arXiv 2411.18797 (ACL 2025). Reference code: none was found.
Deviations: tokens are those that predict an answer token. Where a block's experts are one tensor,
a mask lets only the chosen expert's part move (neither momentum nor weight decay moves the rest),
and the optimiser's moments are as large as the tensor.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from delible.lm.experts import Mixture, mixtures
from delible.lm.lm import LM
from delible.registry import register
from delible.train.expert_choice import affinity, chosen, sample
from delible.train.slots import Place, Placement, SlotContext

logger = logging.getLogger(__name__)


def opened(
    parameters: Mapping[str, Tensor], layers: Mapping[int, Mixture], experts: list[tuple[int, int]]
) -> dict[str, Tensor]:
    """By parameter: which entries belong to one of the experts, or to the router of one."""
    masks: dict[str, Tensor] = {}
    for layer, expert in experts:
        one = layers[layer]
        for name in one.router:
            masks[name] = torch.ones_like(parameters[name], dtype=torch.bool)
        for name in one.parameters(expert):
            if name not in masks:
                masks[name] = torch.zeros_like(parameters[name], dtype=torch.bool)
            (masks[name][expert] if name in one.stacked else masks[name]).fill_(True)
    return masks


@register(
    kind="place",
    name="seuf",
    title="One expert and its router (SEUF)",
    summary="Trains the expert of a mixture that forget rows use most, and its router.",
    paper="2411.18797",
    year=2024,
    family="weight selection",
    intention="as host",
    mechanism="wrapper",
    needs=("forget", "weights"),
    changes="weights",
    reversible=False,
    weakest="other experts, and shared ones, that know it too",
    badges=("parity", "variant"),
    variant="The routers are read where answer tokens are predicted.",
)
class Seuf(Place):
    """Options of the choice of experts. A dense model is refused."""

    experts: int = Field(1, ge=1, description="How many experts move.")
    within_layer: bool = Field(
        False, description="All of them in the layer of the one that is used most."
    )
    tokens: int = Field(
        100_000, ge=1, description="Look at random forget rows of so many tokens, or at all."
    )

    def moving_blocks(self, lm: LM) -> None:
        mixtures(lm.core, lm.anatomy)  # refuses a dense model before any work

    def apply(self, context: SlotContext) -> Placement:
        lm = context.lm
        layers = mixtures(lm.core, lm.anatomy)
        if lm.device.type == "meta":  # without numbers: all experts are of one size
            scores = {layer: torch.zeros(one.experts) for layer, one in layers.items()}
        else:
            rows = sample(context.rows["forget"], self.tokens, context.seed)
            scores = affinity(lm, rows, context.stage)
        found = chosen(scores, self.experts, within_layer=self.within_layer)
        parameters = dict(lm.core.named_parameters())
        masks = opened(parameters, layers, found)
        lm.model.requires_grad_(False)
        trained = {name: parameters[name] for name in masks}
        for parameter in trained.values():
            parameter.requires_grad_(True)
        told = ", ".join(
            f"expert {expert} of layer {layer} ({float(scores[layer][expert]):.2f} of its tokens' "
            "weight)"
            for layer, expert in found
        )
        moving = sum(int(mask.sum()) for mask in masks.values() if not mask.is_meta)
        logger.info(f"place: {told} and {'its router' if len(found) == 1 else 'their routers'} "
                    f"({moving:,} weights)")  # fmt: skip
        return Placement(trained, masks)
