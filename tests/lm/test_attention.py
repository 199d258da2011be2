"""Attention that takes the place of the model's own gives the same."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from delible.lm import attention
from delible.lm.attention import token_by_token
from delible.lm.lm import LM
from delible.testing.tiny import tiny_model, tiny_tokenizer


@pytest.mark.parametrize("mask", ["none", "bool", "float"])
@pytest.mark.parametrize("new", [1, 3])
def test_one_new_token_is_as_in_the_fused_kernel(mask: str, new: int) -> None:
    rows, heads, shared_by, length, width = 3, 2, 2, 7, 8
    query = torch.randn(rows, heads * shared_by, new, width)
    key, value = torch.randn(2, rows, heads, length, width)
    sees = torch.rand(rows, 1, new, length) < 0.6
    sees[..., 0] = True
    masks = {"none": torch.ones_like(sees), "bool": sees, "float": sees}
    told = {"none": None, "bool": sees, "float": torch.where(sees, 0.0, -1e30)}[mask]
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = shared_by, False
    found, _ = attention._attend_token(module, query, key, value, told, scaling=0.3)
    expected = scaled_dot_product_attention(
        query, key, value, attn_mask=masks[mask], scale=0.3, enable_gqa=True
    )
    assert torch.allclose(found, expected.transpose(1, 2), atol=1e-5)


def test_it_is_replaced_only_where_that_is_exact_and_known_to_work() -> None:
    lm = LM(tiny_model("llama"), tiny_tokenizer(), precision="float32")
    config = lm.core.config
    with token_by_token(lm):
        assert config._attn_implementation != "sdpa"
    assert config._attn_implementation == "sdpa"
    rounding = LM(tiny_model("llama"), tiny_tokenizer(), precision="bfloat16")
    unknown = LM(tiny_model("llama"), tiny_tokenizer(), precision="float32")
    unknown.grows_trees = False
    for other in (rounding, unknown):
        with token_by_token(other):
            assert other.core.config._attn_implementation == "sdpa"
