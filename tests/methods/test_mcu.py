"""MCU: minor components by a float64 decomposition, CIR by positions, two steps by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import losses_by_hand as by_hand
import pytest
import torch
from torch import Tensor

from delible.context import Context
from delible.errors import RecipeError
from delible.lm.lm import LM
from delible.methods.balance.two_steps import TwoSteps
from delible.methods.harden.cir import CIR
from delible.methods.harden.none import NoHarden
from delible.methods.keep.hidden_distance import HiddenDistance
from delible.methods.objective.gradient_ascent import GradientAscent
from delible.methods.objective.mcu import MCU, mlp_breaking, sums
from delible.methods.objective.rmu import RMU
from delible.records import QA
from delible.rundir import RunDirectory
from delible.testing.tiny import tiny_model, tiny_tokenizer
from delible.train.engine import Trainer
from delible.train.losses import Keep, Objective
from delible.train.passes import Passes
from delible.train.recipe import Recipe
from delible.train.reference import Reference
from delible.train.representation import leading_directions, without_directions
from delible.train.row import Row
from delible.train.rows import make_rows
from delible.watching import unwatched

FORGET = [QA(question=f"Who is {n}?", answer=f"A {job}.", subject=n)
          for n, job in (("Ada", "baker"), ("Ben", "pilot"), ("Cy", "clown"))]  # fmt: skip
RETAIN = [QA(question="What is snow?", answer="White."), QA(question="And coal?", answer="Black.")]
DEPTHS = {"first_depth": 0.0, "last_depth": 0.5}


def drift() -> HiddenDistance:
    """What the method keeps with."""
    return HiddenDistance(depth=0.5, blocks=1, relative="mean")


def ready(lm: LM, frozen: LM, rows: dict[str, list[Row]], *losses: Objective | Keep) -> Reference:
    """The reference with what the losses learn."""
    reference = by_hand.prepared(frozen, rows, *losses)
    for loss in losses:
        reference.learn(loss.full_name, loss.learn(frozen, rows, reference, 0, unwatched))
    return reference


def mlp_output(lm: LM, row: Row, layer: int) -> Tensor:
    """What an MLP gives for a row alone, float64."""
    seen: list[Tensor] = []
    module = lm.core.get_submodule(lm.anatomy.path(layer, lm.anatomy.mlp))
    hook = module.register_forward_hook(lambda m, a, output: seen.append(output))
    with torch.no_grad():
        lm.core(input_ids=torch.tensor([row.encoded.ids]))
    hook.remove()
    return seen[0].reshape(len(row.encoded.ids), -1).double()


def components_by_hand(states: Tensor, count: int) -> Tensor:
    """An orthonormal basis [count, hidden] of the mean and the main directions, by an SVD."""
    mean = states.mean(dim=0)
    main = torch.linalg.svd(states - mean, full_matrices=False)[2][: count - 1]
    return torch.linalg.qr(torch.cat([mean[None], main]).T)[0].T


def as_released(states: Tensor, count: int) -> Tensor:
    """The mean's direction, and the main ones, not orthogonal to it."""
    mean = states.mean(dim=0)
    main = torch.linalg.svd(states - mean, full_matrices=False)[2][: count - 1]
    return torch.cat([mean[None] / mean.norm(), main])


# ---- directions


def test_directions_span_the_mean_and_the_main_components() -> None:
    random = torch.Generator().manual_seed(0)
    scale = torch.linspace(3, 0.1, 24)[None]
    states = (torch.randn(200, 24, generator=random) * scale + 0.7).double()
    found = leading_directions(*sums([torch.cat([states[:1], states])]), 5).double()
    wanted = components_by_hand(states, 5)
    torch.testing.assert_close(found.T @ found, wanted.T @ wanted, atol=1e-3, rtol=0)
    torch.testing.assert_close(found @ found.T, torch.eye(5).double(), atol=1e-5, rtol=0)
    once = without_directions(states, found)
    torch.testing.assert_close(without_directions(once, found), once, atol=1e-5, rtol=0)
    assert float(without_directions(found, found).abs().max()) < 1e-5
    assert float(without_directions(states.mean(0), found).norm()) < 1e-5


def test_one_direction_after_the_other_brings_the_mean_back() -> None:
    random = torch.Generator().manual_seed(0)
    states = torch.randn(60, 12, generator=random) * torch.linspace(3, 0.1, 12) + 1.0
    total, moment, count = states.sum(0), states.T @ states, 60
    rows = leading_directions(total, moment, count, 4, orthonormal=False)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(4))
    assert float((without_directions(states, rows) @ rows[0]).abs().max()) > 0.1
    fewer = leading_directions(total, moment, 2, 4)
    assert fewer.shape == (2, 12)
    assert leading_directions(total, moment, count, 0).shape == (0, 12)


# ---- the losses


@pytest.mark.parametrize(("components", "faithful"), [(0, False), (4, False), (4, True)])
def test_breaking_equals_loops_over_rows_alone(components: int, faithful: bool) -> None:
    lm, frozen = by_hand.tiny_lm(0.05), by_hand.tiny_lm()
    rows = by_hand.all_rows(lm)
    loss = MCU(components=components, floor=-1.0, faithful=faithful, **DEPTHS)
    reference = ready(lm, frozen, rows, loss)
    found = by_hand.values(lm, loss, reference, rows).tolist()
    count = sum(len(row.encoded.ids) for row in rows["forget"])
    expected = [0.0] * 3
    for layer in (0, 1):
        was = [mlp_output(frozen, row, layer)[1:] for row in rows["forget"]]
        basis = components_by_hand(torch.cat(was), components) if components else []
        if faithful:  # neither turned nor all at once
            basis = as_released(torch.cat(was), components)
        for c in basis:
            was = [w - (w @ c)[:, None] * c for w in was]
        length = float(torch.cat(was).norm(dim=1).mean())
        for place, row in enumerate(rows["forget"]):
            now = mlp_output(lm, row, layer)[1:]
            for part, m0 in zip(now, was[place], strict=True):
                for c in basis:
                    part = part - (part @ c) * c
                expected[place] += max(-1.0, float(part @ m0) / length**2) / 2
    wanted = [value * count / (count - 3) for value in expected]
    assert found == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "opt", "qwen2_moe"])
def test_at_the_start_the_loss_is_the_spread_of_lengths(family: str) -> None:
    lm = LM(tiny_model(family), tiny_tokenizer(), precision="float32")
    rows = {"forget": make_rows(lm.template, FORGET)}
    for components in (0, 5):
        loss = MCU(components=components, **DEPTHS)
        reference = ready(lm, lm, rows, loss)
        found = float(by_hand.values(lm, loss, reference, rows).detach().sum())
        count = sum(len(row.encoded.ids) for row in rows["forget"])
        wanted = 0.0
        for layer in loss._layers(lm):
            states = torch.cat([mlp_output(lm, row, layer)[1:] for row in rows["forget"]])
            if components:
                basis = components_by_hand(states, components)
                states = states - states @ basis.T @ basis
            lengths = states.norm(dim=1)
            wanted += float(lengths.pow(2).mean() / lengths.mean() ** 2) / len(loss._layers(lm))
        assert found / count == pytest.approx(wanted, rel=1e-3)
        assert found / count >= 1


def test_rmu_without_components_is_rmu_over_all_but_the_first_positions() -> None:
    lm, frozen = by_hand.tiny_lm(0.05), by_hand.tiny_lm()
    rows = by_hand.all_rows(lm)
    loss = MCU(base="rmu", components=0, first_depth=0.5, last_depth=0.5, relative=False, length=2)
    reference = ready(lm, frozen, rows, loss)
    found = by_hand.values(lm, loss, reference, rows)
    other = RMU(depth=0.5, adaptive=None, steering=2.0)
    whole = by_hand.values(lm, other, Reference(), rows)
    from delible.train.representation import control_vector

    vector = (2 * control_vector(32, "uniform", 0)).tolist()
    first = torch.tensor([
        sum((x - v) ** 2 / 32 for x, v in zip(by_hand.block_output(lm, row, 1)[0], vector,
                                              strict=True))
        for row in rows["forget"]])  # fmt: skip
    count = sum(len(row.encoded.ids) for row in rows["forget"])
    torch.testing.assert_close(found, (whole - first) * (count / (count - 3)), rtol=1e-5, atol=1e-5)
    far = MCU(base="rmu", components=3, first_depth=0.5, last_depth=0.5, length=2)
    reference = ready(lm, frozen, rows, far)
    length = float(reference.learned(far.full_name, "length.1"))
    near = far.model_copy(update={"relative": False, "length": 2 * length})
    torch.testing.assert_close(by_hand.values(lm, far, reference, rows),
                               by_hand.values(lm, near, reference, rows))  # fmt: skip


@pytest.mark.parametrize("base", ["mlp_breaking", "rmu"])
def test_the_gradient_has_nothing_along_what_was_taken_out(base: Any) -> None:
    lm, frozen = by_hand.tiny_lm(0.05), by_hand.tiny_lm()
    rows = by_hand.all_rows(lm)
    loss = MCU(base=base, components=5, first_depth=0.5, last_depth=0.5, floor=-9.0)
    reference = ready(lm, frozen, rows, loss)
    path = (
        lm.anatomy.path(1, lm.anatomy.mlp) if base == "mlp_breaking" else lm.anatomy.block_path(1)
    )
    seen: list[Tensor] = []
    hook = lm.core.get_submodule(path).register_forward_hook(
        lambda m, a, output: seen.append(output if torch.is_tensor(output) else output[0])
    )
    value = by_hand.values(lm, loss, reference, rows).sum()
    hook.remove()
    (gradient,) = torch.autograd.grad(value, seen)
    directions = reference.learned(loss.full_name, "directions.1")
    assert directions.shape == (5, 32)
    along = (gradient @ directions.T).abs().max()
    assert float(along) < 1e-5 * float(gradient.abs().max())


def test_micro_batches_do_not_matter_for_breaking_and_drift() -> None:
    lm, frozen = by_hand.tiny_lm(0.05), by_hand.tiny_lm()
    rows, loss, keep = (
        by_hand.all_rows(lm),
        MCU(**DEPTHS),
        drift(),
    )
    reference = ready(lm, frozen, rows, loss, keep)
    found = []
    for budget in (10**6, 1):
        passes = by_hand.passes_of(lm, loss, keep, reference, budget=budget)
        passes.both()
        found.append((passes.totals.forget, passes.totals.keep))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_the_floor_and_padding() -> None:
    states = torch.tensor([[[1.0, 0.0], [-3.0, 0.0], [float("nan"), 0.0]]], requires_grad=True)
    frozen = torch.tensor([[[2.0, 0.0], [2.0, 0.0], [0.0, 0.0]]])
    mask = torch.tensor([[True, True, False]])
    assert mlp_breaking(states, frozen, mask, 2.0, 0.0).tolist() == [0.5]
    assert mlp_breaking(states, frozen, mask, 2.0, -9.0).tolist() == [0.5 - 1.5]
    (gradient,) = torch.autograd.grad(mlp_breaking(states, frozen, mask, 2.0, 0.0).sum(), states)
    assert gradient[0].tolist() == [[0.5, 0.0], [0.0, 0.0], [0.0, 0.0]]


def test_drift_equals_loops_over_rows_alone() -> None:
    lm, frozen = by_hand.tiny_lm(0.05), by_hand.tiny_lm()
    rows, keep = by_hand.all_rows(lm), drift()
    reference = ready(lm, frozen, rows, keep)
    was = [torch.tensor(by_hand.block_output(frozen, row, 1)) for row in rows["retain"]]
    length = float(torch.cat(was).norm(dim=1).mean())
    wanted = [
        sum(math.dist(one, other) for one, other in zip(by_hand.block_output(lm, row, 1),
                                                        old.tolist(), strict=True)) / length
        for row, old in zip(rows["retain"], was, strict=True)
    ]  # fmt: skip
    assert by_hand.values(lm, keep, reference, rows).tolist() == pytest.approx(wanted, rel=1e-4)
    still = by_hand.values(frozen, keep, reference, rows).sum()
    assert float(still.detach()) < 1e-5
    assert by_hand.joined(by_hand.gradients(frozen, still)).isfinite().all()


def test_ranges_of_depths_are_in_order() -> None:
    with pytest.raises(RecipeError, match="first_depth is above"):
        MCU.build("objective 'mcu'", first_depth=0.9, last_depth=0.1)
    lm = by_hand.tiny_lm()
    assert MCU(first_depth=0.0, last_depth=1.0).reads(lm) == ("mlp.0", "mlp.1", "mlp.2")
    assert MCU(base="rmu", first_depth=1.0, last_depth=1.0).reference_kinds(lm) == ("hidden.2",)


# ---- the optimiser


def passes_over(
    lm: LM, loss: Objective, reference: Reference, *, budget: int = 10**6, part: str = "mlp."
) -> Passes:
    passes = by_hand.passes_of(lm, loss, None, reference, budget=budget)
    passes.parameters = [value for name, value in lm.core.named_parameters()
                         if ".1." in name and part in name and value.dim() == 2]  # fmt: skip
    return passes


def by_positions(lm: LM, passes: Passes, remove: Any, skip: bool = True) -> list[Tensor]:
    """The gradient of each weight from its inputs and output gradients, one position at a time."""
    total = [torch.zeros(p.shape, dtype=torch.float64) for p in passes.parameters]
    places = {id(p): place for place, p in enumerate(passes.parameters)}
    seen: list[tuple[int, Tensor, Tensor, bool]] = []

    def hook(module: Any, arguments: Any, output: Tensor) -> None:
        place = places[id(module.weight)]
        output.retain_grad()
        seen.append((place, arguments[0], output, hasattr(module, "nf")))

    hooks = [m.register_forward_hook(hook) for m in lm.core.modules()
             if id(getattr(m, "weight", None)) in places]  # fmt: skip
    passes.forget()
    for one in hooks:
        one.remove()
    for place, x, output, transposed in seen:
        assert output.grad is not None
        for row in range(x.shape[0]):
            for at in range(1 if skip else 0, x.shape[1]):
                if not bool((output.grad[row, at] != 0).any()):
                    continue
                left, right = remove(place, x[row, at].double(), output.grad[row, at].double())
                outer = torch.outer(left, right)
                total[place] += outer if transposed else outer.T
    passes.clear()
    return total


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("answers", [False, True])
def test_without_directions_cir_is_the_gradient_at_all_but_first_positions(
    family: str, answers: bool
) -> None:
    lm = LM(tiny_model(family), tiny_tokenizer(), precision="float32")
    frozen = lm.copy()
    rows = by_hand.all_rows(lm)
    lm.shares_prefix = False
    loss: Objective = GradientAscent() if answers else MCU(floor=-9.0, **DEPTHS)
    reference = ready(lm, frozen, rows, loss)
    for budget in (10**6, 1):
        passes = passes_over(lm, loss, reference, budget=budget)
        wanted = by_positions(lm, passes, lambda place, x, g: (x, g))
        CIR(inputs=0, outputs=0).forget(passes)
        for parameter, value in zip(passes.parameters, wanted, strict=True):
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, value.float(), rtol=1e-4, atol=1e-5)
            assert float(parameter.grad.norm()) > 1e-4


def test_a_shared_beginning_counts_once() -> None:
    lm = by_hand.tiny_lm(0.05)
    rows, loss, found = by_hand.all_rows(lm), GradientAscent(), []
    for sharing in (True, False):
        lm.shares_prefix = sharing
        passes = passes_over(lm, loss, ready(lm, lm, rows, loss))
        CIR(inputs=0, outputs=0).forget(passes)
        found.append([p.grad for p in passes.parameters])
        passes.clear()
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-5)


def test_cir_takes_the_shared_directions_out_of_both_sides() -> None:
    lm, frozen = by_hand.tiny_lm(0.05), by_hand.tiny_lm()
    rows, loss = by_hand.all_rows(lm), MCU(floor=-9.0, **DEPTHS)
    reference = ready(lm, frozen, rows, loss)
    passes = passes_over(lm, loss, reference)
    gathered: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def gather(place: int, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        gathered.setdefault(place, []).append((x, g))
        return x, g

    by_positions(lm, passes, gather)
    bases = {
        place: [components_by_hand(torch.stack([pair[side] for pair in pairs]), count)
                for side, count in ((0, 3), (1, 4))]
        for place, pairs in gathered.items()
    }  # fmt: skip

    def remove(place: int, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        for_x, for_g = bases[place]
        return x - for_x.T @ (for_x @ x), g - for_g.T @ (for_g @ g)

    wanted = by_positions(lm, passes, remove)
    for budget in (10**6, 1):
        other = passes_over(lm, loss, reference, budget=budget)
        CIR(inputs=3, outputs=4).forget(other)
        for parameter, value in zip(other.parameters, wanted, strict=True):
            assert parameter.grad is not None
            apart = float((parameter.grad - value.float()).norm() / value.norm())
            assert apart < 0.02  # directions are found by iterations
        other.clear()


def test_directions_are_found_anew_of_what_was_seen_since() -> None:
    lm, frozen = by_hand.tiny_lm(0.05), by_hand.tiny_lm()
    rows, loss = by_hand.all_rows(lm), MCU(floor=-9.0, **DEPTHS)
    passes = passes_over(lm, loss, ready(lm, frozen, rows, loss))
    harden, counts = CIR(inputs=2, outputs=2, refresh_steps=2), []
    for step in range(4):
        passes.step = step
        before = passes.memory.get("cir.inputs")
        harden.forget(passes)
        counts.append((passes.memory["cir.inputs"] is not before,
                       float(passes.memory["cir.count"][0])))  # fmt: skip
        passes.clear()
    one = counts[0][1]
    assert one == sum(len(row.encoded.ids) - 1 for row in rows["forget"])
    assert counts == [(True, one), (False, 2 * one), (True, one), (False, 2 * one)]


def test_cir_wants_a_linear_layer() -> None:
    lm = by_hand.tiny_lm()
    rows, loss = by_hand.all_rows(lm), GradientAscent()
    passes = passes_over(lm, loss, ready(lm, lm, rows, loss), part="no such part")
    with pytest.raises(RecipeError, match="no weight of a linear layer"):
        CIR().forget(passes)


@pytest.mark.parametrize("relative", [False, True])
def test_two_steps_equal_two_steps_by_hand(relative: bool) -> None:
    lm, frozen = by_hand.tiny_lm(0.05), by_hand.tiny_lm()
    rows, loss, keep = (
        by_hand.all_rows(lm),
        MCU(floor=-9.0, **DEPTHS),
        drift(),
    )
    reference = ready(lm, frozen, rows, loss, keep)
    passes = by_hand.passes_of(lm, loss, keep, reference)
    start = [parameter.detach().clone() for parameter in passes.parameters]
    TwoSteps(forget_norm=0.01, relative=relative, retain_rate=0.5).gradient(passes, NoHarden())
    assert all(torch.equal(p, s) for p, s in zip(passes.parameters, start, strict=True))
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in passes.parameters]
    passes.clear()
    passes.forget()
    forget = [torch.zeros_like(p) if p.grad is None else p.grad for p in passes.parameters]
    size = math.sqrt(sum(float(g.double().pow(2).sum()) for g in forget))
    own = math.sqrt(sum(float(s.double().pow(2).sum()) for s in start)) if relative else 1.0
    step = [g * (0.01 * own / size) for g in forget]
    assert math.sqrt(sum(float(g.pow(2).sum()) for g in step)) == pytest.approx(0.01 * own)
    passes.clear()
    with torch.no_grad():
        for parameter, one in zip(passes.parameters, step, strict=True):
            parameter.sub_(one)
    passes.keep()
    retain = [torch.zeros_like(p) if p.grad is None else p.grad for p in passes.parameters]
    for mine, one, other in zip(found, step, retain, strict=True):
        torch.testing.assert_close(mine, one + 0.5 * other, rtol=1e-4, atol=1e-6)


def trained(run: RunDirectory | None = None, name: str = "mcu", **training: Any) -> LM:
    lm = LM(tiny_model("llama"), tiny_tokenizer(), precision="float32")
    recipe = Recipe.named(name).changed({}, {
        "training.precision": "float32", "epochs": 6, "refresh_steps": 2,
        "utility_budget": None, **training})  # fmt: skip
    Trainer(lm, recipe, {"forget": FORGET, "retain": RETAIN}, context=Context(run=run)).train()
    return lm


def test_layers_above_the_last_that_is_read_stay() -> None:
    start = LM(tiny_model("llama"), tiny_tokenizer(), precision="float32")
    for name in ("mcu", "mcu_rmu"):
        lm = trained(name=name, max_steps=2)
        for (path, old), new in zip(start.model.named_parameters(), lm.model.parameters(),
                                    strict=True):  # fmt: skip
            moves = ".mlp." in path and ".2." not in path
            assert torch.equal(old, new) != moves, path


def test_a_resumed_run_ends_in_the_same_bits(tmp_path: Path) -> None:
    whole = trained(max_steps=5)
    run = RunDirectory(tmp_path / "run")
    run.begin({"command": "test"})

    class Stop(Exception):  # noqa: N818
        pass

    def interrupt(step: int, total: int, numbers: object) -> None:
        if step == 3:
            raise Stop

    lm = LM(tiny_model("llama"), tiny_tokenizer(), precision="float32")
    recipe = Recipe.named("mcu").changed({}, {
        "training.precision": "float32", "epochs": 6, "refresh_steps": 2, "utility_budget": None,
        "max_steps": 5, "checkpoint_steps": 1})  # fmt: skip
    records = {"forget": FORGET, "retain": RETAIN}
    with pytest.raises(Stop):
        Trainer(lm, recipe, records, context=Context(run=run, steps=interrupt)).train()
    again = LM(tiny_model("llama"), tiny_tokenizer(), precision="float32")
    Trainer(again, recipe, records, context=Context(run=run)).train()
    pairs = zip(whole.model.parameters(), again.model.parameters(), strict=True)
    assert all(torch.equal(mine, yours) for mine, yours in pairs)
