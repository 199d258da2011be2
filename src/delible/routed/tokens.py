"""Experts by token: how sure the model is of a token says which low-rank experts act on it.

    W x  becomes  W x + s (B_r + sum_d g_d B_d) A x
    g = softmax( W_g [h ; S] / tau ),   S = (1 - sum_v p_v^q) / (q - 1)

A and the B of what is kept (B_r) act on every token; of the forget experts B_d the first ``top``
act where S is above the threshold (structure), the best one elsewhere (facts). h is what the block
receives, centred and of unit length, and S the Tsallis entropy of the distribution that predicted
the token. q -> 1 is the entropy in nats.

S of a prompt, and of an answer that is scored, is that of the bare model, which reads it first;
while an answer is generated it is that of the answering model's own last step. Nothing is shared
between texts, and rows are padded: each token's S has to be known before it goes in.

Paper: arXiv 2603.01792 (ALTER); there is no code of the authors, so what is not in the paper's
public descriptions is our completion (``procedures/alter.py`` says what).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor
from torch.nn.functional import linear, normalize, one_hot

from delible.component import Config
from delible.errors import ModelError, RunError
from delible.lm.forward import HEAD_CHUNK_ELEMENTS, cache_argument
from delible.lm.layout import Layout
from delible.lm.lm import LM
from delible.made import Made
from delible.routed.router import Acting, Call, Router


class Routing(Config):
    """How tokens are given to experts.

    Attributes: see the fields.
    """

    order: float = Field(1.1, gt=0, description="q of the entropy that routes.")
    threshold: float = Field(
        1.2, gt=0, description="Of the entropy: above it a token is structure."
    )
    hot: float = Field(0.8, gt=0, description="Temperature of the gate where it is above.")
    cold: float = Field(0.01, gt=0, description="And where it is below: one expert wins.")
    top: int = Field(3, ge=1, description="Forget experts that act on structure, at most.")
    hidden: bool = Field(True, description="The gate sees the state beside the entropy.")
    scale: float = Field(2.0, gt=0, description="alpha / rank.")


def tsallis(logits: Float[Tensor, "token vocab"], order: float) -> Float[Tensor, " token"]:
    """Tsallis entropy of the distributions, from 0; near order 1 Shannon's, in nats."""
    logs = logits.double().log_softmax(dim=-1)
    if abs(order - 1) < 1e-6:
        return -(logs.exp() * logs).sum(dim=-1)
    return (1 - (order * logs).exp().sum(dim=-1)) / (order - 1)


def largest(order: float, vocabulary: int) -> float:
    """The entropy of the uniform distribution, above which there is none."""
    if abs(order - 1) < 1e-6:
        return math.log(vocabulary)
    return (1 - vocabulary ** (1 - order)) / (order - 1)


def gates(
    states: Float[Tensor, "token hidden"],
    entropy: Float[Tensor, " token"],
    weights: Float[Tensor, "expert features"],
    mean: Float[Tensor, " hidden"],
    routing: Routing,
) -> Float[Tensor, "token expert"]:
    """How much of each forget expert tokens get: g, with all but the first experts set to 0."""
    high = entropy > routing.threshold
    known = normalize(states.float() - mean, dim=1)
    if not routing.hidden:
        known = torch.zeros_like(known)
    features = torch.cat([known, entropy.float()[:, None]], dim=1)
    heat = torch.where(high, routing.hot, routing.cold)[:, None]
    shares = (linear(features, weights) / heat).softmax(dim=1)
    count = min(routing.top, shares.shape[1])
    order = shares.detach().topk(count, dim=1).indices
    several = one_hot(order, shares.shape[1]).sum(dim=1).bool()
    single = one_hot(order[:, 0], shares.shape[1]).bool()
    return shares * torch.where(high[:, None], several, single)


class TokenRouter(Router):
    """Experts of one or several domains beside the matrices of a model.

    Args:
        members: Names of the domains that are in it, in the order of their experts.
        routing: How tokens are given to them.
        tensors: ``PATH.A`` [rank, inner], ``PATH.kept`` [outer, rank], ``PATH.forget``
            [expert, outer, rank] of each matrix; ``BLOCK.gate`` [expert, hidden + 1] and
            ``BLOCK.mean`` [hidden] of each block.
        learned_on: Identity of the bare model.
        out: Domains whose experts act no more; the gates of the others are as they were.
    """

    form: ClassVar[str] = "tokens"

    def __init__(
        self, domains: Sequence[str], routing: Routing, tensors: Mapping[str, Tensor],
        learned_on: str | None = None, out: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.domains, self.routing, self.tensors = tuple(domains), routing, dict(tensors)
        self.learned_on, self.out = learned_on, tuple(one for one in self.domains if one in out)
        self.members = tuple(one for one in self.domains if one not in out)

    @cached_property
    def identity(self) -> str:
        plain = json.dumps([self.domains, self.out, self.routing.model_dump(mode="json")])
        return hashlib.sha256(f"{plain} {Made({}, self.tensors).digest}".encode()).hexdigest()

    def acting(self, lm: LM) -> ByToken:
        return ByToken(self, lm)

    def without(self, names: Sequence[str]) -> TokenRouter:
        out = (*self.out, *self.named(names))
        return TokenRouter(self.domains, self.routing, self.tensors, self.learned_on, out)

    def save(self, folder: Path, base: str) -> dict[str, str]:
        data = {
            "domains": self.domains, "out": self.out, "learned_on": self.learned_on,
            "routing": self.routing.model_dump(mode="json"), "identity": self.identity,
        }  # fmt: skip
        Made(data, self.tensors).save(folder / "experts")
        return {"router": "experts"}

    @classmethod
    def load(cls, folder: Path, parts: Mapping[str, str]) -> TokenRouter:
        place = folder / parts.get("router", "experts")
        made = Made.load(place)
        try:
            routing = Routing.build(str(place), **made["routing"])
            found = cls(made["domains"], routing, made.tensors, made["learned_on"], made["out"])
            known = made["identity"]
        except KeyError as error:
            raise RunError(f"the router has no {error}.", where=str(place)) from error
        if found.identity != known:
            raise RunError(
                "the experts are not those that were saved: their files were changed.",
                where=str(place),
            )
        return found


class ByToken(Acting):
    """A router of experts at work; also while they are trained.

    Attributes:
        tensors: As in the router, on the model's device. Training puts leaves there.
        moving: Names of the tensors into which gradients flow; None: into all of them.
        remembered: Entropies by token ids, where texts come again and again; None: not kept.
    """

    shares = False
    asks_the_model = False

    def __init__(self, router: TokenRouter, lm: LM) -> None:
        self.router, self.lm, self.routing = router, lm, router.routing
        self.tensors = {name: one.to(lm.device) for name, one in router.tensors.items()}
        self.moving: frozenset[str] | None = None
        self.remembered: dict[tuple[int, ...], Tensor] | None = None
        self.paths = [name.removesuffix(".A") for name in self.tensors if name.endswith(".A")]
        self.watched = [
            name.removesuffix(".gate") for name in self.tensors if name.endswith(".gate")
        ]
        known = dict(lm.core.named_modules())
        for path in (*self.paths, *self.watched):
            if path not in known:
                raise ModelError(
                    f"the router's experts stand beside '{path}', which the model has not.",
                    where=lm.name,
                    hint="Open it on the model that it was made on.",
                )
        inside = torch.tensor([float(one not in router.out) for one in router.domains])
        self._inside = inside.to(lm.device)
        self._first = largest(self.routing.order, lm.vocabulary)
        self._entropy = torch.zeros(0)
        self._gates = torch.zeros(0)
        self._only: Tensor | None = None

    # ---- how sure the model is

    def spoken(self, rows: Sequence[Any], logits: Tensor) -> None:
        for row, value in zip(rows, tsallis(logits, self.routing.order).tolist(), strict=True):
            row.doubt = value

    def begins(self, layout: Layout, forced: Sequence[str | None] | None, call: Call) -> bool:
        text = layout.text.reshape(-1)
        if forced is not None and all(name == "" for name in forced):
            return False
        self._only = None if forced is None else self._forced(forced)[text.clamp(min=0)]
        ids = call.named.get("input_ids", call.given[0] if call.given else None)
        new = layout.text.shape[1]
        if new == 1 and layout.doubts and all(one is not None for one in layout.doubts):
            values = torch.tensor(layout.doubts, device=text.device, dtype=torch.float64)
            self._entropy = values[text.clamp(min=0)]
            return True
        name = cache_argument(self.lm.core.get_submodule(self.lm.anatomy.backbone))
        cache = call.named.get(name)
        if ids is None or (cache is not None and cache.get_seq_length() > 0):
            raise ModelError(
                "experts that are chosen token by token cannot be asked in this way.",
                where=self.lm.name,
                hint="Ask the model through generate or score; searches that keep beginnings of "
                "answers need the model without the router.",
            )
        self._entropy = self._read(ids, layout, call, name).reshape(-1)
        return True

    def _read(self, ids: Tensor, layout: Layout, call: Call, cache: str) -> Tensor:
        """S of each token, [row, column], from the bare model's prediction of it."""
        keys = [
            tuple(row[real].tolist())
            for row, real in zip(ids, layout.text >= 0, strict=True)
        ] if self.remembered is not None else []  # fmt: skip
        kept = self.remembered if self.remembered is not None else {}
        found = torch.full(ids.shape, self._first, dtype=torch.float64, device=ids.device)
        if keys and all(key in kept for key in keys):
            for row, key in enumerate(keys):
                found[row, layout.text[row] >= 0] = kept[key].to(ids.device)
            return found
        with torch.no_grad():
            states = call.bare(**{cache: None, "use_cache": False}).last_hidden_state
            flat = states.reshape(-1, states.shape[-1])
            size = max(1, HEAD_CHUNK_ELEMENTS // self.lm.vocabulary)
            entropies = torch.cat(
                [
                    tsallis(self.lm.head(part).float(), self.routing.order)
                    for part in flat.split(size)
                ]
            ).reshape(ids.shape)
        found[:, 1:] = entropies[:, :-1]
        found = torch.where(layout.place == 0, self._first, found)
        for row, key in enumerate(keys):
            kept[key] = found[row, layout.text[row] >= 0].cpu()
        return found

    def _forced(self, names: Sequence[str | None]) -> Tensor:
        """Gates that rows are told; NaN where the gate decides. With "" no expert acts."""
        table = torch.full((len(names), len(self.router.domains)), math.nan)
        for row, name in enumerate(names):
            if name is not None:
                table[row] = 0.0
                if name:
                    table[row, self.router.domains.index(name)] = 1.0
        return table.to(self.lm.device)

    # ---- at work

    def prepare(self, prompts: Sequence[Sequence[int]]) -> None:
        return

    def sees(self, path: str, states: Tensor) -> None:
        weights, mean = self._tensor(f"{path}.gate"), self.tensors[f"{path}.mean"]
        found = gates(states, self._entropy, weights, mean, self.routing) * self._inside
        if self._only is not None:
            found = torch.where(self._only.isnan(), found, self._only)
        self._gates = found

    def added(self, path: str, received: Tensor) -> Tensor | None:
        down = self._tensor(f"{path}.A")
        kept, forget = self._tensor(f"{path}.kept"), self._tensor(f"{path}.forget")
        inner = linear(received.to(down.dtype), down)
        given = self._gates.to(inner.dtype)
        always = torch.ones_like(given[:, :1])
        if self._only is not None:  # none of them: not what is kept, either
            always = torch.where(self._bare_rows(), 0.0, 1.0).to(inner.dtype)
        shares = torch.cat([always, given], dim=1)
        spread = (shares[:, :, None] * inner[:, None, :]).flatten(1)
        up = torch.cat([kept[None], forget]).transpose(0, 1).flatten(1)
        return self.routing.scale * linear(spread, up)

    def _bare_rows(self) -> Bool[Tensor, "token 1"]:
        assert self._only is not None
        return ((self._only == 0).all(dim=1))[:, None]

    def _tensor(self, name: str) -> Tensor:
        one = self.tensors[name]
        if self.moving is None or name in self.moving or not one.requires_grad:
            return one
        return one.detach()

    def alike(self, shared: int, prompts: Sequence[Sequence[int]], forced: str | None) -> int:
        return 0


__all__ = ["ByToken", "Routing", "TokenRouter", "gates", "largest", "tsallis"]
