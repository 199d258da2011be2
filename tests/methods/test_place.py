"""Which parameters move: layers, low-rank adapters, and the weight mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from delible.component import build
from delible.context import Context
from delible.errors import ModelError, RecipeError, RunError
from delible.lm.lm import LM
from delible.methods.place.layers import chosen_layers
from delible.methods.place.wagle import kth_largest, largest, wagle_score_
from delible.records import QA
from delible.testing.tiny import tiny_model, tiny_tokenizer
from delible.train.engine import Trainer
from delible.train.gradients import Gradients
from delible.train.recipe import Recipe
from delible.train.rows import make_rows
from delible.train.slots import SlotContext

FAMILIES = ("llama", "gpt2")
FORGET = [
    QA(question=f"Where was {name} born?", answer=f"In {town}.", subject=name)
    for name, town in (("Ada Quill", "Norrby"), ("Ben Orr", "Casta"), ("Cy Dale", "Umber"))
]
RETAIN = [
    QA(question=f"What is {thing}?", answer=f"It is {colour}.")
    for thing, colour in (("snow", "white"), ("coal", "black"), ("grass", "green"), ("ice", "blue"))
]
ROLES = ("mlp_out", "mlp", "attention", "all")


def make_lm(family: str, seed: int = 0) -> LM:
    return LM(tiny_model(family, seed), tiny_tokenizer(), precision="float32")


def make_context(lm: LM, retain: Sequence[QA] = RETAIN, objective: str = "npo") -> SlotContext:
    rows = {"forget": make_rows(lm.template, FORGET), "retain": make_rows(lm.template, retain)}
    records = {"forget": FORGET, "retain": retain}
    return SlotContext(lm, rows, records, Gradients(lm), build("objective", objective), None, 3)


def train(lm: LM, place: Any, **training: Any) -> list[dict[str, float]]:
    recipe = Recipe.from_mapping(
        {
            "objective": "gradient_ascent",
            "keep": "nll",
            "place": place,
            "training": {"learning_rate": 1e-3, "batch_size": 2, "max_length": 128, **training},
        }
    )
    return (
        Trainer(lm, recipe, {"forget": FORGET, "retain": RETAIN}, context=Context(seed=1))
        .train()
        .history
    )


def weights_of(lm: LM) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in lm.core.named_parameters()}


# ---- layers


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mixtral"])
@pytest.mark.parametrize("role", ROLES)
def test_only_the_chosen_part_may_move(family: str, role: str) -> None:
    lm = make_lm(family)
    placement = build("place", {"name": "layers", "layers": [1], "role": role}).apply(
        make_context(lm)
    )
    wanted = set(lm.anatomy.parameter_names(1, "block" if role == "all" else role))  # type: ignore[arg-type]
    assert wanted
    assert set(placement.parameters) == wanted
    moving = {name for name, value in lm.core.named_parameters() if value.requires_grad}
    assert moving == wanted


def test_depth_and_layers_below() -> None:
    anatomy = make_lm("llama").anatomy  # three layers
    assert chosen_layers(anatomy, 1.0, 1, None) == [1, 2]
    assert chosen_layers(anatomy, 0.0, 2, None) == [0]  # fewer near the bottom
    assert chosen_layers(anatomy, 0.0, 2, (-1, 2, 0)) == [0, 2]
    with pytest.raises(ModelError, match="no layer 3"):
        chosen_layers(anatomy, 0.0, 0, (3,))


def test_the_default_depth_is_layer_seven_of_thirty_two() -> None:
    lm = LM(tiny_model("llama", num_hidden_layers=32), tiny_tokenizer(), precision="float32")
    place = build("place", "layers")
    assert chosen_layers(lm.anatomy, place.depth, place.below, None) == [5, 6, 7]


def test_no_layers_is_refused() -> None:
    with pytest.raises(RecipeError, match="layers"):
        build("place", {"name": "layers", "layers": []})


@pytest.mark.parametrize("family", FAMILIES)
def test_training_moves_the_chosen_part_and_nothing_else(family: str) -> None:
    lm = make_lm(family)
    before = weights_of(lm)
    train(lm, {"name": "layers", "layers": [2], "role": "mlp_out"}, epochs=1)
    wanted = set(lm.anatomy.parameter_names(2, "mlp_out"))
    for name, value in lm.core.named_parameters():
        assert torch.equal(value, before[name]) == (name not in wanted), name


# ---- low-rank adapters


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2_moe"])
def test_only_adapter_parameters_train(family: str) -> None:
    lm = make_lm(family)
    before = weights_of(lm)
    logits = lm.model(input_ids=torch.arange(12)[None]).logits
    placement = build("place", "lora").apply(make_context(lm))
    assert all("lora_" in name for name in placement.parameters)
    assert all(value.dtype == torch.float32 for value in placement.parameters.values())
    head = lm.core.get_output_embeddings()
    assert isinstance(head, torch.nn.Linear)
    assert not hasattr(head, "base_layer")
    # B is zero at the start: the model says what it said
    assert torch.equal(lm.model(input_ids=torch.arange(12)[None]).logits, logits)
    loss = lm.model(input_ids=torch.arange(12)[None]).logits.square().mean()
    loss.backward()
    assert all((v.grad is not None) == ("lora_" in n) for n, v in lm.model.named_parameters())
    frozen = {n.replace(".base_layer", ""): v for n, v in lm.core.named_parameters()}
    assert all(torch.equal(frozen[name], value) for name, value in before.items())


def test_every_linear_layer_of_the_blocks_gets_an_adapter() -> None:
    lm = make_lm("llama")
    placement = build("place", {"name": "lora", "rank": 2}).apply(make_context(lm))
    # query, key, value, output, gate, up, down; A and B; three layers
    assert len(placement.parameters) == 7 * 2 * 3
    assert lm.anatomy.parameter_names(0, "mlp_out") == (
        "model.layers.0.mlp.down_proj.base_layer.weight",
    )


def test_the_adapter_is_drawn_from_the_run_seed_alone() -> None:
    drawn = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        placement = build("place", "lora").apply(make_context(make_lm("llama")))
        assert torch.equal(torch.get_rng_state(), state)
        drawn.append(placement.parameters)
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
    assert any(float(value.detach().abs().max()) > 0 for value in drawn[0].values())


def test_a_second_adapter_is_refused() -> None:
    lm = make_lm("llama")
    build("place", "lora").apply(make_context(lm))
    with pytest.raises(RecipeError, match="already wears an adapter"):
        build("place", "lora").apply(make_context(lm))


# ---- weight mask


def scores_by_hand(
    lm: LM, context: SlotContext, drawn: Sequence[int], gamma: float
) -> torch.Tensor:
    """All scores in float64, from one backward pass per row."""
    twin = lm.model.double()
    parameters = dict(twin.named_parameters())

    def total(rows: Sequence[Any]) -> dict[str, torch.Tensor]:
        twin.zero_grad()
        for row in rows:
            ids = torch.tensor(row.encoded.ids)[None]
            logprobs = twin(input_ids=ids).logits[0, :-1].log_softmax(dim=1)
            picked = logprobs.gather(1, ids[0, 1:, None])[row.encoded.start - 1 :]
            (-picked.mean()).backward()
        return {
            name: torch.zeros_like(value) if value.grad is None else value.grad.clone()
            for name, value in parameters.items()
        }

    forget = total(context.rows["forget"])
    retain = total([context.rows["retain"][index] for index in drawn])
    return torch.cat(
        [
            ((value.detach() - retain[name] / gamma) * forget[name]).abs().flatten()
            for name, value in parameters.items()
        ]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mask_is_that_of_a_float64_derivation(family: str) -> None:
    lm = make_lm(family)
    # as many retain as forget rows: the draw is a permutation, and the sum does not see it
    context = make_context(lm, RETAIN[:3])
    share, gamma = 0.3, 1e-2
    place = build("place", {"name": "wagle", "share": share, "gamma": gamma})
    masks = place.apply(context).masks
    mask = torch.cat([masks[name].flatten() for name in dict(lm.model.named_parameters())])
    scores = scores_by_hand(lm, context, [0, 1, 2], gamma)
    count = round(share * len(scores))
    assert int(mask.sum()) == count
    wanted = torch.zeros_like(mask)
    wanted[scores.topk(count).indices] = True
    assert int((mask != wanted).sum()) <= 1e-3 * len(scores)  # fp32 scores near the threshold
    assert float(scores[mask].min()) > 0.99 * float(scores[wanted].min())


def test_the_score_in_numbers() -> None:
    score = wagle_score_(
        torch.tensor([1.0, -2.0]), torch.tensor([3.0, 0.5]), torch.tensor([0.2, 0.1]), 0.1
    )
    assert torch.allclose(score, torch.tensor([3.0, 1.5]))  # |(1-2)*3|, |(-2-1)*0.5|


@pytest.mark.parametrize(
    ("gamma", "limit"),
    [(1e12, lambda w, f, r: (w * f).abs()), (1e-12, lambda w, f, r: (r * f).abs())],
)
def test_limits_of_gamma(gamma: float, limit: Any) -> None:
    random = torch.Generator().manual_seed(0)
    weight, forget, retain = (torch.randn(500, generator=random) for _ in range(3))
    expected = limit(weight, forget, retain).argsort()
    assert torch.equal(wagle_score_(weight, forget, retain.clone(), gamma).argsort(), expected)


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 1.0])
def test_the_threshold_is_that_of_a_full_sort(share: float) -> None:
    random = torch.Generator().manual_seed(1)
    scores = {
        "a": torch.randn(40, 50, generator=random).abs(),
        "b": (torch.randn(999, generator=random) * 1e-20).abs(),
        "c": torch.randint(0, 3, (100,), generator=random).float(),  # ties, zeros among them
    }
    every = torch.cat([score.flatten() for score in scores.values()])
    count = round(share * len(every))
    ordered = every.sort(descending=True).values
    value, equal = kth_largest(scores, count)
    assert value == float(ordered[count - 1])
    assert equal == count - int((every > value).sum())
    masks = largest(scores, share)
    assert sum(int(mask.sum()) for mask in masks.values()) == count
    picked = torch.cat([scores[name][mask] for name, mask in masks.items()])
    assert torch.equal(picked.sort(descending=True).values, ordered[:count])


def test_masks_are_nested_and_zeros_come_last() -> None:
    random = torch.Generator().manual_seed(2)
    scores = {
        "embedding": torch.zeros(300),
        "matrix": torch.randint(1, 5, (10, 40), generator=random).float(),
    }
    smaller = largest(scores, 0.0)
    for share in (0.1, 0.3, 0.31, 0.57, 0.6, 0.9, 1.0):
        masks = largest(scores, share)
        assert all(bool((~smaller[name] | masks[name]).all()) for name in scores)
        if share <= 0.57:
            assert not bool(masks["embedding"].any())
        smaller = masks
    assert bool(smaller["embedding"].all())


def test_a_score_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(RunError, match="not finite"):
        largest({"a": torch.tensor([1.0, float("nan")])}, 0.5)


def test_selected_weights_lie_in_the_part_that_the_forget_loss_uses() -> None:
    random = torch.Generator().manual_seed(4)
    forget = {"used": torch.randn(400, generator=random), "unused": torch.zeros(400)}
    scores = {
        name: wagle_score_(
            torch.randn(400, generator=random), forget[name],
            torch.randn(400, generator=random), 1e-2,
        )
        for name in forget
    }  # fmt: skip
    masks = largest(scores, 0.4)
    assert int(masks["used"].sum()) >= 0.95 * 320
    assert not bool(masks["unused"].any())


def test_reduction_mean_is_sum_with_gamma_times_rows() -> None:
    context = make_context(make_lm("llama"), RETAIN[:3])
    summed = build("place", {"name": "wagle", "share": 0.5, "gamma": 3e-2}).apply(context).masks
    mean = build(
        "place", {"name": "wagle", "share": 0.5, "gamma": 1e-2, "reduction": "mean"}
    ).apply(context)
    assert mean.masks is not None
    different = sum(int((mean.masks[name] != mask).sum()) for name, mask in summed.items())
    assert different <= 20


@pytest.mark.parametrize("select", ["magnitude", "gradient", "random"])
def test_baseline_selections(select: str) -> None:
    lm = make_lm("llama")
    context = make_context(lm, retain=())
    place = build("place", {"name": "wagle", "share": 0.2, "select": select})
    masks = place.apply(context).masks
    again = place.apply(context).masks
    assert masks is not None
    assert all(torch.equal(masks[name], again[name]) for name in masks)
    if select == "magnitude":
        inside = torch.cat([v.detach()[masks[n]].abs() for n, v in lm.model.named_parameters()])
        outside = torch.cat([v.detach()[~masks[n]].abs() for n, v in lm.model.named_parameters()])
        assert float(inside.min()) >= float(outside.max())


def test_no_retain_rows_is_an_error_that_says_what_to_give() -> None:
    with pytest.raises(RecipeError, match="--retain FILE"):
        build("place", "wagle").apply(make_context(make_lm("llama"), retain=()))


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_weights_stay_through_fifty_steps_of_weight_decay(family: str) -> None:
    lm = make_lm(family)
    before = weights_of(lm)
    place = build("place", {"name": "wagle", "share": 0.5, "gamma": 1e-2})
    placement = place.apply(make_context(lm, RETAIN))
    masks = placement.masks
    assert masks is not None
    assert placement.masked_decay

    class Fixed(type(place)):  # type: ignore[misc]  # the same placement, not made again
        def apply(self, context: SlotContext) -> Any:
            return placement

    steps = len(
        train(lm, Fixed(), epochs=25, weight_decay=0.1, learning_rate=1e-4, max_gradient_norm=0.1)
    )
    assert steps == 50
    moved = 0
    for name, value in lm.core.named_parameters():
        assert torch.equal(value[~masks[name]], before[name][~masks[name]]), name
        moved += int((value[masks[name]] != before[name][masks[name]]).sum())
    assert moved > 0


def test_compat_lets_frozen_weights_drift() -> None:
    lm = make_lm("llama")
    before = weights_of(lm)
    place = {"name": "wagle", "share": 0.2, "gamma": 1e-2, "compat": True}
    masks = build("place", place).apply(make_context(lm)).masks
    train(lm, place, epochs=1, weight_decay=0.1)
    name = lm.anatomy.parameter_names(0, "mlp_out")[0]
    value = dict(lm.core.named_parameters())[name]
    assert masks is not None
    assert not torch.equal(value[~masks[name]], before[name][~masks[name]])


def test_a_vanishing_share_moves_no_weight_or_one() -> None:
    lm = make_lm("llama")
    before = weights_of(lm)
    count = sum(value.numel() for value in before.values())
    with pytest.raises(RunError, match="nothing moved"):
        train(lm, {"name": "wagle", "share": 0.1 / count, "gamma": 1e-2}, weight_decay=0.1)
    assert all(torch.equal(value, before[name]) for name, value in weights_of(lm).items())
    train(lm, {"name": "wagle", "share": 1 / count, "gamma": 1e-2}, weight_decay=0.1)
    moved = [(value != before[name]).sum() for name, value in weights_of(lm).items()]
    assert int(sum(moved)) == 1


def test_a_share_of_one_is_the_host_bit_by_bit() -> None:
    results = []
    for place in ("all", {"name": "wagle", "share": 1.0}):
        lm = make_lm("llama")
        train(lm, place, epochs=2, weight_decay=0.1)
        results.append(weights_of(lm))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
