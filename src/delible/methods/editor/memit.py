"""MEMIT: refusals for many questions are written at once, spread over a few down-projections.

    Delta_l = R_l K_l^T (lambda C_l + M_l + K_l K_l^T)^-1

K_l are the keys of the subjects' last tokens, R_l each layer's share of what is missing at the last
of the layers, C_l the second moment of keys of ordinary text: lambda weighs what is kept against
what is written. M_l is the sum of k k^T over the keys of all earlier edits, also of patches that
the model wears, and holds what they have written.

Paper: arXiv 2210.07229; as unlearning 2505.19855. Reference code: kmeng01/memit, zjunlp/EasyEdit.
Deviations:

- lambda is rho times the mean of k^T C^-1 k, so that a single edit is written to 1 / (1 + rho),
  whatever the size of the model's keys; ``moment_weight`` sets it (15,000 in the paper).
- M_l is not in the paper, which edits once; it is as in MEMIT's sequential form (2410.02355).
- C gets a ridge, for it is estimated on thousands of tokens, not on millions; the system is solved
  in the space of the keys.
- Layers are depths: 4 to 8 of 32 in EasyEdit's settings for Llama-2-7B.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from delible.edit.closed_form import Map, factors, inverse, squares
from delible.edit.keys import consecutive_layers
from delible.edit.located import Layers, RefusalEditor
from delible.edit.requests import Edit
from delible.edit.spread import spread
from delible.edit.statistics import Statistics
from delible.edit.writing import Writing
from delible.lm.lm import LM
from delible.registry import register


@register(
    kind="editor",
    name="memit",
    title="MEMIT",
    summary="Writes refusals for many questions at once into the MLPs of a few layers.",
    paper="2210.07229",
    year=2023,
    family="model editing",
    intention="suppression",
    mechanism="merge/edit",
    needs=("forget", "weights"),
    changes="weights",
    reversible=True,
    retrain_goal=False,
    weakest="paraphrases without the name, relearning, quantization",
    advice="a larger --rho keeps more and writes less; merge questions of a subject (--merge 4) on "
    "long lists",
    badges=("parity", "variant"),
    variant="Refusals as targets, a scale-free lambda, a ridge on C; earlier edits are kept.",
)
class MEMIT(RefusalEditor):
    """Options of MEMIT."""

    first_depth: float = Field(
        0.14, ge=0, le=1, description="Relative depth of the first edited layer."
    )
    last_depth: float = Field(
        0.27, ge=0, le=1, description="Relative depth of the last edited layer."
    )
    layers: Layers = Field(
        None,
        description="Consecutive layer indices, instead of depths; negative: from the end; traced: "
        "as many layers, around the one that causal tracing finds.",
    )
    rho: float = Field(
        0.05, gt=0, description="lambda as a share of k^T C^-1 k: the larger, the weaker."
    )
    moment_weight: float | None = Field(
        None, gt=0, le=1e9, description="lambda as a number (15000 in the paper), instead of rho."
    )
    ridge: float = Field(
        0.01, gt=0, le=1e9, description="Added to C, as a share of its mean eigenvalue."
    )

    @property
    def traces(self) -> bool:
        return self.layers == "traced"

    def chosen_layers(self, lm: LM, traced: int | None) -> list[int]:
        given = None if isinstance(self.layers, str) else self.layers
        found = consecutive_layers(
            lm.anatomy, self.first_depth, self.last_depth, given, "editor 'memit'"
        )
        return found if traced is None else lm.anatomy.around(traced, len(found))

    def prepare(
        self, lm: LM, layers: Sequence[int], statistics: Statistics | None, notes: dict[str, object]
    ) -> dict[int, Map]:
        assert statistics is not None
        return {
            layer: inverse(moment.to(lm.device), self.ridge)
            for layer, moment in statistics.moments.items()
        }

    def write(
        self,
        lm: LM,
        edits: Sequence[Edit],
        wanted: Float[Tensor, "edits hidden"],
        changes: Mapping[int, Writing],
        prepared: dict[int, Map],
    ) -> dict[str, object]:
        def factors_of(layer: int, keys: Tensor) -> Tensor:
            within = prepared[layer]
            weight = self.moment_weight or self.rho * float(squares(keys, within).mean())
            return factors(keys, within, weight, changes[layer].protected)

        spread(lm, edits, wanted, changes, factors_of)
        return {}
