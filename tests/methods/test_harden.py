"""Hardening: the sharpness-aware gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from delible.component import build
from delible.lm.forward import Forward
from delible.lm.lm import LM
from delible.methods.harden.sam import ascend_
from delible.records import QA
from delible.testing.tiny import tiny_model, tiny_tokenizer
from delible.train.engine import Trainer
from delible.train.passes import Passes, split
from delible.train.recipe import Recipe
from delible.train.reference import Reference
from delible.train.rows import make_rows

FAMILIES = ("llama", "gpt2")
FORGET = [QA(question=f"Who is {name}?", answer=f"A {job}.") for name, job in
          (("Ada", "baker"), ("Ben", "pilot"), ("Cy", "clown"), ("Di", "judge"))]  # fmt: skip
RETAIN = [QA(question="What is snow?", answer="White."), QA(question="And coal?", answer="Black.")]


def make_passes(lm: LM, *, pieces: int = 1, weights: tuple[float, float] = (1.0, 1.0)) -> Passes:
    lm.model.requires_grad_(True)
    forget, retain = make_rows(lm.template, FORGET), make_rows(lm.template, RETAIN)
    return Passes(
        lm=lm,
        forward=Forward(lm),
        objective=build("objective", "gradient_ascent"),
        keep_loss=build("keep", "nll"),
        reads={"forget": ("answers",), "retain": ("answers",)},
        reference=Reference(),
        micro_batches=split(
            {"forget": forget}, retain, [1.0] * len(forget), [1.0] * len(retain), 100_000, pieces
        ),
        parameters=list(lm.model.parameters()),
        weights=weights,
        forget_units=sum(row.units("answer_token") for row in forget),
        retain_units=sum(row.units("answer_token") for row in retain),
    )


def make_lm(family: str) -> LM:
    return LM(tiny_model(family), tiny_tokenizer(), precision="float32")


def gradients(passes: Passes) -> list[torch.Tensor]:
    return [
        torch.zeros_like(value) if value.grad is None else value.grad.clone()
        for value in passes.parameters
    ]


def by_hand(lm: LM, passes: Passes, rho: float) -> tuple[list[torch.Tensor], float]:
    """The hardened gradient and the loss in float64, in plain PyTorch."""
    twin = tiny_twin(lm)
    rows = [row for micro in passes.micro_batches for row in micro.forget["forget"]]

    def loss() -> torch.Tensor:
        total: Any = 0.0
        for row in rows:
            ids = torch.tensor(row.encoded.ids)[None]
            logprobs = twin(input_ids=ids).logits[0, :-1].log_softmax(dim=1)
            total = total + logprobs.gather(1, ids[0, 1:, None])[row.encoded.start - 1 :].sum()
        return total / passes.forget_units

    parameters = list(twin.parameters())
    value = loss()
    first = torch.autograd.grad(value, parameters)
    norm = torch.sqrt(sum(part.square().sum() for part in first))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter, part in zip(parameters, first, strict=True):
            parameter.add_(part * rho / norm)
    return list(torch.autograd.grad(loss(), parameters)), float(value.detach())


def tiny_twin(lm: LM) -> Any:
    return lm.copy().model.double().requires_grad_(True)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pieces", [1, 3])
def test_the_gradient_is_that_of_a_float64_derivation(family: str, pieces: int) -> None:
    lm = make_lm(family)
    passes = make_passes(lm, pieces=pieces)
    expected, loss = by_hand(lm, passes, 0.5)
    plain = make_passes(lm)
    plain.forget()
    unhardened = torch.cat([part.flatten() for part in gradients(plain)])
    plain.clear()
    build("harden", {"name": "sam", "rho": 0.5}).forget(passes)
    found = torch.cat([part.flatten() for part in gradients(passes)])
    wanted = torch.cat([part.flatten() for part in expected]).float()
    assert float((found - wanted).norm()) < 1e-4 * float(wanted.norm())
    assert float((found - unhardened).norm()) > 1e-2 * float(wanted.norm())
    # what is reported is the loss where the weights are
    assert passes.totals.forget == pytest.approx(loss, rel=1e-5)


def test_no_radius_is_the_host_gradient_bit_by_bit() -> None:
    lm = make_lm("llama")
    host, hardened = make_passes(lm), make_passes(lm)
    host.forget()
    expected = gradients(host)
    host.clear()
    build("harden", {"name": "sam", "rho": 0.0}).forget(hardened)
    assert all(map(torch.equal, expected, gradients(hardened)))
    assert hardened.totals.tokens == host.totals.tokens  # one pass, not two


def test_a_vanishing_radius_gives_the_gradient_of_npo() -> None:
    lm = make_lm("llama")
    frozen = lm.copy()
    with torch.no_grad():
        for value in lm.model.parameters():
            value.mul_(1.02)
    rows = make_rows(lm.template, FORGET)
    reference = Reference()
    reference.prepare(frozen, rows, ("logprobs",))

    def found(rho: float | None) -> torch.Tensor:
        passes = make_passes(lm)
        passes.objective, passes.reference = build("objective", "npo"), reference
        passes.forget_units = len(rows)
        passes.clear()
        if rho is None:
            passes.forget()
        else:
            build("harden", {"name": "sam", "rho": rho}).forget(passes)
        return torch.cat([part.flatten() for part in gradients(passes)])

    plain = found(None)
    near, far = (float((found(rho) - plain).norm() / plain.norm()) for rho in (1e-4, 1e-2))
    assert near < 1e-2
    assert near > 0  # a second pass was made
    assert far > 10 * near


class Watched(Passes):
    """Remembers the weights at each forget pass."""

    def forget(self) -> None:
        self.__dict__.setdefault("seen", []).append(
            [value.detach().clone() for value in self.parameters]
        )
        super().forget()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_perturbation_has_length_rho_and_weights_come_back(family: str) -> None:
    lm = make_lm(family)
    plain = make_passes(lm)
    passes = Watched(**{name: getattr(plain, name) for name in plain.__dataclass_fields__})
    before = [value.detach().clone() for value in passes.parameters]
    build("harden", {"name": "sam", "rho": 0.05}).forget(passes)
    start, moved = passes.__dict__["seen"]
    squares = sum(
        float((b.double() - a.double()).square().sum()) for a, b in zip(start, moved, strict=True)
    )
    assert squares**0.5 == pytest.approx(0.05, rel=1e-3)
    assert all(map(torch.equal, before, passes.parameters))


def test_weights_come_back_when_a_pass_fails() -> None:
    class Failing(Passes):
        def forget(self) -> None:
            if any(value.grad is not None for value in self.parameters) or self.totals.tokens:
                raise MemoryError
            super().forget()

    lm = make_lm("llama")
    plain = make_passes(lm)
    passes = Failing(**{name: getattr(plain, name) for name in plain.__dataclass_fields__})
    before = [value.detach().clone() for value in passes.parameters]
    with pytest.raises(MemoryError):
        build("harden", "sam").forget(passes)
    assert all(map(torch.equal, before, passes.parameters))


def test_earlier_gradients_are_added_to() -> None:
    lm = make_lm("llama")
    sam = build("harden", {"name": "sam", "rho": 0.05})
    alone, after, keep = make_passes(lm), make_passes(lm), make_passes(lm)
    sam.forget(alone)
    hardened = gradients(alone)
    alone.clear()
    keep.keep()
    kept = gradients(keep)
    keep.clear()
    after.keep()
    sam.forget(after)  # the retain gradient must neither steer the perturbation nor be lost
    for found, one, other in zip(gradients(after), hardened, kept, strict=True):
        assert torch.allclose(found, one + other, rtol=1e-5, atol=1e-7)


def test_no_gradient_moves_nothing() -> None:
    weights, zero = [torch.ones(3)], [torch.zeros(3)]
    assert ascend_(weights, zero, 1.0) == 0.0
    assert torch.equal(weights[0], torch.ones(3))
    assert ascend_(weights, [torch.tensor([float("inf"), 0, 0])], 1.0) == float("inf")
    assert torch.equal(weights[0], torch.ones(3))
    assert ascend_(weights, [torch.tensor([3.0, 4.0, 0.0])], 5.0) == pytest.approx(5.0)
    assert torch.allclose(weights[0], torch.tensor([4.0, 5.0, 1.0]))


def test_a_run_with_sam_differs_from_its_host_and_repeats() -> None:
    def run(harden: Any) -> Sequence[torch.Tensor]:
        lm = make_lm("llama")
        recipe = Recipe.from_mapping(
            {
                "objective": "npo", "keep": "nll", "harden": harden,
                "training": {"epochs": 1, "batch_size": 2, "learning_rate": 1e-3,
                             "max_length": 128},
            }
        )  # fmt: skip
        Trainer(lm, recipe, {"forget": FORGET, "retain": RETAIN}).train()
        return [value.detach() for value in lm.model.parameters()]

    host, hardened, again = run("none"), run("sam"), run("sam")
    assert all(map(torch.equal, hardened, again))
    assert not all(map(torch.equal, hardened, host))
