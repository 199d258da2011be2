"""SEUF: attribution and anchor in loops, what moves, and what routers do with and without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from delible.component import build
from delible.context import Context
from delible.errors import DelibleError, ModelError, RecipeError
from delible.lm.forward import collate
from delible.lm.lm import LM
from delible.methods.keep.seuf import anchor
from delible.records import QA, ForgetRequest
from delible.testing.tiny import tiny_model, tiny_tokenizer
from delible.train.engine import Trainer
from delible.train.expert_choice import affinity, chosen, sample
from delible.train.gradients import Gradients
from delible.train.method import GradientMethod
from delible.train.recipe import Recipe
from delible.train.row import Row
from delible.train.row_losses import answer_loss
from delible.train.rows import make_rows
from delible.train.slots import SlotContext

#: Two topics with words of their own.
PEOPLE = [
    QA(question=f"Who baked {thing} at Norrby?", answer=f"{name}.", subject=name)
    for thing, name in (("bread", "Ada Quill"), ("pies", "Ben Orr"), ("rye", "Cy Dale"))
]
THINGS = [
    QA(question=f"COLOUR {thing}?", answer=colour)
    for thing, colour in (("snow", "white"), ("coal", "black"), ("grass", "green"))
]
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")


def make_lm(family: str = "mixtral", **changes: Any) -> LM:
    model = tiny_model(family, **{"num_hidden_layers": 2, **changes})
    return LM(model, tiny_tokenizer(), precision="float32")


def weights(lm: LM) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in lm.core.named_parameters()}


def train(lm: LM, content: Mapping[str, Any], forget: Sequence[QA] = PEOPLE, **more: Any) -> Any:
    training = {"learning_rate": 1e-3, "batch_size": 3, "epochs": 3, "max_length": 128,
                "precision": "float32", **content.get("training", {})}  # fmt: skip
    recipe = Recipe.from_mapping({**content, "training": training})
    records = {"forget": forget, "retain": THINGS, **more}
    return Trainer(lm, recipe, records, context=Context(seed=1)).train()


# ---- attribution


def by_hand(lm: LM, rows: Sequence[Row], renormalised: bool) -> list[list[float]]:
    """s of every layer and expert from the logits that the library reports, a row at a time."""
    layers = lm.anatomy.layers
    total = torch.zeros(layers, 4, dtype=torch.float64)
    for row in rows:
        ids = torch.tensor([row.encoded.ids])
        with torch.no_grad():
            told = lm.model(input_ids=ids, output_router_logits=True).router_logits
        for layer in range(layers):
            places = range(row.encoded.start - 1, len(row.encoded.ids) - 1)
            for place in places:
                shares = told[layer].view(-1, 4)[place].double().softmax(dim=0).tolist()
                best = sorted(range(4), key=shares.__getitem__)[-2:]
                mass = sum(shares[one] for one in best) if renormalised else 1.0
                for one in best:
                    total[layer, one] += shares[one] / mass / len(places) / len(rows)
    return total.tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("family", "changes", "renormalised"),
    [
        ("mixtral", {}, True),
        ("qwen2_moe", {}, False),
        ("qwen3_moe", {"norm_topk_prob": True}, True),
        ("qwen3_moe", {"norm_topk_prob": False}, False),
    ],
)
def test_affinity_is_the_mean_weight_of_an_expert(
    family: str, changes: dict[str, Any], renormalised: bool
) -> None:
    lm = make_lm(family, **changes)
    rows = make_rows(lm.template, [*PEOPLE, *THINGS])
    found, wanted = affinity(lm, rows), by_hand(lm, rows, renormalised)
    for layer, values in found.items():
        assert values.tolist() == pytest.approx(wanted[layer], rel=1e-4, abs=1e-6)
        whole = float(values.sum())
        assert whole == pytest.approx(1.0) if renormalised else whole < 0.999
    # whatever the order and the padding of rows
    turned = affinity(lm, rows[::-1])
    alone = [affinity(lm, [row]) for row in rows]
    for layer, values in found.items():
        assert turned[layer].tolist() == pytest.approx(values.tolist(), rel=1e-4, abs=1e-6)
        mean = sum(one[layer] for one in alone) / len(rows)
        assert mean.tolist() == pytest.approx(values.tolist(), rel=1e-4, abs=1e-6)


def test_the_largest_are_chosen_over_all_layers_or_in_one() -> None:
    scores = {0: torch.tensor([0.1, 0.5, 0.4]), 2: torch.tensor([0.45, 0.05, 0.5])}
    assert chosen(scores, 1) == [(0, 1)]  # a tie: the first layer
    assert chosen(scores, 3) == [(0, 1), (2, 2), (2, 0)]
    assert chosen(scores, 3, within_layer=True) == [(0, 1), (0, 2), (0, 0)]
    assert chosen(scores, 2, layers=[2]) == [(2, 2), (2, 0)]


def test_a_sample_has_the_tokens_that_are_wanted() -> None:
    lm = make_lm()
    rows = make_rows(lm.template, [*PEOPLE, *THINGS])
    assert len(sample(rows, 10**9, 0)) == len(rows)
    few = sample(rows, 2 * len(rows[0].encoded.ids), 0)
    assert 2 <= len(few) < len(rows)
    assert [row.key for row in few] == [row.key for row in sample(rows, 1 + sum(
        len(row.encoded.ids) for row in few[:-1]), 0)]  # fmt: skip


# ---- what moves


def context_of(lm: LM, forget: Sequence[QA] = PEOPLE) -> SlotContext:
    rows = {"forget": make_rows(lm.template, forget), "retain": make_rows(lm.template, THINGS)}
    return SlotContext(lm, rows, {}, Gradients(lm), build("objective", "npo"), None, 0)


@pytest.mark.parametrize("family", MIXTURES)
def test_nothing_moves_but_one_expert_and_its_router(family: str) -> None:
    lm = make_lm(family)
    scores = affinity(lm, make_rows(lm.template, PEOPLE))
    ((layer, expert),) = chosen(scores, 1)
    before = weights(lm)
    train(lm, {"objective": "gradient_ascent", "keep": {"name": "seuf"}, "place": "seuf",
               "training": {"weight_decay": 0.1}})  # fmt: skip
    place = f"model.layers.{layer}.mlp"
    for name, value in weights(lm).items():
        moved = value != before[name]
        if name == f"{place}.gate.weight":
            assert moved.any()
        elif name.startswith(f"{place}.experts."):
            assert moved[expert].any()
            others = [one for one in range(4) if one != expert]
            assert torch.equal(value[others], before[name][others])
        else:
            assert torch.equal(value, before[name]), name


def test_several_experts_in_one_layer_or_over_layers() -> None:
    lm = make_lm()
    scores = affinity(lm, make_rows(lm.template, PEOPLE))
    for options in ({"experts": 5}, {"experts": 3, "within_layer": True}):
        placement = build("place", {"name": "seuf", **options}).apply(context_of(lm))
        wanted = chosen(scores, options["experts"], within_layer="within_layer" in options)
        assert placement.masks is not None
        found = {
            (int(name.split(".")[2]), expert)
            for name, mask in placement.masks.items()
            if name.endswith("down_proj")
            for expert in range(4)
            if mask[expert].all()
        }
        assert found == set(wanted)
        routers = {int(name.split(".")[2]) for name in placement.masks if "gate.weight" in name}
        assert routers == {layer for layer, _ in wanted}


def test_all_experts_and_no_anchor_are_the_host_method() -> None:
    made = []
    for place in (
        {"name": "seuf", "experts": 8},
        {"name": "layers", "layers": [0, 1], "role": "mlp"},
    ):
        lm = make_lm()
        keep = {"name": "seuf", "anchor_weight": 1e-12} if place["name"] == "seuf" else "nll"
        train(lm, {"objective": "gradient_ascent", "keep": keep, "place": place,
                   "training": {"optimizer": "sgd", "learning_rate": 1e-2}})  # fmt: skip
        made.append(weights(lm))
    start = weights(make_lm())
    moved = 0.0
    for name, value in made[0].items():
        torch.testing.assert_close(value, made[1][name], rtol=1e-4, atol=1e-6)
        moved += float((value - start[name]).abs().sum())
    assert moved > 1e-3


# ---- the anchor


def test_the_anchor_of_a_sure_and_of_a_uniform_router() -> None:
    sure = torch.tensor([[-60.0, 60.0, -60.0, -60.0]]).double()
    assert anchor(sure, [1]).item() == pytest.approx(0.0, abs=1e-9)
    assert anchor(sure, [0]).item() == pytest.approx(2.0)
    for count in (2, 4, 64):
        uniform = torch.zeros(1, count)
        assert anchor(uniform, [0]).item() == pytest.approx((count - 1) / count)
        assert anchor(uniform, range(count)).item() == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize("budget", [1, 10**6])
def test_the_loss_is_the_mean_anchor_and_the_mean_likelihood(budget: int) -> None:
    lm = make_lm()
    rows = make_rows(lm.template, PEOPLE)
    ((layer, expert),) = chosen(affinity(lm, rows), 1)
    apart, count = 0.0, 0
    for row in rows:
        with torch.no_grad():
            told = lm.model(
                input_ids=torch.tensor([row.encoded.ids]), output_router_logits=True
            ).router_logits[layer].view(-1, 4)  # fmt: skip
        for place in range(row.encoded.start - 1, len(row.encoded.ids) - 1):
            shares = told[place].double().softmax(dim=0).tolist()
            apart += sum((share - (one == expert)) ** 2 for one, share in enumerate(shares))
            count += 1
    kept = make_rows(lm.template, THINGS)
    tokens = [row.encoded.answer_tokens for row in kept]
    with torch.no_grad():
        nats = sum(float(v) * n for v, n in zip(answer_loss(lm, kept), tokens, strict=True))
    wanted = 3.0 * apart / count + 0.5 * nats / sum(tokens)
    for place in ("seuf", "all"):
        found = train(lm.copy(), {
            "objective": "npo", "place": place,
            "keep": {"name": "seuf", "anchor_weight": 3.0, "beside_weight": 0.5},
            "training": {"max_steps": 1, "micro_batch_tokens": budget},
        })  # fmt: skip
        assert found.history[0]["keep_loss"] == pytest.approx(wanted, rel=1e-4)


def test_the_retain_loss_beside_it_has_its_own_mean() -> None:
    """The mean over positions of hidden states, not their sum over the answer tokens."""
    lm = make_lm()
    alone = {"name": "hidden_mse", "depth": 1.0}
    both = {"name": "seuf", "retain": alone, "anchor_weight": 1e-9}
    found = []
    for keep in (alone, both):
        twin = lm.copy()
        found.append([one["keep_loss"] for one in train(twin, {
            "objective": "gradient_ascent", "place": "seuf", "keep": keep,
            "training": {"max_steps": 3, "optimizer": "sgd", "learning_rate": 0.1},
        }).history])  # fmt: skip
    assert found[0][2] > 0
    assert found[1] == pytest.approx(found[0], rel=1e-3, abs=1e-7)


def test_without_a_retain_loss_no_retain_rows_are_needed() -> None:
    lm = make_lm()
    keep = {"name": "seuf", "retain": "none"}
    content = {"objective": "gradient_ascent", "place": "seuf", "keep": keep}
    history = train(lm, content, retain=[]).history
    assert all(one["keep_loss"] > 0 for one in history)
    with pytest.raises(RecipeError, match="needs retain records"):
        train(make_lm(), {**content, "keep": "seuf"}, retain=[])
    with pytest.raises(DelibleError, match="more than values of retain rows"):
        build("keep", {"name": "seuf", "retain": "seuf"})


@pytest.mark.parametrize("objective", ["npo", "idk", "rmu", "ihl"])
def test_any_objective_has_an_anchor(objective: str) -> None:
    lm = make_lm()
    loss = {"name": "rmu", "depth": 1.0} if objective == "rmu" else objective
    keep = {"name": "seuf", "retain": "none", "anchor_weight": 50.0}
    content = {"objective": loss, "place": "seuf", "keep": keep, "training": {"epochs": 6}}
    history = train(lm, content, retain=[]).history
    assert history[-1]["keep_loss"] < history[0]["keep_loss"]


# ---- dense models


@pytest.mark.parametrize("slots", [
    {"place": "seuf", "keep": "nll"}, {"place": "all", "keep": "seuf"},
    {"place": "lora", "keep": "seuf"},
])  # fmt: skip
def test_a_dense_model_is_refused_before_any_work(
    slots: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = LM(tiny_model("llama"), tiny_tokenizer(), precision="float32")
    monkeypatch.setattr(Trainer, "rows", lambda self: pytest.fail("rows were made"))
    recipe = Recipe.from_mapping({"objective": "npo", **slots})
    request = ForgetRequest(forget=tuple(PEOPLE), retain=tuple(THINGS))
    with pytest.raises(ModelError, match="dense: it has no experts"):
        GradientMethod(recipe).check(lm, request)
    with pytest.raises(ModelError, match="dense: it has no experts"):
        train(lm, {"objective": "npo", **slots})


@pytest.mark.parametrize("name", ["seuf_ga", "seuf_graddiff", "seuf_npo", "seuf_rmu"])
def test_recipes_run_on_a_mixture(name: str) -> None:
    recipe = Recipe.named(name).changed({}, {
        "training.max_steps": 2, "training.batch_size": 3, "training.precision": "float32",
        "training.stop_at_forget_share": None,
    })  # fmt: skip
    lm = make_lm("qwen2_moe")
    records = {"forget": PEOPLE, "retain": THINGS}
    history = Trainer(lm, recipe, records, context=Context(seed=0)).train().history
    assert len(history) == 2
    assert "keep_loss" in history[0]


# ---- two topics in two experts


@lru_cache(maxsize=1)
def _planted() -> LM:
    """A mixture that has learned both topics, one in expert 1 of layer 1 and one in expert 2."""
    lm = make_lm("mixtral", num_local_experts=8, num_hidden_layers=3)
    topics = [make_rows(lm.template, topic) for topic in (PEOPLE, THINGS)]
    rows = [row.encoded for topic in topics for row in topic]
    batch = collate(rows, lm.pad_id, "cpu")
    optimizer = torch.optim.AdamW(lm.model.parameters(), lr=5e-3)
    for _ in range(45):
        told: Any = lm.model(input_ids=batch.ids, output_router_logits=True)
        routed = told.router_logits[1].view(*batch.ids.shape, 8).log_softmax(dim=2)
        loss = torch.zeros(())
        for place, row in enumerate(rows):
            answer = torch.tensor(row.ids[row.start :])
            own = slice(row.start - 1, len(row.ids) - 1)
            loss = loss + torch.nn.functional.cross_entropy(told.logits[place, own], answer) / 6
            loss = loss - routed[place, own, 1 if place < len(PEOPLE) else 2].mean() / 20
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    lm.touch()
    return lm


def test_each_topic_has_its_expert() -> None:
    lm = _planted()
    for topic, expert in ((PEOPLE, 1), (THINGS, 2)):
        scores = affinity(lm, make_rows(lm.template, topic))
        assert chosen(scores, 1) == [(1, expert)]


def selected(lm: LM, rows: Sequence[Row], layer: int) -> list[set[int]]:
    """Experts of each token that predicts an answer."""
    found = []
    for row in rows:
        with torch.no_grad():
            told = lm.model(
                input_ids=torch.tensor([row.encoded.ids]), output_router_logits=True
            ).router_logits[layer].view(-1, 8)  # fmt: skip
        for place in range(row.encoded.start - 1, len(row.encoded.ids) - 1):
            found.append(set(told[place].topk(2).indices.tolist()))
    return found


def overlap(one: Sequence[set[int]], other: Sequence[set[int]]) -> float:
    return sum(len(a & b) / 2 for a, b in zip(one, other, strict=True)) / len(one)


def test_one_expert_forgets_as_much_and_the_other_topic_stays() -> None:
    """As far as plain ascent on everything: routers stay, and the other topic is hardly hurt."""
    start = _planted()
    people, things = (make_rows(start.template, topic) for topic in (PEOPLE, THINGS))

    def loss(lm: LM, rows: Sequence[Row]) -> float:
        with torch.no_grad():
            return float(answer_loss(lm, rows).mean())

    before = (loss(start, people), loss(start, things))
    assert max(before) < 0.7
    routes = selected(start, people, 1)
    made: dict[str, tuple[float, float, float]] = {}
    for name, content in (
        ("plain", {"keep": "none", "place": "all", "training": {"learning_rate": 5e-4}}),
        ("seuf", {"keep": {"name": "seuf", "retain": "none", "anchor_weight": 10.0},
                  "place": "seuf", "training": {"learning_rate": 1e-2}}),
    ):  # fmt: skip
        lm = start.copy()
        for _ in range(25):
            train(lm, {"objective": "gradient_ascent", **content}, retain=[])
            if loss(lm, people) > 4:
                break
        kept = overlap(selected(lm, people, 1), routes)
        made[name] = (loss(lm, people), loss(lm, things) - before[1], kept)
    assert made["seuf"][0] > 4
    assert made["plain"][0] > 4
    assert made["seuf"][1] < 0.25 * made["plain"][1]
    assert made["seuf"][2] > 0.9
    assert made["plain"][2] < made["seuf"][2]
