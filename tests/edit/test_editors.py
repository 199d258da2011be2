"""ROME, MEMIT and AlphaEdit on random models: closed forms, sequences, refused edits, undoing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from editing import (
    FAMILIES,
    GENERIC,
    RECORDS,
    REQUEST,
    RETAIN,
    ends_of,
    generic_keys,
    key_and_output,
    make_lm,
    same,
    weight,
    weights_of,
)
from torch import Tensor

from delible.component import build
from delible.edit import located, statistics
from delible.edit.base import Patch, earlier_keys, unpatched
from delible.edit.keys import down_projection
from delible.edit.values import Values
from delible.edit.verify import Bounds, Checked, other_questions
from delible.errors import DataError, ModelError, RecipeError
from delible.lm.lm import LM
from delible.records import QA, ForgetRequest
from delible.system.asks import Prompt
from delible.world import general

LAYER = 1
ONE = REQUEST.model_copy(update={"forget": RECORDS[:1]})
#: Bounds that no edit breaks.
FREE = {"most_divergence": 1e8, "most_change": 1e8}


@pytest.fixture(autouse=True)
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DELIBLE_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "generic.txt"
    file.write_text(GENERIC, "utf-8")
    return file


def editor(name: str, texts: Path, **options: Any) -> Any:
    layers = {"layer": LAYER} if name == "rome" else {"layers": (LAYER,)}
    null = {"scale": "largest", "threshold": 0.05} if name == "alphaedit" else {}
    values = {**layers, **null, "contexts": 0, "steps": 3, "texts": texts, **FREE, **options}
    return build("editor", {"name": name, **values})


def wanted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Values]]:
    """Collects z_0 and d of every search."""
    seen: list[tuple[Tensor, Values]] = []
    whole = located.find_values

    def watched(lm: LM, edits: Any, site: Any, start: Tensor, settings: Any) -> Values:
        found = whole(lm, edits, site, start, settings)
        seen.append((start, found))
        return found

    monkeypatch.setattr(located, "find_values", watched)
    return seen


def key_of(lm: LM, record: QA, layer: int = LAYER) -> tuple[Tensor, Tensor]:
    ids = lm.template.prompt_ids(Prompt.ask(record.question))
    return key_and_output(lm, ids, ends_of(lm, ids, record.subject or ""), layer)


def moment(lm: LM, ridge: float = 0.01, layer: int = LAYER) -> Tensor:
    keys = generic_keys(lm, layer)
    found = keys.T @ keys / len(keys)
    return found + ridge * found.trace() / len(found) * torch.eye(len(found)).double()


def close(found: Tensor, expected: Tensor, share: float = 1e-3) -> None:
    assert float(expected.norm()) > 1e-3
    assert float((found - expected).norm()) < share * float(expected.norm())


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
    editor("rome", texts).edit(lm, ONE, seed=0)
    direction = torch.linalg.solve(metric, torch.stack(keys).mean(0))
    expected = torch.outer(seen[0][1].delta[0], direction) / (direction @ key)
    close(weight(lm, LAYER) - before, expected)


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
    editor("alphaedit", texts, rho=0.3).edit(lm, REQUEST, seed=0)
    ((_, found),) = seen
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


# ---- statistics


def test_two_models_of_one_name_have_statistics_of_their_own(
    texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A toolkit that keeps them by name gives the second model those of the first."""
    for seed in (0, 1):
        lm = make_lm(seed=seed)
        lm.name = "same"
        key, metric, before = key_of(lm, RECORDS[0])[0], moment(lm), weight(lm, LAYER)
        seen = wanted(monkeypatch)
        editor("rome", texts).edit(lm, ONE, seed=0)
        direction = torch.linalg.solve(metric, key)
        expected = torch.outer(seen[-1][1].delta[0], direction) / (direction @ key)
        close(weight(lm, LAYER) - before, expected)


def test_the_error_of_the_statistics_is_noted(texts: Path) -> None:
    lm = make_lm()
    patch = editor("rome", texts).edit(lm, ONE, seed=0)
    noted: Any = patch.notes["statistics"]
    assert noted["tokens"] == len(generic_keys(lm, LAYER))
    # paragraphs 0 and 2 against 1 and 3: half of their moments' difference
    keys = generic_keys(lm, LAYER)
    lengths = [len(lm.tokenizer(text)["input_ids"]) for text in GENERIC.split("\n\n")]
    parts = keys.split(lengths)
    one, other = (torch.cat([parts[at], parts[at + 2]]) for at in (0, 1))
    apart = (one.T @ one / len(one) - other.T @ other / len(other)).norm() / 2
    error = float(apart / (keys.T @ keys / len(keys)).norm())
    assert noted["error"][str(LAYER)] == pytest.approx(error, rel=0.35)  # by random directions


# ---- what is committed


@pytest.mark.parametrize("name", ["rome", "memit", "alphaedit"])
@pytest.mark.parametrize("bound", ["most_divergence", "most_change"])
def test_an_edit_that_costs_too_much_is_refused(name: str, bound: str, texts: Path) -> None:
    lm = make_lm()
    start = lm.fingerprint
    first = editor(name, texts).edit(lm, ONE, seed=0)
    before, patches = weights_of(lm), list(lm.patches)
    request = REQUEST.model_copy(update={"forget": RECORDS[1:2]})
    with pytest.raises(ModelError, match=f"editor '{name}': the edit was refused.*{bound}"):
        editor(name, texts, **{bound: 1e-9}).edit(lm, request, seed=0)
    assert same(lm, before)
    assert lm.patches == patches == [first]
    first.undo(lm)
    assert lm.fingerprint == start


def test_what_is_no_number_is_within_no_bound() -> None:
    fine = Checked(0.1, 0.9, 1.0, 0.1, 0.0, 3, {"1": 0.2})
    fine.require(Bounds(0.2, 0.3), "here")
    for broken in (
        replace(fine, divergence=float("nan")), replace(fine, changes={"1": float("nan")}),
        replace(fine, divergence=0.3), replace(fine, changes={"1": 0.1, "2": 0.4}),
    ):  # fmt: skip
        with pytest.raises(ModelError, match="refused and nothing was changed"):
            broken.require(Bounds(0.2, 0.3), "here")


def test_kept_questions_are_asked_else_general_ones() -> None:
    named = QA(question="Is Ada Quill tall?", answer="Yes")
    near = tuple(QA(question=f"Near {at}?", answer="Yes") for at in range(30))
    kept = tuple(QA(question=f"Kept {at}?", answer="Yes") for at in range(30))
    names = ["Ada Quill"]
    both = other_questions(ForgetRequest(retain=(named, *kept), neighbours=near), names)
    assert [one for one in both if one in near] == list(near[:12])
    assert [one for one in both if one in kept] == list(kept[:12])
    few = other_questions(ForgetRequest(retain=kept[:2], neighbours=near), names)
    assert len(few) == 24
    assert other_questions(ForgetRequest(retain=(named,)), names) == list(general()[:24])


def test_what_is_checked_is_what_is_said(texts: Path) -> None:
    lm = make_lm()
    before = lm.copy()
    patch = editor("memit", texts).edit(lm, REQUEST, seed=0)
    checked: Any = patch.notes["checked"]

    def said(one: LM, question: str, answer: str) -> Tensor:
        row = one.template.encode(Prompt.ask(question), answer)
        with torch.no_grad():
            logits = one.core(input_ids=torch.tensor([row.ids])).logits[0].double()
        return logits.log_softmax(-1)[row.start - 1 : -1]

    others = [(record.question, record.answer) for record in RETAIN]
    pairs = [(said(before, *one), said(lm, *one)) for one in others]
    kl = torch.cat([(one.exp() * (one - other)).sum(1) for one, other in pairs])
    assert checked["others"] == 2
    assert checked["divergence"] == pytest.approx(float(kl.mean()), rel=1e-3)
    moved = torch.cat([one.argmax(1) != other.argmax(1) for one, other in pairs]).double()
    assert checked["moved"] == pytest.approx(float(moved.mean()), abs=1e-4)
    targets: Any = [
        (note["target"], record) for note, record in zip(patch.notes["edits"], RECORDS, strict=True)
    ]  # type: ignore[call-overload]
    probabilities = []
    for target, record in targets:
        row = lm.template.encode(Prompt.ask(record.question), target)
        tokens = said(lm, record.question, target)
        probabilities.append(float(
            tokens.gather(1, torch.tensor(row.ids[row.start :])[:, None]).mean().exp()
        ))  # fmt: skip
    assert checked["target_after"] == pytest.approx(sum(probabilities) / 3, rel=1e-2)
    delta = (weight(lm, LAYER) - weight(before, LAYER)).norm() / weight(before, LAYER).norm()
    assert checked["changes"][str(LAYER)] == pytest.approx(float(delta), rel=1e-3)


def test_the_same_edit_twice_gives_the_same_bits(texts: Path) -> None:
    left, right = make_lm(), make_lm()
    for lm in (left, right):
        torch.manual_seed(id(lm) % 1000)
        editor("memit", texts, contexts=3, value_contexts=1).edit(lm, REQUEST, seed=0)
    assert left.fingerprint == right.fingerprint


# ---- what is asked for


def test_questions_without_their_subject_are_told_and_left_out(
    texts: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stray = QA(question="Who is she?", answer="A poet", subject="Ada Quill")
    request = ForgetRequest(forget=(*RECORDS[:1], stray), retain=RETAIN)
    patch = editor("rome", texts).edit(make_lm(), request, seed=0)
    assert (patch.notes["questions"], patch.notes["left_out"]) == (1, 1)
    assert any("do not name their subject" in line and "she" in line for line in caplog.messages)
    with pytest.raises(DataError, match="no forget question names its subject"):
        editor("rome", texts).edit(make_lm(), ForgetRequest(forget=(stray,)), seed=0)


def test_subjects_of_the_request_serve_records_without_one(texts: Path) -> None:
    record = QA(question="Where was Ada Quill born?", answer="Norrby")
    request = ForgetRequest(forget=(record,), subjects=("Ben Orr", "Ada Quill"), retain=RETAIN)
    patch = editor("rome", texts).edit(make_lm(), request, seed=0)
    assert patch.notes["edits"][0]["subject"] == "Ada Quill"  # type: ignore[index]


def test_layers_are_depths_or_indices(texts: Path) -> None:
    lm = make_lm(num_hidden_layers=30)
    assert build("editor", "rome").chosen_layers(lm, None) == [5]
    assert build("editor", "memit").chosen_layers(lm, None) == [4, 5, 6, 7, 8]
    assert build("editor", "alphaedit").chosen_layers(lm, None) == [4, 5, 6, 7, 8]
    assert build("editor", "alphaedit").chosen_layers(lm, 20) == [18, 19, 20, 21, 22]
    assert build("editor", "memit").chosen_layers(lm, 29) == [25, 26, 27, 28, 29]
    assert editor("rome", texts, layer=-1).chosen_layers(lm, None) == [29]
    with pytest.raises(RecipeError, match="not consecutive"):
        editor("memit", texts, layers=(1, 3)).chosen_layers(lm, None)
    with pytest.raises(ModelError, match="no layer 30"):
        editor("rome", texts, layer=30).chosen_layers(lm, None)


def test_a_traced_layer_is_edited(texts: Path) -> None:
    lm = make_lm()
    patch = editor("rome", texts, layer="traced").edit(lm, ONE, seed=0)
    traced: Any = patch.notes["tracing"]
    assert patch.notes["layers"] == [traced["layer"]]
    assert len(traced["tables"]) == 1


@pytest.mark.parametrize("name", ["rome", "memit", "alphaedit"])
def test_mixtures_of_experts_are_refused(name: str, texts: Path) -> None:
    with pytest.raises(ModelError, match="mixture of experts"):
        editor(name, texts).edit(make_lm("mixtral"), ONE, seed=0)


def test_a_search_looks_at_strength_only() -> None:
    assert set(build("editor", "alphaedit").ranges()) == {
        "rho", "threshold", "clamp", "learning_rate",
    }  # fmt: skip
    assert set(build("editor", "rome").ranges()) == {"clamp", "learning_rate"}
