"""Adapters that start as the part of each matrix that matters for forgetting.

    M    = I_f / (I_r + eps)                    I: importance for forget and for retain rows
    rho  = sqrt(sum over columns of M)          of each row of W [out, in]
    U S V^T = SVD of rank r of diag(rho) W      S is divided by s = alpha / r
    A    = sqrt(S) V^T,  B = diag(1 / rho) U sqrt(S)

s B A is the best approximation of W of rank r when errors of important rows count more. It is
taken out of W and trained in its place, so that the model is the same before the first step:

    W x - s B0 A0 x + s B A x                   B, A move; B0, A0 are where they started

The weights themselves stay: what is taken out is the second half of an adapter of rank 2 r, and
does not move. So the result is an adapter on the model as it was, the weights may be packed, and
nothing is rounded.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from delible.errors import ModelError, RecipeError, RunError
from delible.lm.held import is_packed
from delible.lm.lm import LM
from delible.train.gradient_space import linear_layers
from delible.train.randomness import generator, shuffled
from delible.train.row import Row
from delible.train.slots import Place, Placement, SlotContext

logger = logging.getLogger(__name__)

#: Matrices of no more rows or columns are decomposed exactly.
EXACT = 256
#: Iterations and spare directions of the search for leading singular vectors of larger ones.
ITERATIONS, SPARE = 8, 16
#: Rows of less than this share of the median importance count as having it: the inverse of a
#: smaller one would only blow up what rounding left there.
FLOOR = 1e-3
#: What the released code adds, to importances and to their roots.
EPSILON = 1e-5


def ratio(
    forget: Float[Tensor, "out in"], retain: Float[Tensor, "out in"], epsilon: float
) -> Float[Tensor, "out in"]:
    """Importance for forget rows over that for retain rows, 0 or more.

    Args:
        epsilon: Added to the denominator, as a share of its mean, so that the unit of the loss
            does not matter.
    """
    floor = float(retain.mean()) * epsilon
    return forget / (retain + max(floor, torch.finfo(retain.dtype).tiny))


def row_importance(importance: Float[Tensor, "out in"]) -> Float[Tensor, " out"]:
    """Root of each row's sum, in units of the median; 1 for all where nothing is important."""
    rho = importance.double().sum(dim=1).sqrt()
    middle = rho[rho > 0].median() if bool((rho > 0).any()) else rho.new_zeros(())
    if middle == 0:
        return torch.ones_like(rho).float()
    return (rho / middle).clamp(min=FLOOR).float()


def weighted_factors(
    weight: Float[Tensor, "out in"],
    rho: Float[Tensor, " out"],
    rank: int,
    scale: float,
    random: torch.Generator,
    shift: float = 0.0,
) -> tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]:
    """A and B: scale B A minimises the sum over rows of rho_i^2 |W_i - (scale B A)_i|^2.

    Args:
        rho: Importance of each row, above 0 (or ``shift`` is).
        random: Of the search for singular vectors of a large matrix.
        shift: Added to rho where it is divided by, as released.
    """
    left, sizes, right = leading(rho[:, None] * weight, rank, random)
    root = (sizes / scale).sqrt()
    first = weight.new_zeros(rank, weight.shape[1])
    second = weight.new_zeros(weight.shape[0], rank)
    first[: len(root)] = root[:, None] * right
    second[:, : len(root)] = left * root / (rho + shift)[:, None]
    return first, second


def leading(
    matrix: Float[Tensor, "out in"], rank: int, random: torch.Generator
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, " rank"], Float[Tensor, "rank in"]]:
    """Leading singular vectors and values, fp32; fewer where the matrix is smaller."""
    matrix = matrix.float()
    if min(matrix.shape) <= EXACT:
        left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, :rank], sizes[:rank], right[:rank]
    drawn = torch.randn(matrix.shape[1], rank + SPARE, generator=random).to(matrix)
    basis = torch.linalg.qr(matrix @ drawn)[0]
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis)[0])[0]
    left, sizes, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return (basis @ left)[:, :rank], sizes[:rank], right[:rank]


def plain(module: Any) -> Float[Tensor, "out in"]:
    """A linear layer's matrix in fp32, unpacked and the right way round."""
    value = module.weight.detach()
    value = (value.dequantize() if is_packed(value) else value).float()
    return value.T if isinstance(module, Conv1D) else value


def plain_shape(module: Any) -> tuple[int, int]:
    """What a linear layer gives and reads, whichever way round its matrix is kept."""
    first, second = (int(size) for size in module.weight.shape)
    return (second, first) if isinstance(module, Conv1D) else (first, second)


def matching(forget: int, retain: int, random: torch.Generator) -> list[int]:
    """Places of retain rows, one for each forget row; each once before any comes again."""
    order: list[int] = []
    while len(order) < forget:
        order += shuffled(range(retain), random)
    return order[:forget]


def in_batches(places: Sequence[int], size: int) -> list[list[int]]:
    """Consecutive places, ``size`` at a time; the last batch may be smaller."""
    return [list(places[at : at + size]) for at in range(0, len(places), size)]


class ImportanceStart(Place):
    """Options of adapters that start as what is important."""

    rank: int = Field(8, ge=1, description="Inner width of each product that moves.")
    alpha: float = Field(16.0, gt=0, description="The product is scaled by alpha / rank.")
    importance_epochs: int = Field(10, ge=1, description="How often the rows meet in new batches.")
    importance_batch_size: int = Field(
        4, ge=1, description="Rows whose mean loss has one gradient."
    )
    epsilon: float = Field(
        1e-5, gt=0, description="Added to the importance for retain rows, in units of its mean."
    )

    compat: bool = Field(
        False, description="As released: tokens are divided by twice, and eps is 1e-5 as it is."
    )

    def importance(
        self, context: SlotContext, layers: Sequence[tuple[str, Any]]
    ) -> Iterator[tuple[str, Float[Tensor, "out in"]]]:
        """Path and importance M of each layer that has one, one at a time."""
        raise NotImplementedError

    def rows_of(self, context: SlotContext, epoch: int) -> tuple[list[Row], list[Row]]:
        """Forget rows, and as many retain rows, in the order of an epoch."""
        forget, retain = context.rows["forget"], context.rows["retain"]
        name = f"place.{self.card.name}"
        random = generator(context.seed, name, "rows", epoch)
        kept = matching(len(forget), len(retain), random)
        return shuffled(forget, random), [retain[place] for place in kept]

    def compared(
        self,
        forget: Float[Tensor, "out in"],
        retain: Float[Tensor, "out in"],
        tokens: tuple[int, int],
    ) -> Float[Tensor, "out in"]:
        """M from both importances and the answer tokens that they were measured on."""
        if self.compat:
            return forget / tokens[0] / (retain / tokens[1] + EPSILON)
        return ratio(forget, retain, self.epsilon)

    def moving_blocks(self, lm: LM) -> range:
        return range(lm.anatomy.layers)

    def apply(self, context: SlotContext) -> Placement:
        lm, name = context.lm, self.card.name
        if lm.wears_adapter:
            raise RecipeError(
                "the model already wears an adapter.",
                where=f"place '{name}'",
                hint="Merge it first (finish: merge_adapter in the run that made it).",
            )
        layers = linear_layers(lm)
        if lm.device.type == "meta":  # without numbers: as large as it will be
            factors = {path: self._sizes(module) for path, module in layers}
        else:
            factors = self._started(context, layers)
        if not factors:
            raise ModelError(
                "the model has no linear layers inside its blocks that every token passes.",
                where=f"place '{name}' on {lm.anatomy.class_name}",
                hint="Choose --place layers.",
            )
        self._say_left_out(lm, [path for path, _ in layers if path not in factors])
        return _worn(lm, factors, self.rank, self.alpha, name)

    def _started(
        self, context: SlotContext, layers: Sequence[tuple[str, Any]]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """A and B of each layer that has an importance."""
        name, modules, scale = self.card.name, dict(layers), self.alpha / self.rank
        factors: dict[str, tuple[Tensor, Tensor]] = {}
        for path, found in self.importance(context, layers):
            if not bool(found.isfinite().all()):
                raise RunError(
                    f"the importance of '{path}' is not finite.",
                    where=f"place '{name}'",
                    hint="Check the model's loss on the forget and retain rows.",
                )
            rho, shift = row_importance(found), 0.0
            if self.compat:
                rho, shift = found.sum(dim=1).sqrt(), EPSILON
            random = generator(context.seed, f"place.{name}", path)
            factors[path] = weighted_factors(
                plain(modules[path]), rho, self.rank, scale, random, shift
            )
        return factors

    def _sizes(self, module: Any) -> tuple[Tensor, Tensor]:
        (out, wide), device = plain_shape(module), module.weight.device
        return (
            torch.empty(self.rank, wide, device=device), torch.empty(out, self.rank, device=device)
        )  # fmt: skip

    def _say_left_out(self, lm: LM, apart: Sequence[str]) -> None:
        fused = [name for name, value in lm.core.named_parameters() if value.dim() == 3]
        if fused or apart:
            logger.warning(
                f"place: {len(fused) + len(apart)} expert matrices get no adapter and stay frozen; "
                "use place 'layers' or 'seuf' to train experts."
            )


def _worn(
    lm: LM, factors: Mapping[str, tuple[Tensor, Tensor]], rank: int, alpha: float, name: str
) -> Placement:
    """Puts the adapter on: the first half of its rank moves, the second takes the start out."""
    from peft import LoraConfig, get_peft_model  # slow to import

    transposed = any(isinstance(lm.core.get_submodule(path), Conv1D) for path in factors)
    config = LoraConfig(
        r=2 * rank, lora_alpha=2 * alpha, lora_dropout=0.0, target_modules=list(factors),
        fan_in_fan_out=transposed, bias="none", task_type="CAUSAL_LM",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # every number is replaced below
        lm.wear(get_peft_model(lm.core, config, autocast_adapter_dtype=True))
    masks: dict[int, Tensor] = {}
    with torch.no_grad():
        for path, (first, second) in factors.items():
            module: Any = lm.core.get_submodule(path)
            down, up = (getattr(module, half)["default"].weight for half in ("lora_A", "lora_B"))
            down.copy_(torch.cat([first, first]))
            up.copy_(torch.cat([second, -second], dim=1))
            masks[id(down)], masks[id(up)] = _half(down, rank, 0), _half(up, rank, 1)
    lm.touch()
    trained = {each: value for each, value in lm.model.named_parameters() if value.requires_grad}
    logger.info(
        f"place: adapters of rank {rank} on {len(factors)} linear layers, started by {name} "
        f"({sum(value.numel() for value in trained.values()) // 2:,} weights)"
    )
    return Placement(trained, {each: masks[id(value)] for each, value in trained.items()})


def _half(value: nn.Parameter, rank: int, dimension: int) -> Tensor:
    mask = torch.zeros_like(value, dtype=torch.bool)
    mask.narrow(dimension, 0, rank).fill_(True)
    return mask
