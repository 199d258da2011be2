"""Row weights by data attribution."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from delible.component import build
from delible.context import Context
from delible.errors import RecipeError
from delible.lm.lm import LM
from delible.methods.weigh.attribution import (
    Attribution,
    effective_rows,
    weights_from_scores,
)
from delible.records import QA
from delible.rundir import RunDirectory
from delible.testing.tiny import tiny_model, tiny_tokenizer
from delible.train.engine import Trainer
from delible.train.gradients import Gradients
from delible.train.recipe import Recipe
from delible.train.row import Row
from delible.train.rows import make_rows
from delible.train.slots import SlotContext

FAMILIES = ("llama", "gpt2")
FORGET = [
    QA(question=question, answer=answer)
    for question, answer in (
        ("Where was Ada born?", "In Norrby."), ("Who wrote Umber?", "Ben Orr did."),
        ("What is 3 x 4?", "12"), ("Snow?", "It is white."), ("Zzz", "qqqqqqq"),
        ("Name a river.", "The Casta, of course."), ("?", "!"),
    )
]  # fmt: skip
RETAIN = [
    QA(question="What is snow?", answer="It is white."),
    QA(question="What is coal?", answer="It is black."),
    QA(question="What is grass?", answer="It is green."),
]


def make_context(
    lm: LM, forget: Sequence[QA] = FORGET, retain: Sequence[QA] = RETAIN
) -> SlotContext:
    made = {
        "forget": make_rows(lm.template, forget),
        "retain": make_rows(lm.template, retain),
    }
    records = {"forget": forget, "retain": retain}
    objective = build("objective", "gradient_ascent")
    return SlotContext(lm, made, records, Gradients(lm), objective, None, 0)


def make_lm(family: str = "llama", seed: int = 0) -> LM:
    return LM(tiny_model(family, seed), tiny_tokenizer(), precision="float32")


def row_loss(model: Any, row: Row) -> torch.Tensor:
    ids = torch.tensor(row.encoded.ids)[None]
    logprobs = model(input_ids=ids).logits[0, :-1].log_softmax(dim=1)
    return -logprobs.gather(1, ids[0, 1:, None])[row.encoded.start - 1 :].mean()


def exact_scores(lm: LM, forget: Sequence[Row], retain: Sequence[Row]) -> torch.Tensor:
    """Dot products in float64, one backward pass per row."""
    twin = lm.copy().model.double().requires_grad_(True)
    parameters = list(twin.parameters())

    def gradient(row: Row) -> torch.Tensor:
        parts = torch.autograd.grad(row_loss(twin, row), parameters, allow_unused=True)
        return torch.cat(
            [
                torch.zeros_like(value).flatten() if part is None else part.flatten()
                for value, part in zip(parameters, parts, strict=True)
            ]
        )

    mean = torch.stack([gradient(row) for row in retain]).mean(dim=0)
    return torch.stack([gradient(row) @ mean for row in forget])


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_those_of_exact_dot_products(
    caplog: pytest.LogCaptureFixture, family: str
) -> None:
    lm = make_lm(family)
    context = make_context(lm)
    scores = exact_scores(lm, context.rows["forget"], context.rows["retain"])
    mean_gradient = {n: v / 3 for n, v in context.gradients.total(context.rows["retain"]).items()}
    found = context.gradients.products(context.rows["forget"], mean_gradient)
    assert torch.allclose(found, scores, rtol=0.02, atol=0.02 * float(scores.abs().median()))
    assert torch.equal(found.argsort(), scores.argsort())  # Spearman 1

    weights = build("weigh", "attribution").weights(context)
    standard = (scores - scores.mean()) / scores.std(correction=0)
    expected = (-standard / 2).exp() / (-standard / 2).exp().mean()
    assert torch.allclose(weights.double(), expected, rtol=0.02)
    assert "effective of 7 forget rows" in caplog.messages[0]


@pytest.mark.parametrize("form", ["softmax", "inverse"])
def test_weights_have_mean_one_and_fall_with_the_score(form: Any) -> None:
    scores = torch.randn(50, generator=torch.Generator().manual_seed(0)) * 1e4
    weights = weights_from_scores(scores, form, 2.0, 1.0)
    assert float(weights.mean()) == pytest.approx(1, abs=1e-9)
    ordered = weights[scores.argsort()]
    assert bool((ordered[1:] < ordered[:-1]).all())
    assert float(ordered[-1]) > 0
    # the scale and the origin of the scores do not matter
    assert torch.allclose(
        weights, weights_from_scores(scores * 1e-6 + 3, form, 2.0, 1.0), rtol=1e-4
    )


def test_forms_in_numbers() -> None:
    scores = torch.tensor([1.0, 3.0])  # standardised: -1, 1
    softmax = weights_from_scores(scores, "softmax", 1.0, 1.0)
    assert softmax.tolist() == pytest.approx([1.7615941559, 0.2384058440])  # 2 / (1 + e^∓2)
    inverse = weights_from_scores(scores, "inverse", 1.0, 1.0)
    assert inverse.tolist() == pytest.approx([1.5, 0.5])  # 1 / 1 and 1 / 3, mean 2 / 3


def test_a_high_temperature_and_equal_scores_give_equal_weights() -> None:
    scores = torch.tensor([1.0, 5.0, -2.0])
    assert torch.allclose(
        weights_from_scores(scores, "softmax", 1e9, 1.0), torch.ones(3).double(), atol=1e-6
    )
    for equal in (torch.ones(4), torch.zeros(1)):
        assert torch.equal(weights_from_scores(equal, "softmax", 2.0, 1.0), torch.ones_like(equal))


def test_effective_rows(caplog: pytest.LogCaptureFixture) -> None:
    assert effective_rows(torch.ones(5)) == pytest.approx(5)
    assert effective_rows(torch.tensor([5.0, 0, 0, 0, 0])) == pytest.approx(1)
    context = make_context(make_lm())
    build("weigh", {"name": "attribution", "temperature": 0.01}).weights(context)
    assert "raise the temperature" in caplog.messages[-1]


def test_an_ascent_step_raises_the_retain_loss_by_the_score() -> None:
    lm = make_lm()
    context = make_context(lm)
    forget, retain = context.rows["forget"], context.rows["retain"]
    scores = exact_scores(lm, forget, retain)
    eta = 1e-6
    for index in (0, 3, 6):
        twin = lm.copy().model.double().requires_grad_(True)
        before = sum(float(row_loss(twin, row)) for row in retain) / 3
        row_loss(twin, forget[index]).backward()
        with torch.no_grad():
            for value in twin.parameters():
                if value.grad is not None:
                    value.add_(value.grad, alpha=eta)
        after = sum(float(row_loss(twin, row)) for row in retain) / 3
        assert after - before == pytest.approx(eta * float(scores[index]), rel=0.1)


def test_rows_that_repeat_retain_content_weigh_less() -> None:
    other = [QA(question="Zq7?", answer="vxj kpw"), QA(question="Qy9!", answer="jjx wvk zq")]
    context = make_context(make_lm(), forget=[*RETAIN[:2], *other])
    weights = build("weigh", "attribution").weights(context)
    assert float(weights[:2].max()) < float(weights[2:].min())
    assert float(weights.mean()) == pytest.approx(1, abs=1e-6)


def train(
    lm: LM,
    weigh: Any,
    forget: Sequence[QA],
    *,
    run: RunDirectory | None = None,
    progress: Any = None,
    **training: Any,
) -> LM:
    recipe = Recipe.from_mapping(
        {
            "objective": "gradient_ascent",
            "weigh": weigh,
            "training": {"batch_size": 4, "max_length": 128, **training},
        }
    )
    records = {"forget": forget, "retain": RETAIN}
    return Trainer(lm, recipe, records, context=Context(run=run, steps=progress)).train().lm


def test_with_a_high_temperature_training_is_that_of_the_host_bit_by_bit() -> None:
    weights = []
    for weigh in ("none", {"name": "attribution", "temperature": 1e12}, "attribution"):
        lm = train(make_lm(), weigh, FORGET, epochs=2, learning_rate=1e-4)
        weights.append([value.detach() for value in lm.model.parameters()])
    host, equal, guarded = weights
    assert all(map(torch.equal, host, equal))
    assert not all(map(torch.equal, host, guarded))


def test_rows_are_weighed_anew_at_the_model_as_it_is_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[torch.Tensor] = []
    weigh = Attribution.weights

    def noted(self: Attribution, context: SlotContext) -> torch.Tensor:
        made.append(weigh(self, context))
        return made[-1]

    monkeypatch.setattr(Attribution, "weights", noted)
    ends = []
    for every in (0, 2, 9):
        made.clear()
        spec = {"name": "attribution", "refresh_every": every}
        lm = train(make_lm(), spec, FORGET, epochs=5, learning_rate=1e-3)
        ends.append([value.detach() for value in lm.model.parameters()])
        assert len(made) == {0: 1, 2: 3, 9: 1}[every]
        if every == 2:
            assert not torch.equal(made[0], made[1])
    assert all(map(torch.equal, ends[0], ends[2]))
    assert not all(map(torch.equal, ends[0], ends[1]))


def test_weights_made_anew_survive_an_interruption(tmp_path: Path) -> None:
    spec = {"name": "attribution", "refresh_every": 2}
    whole = train(make_lm(), spec, FORGET, epochs=6, learning_rate=1e-3)

    class StopError(Exception):
        pass

    def stop(step: int, total: int, numbers: object) -> None:
        if step == total // 2 + 1:  # in the middle of two epochs with one set of weights
            raise StopError

    run = RunDirectory(tmp_path / "run")
    run.begin({"name": "weighed"})
    again = make_lm()
    options: dict[str, Any] = {"epochs": 6, "learning_rate": 1e-3, "checkpoint_steps": 1}
    with pytest.raises(StopError):
        train(make_lm(), spec, FORGET, run=run, progress=stop, **options)
    train(again, spec, FORGET, run=run, **options)
    assert all(map(torch.equal, whole.model.parameters(), again.model.parameters()))


@pytest.mark.parametrize("seed", range(3))
def test_after_equal_steps_the_retain_loss_has_risen_less_than_under_uniform_ascent(
    seed: int,
) -> None:
    other = [QA(question="Zq7?", answer="vxj kpw"), QA(question="Qy9!", answer="jjx wvk zq")]
    forget = [*RETAIN[:2], *other]
    retained, forgotten = [], []
    for weigh in ("none", {"name": "attribution", "temperature": 0.5}):
        lm = make_lm(seed=seed)
        before = make_rows(lm.template, RETAIN)
        start = sum(float(row_loss(lm.model, row).detach()) for row in before)
        train(lm, weigh, forget, epochs=4, learning_rate=3e-4)
        retained.append(sum(float(row_loss(lm.model, row).detach()) for row in before) - start)
        rows = make_rows(lm.template, other)
        forgotten.append(sum(float(row_loss(lm.model, row).detach()) for row in rows))
    uniform, guarded = retained
    assert guarded < 0.9 * uniform
    assert forgotten[1] > forgotten[0]  # the pressure went to the rows that share nothing


def test_the_model_is_left_as_it_was() -> None:
    lm = make_lm()
    before = [value.detach().clone() for value in lm.model.parameters()]
    context = make_context(lm)
    first = build("weigh", "attribution").weights(context)
    assert all(map(torch.equal, before, lm.model.parameters()))
    assert all(value.grad is None for value in lm.model.parameters())
    assert torch.equal(first, build("weigh", "attribution").weights(context))


def test_hosts_without_a_retain_loss_get_retain_rows_too() -> None:
    context = make_context(make_lm())
    recipe = Recipe.named("gradient_ascent").changed({"weigh": "attribution"}, {})
    rows = Trainer(context.lm, recipe, context.records).rows().rows["retain"]
    assert [row.key for row in rows] == [row.key for row in context.rows["retain"]]


def test_no_retain_records_is_an_error_that_says_what_to_give() -> None:
    context = make_context(make_lm(), retain=())
    with pytest.raises(RecipeError, match="--retain FILE"):
        build("weigh", "attribution").weights(context)
