"""Attacks from the inside by their definitions: float64, plain hooks, whole texts one by one."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from delible.lm.lm import LM
from delible.measure.attack import AttackContext
from delible.records import QA, RecordBase
from delible.testing.tiny import tiny_model, tiny_tokenizer

Values = npt.NDArray[np.float64]
#: The fact is what the alias says, in the middle of the answer, in another case, or all of it.
RECORDS: list[RecordBase] = [
    QA(question="Where was Ada born?", answer="She was born in Norrby, far away.",
       aliases=("born in norrby", "Norrby"), perturbed=("In Oslo.", "In Bern.", "In Rome."),
       subject="Ada", group="town"),
    QA(question="Ben's work?", answer="A smith", aliases=("carpenter",), subject="Ben",
       perturbed=("A cook", "A king", "A monk"), group="work"),
    QA(question="Who taught Cy?", answer="It was DOV.", aliases=("Dov",), subject="Cy",
       perturbed=("It was Eva.", "It was Gil.", "It was Ida."), group="teacher"),
]  # fmt: skip
FACTS = ["born in Norrby", "A smith", "DOV"]


def noisy(lm: LM, share: float, seed: int) -> LM:
    """The same model with noise on its matrices, head included, a share of their spread."""
    found = lm.copy(f"{lm.name}+{seed}")
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in found.core.parameters():
            if weight.dim() > 1:
                weight += share * weight.std() * torch.randn(weight.shape, generator=random)
    found.touch()
    return found


def between(original: LM, reference: LM, share: float) -> LM:
    """A part of the way from one model to another."""
    found = original.copy(f"{original.name}, {share} of the way")
    with torch.no_grad():
        for own, other in zip(found.core.parameters(), reference.core.parameters(), strict=True):
            own.lerp_(other, share)
    found.touch()
    return found


@dataclass(frozen=True)
class Three:
    """Original, reference, and something between them."""

    original: LM
    reference: LM
    unlearned: LM

    def context(self, records: Sequence[RecordBase] = RECORDS) -> AttackContext:
        return AttackContext(
            records, (), (), self.original, 0, reference=self.reference
        )  # fmt: skip


@cache
def three(family: str) -> Three:
    original = LM(tiny_model(family, seed=3), tiny_tokenizer(), precision="float32", name=family)
    _teach(original)
    reference = noisy(original, 0.5, 1)
    return Three(original, reference, between(original, reference, 0.4))


def _teach(lm: LM) -> None:
    """A few steps on the facts, so that the layers hold them."""
    rows = [text_of(record, fact) for record, fact in zip(RECORDS, FACTS, strict=True)]  # type: ignore[arg-type]
    optimiser = torch.optim.Adam(lm.core.parameters(), lr=3e-3)
    for _ in range(15):
        optimiser.zero_grad()
        for ids, first, end in rows:
            logits = lm.core(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
            wanted = torch.tensor(ids[first:end])
            torch.nn.functional.cross_entropy(logits[first - 1 : end - 1], wanted).backward()
        optimiser.step()
    lm.core.zero_grad()
    lm.touch()


def without(context: AttackContext, *names: str) -> AttackContext:
    return replace(context, **dict.fromkeys(names))


@cache
def _double(lm: LM) -> Any:
    core = copy.deepcopy(lm.core).double()
    core.config._experts_implementation = "eager"  # the grouped product has no float64
    return core


def text_of(record: QA, fact: str) -> tuple[list[int], int, int]:
    """Token ids (one a byte), and where the fact begins and ends."""
    turns = [{"role": "user", "content": record.question}]
    tokenizer = tiny_tokenizer()
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = list(tokenizer(prompt + record.answer, add_special_tokens=False)["input_ids"])
    first = len(ids) - len(record.answer) + record.answer.index(fact)
    return ids, first, first + len(fact)


def blocks_of(lm: LM) -> Any:
    return _double(lm).get_submodule(lm.anatomy.blocks)


@torch.no_grad()
def states_of(lm: LM, ids: Sequence[int]) -> Tensor:
    """Outputs of the blocks, [layer, token, hidden]."""
    seen: list[Tensor] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output)[0])

    handles = [block.register_forward_hook(keep) for block in blocks_of(lm)]
    _double(lm)(input_ids=torch.tensor([list(ids)]), use_cache=False)
    for handle in handles:
        handle.remove()
    return torch.stack(seen)


@torch.no_grad()
def mean_logprob(lm: LM, ids: Sequence[int], first: int, end: int, **patch: Any) -> float:
    """Mean log p of the tokens first … end - 1; ``layer`` and ``states`` replace a block's."""

    def put(_: Any, __: Any, output: Any) -> Any:
        tensor = (output[0] if isinstance(output, tuple) else output).clone()
        for place in range(first - 1, end - 1):
            tensor[0, place] = patch["states"][place]
        return (tensor, *output[1:]) if isinstance(output, tuple) else tensor

    handle = blocks_of(lm)[patch["layer"]].register_forward_hook(put) if patch else None
    logits = _double(lm)(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    if handle is not None:
        handle.remove()
    return mean_of(logits, ids, first, end)


def mean_of(logits: Tensor, ids: Sequence[int], first: int, end: int) -> float:
    total = 0.0
    for place in range(first, end):
        row = logits[place - 1].double().tolist()
        largest = max(row)
        log_sum = largest + math.log(sum(math.exp(one - largest) for one in row))
        total += max(row[ids[place]] - log_sum, -20.0)
    return total / (end - first)


def ratio(held: Sequence[float], gone: Sequence[float]) -> tuple[float | None, list[float | None]]:
    """UDS of one record, and the share that is gone by layer."""
    above = below = 0.0
    shares: list[float | None] = []
    for d_r, d_u in zip(held, gone, strict=True):
        if d_r <= 0.05:
            shares.append(None)
            continue
        share = d_u / d_r
        share = 0.0 if share < 0 else 1.0 if share > 1 else share
        shares.append(share)
        above += d_r * share
        below += d_r
    return (above / below if below else None), shares


def averaged(shares: Sequence[Sequence[float | None]]) -> list[float | None]:
    """What is left by layer, over the records whose fact it holds."""
    found: list[float | None] = []
    for layer in range(len(shares[0])):
        there = [1 - value for one in shares if (value := one[layer]) is not None]
        found.append(sum(there) / len(there) if there else None)
    return found
