"""Patching, lens and likeness: their numbers by hand, the ends, and what they cannot be run on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from inside_by_hand import (
    FACTS,
    RECORDS,
    Three,
    averaged,
    between,
    mean_logprob,
    mean_of,
    ratio,
    states_of,
    text_of,
    three,
    without,
)

from delible.attacks.cka import linear_cka
from delible.component import build
from delible.errors import DataError, ModelError
from delible.lm.lm import LM
from delible.measure.attack import InsideAttack, Seen
from delible.measure.depth import FLOOR, clipped_mean, depth
from delible.records import QA, Dialogue, Message
from delible.testing.tiny import tiny_model, tiny_tokenizer

LAYERS = 3
Ids = Sequence[int]
COMPARING = ["patching", "lens", "cka"]


def look(name: str, lm: LM, models: Three, **options: Any) -> Seen:
    attack = build("attack", {"name": name, "tokens": 64, **options})
    assert isinstance(attack, InsideAttack)
    return attack.look(lm, RECORDS, models.context())


def values(seen: Seen) -> list[float | None]:
    assert seen.items is not None
    return [item.value for item in seen.items["forget"]]


def patched(models: Three, source: LM, ids: Ids, first: int, end: int) -> list[float]:
    """What the source's states cost the original, by layer."""
    states = states_of(source, ids)
    plain = mean_logprob(models.original, ids, first, end)
    return [
        plain - mean_logprob(models.original, ids, first, end, layer=layer, states=states[layer])
        for layer in range(LAYERS)
    ]


def read_by_llama(models: Three, source: LM, ids: Ids, first: int, end: int) -> list[float]:
    """What Llama's norm and head, written out, read from the source's states: minus log p."""
    core = models.original.core
    gain, head = core.model.norm.weight.double(), core.lm_head.weight.double()
    found = []
    for states in states_of(source, ids):
        size = (states**2).mean(dim=1, keepdim=True) + core.config.rms_norm_eps
        logits = ((states / size.sqrt() * gain) @ head.T).detach()
        found.append(-mean_of(logits, ids, first, end))
    return found


def expected(models: Three, lm: LM, name: str) -> tuple[list[float | None], list[float | None]]:
    """Scores by record, and what is left by layer."""
    scores, shares = list[float | None](), []
    for record, fact in zip(RECORDS, FACTS, strict=True):
        place = text_of(record, fact)  # type: ignore[arg-type]
        if name == "patching":
            held, gone = (patched(models, one, *place) for one in (models.reference, lm))
        else:
            m, r, u = (
                read_by_llama(models, one, *place)
                for one in (models.original, models.reference, lm)
            )
            held = [after - before for before, after in zip(m, r, strict=True)]
            gone = [after - before for before, after in zip(m, u, strict=True)]
        score, by_layer = ratio(held, gone)
        scores.append(None if score is None else 1 - score)
        shares.append(by_layer)
    return scores, averaged(shares)


def check_formula(family: str, name: str) -> None:
    models = three(family)
    found = look(name, models.unlearned, models)
    scores, layers = expected(models, models.unlearned, name)
    assert values(found) == pytest.approx(scores, abs=2e-3)
    assert list(found.layers) == pytest.approx(layers, abs=2e-3)
    # neither end tells of the formula
    assert sum(one is not None and 0.02 < one < 0.98 for one in scores) >= 2, scores


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_neox", "qwen2_moe", "opt"])
def test_patching_is_the_papers_formula(family: str) -> None:
    check_formula(family, "patching")


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_the_lens_is_the_originals_norm_and_head(family: str) -> None:
    check_formula(family, "lens")


def test_patching_without_a_shared_beginning_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    models = three("llama")
    found = values(look("patching", models.unlearned, models))
    fresh = Three(*(one.copy() for one in (models.original, models.reference, models.unlearned)))
    fresh.original.shares_prefix = False
    assert values(look("patching", fresh.unlearned, fresh)) == pytest.approx(found, abs=1e-3)
    from delible.lm.body import Budget

    fresh.original.budget = Budget(1, 1, 1)  # every layer in a pass of its own
    again = values(look("patching", fresh.unlearned, fresh))
    assert again == pytest.approx(found, abs=1e-3)


def expected_cka(models: Three, lm: LM) -> tuple[float, list[float]]:
    def states(source: LM, layer: int) -> Any:
        rows = []
        for record, fact in zip(RECORDS, FACTS, strict=True):
            assert isinstance(record, QA)
            ids, first, end = text_of(record, fact)
            rows += states_of(source, ids)[layer, first - 1 : end - 1].tolist()
        return rows

    def cka(left: Any, right: Any) -> float:
        def gram(rows: Any) -> Any:
            means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
            rows = [[v - m for v, m in zip(row, means, strict=True)] for row in rows]
            return [[sum(a * b for a, b in zip(x, y, strict=True)) for y in rows] for x in rows]

        one, other = gram(left), gram(right)

        def inner(a: Any, b: Any) -> float:
            return sum(p * q for r, s in zip(a, b, strict=True) for p, q in zip(r, s, strict=True))

        return inner(one, other) / math.sqrt(inner(one, one) * inner(other, other))

    shares, weights = [], []
    for layer in range(LAYERS):
        m, r, u = (states(one, layer) for one in (models.original, models.reference, lm))
        far, near = cka(m, r), cka(u, r)
        shares.append(min(1, max(0, (near - far) / (1 - far))))
        weights.append(1 - far)
    mean = sum(w * s for w, s in zip(weights, shares, strict=True)) / sum(weights)
    return mean, [1 - one for one in shares]


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_likeness_is_the_kernel_alignment_of_all_facts_tokens(family: str) -> None:
    models = three(family)
    found = look("cka", models.unlearned, models)
    mean, layers = expected_cka(models, models.unlearned)
    assert found.items is None
    assert found.numbers["like_the_reference"] == pytest.approx(mean, abs=1e-3)
    assert list(found.layers) == pytest.approx(layers, abs=1e-3)
    assert 0.05 < mean < 0.95


def test_likeness_does_not_depend_on_the_side_that_is_multiplied_out() -> None:
    random = np.random.default_rng(0)
    x, y = random.normal(size=(6, 9)), random.normal(size=(6, 5))
    x, y = x - x.mean(0), y - y.mean(0)
    expected = np.sum((x.T @ y) ** 2) / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))
    assert linear_cka(x + 3, y - 2) == pytest.approx(expected)
    assert linear_cka(x[:5] * 7, x[:5]) == pytest.approx(1)
    turned = x @ np.linalg.qr(random.normal(size=(9, 9)))[0]
    assert linear_cka(turned, x) == pytest.approx(1)
    assert linear_cka(np.ones((4, 3)), x[:4]) is None
    assert linear_cka(np.full((4, 3), np.nan), x[:4]) is None


@pytest.mark.parametrize("name", [*COMPARING, "fisher"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mixtral", "opt"])
def test_the_original_is_at_one_end_and_the_reference_at_the_other(family: str, name: str) -> None:
    models = three(family)
    for lm, known in ((models.original.copy(), 1.0), (models.reference.copy(), 0.0)):
        found = look(name, lm, models)
        layers = [one for one in found.layers if one is not None]
        assert layers
        assert layers == pytest.approx([known] * len(layers), abs=1e-4)
        assert len(found.layers) == LAYERS
        if found.items is None:
            assert found.numbers["like_the_reference"] == pytest.approx(1 - known, abs=1e-4)
        else:
            scores = [one for one in values(found) if one is not None]
            assert scores
            assert scores == pytest.approx([known] * len(scores), abs=1e-4)


@pytest.mark.parametrize("name", COMPARING)
def test_the_nearer_to_the_reference_the_less_is_known(name: str) -> None:
    models = three("llama")
    way = [between(models.original, models.reference, share) for share in (0.05, 0.5, 0.95)]
    found = [look(name, lm, models) for lm in way]
    known = [np.mean([one for one in seen.layers if one is not None]) for seen in found]
    assert known[0] > 0.8
    assert known[0] - 0.1 > known[1] > known[2] + 0.1
    assert known[2] < 0.2


def test_states_that_are_no_numbers_hold_nothing() -> None:
    models = three("llama")
    broken = models.original.copy()
    with torch.no_grad():
        broken.core.get_submodule(broken.anatomy.block_path(1)).mlp.down_proj.weight.fill_(
            torch.nan
        )
    broken.touch()
    for name, other in (("patching", 1.0), ("lens", 1.0), ("cka", None)):
        found = look(name, broken, models)
        assert found.layers[0] == pytest.approx(1.0, abs=1e-4)
        assert all(one in (0.0, None) for one in found.layers[1:])
        if found.items is not None:
            assert all(one is None or 0 <= one < other for one in values(found))
            assert found.layers[1] == 0.0


def test_extreme_values_are_clipped_and_layers_below_the_threshold_do_not_count() -> None:
    logprobs = torch.tensor([[-1.0, -500.0], [float("nan"), float("-inf")]])
    assert clipped_mean(logprobs).tolist() == [(-1 + FLOOR) / 2, FLOOR]
    found = depth([0.05, 0.2, 0.6, -1.0], [9.0, 0.1, 0.9, 1.0], 0.05)
    assert found.layers == (None, pytest.approx(0.5), 1.0, None)
    assert found.value == pytest.approx((0.2 * 0.5 + 0.6) / 0.8)
    assert depth([0.01, 0.02], [0.0, 1.0], 0.05).value is None
    assert depth([0.3], [-4.0], 0.05).value == 0.0


def test_a_threshold_that_no_layer_reaches_gives_reasons() -> None:
    models = three("llama")
    for name in ("patching", "lens"):
        found = look(name, models.unlearned, models, threshold=1e3)
        assert found.items is not None
        assert all(item.value is None and item.reason for item in found.items["forget"])
        assert list(found.layers) == [None] * LAYERS


@pytest.mark.parametrize("name", [*COMPARING, "fisher"])
def test_what_is_missing_is_said_with_the_flag_to_add(name: str) -> None:
    models = three("llama")
    attack = build("attack", name)
    for missing, flag in (("original", "--before"), ("reference", "--reference")):
        context = without(models.context(), missing)
        with pytest.raises(DataError, match=flag):
            attack.look(models.unlearned, RECORDS, context)
    asked = [Dialogue(messages=(Message(role="user", content="Hm?"),))]
    with pytest.raises(DataError, match="no forget record has a fact"):
        attack.look(models.unlearned, asked, models.context())
    deeper = LM(tiny_model("llama", num_hidden_layers=4), tiny_tokenizer(), precision="float32")
    with pytest.raises(ModelError, match="other layers"):
        attack.look(deeper, RECORDS, models.context())


def test_a_record_without_a_fact_has_a_reason_and_the_others_their_values() -> None:
    models = three("llama")
    open_end = Dialogue(messages=(Message(role="user", content="Hm?"),))
    attack = build("attack", {"name": "patching", "tokens": 64})
    found = attack.look(models.unlearned, [open_end, *RECORDS], models.context())
    items = found.items["forget"]
    assert items[0].value is None
    assert items[0].reason
    assert [one.value for one in items[1:]] == pytest.approx(
        values(look("patching", models.unlearned, models)), abs=1e-4
    )


def test_one_pass_serves_all() -> None:
    models = three("llama")
    context = models.context()
    passes = []
    for name in COMPARING:
        build("attack", name).look(models.unlearned, RECORDS, context)
        passes.append(context.states.passes)
    # patching asks what the original says, and reads the others' states
    assert passes == [2 * len(RECORDS), 3 * len(RECORDS), 3 * len(RECORDS)]
