"""ROME: one down-projection is changed by a matrix of rank one for each question.

The key k* of the subject's last token shall give the value v*, with which the model refuses:

    W <- W + (v* - W k*) u^T / (u^T k*),    u = C^-1 k'   (C^-1 left out with covariance=false)

k' is the mean key over contexts, C the second moment of keys of ordinary text: of all changes that
meet W k* = v*, the one with C^-1 moves ordinary keys least. Keys k_i of earlier edits, also of
patches that the model wears, count among them: C + w sum_i k_i k_i^T / (k_i^T C^-1 k_i).

Paper: arXiv 2202.05262; as unlearning 2505.19855. Reference code: kmeng01/rome, zjunlp/EasyEdit.
Deviations:

- The values of all questions are searched at once, on the model before; ``batch=1`` searches one
  after the other, each on the model as edited so far, as the authors do. Questions are written one
  after the other in any case, so W k* = v* holds to the digit for the last one only.
- The authors edit once, and a later edit of theirs does not know the earlier ones
  (``earlier_weight=0``). Where two subjects have nearly one key, no weight keeps both.
- C gets a ridge, for it is estimated on thousands of tokens, not on millions.
- 5 sampled contexts; the authors have 20 (``contexts=20``). The layer is a depth; 5 of 32 in
  EasyEdit's settings for Llama-2-7B, which leave C out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from delible.edit.closed_form import Map, identity, inverse, rank_one, sparing
from delible.edit.located import RefusalEditor
from delible.edit.requests import Edit, read_edits
from delible.edit.statistics import Statistics
from delible.edit.writing import Writing
from delible.lm.lm import LM
from delible.registry import register


@register(
    kind="editor",
    name="rome",
    title="ROME",
    summary="Writes a refusal for each question into one MLP, by a change of rank one.",
    paper="2202.05262",
    year=2022,
    family="model editing",
    intention="suppression",
    mechanism="merge/edit",
    needs=("forget", "weights"),
    changes="weights",
    reversible=True,
    retrain_goal=False,
    weakest="paraphrases without the name, relearning, quantization; many edits in a row",
    advice="more than about ten questions: merge those of a subject (--merge 4), or take alphaedit",
    badges=("parity", "variant"),
    variant="Refusals as targets, values of all questions searched at once, a ridge on C; earlier "
    "edits are kept.",
)
class ROME(RefusalEditor):
    """Options of ROME."""

    lengths: ClassVar[tuple[int, ...]] = (5, 10)
    site: ClassVar[Literal["block", "mlp"]] = "mlp"

    depth: float = Field(0.17, ge=0, le=1, description="Relative depth of the edited layer.")
    layer: int | Literal["traced"] | None = Field(
        None,
        description="Index of the layer, instead of a depth; negative: from the end; traced: found "
        "by causal tracing.",
    )
    covariance: bool = Field(
        True, description="Spare what ordinary text reads (C^-1); without, only the key counts."
    )
    ridge: float = Field(
        0.01, gt=0, le=1e9, description="Added to C, as a share of its mean eigenvalue."
    )

    earlier_weight: float = Field(
        20.0,
        ge=0,
        le=1e9,
        description="w: how much keys of earlier edits count beside ordinary text; 0: not at all, "
        "as the authors do.",
    )

    @property
    def uses_statistics(self) -> bool:  # type: ignore[override]
        return self.covariance

    @property
    def traces(self) -> bool:
        return self.layer == "traced"

    def chosen_layers(self, lm: LM, traced: int | None) -> list[int]:
        if traced is not None:
            return [traced]
        if isinstance(self.layer, int):
            lm.anatomy.block_path(self.layer)
            return [self.layer % lm.anatomy.layers]
        return [lm.anatomy.layer_at(self.depth)]

    def prepare(
        self, lm: LM, layers: Sequence[int], statistics: Statistics | None, notes: dict[str, object]
    ) -> Map:
        if statistics is None:
            return identity()
        return inverse(statistics.moments[layers[0]].to(lm.device), self.ridge)

    def start(
        self, lm: LM, edits: Sequence[Edit], changes: Mapping[int, Writing]
    ) -> Float[Tensor, "edits hidden"]:
        """What the down-projection gives at the bare questions' subjects."""
        ((layer, change),) = changes.items()
        return change.values(read_edits(lm, edits, [layer]).bare[layer])

    def write(
        self,
        lm: LM,
        edits: Sequence[Edit],
        wanted: Float[Tensor, "edits hidden"],
        changes: Mapping[int, Writing],
        prepared: Map,
    ) -> dict[str, object]:
        ((layer, change),) = changes.items()
        within = sparing(prepared, change.protected, self.earlier_weight)
        read = read_edits(lm, edits, [layer], "equal")
        for value, mean, key in zip(wanted, read.mean[layer], read.bare[layer], strict=True):
            residual = value - change.values(key[None])[0]
            change.write(residual[:, None], rank_one(mean, key, within)[:, None])
        change.wrote(read.mean[layer].T)
        return {}

    def missed(
        self,
        lm: LM,
        edits: Sequence[Edit],
        start: Float[Tensor, "edits hidden"],
        wanted: Float[Tensor, "edits hidden"],
        changes: Mapping[int, Writing],
    ) -> dict[str, object]:
        """|v* - W k*| / |v*|, mean over questions."""
        left = (wanted - self.start(lm, edits, changes)).norm(dim=1) / wanted.norm(dim=1)
        return {"value_missed": round(float(left.mean()), 6)}
