"""Routers whose weights are given by hand, and models that they are merged into by hand."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from delible.lm.lm import LM
from delible.routed.detector import Detector, DetectorOptions
from delible.routed.low_rank import LowRank
from delible.routed.requests import Loads, Member, RequestRouter
from delible.routed.system import Routed, routed
from delible.system.asks import Prompt
from delible.testing.tiny import tiny_model, tiny_tokenizer

#: Long enough a beginning that batches share it.
PROMPTS = [
    Prompt.ask("About Ada, who is old?"), Prompt.ask("About Bo?"), Prompt.ask("About nobody?"),
    Prompt.ask("About Ada and Bo?"), Prompt.ask("About snow?"),
]  # fmt: skip
ANSWERS = ["In Ob", "In Oslo", "No"]
REQUESTS = ("a" * 8, "b" * 8)


def gate(text: str) -> list[float]:
    """Ada opens the first adapter, Bo the second one, in part."""
    return [0.7 if "Ada" in text else 0.0, 0.4 if "Bo" in text else 0.0]


@lru_cache(maxsize=4)
def bare(family: str) -> LM:
    depth = {"n_layer": 2} if family == "gpt2" else {"num_hidden_layers": 2}
    lm = LM(tiny_model(family, **depth), tiny_tokenizer(), name=f"tiny-{family}")
    lm.precision = "float32"
    return lm


def matrices(lm: LM) -> dict[str, tuple[int, int]]:
    """Width of what every matrix of the blocks reads and gives."""
    found = {}
    for path, module in lm.core.named_modules():
        if not path.startswith(f"{lm.anatomy.blocks}."):
            continue
        if isinstance(module, torch.nn.Linear):
            found[path] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            found[path] = tuple(module.weight.shape)
    return found


def adapter(lm: LM, seed: int, rank: int = 3, scale: float = 1.5) -> LowRank:
    draws = torch.Generator().manual_seed(seed)
    pairs = {
        path: (
            torch.randn(rank, inner, generator=draws) * 0.2,
            torch.randn(outer, rank, generator=draws) * 0.2,
        )
        for path, (inner, outer) in matrices(lm).items()
    }
    return LowRank(pairs, scale)


def detector(seed: int = 0) -> Detector:
    options = DetectorOptions(backbone="states")
    return Detector(options, {"numbers": torch.full((6,), float(seed))}, "by hand")


def by_hand(lm: LM, loads: Loads = "own", monkey: Any = None) -> Routed:
    """A router whose gate is :func:`gate`; ranks differ."""
    parts = [
        Member(name, adapter(lm, place, 3 + place, 1.5 + place), detector(place))
        for place, name in enumerate(REQUESTS)
    ]
    found = routed(lm, RequestRouter(parts, loads, lm.identity))
    asked: list[tuple[int, ...]] = []

    def judged(prompts: Sequence[tuple[int, ...]]) -> np.ndarray:
        asked.extend(prompts)
        rows = [gate(" ".join(found.acting._asked(ids))) for ids in prompts]  # type: ignore[attr-defined]
        every = np.array(rows)
        return every.max(1, keepdims=True) if loads == "cumulative" else every

    found.acting._judged = judged  # type: ignore[attr-defined]
    found.asked_of_the_gate = asked  # type: ignore[attr-defined]
    return found


def merged(lm: LM, adapters: Sequence[LowRank], weights: Sequence[float]) -> Any:
    """A copy of the bare module with weights * scale * B A added to its matrices."""
    twin = copy.deepcopy(lm.core)
    with torch.no_grad():
        for one, weight in zip(adapters, weights, strict=True):
            for path, (down, up) in one.pairs.items():
                module = twin.get_submodule(path)
                change = weight * one.scale * (up.double() @ down.double())
                module.weight += (change.T if isinstance(module, Conv1D) else change).float()
    return twin


def logits_of(module: Any, ids: Sequence[int]) -> Tensor:
    with torch.no_grad():
        return module(torch.tensor([list(ids)]), use_cache=False).logits[0].float()


def said(lm: LM, module: Any, prompt: Prompt, tokens: int) -> str:
    """The greedy answer, each token from the whole row anew."""
    ids = list(lm.template.prompt_ids(prompt))
    new: list[int] = []
    while len(new) < tokens:
        token = int(logits_of(module, ids + new)[-1].argmax())
        if token in lm.ends:
            break
        new.append(token)
    return str(lm.tokenizer.decode(new, skip_special_tokens=True)).strip()


def scored(module: Any, row: Any) -> np.ndarray:
    logprobs = logits_of(module, row.ids).double().log_softmax(1)
    targets = torch.tensor(row.ids[row.start :])
    return logprobs[row.start - 1 : -1].gather(1, targets[:, None])[:, 0].numpy()


Weights = Mapping[str, Sequence[float]]
