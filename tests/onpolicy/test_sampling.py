"""Completions: read once for a group, drawn by their own numbers, with the token that ends them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny_policy import FORGET, lm

from delible.lm.counting import tokens_read
from delible.lm.decode import Speaking
from delible.lm.lm import LM
from delible.lm.speaker import Row
from delible.system.asks import Decoding
from delible.train.onpolicy.sampling import Choosing, complete, drawn

WARM = Decoding(6, temperature=1.0)


def prompts(model: LM, group: int) -> list[tuple[int, ...]]:
    return [model.template.prompt_ids(one.prompt) for one in FORGET[:2] for _ in range(group)]


def test_draws_invert_the_cumulated_shares() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(1, 40, generator=generator)
    for temperature in (0.5, 1.0, 2.0):
        raw = [math.exp(float(one) / temperature) for one in logits[0].double()]
        shares = [one / sum(raw) for one in raw]
        for seed in range(50):
            row = Row(Decoding(1, temperature=temperature), str(seed))
            wanted = Row(Decoding(1, temperature=temperature), str(seed)).draw.random()
            sums = [sum(shares[: token + 1]) for token in range(len(shares))]
            first = next(token for token, total in enumerate(sums) if total > wanted)
            assert drawn(logits, [row]) == [first]


def test_draws_come_as_often_as_they_should() -> None:
    shares = torch.tensor([0.5, 0.3, 0.15, 0.05])
    rows = [Row(WARM, f"seed {number}") for number in range(4000)]
    found = Counter(drawn(shares.log().expand(4000, -1), rows))
    for token, share in enumerate(shares.tolist()):
        spread = math.sqrt(4000 * share * (1 - share))
        assert abs(found[token] - 4000 * share) < 4.5 * spread


def test_a_group_reads_its_question_once() -> None:
    model = lm()
    ids = prompts(model, 4)
    tokens = []
    for group in (1, 4):
        mine = ids if group == 4 else ids[::4]
        with tokens_read(model) as count:
            complete(model, mine, Decoding(1, temperature=1.0), [f"{n}" for n in range(len(mine))])
        tokens.append(count.tokens)
    assert tokens[0] == tokens[1]


def test_a_completion_does_not_depend_on_who_is_beside_it() -> None:
    model = lm()
    ids = prompts(model, 3)
    seeds = [f"{n}" for n in range(6)]
    whole = complete(model, ids, WARM, seeds)
    alone = [complete(model, [one], WARM, [seed])[0] for one, seed in zip(ids, seeds, strict=True)]
    backwards = complete(model, ids[::-1], WARM, seeds[::-1])[::-1]
    assert whole == alone == backwards
    assert len({one.tokens for one in whole}) > 3


def test_the_token_that_ends_a_completion_is_there_and_says_nothing() -> None:
    model = lm()
    model.template.declared_ends = frozenset(range(120))
    found = complete(
        model, prompts(model, 8), Decoding(12, temperature=1.0), [*map(str, range(16))]
    )
    ended = [one for one in found if one.finished]
    assert ended
    for one in ended:
        assert one.tokens[-1] in model.ends
        assert not any(token in model.ends for token in one.tokens[:-1])
    for one in found:
        assert one.tokens
        if not one.finished:
            assert len(one.tokens) == 12


def test_top_p_draws_from_the_likeliest() -> None:
    logits = torch.tensor([[0.0, 3.0, 2.9, -1.0]])
    rows = [Row(Decoding(1, temperature=1.0, top_p=0.6), str(n)) for n in range(200)]
    found = Counter(Choosing()(logits.expand(200, -1), rows))
    assert set(found) == {1, 2}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_equal_prompts_are_read_once_with_the_same_result(family: str, monkeypatch: Any) -> None:
    from delible.testing.contract.trial import tiny_lm

    model = tiny_lm(family)
    ids = prompts(model, 3)
    seeds = [str(n) for n in range(6)]
    once = complete(model, ids, WARM, seeds)

    def each(self: Any, prompts: Sequence[Any], cache: Any) -> Any:
        return prompts, None

    monkeypatch.setattr(Speaking, "_each_once", each)
    assert complete(model, ids, WARM, seeds) == once
