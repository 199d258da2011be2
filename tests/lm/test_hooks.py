"""Hooks read, change and shorten a model, and leave it as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from delible.errors import ModelError
from delible.lm.derive import derive
from delible.lm.hooks import capture, steer, truncated
from delible.testing.tiny import FAMILIES, tiny_model

TOKENS = torch.tensor([[10, 20, 30, 40, 50], [11, 21, 31, 41, 51]])


def hook_count(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_capture_agrees_with_the_models_own_hidden_states(family: str) -> None:
    model = tiny_model(family)
    anatomy = derive(model)
    paths = [anatomy.block_path(layer) for layer in range(anatomy.layers)]
    before = hook_count(model)
    with (
        torch.no_grad(),
        capture(model, paths) as outputs,
        capture(model, [paths[1], anatomy.head], which="input") as inputs,
    ):
        result = model(input_ids=TOKENS)
    assert hook_count(model) == before
    with torch.no_grad():
        states = model(input_ids=TOKENS, output_hidden_states=True).hidden_states
    for layer in range(anatomy.layers - 1):  # the last of the model's own has passed the norm
        assert torch.equal(outputs[paths[layer]], states[layer + 1])
    assert torch.equal(inputs[paths[1]], outputs[paths[0]])
    logits = model.get_submodule(anatomy.head)(inputs[anatomy.head])
    # Gemma 2 caps its logits after the head.
    cap = getattr(model.config, "final_logit_softcapping", None)
    logits = logits if cap is None else torch.tanh(logits / cap) * cap
    torch.testing.assert_close(logits, result.logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_capture_of_attention_mlp_and_backbone(family: str) -> None:
    model = tiny_model(family)
    anatomy = derive(model)
    parts = [anatomy.path(1, anatomy.attention), anatomy.path(1, anatomy.mlp)]
    with torch.no_grad(), capture(model, [*parts, anatomy.backbone]) as values:
        model(input_ids=TOKENS)
    for part in parts:
        assert values[part].numel() == 2 * 5 * 32
    assert values[anatomy.backbone].shape[:2] == (2, 5)


@pytest.mark.parametrize("use_cache", [None, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_truncated_blocks_give_the_same_states(family: str, use_cache: bool | None) -> None:
    model = tiny_model(family)
    anatomy = derive(model)
    options = {} if use_cache is None else {"use_cache": use_cache}
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    paths = [anatomy.block_path(layer) for layer in range(anatomy.layers)]
    blocks = model.get_submodule(anatomy.blocks)
    names = list(model.state_dict())
    with torch.no_grad(), capture(model, paths) as whole:
        logits = model(input_ids=TOKENS, attention_mask=mask, **options).logits
    for layers in (1, 2, 3):
        with truncated(model, anatomy, layers), torch.no_grad():
            with capture(model, paths[:layers]) as part:
                model(input_ids=TOKENS, attention_mask=mask, **options)
            assert len(model.get_submodule(anatomy.blocks)) == layers
        assert set(part) == set(paths[:layers])
        for path in part:
            assert torch.equal(part[path], whole[path])
    assert model.get_submodule(anatomy.blocks) is blocks
    assert list(model.state_dict()) == names
    with torch.no_grad():
        again = model(input_ids=TOKENS, attention_mask=mask, **options).logits
    assert torch.equal(logits, again)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_gradients_flow_in_a_truncated_model(family: str) -> None:
    model = tiny_model(family)
    anatomy = derive(model)
    path = anatomy.block_path(1)

    def gradient() -> torch.Tensor:
        model.zero_grad()
        with capture(model, [path]) as values:
            model(input_ids=TOKENS, use_cache=False)
        values[path].square().mean().backward()
        found = model.get_parameter(anatomy.mlp_out_parameters(0)[0]).grad
        assert found is not None
        return found.clone()

    whole = gradient()
    with truncated(model, anatomy, 2):
        part = gradient()
    assert whole.abs().max() > 0
    torch.testing.assert_close(part, whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_steering_a_block_and_attention(family: str) -> None:
    model = tiny_model(family)
    anatomy = derive(model)
    first, attention = anatomy.block_path(0), anatomy.path(0, anatomy.attention)
    before = hook_count(model)
    with torch.no_grad(), capture(model, [anatomy.block_path(1)], which="input") as inputs:
        with steer(model, first, torch.zeros_like):
            steered = model(input_ids=TOKENS).logits
        assert not inputs[anatomy.block_path(1)].any()
        plain = model(input_ids=TOKENS).logits
        with steer(model, attention, lambda states: states * 1):
            same = model(input_ids=TOKENS).logits
        with steer(model, attention, lambda states: states * 2):
            other = model(input_ids=TOKENS).logits
    assert hook_count(model) == before
    assert torch.equal(plain, same)
    assert not torch.allclose(plain, steered)
    assert not torch.allclose(plain, other)


def test_steering_the_backbone_changes_a_model_output() -> None:
    model = tiny_model("llama")
    with torch.no_grad(), steer(model, "model", torch.zeros_like):
        assert not model(input_ids=TOKENS).logits.any()


def test_hooks_work_on_a_peft_model_and_are_removed_after_an_error() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"], r=2))
    anatomy = derive(model)
    blocks = model.get_base_model().model.layers
    with (
        pytest.raises(IndexError),
        truncated(model, anatomy, 1),
        capture(model, ["model.layers.0"]) as values,
    ):
        model(input_ids=TOKENS).logits[99]
    assert values["model.layers.0"].shape == (2, 5, 32)
    assert hook_count(model) == 0
    assert model.get_base_model().model.layers is blocks


def test_errors_of_hooks() -> None:
    model = tiny_model("llama")
    anatomy = derive(model)
    message = r"no module 'model.layer.1'. Did you mean 'model.layers"
    with pytest.raises(ModelError, match=message), capture(model, ["model.layer.1"]):
        pass
    for layers in (0, 4):
        with pytest.raises(ModelError, match="blocks"), truncated(model, anatomy, layers):
            pass
    with (
        pytest.raises(ModelError, match="returned shape"),
        steer(model, "model.layers.0", lambda states: states[:1]),
    ):
        model(input_ids=TOKENS)
    assert hook_count(model) == 0
