"""Mean and spread of values that come in pieces, in float64."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass
class Moments:
    """Running mean and sum of squared deviations of each column (Chan's update).

    Attributes:
        count: Rows so far.
        mean: Of each column.
        squares: Sum of squared deviations from it.
    """

    count: int = 0
    mean: Float[Tensor, " width"] | None = None
    squares: Float[Tensor, " width"] | None = None

    def add(self, values: Float[Tensor, "row width"]) -> None:
        """Takes more rows in."""
        if not len(values):
            return
        new = values.detach().double()
        mean = new.mean(dim=0)
        squares = (new - mean).pow(2).sum(dim=0)
        if self.mean is None or self.squares is None:
            self.count, self.mean, self.squares = len(new), mean, squares
            return
        apart, total = mean - self.mean, self.count + len(new)
        self.mean = self.mean + apart * (len(new) / total)
        self.squares = self.squares + squares + apart.pow(2) * (self.count * len(new) / total)
        self.count = total

    def deviation(self, less: int = 0) -> Float[Tensor, " width"]:
        """Standard deviation of each column: over n - ``less``."""
        assert self.squares is not None  # something was added
        return (self.squares / max(self.count - less, 1)).sqrt()
