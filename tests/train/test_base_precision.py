"""What is frozen may be short: bf16 (or 8 bits) below an adapter that stays fp32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import delible
from delible.errors import ModelError, RecipeError, RunError
from delible.lm import held
from delible.lm.digest import weights_digest
from delible.lm.lm import LM
from delible.lm.merging import can_stream, merge_files
from delible.records import QA, ForgetRequest
from delible.system import artefact as artefacts
from delible.system.asks import Decoding, Prompt, Score
from delible.systems import opening
from delible.testing.tiny import FAMILIES, tiny_model, tiny_tokenizer
from delible.train.engine import Trainer
from delible.train.recipe import Recipe
from delible.train.reference import Reference
from delible.train.rows import make_rows

ASKED = [Prompt.ask("Where was Ada Brook born?"), Prompt.ask("What does person 2 like?")]


def lm_in(dtype: torch.dtype, family: str = "llama") -> LM:
    """The same weights, all of which bf16 can write, computed in whatever suits them."""
    model = tiny_model(family)
    for value in model.parameters():
        value.data = value.data.bfloat16().to(dtype)
    return LM(model, tiny_tokenizer(), name="tiny", precision="auto")


def chosen(name: str = "npo_lora", **options: Any) -> Recipe:
    given = {"learning_rate": 3e-3, "epochs": 3, "batch_size": 3, "least_steps": None}
    given |= {"stop_at_forget_share": None, "learning_rate_width": None}
    options = {f"training.{key}": value for key, value in (given | options).items()}
    slots = {"finish": "none"} if name == "npo_lora" else {}
    return Recipe.named(name).changed(slots, options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint in fp32, with digits that bf16 does not have."""
    lm = LM(tiny_model("llama"), tiny_tokenizer(), name="tiny")
    lm.save(tmp_path / "model")
    return tmp_path / "model"


# ---- holding


@pytest.mark.parametrize("family", FAMILIES)
def test_held_in_place_is_what_is_loaded_short(family: str, tmp_path: Path) -> None:
    lm = LM(tiny_model(family), tiny_tokenizer(), name=family)
    lm.save(tmp_path / "model")
    before = lm.fingerprint
    lm.hold("bfloat16")
    loaded = LM.load(str(tmp_path / "model"), base_precision="bfloat16")
    assert (lm.base_precision, lm.precision) == ("bfloat16", "bfloat16")
    assert {value.dtype for value in lm.model.parameters()} == {torch.bfloat16}
    assert weights_digest(loaded.model) == weights_digest(lm.model)
    assert lm.fingerprint != before
    if family != "qwen2":  # whose tokenizer transformers loads as one of its own
        assert loaded.fingerprint == lm.fingerprint
    for one in (lm, loaded):
        frequencies = [b for name, b in one.model.named_buffers() if name.endswith("inv_freq")]
        assert {b.dtype for b in frequencies} <= {torch.float32}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3_moe"])
def test_it_answers_and_scores_as_full_weights_do_within_their_digits(family: str) -> None:
    full, short = lm_in(torch.float32, family), lm_in(torch.bfloat16, family)
    full.precision = "float32"
    asked = [Score(prompt, "in Aberlin, by the sea") for prompt in ASKED]
    for mine, theirs in zip(full.score(asked), short.score(asked), strict=True):
        assert theirs.logprobs == pytest.approx(mine.logprobs, abs=0.25)
        assert float(abs(theirs.logprobs - mine.logprobs).mean()) < 0.06
    assert len(short.generate(ASKED, Decoding(5))) == 2


@pytest.mark.parametrize(("precision", "share"), [("float32", 4.0), ("bfloat16", 2.0)])
def test_bytes_are_those_of_all_tensors(precision: Any, share: float) -> None:
    lm = LM(tiny_model("llama"), tiny_tokenizer())
    lm.hold(precision)
    tensors = {id(one): one for one in lm.model.parameters()}
    buffers = sum(4 * one.numel() for one in lm.model.buffers())
    by_hand = sum(share * one.numel() for one in tensors.values()) + buffers
    assert held.weight_bytes(lm.model) == by_hand


def test_a_model_that_wears_an_adapter_is_not_converted(forget: list[QA]) -> None:
    lm = lm_in(torch.float32)
    Trainer(lm, chosen("npo_lora", epochs=1, max_steps=1), rows(forget)).train()
    with pytest.raises(ModelError, match="wears an adapter"):
        lm.hold("bfloat16")


# ---- training


def rows(forget: list[QA]) -> dict[str, list[QA]]:
    return {"forget": forget, "retain": list(reversed(forget))}


def gradients(lm: LM, forget: list[QA], precision: Any) -> dict[str, torch.Tensor]:
    """Gradients of the adapters in the first step, whose length is left as it is."""
    recipe = chosen(epochs=1, max_steps=1, batch_size=6, optimizer="sgd", learning_rate=1.0,
                    max_gradient_norm=None, base_precision=precision)  # fmt: skip
    Trainer(lm, recipe, rows(forget)).train()
    found = {name: one for name, one in lm.model.named_parameters() if "lora_B" in name}
    assert {one.dtype for name, one in lm.model.named_parameters() if "lora" in name} == {
        torch.float32
    }
    return {name: -one.detach().clone() for name, one in found.items()}  # B starts at zero


def test_gradients_of_adapters_are_those_on_full_weights_within_bf16(forget: list[QA]) -> None:
    full = lm_in(torch.float32)
    full.precision = "float32"
    expected = gradients(full, forget, "float32")
    lm = lm_in(torch.float32)
    found = gradients(lm, forget, "bfloat16")
    assert lm.base_precision == "bfloat16"
    mine = torch.cat([one.flatten() for one in found.values()])
    theirs = torch.cat([one.flatten() for one in expected.values()])
    assert float(theirs.norm()) > 0
    assert float((mine - theirs).norm() / theirs.norm()) < 0.05
    for name, one in expected.items():
        assert float((found[name] - one).norm()) < 0.15 * float(one.norm()), name


def test_what_is_frozen_stays_bit_by_bit_and_short(forget: list[QA]) -> None:
    lm = lm_in(torch.float32)
    before = {name: one.clone() for name, one in lm.core.named_parameters()}
    Trainer(lm, chosen(base_precision="bfloat16"), rows(forget)).train()
    after = {
        name.replace(".base_layer", ""): one
        for name, one in lm.core.named_parameters()
        if "lora" not in name
    }
    assert after.keys() == before.keys()
    for name, one in after.items():
        assert one.dtype == torch.bfloat16
        assert torch.equal(one, before[name].bfloat16()), name


def test_reference_values_are_those_of_the_same_base_without_an_adapter(
    forget: list[QA], tmp_path: Path
) -> None:
    bare = lm_in(torch.bfloat16)
    bare.hold("bfloat16")
    expected = Reference()
    expected.prepare(bare, make_rows(bare.template, forget), ("logprobs",))
    lm = lm_in(torch.float32)
    seen: dict[str, torch.Tensor] = {}

    class Looking(Trainer):
        def _reference(self, context: Any, plan: Any) -> Reference:
            found = super()._reference(context, plan)
            seen.update(found.values)
            return found

    Looking(lm, chosen(epochs=1, base_precision="bfloat16"), rows(forget)).train()
    assert lm.wears_adapter
    common = [key for key in expected.values if key in seen]
    assert len(common) == len(forget)
    for key in common:
        assert torch.allclose(seen[key], expected.values[key], atol=1e-6), key


@pytest.mark.parametrize(
    ("method", "slots", "options", "told"),
    [
        ("npo", {}, {}, "place 'all' moves weights of the base.*lora"),
        ("npo", {"place": {"name": "layers", "layers": [1]}}, {}, "place 'layers' moves"),
        ("npo_lora", {}, {"precision": "float32"}, "computed in bfloat16, not in float32"),
        (
            "npo_lora",
            {"finish": "merge_adapter"},
            {"base_precision": "int8"},
            "'merge_adapter' changes weights.*delible merge",
        ),
    ],
)
def test_one_clear_message_where_it_cannot_be(
    method: str, slots: Any, options: Any, told: str, forget: list[QA]
) -> None:
    recipe = chosen(method, **({"base_precision": "bfloat16"} | options)).changed(slots, {})
    lm = lm_in(torch.float32)
    before = lm.fingerprint
    with pytest.raises(RecipeError, match=told):
        Trainer(lm, recipe, rows(forget)).train()
    with pytest.raises(RecipeError, match=told):
        delible.unlearn("nowhere/at-all", ForgetRequest(forget=tuple(forget)), method=recipe)
    assert lm.fingerprint == before


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_packing_says_what_to_install(
    precision: Any, forget: list[QA], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=f"{precision} need torchao.*pip install torchao"):
        Trainer(lm_in(torch.float32), chosen(base_precision=precision), rows(forget)).train()
    with pytest.raises(ModelError, match="pip install torchao"):
        LM.load("nowhere", base_precision=precision)


# ---- a whole run: resumed, opened again, merged


def run(folder: Path, out: Path, forget: list[QA], **options: Any) -> Any:
    request = ForgetRequest(forget=tuple(forget), retain=tuple(reversed(forget)))
    recipe = chosen(base_precision="bfloat16", checkpoint_steps=2, **options)
    return delible.unlearn(str(folder), request, method=recipe, out=out, measured=False)


def test_a_killed_run_goes_on_to_the_same_bits(
    folder: Path, tmp_path: Path, forget: list[QA], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(folder, tmp_path / "whole", forget)

    def killed(step: int, total: int, numbers: object) -> None:
        if step == 4:
            raise KeyboardInterrupt

    request = ForgetRequest(forget=tuple(forget), retain=tuple(reversed(forget)))
    recipe = chosen(base_precision="bfloat16", checkpoint_steps=2)
    with pytest.raises(KeyboardInterrupt):
        delible.unlearn(
            str(folder), request, method=recipe, out=tmp_path / "killed", measured=False,
            progress=killed,
        )  # fmt: skip
    assert (tmp_path / "killed" / "checkpoint" / "last" / "state.json").exists()
    resumed = run(folder, tmp_path / "killed", forget)
    file = Path("adapter") / "adapter_model.safetensors"
    mine, theirs = (load_file(tmp_path / name / file) for name in ("whole", "killed"))
    assert mine.keys() == theirs.keys()
    for name, one in mine.items():
        assert torch.equal(one, theirs[name]), name
    assert resumed.system.fingerprint == whole.system.fingerprint


def test_it_is_opened_as_it_was_made(folder: Path, tmp_path: Path, forget: list[QA]) -> None:
    result = run(folder, tmp_path / "out", forget)
    base = artefacts.read(tmp_path / "out").base
    assert base is not None
    assert base.precision == "bfloat16"
    opened = delible.open(str(tmp_path / "out"))
    assert isinstance(opened, LM)
    assert opened.base_precision == "bfloat16"
    assert opened.fingerprint == result.system.fingerprint
    asked = [Score(prompt, "in Aberlin") for prompt in ASKED]
    for mine, theirs in zip(result.system.score(asked), opened.score(asked), strict=True):
        assert theirs.logprobs == pytest.approx(mine.logprobs, abs=1e-5)


def test_a_model_in_memory_is_kept_beside_its_adapter(tmp_path: Path, forget: list[QA]) -> None:
    request = ForgetRequest(forget=tuple(forget), retain=tuple(forget[:2]))
    recipe = chosen(base_precision="bfloat16", epochs=1)
    result = delible.unlearn(
        lm_in(torch.float32), request, method=recipe, out=tmp_path / "out", measured=False
    )
    opened = delible.open(str(tmp_path / "out"))
    assert opened.fingerprint == result.system.fingerprint


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_the_merged_model_has_the_files_weights_and_the_adapters_product(
    folder: Path, tmp_path: Path, forget: list[QA], stored: torch.dtype
) -> None:
    file = folder / "model.safetensors"
    original = {name: one.to(stored) for name, one in load_file(file).items()}
    save_file(original, file, metadata={"format": "pt"})
    result = run(folder, tmp_path / "out", forget)
    lm = opening.merge(str(tmp_path / "out"), tmp_path / "merged")
    assert not lm.wears_adapter
    found = load_file(tmp_path / "merged" / "model.safetensors")
    settings = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    adapter = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    scale = settings["lora_alpha"] / settings["r"]
    assert found.keys() == original.keys()
    changed = 0
    for name, one in found.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        expected = original[name].double()
        if f"{key}.lora_A.weight" in adapter:
            down, up = (adapter[f"{key}.lora_{part}.weight"].double() for part in "AB")
            expected = expected + scale * up @ down
            changed += 1
        else:
            assert torch.equal(one, original[name])
        digits = torch.finfo(stored).eps
        assert one.dtype == stored
        assert torch.allclose(one.double(), expected, rtol=0.51 * digits + 1e-6, atol=1e-7), name
    assert changed == 3 * 7
    asked = [Score(prompt, "in Aberlin") for prompt in ASKED]
    for mine, theirs in zip(result.system.score(asked), lm.score(asked), strict=True):
        assert theirs.logprobs == pytest.approx(mine.logprobs, abs=0.25)


def test_merging_in_memory_rounds_once(forget: list[QA]) -> None:
    lm = lm_in(torch.float32)
    Trainer(lm, chosen(base_precision="bfloat16", learning_rate=1e-2), rows(forget)).train()
    layer = lm.core.model.layers[1].mlp.up_proj
    before = layer.get_base_layer().weight.double().clone()
    up, down = layer.lora_B["default"].weight.double(), layer.lora_A["default"].weight.double()
    expected = (before + layer.scaling["default"] * up @ down).detach()
    lm.merge_adapter()
    merged = lm.core.model.layers[1].mlp.up_proj.weight
    assert merged.dtype == torch.bfloat16
    assert float((merged.double() != before).double().mean()) > 0.3
    gap = torch.finfo(torch.bfloat16).eps
    assert bool(((merged.double() - expected).abs() <= 0.501 * gap * expected.abs() + 1e-9).all())


def test_an_adapter_that_is_not_finite_is_not_merged(
    folder: Path, tmp_path: Path, forget: list[QA]
) -> None:
    lm = LM.load(str(folder), base_precision="bfloat16")
    Trainer(lm, chosen(base_precision="bfloat16", epochs=1), rows(forget)).train()
    lm.origin = LM.load(str(folder)).origin
    assert can_stream(lm)
    with torch.no_grad():
        lm.core.model.layers[0].mlp.up_proj.lora_B["default"].weight[0, 0] = float("inf")
    with pytest.raises(RunError, match="not finite"):
        merge_files(lm, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    with pytest.raises(RunError, match="not finite"):
        lm.merge_adapter()


# ---- 8 bits, where something can pack them


def test_adapters_on_packed_weights(folder: Path, tmp_path: Path, forget: list[QA]) -> None:
    pytest.importorskip("torchao")
    request = ForgetRequest(forget=tuple(forget), retain=tuple(reversed(forget)))
    recipe = chosen(base_precision="int8")
    result = delible.unlearn(
        str(folder), request, method=recipe, out=tmp_path / "out", measured=False
    )
    lm = result.model
    assert lm.base_precision == "int8"
    linear = [one for one in lm.model.parameters() if held.is_packed(one)]
    assert len(linear) == 3 * 7
    for one in linear:
        inner, outer = one.shape[1], one.shape[0]
        assert sum(part.numel() * part.element_size() for part in held.pieces(one)) == (
            inner * outer + 5 * outer
        )
    opened = delible.open(str(tmp_path / "out"))
    assert opened.fingerprint == lm.fingerprint
    merged = opening.merge(str(tmp_path / "out"), tmp_path / "merged")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert {one.dtype for one in found.values()} == {torch.float32}
    asked = [Score(prompt, "in Aberlin") for prompt in ASKED]
    for mine, theirs in zip(lm.score(asked), merged.score(asked), strict=True):
        assert theirs.logprobs == pytest.approx(mine.logprobs, abs=0.5)
    with pytest.raises(RunError, match="delible merge"):
        lm.merge_adapter()
