"""Experts by token while they are trained: three losses, each of which moves its own tensors.

    forget   beta IHL on a domain's answer tokens that are easy to predict     moves its B_d, W_g
    keep     gamma CE on retain answers                                        moves B_r
    shape    CE on tokens that are hard to predict + lambda |A - A_start|^2    moves A

The tensors are those of :class:`delible.routed.tokens.TokenRouter`; the model below them is still.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from delible.lm.forward import Forward, collate, map_logits
from delible.lm.lm import LM
from delible.lm.template import Encoded
from delible.made import Made
from delible.routed.system import Routed
from delible.routed.tokens import ByToken, Routing, TokenRouter
from delible.stages.work import Stage
from delible.train.hinge import inverted_hinge
from delible.train.randomness import shuffled


class Options(Protocol):
    """What training goes by (the options of ``procedures/alter.py``)."""

    @property
    def learning_rate(self) -> float: ...
    @property
    def shared_learning_rate(self) -> float: ...
    @property
    def forget_weight(self) -> float: ...
    @property
    def retain_weight(self) -> float: ...
    @property
    def structure_weight(self) -> float: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def structure_epochs(self) -> int: ...
    @property
    def epochs(self) -> int: ...
    @property
    def threshold(self) -> float: ...
    @property
    def structure_order(self) -> float: ...
    @property
    def order(self) -> float: ...
    @property
    def by_entropy(self) -> bool: ...

    def routing(self, order: float | None = None) -> Routing: ...


class ExpertTraining:
    """The two training stages, each of three losses that move each their own tensors."""

    def __init__(
        self, options: Options, lm: LM, names: Sequence[str], tensors: Mapping[str, Tensor],
        forget: Sequence[Encoded], retain: Sequence[Encoded], owners: Sequence[int],
    ) -> None:  # fmt: skip
        self.options, self.lm, self.names, self.start = options, lm, names, dict(tensors)
        self.retain = list(retain)
        self.domains = [
            [row for row, owner in zip(forget, owners, strict=True) if owner == place]
            for place in range(len(names))
        ]
        self.forget = list(forget)

    def at_work(self) -> Any:
        """Within it the weights below are still."""
        return _still(self.lm)

    def model(self, tensors: Mapping[str, Tensor], order: float) -> tuple[Routed, ByToken]:
        """The model with experts that can move."""
        options = self.options
        split = {name: one for name, one in tensors.items() if not name.endswith(".forget")}
        whole = TokenRouter(self.names, options.routing(order), {**split, **{
            name: one for name, one in tensors.items() if name.endswith(".forget")
        }})  # fmt: skip
        found = Routed(self.lm, whole)
        acting = found.acting
        assert isinstance(acting, ByToken)
        acting.tensors = {
            name: one.clone().requires_grad_(not name.endswith(".mean"))
            for name, one in acting.tensors.items()
        }
        acting.remembered = {}
        return found, acting

    # ---- stages

    def structure(self, stage: Stage) -> Made:
        """A on tokens that are hard to predict, B_r on retain answers."""
        options = self.options
        lm, acting = self.model(self.start, options.structure_order)
        moves = Moves(acting, options)
        rows = [*self.forget, *self.retain]
        total = options.structure_epochs * -(-len(rows) // options.batch_size)
        for step, batch in enumerate(self._batches(stage, rows, options.structure_epochs)):
            kept = self._part(stage, self.retain, step)
            if kept:
                moves.step("kept", self.keep_loss(lm, acting, kept))
            moves.step("shared", self.shape_loss(lm, acting, batch, None))
            self._told(stage, step, total, batch)
        return Made({}, acting.tensors)

    def experts(self, stage: Stage, tensors: Mapping[str, Tensor]) -> Made:
        """Domain by domain in turn: forget, keep, shape."""
        options = self.options
        lm, acting = self.model(tensors, options.order)
        start = {name: one for name, one in tensors.items() if name.endswith(".A")}
        moves = Moves(acting, options)
        sizes = [-(-len(rows) // options.batch_size) for rows in self.domains]
        total = options.epochs * sum(sizes)
        step, facts, tokens = 0, 0, 0
        for epoch in range(options.epochs):
            batches = [
                list(self._batches(stage, rows, 1, f"{epoch}/{place}"))
                for place, rows in enumerate(self.domains)
            ]
            turns = [
                (place, batch) for turn in range(max(sizes)) for place, mine in enumerate(batches)
                for batch in mine[turn : turn + 1]
            ]  # fmt: skip
            for place, batch in turns:
                value, easy, every = self.forget_loss(lm, acting, batch)
                facts, tokens = facts + easy, tokens + every
                if value is not None:
                    moves.step("forget", value, place)
                kept = self._part(stage, self.retain, step)
                if kept:
                    moves.step("kept", self.keep_loss(lm, acting, kept))
                moves.step("shared", self.shape_loss(lm, acting, [*batch, *kept], start))
                step += 1
                self._told(stage, step - 1, total, batch)
        told = {"facts_share": round(facts / max(tokens, 1), 4)}
        return Made(told, {name: one.detach() for name, one in acting.tensors.items()})

    # ---- losses

    def forget_loss(
        self, lm: Routed, acting: ByToken, rows: Sequence[Encoded]
    ) -> tuple[Tensor | None, int, int]:
        """beta times the mean hinge over answer tokens that are easy; how many, and of all."""
        values, entropy = self._tokens(lm, acting, rows, inverted_hinge)
        easy = entropy <= self.options.threshold
        if not self.options.by_entropy:
            easy = torch.ones_like(easy)
        if not bool(easy.any()):
            return None, 0, len(easy)
        loss = self.options.forget_weight * values[easy].mean()
        return loss, int(easy.sum()), len(easy)

    def keep_loss(self, lm: Routed, acting: ByToken, rows: Sequence[Encoded]) -> Tensor:
        """gamma times the mean CE over answer tokens."""
        values, _ = self._tokens(lm, acting, rows, _nll)
        return self.options.retain_weight * values.mean()

    def shape_loss(
        self, lm: Routed, acting: ByToken, rows: Sequence[Encoded],
        start: Mapping[str, Tensor] | None,
    ) -> Tensor:  # fmt: skip
        """The mean CE over tokens of whole texts that are hard, and A's distance to its start."""
        whole = [Encoded(row.ids, 1, row.has_end) for row in rows if len(row.ids) > 1]
        values, entropy = self._tokens(lm, acting, whole, _nll)
        hard = entropy > self.options.threshold
        loss = (values * hard).sum() / hard.sum().clamp(min=1)
        if start is not None:
            moved = [(acting.tensors[name] - one).square().sum() for name, one in start.items()]
            loss = loss + self.options.structure_weight * torch.stack(moved).sum()
        return loss

    def _tokens(
        self, lm: Routed, acting: ByToken, rows: Sequence[Encoded], function: Any
    ) -> tuple[Float[Tensor, " token"], Float[Tensor, " token"]]:
        """A loss of each answer token, and the bare model's entropy before it."""
        batch = collate(list(rows), lm.pad_id, lm.device)
        with lm.evaluating(), lm.computing():
            states, _ = Forward(lm)(batch)
            values = map_logits(lm.head, states, batch.targets, function, lm.vocabulary)
        assert acting.remembered is not None
        entropy = torch.cat([acting.remembered[tuple(row.ids)][row.start :] for row in rows])
        return values, entropy.to(values.device)

    # ---- rows

    def _batches(
        self, stage: Stage, rows: Sequence[Encoded], epochs: int, purpose: str = ""
    ) -> Iterator[list[Encoded]]:
        for epoch in range(epochs):
            order = shuffled(rows, stage.generator("rows", purpose, epoch))
            for start in range(0, len(order), self.options.batch_size):
                yield order[start : start + self.options.batch_size]

    def _part(self, stage: Stage, rows: Sequence[Encoded], step: int) -> list[Encoded]:
        """The retain rows of a step: all in turn, in another order each time."""
        if not rows:
            return []
        size = min(self.options.batch_size, len(rows))
        per = -(-len(rows) // size)
        turn, place = divmod(step, per)
        order = shuffled(rows, stage.generator("retain", turn))
        return order[place * size : (place + 1) * size]

    def _told(self, stage: Stage, step: int, total: int, batch: Sequence[Encoded]) -> None:
        stage.steps += 1
        stage.tokens += sum(len(row.ids) for row in batch)
        stage.progress(step + 1, total)


class Moves:
    """AdamW over all tensors, each step of which moves only its own."""

    def __init__(self, acting: ByToken, options: Options) -> None:
        self.acting = acting
        tensors = acting.tensors
        slow = [one for name, one in tensors.items() if name.endswith(".A")]
        fast = [
            one for name, one in tensors.items() if name.endswith((".kept", ".forget", ".gate"))
        ]
        groups = [
            {"params": slow, "lr": options.shared_learning_rate},
            {"params": fast, "lr": options.learning_rate},
        ]
        self.optimizers = {
            part: torch.optim.AdamW(groups, weight_decay=0.0) for part in ("kept", "shared")
        }
        self.groups, self.by_domain = groups, dict[int, torch.optim.Optimizer]()

    def step(self, part: str, loss: Tensor, domain: int | None = None) -> None:
        """One update of B_r (``kept``), A (``shared``), or of a domain's B and the gates."""
        endings = {"kept": (".kept",), "shared": (".A",), "forget": (".forget", ".gate")}[part]
        tensors = self.acting.tensors
        wanted = [name for name in tensors if name.endswith(endings)]
        gradients = torch.autograd.grad(loss, [tensors[name] for name in wanted], allow_unused=True)
        for one in tensors.values():
            one.grad = None
        for name, gradient in zip(wanted, gradients, strict=True):
            tensors[name].grad = gradient
        optimizer: torch.optim.Optimizer | None = self.optimizers.get(part)
        if domain is not None:
            optimizer = self.by_domain.setdefault(
                domain, torch.optim.AdamW(self.groups, weight_decay=0.0)
            )
        assert optimizer is not None
        before = {}
        if domain is not None:
            before = {
                name: tensors[name].detach().clone() for name in wanted if name.endswith(".forget")
            }
        optimizer.step()
        with torch.no_grad():  # strictly one domain's, whatever the gate and the moments say
            for name, value in before.items():
                others = torch.arange(len(value)) != domain
                tensors[name][others] = value[others]


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(logits, targets, reduction="none")


class _still:  # noqa: N801 (reads like a context manager of contextlib)
    """Within it no weight of the model takes a gradient."""

    def __init__(self, lm: LM) -> None:
        self.lm = lm

    def __enter__(self) -> None:
        self.before = [one.requires_grad for one in self.lm.model.parameters()]
        for one in self.lm.model.parameters():
            one.requires_grad_(False)

    def __exit__(self, *_: object) -> None:
        for one, flag in zip(self.lm.model.parameters(), self.before, strict=True):
            one.requires_grad_(flag)


__all__ = ["ExpertTraining", "Moves", "Options"]
