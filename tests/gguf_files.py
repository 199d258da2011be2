"""Writes a Llama as a GGUF file of the format q4_0, as llama.cpp's tools do for deployment."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

from delible.lm.lm import LM

#: Names of a block's matrices, here and in the file.
_MATRICES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_TOP = {
    "model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm",
    "lm_head.weight": "output",
}  # fmt: skip


def write_q4_0(lm: LM, path: Path) -> None:
    """The blocks' matrices in 4 bits, all else in fp32, with tokenizer and chat template."""
    gguf = pytest.importorskip("gguf")
    settings, tokenizer = lm.model.config, lm.tokenizer
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("toy")
    writer.add_context_length(settings.max_position_embeddings)
    writer.add_embedding_length(settings.hidden_size)
    writer.add_block_count(settings.num_hidden_layers)
    writer.add_feed_forward_length(settings.intermediate_size)
    writer.add_head_count(settings.num_attention_heads)
    writer.add_head_count_kv(settings.num_key_value_heads)
    writer.add_layer_norm_rms_eps(settings.rms_norm_eps)
    writer.add_rope_dimension_count(settings.head_dim)
    writer.add_rope_freq_base(settings.rope_parameters["rope_theta"])
    words = sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
    special = set(tokenizer.all_special_tokens) | {word for word, _ in words if word[:2] == "<|"}
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([word for word, _ in words])
    writer.add_token_types([3 if word in special else 1 for word, _ in words])
    writer.add_token_scores([0.0] * len(words))  # the reader finds merges by them: none
    writer.add_bos_token_id(settings.bos_token_id)
    writer.add_eos_token_id(settings.eos_token_id)
    writer.add_pad_token_id(settings.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    q4_0 = gguf.GGMLQuantizationType.Q4_0
    for name, weight in lm.model.state_dict().items():
        values = weight.detach().float()
        stored = _stored_name(name)
        if stored.endswith(("attn_q", "attn_k")):
            values = _paired(values, settings, stored.endswith("attn_q"))
        if stored.startswith("blk.") and values.dim() == 2:
            packed = gguf.quants.quantize(values.numpy(), q4_0)
            writer.add_tensor(f"{stored}.weight", packed, raw_dtype=q4_0)
        else:
            writer.add_tensor(f"{stored}.weight", values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _stored_name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    part = rest.removesuffix(".weight")
    return f"blk.{layer}.{_MATRICES.get(part) or _NORMS[part]}"


def _paired(weight: Tensor, settings: object, query: bool) -> Tensor:
    """Rows in the order of llama.cpp, where the two halves of a rotation are neighbours."""
    heads = settings.num_attention_heads if query else settings.num_key_value_heads  # type: ignore[attr-defined]
    parts = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return parts.transpose(1, 2).reshape(weight.shape).contiguous()
