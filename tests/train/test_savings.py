"""Options that need less memory give the same result, and are refused where they can do nothing."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from living import Living  # type: ignore[import-not-found]
from test_engine import recipe, same, weights  # type: ignore[import-not-found]
from tiny_runs import make  # type: ignore[import-not-found]
from torch import Tensor, nn

from delible.context import Context
from delible.errors import MissingExtraError, ModelError, RecipeError
from delible.lm import forward, offload
from delible.lm.forward import Batch, Forward, map_logits, target_logprobs
from delible.lm.lm import LM
from delible.lm.recompute import check_recomputing
from delible.records import QA
from delible.rundir import RunDirectory
from delible.testing.tiny import FAMILIES, tiny_model, tiny_tokenizer
from delible.train import optimizers
from delible.train.engine import Trainer
from delible.train.recipe import Recipe, Training
from delible.train.savings import saving, ways_of
from delible.train.slots import Placement

READS: dict[str, tuple[tuple[Any, ...], bool]] = {
    "answers": ((), True), "block": ((1,), False), "inside": ((0, "mlp.1"), True),
    "attention": (("attention.1",), True),
}  # fmt: skip


def batch() -> Batch:
    ids = torch.randint(5, 200, (4, 40), generator=torch.Generator().manual_seed(0))
    ids[:, :20] = ids[:1, :20]
    return Batch(ids, torch.full((4,), 40), torch.full((4,), 35), 20)


def gradients(lm: LM, inside: tuple[Any, ...] = (), final: bool = True) -> dict[str, Tensor]:
    """Of a loss on whatever is read."""
    lm.model.zero_grad()
    made = batch()
    with lm.computing():
        states, seen = Forward(lm)(made, inside, final)
        loss = sum((one.float().square().mean() for one in seen.values()), torch.tensor(0.0))
        if states is not None:
            values = map_logits(lm.head, states, made.targets, target_logprobs, lm.vocabulary)
            loss = loss + values.sum()
    loss.backward()  # type: ignore[no-untyped-call]
    found = lm.model.named_parameters()
    return {name: one.grad.clone() for name, one in found if one.grad is not None}


def kept_bytes(lm: LM) -> int:
    """What autograd keeps of a pass beside the weights, each storage once."""
    own = {one.untyped_storage().data_ptr() for one in lm.model.parameters()}
    saved: dict[int, Any] = {}

    def keep(value: Tensor) -> Tensor:
        if value.untyped_storage().data_ptr() not in own:
            saved[value.untyped_storage().data_ptr()] = value.untyped_storage()
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        states, _ = Forward(lm)(batch())
    assert states is not None
    return sum(one.nbytes() for one in saved.values())


# ---- blocks that are computed again


@pytest.mark.parametrize("reads", READS)
@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_blocks_give_the_same_gradients(family: str, reads: str) -> None:
    lm = make(family)
    check_recomputing(lm)
    assert lm.shares_prefix
    plain = gradients(lm, *READS[reads])
    lm.recomputes = True
    assert same(plain, gradients(lm, *READS[reads]))
    blocks = lm.core.get_submodule(lm.anatomy.blocks)
    assert not any("forward" in vars(block) for block in blocks)


def test_recomputed_blocks_keep_little() -> None:
    lm = LM(tiny_model("llama", num_hidden_layers=8), tiny_tokenizer(), precision="float32")
    plain = kept_bytes(lm)
    lm.recomputes = True
    tokens, width = 20 + 4 * 20, lm.anatomy.hidden_size
    keys = 2 * 4 * 20 * 16  # of the beginning, for each row
    # per block: its input for both calls, and keys and values; a few tensors outside of blocks
    assert kept_bytes(lm) < 4 * (8 + 4) * (tokens * width + keys) < 0.3 * plain


def test_the_beginning_is_computed_once_per_pass() -> None:
    lm, calls = make(), list[Any]()
    lm.recomputes = True
    first = lm.core.get_submodule(lm.anatomy.block_path(0)).mlp
    handle = first.register_forward_pre_hook(lambda _, given: calls.append(given[0].shape[:2]))
    gradients(lm)
    handle.remove()
    assert sorted(calls) == [(1, 20), (1, 20), (4, 20), (4, 20)]  # each once, and once again


@pytest.mark.parametrize(
    ("method", "slots"),
    [
        ("npo", {}),
        ("npo_kl", {}),
        ("rmu", {}),
        ("npo", {"harden": "sam"}),
        ("npo", {"harden": "curvature"}),
        ("npo", {"place": "lora"}),
        ("npo", {"weigh": {"name": "attribution", "how": "jvp"}}),
    ],
)
def test_whole_runs_end_at_the_same_weights(
    method: str, slots: dict[str, Any], forget: list[QA], retain: list[QA]
) -> None:
    ends = []
    for again in (False, True):
        lm = make()
        chosen = recipe(method, gradient_checkpointing=again, max_steps=2).changed(slots, {})
        Trainer(lm, chosen, {"forget": forget, "retain": retain}, context=Context(1)).train()
        assert lm.recomputes is False
        ends.append(weights(lm))
    assert same(*ends)


def test_models_that_hand_on_more_are_refused(forget: list[QA], retain: list[QA]) -> None:
    lm = make()
    lm.interveners = object()
    with pytest.raises(ModelError, match="interventions or a router"):
        check_recomputing(lm)
    lm = make()
    lm.core.config.num_kv_shared_layers = 1
    chosen = recipe(gradient_checkpointing=True)
    with pytest.raises(ModelError, match=r"hand on more.*Leave out --gradient-checkpointing"):
        Trainer(lm, chosen, {"forget": forget, "retain": retain}).train()


# ---- a head over many words


def test_no_more_than_a_chunk_of_a_large_head_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """256,000 words, 96 answer tokens: all logits at once would be 98 MB."""
    words, tokens, width = 256_000, 96, 4
    chunk = 4
    monkeypatch.setattr(forward, "HEAD_CHUNK_ELEMENTS", chunk * words)
    head = nn.Linear(width, words, bias=False)
    states = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0))
    states.requires_grad_()
    targets = torch.arange(tokens) * 1000
    with Living() as alive:
        values = map_logits(head, states, targets, target_logprobs, words)
        values.sum().backward()  # type: ignore[no-untyped-call]
    own = 4 * words * width  # the gradient of the head, and one that is added to it
    assert alive.peak < 2 * own + 5 * (4 * chunk * words) < 4 * tokens * words
    assert head.weight.grad is not None
    plain = torch.log_softmax(states.detach() @ head.weight.detach().T, 1)
    expected = plain[torch.arange(tokens), targets]
    assert torch.allclose(values.detach(), expected, atol=1e-4)


# ---- moments in 8 bits


def test_moments_in_eight_bits_take_a_quarter_and_train_alike(
    forget: list[QA], retain: list[QA]
) -> None:
    pytest.importorskip("torchao")
    found = {}
    for name in ("adamw", "adamw_8bit"):
        lm = LM(tiny_model("llama", hidden_size=128, num_hidden_layers=2), tiny_tokenizer())
        chosen = recipe(optimizer=name, epochs=4)
        found[name] = Trainer(lm, chosen, {"forget": forget, "retain": retain}).train().history
    for full, short in zip(found["adamw"], found["adamw_8bit"], strict=True):
        assert short["forget_loss"] == pytest.approx(full["forget_loss"], rel=0.02)
        assert short["keep_loss"] == pytest.approx(full["keep_loss"], rel=0.02)
    first, last = found["adamw_8bit"][0], found["adamw_8bit"][-1]
    assert last["forget_loss"] < 0.9 * first["forget_loss"]


def test_moments_in_eight_bits_survive_a_stop(
    tmp_path: Path, forget: list[QA], retain: list[QA]
) -> None:
    pytest.importorskip("torchao")
    records = {"forget": forget, "retain": retain}

    def big() -> LM:
        return LM(tiny_model("llama", hidden_size=128, num_hidden_layers=2), tiny_tokenizer())

    class StopError(Exception):
        pass

    def stop(step: int, total: int, numbers: object) -> None:
        if step == 4:
            raise StopError

    run = RunDirectory(tmp_path / "run")
    run.begin({"name": "resume"})
    chosen = recipe(optimizer="adamw_8bit", epochs=3, checkpoint_steps=3)
    whole, again = big(), big()
    Trainer(whole, chosen, records).train()
    with pytest.raises(StopError):
        Trainer(big(), chosen, records, context=Context(run=run, steps=stop)).train()
    files = {one.name: one.stat().st_size for one in (tmp_path / "run/checkpoint/last").iterdir()}
    assert files["optimizer.safetensors"] < 0.75 * files["trainable.safetensors"]
    result = Trainer(again, chosen, records, context=Context(run=run)).train()
    assert result.steps == 6
    assert same(weights(whole), weights(again))


def test_without_what_packs_moments_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, forget: list[QA], retain: list[QA]
) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"adamw_8bit.*delible\[quantized\]"):
        Trainer(
            make(), recipe(optimizer="adamw_8bit"), {"forget": forget, "retain": retain}
        ).train()


# ---- what leaves an accelerator


def test_moments_come_for_their_update_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameter by parameter, to the same bits; where they go is looked at, not waited for."""
    went: list[tuple[str, int]] = []
    move = optimizers.moved

    def watched(state: dict[str, Any], device: torch.device) -> None:
        went.append((str(device), len(state)))
        move(state, torch.device("cpu"))

    monkeypatch.setattr(optimizers, "moved", watched)
    ends = []
    for kind in (torch.optim.AdamW, optimizers._resting(torch.optim.AdamW, home="meta")):
        draw = torch.Generator().manual_seed(0)
        moving = [nn.Parameter(torch.randn(5, 3, generator=draw)) for _ in range(3)]
        idle = nn.Parameter(torch.ones(2))
        groups = [
            {"params": moving[:2], "weight_decay": 0.1},
            {"params": [moving[2], idle], "weight_decay": 0.0},
        ]
        optimizer = kind(groups, lr=1e-2, fused=True)
        for step in range(3):
            for one in moving:
                one.grad = torch.randn(5, 3, generator=draw)
            optimizers.set_rate(optimizer, 1e-2 * (step + 1))
            optimizer.step()
        assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2]
        assert idle not in optimizer.state
        ends.append([one.detach() for one in moving])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))
    assert went == [("cpu", 0), ("meta", 3)] * 3 + [("cpu", 3), ("meta", 3)] * 6


def test_a_resumed_run_leaves_moments_where_they_rest() -> None:
    placement = Placement({"w": nn.Parameter(torch.ones(2, 2, device="meta"))})
    for rests, home in ((False, "meta"), (True, "cpu")):
        made = optimizers.make_optimizer(Training(offload_optimizer=rests), placement)
        (count, moments) = optimizers.places(made)[id(placement.parameters["w"])]
        assert (count.type, moments.type) == ("meta", home)  # fused: the count is on the device


def test_activations_leave_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "WORTH_THE_WAY", 2048)
    copied: list[Tensor] = []
    goes = offload.goes

    def watched(value: Tensor, held: set[int]) -> bool:
        if goes(value, held):
            copied.append(value)
            return True
        return False

    monkeypatch.setattr(offload, "goes", watched)
    lm = make()
    plain = gradients(lm)
    assert not copied
    lm.offloads = True
    assert same(plain, gradients(lm))
    own = {one.data_ptr() for one in lm.model.parameters()}
    assert len(copied) > 10
    assert all(value.nbytes >= 2048 and value.data_ptr() not in own for value in copied)
    both = len(copied)
    copied.clear()
    lm.recomputes = True
    assert same(plain, gradients(lm))
    assert 0 < len(copied) < both  # the inputs of blocks go, the rest is not kept at all


@pytest.mark.parametrize("option", ["offload_optimizer", "offload_activations"])
def test_nothing_leaves_a_processor(option: str, forget: list[QA], retain: list[QA]) -> None:
    chosen = recipe(**{option: True})
    flag = f"Leave out --{option.replace('_', '-')}"
    with pytest.raises(RecipeError, match=f"in the main memory already.*{flag}"):
        Trainer(make(), chosen, {"forget": forget, "retain": retain}).train()


def test_a_run_leaves_the_model_as_it_was() -> None:
    lm = make()
    chosen = recipe(gradient_checkpointing=True, offload_activations=True)
    with contextlib.suppress(ZeroDivisionError), saving(chosen, lm):
        assert (lm.recomputes, lm.offloads) == (True, True)
        raise ZeroDivisionError
    assert (lm.recomputes, lm.offloads) == (False, False)


# ---- what would help


def test_ways_to_need_less_leave_out_what_is_done_already() -> None:
    again, moments = "--gradient-checkpointing true", "--optimizer adamw_8bit"
    words = [way.words for way in ways_of(Recipe.named("npo"))]
    assert words[:2] == ["", again]
    assert f"{again} {moments}" in words
    assert "--place lora --base-precision bfloat16 --gradient-checkpointing true" in words
    short = Recipe.named("npo_lora").changed(
        {}, {"training.base_precision": "bfloat16", "training.gradient_checkpointing": True}
    )
    away = "--offload-optimizer true --offload-activations true"
    held = ["--base-precision int8 --finish none", "--base-precision int4 --finish none"]
    assert [way.words for way in ways_of(short)] == ["", away, *held]
    assert [way.accelerator for way in ways_of(short)] == [False, True, False, False]
    for way in ways_of(Recipe.named("npo")):
        changed = way.of(Recipe.named("npo"))
        assert changed.training.model_dump().items() >= way.training.items()
