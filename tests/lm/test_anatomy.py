"""The anatomy of every family, read off the modules and checked against what they do."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from delible.errors import ModelError
from delible.lm.anatomy import ROLES, Anatomy
from delible.lm.derive import derive
from delible.lm.verify import verify
from delible.testing.tiny import FAMILIES, tiny_model, tiny_tokenizer

SEPARATE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
LLAMA = {
    "backbone": "model",
    "blocks": "model.layers",
    "norm": "model.norm",
    "head": "lm_head",
    "embedding": "model.embed_tokens",
    "attention": "self_attn",
    "mlp": "mlp",
    "attention_in": SEPARATE,
    "attention_out": "self_attn.o_proj",
    "mlp_in": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp_out": "mlp.down_proj",
    "experts": None,
    "router": None,
    "shared_expert": None,
    "transposed": False,
    "experts_transposed": False,
    "tied": False,
    "mixed": False,
    "layers": 3,
    "hidden_size": 32,
}
MIXTURE = {"mlp_in": (), "mlp_out": None, "experts": "mlp.experts", "router": "mlp.gate"}
EXPECTED: dict[str, dict[str, object]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"tied": True},
    "gemma3": {"tied": True},
    "phi3": {"attention_in": ("self_attn.qkv_proj",), "mlp_in": ("mlp.gate_up_proj",)},
    "gpt2": {
        "backbone": "transformer",
        "blocks": "transformer.h",
        "norm": "transformer.ln_f",
        "embedding": "transformer.wte",
        "attention": "attn",
        "attention_in": ("attn.c_attn",),
        "attention_out": "attn.c_proj",
        "mlp_in": ("mlp.c_fc",),
        "mlp_out": "mlp.c_proj",
        "transposed": True,
        "tied": True,
    },
    "gpt_neox": {
        "backbone": "gpt_neox",
        "blocks": "gpt_neox.layers",
        "norm": "gpt_neox.final_layer_norm",
        "embedding": "gpt_neox.embed_in",
        "attention": "attention",
        "attention_in": ("attention.query_key_value",),
        "attention_out": "attention.dense",
        "mlp_in": ("mlp.dense_h_to_4h",),
        "mlp_out": "mlp.dense_4h_to_h",
    },
    "opt": {
        "backbone": "model.decoder",
        "blocks": "model.decoder.layers",
        "norm": "model.decoder.final_layer_norm",
        "embedding": "model.decoder.embed_tokens",
        "attention_out": "self_attn.out_proj",
        "mlp": "fc2",
        "mlp_in": ("fc1",),
        "mlp_out": "fc2",
        "tied": True,
    },
    "mixtral": MIXTURE,
    "qwen2_moe": {**MIXTURE, "shared_expert": "mlp.shared_expert"},
    "qwen3_moe": MIXTURE,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_anatomy_of_family(family: str) -> None:
    model = tiny_model(family)
    anatomy = derive(model)
    found = dataclasses.asdict(anatomy)
    expected = {**LLAMA, **EXPECTED[family], "class_name": type(model).__name__}
    assert {key: found[key] for key in expected} == expected
    verify(model, anatomy)
    known = dict(model.named_parameters(remove_duplicate=False))
    for layer in range(anatomy.layers):
        for role in ROLES:
            names = anatomy.parameter_names(layer, role)  # type: ignore[arg-type]
            assert set(names) <= set(known)
            assert bool(names) == (role != "router" or anatomy.router is not None)
            assert all(name.startswith(f"{anatomy.blocks}.{layer}.") for name in names)
        block = set(anatomy.parameter_names(layer, "block"))
        assert block == {
            f"{anatomy.block_path(layer)}.{name}"
            for name, _ in anatomy.block(model, layer).named_parameters()
        }


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_say_what_the_roles_say(family: str) -> None:
    model = tiny_model(family)
    anatomy = derive(model)
    width_out = -2 if not anatomy.transposed else -1
    for role, side in (("attention_out", width_out), ("mlp_out", width_out)):
        for name in anatomy.parameter_names(1, role):  # type: ignore[arg-type]
            assert model.get_parameter(name).shape[side] == anatomy.hidden_size
    width_in = -1 if not anatomy.transposed else -2
    for role in ("attention_in", "mlp_in"):
        for name in anatomy.parameter_names(1, role):  # type: ignore[arg-type]
            assert model.get_parameter(name).shape[width_in] == anatomy.hidden_size


def test_parameters_of_mixtures() -> None:
    anatomy = derive(tiny_model("mixtral"))
    assert anatomy.mlp_in_parameters(0) == ("model.layers.0.mlp.experts.gate_up_proj",)
    assert anatomy.mlp_out_parameters(-1) == ("model.layers.2.mlp.experts.down_proj",)
    assert anatomy.parameter_names(1, "router") == ("model.layers.1.mlp.gate.weight",)
    shared = derive(tiny_model("qwen2_moe"))
    assert shared.mlp_out_parameters(0) == (
        "model.layers.0.mlp.experts.down_proj",
        "model.layers.0.mlp.shared_expert.down_proj.weight",
    )


def test_dense_block_among_mixtures() -> None:
    model = tiny_model("qwen2_moe", mlp_only_layers=[0])
    anatomy = derive(model)
    verify(model, anatomy)
    assert anatomy.mixed
    assert anatomy.experts == "mlp.experts"
    assert anatomy.mlp_out_parameters(0) == ("model.layers.0.mlp.down_proj.weight",)
    assert anatomy.mlp_out_parameters(1)[0] == "model.layers.1.mlp.experts.down_proj"
    assert anatomy.parameter_names(0, "router") == ()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt", "phi3"])
def test_square_matrices_are_told_apart(family: str) -> None:
    # With as many key heads as query heads and an MLP as wide as the hidden state, every matrix
    # has one shape and only names are left.
    square = {"num_key_value_heads": 4, "intermediate_size": 32, "ffn_dim": 32, "n_inner": 32}
    anatomy, usual = derive(tiny_model(family, **square)), derive(tiny_model(family))
    for part in ("attention", "attention_in", "attention_out", "mlp", "mlp_in", "mlp_out"):
        assert getattr(anatomy, part) == getattr(usual, part)


def test_expert_weights_as_wide_as_the_hidden_state() -> None:
    # gate_up is [4, 32, 32] and down [4, 32, 16]: the smaller one writes.
    anatomy = derive(tiny_model("qwen3_moe"))
    assert anatomy.mlp_out_parameters(0) == ("model.layers.0.mlp.experts.down_proj",)


def test_transposed_experts() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "gpt_oss", vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=32, head_dim=8, num_local_experts=4,
        num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    anatomy = derive(model)
    verify(model, anatomy)
    assert anatomy.experts_transposed
    assert not anatomy.transposed
    assert anatomy.mlp_out_parameters(0) == ("model.layers.0.mlp.experts.down_proj",)
    assert anatomy.router == "mlp.router"


def test_peft_model_is_looked_through() -> None:
    from peft import LoraConfig, get_peft_model

    plain = derive(tiny_model("llama"))
    model = get_peft_model(tiny_model("llama"), LoraConfig(target_modules="all-linear", r=2))
    anatomy = derive(model)
    assert dataclasses.replace(anatomy, parameters=()) == dataclasses.replace(plain, parameters=())
    (name,) = anatomy.mlp_out_parameters(0)
    assert name == "model.layers.0.mlp.down_proj.base_layer.weight"
    assert model.get_base_model().get_parameter(name).shape == (32, 48)
    assert anatomy.block(model, 0) is model.get_base_model().model.layers[0]


@pytest.mark.parametrize(
    ("layers", "depth", "layer"),
    [(3, 0.0, 0), (3, 0.5, 1), (3, 1.0, 2), (3, 0.25, 1), (3, 0.24, 0), (4, 0.5, 2), (1, 0.7, 0)],
)
def test_layer_at(layers: int, depth: float, layer: int) -> None:
    anatomy = dataclasses.replace(derive(tiny_model("llama")), layers=layers)
    assert anatomy.layer_at(depth) == layer


def test_wrong_depth_layer_and_role() -> None:
    anatomy = derive(tiny_model("llama"))
    for depth in (-0.1, 1.1, float("nan")):
        with pytest.raises(ModelError, match=r"outside 0…1"):
            anatomy.layer_at(depth)
    for layer in (3, -4):
        with pytest.raises(ModelError, match=r"no layer .* 0 to 2"):
            anatomy.parameter_names(layer, "mlp")
    with pytest.raises(ModelError, match=r"Did you mean 'mlp_out'"):
        anatomy.parameter_names(0, "mlp_outt")  # type: ignore[arg-type]


def test_a_plain_module_is_no_language_model() -> None:
    with pytest.raises(ModelError, match=r"Sequential: no head found; found so far: nothing"):
        derive(nn.Sequential(nn.Linear(4, 4)))


def test_what_was_found_is_told() -> None:
    model = tiny_model("llama")
    for block in model.model.layers:
        block.mlp = nn.Identity()
    with pytest.raises(ModelError) as caught:
        derive(model)
    text = str(caught.value)
    assert text.startswith("LlamaForCausalLM: no MLP in a block found")
    assert "blocks = model.layers" in text
    assert "attention = self_attn" in text
    model.model.layers = nn.ModuleList()
    with pytest.raises(ModelError, match=r"no list of blocks \(a ModuleList of 3 modules\)"):
        derive(model)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"attention": "mlp", "mlp": "self_attn"}, "self_attn' moves information between"),
        ({"attention": "post_attention_layernorm"}, "without 'model.layers.0.post_attention"),
        ({"attention": "self_attn.k_proj"}, "writes 16 values"),
        ({"head": "model.embed_tokens"}, "does not read the output of 'model'"),
    ],
)
def test_verify_catches_wrong_parts(change: dict[str, str], problem: str) -> None:
    model = tiny_model("llama")
    wrong: Anatomy = dataclasses.replace(derive(model), **change)
    with pytest.raises(ModelError, match=problem):
        verify(model, wrong)


def test_tiny_models_are_seeded_and_leave_the_random_state() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, same, other = (tiny_model("llama", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    weights = [model.lm_head.weight for model in (first, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    with pytest.raises(ModelError, match=r"Did you mean 'llama'"):
        tiny_model("lama")


def test_tiny_tokenizer_is_lossless_and_fits_the_models() -> None:
    tokenizer = tiny_tokenizer()
    text = "".join(map(chr, range(128))) + " héllo  \n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False)
    assert rendered == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"
    ids = tokenizer(rendered)["input_ids"]
    assert ids.count(tokenizer.eos_token_id) == 2
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    config = tiny_model("llama").config
    assert (len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id) == (
        config.vocab_size, config.pad_token_id, config.eos_token_id,
    )  # fmt: skip
