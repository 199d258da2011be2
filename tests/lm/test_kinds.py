"""Kinds of models that people have: loaded whole, answering as transformers does, saved whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from delible import api
from delible.errors import ModelError, RunError
from delible.lm import checks, decode
from delible.lm.body import SHORTEST_SHARED_PREFIX, widest
from delible.lm.budget import measure_budget
from delible.lm.derive import derive
from delible.lm.forward import fill_prefix
from delible.lm.lm import LM
from delible.lm.load import load_model
from delible.records import QA, ForgetRequest
from delible.system.asks import Decoding, Prompt
from delible.systems.opening import open_lm
from delible.testing.tiny import VOCABULARY_SIZE, tiny_model, tiny_tokenizer

QUESTIONS = ["Where was Ada born?", "Who?", "Which prize was given to the painter, and when?"]
PROMPTS = [Prompt.ask(question) for question in QUESTIONS]
FORGET = tuple(QA(question=question, answer="In Aberlin.") for question in QUESTIONS[:2])
RETAIN = (QA(question=QUESTIONS[2], answer="The last one."), QA(question="When?", answer="Now."))
REQUEST = ForgetRequest(forget=FORGET, retain=RETAIN)

TEXT = {
    "vocab_size": VOCABULARY_SIZE, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 512, "pad_token_id": 256, "bos_token_id": 258, "eos_token_id": 259,
}  # fmt: skip
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
GEMMA3N = {
    "intermediate_size": [48, 64], "num_kv_shared_layers": 0, "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"], "laurel_rank": 4,
    "vocab_size_per_layer_input": VOCABULARY_SIZE, "hidden_size_per_layer_input": 8,
    "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0, 0.0],
}  # fmt: skip
FIRST_SLIDES = ["sliding_attention", "full_attention"]
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
           "shared_expert_intermediate_size": 16}  # fmt: skip
RECURRENT: dict[str, dict[str, Any]] = {
    "qwen3_5_text": LINEAR,
    "qwen3_next": {**LINEAR, **EXPERTS},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    # blocks of several classes
    "jamba": {
        "mamba_d_state": 8, "mamba_dt_rank": 4, "num_experts": 2, "num_experts_per_tok": 1,
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1, "use_mamba_kernels": False,
    },
    "olmo_hybrid": LINEAR,
    # states that batches would disturb
    "recurrent_gemma": {
        "lru_width": 32, "attention_window_size": 16, "num_hidden_layers": 3,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "rwkv": {"attention_hidden_size": 32, "context_length": 512, "intermediate_size": 64},
}  # fmt: skip
#: Served by the library's own generation, question after question.
ONE_BY_ONE = ("recurrent_gemma", "rwkv")


def wide(model: Any) -> Any:
    """Random weights wide enough that answers differ."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval()


def random_model(kind: str, **changes: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **{**TEXT, **changes})
        return wide(AutoModelForCausalLM.from_config(config))


def saved(model: Any, folder: Path, tokenizer: Any = None) -> Path:
    model.save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return folder


def answers_of_transformers(lm: LM, count: int = 8) -> list[str]:
    """Each prompt alone, by the library's own greedy generation."""
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([lm.template.prompt_ids(prompt)])
        own = lm.core.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False,
            eos_token_id=sorted(lm.ends), pad_token_id=256,
        )  # fmt: skip
        found.append(lm.tokenizer.decode(own[0, ids.shape[1] :], skip_special_tokens=True).strip())
    return found


# ---- generation is checked when a model is loaded


@pytest.mark.parametrize("kind", RECURRENT)
def test_recurrent_models_answer_as_transformers_does(kind: str) -> None:
    lm = LM(random_model(kind, **RECURRENT[kind]), tiny_tokenizer(), precision="float32")
    assert (lm.road == "plain") == (kind in ONE_BY_ONE)
    assert lm.generate(PROMPTS, Decoding(8)) == answers_of_transformers(lm)


def test_what_is_where_in_blocks_of_several_classes() -> None:
    jamba = derive(random_model("jamba", **RECURRENT["jamba"]))
    assert jamba.mixed
    assert jamba.parameter_names(0, "attention_out") == ("model.layers.0.mamba.out_proj.weight",)
    assert jamba.parameter_names(1, "attention_out") == ("model.layers.1.self_attn.o_proj.weight",)
    gemma = derive(random_model("recurrent_gemma", **RECURRENT["recurrent_gemma"]))
    assert (gemma.attention, gemma.mlp) == ("temporal_block", "mlp_block")


def test_blocks_without_an_mlp_are_refused_with_what_is_missing() -> None:
    model = random_model("mamba", state_size=8, intermediate_size=64, time_step_rank=4)
    with pytest.raises(ModelError, match="no MLP in a block found") as caught:
        LM(model, tiny_tokenizer())
    assert "attention = mixer" in caught.value.problem
    assert "each needs attention, or a recurrent part in its place, and an MLP" in str(caught.value)


# ---- windows


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("mistral", {"sliding_window": 64}),
        ("gemma3_text", {"sliding_window": 40, "layer_types": FIRST_SLIDES}),
        ("llama4_text", {
            "attention_chunk_size": 64, "num_local_experts": 4, "intermediate_size_mlp": 48,
        }),
    ],
)  # fmt: skip
def test_rows_of_unlike_length_beyond_a_window_answer_as_each_does_alone(
    kind: str, settings: dict[str, Any]
) -> None:
    lm = LM(random_model(kind, **settings), tiny_tokenizer(), precision="float32")
    assert lm.shares_prefix
    lengths = [len(lm.template.prompt_ids(prompt)) for prompt in PROMPTS]
    assert lengths[1] < lengths[0] < 40 < 64 < lengths[2]
    # together longer than the window: at once, and after some tokens
    for prompts, count in ((PROMPTS, 8), (PROMPTS[:2], 44)):
        alone = [lm.generate([prompt], Decoding(count))[0] for prompt in prompts]
        assert lm.generate(prompts, Decoding(count)) == alone
    assert lm.generate(PROMPTS, Decoding(8)) == answers_of_transformers(lm)


def test_a_beginning_is_shared_where_the_window_sees_all_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shared: list[int] = []

    def filled(lm: Any, cache: Any, ids: torch.Tensor, text: Any) -> None:
        shared.append(ids.shape[1])
        fill_prefix(lm, cache, ids, text)

    monkeypatch.setattr(decode, "fill_prefix", filled)
    lm = LM(random_model("mistral", sliding_window=46), tiny_tokenizer(), precision="float32")
    longest = len(lm.template.prompt_ids(PROMPTS[0]))
    shared.clear()
    lm.generate(PROMPTS[:2], Decoding(46 - longest))
    assert len(shared) == 1
    assert shared[0] >= SHORTEST_SHARED_PREFIX
    lm.generate(PROMPTS[:2], Decoding(47 - longest))
    assert len(shared) == 1


def disturbed(disturbs: Callable[[torch.Tensor], bool]) -> LM:
    """A model in which some calls of a block go wrong, as they may where a state is kept."""
    model: Any = tiny_model("llama")

    def disturb(block: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output * 0.9 if disturbs(output) else output

    model.model.layers[1].register_forward_hook(disturb)
    return LM(model, tiny_tokenizer(), precision="float32")


def test_a_model_that_batches_disturb_answers_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores show nothing of it: only rows that generate go through a cache and token by token."""
    monkeypatch.setattr(checks, "_KNOWN", {})
    assert LM(tiny_model("llama"), tiny_tokenizer()).road == "trees"
    monkeypatch.setattr(checks, "_KNOWN", {})

    def in_batches_of_new_tokens(states: torch.Tensor) -> bool:
        return states.shape[0] > 1 and states.shape[1] == 1

    lm = disturbed(in_batches_of_new_tokens)
    assert lm.shares_prefix
    assert lm.road == "plain"
    expected = answers_of_transformers(lm)
    assert lm.generate(PROMPTS, Decoding(8)) == expected
    # the slow road knows ends, stop texts, seeds and broken numbers too
    stop = expected[0][2:4]
    assert lm.generate(PROMPTS[:1], Decoding(8, stop=(stop,))) == [
        expected[0].partition(stop)[0].strip()
    ]
    monkeypatch.setattr(lm.template, "declared_ends", frozenset({ord(expected[0][3])}))
    drawing = Decoding(8, temperature=1.0, seed=3)
    drawn = lm.generate(PROMPTS, drawing)
    assert drawn == [lm.generate([prompt], drawing)[0] for prompt in PROMPTS]
    assert drawn != lm.generate(PROMPTS, Decoding(8, temperature=1.0, seed=4))


def test_the_slow_road_gives_what_the_fast_one_gives() -> None:
    lm = LM(tiny_model("llama"), tiny_tokenizer(), precision="float32")
    for decoding in (Decoding(8), Decoding(8, temperature=1.0, top_p=0.9, seed=1)):
        found = []
        for road in checks.ROADS:
            lm.road = road
            found.append(lm.generate(PROMPTS, decoding))
        assert all(one == found[0] for one in found)
    whole = str(found[0][0])
    lm.template.declared_ends = frozenset(lm.tokenizer(whole)["input_ids"][3:4])
    ended = []
    for road in checks.ROADS:
        lm.road = road
        ended.append(lm.generate(PROMPTS, Decoding(8, temperature=1.0, top_p=0.9, seed=1)))
    assert all(one == ended[0] for one in ended)
    assert ended[0][0] == lm.tokenizer.decode(lm.tokenizer(whole)["input_ids"][:3]).strip()


def test_a_model_that_cannot_generate_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_KNOWN", {})
    model: Any = tiny_model("llama")

    def generate(*args: Any, **options: Any) -> None:
        raise NotImplementedError("no")

    model.generate = generate
    with pytest.raises(ModelError, match=r"Llama.*own generation fails.*NotImplementedError: no"):
        LM(model, tiny_tokenizer())


def test_settings_for_generation_do_not_leak_into_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checks, "_KNOWN", {})
    model: Any = tiny_model("llama")
    plain = LM(model, tiny_tokenizer(), precision="float32").generate(PROMPTS, Decoding(8))
    model.generation_config.repetition_penalty = 5.0
    monkeypatch.setattr(checks, "_KNOWN", {})
    lm = LM(model, tiny_tokenizer(), precision="float32")
    assert lm.road == "trees"
    lm.road = "plain"
    assert lm.generate(PROMPTS, Decoding(8)) == plain
    assert model.generation_config.repetition_penalty == 5.0


# ---- numbers that each block has of its own


def test_a_width_for_each_block() -> None:
    lm = LM(random_model("gemma3n_text", **GEMMA3N), tiny_tokenizer(), precision="float32")
    assert lm.inner_width == 64
    assert lm.generate(PROMPTS, Decoding(8)) == answers_of_transformers(lm)
    assert measure_budget(lm).tokens >= 64
    assert api.unlearn(lm, REQUEST, max_steps=1, learning_rate=1e-4).history
    gemma4 = {
        "sliding_window": 64, "layer_types": FIRST_SLIDES, "global_head_dim": 16,
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY_SIZE,
    }  # fmt: skip
    lm = LM(random_model("gemma4_text", **gemma4), tiny_tokenizer(), precision="float32")
    assert "head_dim" in lm.core.config.per_layer_attributes
    assert widest(lm.core.config, "head_dim") == 16
    assert lm.generate(PROMPTS, Decoding(8)) == answers_of_transformers(lm)
    settings = SimpleNamespace(num_key_value_heads=[2, None, 4, 1], head_dim=8, other=[])
    assert [widest(settings, name) for name in ("num_key_value_heads", "head_dim")] == [4, 8]
    assert widest(settings, "other") is widest(settings, "no_such_number") is None


# ---- vision-language models


def vision_language(folder: Path) -> Path:
    config = AutoConfig.for_model(
        "qwen3_5",
        text_config={**TEXT, **LINEAR},
        vision_config={
            "depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
            "out_hidden_size": 32, "patch_size": 14,
        },
        image_token_id=250, video_token_id=251, vision_start_token_id=252, vision_end_token_id=253,
    )  # fmt: skip
    model = wide(transformers.AutoModelForImageTextToText.from_config(config))
    saved(model, folder)
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "Any"}')
    return folder


def mistral3(folder: Path) -> Path:
    vision = transformers.PixtralVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        image_size=28, patch_size=14,
    )  # fmt: skip
    config = transformers.Mistral3Config(
        text_config=transformers.MistralConfig(**TEXT), vision_config=vision, image_token_index=250
    )
    return saved(wide(transformers.Mistral3ForConditionalGeneration(config)), folder)


@pytest.mark.parametrize("made", [vision_language, mistral3])
def test_a_vision_language_model_keeps_all_its_tensors(made: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = made(tmp_path / "model")
    lm = LM.load(str(folder), precision="float32")
    assert lm.generate(PROMPTS, Decoding(8)) == answers_of_transformers(lm)
    api.unlearn(
        lm, REQUEST, out=tmp_path / "run", max_steps=2, learning_rate=1e-3, precision="float32"
    )
    before, after = (
        load_file(place / "model.safetensors") for place in (folder, tmp_path / "run" / "model")
    )
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    vision = {name for name in before if "vis" in name or "projector" in name}
    assert len(vision) > 5
    assert moved
    assert not moved & vision
    for name in ("config.json", "preprocessor_config.json"):
        kept = tmp_path / "run" / "model" / name
        assert kept.exists() == (folder / name).exists()
    architectures = json.loads((tmp_path / "run/model/config.json").read_text())["architectures"]
    assert architectures == [type(lm.core).__name__]
    again = LM.load(str(tmp_path / "run"), precision="float32")
    assert again.generate(PROMPTS, Decoding(8)) == lm.generate(PROMPTS, Decoding(8))


def test_what_cannot_be_worked_on_is_called_by_its_name(tmp_path: Path) -> None:
    folder = mistral3(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["Unheard"]}))
    with pytest.raises(ModelError, match=r"model: it is a vision-language model \('Unheard'\)"):
        load_model(folder)


def test_tensors_that_nothing_takes_are_told(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = saved(random_model("qwen3_5_text", **LINEAR), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    more = {"mtp.layers.0.weight": torch.ones(2), "stray.weight": torch.ones(2)}
    save_file({**weights, **more}, folder / "model.safetensors", metadata={"format": "pt"})
    load_model(folder)
    assert len(caplog.messages) == 1
    assert "2 tensors" in caplog.messages[0]
    assert "'mtp.layers.0.weight'" in caplog.messages[0]


# ---- adapters


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return saved(tiny_model("llama"), tmp_path / "base")


def adapter_on(base: Path, folder: Path, **options: Any) -> Path:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, init_lora_weights=False, **{"target_modules": ["q_proj"], **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model: Any = get_peft_model(tiny_model("llama"), config)
        model.peft_config["default"].base_model_name_or_path = str(base)
        model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("npo", {}),
        ("npo", {"slots": {"place": "lora"}}),
        ("npo", {"slots": {"place": "layers"}}),
        ("task_vector", {}),
        ("uwc", {}),
    ],
)
def test_an_adapter_as_input_is_merged_and_the_result_is_what_was_shown(
    caplog: pytest.LogCaptureFixture,
    base: Path,
    tmp_path: Path,
    method: str,
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # everything in one precision, so that words can be compared
    monkeypatch.setattr("delible.lm.worn.resolve", lambda precision, kind: "float32")
    adapter = adapter_on(base, tmp_path / "adapter")
    before = LM.load(str(adapter), precision="float32").generate(PROMPTS, Decoding(48))
    result = api.unlearn(
        str(adapter), REQUEST, method=method, out=tmp_path / "run", max_steps=3,
        learning_rate=3e-2, precision="float32", **options,
    )  # fmt: skip
    assert any("wears an adapter" in one for one in caplog.messages)
    lora = "lora" in options.get("slots", {}).values()
    assert (tmp_path / "run" / "model").is_dir() == (not lora)
    assert (tmp_path / "run" / "base").is_dir() == lora, "the merged model below the new adapter"
    again = open_lm(str(tmp_path / "run"))
    again.precision = "float32"
    assert again.wears_adapter == lora
    assert again.generate(PROMPTS, Decoding(48)) == result.model.generate(PROMPTS, Decoding(48))
    asked = {QUESTIONS.index(one.question): one for one in result.examples if one.question in
             QUESTIONS}  # fmt: skip
    assert {place: one.before for place, one in asked.items()} == {
        place: before[place] for place in asked
    }
    shown = again.generate(PROMPTS, Decoding(48))
    assert {place: one.after for place, one in asked.items()} == {
        place: shown[place] for place in asked
    }
    if method != "uwc":  # which may give everything back
        assert [one.before for one in asked.values()] != [one.after for one in asked.values()]


def test_an_editor_edits_the_merged_model(base: Path, tmp_path: Path) -> None:
    adapter = adapter_on(base, tmp_path / "adapter")
    request = ForgetRequest(forget=FORGET, retain=RETAIN, subjects=("Ada",))
    result = api.unlearn(str(adapter), request, method="rocr", out=tmp_path / "run")
    again = open_lm(str(tmp_path / "run"))
    assert not again.wears_adapter
    assert again.fingerprint == result.model.fingerprint
    below = open_lm(str(tmp_path / "run" / "base"))  # merged in memory, it lay nowhere else
    off = again.taken_off()
    assert off is not None
    assert off[1].fingerprint == below.fingerprint


def test_a_new_adapter_is_saved_with_its_base_if_that_lies_nowhere(
    caplog: pytest.LogCaptureFixture, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick: dict[str, Any] = {
        "method": "npo", "slots": {"place": "lora"}, "max_steps": 3, "learning_rate": 3e-2,
        "precision": "float32",
    }  # fmt: skip
    monkeypatch.chdir(tmp_path)
    alone = api.unlearn("./base", REQUEST, out=tmp_path / "alone", **quick)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # the base is found from everywhere
    again = LM.load(str(tmp_path / "alone"), precision="float32")
    assert again.wears_adapter
    assert again.generate(PROMPTS, Decoding(48)) == alone.model.generate(PROMPTS, Decoding(48))
    # in memory, and changed: nothing on disk is the model below the new adapter
    lm = LM.load(str(base), precision="float32")
    api.unlearn(lm, REQUEST, method="npo", max_steps=3, learning_rate=3e-2, precision="float32")
    changed = api.unlearn(lm, REQUEST, out=tmp_path / "changed", **quick)
    assert any("lies nowhere else" in one for one in caplog.messages)
    (tmp_path / "changed").rename(tmp_path / "moved")
    again = open_lm(str(tmp_path / "moved"))
    again.precision = "float32"
    assert again.wears_adapter
    assert again.generate(PROMPTS, Decoding(48)) == changed.model.generate(PROMPTS, Decoding(48))
    unsaved = LM(tiny_model("llama"), tiny_tokenizer(), precision="float32")
    api.unlearn(unsaved, REQUEST, **quick)
    with pytest.raises(RunError, match=r"saved nowhere.*merge"):
        unsaved.save(tmp_path / "lost")
    assert not (tmp_path / "lost").exists()


def test_an_adapter_with_added_tokens(base: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<new>", "<other>"]})
    model: Any = tiny_model("llama")
    model.resize_token_embeddings(VOCABULARY_SIZE + 2)
    tables = ["embed_tokens", "lm_head"]
    worn: Any = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"],
                                                 modules_to_save=tables))  # fmt: skip
    with torch.no_grad():
        for name, value in worn.named_parameters():
            if "modules_to_save" in name or "lora" in name:
                value.add_(torch.randn_like(value) * 0.1)
    worn.peft_config["default"].base_model_name_or_path = str(base)
    worn.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[72, VOCABULARY_SIZE, 70, VOCABULARY_SIZE + 1]])
    with torch.no_grad():
        expected = worn.eval()(input_ids=ids).logits
    lm = LM.load(str(tmp_path / "adapter"), precision="float32")
    assert lm.vocabulary == VOCABULARY_SIZE + 2
    with torch.no_grad():
        assert torch.allclose(lm.model(input_ids=ids).logits, expected, atol=1e-5)
    lm.merge_adapter()
    with torch.no_grad():
        assert torch.allclose(lm.model(input_ids=ids).logits, expected, atol=1e-4)
    lm.save(tmp_path / "merged")
    again = LM.load(str(tmp_path / "merged"), precision="float32")
    assert again.generate(PROMPTS, Decoding(8)) == lm.generate(PROMPTS, Decoding(8))


def test_an_adapter_that_changes_no_weights_is_refused(base: Path, tmp_path: Path) -> None:
    from peft import PromptTuningConfig, get_peft_model

    model: Any = get_peft_model(
        tiny_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"kind PROMPT_TUNING changes no weights.*LoRA"):
        load_model(tmp_path / "adapter")


# ---- tokens


def test_a_padding_token_outside_the_embedding_is_replaced(
    caplog: pytest.LogCaptureFixture, base: Path
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(base)
    lm = LM.load(str(base), precision="float32")
    assert lm.pad_id == 259
    assert "padding token" in caplog.messages[0]
    plain = LM(tiny_model("llama"), tiny_tokenizer(), precision="float32")
    assert lm.generate(PROMPTS, Decoding(8)) == plain.generate(PROMPTS, Decoding(8))


def test_a_tokenizer_with_only_a_separator(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.bos_token = None
    tokenizer.sep_token = "<|endoftext|>"
    tokenizer.chat_template = None
    folder = saved(tiny_model("llama", eos_token_id=None), tmp_path / "model", tokenizer)
    lm = LM.load(str(folder), precision="float32")
    assert lm.pad_id == lm.template.end_of_turn[0] == 257
    assert all(isinstance(one, str) for one in lm.generate(PROMPTS, Decoding(4)))


def test_the_engine_merges_by_itself(base: Path, tmp_path: Path) -> None:
    from delible.train.engine import Trainer
    from delible.train.recipe import Recipe

    lm = LM.load(str(adapter_on(base, tmp_path / "adapter")), precision="float32")
    recipe = Recipe.named("npo").changed({}, {"max_steps": 2, "learning_rate": 1e-2})
    trained = Trainer(lm, recipe, {"forget": FORGET, "retain": RETAIN}).train().lm
    trained.save(tmp_path / "saved")
    again = LM.load(str(tmp_path / "saved"), precision="float32")
    assert again.generate(PROMPTS, Decoding(8)) == lm.generate(PROMPTS, Decoding(8))
