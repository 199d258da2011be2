"""SAUCE: latents of a vision tower that speak of a concept are turned down as a picture is read.

For each patch state x at one block of the tower, with latents z = SAE(x) and a few latents F for
each concept:

    s_j = m+_j / (sum m+ + d) - m-_j / (sum m- + d)          m: mean latent over all patches of
    F   = the `features` largest s_j                             pictures with it, and without
    z'_j = factor * z_j   if j in F and z_j > t_j;   else z'_j = z_j
    x' = x + (z' - z) W_dec

without latents that speak on more than `most_frequent` of patches of kept pictures; t_j: mean of
z_j over both sets. What the autoencoder does not explain stays, and a picture on which nothing
fires is read the same bit by bit. Each subject is a concept with latents of its own; what two share
is turned down by the stronger factor, from the lower threshold on.

Paper: Li et al. 2025, "SAUCE: Selective Concept Unlearning in Vision-Language Models with Sparse
Autoencoders" (arXiv 2503.14530). No code is public, so site, score, thresholds and factor are after
its relatives (cywinski/SAeUron, tomerashuach/CRISP): form `mean_scale` (factor * m+_j * z_j) is
theirs. Deviations: the block is the deepest one that the projector reads, found by trying (the one
before the last in LLaVA); top-k instead of L1; tokens before the patches are left alone. It acts in
the tower alone: what texts say of the concept stays known, and whoever has the weights takes it
off.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from delible.errors import DataError
from delible.intervene.base import Fitted
from delible.intervene.latent_steering import LatentSteering, steered, unless
from delible.intervene.picture_states import (
    before_patches,
    eyes,
    picture_states,
    pictures_in,
    pictures_of_folder,
    read_layer,
)
from delible.intervene.sae import SAE
from delible.intervene.sae_features import Form, by_subject
from delible.intervene.sae_training import Read, Training, kept_sae, parted
from delible.intervene.sites import Site
from delible.intervene.taps import Where
from delible.lm.lm import LM
from delible.messages import ImagePart
from delible.records import ForgetRequest, RecordBase
from delible.registry import register
from delible.watching import Stage, watched


@register(
    kind="intervention",
    name="sauce",
    title="SAUCE",
    summary="Turns down latents of a vision tower that speak of a concept in pictures.",
    paper="2503.14530",
    year=2025,
    family="representation",
    intention="suppression",
    mechanism="activation",
    needs=("forget", "retain", "pictures", "activations"),
    changes="activations",
    reversible=True,
    weakest="questions without a picture; whoever has the weights takes it off",
    badges=("variant", "experimental"),
    variant="Site, score, threshold and factor are after relatives, for the paper publishes no "
    "code; the block is the deepest one that the projector reads, found by trying.",
)
class Sauce(LatentSteering):
    """Options of SAUCE."""

    layer: int | None = Field(
        None, description="Block of the tower, from the end if negative; none: the deepest one "
        "that the language model reads.",
    )  # fmt: skip
    form: Form = Field(
        "scale", description="What a latent is multiplied by: the factor, or (mean_scale) the "
        "factor times its mean with the concept.",
    )  # fmt: skip
    pictures: Path | None = Field(
        None, description="Folder of pictures that the autoencoder is trained on too; none: those "
        "of the request alone.",
    )  # fmt: skip

    @property
    def sites(self) -> Sequence[Site]:
        return (Site(what="vision", layers=(-2 if self.layer is None else self.layer,)),)

    def fit(self, lm: LM, request: ForgetRequest, *, seed: int = 0) -> Fitted:
        """Learns its latents, at a block that is found if none is named."""
        eyes(lm, "'sauce'")
        if self.layer is None:
            found = self.model_copy(update={"layer": read_layer(lm)})
            return found.fit(lm, request, seed=seed)
        return super().fit(lm, request, seed=seed)

    def learn(self, lm: LM, request: ForgetRequest, *, seed: int) -> Mapping[str, Tensor]:
        concepts = [pictures_in(records) for records in by_subject(request.forget)]
        kept = _shown(request.retain, "retain")
        if not all(concepts):
            raise DataError(
                "there are forget records of a subject without any picture.",
                hint="Give each record that shows the concept its pictures (images).",
            )
        sae = self._autoencoder(lm, request, seed)
        states = self._states(lm, list(dict.fromkeys([*chain.from_iterable(concepts), *kept])))
        assert self.layer is not None
        return {
            **self.found(
                sae, [[states[one] for one in mine] for mine in concepts],
                [states[one] for one in kept], self.form,
            ),
            "before": torch.tensor(before_patches(lm, self.layer)),
        }  # fmt: skip

    def change(
        self, states: Float[Tensor, "token width"], where: Where, tensors: Mapping[str, Tensor]
    ) -> Float[Tensor, "token width"]:
        new = steered(states, {name: one for name, one in tensors.items() if name != "before"})
        before = int(tensors["before"])
        if not before or new is states:
            return new
        place = torch.arange(where.shape[-1], device=states.device).repeat(
            len(states) // where.shape[-1]
        )
        return unless(place < before, states, new)

    def _autoencoder(self, lm: LM, request: ForgetRequest, seed: int) -> SAE:
        site = self.sites[0]
        if self.sae is not None:
            width = next(iter(self._states(lm, pictures_in(request.retain)[:1]).values())).shape[1]
            return SAE.load(self.sae).checked(int(width), str(self.sae))
        everyone = (*request.forget, *request.retain, *request.neighbours, *request.holdout)
        more = pictures_of_folder(self.pictures) if self.pictures is not None else []
        images = list(dict.fromkeys([*pictures_in(everyone), *more]))
        training = Training(self.expansion, self.active, self.tokens, self.passes)
        known = hashlib.sha256("/".join(one.sha256 for one in images).encode()).hexdigest()

        def read_states(stage: Stage) -> Read:
            found, count = list[Tensor](), 0
            before = before_patches(lm, site.places(lm)[0].layer or 0)
            parts = ([one] for one in picture_states(lm, images, site))
            for ((_, states),) in watched(parts, "states of pictures", len(images), stage):
                found += [one[before:] for one in states.values()]
                count += len(found[-1])
                if count >= self.tokens:
                    break
            return (*parted(found), site.places(lm)[0].layer)

        return kept_sae(lm, site, known, read_states, training, seed=seed)

    def _states(self, lm: LM, images: Sequence[ImagePart]) -> dict[ImagePart, Tensor]:
        before = before_patches(lm, self.sites[0].places(lm)[0].layer or 0)
        return {
            images[place]: next(iter(states.values()))[before:]
            for place, states in picture_states(lm, images, self.sites[0])
        }


def _shown(records: Sequence[RecordBase], role: str) -> list[ImagePart]:
    found = pictures_in(records)
    if not found:
        raise DataError(
            f"no {role} record holds a picture.",
            hint=f"Give {role} records with pictures that do not show the concept (images).",
        )
    return found
