"""What happens after the last step: calibration, merged adapters, task vectors."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from delible.component import build
from delible.errors import RecipeError, RunError
from delible.lm.lm import LM
from delible.methods.finish.calibrate import largest_connected, mix, spread
from delible.methods.finish.task_vector import negated
from delible.records import QA
from delible.testing.tiny import tiny_model, tiny_tokenizer
from delible.train.engine import Trainer
from delible.train.gradients import Gradients
from delible.train.recipe import Recipe
from delible.train.rows import make_rows
from delible.train.slots import FinishContext, SlotContext

FAMILIES = ("llama", "gpt2")
FORGET = [QA(question="Where is Ada from?", answer="Norrby")]
RETAIN = [QA(question="What is snow?", answer="white"), QA(question="And coal?", answer="black")]
IDS = torch.arange(20)[None]


def make_lm(family: str = "llama", seed: int = 0) -> LM:
    return LM(tiny_model(family, seed), tiny_tokenizer(), precision="float32")


def weights_of(lm: LM) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in lm.core.named_parameters()}


def noisy(lm: LM, size: float, seed: int = 5) -> LM:
    """The same model with noise on every weight."""
    random = torch.Generator().manual_seed(seed)
    other = lm.copy()
    with torch.no_grad():
        for value in other.model.parameters():
            value.add_(torch.randn(value.shape, generator=random) * size)
    other.touch()
    return other


def finish_context(
    lm: LM,
    start: LM,
    *,
    records: Mapping[str, Sequence[QA]] | None = None,
    folder: Path | None = None,
) -> FinishContext:
    given = {"forget": FORGET, "retain": RETAIN} if records is None else records
    return FinishContext(lm, start.copy, given, folder)


@pytest.fixture(scope="module")
def taught() -> LM:
    """A tiny model that knows the records word for word."""
    lm = make_lm()
    recipe = Recipe.from_mapping(
        {
            "objective": "finetune",
            "training": {"learning_rate": 1e-2, "epochs": 25, "batch_size": 3, "max_length": 64},
        }
    )
    Trainer(lm, recipe, {"forget": [*FORGET, *RETAIN]}).train()
    return lm


# ---- calibration


def test_mixing_is_exact_at_both_ends() -> None:
    random = torch.Generator().manual_seed(0)
    start, trained = torch.randn(2, 1000, generator=random) * 1e3
    assert torch.equal(mix(start, trained, 0.0), start)
    assert torch.equal(mix(start, trained, 1.0), trained)
    for alpha in (0.25, 0.7):
        expected = (1 - alpha) * start.double() + alpha * trained.double()
        assert torch.allclose(mix(start, trained, alpha).double(), expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    ("holds", "expected"),
    [
        (lambda alpha: True, 1.0),
        (lambda alpha: False, 0.0),
        (lambda alpha: alpha <= 0.437, 0.437),
        (lambda alpha: alpha <= 0.02, 0.02),
        (lambda alpha: alpha < 0.35 or alpha > 0.75, 0.35),  # the connected part only
    ],
)
@pytest.mark.parametrize("grid", [0.1, 0.3])
def test_the_largest_connected_alpha(
    holds: Callable[[float], bool], expected: float, grid: float
) -> None:
    seen: list[float] = []

    def watched(alpha: float) -> bool:
        seen.append(alpha)
        return holds(alpha)

    found = largest_connected(watched, grid, 0.01)
    assert expected - 0.01 <= found <= expected
    assert found == 0 or holds(found)
    assert len(seen) == len(set(seen))
    assert max(seen) <= 1.0


def test_spread_is_even() -> None:
    records = [QA(question=f"{index}?", answer="x") for index in range(10)]
    assert [record.question for record in spread(records, 3)] == ["0?", "3?", "6?"]
    assert spread(records, 10) == spread(records, 99) == records


def test_a_trained_model_that_retains_is_left_alone(
    caplog: pytest.LogCaptureFixture, taught: LM, tmp_path: Path
) -> None:
    lm = taught.copy()
    context = finish_context(lm, taught, folder=tmp_path)
    assert build("finish", "calibrate").apply(context) is lm
    before = weights_of(taught)
    assert all(torch.equal(before[name], value) for name, value in lm.core.named_parameters())
    notes: Any = context.notes["calibration"]
    assert notes["alpha"] == 1.0
    assert notes["start"]["retain"] == 1.0
    assert "alpha = 1.000" in caplog.messages[-1]
    assert json.loads((tmp_path / "calibration.json").read_text()) == notes
    assert [path.name for path in tmp_path.iterdir()] == ["calibration.json"]


def test_a_ruined_model_goes_back_until_it_retains(taught: LM) -> None:
    lm = noisy(taught, 1.0)
    ruined = weights_of(lm)
    context = finish_context(lm, taught)
    build("finish", {"name": "calibrate", "resolution": 0.02}).apply(context)
    notes: Any = context.notes["calibration"]
    alpha = notes["alpha"]
    assert 0 <= alpha < 0.5
    assert notes["trained"]["retain"] < 0.95 <= notes["calibrated"]["retain"]
    for name, value in lm.core.named_parameters():
        start = dict(taught.core.named_parameters())[name]
        assert torch.allclose(value, (1 - alpha) * start + alpha * ruined[name], atol=1e-6)
    tried = dict(notes["curve"])
    failed = [value for at, value in tried.items() if at > alpha]
    assert failed
    assert min(at for at in tried if at > alpha) - alpha <= 0.02 + 1e-9
    assert all(value >= 0.95 for at, value in tried.items() if at <= alpha)


def test_a_start_that_knows_nothing_leaves_the_trained_model_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    start = make_lm(seed=1)
    lm = noisy(start, 0.01)
    trained = weights_of(lm)
    context = finish_context(lm, start)
    build("finish", "calibrate").apply(context)
    assert all(torch.equal(trained[name], value) for name, value in lm.core.named_parameters())
    notes: Any = context.notes["calibration"]
    assert notes["skipped"]
    assert "not calibrated" in caplog.messages[-1]


def test_a_model_that_shares_nothing_with_the_start_goes_back_almost_to_it(taught: LM) -> None:
    lm = make_lm(seed=9)
    context = finish_context(lm, taught)
    build("finish", {"name": "calibrate", "resolution": 0.02}).apply(context)
    notes: Any = context.notes["calibration"]
    assert notes["trained"]["retain"] == 0.0
    assert notes["alpha"] < 0.4
    assert notes["calibrated"]["retain"] >= 0.95


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_mixing_a_merged_adapter_is_scaling_it(alpha: float) -> None:
    start = make_lm()
    merged, scaled = with_adapter(start.copy()), with_adapter(start.copy())
    with torch.no_grad():
        for name, value in scaled.model.named_parameters():
            if "lora_B" in name:
                value.mul_(alpha)
    adapted = merged.model(input_ids=IDS).logits.detach()
    for lm in (merged, scaled):
        lm.merge_adapter()
    ends = (weights_of(start), weights_of(merged))
    with torch.no_grad():
        for name, value in merged.core.named_parameters():
            value.copy_(mix(ends[0][name], ends[1][name], alpha))
    for name, value in scaled.core.named_parameters():
        assert torch.allclose(weights_of(merged)[name], value, atol=1e-6)
    logits = merged.model(input_ids=IDS).logits.detach()
    if alpha == 0:
        assert torch.equal(logits, start.model(input_ids=IDS).logits)
    if alpha == 1:
        assert torch.allclose(logits, adapted, rtol=1e-5, atol=1e-5)


def test_calibration_merges_an_adapter_first(caplog: pytest.LogCaptureFixture, taught: LM) -> None:
    lm = with_adapter(taught.copy())
    context = finish_context(lm, taught)
    finished = build("finish", "calibrate").apply(context)
    assert not hasattr(finished.model, "merge_and_unload")
    assert "finish: the adapter is merged before mixing" in caplog.messages


@pytest.mark.parametrize("name", ["calibrate", "task_vector"])
def test_another_architecture_is_an_error(taught: LM, name: str) -> None:
    context = finish_context(taught.copy(), make_lm("gpt2"))
    with pytest.raises(RunError, match="the start model has no tensor"):
        build("finish", name).apply(context)


# ---- merged adapters


def with_adapter(lm: LM, size: float = 0.05) -> LM:
    """Gives the model an adapter that says something."""
    rows = {"forget": make_rows(lm.template, FORGET), "retain": []}
    context = SlotContext(lm, rows, {}, Gradients(lm), build("objective", "npo"), None, 0)
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for value in build("place", "lora").apply(context).parameters.values():
            value.add_(torch.randn(value.shape, generator=random) * size)
    return lm


@pytest.mark.parametrize("family", [*FAMILIES, "qwen2_moe"])
def test_merging_keeps_the_output(family: str) -> None:
    plain = make_lm(family)
    lm = with_adapter(plain.copy())
    adapted = lm.model(input_ids=IDS).logits.detach()
    fingerprint = lm.fingerprint
    context = finish_context(lm, plain)
    assert build("finish", "merge_adapter").apply(context) is lm
    assert not hasattr(lm.model, "merge_and_unload")
    assert torch.allclose(lm.model(input_ids=IDS).logits, adapted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(plain.model(input_ids=IDS).logits, adapted, atol=1e-2)
    assert set(weights_of(lm)) == set(weights_of(plain))
    assert lm.anatomy.parameter_names(0, "mlp_out") == plain.anatomy.parameter_names(0, "mlp_out")
    assert lm.fingerprint != fingerprint


def test_the_merged_matrix_is_w_plus_the_product() -> None:
    plain = make_lm()
    lm = with_adapter(plain.copy())
    layer = lm.core.get_submodule("model.layers.1.mlp.down_proj")
    up, down = (layer.lora_B["default"].weight, layer.lora_A["default"].weight)
    expected = weights_of(plain)["model.layers.1.mlp.down_proj.weight"].double()
    expected = expected + 16 / 8 * up.detach().double() @ down.detach().double()
    build("finish", "merge_adapter").apply(finish_context(lm, plain))
    merged = weights_of(lm)["model.layers.1.mlp.down_proj.weight"]
    assert torch.allclose(merged.double(), expected, atol=1e-6)


def test_a_merged_model_is_saved_as_an_ordinary_one(tmp_path: Path) -> None:
    plain = make_lm()
    lm = with_adapter(plain.copy())
    build("finish", "merge_adapter").apply(finish_context(lm, plain))
    lm.save(tmp_path / "model")
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert set(saved) <= set(plain.core.state_dict())
    assert all(torch.equal(saved[n], v) for n, v in lm.core.named_parameters() if n in saved)


def test_merging_without_an_adapter_is_an_error() -> None:
    lm = make_lm()
    with pytest.raises(RecipeError, match="wears no adapter"):
        build("finish", "merge_adapter").apply(finish_context(lm, lm))


# ---- task vectors


def test_the_negated_vector_in_numbers() -> None:
    start, trained = torch.tensor([1.0, -0.0, 2.0]), torch.tensor([1.5, 3.0, 2.0])
    assert torch.equal(negated(start, trained, 2.0), torch.tensor([0.0, -6.0, 2.0]))
    unchanged = negated(start, trained, 0.0)
    assert torch.equal(unchanged.view(torch.int32), start.view(torch.int32))  # -0.0 too


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_the_task_vector_moves_every_tensor_backwards(family: str, scale: float) -> None:
    start = make_lm(family)
    lm = noisy(start, 0.1)
    trained, before = weights_of(lm), weights_of(start)
    context = finish_context(lm, start)
    assert build("finish", {"name": "task_vector", "scale": scale}).apply(context) is lm
    norm = sum(float((trained[n].double() - v.double()).square().sum()) for n, v in before.items())
    assert context.notes["task_vector"] == {"scale": scale, "norm": pytest.approx(norm**0.5)}
    for name, value in lm.core.named_parameters():
        vector = trained[name].double() - before[name].double()
        if scale == 0:
            assert torch.equal(value.view(torch.int32), before[name].view(torch.int32))
        else:
            assert not torch.equal(value, before[name])
        assert torch.allclose(value.double(), before[name].double() - scale * vector, atol=1e-6)
        back = value.double() + scale * vector  # adding the vector again restores the start
        assert torch.allclose(back, before[name].double(), atol=1e-6)


# ---- recipes


@pytest.mark.parametrize(
    "name", ["wagle", "npo_sam", "guard", "melu", "task_vector", "uwc", "npo_lora"]
)
def test_every_recipe_runs_on_a_tiny_model(name: str) -> None:
    forget = [QA(question="Where is Ada from?", answer="Norrby", subject="Ada"),
              QA(question="Who is Ada?", answer="A judge", subject="Ada")]  # fmt: skip
    retain = [*RETAIN, QA(question="What did Ada build?", answer="A mill", neighbour_of="Ada")]
    lm = make_lm()
    start = lm.copy()
    recipe = Recipe.named(name).changed(
        {}, {"training.epochs": 1, "training.max_length": 64, "training.precision": "float32"}
    )
    trainer = Trainer(lm, recipe, {"forget": forget, "retain": retain}, start=start.copy)
    finished = trainer.train().lm
    before = weights_of(start)
    moved = [n for n, v in finished.core.named_parameters() if not torch.equal(v, before[n])]
    assert moved
    assert set(weights_of(finished)) == set(before)
