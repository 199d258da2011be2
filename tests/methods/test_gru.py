"""Gradient rectified unlearning: the rule on vectors, on a model in float64, and over a resume."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import losses_by_hand as by_hand
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from delible.component import build
from delible.context import Context
from delible.errors import RecipeError
from delible.lm.lm import LM
from delible.methods.balance.gru import GRU, inner, rectify_, smooth_
from delible.methods.harden.none import NoHarden
from delible.methods.keep.nll import NLL
from delible.methods.objective.gradient_ascent import GradientAscent
from delible.methods.objective.rmu import RMU
from delible.records import QA
from delible.rundir import RunDirectory
from delible.train.engine import Trainer
from delible.train.passes import Passes
from delible.train.recipe import Recipe

FORGET = [QA(question=f"Who is {n}?", answer=f"A {job}.", subject=n)
          for n, job in (("Ada", "baker"), ("Ben", "pilot"), ("Cy", "clown"),
                         ("Di", "judge"))]  # fmt: skip
RETAIN = [QA(question=f"What is {n}?", answer=c)
          for n, c in (("snow", "White."), ("coal", "Black."), ("grass", "Green."))]  # fmt: skip


def vectors(*values: tuple[float, ...]) -> list[list[Tensor]]:
    return [[torch.tensor(value)] for value in values]


# ---- the rule


def test_a_conflict_in_the_plane() -> None:
    gradient, retain = vectors((1.0, 0.0), (-1.0, 1.0))
    assert rectify_(gradient, retain) == pytest.approx(-math.sqrt(0.5))
    assert gradient[0].tolist() == pytest.approx([0.5, 0.5])
    assert retain[0].tolist() == [-1.0, 1.0]


def test_without_a_conflict_nothing_changes() -> None:
    for other in ((1.0, 1.0), (0.0, 2.0), (0.0, 0.0)):
        gradient, retain = vectors((1.0, 0.0), other)
        assert rectify_(gradient, retain) >= 0
        assert gradient[0].tolist() == [1.0, 0.0]


def test_the_clip_limits_what_is_removed() -> None:
    gradient, retain = vectors((1.0, 0.0), (-1.0, 1.0))  # cosine -0.707
    rectify_(gradient, retain, -0.5)
    # subtracts |g| * (-0.5) / |m| * m with |g| = 1, |m| = sqrt(2)
    kept = 0.5 / math.sqrt(2)
    assert gradient[0].tolist() == pytest.approx([1 - kept, kept])
    opposite, retain = vectors((2.0, 0.0), (-3.0, 0.0))  # cosine -1: half is removed
    assert rectify_(opposite, retain, -0.5) == pytest.approx(-1)
    assert opposite[0].tolist() == pytest.approx([1.0, 0.0])
    gentle, retain = vectors((1.0, 0.0), (-0.1, 1.0))  # above the clip: all of it is removed
    rectify_(gentle, retain, -0.5)
    assert inner(gentle, retain) == pytest.approx(0, abs=1e-7)


def test_many_tensors_are_one_vector() -> None:
    random = torch.Generator().manual_seed(0)
    shapes = ((300, 40), (40,), (7, 5, 3))
    gradient = [torch.randn(shape, generator=random) for shape in shapes]
    retain = [torch.randn(shape, generator=random) - 0.3 * g
              for shape, g in zip(shapes, gradient, strict=True)]  # fmt: skip
    before = [value.double() for value in gradient]
    joined = torch.cat([value.double().flatten() for value in retain])
    flat = torch.cat([value.flatten() for value in before])
    expected = flat - (flat @ joined) / (joined @ joined) * joined
    assert flat @ joined < 0
    rectify_(gradient, retain)
    found = torch.cat([value.double().flatten() for value in gradient])
    assert torch.allclose(found, expected, atol=1e-6)
    cosine = inner(gradient, retain) / math.sqrt(inner(gradient, gradient) * inner(retain, retain))
    assert abs(cosine) < 1e-6


def test_the_average_takes_the_papers_path() -> None:
    average = [torch.zeros(1)]
    seen = []
    for value in (1.0, 2.0, -1.0):
        smooth_(average, [torch.tensor([value])], 0.8)
        seen.append(float(average[0]))
    assert seen == pytest.approx([0.8, 0.2 * 0.8 + 0.8 * 2, 0.2 * 1.76 - 0.8])


# ---- on a model


def in_float64(lm: LM, passes: Passes, role: str) -> Tensor:
    """The gradient of one loss, in plain PyTorch: all parameters, one after the other."""
    twin: Any = lm.copy().model.double().requires_grad_(True)
    total: Any = 0.0
    for micro in passes.micro_batches:
        rows = micro.forget["forget"] if role == "forget" else micro.retain
        weights = micro.forget_weights if role == "forget" else micro.retain_weights
        for row, weight in zip(rows, weights, strict=True):
            ids = torch.tensor(row.encoded.ids)[None]
            logprobs = twin(input_ids=ids).logits[0, :-1].log_softmax(dim=1)
            chosen = logprobs.gather(1, ids[0, 1:, None])[row.encoded.start - 1 :].sum()
            total = total + weight * chosen
    total = total / passes.forget_units if role == "forget" else -total / passes.retain_units
    return torch.cat([part.flatten() for part in torch.autograd.grad(total, [*twin.parameters()])])


def flat(passes: Passes) -> Tensor:
    return torch.cat([value.grad.double().flatten() for value in passes.parameters])  # type: ignore[union-attr]


def made(lm: LM, budget: int = 10**6) -> Passes:
    lm.model.requires_grad_(True)
    return by_hand.passes_of(lm, GradientAscent(), NLL(), by_hand.Reference(), budget=budget)


@pytest.mark.parametrize("budget", [10**6, 40])
@pytest.mark.parametrize("options", [{}, {"keep_weight": 0.5}, {"cosine_clip": -0.05}])
def test_two_steps_in_float64(budget: int, options: dict[str, float]) -> None:
    balance = GRU(momentum=0.8, **options)
    memory: dict[str, list[Tensor]] = {}
    average: Any = 0.0
    cosines = []
    for moved in (0.0, 0.05):
        lm = by_hand.tiny_lm(moved)
        passes = made(lm, budget)
        passes.memory = memory
        forget, retain = (in_float64(lm, passes, role) for role in ("forget", "retain"))
        average = 0.8 * retain + 0.2 * average
        cosine = float(forget @ average / (forget.norm() * average.norm()))
        cosines.append(cosine)
        clipped = max(cosine, options.get("cosine_clip", -1.0))
        expected = forget
        if cosine < 0:
            expected = forget - forget.norm() * clipped / average.norm() * average
        expected = expected + options.get("keep_weight", 0.0) * retain
        balance.gradient(passes, NoHarden())
        assert float((flat(passes) - expected).norm()) < 2e-4 * float(expected.norm())
    assert min(cosines) < -0.05, "the test needs a conflict"
    kept = torch.cat([value.double().flatten() for value in memory["gru.retain_gradient"]])
    assert float((kept - average).norm()) < 1e-4 * float(average.norm())


def test_the_update_does_not_climb_the_retain_loss() -> None:
    lm = by_hand.tiny_lm()
    passes = made(lm)
    passes.keep()
    retain = flat(passes)
    passes.clear()
    passes.forget()
    plain = flat(passes)
    passes.clear()
    GRU().gradient(passes, NoHarden())
    rectified = flat(passes)
    assert float(plain @ retain / (plain.norm() * retain.norm())) < -0.05
    assert abs(float(rectified @ retain / (rectified.norm() * retain.norm()))) < 1e-6
    assert passes.totals.forget != 0.0
    assert passes.totals.keep > 0.0


def test_what_no_loss_reaches_has_no_gradient() -> None:
    # the forget loss ends below the last block: only the retain loss reaches it, nothing reaches
    # a parameter that neither uses
    lm = by_hand.tiny_lm()
    lm.model.requires_grad_(True)
    spare = torch.nn.Parameter(torch.ones(3))
    rmu = RMU(depth=0.0)
    reference = by_hand.prepared(lm.copy(), by_hand.all_rows(lm), rmu)
    passes = by_hand.passes_of(lm, rmu, NLL(), reference)
    passes.parameters = [*passes.parameters, spare]
    GRU().gradient(passes, NoHarden())
    assert spare.grad is None
    assert all(value.grad is not None for value in passes.parameters[:-1])


def test_memory_is_written_once_a_step_is_done() -> None:
    class Failing(Passes):
        def keep(self) -> None:
            raise MemoryError

    passes = made(by_hand.tiny_lm())
    fields = {name: getattr(passes, name) for name in passes.__dataclass_fields__}
    GRU().gradient(passes, NoHarden())
    before = [value.clone() for value in passes.memory["gru.retain_gradient"]]
    passes.clear()
    with pytest.raises(MemoryError):
        GRU().gradient(Failing(**fields), NoHarden())
    assert fields["memory"] is passes.memory
    assert all(map(torch.equal, before, passes.memory["gru.retain_gradient"]))


def test_a_retain_loss_is_required() -> None:
    passes = by_hand.passes_of(by_hand.tiny_lm(), GradientAscent(), None, by_hand.Reference())
    with pytest.raises(RecipeError, match="retain loss"):
        GRU().gradient(passes, NoHarden())


@pytest.mark.parametrize(
    "options", [{"momentum": 0.0}, {"momentum": 1.5}, {"cosine_clip": 0.5}, {"keep_weight": -1}]
)
def test_wrong_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(RecipeError):
        build("balance", {"name": "gru", **options})


# ---- over a whole run


class StopError(Exception):
    pass


def train(run: RunDirectory | None = None, stop_after: int = 0) -> list[Tensor]:
    recipe = Recipe.from_mapping(
        {
            "objective": "gradient_ascent", "keep": "nll", "balance": "gru",
            "training": {"epochs": 3, "batch_size": 2, "learning_rate": 1e-3,
                         "precision": "float32", "checkpoint_steps": 1},
        }
    )  # fmt: skip

    def interrupt(step: int, total: int, numbers: object) -> None:
        if step == stop_after:
            raise StopError

    lm = by_hand.tiny_lm()
    records = {"forget": FORGET, "retain": RETAIN}
    Trainer(lm, recipe, records, context=Context(run=run, steps=interrupt)).train()
    return [value.detach().clone() for value in lm.model.parameters()]


def test_a_killed_run_resumes_with_its_average(tmp_path: Path) -> None:
    whole = train()
    ends = []
    for forgets_average in (False, True):
        run = RunDirectory(tmp_path / str(forgets_average))
        run.begin({"name": "gru"})
        with pytest.raises(StopError):
            train(run, stop_after=4)
        kept = run.path / "checkpoint" / "last" / "memory.safetensors"
        assert {name.partition("/")[0] for name in load_file(kept)} == {"gru.retain_gradient"}
        if forgets_average:
            kept.unlink()
        ends.append(train(run))
    assert all(map(torch.equal, whole, ends[0]))
    assert not all(map(torch.equal, whole, ends[1]))  # so the average matters here
