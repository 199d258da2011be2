"""What forward-mode differentiation of row losses needs: a loss as a module whose parameters can be
replaced for one call, and a model without kernels that have no forward-mode derivative."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from delible.errors import RecipeError
from delible.lm.lm import LM
from delible.train.gradient_space import Factors
from delible.train.row import Row
from delible.train.row_losses import RowLoss


class LossModule(nn.Module):
    """Row losses as a module, so that its parameters can be replaced for one call."""

    def __init__(self, lm: LM, loss: RowLoss, factors: Factors | None) -> None:
        super().__init__()
        self.model, self.factors = lm.model, factors
        self._lm, self._loss = [lm], loss

    def forward(self, rows: Sequence[Row]) -> Tensor:
        return self._loss(self._lm[0], rows)


@contextmanager
def differentiable_forward(lm: LM) -> Iterator[None]:
    """Inside, the model runs without kernels that have no forward-mode derivative.

    These are fused attention and fused experts; both have slower forms with the same values.
    """
    experts = getattr(lm.core.config, "_experts_implementation", None)
    switch = getattr(lm.core, "set_experts_implementation", None)
    if experts is not None and switch is not None:
        switch("eager")
    try:
        with sdpa_kernel([SDPBackend.MATH]):
            yield
    except NotImplementedError as error:
        raise RecipeError(
            "this model has a part without forward-mode derivative.",
            where=type(lm.core).__name__,
            hint="Use the central difference (how: difference).",
        ) from error
    finally:
        if experts is not None and switch is not None:
            switch(experts)
