"""Interventions by their definition: plain hooks, one whole row after the other, no cache."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from delible.intervene.base import Fitted, Intervention
from delible.intervene.sites import Positions, Site
from delible.intervene.system import Intervened, intervened
from delible.intervene.taps import Where
from delible.lm.lm import LM
from delible.registry import register
from delible.system.asks import Prompt
from delible.testing.tiny import tiny_model, tiny_tokenizer

#: All share the beginning "About Ada", which is a name in three of them only.
PROMPTS = [
    Prompt.ask("About Ada or aDA?"), Prompt.ask("About Ada?"), Prompt.ask("About Adam?"),
    Prompt.ask("About Ada, who is old?"),
]  # fmt: skip
ANSWERS = ["In Ob", "In Oslo", "No"]
KINDS = [
    Positions(), Positions(kind="answer"), Positions(kind="prompt_end"),
    Positions(kind="spans", texts=("Ada", "who is")),
]  # fmt: skip


def moved(states: Tensor, place: Tensor) -> Tensor:
    """Depends on a state and on its place; takes nothing apart from other tokens."""
    turned = torch.roll(states, 1, dims=-1)
    return 0.7 * states + (0.4 + 0.1 * torch.sin(place[:, None].to(states.dtype))) * turned


@register(kind="intervention", name="moving", title="Moving", summary="Moves states.")
class Moving(Intervention):
    site: Site = Field(Site(), description="Where.")
    at: Positions = Field(Positions(), description="At which tokens.")

    @property
    def sites(self) -> Sequence[Site]:
        return (self.site,)

    @property
    def positions(self) -> Positions:
        return self.at

    def change(self, states: Tensor, where: Where, tensors: Mapping[str, Tensor]) -> Tensor:
        return moved(states, where.place)


@lru_cache(maxsize=2)
def bare(family: str) -> LM:
    return LM(tiny_model(family), tiny_tokenizer(), precision="float32")


def with_moving(lm: LM, site: Site, at: Positions) -> Intervened:
    return intervened(lm, [Fitted(Moving(site=site, at=at))])


def wanted(lm: LM, ids: Sequence[int], start: int, kind: str) -> list[bool]:
    """Which tokens of a row are meant; its answer begins at ``start``."""
    if kind == "all":
        return [True] * len(ids)
    if kind == "answer":
        return [place >= start - 1 for place in range(len(ids))]
    if kind == "prompt_end":
        return [place == start - 1 for place in range(len(ids))]
    pieces = [lm.tokenizer.decode([token]) for token in ids[:start]]  # one character each
    starts = np.cumsum([0, *(len(one) for one in pieces)])
    found = [False] * len(ids)
    for match in re.finditer(r"\b(?:ada|who is)\b", "".join(pieces).lower()):
        for place in range(start):
            found[place] |= match.start() <= starts[place] < match.end()
    return found


#: What holds the pre-activations, by the names that the families give it.
GATES = ("mlp.gate_proj", "mlp.gate_up_proj", "mlp.c_fc", "mlp.dense_h_to_4h", "fc1")


def gate_path(lm: LM) -> str:
    """The matrix before the activation function, relative to a block."""
    names = {name for name, _ in lm.core.get_submodule(lm.anatomy.block_path(0)).named_modules()}
    return next((one for one in GATES if one in names), "")


def hooked(lm: LM, site: Site, mask: Sequence[bool]) -> Any:
    """A plain hook for one row, put on by hand; returns the handles."""
    anatomy, core = lm.anatomy, lm.core
    layers = [layer % anatomy.layers for layer in site.layers] or range(anatomy.layers)
    relative = {
        "block": "", "block_input": "", "attention": anatomy.attention, "mlp": anatomy.mlp,
        "mlp_inner": anatomy.mlp_out, "mlp_gate": gate_path(lm),
    }  # fmt: skip
    if site.what in relative:
        path = relative[site.what]
        paths = [
            f"{anatomy.blocks}.{layer}.{path}" if path else f"{anatomy.blocks}.{layer}"
            for layer in layers
        ]
    else:
        paths = [anatomy.embedding if site.what == "embedding" else str(anatomy.norm)]

    def new(states: Tensor) -> Tensor:
        if site.what == "mlp_gate" and "gate_up" in gate_path(lm):  # fused: the gate comes first
            gate, up = states.chunk(2, dim=-1)
            return torch.cat([moved_at(gate), up], dim=-1)
        return moved_at(states)

    def moved_at(states: Tensor) -> Tensor:
        flat = states.reshape(-1, states.shape[-1])
        here = torch.tensor(mask)[:, None]
        return torch.where(here, moved(flat, torch.arange(len(flat))), flat).reshape(states.shape)

    def before(module: Any, given: Any, named: Any) -> Any:
        if given:
            return (new(given[0]), *given[1:]), named
        return given, {**named, "hidden_states": new(named["hidden_states"])}

    def behind(module: Any, given: Any, output: Any) -> Any:
        return (new(output[0]), *output[1:]) if isinstance(output, tuple) else new(output)

    modules = [core.get_submodule(path) for path in paths]
    if site.what in ("mlp_inner", "block_input"):
        return [one.register_forward_pre_hook(before, with_kwargs=True) for one in modules]
    return [one.register_forward_hook(behind) for one in modules]


@torch.inference_mode()
def logits_of(lm: LM, ids: Sequence[int], start: int, site: Site, kind: str) -> Tensor:
    """Logits [sequence, vocab] of a whole row."""
    handles = hooked(lm, site, wanted(lm, ids, start, kind))
    try:
        return lm.core(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def states_of(
    lm: LM, ids: Sequence[int], start: int, site: Site, kind: str, layer: int
) -> Tensor:  # fmt: skip
    """Output of a block [sequence, hidden]."""
    handles = hooked(lm, site, wanted(lm, ids, start, kind))
    seen: list[Tensor] = []
    block = lm.core.get_submodule(lm.anatomy.block_path(layer))

    def keep(module: Any, given: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handles.append(block.register_forward_hook(keep))
    try:
        lm.core(input_ids=torch.tensor([list(ids)]), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen[0].reshape(len(ids), -1)


def said(lm: LM, prompt: Prompt, site: Site, kind: str, count: int) -> str:
    """Greedy answer, the whole row computed again for each token."""
    ids = list(lm.template.prompt_ids(prompt))
    start = len(ids)
    for _ in range(count):
        token = int(logits_of(lm, ids, start, site, kind)[-1].argmax())
        if token in lm.ends:
            break
        ids.append(token)
    return str(lm.tokenizer.decode(ids[start:], skip_special_tokens=True)).strip()
