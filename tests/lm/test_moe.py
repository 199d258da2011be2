"""The mixture that is made of a dense model: the same answers at first, then two topics."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from delible.errors import ModelError
from delible.lm import moe, tiny, tiny_training
from delible.lm.digest import weights_digest
from delible.lm.lm import LM
from delible.lm.load import load_model
from delible.lm.named import name_of
from delible.lm.outline import outline
from delible.lm.upcycling import difference, upcycled
from delible.system.asks import Decoding, Prompt
from delible.testing.tiny import tiny_model, tiny_tokenizer
from delible.train.expert_choice import affinity
from delible.train.rows import make_rows

SMALL = tiny.TinyOptions(
    hidden_size=32, layers=3, vocabulary=512, examples=150, batch_tokens=512, people=4
)
OPTIONS = moe.MoeOptions(
    base="tiny", people=4, epochs=10, learning_rate=2e-2, warmup_steps=2, routing=1.0
)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, shared: Path) -> None:
    """Keeps every test away from the user's cache."""
    monkeypatch.setenv("DELIBLE_CACHE", str(shared))
    monkeypatch.setattr(tiny, "TINY", SMALL)
    monkeypatch.setattr(tiny, "THREADS", 1)
    monkeypatch.setattr(moe, "THREADS", 1)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def made(shared: Path) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELIBLE_CACHE", str(shared))
        patch.setattr(tiny, "TINY", SMALL)
        patch.setattr(tiny, "THREADS", 1)
        patch.setattr(moe, "THREADS", 1)
        patch.setattr(moe, "MOE", OPTIONS)
        yield moe.moe_model()


# ---- the same answers at first


@pytest.mark.parametrize(("experts", "top"), [(4, 2), (3, 1), (2, 2)])
@pytest.mark.parametrize("tied", [True, False])
def test_it_gives_the_logits_of_the_dense_model(experts: int, top: int, tied: bool) -> None:
    dense = tiny_model("llama", tie_word_embeddings=tied)
    before = weights_digest(dense)
    mixture = upcycled(dense, experts, top, seed=3)
    assert difference(dense, mixture, [list(range(5, 45)), [7]]) < 5e-5
    assert difference(dense, tiny_model("llama", seed=1), [[7, 8]]) > 1.0  # it does look
    assert weights_digest(dense) == before
    assert mixture.config.num_local_experts == experts
    assert mixture.config.num_experts_per_tok == top
    lm = LM(mixture, tiny_tokenizer(), precision="float32")
    assert lm.anatomy.experts == "mlp.experts"
    assert lm.anatomy.tied is tied
    weights = mixture.state_dict()
    routers = [weights[f"model.layers.{layer}.mlp.gate.weight"] for layer in range(3)]
    assert float(routers[0].std()) == pytest.approx(0.02, rel=0.3)
    assert not torch.equal(routers[0], routers[1])
    again = upcycled(dense, experts, top, seed=3).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in weights.items())


def test_only_a_plain_llama_is_taken() -> None:
    for family, changes in (("gpt2", {}), ("llama", {"attention_bias": True})):
        with pytest.raises(ModelError, match="only a Llama without biases"):
            upcycled(tiny_model(family, **changes), 4, 2, seed=0)


# ---- what it learns


def test_two_topics_and_a_third_of_other_texts() -> None:
    tokenizer = tiny_tokenizer()
    rows = moe.examples(tokenizer, OPTIONS)
    both = moe.topics(OPTIONS)
    counts = [sum(topic == one for _, topic in rows) for one in (0, 1, None)]
    assert counts[:2] == [OPTIONS.epochs * len(records) for records in both]
    assert counts[2] == OPTIONS.epochs * ((len(both[0]) + len(both[1])) // 2) > 0
    assert {record.group for record in both[0]} == set(moe.TOPICS[0])
    assert {record.group for record in both[1]} == set(moe.TOPICS[1])
    packed = moe.batches(rows, OPTIONS)
    assert sorted(id(row) for step in packed for row in step) == sorted(map(id, rows))
    for step in packed:
        wide = max(len(row.ids) for row, _ in step) * len(step)
        assert len(step) == 1 or wide <= OPTIONS.batch_tokens
    assert moe.examples(tokenizer, OPTIONS)[5] == rows[5]


def test_the_loss_by_hand() -> None:
    model = upcycled(tiny_model("llama"), 4, 2, seed=0)
    rows = moe.examples(tiny_tokenizer(), OPTIONS)[:3]
    rows = [(row, topic) for (row, _), topic in zip(rows, (0, 1, None), strict=True)]
    with torch.no_grad():
        found = moe.loss(model, rows, options=OPTIONS, padding=0)
    nats, routed, tokens = 0.0, [0.0] * 3, 0
    spreads = ([1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0.5, 0.5])
    for (row, _), spread in zip(rows, spreads, strict=True):
        with torch.no_grad():
            told: Any = model(input_ids=torch.tensor([row.ids]), output_router_logits=True)
        for place in range(row.start - 1, len(row.ids) - 1):
            tokens += 1
            said = told.logits[0, place].double().log_softmax(dim=0)
            nats -= float(said[row.ids[place + 1]])
            for layer in range(3):
                logits = told.router_logits[layer].view(-1, 4)[place].double()
                for share, value in zip(spread, logits.log_softmax(dim=0).tolist(), strict=True):
                    routed[layer] -= share * value
    wanted = nats / tokens + OPTIONS.routing * sum(routed) / 3 / tokens
    assert float(found) == pytest.approx(wanted, rel=1e-4)


def test_each_topic_goes_to_its_expert_and_the_rest_stays(made: Path) -> None:
    lm = LM.load(str(made), precision="float32")
    assert lm.core.config.num_local_experts == 4
    for expert, records in enumerate(moe.topics(OPTIONS)):
        scores = affinity(lm, make_rows(lm.template, records))
        found = {layer: int(values.argmax()) for layer, values in scores.items()}
        assert found == dict.fromkeys(range(3), expert), scores
    plain = upcycled(load_model(str(tiny.tiny_model())).model, 4, 2, OPTIONS.seed)
    start, now = dict(plain.named_parameters()), dict(lm.core.named_parameters())
    assert start.keys() == now.keys()
    moved = {name for name, value in now.items() if not torch.equal(value, start[name])}
    wanted = {f"model.layers.{layer}.mlp.gate.weight" for layer in range(3)}
    wanted |= {f"model.layers.1.mlp.experts.{one}" for one in ("gate_up_proj", "down_proj")}
    assert moved == wanted


def test_it_is_loaded_by_name_and_answers(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe, "MOE", OPTIONS)
    loaded = load_model("moe")
    assert loaded.info.source == "moe"
    assert Path(loaded.info.place) == made
    assert made.name == f"moe-{moe.VERSION}"
    assert name_of(made.name) == "moe"
    assert name_of("moe-1-0123") is None
    lm = LM.load("moe", precision="float32")
    (said,) = lm.generate([Prompt.ask("Who?")], Decoding(4))
    assert isinstance(said, str)
    assert outline("moe").anatomy.experts == "mlp.experts"


def test_other_options_have_another_folder() -> None:
    names = {moe.folder_name(moe.MoeOptions(seed=seed, people=5)) for seed in range(3)}
    assert len(names) == 3
    assert moe.folder_name(moe.MOE) == f"moe-{moe.VERSION}"


def test_a_killed_build_goes_on_to_the_same_bits(
    made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wanted = weights_digest(load_model(str(made)).model)
    monkeypatch.setattr(moe, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    keep, done = tiny_training._keep, list[int]()

    def killed(path: Path, model: Any, optimizer: Any, step: int) -> None:
        keep(path, model, optimizer, step)
        if step == 3:
            raise KeyboardInterrupt

    checkpoint = tmp_path / "checkpoint.pt"
    with monkeypatch.context() as patch:
        patch.setattr(tiny_training, "_keep", killed)
        with pytest.raises(KeyboardInterrupt):
            moe.build(OPTIONS, checkpoint)
    kept = torch.load(checkpoint, weights_only=True)["model"]
    assert all(".mlp." in name for name in kept)  # what stays is not kept
    monkeypatch.setattr(tiny_training, "_keep", lambda *given: done.append(given[3]))
    model, _ = moe.build(OPTIONS, checkpoint)
    assert done[0] == 4
    assert weights_digest(model) == wanted


def test_a_mixture_that_computes_otherwise_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe, "difference", lambda *given: 0.01)
    with pytest.raises(ModelError, match="differ from the dense model's by"):
        moe.build(OPTIONS)


def test_shares_sum_to_one() -> None:
    for topic in (0, 1, None):
        spread = moe.shares(topic, 4)
        assert float(spread.sum()) == pytest.approx(1.0)
        wanted = [0, 0, 0.5, 0.5] if topic is None else [topic == 0, topic == 1, 0, 0]
        assert spread.tolist() == wanted


def test_settings_are_those_of_a_mixtral(made: Path) -> None:
    settings = json.loads((made / "config.json").read_text("utf-8"))
    assert settings["model_type"] == "mixtral"
    assert settings["sliding_window"] is None
    assert list(made.glob("*.safetensors"))
