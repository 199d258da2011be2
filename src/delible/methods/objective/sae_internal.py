"""SAE-internal: at the end of its name, a forgotten subject is made to look like an unknown one.

With a(x) the pre-activations of a frozen sparse autoencoder, on the state after one block at the
last token of the name in x, on chosen latents S, and means m and deviations s of known (K) and
unknown (Q) names:

    r = (a_S(x) - m_Q) / s,    q = (a_S(x) - m_K) / s
    loss = |r|^2 / |S|  +  known_weight * max(0, margin - |q|^2 / |S|)
           +  retain_weight * |(a_S(x') - a_S^0(x')) / s|^2 / |S|
    margin = |(m_K - m_Q) / s|^2 / |S|

per forget row x, with x' the same sentence about somebody known, and a^0 of the start model. S: the
`latents` that fire more often on known names, and as many that fire more often on unknown ones.
Pre-activations, for a latent that does not fire has no gradient, and those of unknown names do not.

Paper: Yamashita et al. 2025, "Sparse-Autoencoder-Guided Internal Representation Unlearning for
Large Language Models" (arXiv 2509.15631). No code; the direction in latent space is the paper's,
the form of the loss and all numbers are ours. The hinge is there because an unbounded push from
what is known diverges. Retain text is the keep loss's affair. Known names are those of the partner
rows, unknown ones are made up with as many words. The autoencoder is trained here once per model,
unless a folder is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from delible.edit.statistics import built_in_rows
from delible.errors import DataError
from delible.generation.carriers import carriers, carrying, unknown_names
from delible.intervene.reading import read
from delible.intervene.rows import encoded
from delible.intervene.sae import SAE
from delible.intervene.sae_training import Training, trained_sae
from delible.intervene.sites import Site, marked
from delible.registry import register
from delible.train.losses import Objective, Role
from delible.train.reference import Reference
from delible.train.row import Row
from delible.train.step import Group, Reads, Step
from delible.watching import Stage

if TYPE_CHECKING:
    from delible.lm.lm import LM


@dataclass(frozen=True)
class Directions:
    """Where known and unknown names lie, on the chosen latents.

    Attributes:
        known, unknown: Mean pre-activations.
        scale: Their standard deviation over both.
    """

    known: Float[Tensor, " latent"]
    unknown: Float[Tensor, " latent"]
    scale: Float[Tensor, " latent"]

    @property
    def margin(self) -> Tensor:
        """How far apart they lie: as far as unknown names are from known ones."""
        return ((self.known - self.unknown) / self.scale).pow(2).mean()


def separating(
    known: Float[Tensor, "prompt latent"], unknown: Float[Tensor, "prompt latent"], count: int
) -> Int[Tensor, " chosen"]:
    """The latents that fire more often on the one kind than on the other, of each kind so many.

    Args:
        known, unknown: Latents of prompts with known and with unknown names.
        count: Of each kind at most.
    """
    apart = (known > 0).double().mean(dim=0) - (unknown > 0).double().mean(dim=0)
    found = [
        top.indices[top.values > 0]
        for top in (apart.topk(min(count, len(apart))), (-apart).topk(min(count, len(apart))))
    ]
    chosen: Tensor = torch.cat(found).sort().values
    return chosen


def directions(
    known: Float[Tensor, "prompt latent"], unknown: Float[Tensor, "prompt latent"]
) -> Directions:
    """Means of each kind and the deviation over both, of pre-activations."""
    both = torch.cat([known, unknown]).double().std(dim=0, unbiased=False)
    scale = both.clamp(min=1e-4 * float(both.max().clamp(min=1e-12)))
    return Directions(known.double().mean(0).float(), unknown.double().mean(0).float(),
                      scale.float())  # fmt: skip


def pull_to_unknown(pre: Float[Tensor, "row latent"], names: Directions) -> Float[Tensor, " row"]:
    """Mean squared distance to unknown names, in deviations; 0 is there."""
    return ((pre - names.unknown) / names.scale).pow(2).mean(dim=1)


def push_from_known(pre: Float[Tensor, "row latent"], names: Directions) -> Float[Tensor, " row"]:
    """How much nearer to known names than unknown ones are; 0 as soon as it is as far."""
    return (names.margin - ((pre - names.known) / names.scale).pow(2).mean(dim=1)).relu()


def drift(
    pre: Float[Tensor, "row latent"], before: Float[Tensor, "row latent"], names: Directions
) -> Float[Tensor, " row"]:
    """Mean squared distance to where it was, in deviations."""
    return ((pre - before) / names.scale).pow(2).mean(dim=1)


def end_of_name(row: Row) -> int | None:
    """The last token of a row's subject in its prompt; None if it is not there."""
    if row.subject is None:
        return None
    marks = marked(row.tokenizer, (row.subject,), row.encoded.ids[: row.encoded.start])
    return max((place for place, mark in enumerate(marks) if mark), default=None)


#: What is learned before the first step.
LEARNED = ("encoder", "bias", "known", "unknown", "scale", "chosen")


@register(
    kind="objective",
    name="sae_internal",
    title="SAE-internal unlearning",
    summary="Moves a name's latents away from those of known names and towards unknown ones.",
    paper="2509.15631",
    year=2025,
    family="representation",
    intention="removal",
    mechanism="PO-rep",
    needs=("forget", "reference"),
    changes="weights",
    reversible=False,
    retrain_goal=False,
    weakest="questions that do not say the name; relearning",
    badges=("variant", "experimental"),
    variant="The paper's code and numbers are not public: the form of the loss is ours.",
)
class SAEInternal(Objective):
    """Options of SAE-internal unlearning."""

    depth: float = Field(
        0.35, ge=0, le=1, description="Depth of the block whose states are read: 0 first, 1 last."
    )
    known_weight: float = Field(0.5, ge=0, description="Weight of the push from known names.")
    retain_weight: float = Field(1.0, ge=0, description="Weight of the drift of other known names.")
    latents: int = Field(
        32, ge=1, description="Latents of each kind at most, for known and for unknown names."
    )
    sae: Path | None = Field(
        None, description="Folder of a sparse autoencoder of that block, as SAE Lens writes it; "
        "none: one is trained, once per model.",
    )  # fmt: skip
    expansion: int = Field(8, ge=1, description="Latents per dimension of a trained autoencoder.")
    active: int = Field(32, ge=1, description="Its latents that may speak at once.")
    tokens: int = Field(200_000, ge=1000, description="Tokens that it is trained on at most.")
    passes: int = Field(4, ge=1, description="How often it sees each.")
    seed: int = Field(0, ge=0, description="Of unknown names and of the autoencoder.")

    roles: ClassVar[tuple[Role, ...]] = ("forget", "known")

    def reads(self, lm: LM) -> tuple[Reads, ...]:
        return (lm.anatomy.layer_at(self.depth),)

    def reference_kinds(self, lm: LM) -> tuple[str, ...]:
        return (f"hidden.{lm.anatomy.layer_at(self.depth)}",)

    def concerns(self, row: Row) -> bool:
        return end_of_name(row) is not None

    def learn(
        self,
        lm: LM,
        rows: Mapping[str, Sequence[Row]],
        reference: Reference,
        seed: int,
        stage: Stage,
    ) -> dict[str, Tensor]:
        names = list(dict.fromkeys(row.subject for row in rows["known"] if row.subject))
        made = unknown_names(names, self.seed)
        sae = self._autoencoder(lm, rows, stage)
        known, unknown = (self._states(lm, part) for part in (names, made))
        chosen = separating(sae.encode(known), sae.encode(unknown), self.latents)
        if not len(chosen):
            raise DataError(
                "no latent tells the names that are known from made-up ones.",
                where="objective 'sae_internal'",
                hint="Give more retain records with subjects, a larger autoencoder (expansion), or "
                "another depth.",
            )
        found = directions(sae.pre(known)[:, chosen], sae.pre(unknown)[:, chosen])
        middle = sae.decoder_bias if sae.centred else torch.zeros_like(sae.decoder_bias)
        return {
            "encoder": sae.encoder[:, chosen].contiguous(),
            "bias": sae.encoder_bias[chosen] - middle @ sae.encoder[:, chosen],
            "known": found.known, "unknown": found.unknown, "scale": found.scale,
            "chosen": chosen,
        }  # fmt: skip

    def loss(self, step: Step) -> Float[Tensor, " rows"]:
        reference = step.forget.reference
        told = {name: reference.learned(self.full_name, name) for name in LEARNED}
        names = Directions(told["known"], told["unknown"], told["scale"])
        own, other = (self._at_name(group, told) for group in (step.forget, step.groups["known"]))
        before = self._at_name(step.groups["known"], told, start=True)
        value = pull_to_unknown(own, names) + self.known_weight * push_from_known(own, names)
        value = value + self.retain_weight * drift(other, before, names)
        heard = [self.concerns(row) for row in step.forget.rows]
        return torch.where(torch.tensor(heard, device=value.device), value, 0.0)

    def _at_name(
        self, group: Group, told: Mapping[str, Tensor], *, start: bool = False
    ) -> Float[Tensor, "row latent"]:
        """Pre-activations at the end of each row's name, now or at the start."""
        layer = group.lm.anatomy.layer_at(self.depth)
        states = group.hidden(layer)
        if start:
            states = group.reference.hidden(layer, states.shape[1])
        places = torch.tensor([end_of_name(row) or 0 for row in group.rows], device=states.device)
        at_name = states[torch.arange(len(group.rows), device=states.device), places].float()
        return at_name @ told["encoder"] + told["bias"]

    def _autoencoder(self, lm: LM, rows: Mapping[str, Sequence[Row]], stage: Stage) -> SAE:
        if self.sae is not None:
            return SAE.load(self.sae).checked(lm.anatomy.hidden_size, str(self.sae))
        training = Training(self.expansion, self.active, self.tokens, self.passes)
        own = (row.encoded.ids for part in rows.values() for row in part)
        texts = (list(ids) for part in (own, built_in_rows(lm)) for ids in part)
        return trained_sae(lm, self._site, texts, training, seed=self.seed, stage=stage)

    @property
    def _site(self) -> Site:
        return Site(what="block", layers=(self.depth,))

    def _states(self, lm: LM, names: Sequence[str]) -> Float[Tensor, "prompt hidden"]:
        """States at the end of each name in each carrier, fp32 on the CPU."""
        records = [carrying(name, carrier) for name in names for carrier in carriers()]
        rows = encoded(lm, records)
        found = dict(read(lm, rows, self._site))
        states = []
        for place, (row, record) in enumerate(zip(rows, records, strict=True)):
            marks = marked(lm.tokenizer, (str(record.subject),), row.ids[: row.start])
            last = max(index for index, mark in enumerate(marks) if mark)
            states.append(next(iter(found[place].values()))[last].cpu())
        return torch.stack(states)
