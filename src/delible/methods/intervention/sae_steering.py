"""SAE steering: latents that speak of what is forgotten are turned down while the model answers.

For a state x at one site with latents z = SAE(x), and a few latents F for each subject:

    z'_j = factor * z_j   if j in F and z_j > t_j;   else z'_j = z_j
    x' = x + (z' - z) W_dec

F: the `features` latents with the largest m+_j / sum m+ - m-_j / sum m-, of mean latents on the
subject's records and on those that are kept, without latents that speak on more than
`most_frequent` of kept tokens; t_j: mean of z_j over both. What the autoencoder does not explain
stays, and a token at which nothing fires is the same bit by bit.

Paper: Li et al. 2025, "SAUCE: Selective Concept Unlearning in Vision-Language Models with Sparse
Autoencoders" (arXiv 2503.14530), whose steps these are; no code is public, so score, threshold and
factor are after its relatives (cywinski/SAeUron, tomerashuach/CRISP). Deviations: text instead of
pictures, the residual stream instead of the penultimate block of a vision tower (that is `sauce`).
The autoencoder is trained here unless one is given (`sae`, a folder as SAE Lens writes it). Each
subject has latents of its own; what two share is turned down from the lower threshold on. The first
token of a text, an outlier in every model, is left alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from delible.edit.statistics import built_in_rows, file_rows
from delible.intervene.latent_steering import LatentSteering, steered, unless
from delible.intervene.reading import read
from delible.intervene.rows import behind_shared, encoded, rows_of
from delible.intervene.sae import SAE
from delible.intervene.sae_features import by_subject
from delible.intervene.sae_training import Training, trained_sae
from delible.intervene.sites import Site
from delible.intervene.taps import Where
from delible.lm.lm import LM
from delible.lm.template import Encoded
from delible.records import ForgetRequest
from delible.registry import register


@register(
    kind="intervention",
    name="sae_steering",
    title="SAE steering",
    summary="Turns down latents of a sparse autoencoder that speak of what is forgotten.",
    paper="2503.14530",
    year=2025,
    family="representation",
    intention="suppression",
    mechanism="activation",
    needs=("forget", "retain", "activations"),
    changes="activations",
    reversible=True,
    weakest="relearn",
    advice="a --factor further below 0 forgets more and keeps less",
    badges=("variant", "experimental"),
    variant="On text and the residual stream; score, threshold and factor are after relatives, for "
    "the paper publishes no code.",
)
class SAESteering(LatentSteering):
    """Options of SAE steering."""

    factor: float = Field(
        -0.5, le=1, description="What latents are multiplied by when they fire: 0 takes them out, "
        "below 0 reverses them.",
    )  # fmt: skip
    depth: float = Field(
        1 / 3, ge=0, le=1, description="Depth of the block after which states are steered."
    )
    texts: Path | None = Field(
        None, description="A text file that it is trained on too; none: built-in text alone."
    )

    @property
    def sites(self) -> Sequence[Site]:
        return (Site(what="block", layers=(self.depth,)),)

    def learn(self, lm: LM, request: ForgetRequest, *, seed: int) -> Mapping[str, Tensor]:
        forget, retain = (rows_of(lm, request, role) for role in ("forget", "retain"))
        first = behind_shared([*forget, *retain])
        sae = self._autoencoder(lm, [*forget, *retain], seed)
        return self.found(
            sae,
            [self._states(lm, encoded(lm, one), first) for one in by_subject(request.forget)],
            self._states(lm, retain, first),
        )

    def change(
        self, states: Float[Tensor, "token width"], where: Where, tensors: Mapping[str, Tensor]
    ) -> Float[Tensor, "token width"]:
        return unless(where.place == 0, states, steered(states, tensors))

    def _autoencoder(self, lm: LM, rows: Sequence[Encoded], seed: int) -> SAE:
        site = self.sites[0]
        if self.sae is not None:
            return SAE.load(self.sae).checked(lm.anatomy.hidden_size, str(self.sae))
        training = Training(self.expansion, self.active, self.tokens, self.passes)
        own = (list(row.ids) for row in rows)
        given = file_rows(lm, self.texts) if self.texts is not None else ()
        return trained_sae(lm, site, chain(own, given, built_in_rows(lm)), training, seed=seed)

    def _states(self, lm: LM, rows: Sequence[Encoded], first: int) -> list[Tensor]:
        found = dict(read(lm, rows, self.sites[0]))
        return [next(iter(found[place].values()))[first:].cpu() for place in range(len(rows))]
