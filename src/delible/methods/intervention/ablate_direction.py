"""Ablate direction: takes one direction out of everything that a model writes.

For each activation x in the residual stream, and each output of attention and MLP, at every token:

    x' = x - r (r . x) / (r . r)

with r the difference of the mean states of forget and retain questions at the last token of the
prompt, after one block; or a direction that is given.

Paper: Arditi et al. 2024, "Refusal in Language Models Is Mediated by a Single Direction"
(arXiv 2406.11717). Reference code: andyrdt/refusal_direction.

Deviations: the paper tries the differences of all layers and of several last tokens, and takes the
one that does best on validation prompts; here the layer is an option. The paper's two sets are
harmful and harmless instructions; here they are what is forgotten and what is kept. The output of
the last block is ablated as well, for the families that norm what attention and MLP give before
they add it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from delible.errors import DataError
from delible.intervene.base import Intervention
from delible.intervene.directions import difference_of_means, without_direction
from delible.intervene.reading import read
from delible.intervene.sites import Positions, Site
from delible.intervene.taps import Where
from delible.lm.lm import LM
from delible.lm.template import Encoded
from delible.records import ForgetRequest, RecordBase
from delible.registry import register
from delible.system.questions import ask


@register(
    kind="intervention",
    name="ablate_direction",
    title="Directional ablation",
    summary="Projects one direction, of forgotten against kept questions, out of every activation.",
    paper="2406.11717",
    year=2024,
    family="representation",
    intention="suppression",
    mechanism="activation",
    needs=("forget", "retain", "activations"),
    changes="activations",
    reversible=True,
    weakest="relearn",
    advice="one direction carries a behaviour, such as declining, and hardly ever single facts: "
    "for those take grace, or an editor",
    badges=("variant", "experimental"),
    variant="The layer that the direction is taken from is an option, where the paper selects it "
    "on validation prompts; the sets are forget and retain questions.",
)
class AblateDirection(Intervention):
    """Options of directional ablation."""

    depth: float = Field(
        0.6,
        ge=0,
        le=1,
        description="Depth of the block after which the means are taken; 0 is the first, 1 the "
        "last.",
    )
    file: Path | None = Field(
        None,
        description="A safetensors file with a tensor 'direction', as wide as the residual "
        "stream, instead of the difference of means.",
    )

    @property
    def sites(self) -> Sequence[Site]:
        return (
            Site(what="block_input"),
            Site(what="attention"),
            Site(what="mlp"),
            Site(what="block", layers=(-1,)),
        )

    def learn(self, lm: LM, request: ForgetRequest, *, seed: int) -> Mapping[str, Tensor]:
        direction = self._means(lm, request) if self.file is None else self._given(self.file)
        wanted = (lm.anatomy.hidden_size,)
        where = "forget and retain questions" if self.file is None else str(self.file)
        if tuple(direction.shape) != wanted or not bool(direction.isfinite().all()):
            raise DataError(
                f"the direction has shape {tuple(direction.shape)} or values that are no numbers; "
                f"the model's residual stream is {wanted[0]} wide.",
                where=where,
            )
        if not bool(direction.norm() > 0):
            raise DataError("the direction has no length.", where=where)
        return {"direction": direction.float().cpu()}

    def _given(self, file: Path) -> Tensor:
        try:
            return load_file(file)["direction"]
        except (OSError, KeyError, SafetensorError) as error:
            raise DataError(
                f"no tensor 'direction' can be read: {error}.",
                where=str(file),
                hint="Write it with safetensors.torch.save_file({'direction': …}, FILE).",
            ) from error

    def _means(self, lm: LM, request: ForgetRequest) -> Tensor:
        layer = lm.anatomy.layer_at(self.depth)
        means = []
        for role, records in (("forget", request.forget), ("retain", request.retain)):
            rows = _questions(lm, records)
            if not rows:
                raise DataError(
                    f"no question among the {role} records, whose states would be compared.",
                    hint=f"Give questions with answers as {role} records (--{role} FILE).",
                )
            site = Site(what="block", layers=(layer,))
            found = dict(read(lm, rows, site, Positions(kind="prompt_end")))
            means.append(torch.cat([found[index][layer] for index in range(len(rows))]))
        return difference_of_means(*means)

    def change(
        self, states: Float[Tensor, "token hidden"], where: Where, tensors: Mapping[str, Tensor]
    ) -> Float[Tensor, "token hidden"]:
        return without_direction(states, tensors["direction"])


def _questions(lm: LM, records: Sequence[RecordBase] | None) -> list[Encoded]:
    """Prompts of records that ask something, with empty answers; those that fit."""
    prompts = [prompt for record in records or () if (prompt := ask(record)) and prompt.messages]
    rows = [lm.template.encode(prompt, "") for prompt in prompts]
    return [row for row in rows if not row.cut]
