"""ROME, MEMIT and AlphaEdit on random models: closed forms, and sequences of edits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from editing import (
    FAMILIES,
    LAYER,
    ONE,
    RECORDS,
    REQUEST,
    close,
    editor,
    ends_of,
    generic_keys,
    key_and_output,
    key_of,
    make_lm,
    moment,
    same,
    wanted,
    weight,
    weights_of,
)
from torch import Tensor

from delible.edit import located, statistics
from delible.edit.base import Patch, earlier_keys, unpatched
from delible.edit.keys import down_projection
from delible.errors import ModelError
from delible.lm.lm import LM
from delible.system.asks import Prompt

# ---- ROME


@pytest.mark.parametrize("covariance", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_rome_meets_the_value_by_a_change_of_rank_one(
    family: str, covariance: bool, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = make_lm(family)
    key, _ = key_of(lm, RECORDS[0])
    before, metric = weight(lm, LAYER), moment(lm)
    bias = dict(lm.core.named_parameters()).get(f"{down_projection(lm, LAYER).path}.bias")
    seen = wanted(monkeypatch)
    editor("rome", texts, covariance=covariance).edit(lm, ONE, seed=0)
    ((start, found),) = seen
    current = before @ key + (0 if bias is None else bias.detach().double())
    torch.testing.assert_close(start[0], current, rtol=1e-4, atol=1e-5)
    value = current + found.delta[0]
    after = weight(lm, LAYER)
    written = after @ key + (0 if bias is None else bias.detach().double())
    assert float((written - value).abs().max()) < 1e-4
    direction = torch.linalg.solve(metric, key) if covariance else key
    close(after - before, torch.outer(found.delta[0], direction) / (direction @ key))
    singular = torch.linalg.svdvals(after - before)
    assert float(singular[1]) < 1e-5 * float(singular[0])


def test_the_covariance_spares_what_ordinary_text_reads(texts: Path) -> None:
    moved = {}
    for covariance in (True, False):
        lm = make_lm()
        before, keys = weight(lm, LAYER), generic_keys(lm, LAYER)
        editor("rome", texts, covariance=covariance).edit(lm, ONE, seed=0)
        moved[covariance] = float(((weight(lm, LAYER) - before) @ keys.T).norm())
    assert moved[True] < 0.8 * moved[False]


def test_romes_direction_is_the_mean_key_and_its_value_that_of_the_bare_question(
    texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = make_lm()
    monkeypatch.setattr(located, "sampled_beginnings", lambda *_: ["The old town is", "You"])
    before, metric, (key, _) = weight(lm, LAYER), moment(lm), key_of(lm, RECORDS[0])
    keys = [key]
    for beginning in ("The old town is", "You"):
        ids = lm.template.prompt_ids(Prompt.ask(f"{beginning}. {RECORDS[0].question}"))
        keys.append(key_and_output(lm, ids, ends_of(lm, ids, "Ada Quill"), LAYER)[0])
    seen = wanted(monkeypatch)
    patch = editor("rome", texts).edit(lm, ONE, seed=0)
    direction = torch.linalg.solve(metric, torch.stack(keys).mean(0))
    expected = torch.outer(seen[0][1].delta[0], direction) / (direction @ key)
    close(weight(lm, LAYER) - before, expected)
    ((kept),) = patch.keys.values()  # later edits leave the mean alone
    close(kept[:, 0].double(), torch.stack(keys).mean(0))


def test_romes_questions_are_written_one_after_the_other(
    texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = make_lm()
    before, metric = weight(lm, LAYER), moment(lm)
    keys = [key_of(lm, record)[0] for record in RECORDS]
    seen = wanted(monkeypatch)
    editor("rome", texts).edit(lm, REQUEST, seed=0)
    ((_, found),) = seen
    now = before.clone()
    for key, delta in zip(keys, found.delta, strict=True):
        direction = torch.linalg.solve(metric, key)
        missing = before @ key + delta - now @ key
        now = now + torch.outer(missing, direction) / (direction @ key)
    close(weight(lm, LAYER) - before, now - before)


# ---- MEMIT


@pytest.mark.parametrize("family", FAMILIES)
def test_memit_is_the_solution_of_the_whole_system(
    family: str, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = make_lm(family)
    keys = torch.stack([key_of(lm, record)[0] for record in RECORDS], dim=1)
    before, metric = weight(lm, LAYER), moment(lm)
    seen = wanted(monkeypatch)
    editor("memit", texts, rho=0.3).edit(lm, REQUEST, seed=0)
    ((_, found),) = seen
    weighed = torch.stack([key @ torch.linalg.solve(metric, key) for key in keys.T]).mean() * 0.3
    full = found.delta.T @ keys.T @ torch.linalg.inv(weighed * metric + keys @ keys.T)
    close(weight(lm, LAYER) - before, full, 5e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_memit_writes_all_with_a_small_weight_and_nothing_with_a_large_one(
    family: str, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missed, sizes = [], []
    for given in (1e-7, 1e-2, 1e3, 1e8):
        lm = make_lm(family)
        keys = torch.stack([key_of(lm, record)[0] for record in RECORDS], dim=1)
        before = weight(lm, LAYER)
        seen = wanted(monkeypatch)
        editor("memit", texts, moment_weight=given).edit(lm, REQUEST, seed=0)
        residual = seen[-1][1].delta.T
        delta = weight(lm, LAYER) - before
        missed.append(float((delta @ keys - residual).norm() / residual.norm()))
        sizes.append(float(delta.norm()))
    assert missed == sorted(missed)
    assert missed[0] < 1e-3
    assert missed[-1] > 0.99
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 1e-3 * sizes[0]


def test_layers_share_what_is_still_missing(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = make_lm()
    before = [weight(lm, layer) for layer in (0, 1)]
    _, output = key_of(lm, RECORDS[0], 1)
    first, _ = key_of(lm, RECORDS[0], 0)
    seen = wanted(monkeypatch)
    options = {"layers": (0, 1), "moment_weight": 1e-9}
    editor("memit", texts, **options).edit(lm, ONE, seed=0)
    ((_, found),) = seen
    after = [weight(lm, layer) for layer in (0, 1)]
    close((after[0] - before[0]) @ first, found.delta[0] / 2)
    lm.core.get_parameter(down_projection(lm, 1).parameter).data.copy_(before[1].float())
    second, halfway = key_of(lm, RECORDS[0], 1)  # with the first layer edited
    close((after[1] - before[1]) @ second, output + found.delta[0] - halfway)


@pytest.mark.parametrize("name", ["memit", "alphaedit"])
def test_it_is_written_at_the_mean_of_the_bare_key_and_of_those_behind_beginnings(
    name: str, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = make_lm()
    monkeypatch.setattr(located, "sampled_beginnings", lambda *_: ["The old town is", "You"])
    others = []
    for beginning in ("The old town is", "You"):
        ids = lm.template.prompt_ids(Prompt.ask(f"{beginning}. {RECORDS[0].question}"))
        others.append(key_and_output(lm, ids, ends_of(lm, ids, "Ada Quill"), LAYER)[0])
    bare, _ = key_of(lm, RECORDS[0])
    key = (bare + (others[0] + others[1]) / 2) / 2
    spared = torch.linalg.inv(moment(lm)) if name == "memit" else null_projection(lm)
    before = weight(lm, LAYER)
    seen = wanted(monkeypatch)
    patch = editor(name, texts, rho=0.3).edit(lm, ONE, seed=0)
    ((_, found),) = seen
    # one key k: r (B k)^T / (k^T B k + 0.3 k^T B k)
    factor = spared @ key / (1.3 * (key @ spared @ key))
    close(weight(lm, LAYER) - before, torch.outer(found.delta[0], factor), 5e-3)
    ((kept),) = patch.keys.values()
    close(kept[:, 0].double(), key)


@pytest.mark.parametrize("batch", [None, 1])
@pytest.mark.parametrize("name", ["rome", "memit", "alphaedit"])
def test_what_is_missed_is_what_the_model_misses_once_all_is_written(
    name: str, batch: int | None, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later edit moves what an earlier one has written; that counts too."""
    lm = make_lm()
    seen = wanted(monkeypatch)
    options = {} if name == "rome" else {"rho": 0.3}
    patch = editor(name, texts, batch=batch, **options).edit(lm, REQUEST, seed=0)
    start = torch.cat([one for one, _ in seen])
    delta = torch.cat([found.delta for _, found in seen])
    shares = []
    for record, value, change in zip(RECORDS, start + delta, delta, strict=True):
        key, output = key_of(lm, record)
        if name == "rome":
            shares.append(float((value - weight(lm, LAYER) @ key).norm() / value.norm()))
        else:
            shares.append(float((value - output).norm() / change.norm()))
    assert max(shares) > 1e-2
    said = patch.notes["value_missed" if name == "rome" else "residual_left"]
    assert said == pytest.approx(sum(shares) / 3, rel=1e-2, abs=1e-4)


# ---- AlphaEdit


def null_projection(lm: LM, threshold: float = 0.05, layer: int = LAYER) -> Tensor:
    values, vectors = torch.linalg.eigh(moment(lm, 0.0, layer))
    null = vectors[:, values < threshold * values.max()]
    assert 5 < null.shape[1] < len(null) - 5
    return null @ null.T


@pytest.mark.parametrize("family", FAMILIES)
def test_alphaedit_is_the_solution_of_the_whole_system(
    family: str, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = make_lm(family)
    keys = torch.stack([key_of(lm, record)[0] for record in RECORDS], dim=1)
    before, projection = weight(lm, LAYER), null_projection(lm)
    seen = wanted(monkeypatch)
    patch = editor("alphaedit", texts, rho=0.3).edit(lm, REQUEST, seed=0)
    ((_, found),) = seen
    share = float(projection.trace()) / len(projection)
    assert patch.notes["null_space_share"] == {str(LAYER): pytest.approx(share, abs=1e-4)}
    l2 = 0.3 * torch.stack([key @ projection @ key for key in keys.T]).mean()
    left = projection @ keys @ keys.T + l2 * torch.eye(len(keys), dtype=torch.float64)
    full = torch.linalg.solve(left, projection @ keys @ found.delta).T
    delta = weight(lm, LAYER) - before
    close(delta, full, 5e-3)
    outside = torch.eye(len(keys), dtype=torch.float64) - projection
    assert float((delta @ outside).norm()) < 1e-5 * float(delta.norm())


def test_alphaedit_leaves_ordinary_keys_alone_and_memit_does_not(texts: Path) -> None:
    moved = {}
    for name, options in (
        ("alphaedit", {"threshold": 1e-4, "rho": 1e-3}), ("memit", {"rho": 1e-4}),
    ):  # fmt: skip
        lm = make_lm(num_hidden_layers=2, intermediate_size=256)
        before, keys = weight(lm, LAYER), generic_keys(lm, LAYER)
        keys = keys[torch.arange(300) % len(keys)]
        editor(name, texts, **options).edit(lm, ONE, seed=0)
        delta = weight(lm, LAYER) - before
        assert float(delta.norm()) > 1e-2
        moved[name] = float((delta @ keys.T).norm() / (before @ keys.T).norm())
    assert moved["alphaedit"] < 0.02
    assert moved["memit"] > 2 * moved["alphaedit"]


@pytest.mark.parametrize("from_disk", [False, True])
def test_earlier_edits_are_kept_over_a_chain_of_patches(
    from_disk: bool, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = make_lm()
    base, projection = weights_of(lm), null_projection(lm)
    first = editor("alphaedit", texts).edit(lm, ONE, seed=0)
    kept = first.keys[down_projection(lm, LAYER).parameter].double()
    torch.testing.assert_close(kept[:, 0], key_of(lm, RECORDS[0])[0], rtol=1e-4, atol=1e-5)
    if from_disk:
        first.save(tmp_path / "patch")
        first.undo(lm)
        first = Patch.load(tmp_path / "patch")
        first.apply(lm)
    edited = weights_of(lm)
    before = weight(lm, LAYER)
    monkeypatch.setattr(statistics, "_measure", lambda *_: pytest.fail("was read again"))
    seen = wanted(monkeypatch)
    request = REQUEST.model_copy(update={"forget": RECORDS[1:2]})
    key, _ = key_of(lm, RECORDS[1])
    second = editor("alphaedit", texts).edit(lm, request, seed=0)
    ((_, found),) = seen
    l2 = 0.05 * float(key @ projection @ key)
    both = torch.stack([key, kept[:, 0]], dim=1)
    left = projection @ both @ both.T + l2 * torch.eye(len(key), dtype=torch.float64)
    full = torch.linalg.solve(left, torch.outer(projection @ key, found.delta[0])).T
    close(weight(lm, LAYER) - before, full, 5e-3)
    assert second.notes["earlier_edits"] == {str(LAYER): 1}
    assert lm.patches == [first, second]
    assert len(earlier_keys(lm, down_projection(lm, LAYER).parameter)) == 2
    with unpatched(lm):
        assert same(lm, base)
    second.undo(lm)  # in this order each step is exact
    assert same(lm, edited)
    first.undo(lm)
    assert same(lm, base)
    assert lm.patches == []
    second.undo(lm)  # it is off already
    assert same(lm, base)


def test_an_edit_below_another_is_not_taken_off_alone(texts: Path) -> None:
    """Its weights hold the earlier edit, so that undoing it would bring that back."""
    lm = make_lm(num_hidden_layers=3)
    base = weights_of(lm)
    second = REQUEST.model_copy(update={"forget": RECORDS[1:2]})
    below = editor("rome", texts).edit(lm, ONE, seed=0)
    beside = editor("rome", texts, layer=2).edit(lm, second, seed=0)
    above = editor("rome", texts).edit(lm, second, seed=0)
    both = weights_of(lm)
    with pytest.raises(ModelError, match=r"a later edit .*is on the same weights"):
        below.undo(lm)
    assert same(lm, both)
    assert lm.patches == [below, beside, above]
    above.undo(lm)
    below.undo(lm)  # what is on other weights may stay
    assert lm.patches == [beside]
    place = down_projection(lm, 2).parameter
    assert torch.equal(lm.core.get_parameter(place), both[place])
    beside.undo(lm)
    assert same(lm, base)


def test_batches_of_one_request_keep_earlier_ones(texts: Path) -> None:
    lm = make_lm()
    patch = editor("alphaedit", texts, batch=2).edit(lm, REQUEST, seed=0)
    assert patch.notes["earlier_edits"] == {str(LAYER): 2}
    ((left, right),) = patch.factors.values()
    assert (left.shape[1], right.shape[0]) == (3, 3)
    ((kept),) = patch.keys.values()
    assert kept.shape[1] == 3


def test_an_empty_null_space_is_an_error(texts: Path) -> None:
    lm = make_lm()
    before = weights_of(lm)
    with pytest.raises(ModelError, match=r"editor 'alphaedit'.*would be zero.*threshold"):
        editor("alphaedit", texts, scale="absolute", threshold=1e-30).edit(lm, ONE, seed=0)
    assert same(lm, before)
