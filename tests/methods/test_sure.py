"""SURE: which neurons are salient, what stays frozen to the bit, what the released code does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import losses_by_hand as by_hand
import pytest
import torch
from torch import Tensor

from delible.component import build
from delible.context import Context
from delible.errors import RecipeError, RunError
from delible.lm.lm import LM
from delible.methods.objective.gradient_ascent import GradientAscent
from delible.methods.place import sure as module
from delible.methods.place.sure import input_dimensions, salient
from delible.records import QA
from delible.rundir import RunDirectory
from delible.testing.tiny import tiny_model, tiny_tokenizer
from delible.train.engine import Trainer
from delible.train.gradients import Gradients
from delible.train.recipe import Recipe
from delible.train.rows import make_rows
from delible.train.slots import Placement, SlotContext

FORGET = [
    QA(question=f"Where was {name} born?", answer=f"In {town}.", subject=name)
    for name, town in (("Ada Quill", "Norrby"), ("Ben Orr", "Casta"), ("Cy Dale", "Umber"))
]
#: Matrices that GPT-2 stores as [in, out].
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
RETAIN = [QA(question="What is snow?", answer="White."), QA(question="And coal?", answer="Black.")]


def make_lm(family: str = "llama") -> LM:
    return LM(tiny_model(family), tiny_tokenizer(), precision="float32")


def placed(lm: LM, **options: Any) -> Placement:
    rows = {"forget": make_rows(lm.template, FORGET), "retain": make_rows(lm.template, RETAIN)}
    records = {"forget": FORGET, "retain": RETAIN}
    context = SlotContext(
        lm, rows, records, Gradients(lm), build("objective", "gradient_ascent"), None, 3,
    )  # fmt: skip
    return build("place", {"name": "sure", **options}).apply(context)  # type: ignore[no-any-return]


def trainer(lm: LM, place: dict[str, Any], **options: Any) -> Trainer:
    training = {"learning_rate": 1e-2, "epochs": 3, "batch_size": 2, "weight_decay": 0.1,
                "precision": "float32", "checkpoint_steps": 1}  # fmt: skip
    recipe = Recipe.from_mapping(
        {
            "objective": "npo", "keep": options.pop("keep", "nll"),
            "place": {"name": "sure", **place}, "training": training,
        }
    )  # fmt: skip
    return Trainer(lm, recipe, {"forget": FORGET, "retain": RETAIN}, context=Context(1, **options))


def snapshot(lm: LM) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in lm.model.named_parameters()}


# ---- the mask


@pytest.mark.parametrize(("percentile", "count"), [(90, 100), (95, 50), (99, 10), (0, 1000)])
def test_the_share_of_neurons(percentile: float, count: int) -> None:
    values = torch.randperm(1000, generator=torch.Generator().manual_seed(0)).float() + 1
    parts = {"a": values[:600].reshape(600, 1), "b": values[600:]}
    masks = salient(parts, percentile)
    assert sum(int(mask.sum()) for mask in masks.values()) == count
    # it is the largest ones that are in it, over both tensors
    assert min(float(parts[name][mask].min()) for name, mask in masks.items()) == 1001 - count


def test_ties_share_a_fate_and_no_gradient_never_moves() -> None:
    masks = salient({"a": torch.tensor([1.0, 2.0, 2.0, 2.0])}, 75)
    assert masks["a"].tolist() == [False, True, True, True]
    assert salient({"a": torch.tensor([0.0] * 99 + [1.0])}, 50)["a"].sum() == 1
    with pytest.raises(RunError, match="finite"):
        salient({"a": torch.tensor([1.0, float("nan")])}, 50)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_the_mask_is_that_of_a_float64_derivation(family: str) -> None:
    lm = make_lm(family)
    twin: Any = lm.copy().model.double()
    twin.config._experts_implementation = "eager"  # the fused kernel has no float64
    loss: Any = 0.0
    for row in make_rows(lm.template, FORGET):
        ids = torch.tensor(row.encoded.ids)[None]
        logprobs = twin(input_ids=ids).logits[0, :-1].log_softmax(dim=1)
        loss = loss - logprobs.gather(1, ids[0, 1:, None])[row.encoded.start - 1 :].mean()
    loss.backward()
    norms: dict[str, list[float]] = {}
    for name, value in twin.named_parameters():
        gradient = torch.zeros_like(value) if value.grad is None else value.grad
        if gradient.ndim == 1:
            norms[name] = gradient.abs().tolist()
            continue
        gradient = gradient.T if name.endswith(TRANSPOSED) else gradient
        neurons = gradient.reshape(-1, gradient.shape[-1])
        norms[name] = [float(neuron.norm()) for neuron in neurons]
    every = sorted(norm for part in norms.values() for norm in part)
    place = 0.9 * (len(every) - 1)
    low = every[int(place)]
    threshold = low + (place - int(place)) * (every[int(place) + 1] - low)
    masks = placed(lm, percentile=90).masks
    assert masks is not None
    for name, mask in masks.items():
        assert mask.shape == lm.model.get_parameter(name).shape
        rows = mask.mT if name.endswith(TRANSPOSED) else mask
        rows = rows.reshape(len(norms[name]), -1)
        assert torch.equal(rows.all(dim=1), rows.any(dim=1)), "a neuron moves as a whole"
        for moves, norm in zip(rows[:, 0].tolist(), norms[name], strict=True):
            if abs(norm - threshold) > 1e-4 * threshold:
                assert moves == (norm >= threshold), name


def test_fused_experts_are_cut_into_neurons() -> None:
    lm = make_lm("mixtral")
    dimensions = input_dimensions(lm, dict(lm.model.named_parameters()))
    experts = {name: d for name, d in dimensions.items() if lm.model.get_parameter(name).ndim == 3}
    assert experts
    assert set(experts.values()) == {2}
    gpt2 = make_lm("gpt2")
    found = input_dimensions(gpt2, dict(gpt2.model.named_parameters()))
    assert found["transformer.h.0.mlp.c_fc.weight"] == 0
    assert found["transformer.wte.weight"] == 1
    assert found["transformer.h.0.mlp.c_fc.bias"] is None


# ---- what moves


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_frozen_neurons_keep_their_bits_under_weight_decay(family: str) -> None:
    lm = make_lm(family)
    masks = placed(lm.copy()).masks
    assert masks is not None
    before = snapshot(lm)
    trainer(lm, {}).train()
    after = snapshot(lm)
    moved = 0
    for name, mask in masks.items():
        assert torch.equal(before[name][~mask], after[name][~mask]), name
        moved += int((before[name] != after[name]).sum())
    allowed = sum(int(mask.sum()) for mask in masks.values())
    assert 0.5 * allowed < moved <= allowed


def test_a_mask_of_each_step_holds_in_that_step(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = make_lm()
    seen: list[dict[str, Tensor]] = []
    original = salient

    def recording(saliencies: dict[str, Tensor], percentile: float) -> dict[str, Tensor]:
        seen.append(original(saliencies, percentile))
        return seen[-1]

    monkeypatch.setattr(module, "salient", recording)
    weights = [snapshot(lm)]
    trainer(
        lm, {"every_step": True}, steps=lambda *_: weights.append(snapshot(lm))
    ).train()  # fmt: skip
    assert len(seen) == len(weights) - 1 == 6
    left_alone = 0
    for mask, before, after, earlier in zip(seen, weights, weights[1:], [{}, *seen], strict=False):
        for name, value in mask.items():
            frozen = ~value.expand(before[name].shape)
            assert torch.equal(before[name][frozen], after[name][frozen]), name
            if name in earlier:  # moved before, so the optimiser has momentum there
                left_alone += int((earlier[name] & ~value).sum())
        assert any(not torch.equal(before[name], after[name]) for name in mask)
    assert left_alone > 0, "the test needs masks that change"


def test_each_step_uses_the_hosts_own_loss_and_leaves_no_gradient() -> None:
    lm = by_hand.tiny_lm()
    place = placed(lm, every_step=True, percentile=80)
    passes = by_hand.passes_of(lm, GradientAscent(), None, by_hand.Reference())
    passes.forget()
    rows = passes.parameters[3].grad
    assert rows is not None
    norms = rows.norm(dim=1)
    passes.clear()
    assert place.each_step is not None
    masks = place.each_step(passes)
    assert masks is not None
    assert all(value.grad is None for value in passes.parameters)
    name = list(place.parameters)[3]
    chosen = masks[name][:, 0]
    if chosen.any() and not chosen.all():
        assert norms[chosen].min() > norms[~chosen].max()
    share = sum(int(mask.any(dim=-1).sum()) for mask in masks.values() if mask.ndim == 2)
    assert 0 < share < sum(len(mask) for mask in masks.values())


# ---- the released code


def test_as_released_no_mask_acts_and_the_forget_gradient_counts_twice() -> None:
    lm = by_hand.tiny_lm()
    place = placed(lm, compat=True)
    passes = by_hand.passes_of(lm, GradientAscent(), None, by_hand.Reference())
    passes.forget()
    once = [p.grad.clone() for p in passes.parameters if p.grad is not None]
    passes.clear()
    assert place.each_step is not None
    assert place.each_step(passes) is None
    passes.forget()
    twice = [p.grad for p in passes.parameters if p.grad is not None]
    for one, two in zip(once, twice, strict=True):
        assert torch.allclose(2 * one, two, rtol=1e-5, atol=1e-8)

    lm = make_lm()
    before = snapshot(lm)
    trainer(lm, {"compat": True}).train()
    # only rows of tokens that do not occur could stay; the head's are all in the softmax
    assert bool((before["lm_head.weight"] != lm.model.get_parameter("lm_head.weight")).any(1).all())
    lm = make_lm()
    trainer(lm, {}).train()
    still = (before["lm_head.weight"] == lm.model.get_parameter("lm_head.weight")).all(1)
    assert int(still.sum()) > 0.5 * len(still)


def test_wrong_options_are_refused() -> None:
    for options in ({"percentile": 100}, {"percentile": -1}, {"threshold": 90}):
        with pytest.raises(RecipeError):
            build("place", {"name": "sure", **options})


class StopError(Exception):
    pass


def test_masks_of_each_step_resume_to_the_same_bits(tmp_path: Path) -> None:
    whole = make_lm()
    trainer(whole, {"every_step": True}).train()

    def interrupt(step: int, total: int, numbers: object) -> None:
        if step == 4:
            raise StopError

    run = RunDirectory(tmp_path / "run")
    run.begin({"name": "sure"})
    with pytest.raises(StopError):
        trainer(make_lm(), {"every_step": True}, run=run, steps=interrupt).train()
    again = make_lm()
    trainer(again, {"every_step": True}, run=run).train()
    left, right = snapshot(whole), snapshot(again)
    assert all(torch.equal(left[name], right[name]) for name in left)
