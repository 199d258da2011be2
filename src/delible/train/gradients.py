"""One service for questions about gradients of row losses at the model as it is.

Used by weight masks, data attribution, coresets and selection for alignment. What can be asked:
the summed gradient of rows, inner products of every row's gradient with a direction (two forward
passes, or one forward-mode pass), the norm of every row's gradient, and products with the
Hessian. Gradients are summed in fp32 whatever the model computes in, and the model is left as it
was, bit by bit. For models whose gradient does not fit, a space
looks at a part (``train/gradient_space.py``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor

from delible.errors import RecipeError
from delible.lm.lm import LM
from delible.train.batches import FORWARD_BUDGET, batches
from delible.train.forward_mode import LossModule, differentiable_forward
from delible.train.gradient_space import Factors, Space, parameters_in
from delible.train.row import Row
from delible.train.row_losses import RowLoss, answer_loss
from delible.train.vectors import SetAside, Vector, norm_of
from delible.watching import Parts, Stage, unwatched, watched

#: Padded tokens per backward pass on a CPU. A backward pass keeps all activations: with more
#: tokens it is no faster there, and they take more memory than the weights.
_BACKWARD_BUDGET = 64
#: Gradients per optimiser step of :meth:`Gradients.descend` are clipped to this norm.
_CLIP = 1.0

How = Literal["difference", "jvp"]


class Gradients:
    """Gradients of a loss per row, at the model as it is.

    Args:
        lm: The model.
        budget: Padded tokens per forward pass; None: ``FORWARD_BUDGET``.
        loss: From rows to one value each; by default the token-mean negative log-likelihood.
        space: The coordinates; by default every parameter.
        stage: Told when going through the rows takes long.
    """

    def __init__(
        self,
        lm: LM,
        budget: int | None = None,
        *,
        loss: RowLoss = answer_loss,
        space: Space | None = None,
        stage: Stage = unwatched,
    ) -> None:
        self.lm, self.loss, self.space, self.stage = lm, loss, space or Space(), stage
        self.budget = budget or FORWARD_BUDGET
        on_cpu = lm.device.type == "cpu"
        self.backward_budget = min(self.budget, _BACKWARD_BUDGET if on_cpu else FORWARD_BUDGET)
        self._factors = Factors(lm, self.space) if self.space.where == "lora" else None

    def of(self, loss: RowLoss) -> Self:
        """The same questions about another loss."""
        other = copy.copy(self)
        other.loss = loss
        return other

    def within(self, space: Space) -> Gradients:
        """The same questions in other coordinates."""
        return Gradients(self.lm, self.budget, loss=self.loss, space=space, stage=self.stage)

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """The floating-point parameters of the space by name (tied ones once)."""
        if self._factors is not None:
            return dict(self._factors.named_parameters())
        return parameters_in(self.lm, self.space)

    # ---- what can be asked

    @torch.no_grad()
    def losses(self, rows: Sequence[Row]) -> Float[Tensor, " rows"]:
        """The loss of each row, in order, float64."""
        found = torch.zeros(len(rows), dtype=torch.float64)
        with self._evaluating():
            for part in self._told(batches(self.lm, rows, self.budget), "losses", rows):
                found[part] = self.loss(self.lm, [rows[place] for place in part]).double().cpu()
        return found

    def total(
        self, rows: Sequence[Row], weights: Sequence[float] | None = None, *, lean: bool = True
    ) -> Vector:
        """Sum over rows of the gradient of each row's loss, by parameter name, fp32.

        Args:
            weights: What each row counts; None: 1 each.
            lean: On a processor, one row at a time and in fp32: no copies of the weights in bf16,
                and no second gradient of the embedding as for a prefix that rows share. Without
                it, batches in the run's precision: faster, half a model more.
        """
        parts = [(self.loss, rows, [1.0] * len(rows) if weights is None else weights)]
        if not lean or self.lm.device.type != "cpu":
            return self._sum(parts, self.backward_budget)
        with self._exact():
            return self._sum(parts, 1)

    def _sum(
        self, parts: Sequence[tuple[RowLoss, Sequence[Row], Sequence[float]]], budget: int
    ) -> Vector:
        """Gradient of a weighted sum of several losses, each over rows of its own."""
        parameters = self.parameters()
        sums: Vector = {}
        with self._ready(parameters), ExitStack() as stack:
            for name, value in parameters.items():
                if value.dtype not in (torch.float32, torch.float64):  # too coarse to sum in
                    hook = value.register_post_accumulate_grad_hook(_summing(sums, name))
                    stack.callback(hook.remove)
            for loss, rows, weights in parts:
                for batch in self._told(batches(self.lm, rows, budget), "gradients", rows):
                    values = loss(self.lm, [rows[place] for place in batch])
                    values = values * values.new_tensor([weights[place] for place in batch])
                    _backward(values.sum())
            for name, value in parameters.items():
                if name not in sums:
                    empty = value.grad is None
                    sums[name] = torch.zeros_like(value) if empty else value.grad  # type: ignore[assignment]
        return {name: sums[name] for name in parameters}

    def norms(self, rows: Sequence[Row]) -> Float[Tensor, " rows"]:
        """Euclidean norm of each row's gradient, in order, float64.

        One backward pass per row. A parameter's gradient is dropped as soon as its norm is
        known, so that one matrix of gradients is alive at a time, not a model.
        """
        parameters = self.parameters()
        squares: list[Tensor] = []

        def taken(parameter: Tensor) -> None:
            if parameter.grad is not None:
                squares.append(parameter.grad.float().pow(2).sum(dtype=torch.float64))
                parameter.grad = None

        found = torch.zeros(len(rows), dtype=torch.float64)
        with self._ready(parameters), ExitStack() as stack:
            for value in parameters.values():
                stack.callback(value.register_post_accumulate_grad_hook(taken).remove)
            each = ([place] for place in range(len(rows)))
            for (place,) in self._told(each, "gradient norms", rows):
                squares.clear()
                _backward(self.loss(self.lm, [rows[place]]).sum())
                if squares:
                    found[place] = torch.stack(squares).sum().sqrt().cpu()
        return found

    @torch.no_grad()
    def products(
        self,
        rows: Sequence[Row],
        direction: Vector,
        step: float = 1e-2,
        how: How = "difference",
        *,
        consume: bool = False,
    ) -> Float[Tensor, " rows"]:
        """Inner product of each row's gradient with ``direction``, in order, float64.

        Args:
            how: ``difference``: the central difference of the losses along the unit direction,
                two forward passes over the rows. ``jvp``: forward-mode differentiation, exact to
                rounding; about three forward passes, and no copy of the weights.
            step: Length of the move in weight space (of the difference).
            consume: ``direction`` may be overwritten; saves a copy of the weights.

        Raises:
            RecipeError: A difference of a model whose weights are not fp32: the move would be
                rounded away.
        """
        norm = norm_of(direction)
        if norm == 0.0:
            return torch.zeros(len(rows), dtype=torch.float64)
        if how == "jvp":
            return self._forward_mode(rows, direction)
        with self._exact(), self._moved(direction, step / norm, consume) as reflect:
            ahead = self.losses(rows)
            reflect()
            behind = self.losses(rows)
        return (ahead - behind) * norm / (2 * step)

    def hessian_product(
        self, rows: Sequence[Row], direction: Vector, step: float = 1e-2,
        weights: Sequence[float] | None = None,
    ) -> Vector:  # fmt: skip
        """Hessian of the rows' summed loss times ``direction``, fp32.

        A central difference of gradients: no second backward pass through the first, so fused
        attention stays in use.
        """
        norm = norm_of(direction)
        if norm == 0.0:
            return {name: torch.zeros_like(value) for name, value in direction.items()}
        with self._exact(), self._moved(direction, step / norm) as reflect:
            result = self.total(rows, weights, lean=False)
            reflect()
            for name, value in self.total(rows, weights, lean=False).items():
                result[name].sub_(value)
        for value in result.values():
            value.mul_(norm / (2 * step))
        return result

    @contextmanager
    def borrowed(self) -> Iterator[None]:
        """Inside, the parameters may be moved; afterwards they are as before, bit by bit."""
        parameters = self.parameters()
        kept = SetAside({name: value.detach() for name, value in parameters.items()})
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in parameters.items():
                    value.copy_(kept.pop(name, value.device))

    def descend(
        self,
        rows: Sequence[Row],
        learning_rate: float,
        random: torch.Generator,
        *,
        weights: Sequence[float] | None = None,
        batch_size: int = 8,
        anchors: Sequence[Row] = (),
        anchor_weight: float = 1.0,
    ) -> None:
        """One pass of AdamW over the rows: moves the parameters (see :meth:`borrowed`).

        Args:
            random: Decides the order of the rows.
            weights: What each row counts, with mean 1.
            anchors: Rows whose token-mean negative log-likelihood is kept low, as many per step
                as there are ``rows`` in it, with weight ``anchor_weight``.
        """
        parameters = self.parameters()
        optimizer = torch.optim.AdamW(
            parameters.values(), lr=learning_rate, weight_decay=0.0, fused=True
        )
        order = torch.randperm(len(rows), generator=random).tolist()
        held = torch.randperm(len(anchors), generator=random).tolist() if anchors else []
        starts = range(0, len(order), batch_size)
        drawn_parts = (order[begin : begin + batch_size] for begin in starts)
        for begin, part in zip(starts, self._told(drawn_parts, "descent", rows), strict=True):
            mine = [(weights[place] if weights else 1.0) / len(part) for place in part]
            parts = [(self.loss, [rows[place] for place in part], mine)]
            if held:
                drawn = [anchors[held[(begin + i) % len(held)]] for i in range(len(part))]
                parts.append((answer_loss, drawn, [anchor_weight / len(drawn)] * len(drawn)))
            gradient = self._sum(parts, self.backward_budget)
            for name, parameter in parameters.items():
                parameter.grad = gradient.pop(name).to(parameter.dtype)
            torch.nn.utils.clip_grad_norm_(parameters.values(), _CLIP)
            optimizer.step()
            optimizer.zero_grad()

    # ---- how

    def _forward_mode(self, rows: Sequence[Row], direction: Vector) -> Tensor:
        module = LossModule(self.lm, self.loss, self._factors)
        prefix = "factors." if self._factors is not None else "model."
        parameters = self.parameters()
        primals = {f"{prefix}{name}": parameters[name].detach() for name in direction}
        tangents = {
            f"{prefix}{name}": value.to(parameters[name].dtype) for name, value in direction.items()
        }
        found = torch.zeros(len(rows), dtype=torch.float64)
        with self._exact(), self._evaluating(), differentiable_forward(self.lm):
            for part in self._told(batches(self.lm, rows, self.budget), "products", rows):
                mine = [rows[place] for place in part]

                def values(weights: Vector, mine: Sequence[Row] = mine) -> Tensor:
                    called: Tensor = torch.func.functional_call(module, weights, (mine,))
                    return called

                tangent: Tensor = torch.func.jvp(values, (primals,), (tangents,))[1]
                found[part] = tangent.double().cpu()
        return found

    @contextmanager
    def _moved(
        self, direction: Vector, scale: float, consume: bool = False
    ) -> Iterator[Callable[[], None]]:
        """Parameters moved along a direction; call what is yielded to mirror them at the start."""
        parameters = self.parameters()
        for name in direction:
            if parameters[name].dtype not in (torch.float32, torch.float64):
                raise RecipeError(
                    f"a difference along a direction needs fp32 weights, not "
                    f"{parameters[name].dtype}.",
                    where=name,
                    hint="Load the model in fp32, or use forward mode (how: jvp).",
                )
        kept: Vector = {}

        @torch.no_grad()
        def reflect() -> None:
            # 2 a - (a + d): exact but for the last bit, and needs no direction any more
            for name, value in kept.items():
                parameters[name].neg_().add_(value, alpha=2)

        try:
            with torch.no_grad():
                for name, value in direction.items():
                    parameter = parameters[name]
                    ahead = torch.add(parameter, value.to(parameter.dtype), alpha=scale)
                    kept[name] = value.copy_(parameter) if consume else parameter.detach().clone()
                    parameter.copy_(ahead)
            yield reflect
        finally:
            with torch.no_grad():
                for name, value in kept.items():
                    parameters[name].copy_(value)

    def _told(self, parts: Iterable[Parts], what: str, rows: Sequence[Row]) -> Iterator[Parts]:
        return watched(parts, f"{what} of {len(rows)} rows", len(rows), self.stage)

    @contextmanager
    def _ready(self, parameters: Mapping[str, torch.nn.Parameter]) -> Iterator[None]:
        """These parameters alone want a gradient, and none has one; afterwards as before."""
        every = [*self.lm.model.parameters(), *parameters.values()]
        wanted = [(value, value.requires_grad) for value in every]
        with self._evaluating():
            for value in every:
                value.requires_grad_(False)
            for value in parameters.values():
                value.requires_grad_(True)
                value.grad = None
            try:
                yield
            finally:
                for value in parameters.values():
                    value.grad = None
                for value, before in wanted:
                    value.requires_grad_(before)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        with (
            self.lm.evaluating(),
            self._factors.attached() if self._factors is not None else ExitStack(),
        ):
            yield

    @contextmanager
    def _exact(self) -> Iterator[None]:
        """Computes in fp32: a small difference of two losses does not survive bf16."""
        before = self.lm.precision
        self.lm.precision = "float32"
        try:
            yield
        finally:
            self.lm.precision = before


def _summing(sums: Vector, name: str) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        if parameter.grad is not None:
            mine = parameter.grad.float()
            sums[name] = sums[name].add_(mine) if name in sums else mine
            parameter.grad = None

    return hook


def _backward(value: Tensor) -> None:
    """Adds gradients, unless the value depends on no parameter of the space."""
    if value.requires_grad:
        value.backward()  # type: ignore[no-untyped-call]
