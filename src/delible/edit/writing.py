"""Down-projections while they are edited: changes are added to the old weight, and it is put back.

The weight is always the old one plus all factors, rounded once, so that the patch's factors give
the same bits again when they are put on the old weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from delible.edit.base import Patch, earlier_keys
from delible.edit.keys import DownProjection, down_projection
from delible.lm.lm import LM


@dataclass
class Writing:
    """One down-projection while it is edited.

    Attributes:
        parameter: Its weight.
        place: Where it is in the model.
        before: The weight's values before.
        bias: What it adds to everything; None: nothing.
        earlier: Keys of edits that are to stay, [width] each, float64.
        residuals: What was added, [hidden, edits] each.
        factors: At which keys, [width, edits] each.
        keys: Keys of this edit, [width, edits] each, as they are kept in the patch.
    """

    parameter: nn.Parameter
    place: DownProjection
    before: Tensor
    bias: Tensor | None
    earlier: list[Tensor]
    residuals: list[Tensor] = field(default_factory=list)
    factors: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)

    @property
    def protected(self) -> Float[Tensor, "width earlier"]:
        """Keys of earlier edits as columns; no columns where there are none."""
        if not self.earlier:
            return self.before.new_zeros(self.place.width, 0, dtype=torch.float64)
        return torch.stack(self.earlier, dim=1)

    def values(self, keys: Float[Tensor, "edits width"]) -> Float[Tensor, "edits hidden"]:
        """What it writes at keys now, in float64."""
        weight = self.parameter.detach().double()
        written = keys.double() @ (weight if self.place.transposed else weight.T)
        return written if self.bias is None else written + self.bias.detach().double()

    def write(
        self, residuals: Float[Tensor, "hidden edits"], factors: Float[Tensor, "width edits"]
    ) -> None:
        """Adds residuals @ factors^T."""
        self.residuals.append(residuals.float())
        self.factors.append(factors.float())
        left, right = self.pair()
        changed = self.before.double() + left.double() @ right.double()
        self.parameter.copy_(changed.to(self.parameter.dtype))

    def wrote(self, keys: Float[Tensor, "width edits"]) -> None:
        """Says which keys an edit was about: later edits leave them alone."""
        self.keys.append(keys.float())
        self.earlier += list(keys.double().T)

    def pair(self) -> tuple[Tensor, Tensor]:
        """(left, right) in the parameter's own layout, fp32."""
        residuals, factors = torch.cat(self.residuals, dim=1), torch.cat(self.factors, dim=1)
        left, right = (factors, residuals) if self.place.transposed else (residuals, factors)
        return left.contiguous(), right.T.contiguous()

    @property
    def change(self) -> float:
        """Frobenius norm of the change, as a share of the weight's."""
        return float((self.parameter.detach() - self.before).norm() / self.before.norm())


@contextmanager
def writing(lm: LM, layers: Sequence[int]) -> Iterator[tuple[dict[int, Writing], Patch]]:
    """Within it down-projections are edited; if anything fails there, they are as they were.

    Yields:
        The down-projections by layer, and the patch, which is whole and on the model afterwards.

    Raises:
        ModelError: A block has no single down-projection.
    """
    places = {layer: down_projection(lm, layer) for layer in layers}
    parameters = dict(lm.core.named_parameters())
    edits = {
        layer: Writing(
            parameters[place.parameter], place,
            parameters[place.parameter].detach().clone(),
            parameters.get(f"{place.path}.bias"),
            earlier_keys(lm, place.parameter),
        )
        for layer, place in places.items()
    }  # fmt: skip
    patch = Patch({}, {edit.place.parameter: edit.before for edit in edits.values()})
    patches = list(lm.patches)
    try:
        yield edits, patch
    except BaseException:
        patch.put_back(lm)
        lm.touch()
        lm.patches = patches
        raise
    patch.factors = {edit.place.parameter: edit.pair() for edit in edits.values()}
    patch.keys = {
        edit.place.parameter: torch.cat(edit.keys, dim=1) for edit in edits.values() if edit.keys
    }
    patch.put_on(lm)
