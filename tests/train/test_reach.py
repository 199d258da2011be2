"""A loss that could move nothing is refused, and one without a gradient is noticed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_engine import recipe, same, weights  # type: ignore[import-not-found]
from tiny_runs import make  # type: ignore[import-not-found]
from torch import Tensor

from delible import api
from delible.errors import RecipeError, RunError
from delible.lm.lm import LM
from delible.methods.objective.finetune import Finetune
from delible.methods.objective.unlikelihood import Unlikelihood
from delible.methods.place.layers import Layers
from delible.records import QA, ForgetRequest
from delible.train.engine import Trainer
from delible.train.reach import moved_blocks
from delible.train.recipe import Recipe
from delible.train.slots import Placement
from delible.train.step import Step


def rmu(layers: list[int], depth: float, keep: float) -> Recipe:
    return Recipe.from_mapping(
        {
            "name": "steered", "place": {"name": "layers", "layers": layers, "role": "mlp_out"},
            "objective": {"name": "rmu", "depth": depth},
            "keep": {"name": "hidden_mse", "depth": keep},
            "training": {"max_steps": 2, "batch_size": 4, "precision": "float32"},
        }
    )  # fmt: skip


@pytest.mark.parametrize(
    ("layers", "depth", "keep", "wrong"),
    [([1, 2], 0.0, 1.0, "objective 'rmu'"), ([2], 1.0, 0.5, "keep 'hidden_mse'")],
)
def test_a_layer_below_what_moves_is_refused_before_any_work(
    layers: list[int], depth: float, keep: float, wrong: str, forget: list[QA], retain: list[QA],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    lm, chosen = make(), rmu(layers, depth, keep)
    monkeypatch.setattr(LM, "generate", None)  # no question is asked
    request = ForgetRequest(forget=tuple(forget), retain=tuple(retain))
    for start in (
        lambda: api.unlearn(lm, request, method=chosen),
        lambda: api.plan_of(lm, request, method=chosen),
        lambda: Trainer(lm, chosen, {"forget": forget, "retain": retain}).train(),
    ):
        with pytest.raises(RecipeError, match=f"{wrong} is read off at layer"):
            start()


def test_it_is_refused_also_where_only_the_weights_tell(
    forget: list[QA], retain: list[QA], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = make()
    monkeypatch.setattr(Layers, "moving_blocks", lambda self, lm: None)
    apply, layers = Layers.apply, [1, 2]

    def applied(self: Layers, context: Any) -> Placement:
        names = {n for layer in layers for n in lm.anatomy.parameter_names(layer, "mlp_out")}
        found = {name: p for name, p in lm.core.named_parameters() if name in names}
        for name, value in lm.core.named_parameters():
            value.requires_grad_(name in found)
        return Placement(found)

    monkeypatch.setattr(Layers, "apply", applied)
    assert apply is not applied
    with pytest.raises(RecipeError, match="objective 'rmu' is read off at layer 0"):
        Trainer(lm, rmu([1, 2], 0.0, 1.0), {"forget": forget, "retain": retain}).train()


def test_a_layer_that_moves_is_taken(forget: list[QA], retain: list[QA]) -> None:
    lm = make()
    before = weights(lm)
    Trainer(lm, rmu([1], 0.5, 1.0), {"forget": forget, "retain": retain}).train()
    assert not same(weights(lm), before)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox", "mixtral"])
def test_the_first_block_that_changes(family: str) -> None:
    lm = make(family)
    parameters = dict(lm.core.named_parameters())
    for layer in range(3):
        for role in ("attention", "mlp_out", "block"):
            names = lm.anatomy.parameter_names(layer, role)  # type: ignore[arg-type]
            assert moved_blocks(lm, [parameters[name] for name in names]) == [layer]
    assert moved_blocks(lm, parameters.values()) == [0, 1, 2, 3]
    embedding = lm.core.get_submodule(lm.anatomy.embedding).weight
    assert moved_blocks(lm, [embedding]) == [0]
    assert lm.anatomy.norm is not None
    norm = list(lm.core.get_submodule(lm.anatomy.norm).parameters())
    assert moved_blocks(lm, norm) == [3]
    head = lm.core.get_submodule(lm.anatomy.head).weight
    assert moved_blocks(lm, [head]) == [0 if head is embedding else 3]
    assert moved_blocks(lm, []) == []


# ---- rows that a loss says nothing about


def ceu(**options: Any) -> Recipe:
    chosen: Recipe = recipe("ceu", epochs=1, **options)
    return chosen


def test_rows_that_are_too_short_for_the_loss_are_refused_or_said(
    caplog: pytest.LogCaptureFixture, retain: list[QA]
) -> None:
    short = [QA(question=f"Letter {n}?", answer="abc"[n]) for n in range(3)]  # and the turn's end
    lm = make()
    before = weights(lm)
    with pytest.raises(RecipeError, match="says nothing about any of the 3 answers"):
        Trainer(lm, ceu(ignore_first_n=2), {"forget": short, "retain": retain}).train()
    assert same(weights(lm), before)
    rows = [*short, QA(question="Where?", answer="Over there.")]
    result = Trainer(lm, ceu(ignore_first_n=2), {"forget": rows, "retain": retain}).train()
    assert result.notes["rows_without_effect"] == 3
    assert [line for line in caplog.messages if "says nothing about 3 of 4 answers" in line]
    result = Trainer(lm, ceu(), {"forget": rows, "retain": retain}).train()
    assert "rows_without_effect" not in result.notes


def test_undial_on_names_says_which_answers_have_none(
    caplog: pytest.LogCaptureFixture, retain: list[QA]
) -> None:
    rows = [
        QA(question="Who bakes?", answer="It is Ada Brook."),
        QA(question="How?", answer="well"),
    ]
    chosen = recipe("undial", epochs=1, focus="names")
    result = Trainer(make(), chosen, {"forget": rows, "retain": retain}).train()
    assert result.notes["rows_without_effect"] == 1


# ---- the first gradient


def known(forget: list[QA], retain: list[QA]) -> LM:
    """A model that knows the rows by heart."""
    lm = make()
    learning = recipe("finetune", epochs=40, learning_rate=1e-2, batch_size=16)
    Trainer(lm, learning, {"forget": [*forget, *retain]}).train()
    return lm


def unlike(keep: str, weigh: str = "none") -> Recipe:
    return Recipe.from_mapping(
        {
            "name": "broken", "objective": "unlikelihood", "keep": keep, "weigh": weigh,
            "training": {"max_steps": 2, "batch_size": 4, "learning_rate": 1e-3,
                         "precision": "float32"},
        }
    )  # fmt: skip


@pytest.mark.parametrize("keep", ["none", "nll"])
@pytest.mark.parametrize("way", ["detached", "times zero"])
def test_a_forget_loss_whose_gradient_is_lost_is_an_error(
    keep: str, way: str, forget: list[QA], retain: list[QA], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, original = known(forget, retain), Unlikelihood.loss

    def lost(self: Unlikelihood, step: Step) -> Tensor:
        value = original(self, step)
        if way == "times zero":
            return value * 0
        # the value still hangs on the graph, but by nothing that matters
        return value.detach() + 0 * step.forget.answer_states.sum()

    monkeypatch.setattr(Unlikelihood, "loss", lost)
    before = weights(lm)
    with pytest.raises(RunError, match="the forget loss has no gradient on any weight"):
        Trainer(lm, unlike(keep), {"forget": forget, "retain": retain}).train()
    assert same(weights(lm), before)


def test_a_loss_without_any_graph_is_an_error_too(
    forget: list[QA], retain: list[QA], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, original = known(forget, retain), Unlikelihood.loss
    monkeypatch.setattr(Unlikelihood, "loss", lambda self, step: original(self, step).detach())
    with pytest.raises(RunError, match="the forget loss has no gradient on any weight"):
        Trainer(lm, unlike("nll"), {"forget": forget, "retain": retain}).train()


@pytest.mark.parametrize("keep", ["none", "nll"])
def test_what_is_forgotten_already_is_no_error(
    caplog: pytest.LogCaptureFixture,
    keep: str,
    forget: list[QA],
    retain: list[QA],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A random model gives the answers no probability: a bounded loss has nothing left to do."""
    original = Unlikelihood.loss
    monkeypatch.setattr(Unlikelihood, "loss", lambda self, step: original(self, step) * 0)
    records = {"forget": forget, "retain": retain}
    if keep == "none":  # nothing else moves then, which is an error of its own
        with pytest.raises(RunError, match="nothing moved"):
            Trainer(make(), unlike(keep), records).train()
    else:
        Trainer(make(), unlike(keep), records).train()
    assert [line for line in caplog.messages if "nothing left to do" in line]


def test_a_loss_that_teaches_and_is_satisfied_is_no_error(
    caplog: pytest.LogCaptureFixture,
    forget: list[QA],
    retain: list[QA],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lm, original = known(forget, retain), Finetune.loss
    monkeypatch.setattr(Finetune, "loss", lambda self, step: original(self, step) * 0)
    chosen = recipe("finetune", epochs=1).changed({"keep": "nll"}, {})
    Trainer(lm, chosen, {"forget": forget, "retain": retain}).train()
    assert [line for line in caplog.messages if "nothing left to do" in line]


@pytest.mark.parametrize("options", [{"forget_weight": 0.0}, {}])
def test_a_weight_of_zero_is_no_error(
    caplog: pytest.LogCaptureFixture,
    options: dict[str, float],
    forget: list[QA],
    retain: list[QA],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lm = known(forget, retain)
    original = Unlikelihood.loss
    if options:
        monkeypatch.setattr(Unlikelihood, "loss", lambda self, step: original(self, step) * 0)
    else:
        from delible.methods.weigh.none import Equal

        monkeypatch.setattr(
            Equal, "weights", lambda self, context: torch.zeros(len(context.rows["forget"]))
        )
    chosen = unlike("nll").changed({}, dict(options))
    Trainer(lm, chosen, {"forget": forget, "retain": retain}).train()
    assert not [line for line in caplog.messages if "no gradient" in line]


def test_a_sound_loss_says_nothing(
    caplog: pytest.LogCaptureFixture, forget: list[QA], retain: list[QA]
) -> None:
    chosen = unlike("nll")
    for place in ("all", "lora"):
        lm = known(forget, retain)
        records = {"forget": forget, "retain": retain}
        Trainer(lm, chosen.changed({"place": place}, {}), records).train()
    assert not [line for line in caplog.messages if "gradient" in line]
