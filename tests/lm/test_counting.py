"""Tokens that go through a model, counted by the texts themselves."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from delible.lm.counting import tokens_read
from delible.lm.lm import LM
from delible.lm.states import Span, StateStore
from delible.search import attribution
from delible.search.attribution import contributions
from delible.system.asks import Prompt
from delible.testing.tiny import tiny_model, tiny_tokenizer

TEXTS = ("Where was Ada Quill born, and when?", "Who?", "What did Ben sell?")


@cache
def tiny(seed: int = 0) -> LM:
    return LM(tiny_model(seed=seed), tiny_tokenizer(), precision="float32")


def spans(lm: LM, texts: Any = TEXTS) -> list[Span]:
    rows = [lm.template.encode(Prompt.ask(text), "In Norrby") for text in texts]
    return [Span(row, row.start - 1, row.start) for row in rows]


def prompts(lm: LM, texts: Any = TEXTS) -> int:
    """Tokens of the prompts, and the one behind each that is read with it."""
    return sum(len(lm.template.prompt_ids(Prompt.ask(text))) + 1 for text in texts)


@pytest.mark.parametrize("streams", [("block",), ("block", "middle")])
def test_every_real_token_counts_once_and_padding_does_not(streams: Any) -> None:
    lm = tiny()
    with tokens_read(lm) as read:
        StateStore().states(lm, spans(lm), streams)
    assert read.tokens == prompts(lm)
    with tokens_read(lm) as before, tokens_read(tiny(1)) as other:
        pass
    assert (before.tokens, other.tokens) == (0, 0)
    with tokens_read(None) as nobody:
        lm.score([])
    assert nobody.tokens == 0


def test_what_is_remembered_counts_as_read() -> None:
    lm, store = tiny(), StateStore()
    with tokens_read(lm, store) as first:
        store.states(lm, spans(lm))
    with tokens_read(lm, store) as second:
        store.states(lm, spans(lm))
        store.states(tiny(1), spans(tiny(1)))
        store.states(tiny(1), spans(tiny(1)))
    assert store.passes == 2 * len(TEXTS)
    assert first.tokens == second.tokens == prompts(lm)
    with tokens_read(lm, store) as more:
        store.states(lm, spans(lm, (*TEXTS, "How?")))
    assert more.tokens == prompts(lm, (*TEXTS, "How?"))


def test_forward_passes_of_attribution_count_each_shortened_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attribution, "BATCH", 1)  # no beginning is shared
    lm = tiny()
    prompt = Prompt.ask(TEXTS[0])
    row = lm.template.encode(prompt, "In Norrby")
    with tokens_read(lm) as read:
        found = contributions(lm, prompt, "In Norrby", "token")
    rows = 1 + len(found.values)
    assert read.tokens == rows * len(row.ids) - len(found.values)


def test_a_model_that_shares_the_weights_is_another() -> None:
    from delible.intervene.base import Fitted
    from delible.intervene.soft_prompts import OpenedTemplate, SoftPrompt, filler_of
    from delible.intervene.system import intervened

    lm = tiny().copy()
    opening, filler = filler_of(lm, 3)
    lm.template = OpenedTemplate.of(lm.template, opening)
    tensors = {"vectors": torch.zeros(3, 32), "filler": torch.tensor(filler)}
    twin = intervened(lm, [Fitted(SoftPrompt(), tensors)])
    with tokens_read(lm) as bare, tokens_read(twin) as changed:
        StateStore().states(twin, spans(twin))
    assert (bare.tokens, changed.tokens) == (0, prompts(twin))
