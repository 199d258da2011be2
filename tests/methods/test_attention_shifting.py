"""Attention shifting: attention read from every layout, important tokens, targets and the loss."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import losses_by_hand as by_hand
import pytest
import torch
from torch import Tensor

from delible.errors import RecipeError
from delible.lm.attention import weights_read
from delible.lm.forward import Forward, collate
from delible.lm.lm import LM
from delible.methods.balance.loss_share import LossShare
from delible.methods.keep.attention_strengthening import AttentionStrengthening
from delible.methods.objective.attention_shifting import AttentionShifting
from delible.methods.place.lora import On, chosen_layers
from delible.records import QA, Passage
from delible.testing.tiny import FAMILIES, tiny_model, tiny_tokenizer
from delible.train.attending import (
    content_tokens,
    divergence,
    entropy_changes,
    important,
    own_tokens,
    shifted,
)
from delible.train.engine import Trainer
from delible.train.losses import Keep, Objective
from delible.train.recipe import Recipe
from delible.train.reference import Reference
from delible.train.row import Row
from delible.train.rows import make_rows
from delible.watching import unwatched

FORGET = [QA(question=f"Who is {n}?", answer=f"A {job}.", subject=n)
          for n, job in (("Ada", "baker"), ("Ben", "pilot"), ("Cy", "clown"))]  # fmt: skip
RETAIN = [QA(question="What is snow?", answer="White."), QA(question="And coal?", answer="Black.")]


def lm_of(family: str = "llama") -> LM:
    return LM(tiny_model(family), tiny_tokenizer(), precision="float32")


def ready(frozen: LM, rows: dict[str, list[Row]], *losses: Objective | Keep) -> Reference:
    reference = by_hand.prepared(frozen, rows, *losses)
    for loss in losses:
        reference.learn(loss.full_name, loss.learn(frozen, rows, reference, 0, unwatched))
    return reference


def eager(lm: LM, ids: Any) -> list[Tensor]:
    """Weights of all layers, by the library's own way, for a row alone: [heads, query, key]."""
    kind = lm.core.config._attn_implementation
    lm.core.set_attn_implementation("eager")
    with torch.no_grad():
        asked = lm.core(input_ids=torch.tensor([list(ids)]), output_attentions=True)
    lm.core.set_attn_implementation(kind)
    return [one[0].double() for one in asked.attentions]


# ---- reading


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_the_models_own_in_a_padded_batch(family: str) -> None:
    model = tiny_model(family)
    kind = model.config.get_text_config()._attn_implementation
    lm = LM(model, tiny_tokenizer(), precision="float32")
    rows = make_rows(lm.template, [*FORGET[:1], Passage(text="Short.")])
    batch = collate([row.encoded for row in rows], lm.pad_id, "cpu")
    _, seen = Forward(lm)(batch, ("attention.0", 1, "attention.2", "mlp.1"), final=False)
    assert lm.core.config.get_text_config()._attn_implementation == kind
    with torch.no_grad():
        plain, _ = Forward(lm)(batch)
        again, _ = Forward(lm)(batch, ("attention.1",))
    torch.testing.assert_close(plain, again, rtol=1e-3, atol=1e-4)
    for place, row in enumerate(rows):
        wanted = eager(lm, row.encoded.ids)
        length = len(row.encoded.ids)
        for layer in (0, 2):
            found = seen[f"attention.{layer}"][place, :, :length, :length].double()
            torch.testing.assert_close(found, wanted[layer], rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(found.sum(-1), torch.ones_like(found.sum(-1)))


def test_the_reference_keeps_half_precision_below_the_diagonal() -> None:
    lm = by_hand.tiny_lm()
    rows, loss = by_hand.all_rows(lm), AttentionShifting()
    reference = by_hand.prepared(lm, rows, loss)
    step = by_hand.step_of(lm, loss, reference, rows)
    kept = reference.get("attention.1", rows["forget"][0].key)
    length = len(rows["forget"][0].encoded.ids)
    assert kept.dtype == torch.float16
    assert kept.shape == (4, length * (length + 1) // 2)
    own = step.forget.attention(1)
    frozen = step.forget.reference.attention(1, own.shape[2])
    real = step.forget.positions[:, None, :, None]
    torch.testing.assert_close(frozen, torch.where(real, own, 0.0), rtol=1e-3, atol=1e-6)


def test_attention_is_put_back_when_a_call_fails() -> None:
    lm = lm_of()
    kind = lm.core.config._attn_implementation
    with pytest.raises(ValueError, match="stop"), weights_read(lm, [0]):
        raise ValueError("stop")
    assert lm.core.config._attn_implementation == kind
    assert not any(module._forward_hooks for module in lm.core.modules())


# ---- important tokens


def test_content_words_of_question_and_answer_are_important_and_the_template_is_not() -> None:
    lm = lm_of()
    row = make_rows(lm.template, [
        QA(question="Where was the user Ada Brook born?", answer="In Rome.", subject="Ada Brook")
    ])[0]  # fmt: skip

    def words(marked: Tensor) -> str:
        ids = [i for i, one in zip(row.encoded.ids, marked.tolist(), strict=True) if one]
        return str(lm.tokenizer.decode(ids))

    assert words(content_tokens(row, 0.99)) == "userAdaBrookbornRome"
    own = own_tokens(row)
    assert words(content_tokens(row, 12 / len(own))) == "AdaBrookRome"
    assert words(content_tokens(row, 1e-9)) == "Brook"  # one word at least
    text = str(lm.tokenizer.decode([row.encoded.ids[place] for place in own]))
    assert text.startswith("Where was the user Ada Brook born?In Rome.")
    assert own[0] > 0


def test_the_first_position_is_never_important() -> None:
    lm = lm_of()
    row = make_rows(lm.template, [Passage(text="Oslo is cold in May")])[0]
    bare = replace(row.encoded, ids=row.encoded.ids[row.encoded.start :], start=0)
    assert own_tokens(replace(row, encoded=bare)) == list(range(1, len(bare.ids)))
    assert not bool(content_tokens(row, 0.99)[0])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_changes_of_entropy_equal_runs_without_the_token(family: str) -> None:
    lm = lm_of(family)
    row = make_rows(lm.template, FORGET[:1])[0]
    ids, start = list(row.encoded.ids), row.encoded.start

    def entropy(some: list[int], first: int) -> float:
        with torch.no_grad():
            logits = lm.core(input_ids=torch.tensor([some])).logits[0].double()
        found = torch.distributions.Categorical(logits=logits[first - 1 : -1]).entropy()
        return float(found.mean())

    whole = entropy(ids, start)
    places = own_tokens(row)
    wanted = [entropy(ids[:at] + ids[at + 1 :], start - (at < start)) - whole for at in places]
    assert entropy_changes(lm, row, places).tolist() == pytest.approx(wanted, rel=1e-3, abs=1e-4)
    found = important(lm, [row, row], 0.3, "entropy", unwatched)
    ((key, marked),) = found.items()
    assert key == f"important.{row.key}"
    order = sorted(range(len(places)), key=lambda at: -wanted[at])
    best = {places[at] for at in order[: int(0.3 * len(places))]}
    assert set(marked.nonzero()[:, 0].tolist()) == best


# ---- targets


def attention_of(seed: int, rows: int = 2, heads: int = 3, size: int = 5) -> Tensor:
    drawn = torch.rand(rows, heads, size, size, generator=torch.Generator().manual_seed(seed))
    lower = drawn.tril()
    return lower / lower.sum(-1, keepdim=True)


@pytest.mark.parametrize("change", [-0.99, -0.4, 0.2])
def test_targets_have_sum_1_and_the_mass_of_the_formula(change: float) -> None:
    attention = attention_of(0).double()
    marked = torch.tensor([[False, True, False, True, True], [False, False, True, False, False]])
    found = shifted(attention, marked, change)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 3, 5).double(), atol=1e-6, rtol=0)
    assert float(found.triu(1).abs().max()) == 0
    mass = (attention * marked[:, None, None]).sum(-1)
    wanted = (1 + change) * mass / (1 + change * mass)
    torch.testing.assert_close((found * marked[:, None, None]).sum(-1), wanted, atol=1e-6, rtol=0)


def test_rows_with_important_keys_alone_stay() -> None:
    attention, every = attention_of(1), torch.ones(2, 5, dtype=torch.bool)
    for change in (-0.99, -1.0, 0.2):
        torch.testing.assert_close(shifted(attention, every, change), attention)
    torch.testing.assert_close(shifted(attention, every, 0.0), attention)
    assert shifted(torch.zeros(1, 1, 2, 2), every[:1, :2], -1.0).isfinite().all()


def test_divergence_is_of_the_model_from_the_target() -> None:
    own, target = attention_of(2), attention_of(3)
    positions = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    found = divergence(own, target, positions).tolist()
    for row in range(2):
        total = 0.0
        for head in range(3):
            for query in range(5 if row == 0 else 3):
                for key in range(query + 1):
                    a, b = float(own[row, head, query, key]), float(target[row, head, query, key])
                    total += a * math.log(a / b) / 3
        assert found[row] == pytest.approx(total, rel=1e-4)
    own[1, :, 4] = float("nan")
    assert divergence(own, target, positions).tolist() == pytest.approx(found)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_values_equal_loops_over_rows_alone(family: str) -> None:
    frozen = lm_of(family)
    lm = frozen.copy()
    with torch.no_grad():
        for value in lm.model.parameters():
            value.add_(0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1)))
    rows = {"forget": make_rows(lm.template, FORGET), "retain": make_rows(lm.template, RETAIN)}
    losses: list[tuple[Objective | Keep, float]] = [
        (AttentionShifting(strength=0.9), -0.9), (AttentionStrengthening(strength=0.5), 0.5)
    ]  # fmt: skip
    for loss, change in losses:
        reference = ready(frozen, rows, loss)
        found = by_hand.values(lm, loss, reference, rows).tolist()
        for value, row in zip(found, rows[loss.roles[0]], strict=True):
            marked = content_tokens(row, 0.6).double()
            total, ids = 0.0, row.encoded.ids
            for own, was in zip(eager(lm, ids), eager(frozen, ids), strict=True):
                weights = was * (1 + change * marked)
                target = weights / weights.sum(-1, keepdim=True)
                below = torch.ones_like(own).tril() > 0
                terms = own[below] * (own[below].log() - target[below].log())
                total += float(terms.sum()) / own.shape[0] / 3
            assert value == pytest.approx(total, rel=2e-3)


def test_without_strength_there_is_nothing_to_do_at_the_start() -> None:
    lm = by_hand.tiny_lm()
    rows = by_hand.all_rows(lm)
    for loss in (AttentionShifting(strength=0.0), AttentionStrengthening(strength=0.0)):
        reference = ready(lm, rows, loss)
        count = sum(len(row.encoded.ids) for row in rows[loss.roles[0]])
        start = by_hand.values(lm, loss, reference, rows).detach() / count
        assert float(start.abs().max()) < 1e-6
    loss = AttentionShifting()
    assert float(by_hand.values(lm, loss, ready(lm, rows, loss), rows).detach().min()) > 0.1


def test_micro_batches_do_not_matter() -> None:
    lm, frozen = by_hand.tiny_lm(0.05), by_hand.tiny_lm()
    rows, loss, keep = by_hand.all_rows(lm), AttentionShifting(), AttentionStrengthening()
    reference = ready(frozen, rows, loss, keep)
    found = []
    for budget in (10**6, 1):
        passes = by_hand.passes_of(lm, loss, keep, reference, budget=budget)
        passes.both()
        found.append((passes.totals.forget, passes.totals.keep))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


# ---- the recipe


def test_the_share_follows_the_losses_within_its_range() -> None:
    balance = LossShare(low=0.2, high=0.8)
    state = balance.start()
    assert balance.weights(state, 0.0) == (0.5, 0.5)
    for forget, keep, alpha in ((3.0, 1.0, 0.75), (9.0, 0.1, 0.8), (0.1, 9.0, 0.2),
                                (1.0, 1.5, 0.4), (0.0, 0.0, 0.4)):  # fmt: skip
        balance.observe(forget, keep, 0.0, state)
        assert balance.weights(state, 0.0) == pytest.approx((alpha, 1 - alpha))
    balance.observe(5.0, None, 0.0, state)
    assert balance.weights(state, 0.0)[0] == pytest.approx(0.4)
    with pytest.raises(RecipeError, match="low is above high"):
        LossShare.build("balance 'loss_share'", low=0.9, high=0.1)


def test_adapters_on_queries_and_keys_or_on_values(caplog: pytest.LogCaptureFixture) -> None:
    lm, every = lm_of(), range(3)

    def ends(lm: LM, on: On) -> list[str]:
        paths = chosen_layers(lm.core, lm.anatomy, every[: lm.anatomy.layers], on)
        return [path.rsplit(".", 1)[1] for path in paths]

    assert sorted(ends(lm, "query_key")) == sorted(["q_proj", "k_proj"] * lm.anatomy.layers)
    assert set(ends(lm, "value")) == {"v_proj"}
    assert set(ends(lm_of("gpt2"), "value")) == {"c_attn"}
    assert "cannot be taken apart" in caplog.text


def test_one_sample_goes_to_its_target_by_the_adapter_alone() -> None:
    lm = lm_of()
    start = lm.copy()
    recipe = Recipe.named("attention_shifting").changed(
        {"finish": "none", "keep": "none"},
        {"training.precision": "float32", "max_steps": 40, "epochs": 40, "learning_rate": 2e-2,
         "low": 1.0, "high": 1.0},
    )  # fmt: skip
    trainer = Trainer(lm, recipe, {"forget": FORGET[:1], "retain": RETAIN})
    history = trainer.train().history
    assert history[-1]["forget_loss"] < 0.3 * history[0]["forget_loss"]
    row = make_rows(start.template, FORGET[:1])[0]
    marked = content_tokens(row, 0.6)
    reference = ready(start, {"forget": [row]}, AttentionShifting())
    mass = []
    for one in (start, lm):
        step = by_hand.step_of(one, AttentionShifting(), reference, {"forget": [row]})
        weights = torch.stack([step.forget.attention(layer)[0] for layer in range(3)])
        mass.append(float((weights * marked).sum(-1).mean().detach()))
    frozen = torch.stack([reference_of(step, layer) for layer in range(3)])
    goal = float((shifted(frozen, marked[None].expand(3, -1), -0.99) * marked).sum(-1).mean())
    assert mass[0] - mass[1] > 0.9 * (mass[0] - goal)
    text = torch.tensor([list(row.encoded.ids)])
    with torch.no_grad(), lm.model.disable_adapter():
        bare = lm.model(input_ids=text).logits
        assert torch.equal(bare, start.model(input_ids=text).logits)


def reference_of(step: Any, layer: int) -> Tensor:
    found: Tensor = step.forget.reference.attention(layer, step.forget.positions.shape[1])[0]
    return found
