"""SEUF's anchor: routers go on sending forget tokens to the expert that is trained to forget.

    loss = anchor_weight * mean over forget answer tokens of || softmax(r) - a ||^2
         + beside_weight * another retain loss, by default the likelihood of retain answers

with r the logits of the router in the expert's layer and a one-hot at the expert (1 / M at each of
M experts of a layer; several layers are averaged). The expert is the one that forget rows use most
among the layers that move (as ``place: seuf`` chooses, given the same options). On retain tokens
there is no anchor: it would send all traffic there.

Paper: arXiv 2411.18797 (ACL 2025). Reference code: none was found.
Deviations: the paper does not say over which tokens the anchor is averaged, nor whether it reads
all of the softmax or the chosen experts' part; here the tokens that predict an answer token, and
all of it, so that its gradient is never cut off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

import torch
from jaxtyping import Float
from pydantic import Field, PrivateAttr, field_validator
from torch import Tensor

from delible.component import build
from delible.errors import DelibleError
from delible.lm.experts import mixtures
from delible.registry import register
from delible.train.expert_choice import affinity, chosen, sample
from delible.train.losses import Keep, Loss
from delible.train.reference import Reference
from delible.train.row import Row, Unit
from delible.train.step import Group, Reads
from delible.watching import Stage

if TYPE_CHECKING:
    from delible.cards import Need
    from delible.lm.lm import LM


def anchor(logits: Float[Tensor, "... experts"], experts: Sequence[int]) -> Float[Tensor, ...]:
    """Squared distance of the router's softmax from equal shares of some experts, in [0, 2].

    0 where it sends all there; (E - 1) / E for a uniform router over E experts and one of them.
    """
    target = torch.zeros(logits.shape[-1], device=logits.device)
    target[list(experts)] = 1 / len(experts)
    return (logits.float().softmax(dim=-1) - target).square().sum(dim=-1)


@register(
    kind="keep",
    name="seuf",
    title="Forget tokens stay at their expert (SEUF)",
    summary="Holds routers so that forgetting happens in the expert that knows, not around it.",
    paper="2411.18797",
    year=2024,
    family="retain",
    needs=("forget", "retain", "weights"),
    changes="weights",
    badges=("parity", "variant"),
    variant="The anchor is averaged over the tokens that predict answers, and reads all experts.",
)
class SeufAnchor(Keep):
    """Options of the anchor. A dense model is refused."""

    anchor_weight: float = Field(1.0, gt=0, description="Weight of the anchor.")
    retain: str | dict[str, Any] = Field(
        "nll", description="The retain loss beside it, with its options; none: no retain rows are "
        "needed.",
    )  # fmt: skip
    beside_weight: float = Field(1.0, gt=0, description="Weight of the retain loss beside it.")
    experts: int = Field(1, ge=1, description="How many experts; as many as move.")
    within_layer: bool = Field(
        False, description="All of them in the layer of the one that is used most."
    )
    tokens: int = Field(
        100_000, ge=1, description="Look at random forget rows of so many tokens, or at all."
    )
    _moving: tuple[int, ...] = PrivateAttr(())

    unit: ClassVar[Unit] = "answer_token"

    @field_validator("retain")
    @classmethod
    def _is_plain(cls, value: str | dict[str, Any]) -> str | dict[str, Any]:
        try:
            part = build("keep", value)
        except DelibleError as error:
            raise ValueError(str(error)) from None
        if part.instructed or type(part).learn is not Loss.learn:
            raise ValueError(f"'{part.card.name}' needs more than values of retain rows")
        return value

    @property
    def part(self) -> Keep | None:
        """The retain loss beside it."""
        found = cast(Keep, build("keep", self.retain))
        return None if found.card.name == "none" else found.settled(self._moving)

    @property
    def own_needs(self) -> tuple[Need, ...]:
        part = self.part
        return ("forget", "weights", *(part.own_needs if part is not None else ()))

    def settled(self, moving: Sequence[int]) -> Self:
        other = self.model_copy()
        other._moving = tuple(moving)
        return other

    def _layers(self, lm: LM) -> list[int]:
        """Layers with experts, of those that move."""
        every = list(mixtures(lm.core, lm.anatomy))
        return [layer for layer in every if layer in self._moving] or every

    def reads(self, lm: LM) -> tuple[Reads, ...]:
        part = self.part
        return () if part is None else part.reads(lm)

    def reference_kinds(self, lm: LM) -> tuple[str, ...]:
        part = self.part
        return () if part is None else part.reference_kinds(lm)

    def reads_beside(self, lm: LM) -> tuple[Reads, ...]:
        return tuple(f"router.{layer}" for layer in self._layers(lm))

    def learn(
        self,
        lm: LM,
        rows: Mapping[str, Sequence[Row]],
        reference: Reference,
        seed: int,
        stage: Stage,
    ) -> Mapping[str, Tensor]:
        scores = affinity(lm, sample(rows["forget"], self.tokens, seed), stage)
        found = chosen(
            scores, self.experts, within_layer=self.within_layer, layers=self._layers(lm)
        )
        return {"experts": torch.tensor(found)}

    def loss(self, retain: Group) -> Float[Tensor, " rows"]:
        part = self.part
        if part is None:
            return torch.zeros(len(retain.rows), device=retain.mask.device, requires_grad=True)
        # the engine divides by answer tokens: the other loss gets its own mean
        units = retain.units("answer_token") / max(1, retain.units(part.unit))
        return self.beside_weight * units * part.loss(retain)

    def beside(self, forget: Group) -> Float[Tensor, " rows"]:
        by_layer: dict[int, list[int]] = {}
        for layer, expert in forget.reference.learned(self.full_name, "experts").tolist():
            by_layer.setdefault(layer, []).append(expert)
        found = []
        for layer, experts in by_layer.items():
            values = anchor(forget.router(layer), experts)
            found.append(torch.where(predicting(forget), values, 0.0).sum(dim=1))
        return self.anchor_weight * torch.stack(found).mean(dim=0)


def predicting(group: Group) -> Tensor:
    """Positions [batch, sequence] that predict an answer token."""
    batch = group.batch
    places = torch.arange(batch.ids.shape[1], device=batch.ids.device)[None]
    return (places >= batch.starts[:, None] - 1) & (places < batch.lengths[:, None] - 1)
