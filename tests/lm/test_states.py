"""Hidden states by plain hooks, text by text; what is read of them; each text read once."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from delible.errors import ModelError
from delible.lm import states as states_module
from delible.lm.lm import LM
from delible.lm.states import STREAMS, Span, StateStore, middle_part, read_states
from delible.lm.tail import lens_logits, lens_logprobs
from delible.system.asks import Prompt
from delible.testing.tiny import FAMILIES, tiny_model, tiny_tokenizer

TEXTS = [("Where was Ada born?", "In Norrby."), ("Why?", "So."), ("Who is Ben Orr?", "A cook")]


@cache
def tiny(family: str) -> LM:
    return LM(tiny_model(family), tiny_tokenizer(), precision="float32")


def spans_of(lm: LM) -> list[Span]:
    rows = [lm.template.encode(Prompt.ask(question), answer) for question, answer in TEXTS]
    return [Span(row, row.start - 1 + skip, len(row.ids) - 1) for skip, row in enumerate(rows)]


@torch.no_grad()
def by_hand(lm: LM, ids: tuple[int, ...]) -> dict[str, Tensor]:
    """Inputs and outputs of blocks and their parts, each [layer, token, hidden], of one text."""
    seen: dict[str, list[Tensor]] = {}
    handles = []

    def first(value: Any) -> Tensor:
        return (value[0] if isinstance(value, tuple) else value).reshape(len(ids), -1)

    blocks = lm.core.get_submodule(lm.anatomy.blocks)
    for block in blocks:
        parts = {"block": block, **dict(block.named_modules())}
        for name, module in parts.items():
            if name in ("block", lm.anatomy.mlp, lm.anatomy.attention) or "norm" in name:
                handles.append(
                    module.register_forward_hook(
                        lambda _, __, out, name=name: seen.setdefault(name, []).append(first(out))
                    )
                )
        handles.append(
            block.register_forward_pre_hook(
                lambda _, given: seen.setdefault("input", []).append(first(given[0]))
            )
        )
    try:
        lm.core(input_ids=torch.tensor([list(ids)]), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.stack(value) for name, value in seen.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_those_of_plain_hooks_on_each_text_alone(family: str) -> None:
    lm = tiny(family)
    spans = spans_of(lm)
    found = dict(read_states(lm, spans, STREAMS))
    assert sorted(found) == [0, 1, 2]
    for place, span in enumerate(spans):
        seen = by_hand(lm, span.row.ids)
        part = slice(span.start, span.end)
        # Gemma norms what attention gives before it is added
        added = seen.get("post_attention_layernorm") if family.startswith("gemma") else None
        added = seen[lm.anatomy.attention] if added is None else added
        expected = {
            "block": seen["block"], "mlp": seen[lm.anatomy.mlp],
            "attention": seen[lm.anatomy.attention], "middle": seen["input"] + added,
        }  # fmt: skip
        for stream in STREAMS:
            assert found[place][stream].shape == expected[stream][:, part].shape
            torch.testing.assert_close(
                found[place][stream], expected[stream][:, part], rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_blocks_states_give_the_models_own_logits(family: str) -> None:
    lm = tiny(family)
    spans = spans_of(lm)
    with torch.no_grad():
        for place, states in read_states(lm, spans):
            span = spans[place]
            ids = torch.tensor([span.row.ids])
            own = lm.core(input_ids=ids, use_cache=False).logits[0, span.start : span.end].float()
            lens = torch.cat(list(lens_logits(lm, states["block"][-1])))
            torch.testing.assert_close(lens, own, rtol=1e-4, atol=1e-4)
            first = torch.cat(list(lens_logits(lm, states["block"][0])))
            assert (first - own).abs().max() > 0.1
            targets = ids[0, span.start + 1 : span.end + 1]
            wanted = own.double().log_softmax(1).gather(1, targets[:, None])[:, 0]
            values = lens_logprobs(lm, states["block"][-1], targets)
            torch.testing.assert_close(values.double(), wanted, rtol=1e-4, atol=1e-4)


def test_many_states_go_through_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny("llama")
    states = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    whole = torch.cat(list(lens_logits(lm, states)))
    monkeypatch.setattr("delible.lm.tail.TOGETHER", 3)
    parts = list(lens_logits(lm, states))
    assert [len(part) for part in parts] == [3, 3, 1]
    torch.testing.assert_close(torch.cat(parts), whole)
    targets = torch.arange(7)
    expected = whole.double().log_softmax(1)[targets, targets]
    torch.testing.assert_close(lens_logprobs(lm, states, targets).double(), expected)


def test_a_text_goes_through_a_model_once() -> None:
    lm, other = tiny("llama"), tiny("qwen2")
    store, spans = StateStore(), spans_of(lm)
    first = store.states(lm, spans)
    assert store.passes == 3
    again = store.states(lm, list(reversed(spans)))
    assert store.passes == 3
    for one, two in zip(first, reversed(again), strict=True):
        assert torch.equal(one["block"], two["block"])
    assert not torch.equal(store.states(other, spans)[0]["block"], first[0]["block"])
    assert store.passes == 6
    row = spans[0].row
    shorter = store.states(lm, [Span(row, row.start, row.start + 1)])
    assert store.passes == 7
    assert shorter[0]["block"].shape[1] == 1
    streams = store.states(lm, spans[:1], ("block", "mlp"))
    assert store.passes == 8
    assert set(streams[0]) == {"block", "mlp"}


def test_changed_weights_are_read_anew() -> None:
    lm = LM(tiny_model("llama"), tiny_tokenizer(), precision="float32")
    store, spans = StateStore(), spans_of(lm)
    before = store.states(lm, spans)[0]["block"]
    with torch.no_grad():
        lm.core.get_submodule(lm.anatomy.block_path(1)).mlp.down_proj.weight.add_(0.1)
    lm.touch()
    after = store.states(lm, spans)[0]["block"]
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])


def test_what_was_used_last_is_kept() -> None:
    lm = tiny("llama")
    spans = spans_of(lm)
    size = max(one["block"].numel() * 4 for one in StateStore().states(lm, spans))
    store = StateStore(most_bytes=size)
    assert len(store.states(lm, spans)) == 3  # what does not fit is given all the same
    assert sum(one.numel() * 4 for one in store._states.values()) <= size
    kept = store.passes
    store.states(lm, spans)
    assert store.passes > kept


def test_what_is_made_once_is_made_once() -> None:
    store, made = StateStore(), list[int]()

    def make() -> int:
        made.append(1)
        return 7

    assert [store.once("a", make), store.once("a", make), store.once("b", make)] == [7, 7, 7]
    assert len(made) == 2


def test_a_block_whose_middle_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny("llama")
    assert middle_part(lm) == "self_attn"
    assert middle_part(tiny("gemma2")) == "post_attention_layernorm"
    monkeypatch.setattr(states_module, "SAME", -1.0)
    assert middle_part(lm) is None
    with pytest.raises(ModelError, match="what attention adds"):
        list(read_states(lm, spans_of(lm), ("middle",)))
    assert list(read_states(lm, spans_of(lm), ("block", "mlp")))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_nothing_is_left_behind(family: str) -> None:
    lm = LM(tiny_model(family), tiny_tokenizer(), precision="float32")
    before = lm.fingerprint
    list(read_states(lm, spans_of(lm), STREAMS))
    list(lens_logits(lm, torch.zeros(2, 32)))
    assert not any(module._forward_hooks for module in lm.core.modules())
    assert not any(module._forward_pre_hooks for module in lm.core.modules())
    assert len(lm.core.get_submodule(lm.anatomy.blocks)) == lm.anatomy.layers
    assert lm.fingerprint == before
