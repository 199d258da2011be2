"""A fingerprint changes whenever an answer could change, and with nothing else."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP

from delible.lm import identity
from delible.lm.digest import weights_digest
from delible.lm.hooks import capture
from delible.lm.identity import settings_of
from delible.lm.lm import LM
from delible.measure.cache import Cache
from delible.measure.engine import measure
from delible.system.asks import Decoding, Generate, Prompt, Score
from delible.testing.tiny import tiny_model, tiny_tokenizer

REQUESTS = [
    Score(Prompt.ask("Who?"), "Ada"), Score(Prompt.ask("Where?"), "In Ob"),
    Generate(Prompt.ask("Who?"), Decoding(6)),
]  # fmt: skip
#: Of models whose weights are given below, from before hooks and modules were looked at.
GOLDEN = {
    "llama": "db593e18a82e90e14fafcc174c753e6a01bb2265a19f96e0eeaa75863668329d",
    "gpt2": "a7b8c5b54cfaa64696c6f5df3090bffc6d9155367082c6df66590369c073e88f",
}


def tiny(family: str = "llama") -> LM:
    return LM(tiny_model(family), tiny_tokenizer(), precision="float32")


def block(lm: LM, layer: int = 1) -> Any:
    return lm.core.get_submodule(lm.anatomy.block_path(layer))


@pytest.mark.parametrize("family", GOLDEN)
def test_a_plain_model_keeps_its_fingerprint(family: str) -> None:
    model = tiny_model(family)
    with torch.no_grad():
        for one in model.parameters():
            one.copy_((torch.arange(one.numel()) % 97 - 48).reshape(one.shape) / 256)
    lm = LM(model, tiny_tokenizer(), precision="float32")
    lm.template = SimpleNamespace(fingerprint="template")  # type: ignore[assignment]
    known = f"{weights_digest(model)}/template/float32"
    assert hashlib.sha256(known.encode()).hexdigest() == GOLDEN[family]
    by_hand = f"{known}/{settings_of(lm.core.config)}"
    assert lm.fingerprint == hashlib.sha256(by_hand.encode()).hexdigest()
    assert lm.identity == hashlib.sha256(f"{weights_digest(model)}/template".encode()).hexdigest()


def test_equal_weights_with_another_window_are_another_model() -> None:
    """Only the settings differ: what the one answers is never taken for the other's."""
    wide, narrow = (
        LM(tiny_model("mistral", sliding_window=window), tiny_tokenizer(), precision="float32")
        for window in (64, 8)
    )
    assert weights_digest(wide.model) == weights_digest(narrow.model)
    assert wide.fingerprint != narrow.fingerprint
    wide.core.config._name_or_path = "elsewhere"
    again = LM(tiny_model("mistral", sliding_window=64), tiny_tokenizer(), precision="float32")
    assert wide.fingerprint == again.fingerprint


def test_what_only_reads_changes_nothing() -> None:
    lm = tiny()
    before = lm.fingerprint
    with torch.no_grad(), capture(lm.core, [lm.anatomy.block_path(0)]):
        assert lm.fingerprint == before
        lm.core(input_ids=torch.tensor([[1, 2]]), output_hidden_states=True)
    lm.core.enable_input_require_grads()
    assert sum(len(one._forward_hooks) for one in lm.core.modules()) > 1  # the library's own stay
    assert lm.fingerprint == before


def test_decoding_defaults_change_no_answer() -> None:
    lm = tiny()
    before, fingerprint = lm.generate([Prompt.ask("Who?")], Decoding(8)), lm.fingerprint
    lm.core.generation_config.repetition_penalty = 9.0
    lm.core.generation_config.do_sample = True
    lm.core.generation_config.temperature = 5.0
    assert lm.generate([Prompt.ask("Who?")], Decoding(8)) == before
    assert lm.fingerprint == fingerprint


def test_every_unknown_hook_is_another_one_and_is_forgotten_when_it_goes() -> None:
    lm = tiny()
    seen = {lm.fingerprint}
    for round_ in range(30):
        # each is freed before the next one is made: addresses come again
        kind = ("register_forward_hook", "register_forward_pre_hook")[round_ % 2]
        handle = getattr(block(lm), kind)(lambda *given: None)
        assert lm.fingerprint == lm.fingerprint
        seen.add(lm.fingerprint)
        handle.remove()
    assert len(seen) == 31
    assert lm.fingerprint in seen
    assert all(alive() is not None for alive, _ in identity._names.values())  # none is kept on


def test_the_same_hook_elsewhere_is_another_model() -> None:
    lm = tiny()

    def hook(*given: Any) -> None:
        return None

    seen = set()
    for layer in (0, 1):
        handle = block(lm, layer).register_forward_hook(hook)
        seen.add(lm.fingerprint)
        assert lm.copy().fingerprint == lm.fingerprint
        handle.remove()
    everywhere = nn.modules.module.register_module_forward_hook(hook)
    seen.add(lm.fingerprint)
    everywhere.remove()
    seen.add(lm.fingerprint)
    assert len(seen) == 4


def test_a_hook_of_another_process_is_another_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny()
    block(lm).register_forward_hook(lambda *given: None)
    before = lm.fingerprint
    monkeypatch.setattr(identity, "_names", {})  # as a new process has it
    assert lm.fingerprint != before


def test_a_hook_that_names_itself_counts_by_its_name() -> None:
    prints = []
    for name in ("steering by 3", "steering by 3", "steering by 4"):
        lm = tiny()

        def hook(*given: Any) -> None:
            return None

        setattr(hook, identity.IDENTITY, name)
        block(lm).register_forward_hook(hook)
        prints.append(lm.fingerprint)
    assert prints[0] == prints[1] != prints[2]


class Codebook(nn.Module):
    """Replaces what a module gives by the nearest of few states, which are no parameters."""

    def __init__(self, inner: nn.Module, strength: float) -> None:
        super().__init__()
        self.inner, self.strength = inner, strength

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.inner(states) * self.strength


class Halved(LlamaMLP):
    """The same parameters under the same names."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return super().forward(states) / 2


def hooked(lm: LM) -> None:
    block(lm).register_forward_hook(lambda module, given, out: out * 1.3)


def replaced(lm: LM) -> None:
    mlp = block(lm).mlp
    mlp.forward = MethodType(lambda self, states: states * 0.5, mlp)


def wrapped(lm: LM) -> None:
    block(lm).mlp = Codebook(block(lm).mlp, 2.0)


def exchanged(lm: LM) -> None:
    other = Halved(lm.core.config)
    other.load_state_dict(block(lm).mlp.state_dict())
    block(lm).mlp = other


def library_module(lm: LM) -> None:
    block(lm).mlp.act_fn = nn.ReLU()  # nothing in the state says it


def written_to(lm: LM) -> None:
    with torch.no_grad():
        block(lm).mlp.down_proj.weight.mul_(1.5)


@pytest.mark.parametrize(
    "change", [hooked, replaced, wrapped, exchanged, library_module, written_to]
)
def test_no_answer_is_shared_with_a_changed_model(
    change: Callable[[LM], None], tmp_path: Path
) -> None:
    cache, lm = Cache(tmp_path), tiny()
    before = measure(lm, REQUESTS, cache=cache)
    assert measure(lm, REQUESTS, cache=cache).report.cached == len(REQUESTS)
    fingerprint = lm.fingerprint
    change(lm)
    assert lm.fingerprint != fingerprint
    after = measure(lm, REQUESTS, cache=cache)
    assert after.report.cached == 0
    assert not (after[REQUESTS[0]].logprobs == before[REQUESTS[0]].logprobs).all()  # type: ignore[union-attr]


def test_a_forward_put_into_a_class_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny()
    before, own = lm.fingerprint, LlamaMLP.forward

    @functools.wraps(own)
    def other(self: Any, states: torch.Tensor) -> torch.Tensor:
        return own(self, states) * 2

    monkeypatch.setattr(LlamaMLP, "forward", other)
    assert lm.fingerprint != before
    monkeypatch.undo()
    assert lm.fingerprint == before


def test_adapters_on_off_scaled_and_merged_are_told_apart(tmp_path: Path) -> None:
    lm = tiny()
    seen = [lm.fingerprint]
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    lm.wear(peft.get_peft_model(lm.model, settings))
    lm.model.add_adapter("other", settings)
    cache = Cache(tmp_path)

    def ask() -> None:
        assert measure(lm, REQUESTS, cache=cache).report.cached == 0
        seen.append(lm.fingerprint)

    ask()
    lm.model.set_adapter("other")
    ask()
    layers = [one for one in lm.model.modules() if hasattr(one, "lora_A")]
    for layer in layers:
        layer.scaling["other"] *= 2
    ask()
    with lm.model.disable_adapter():
        ask()
    assert lm.fingerprint == seen[-2]
    lm.model.merge_adapter()
    ask()
    assert len({*seen}) == len(seen)
    lm.merge_adapter()  # an ordinary model again: as if its weights had been loaded
    assert lm.fingerprint == LM(lm.model, lm.tokenizer, precision="float32").fingerprint


def test_a_copy_has_the_same_and_reads_no_weights_again(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny()
    before = lm.fingerprint
    monkeypatch.setattr(identity, "weights_digest", None)
    twin = lm.copy()
    assert twin.fingerprint == lm.fingerprint == before
    monkeypatch.undo()
    written_to(twin)
    assert twin.fingerprint != before
    assert lm.fingerprint == before
