"""Pulls the states under a suffix towards the original's: the matching terms of enhanced GCG.

    dynamic   mean over tokens behind the suffix of |r_U(q + s) - r_O(q + s)|
    static    weight * mean over answer tokens of (1 - cos(r_U(q + s), r_O(q)))

r is the residual stream between two blocks, U the attacked model, O the original. What O does
after the suffix is taken as it is: no gradient goes through O.

Reference code: github.com/ethz-spylab/unlearning-vs-safety (enhanced_gcg). Deviations: there a
prefix stands before the question, so states of the question's tokens differ too; behind a suffix
they are those of the plain question, and only what follows it is matched.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from delible.errors import ModelError
from delible.lm.forward import Batch, Forward
from delible.lm.lm import LM
from delible.search.suffix import Case

#: Of the static term.
STATIC_WEIGHT = 10.0


def dynamic_match(
    ours: Float[Tensor, "rows tokens hidden"], theirs: Float[Tensor, "rows tokens hidden"]
) -> Float[Tensor, " rows"]:
    """Mean distance between the states of two models, in [0, inf); 0 = the same."""
    return torch.linalg.vector_norm(ours - theirs, dim=2).mean(dim=1)


def static_match(
    ours: Float[Tensor, "rows tokens hidden"], clean: Float[Tensor, "tokens hidden"]
) -> Float[Tensor, " rows"]:
    """Mean of one minus the cosine to the states without a suffix, in [0, 2]; 0 = one direction."""
    return (1 - torch.nn.functional.cosine_similarity(ours, clean[None], dim=2)).mean(dim=1)


@dataclass
class Match:
    """Both terms, as a search takes them.

    Attributes:
        original: The model that is matched.
        layer: The block whose output is compared.
    """

    original: LM
    layer: int
    static_weight: float = STATIC_WEIGHT
    _clean: dict[Case, Tensor] = field(default_factory=dict, repr=False)

    def __call__(
        self, case: Case, batch: Batch, states: Float[Tensor, "rows sequence hidden"]
    ) -> Float[Tensor, " rows"]:
        """The sum of the two terms for each row."""
        behind = len(case.after) + len(case.target)
        with torch.no_grad():
            theirs = self._states(batch).to(states)[:, -behind:]
        if case not in self._clean:
            self._clean[case] = self._without_suffix(case)
        count = len(case.target)
        static = static_match(states[:, -count:], self._clean[case].to(states))
        return dynamic_match(states[:, -behind:], theirs) + self.static_weight * static

    def _states(self, batch: Batch) -> Tensor:
        with self.original.computing(), self.original.evaluating():
            return Forward(self.original)(batch, (self.layer,), final=False)[1][self.layer].float()

    @torch.no_grad()
    def _without_suffix(self, case: Case) -> Tensor:
        batch = replace(case, lm=self.original).batch([()])
        return self._states(batch)[0, -len(case.target) :]


def matching(lm: LM, original: LM, depth: float, where: str) -> Match:
    """The pull of a model towards the original.

    Args:
        depth: Of the block whose output is compared, as a fraction of all blocks.

    Raises:
        ModelError: The two models read other tokens, or are of another shape.
    """
    alike = (
        lm.template.fingerprint == original.template.fingerprint
        and lm.anatomy.layers == original.anatomy.layers
        and lm.core.config.hidden_size == original.core.config.hidden_size
    )
    if not alike:
        raise ModelError(
            "the original has another tokenizer or other sizes, so states cannot be matched.",
            where=where,
            hint="Leave out the matching (match false).",
        )
    return Match(original, original.anatomy.layer_at(depth))
