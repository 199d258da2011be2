"""Adapters of elsewhere, of every kind that PEFT writes, merged into one plain model."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from delible.errors import RunError
from delible.lm.lm import LM, language_model
from delible.lm.merging import can_stream
from delible.system import artefact as artefacts
from delible.systems import opening
from delible.testing.tiny import tiny_model, tiny_tokenizer

MATRICES = ["q_proj", "v_proj", "up_proj", "down_proj"]
IDS = torch.arange(20).reshape(1, 20)


def base(folder: Path, family: str = "llama", size: str = "1GB", **changes: Any) -> Path:
    """A model in bf16, in files of ``size`` at most."""
    model = tiny_model(family, **changes).bfloat16()
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder, max_shard_size=size)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits  # type: ignore[no-any-return]


def adapted(below: Path, folder: Path, **settings: Any) -> Tensor:
    """Writes an adapter with PEFT alone; the logits of the model with it, in fp32."""
    model = AutoModelForCausalLM.from_pretrained(below, dtype=torch.float32)
    worn: Any = get_peft_model(model, LoraConfig(r=4, lora_alpha=16, **settings))
    generator = torch.Generator().manual_seed(1)
    for value in worn.parameters():
        if value.requires_grad:
            value.data = 0.3 * torch.randn(value.shape, generator=generator)
    worn.peft_config["default"].base_model_name_or_path = str(below)
    worn.save_pretrained(folder)
    return logits(worn)


def artefact(below: Path, folder: Path, precision: Any) -> str:
    """The adapter in ``folder``/adapter as a run whose base was held in a precision."""
    held = artefacts.Base(name=str(below), precision=precision)
    made = artefacts.Artefact(kind="adapter", base=held, parts={"adapter": "adapter"}, options={})
    artefacts.write(made, folder)
    return str(folder)


@pytest.mark.parametrize("precision", [None, "bfloat16"])
@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        ({"target_modules": [*MATRICES, "lm_head"]}, {}),
        ({"target_modules": [*MATRICES, "lm_head"]}, {"tie_word_embeddings": True}),
        ({"target_modules": [*MATRICES, "embed_tokens"]}, {"tie_word_embeddings": True}),
        (
            {"target_modules": [*MATRICES, "embed_tokens", "lm_head"]},
            {"tie_word_embeddings": True},
        ),
        ({"target_modules": MATRICES, "modules_to_save": ["lm_head"]}, {}),
        (
            {"target_modules": MATRICES, "modules_to_save": ["embed_tokens"]},
            {"tie_word_embeddings": True},
        ),
        ({"target_modules": ["q_proj"], "bias": "lora_only"}, {"attention_bias": True}),
        ({"target_modules": ["q_proj"], "bias": "all"}, {"attention_bias": True}),
        ({"target_modules": ["q_proj"], "lora_bias": True}, {"attention_bias": True}),
        ({"target_modules": MATRICES, "use_dora": True}, {}),
        (
            {
                "target_modules": ["q_proj"],
                "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            },
            {"family": "qwen3_moe"},
        ),
    ],
    ids=[
        "head", "tied head", "tied embedding", "both tied", "whole head", "whole tied embedding",
        "biases", "all biases", "bias of its own", "magnitudes", "experts",
    ],
)  # fmt: skip
def test_the_merged_model_computes_what_the_adapted_one_does(
    settings: Any, changes: Any, precision: Any, tmp_path: Path
) -> None:
    below = base(tmp_path / "base", **changes)
    expected = adapted(below, tmp_path / "run" / "adapter", **settings)
    run = artefact(below, tmp_path / "run", precision)
    opening.merge(run, tmp_path / "merged")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    change = float((expected - logits(tiny_model(**changes))).abs().max())
    assert change > 3.0
    digits = 1e-3 if precision is None else 0.05 * change
    assert float((logits(found) - expected).abs().max()) < digits
    if {"lm_head", "embed_tokens"} & {*settings["target_modules"]}:  # others go by this alone
        told = json.loads((tmp_path / "merged" / "config.json").read_text())
        assert told["tie_word_embeddings"] is False


@pytest.mark.parametrize("tied", [False, True])
def test_files_get_the_product_with_its_own_scale_and_rank(tied: bool, tmp_path: Path) -> None:
    """Several files, scales by the root of the rank, ranks and scales by name: in float64."""
    below = base(tmp_path / "base", size="20KB", tie_word_embeddings=tied)
    assert len(list(below.glob("*.safetensors"))) > 2
    adapted(
        below, tmp_path / "run" / "adapter", target_modules=MATRICES, use_rslora=True,
        rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 5},
    )  # fmt: skip
    opening.merge(artefact(below, tmp_path / "run", "bfloat16"), tmp_path / "merged")
    factors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    changed = 0
    for file in below.glob("*.safetensors"):
        before, after = load_file(file), load_file(tmp_path / "merged" / file.name)
        assert before.keys() == after.keys()
        for name, one in before.items():
            key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
            if f"{key}A.weight" not in factors:
                assert torch.equal(one, after[name]), name
                continue
            rank = 2 if "q_proj" in name else 4
            alpha = 5 if "v_proj" in name else 16
            product = factors[f"{key}B.weight"].double() @ factors[f"{key}A.weight"].double()
            assert factors[f"{key}A.weight"].shape[0] == rank
            exact = one.double() + alpha / math.sqrt(rank) * product
            half = 0.5 * torch.finfo(torch.bfloat16).eps * exact.abs()
            assert bool(((after[name].double() - exact).abs() <= half + 1e-6).all()), name
            changed += 1
    assert changed == 3 * len(MATRICES)
    index = "model.safetensors.index.json"
    assert (tmp_path / "merged" / index).read_bytes() == (below / index).read_bytes()
    settings = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert settings["tie_word_embeddings"] is tied


def test_nothing_that_is_there_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the run itself, not a folder with other models, not a file; and before any work."""
    below = base(tmp_path / "base")
    adapted(below, tmp_path / "run" / "adapter", target_modules=MATRICES)
    run = artefact(below, tmp_path / "run", "bfloat16")
    (tmp_path / "file").write_text("mine")
    with monkeypatch.context() as without:
        without.setattr(opening, "open_system", None)
        for taken in (tmp_path / "run", below, tmp_path, tmp_path / "file"):
            with pytest.raises(RunError, match=r"something already.*another --out"):
                opening.merge(run, taken)
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").is_file()
    (tmp_path / "empty").mkdir()
    assert isinstance(opening.merge(run, tmp_path / "empty"), LM)


def other_names(folder: Path) -> Path:
    """A model whose files call their tensors otherwise than the model does."""
    base(folder, tie_word_embeddings=True)
    file = folder / "model.safetensors"
    tensors = {name.removeprefix("model."): one.clone() for name, one in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def test_above_packed_weights_the_base_is_opened_unpacked(tmp_path: Path) -> None:
    """Its name and its place are enough: nothing that packs is needed."""
    below = other_names(tmp_path / "base")
    expected = adapted(below, tmp_path / "run" / "adapter", target_modules=MATRICES)
    artefact(below, tmp_path / "run", "int8")
    lm = opening._unpacked(tmp_path / "run")
    assert isinstance(lm, LM)
    assert (lm.base_precision, lm.wears_adapter) == ("bfloat16", True)
    found = logits(lm.merged().model.float())
    assert float((found - expected).abs().max()) < 0.3


def test_what_was_packed_is_merged_where_the_files_have_other_names(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    below = other_names(tmp_path / "base")
    expected = adapted(below, tmp_path / "run" / "adapter", target_modules=MATRICES)
    run = artefact(below, tmp_path / "run", "int8")
    assert not can_stream(language_model(opening.open_system(run), run))
    opening.merge(run, tmp_path / "merged")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert float((logits(found) - expected).abs().max()) < 0.3


def test_a_model_of_which_nothing_can_be_packed_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pytest.importorskip("torchao")
    lm = LM(tiny_model("gpt2"), tiny_tokenizer())
    with caplog.at_level(logging.WARNING):
        lm.hold("int8")
    assert lm.base_precision == "bfloat16"
    assert "No matrix of this model can be packed in int8" in caplog.text
