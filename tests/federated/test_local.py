"""A client's work on a tiny model: the engine that trains everything else, and FedProx's pull."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_clients import QUICK, fact, held, plain, run, values, worn

from delible.context import Context
from delible.errors import DataError, ModelError, RecipeError, RunError
from delible.federated import adapter as adapters
from delible.federated.adapter import bytes_of
from delible.federated.clients import Held
from delible.federated.federation import Federation
from delible.federated.in_process import InProcess
from delible.federated.local import WornAdapter, check, pull, work
from delible.federated.messages import Failure, Order, Task, Update
from delible.federated.rounds import Folder
from delible.federated.starting import blank, dressed
from delible.train.engine import Trainer
from delible.train.recipe import Recipe

NPO = Recipe.named("npo_lora").changed({}, {"epochs": 1, "batch_size": 4})


def task(order: Order, start: dict[str, Any], number: int = 0) -> Task:
    return Task("recover", number, 0, order, start)


def same(left: Any, right: Any) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) for name in left
    )


def apart(left: Any, right: Any) -> float:
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def test_alone_a_client_is_ordinary_training() -> None:
    lm = worn()
    start = values(lm)
    clients = {"a": held(1)["a"]}
    found = run(lm, clients, rounds=2).recover(start)
    # two trainings in a row, with the seeds of the rounds
    other = worn()
    options = Federation(**QUICK)
    recipe = Recipe.from_mapping(dict(options.order().recipe))
    recipe = recipe.model_copy(update={"place": WornAdapter()})
    for number in range(2):
        seed = Task("recover", number, 0, options.order(), start).seed_of("a")
        Trainer(other, recipe, {"forget": clients["a"].retain}, context=Context(seed=seed)).train()
    assert same(found.adapter, values(other))
    assert apart(found.adapter, start) > 1e-3


def test_the_pull_is_the_gradient_of_the_proximal_term() -> None:
    random = torch.Generator().manual_seed(0)
    weights = [torch.randn(3, 4, generator=random, dtype=torch.float64) for _ in range(2)]
    anchors = [torch.randn(3, 4, generator=random, dtype=torch.float64) for _ in range(2)]
    found = pull(weights, anchors, 0.37)
    moved = [weight.clone().requires_grad_() for weight in weights]
    term = 0.37 / 2 * sum(((w - a) ** 2).sum() for w, a in zip(moved, anchors, strict=True))
    expected = torch.autograd.grad(term, moved)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


@pytest.mark.parametrize("unlearns", [False, True])
def test_fedprox_with_plain_descent_by_hand(unlearns: bool) -> None:
    """Two steps of plain descent on all rows: w2 = w1 - lr (g(w1) + mu (w1 - w0))."""
    rate, mu = 0.05, 3.0
    settings = {
        "optimizer": "sgd", "learning_rate": rate, "learning_rate_width": None, "epochs": 2,
        "max_steps": None, "batch_size": 8, "max_gradient_norm": None,
    }  # fmt: skip
    objective = "gradient_ascent" if unlearns else "finetune"
    recipe = Recipe.from_mapping({"objective": objective, "training": settings})
    client = Held(held()["a"].forget, ()) if unlearns else Held((), held()["a"].retain)
    on: Any = "forget" if unlearns else "retain"
    ends: dict[tuple[int, float], dict[str, Any]] = {}
    for steps, pulled in ((1, 0.0), (1, mu), (2, 0.0), (2, mu)):
        lm = worn()
        start = values(lm)
        short = recipe.changed({}, {"max_steps": steps})
        answer = work(lm, "a", client, task(Order(short.spec(), on, pulled), start))
        assert isinstance(answer, Update)
        ends[steps, pulled] = dict(answer.adapter)
    assert same(ends[1, 0.0], ends[1, mu])  # at the first step there is nothing to pull back to
    for name, value in ends[2, 0.0].items():
        expected = value.double() - rate * mu * (ends[1, mu][name].double() - start[name].double())
        torch.testing.assert_close(ends[2, mu][name].double(), expected, atol=1e-6, rtol=0)
    assert apart(ends[2, 0.0], ends[2, mu]) > 1e-4


def test_without_a_pull_fedprox_is_fedavg_and_with_a_strong_one_nothing_goes_far() -> None:
    ends = {}
    for aggregation, mu in (("fedavg", 0.01), ("fedprox", 0.0), ("fedprox", 1e4)):
        lm = worn()
        start = values(lm)
        options = {"aggregation": aggregation, "proximal": mu, "rounds": 1, "epochs": 3}
        ends[aggregation, mu] = run(lm, held(), **options).recover(start)
    first = ends["fedavg", 0.01]
    assert same(first.adapter, ends["fedprox", 0.0].adapter)
    assert ends["fedprox", 1e4].entries[0].change < 0.8 * first.entries[0].change
    assert Federation(proximal=0.5).mu == 0
    assert Federation(aggregation="fedprox").mu == 0.01


def test_only_adapters_travel() -> None:
    lm = worn()
    start, before = values(lm), {n: p.clone() for n, p in lm.model.named_parameters()}
    found = run(lm, held(), rounds=1).recover(start)
    assert found.entries[0].bytes_down + found.entries[0].bytes_up == 2 * 3 * bytes_of(start)
    own = set(adapters.parameters_of(lm))
    assert all("lora_" in name for name in own)
    for name, value in lm.model.named_parameters():
        if name not in own:
            assert torch.equal(value, before[name]), name  # the base is everybody's, untouched


def test_a_frozen_factor_stays_and_does_not_travel() -> None:
    lm = worn()
    start = values(lm)
    found = run(lm, held(), rounds=1, frozen_a=True).recover(start)
    for name, value in found.adapter.items():
        assert torch.equal(value, start[name]) == (".lora_A." in name), name
    b = {name: value for name, value in start.items() if ".lora_B." in name}
    assert found.entries[0].bytes_up == 3 * bytes_of(b) < found.entries[0].bytes_down


def test_the_reference_of_npo_is_the_model_at_the_start_and_stays() -> None:
    lm = worn()
    learned = run(lm, held(), rounds=1, epochs=3).recover(values(lm))
    start = learned.adapter
    recipe = NPO.changed(
        {}, {"epochs": 4, "stop_at_forget_share": None, "least_steps": None, "precision": "float32"}
    )
    order = Federation().unlearning(recipe)
    asked = Task("unlearn", 0, 0, order, start)
    answer = work(lm, "a", held()["a"], asked)
    assert isinstance(answer, Update)
    # the same with a second model as the reference, which is the start and nothing else
    reference, other = worn(), worn()
    adapters.put(reference, start)
    adapters.put(other, start)
    given = recipe.model_copy(update={"place": WornAdapter(), "finish": Recipe.named("npo").finish})
    Trainer(
        other, given, {"forget": held()["a"].forget, "retain": held()["a"].retain},
        context=Context(seed=asked.seed_of("a")), reference=reference,
    ).train()  # fmt: skip
    assert apart(answer.adapter, values(other)) < 1e-6
    assert apart(answer.adapter, start) > 1e-3
    assert same(values(reference), dict(start))


def test_a_client_whose_numbers_collapse_says_so_and_the_others_go_on(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import delible.federated.in_process as engine

    def broken(lm: Any, client: str, *given: Any) -> Any:
        if client == "b":
            return Failure("training collapsed at step 1")
        return work(lm, client, *given)

    monkeypatch.setattr(engine, "work", broken)
    lm = worn()
    found = run(lm, held(), rounds=1).recover(values(lm))
    assert found.entries[0].left_out == {"b": "error"}
    assert any("client 'b' is left out: it could not do it" in one for one in caplog.messages)


@pytest.mark.parametrize(
    "error",
    [
        RunError("training collapsed at step 1: the loss is not finite."),
        DataError("a record collapsed."),
    ],
)
def test_what_goes_wrong_with_one_client_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def collapses(self: Any) -> Any:
        raise error

    monkeypatch.setattr(Trainer, "train", collapses)
    lm = worn()
    answer = work(lm, "a", held()["a"], task(Federation().order(), values(lm)))
    assert isinstance(answer, Failure)
    assert "collapsed" in answer.problem


def test_unlearning_and_recovery_and_who_takes_part() -> None:
    lm = worn()
    clients = {**held(), "z": Held(tuple(fact(n) for n in range(90, 93)), ())}
    whole = run(lm, clients, rounds=1)
    forgot = whole.unlearn(values(lm), NPO)
    assert [(one.phase, one.asked) for one in forgot.entries] == [
        ("unlearn", ("a",)), ("unlearn", ("z",)),
    ]  # fmt: skip
    assert forgot.entries[1].clients["z"]["without_retain_rows"]
    recovered = whole.recover(forgot.adapter)
    assert recovered.entries[0].asked == ("a", "b", "c")  # z is forgotten wholly


def test_unlearning_at_the_client_is_averaged() -> None:
    lm = worn()
    start = values(lm)
    direct = run(lm, held()).unlearn(start, NPO)
    averaged = run(lm, held(), placement="client").unlearn(start, NPO)
    (entry,) = averaged.entries
    assert entry.asked == ("a", "b", "c")
    assert entry.weights == pytest.approx({"a": 2 / 10, "b": 4 / 10, "c": 4 / 10})
    assert apart(direct.adapter, averaged.adapter) > 1e-4


def test_recipes_that_cannot_travel_are_refused() -> None:
    for name, said in (("wagle", "place 'wagle'"), ("task_vector", "finish 'task_vector'")):
        with pytest.raises(RecipeError, match=said):
            check(Recipe.named(name))
    lm = worn()
    with pytest.raises(RecipeError, match="no client asks"):
        run(lm, {"a": Held((), held()["a"].retain)}).unlearn(values(lm), NPO)


def test_adapters_go_on_models_that_they_fit() -> None:
    lm = plain()
    with pytest.raises(ModelError, match="wears none"):
        values(lm)
    assert not dressed(lm, 4, 16.0, 0)
    assert dressed(lm, 4, 16.0, 0)
    start = values(lm)
    assert same(start, values(worn()))
    assert not same(start, values(worn(seed=1)))
    with pytest.raises(RunError, match="does not fit"):
        adapters.put(lm, {**start, "y": torch.ones(1)})
    with pytest.raises(RunError, match="missing"):
        adapters.put(lm, dict(list(start.items())[1:]))
    empty = blank(lm, 0)
    assert empty.keys() == start.keys()
    assert not same(empty, blank(lm, 1))
    for name, value in empty.items():
        if ".lora_B." in name:
            assert not value.any()
        else:
            assert float(value.abs().max()) <= value.shape[1] ** -0.5
            assert float(value.std()) == pytest.approx(value.shape[1] ** -0.5 / 3**0.5, rel=0.5)


def test_what_clients_train_by_in_rounds_that_teach() -> None:
    options = Federation(aggregation="fedprox", proximal=0.05, epochs=4, learning_rate=2e-4,
                         learning_rate_width=None, batch_size=3, frozen_a=True)  # fmt: skip
    order = options.order()
    assert (order.on, order.proximal, order.frozen_a) == ("retain", 0.05, True)
    recipe = Recipe.from_mapping(dict(order.recipe))
    training = recipe.training
    assert recipe.objective.card.name == "finetune"
    assert (training.epochs, training.learning_rate, training.batch_size) == (4, 2e-4, 3)
    assert training.learning_rate_width is None
    assert options.order("both").on == "both"
    plain = Federation()
    assert (plain.momentum, plain.beta1, plain.beta2) == (0.9, 0.9, 0.99)
    assert (plain.tau, plain.server_learning_rate, plain.proximal) == (1e-3, 1e-3, 0.01)
    assert plain.order().proximal == 0  # fedavg has none


def test_an_order_is_plain_data() -> None:
    order = Federation().order()
    assert json.loads(json.dumps(order.recipe)) == order.recipe
    again = Recipe.from_mapping(json.loads(json.dumps(dict(order.recipe))))
    assert again.spec() == order.recipe


def test_two_engines_with_the_same_clients_agree(tmp_path: Path) -> None:
    first, second = worn(), worn()
    one = run(first, held(), rounds=2, aggregation="fedyogi").recover(values(first))
    engine = InProcess(second, dict(reversed(held().items())))
    other = run(second, held(), rounds=2, aggregation="fedyogi")
    found = type(other)(engine, other.options, 0, Folder(tmp_path)).recover(values(second))
    assert same(one.adapter, found.adapter)
