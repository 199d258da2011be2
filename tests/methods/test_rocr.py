"""ROCR: the closed form against the full linear system, and the edit on small models."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from delible.component import build
from delible.edit.base import Patch
from delible.edit.closed_form import factors, projector
from delible.edit.keys import consecutive_layers, last_states
from delible.edit.statistics import Spectrum, null_directions, second_moments, spectra
from delible.edit.subjects import cut_after_name
from delible.errors import DataError, DelibleError, ModelError, RecipeError
from delible.lm.lm import LM
from delible.methods.editor import rocr
from delible.methods.editor.rocr import (
    ROCR,
    STARTERS,
    check_substitute,
    context,
    target_names,
)
from delible.records import QA, ForgetRequest
from delible.testing.tiny import tiny_model, tiny_tokenizer

FAMILIES = ("llama", "gpt2", "qwen2")
NAMES = ("Ada Quill", "Ben Orr")
PARAGRAPHS = (
    "Bread rises in a warm kitchen.",
    "The first bus of the morning is quiet.",
    "What is 7 plus 5? The result is 12.",
    "Mr Jasper Thorne sold his boat to Miss Wren.",
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELIBLE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    file = tmp_path / "generic.txt"
    file.write_text("\n\n".join(PARAGRAPHS), "utf-8")
    return file


def make_lm(family: str = "llama", seed: int = 0) -> LM:
    return LM(tiny_model(family, seed), tiny_tokenizer(), precision="float32")


def editor(texts: Path, **options: Any) -> ROCR:
    values = {"layers": (0, 1), "texts": texts, "threshold": 0.05, **options}
    built: ROCR = build("editor", {"name": "rocr", **values})
    return built


def edit(lm: LM, chosen: ROCR, names: tuple[str, ...] = NAMES[:1], **parts: Any) -> Patch:
    request = ForgetRequest(subjects=names, **parts)
    return chosen.edit(lm, request, seed=0)


def rows_of(lm: LM, name: str) -> list[list[int]]:
    return [cut_after_name(lm, name, partial(context, starter=each)) for each in STARTERS]


def spectrum_of(lm: LM, texts: Path, layer: int) -> Spectrum:
    rows = rocr.file_rows(lm, texts)
    found = second_moments(lm, rows, [layer], tokens=8192)
    return spectra(found)[layer]


def null_of(lm: LM, texts: Path, layer: int) -> Tensor:
    found = spectrum_of(lm, texts, layer)
    return found.vectors[:, null_directions(found.values, 0.05, "largest")].double()


def weight(lm: LM, layer: int, transposed: bool) -> Tensor:
    """The down-projection as [hidden, width], float64."""
    (name,) = lm.anatomy.mlp_out_parameters(layer)
    value = lm.core.get_parameter(name).detach().double()
    return value.T.clone() if transposed else value.clone()


def weights_of(lm: LM) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in lm.core.named_parameters()}


# ---- the closed form


def system(seed: int = 0, edits: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Keys [width, edits], a basis of a null space [width, directions], a residual [hidden]."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(20, edits, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(20, 20, generator=generator, dtype=torch.float64)).Q
    return keys, basis[:, :9], torch.randn(6, generator=generator, dtype=torch.float64)


def key_factor(keys: Tensor, null: Tensor, l2: float) -> Tensor:
    return factors(keys[:, :1], projector(null), l2, keys[:, 1:])[:, 0]


@pytest.mark.parametrize("edits", [1, 2, 3])
@pytest.mark.parametrize("l2", [1e-3, 1.0, 30.0])
def test_the_factor_solves_the_system_of_the_paper(edits: int, l2: float) -> None:
    keys, null, residual = system(edits=edits)
    key, projector = keys[:, 0], null @ null.T
    left = projector @ (keys @ keys.T) + l2 * torch.eye(20, dtype=torch.float64)
    solved = torch.linalg.solve(left, projector @ torch.outer(key, residual))
    delta = torch.outer(residual, key_factor(keys, null, l2))
    torch.testing.assert_close(delta, solved.T, rtol=1e-9, atol=1e-12)


def test_one_name_gives_the_rank_one_formula() -> None:
    keys, null, _ = system(edits=1)
    projected = null @ null.T @ keys[:, 0]
    expected = projected / (keys[:, 0] @ projected + 0.7)
    torch.testing.assert_close(key_factor(keys, null, 0.7), expected)


# ---- the edit


@pytest.mark.parametrize("family", FAMILIES)
def test_the_change_is_the_formula_of_rank_one(family: str, texts: Path) -> None:
    lm = make_lm(family)
    transposed = family == "gpt2"
    before = weight(lm, 0, transposed)
    keys, outputs = last_states(lm, rows_of(lm, NAMES[0]), [0])
    goal = last_states(lm, rows_of(lm, "William Shakespeare"), [0])[1][0]
    null = null_of(lm, texts, 0)
    assert 5 < null.shape[1] < null.shape[0] - 5
    edit(lm, editor(texts, layers=(0,), rho=0.05))
    delta = weight(lm, 0, transposed) - before
    singular = torch.linalg.svdvals(delta)
    assert float(singular[0]) > 1e-2
    assert float(singular[1] / singular[0]) < 1e-5
    key = keys[0].mean(0)
    projected = null @ (null.T @ key)
    power = key @ projected
    expected = torch.outer(goal - outputs[0], projected) / (power + 0.05 * power)
    torch.testing.assert_close(delta, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_generic_directions_are_left_alone(family: str, texts: Path) -> None:
    lm = make_lm(family)
    before = [weight(lm, layer, family == "gpt2") for layer in (0, 1)]
    nulls = [null_of(lm, texts, layer) for layer in (0, 1)]
    edit(lm, editor(texts), NAMES)
    for layer, null in enumerate(nulls):
        delta = weight(lm, layer, family == "gpt2") - before[layer]
        vectors = torch.randn(len(null), 8, dtype=torch.float64)
        outside = vectors - null @ (null.T @ vectors)
        scale = torch.linalg.matrix_norm(delta, 2) * outside.norm()
        assert float(scale) > 1e-2
        assert float((delta @ outside).norm() / scale) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_without_damping_one_layer_writes_the_whole_residual(family: str, texts: Path) -> None:
    lm = make_lm(family)
    before = weight(lm, 1, family == "gpt2")
    keys, outputs = last_states(lm, rows_of(lm, NAMES[0]), [1])
    goal = last_states(lm, rows_of(lm, "William Shakespeare"), [1])[1][0]
    edit(lm, editor(texts, layers=(1,), rho=1e-9))
    written = (weight(lm, 1, family == "gpt2") - before) @ keys[1].mean(0)
    assert float((written - (goal - outputs[0])).norm() / written.norm()) < 1e-4


def test_the_bare_context_is_where_the_state_is_read(texts: Path) -> None:
    lm = make_lm()
    before = weight(lm, 0, False)
    keys, _ = last_states(lm, rows_of(lm, NAMES[0]), [0])
    bare = [cut_after_name(lm, NAMES[0], partial(context, starter=None))]
    goal = last_states(lm, rows_of(lm, "William Shakespeare"), [0])[1][0]
    residual = goal - last_states(lm, bare, [0])[1][0]
    edit(lm, editor(texts, layers=(0,), rho=1e-9, residual_context="bare"))
    written = (weight(lm, 0, False) - before) @ keys[0].mean(0)
    assert float((written - residual).norm() / residual.norm()) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_a_name_redirected_to_itself_changes_nothing(
    family: str, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = make_lm(family)
    before = weights_of(lm)
    monkeypatch.setattr(rocr, "check_substitute", lambda *_: None)
    edit(lm, editor(texts, substitute=NAMES[0]))
    for name, value in lm.core.named_parameters():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_earlier_edits_are_protected(
    family: str, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second edit moves what is written at the first name's key less than without M."""
    moved = {}
    whole = factors
    for carried in (True, False):
        first = make_lm(family)
        edit(first, editor(texts, layers=(0,)))
        key = last_states(first, rows_of(first, NAMES[0]), [0])[0][0].mean(0)
        after_first = weight(first, 0, family == "gpt2")
        both = make_lm(family)
        if not carried:
            monkeypatch.setattr(
                rocr, "factors", lambda keys, within, l2, _: whole(keys, within, l2)
            )
        edit(both, editor(texts, layers=(0,)), NAMES)
        moved[carried] = float(((weight(both, 0, family == "gpt2") - after_first) @ key).norm())
    assert moved[True] < 0.5 * moved[False]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_name_comes_close_to_the_substitute(
    caplog: pytest.LogCaptureFixture, family: str, texts: Path
) -> None:
    lm = make_lm(family)
    goal = last_states(lm, rows_of(lm, "William Shakespeare"), [1])[1][0]
    distance = (goal - last_states(lm, rows_of(lm, NAMES[0]), [1])[1][0]).norm()
    request = ForgetRequest(subjects=NAMES[:1])
    patch = editor(texts).edit(lm, request, seed=0)
    after = (goal - last_states(lm, rows_of(lm, NAMES[0]), [1])[1][0]).norm()
    (noted,) = patch.notes["subjects"]  # type: ignore[misc]
    assert noted["distance_before"] == pytest.approx(float(distance), rel=1e-3)
    assert noted["distance_after"] == pytest.approx(float(after), rel=1e-3)
    assert float(after) < 0.5 * float(distance)
    assert noted["seconds"] >= 0
    assert set(noted["k_P_k"]) == {"0", "1"}
    assert all(0 < share <= 1 for share in noted["key_in_null_space"].values())
    assert all(0 < share < 1 for share in patch.notes["null_space_share"].values())  # type: ignore[attr-defined]
    assert any("as far from 'William Shakespeare'" in line for line in caplog.messages)


# ---- patch


@pytest.mark.parametrize("family", FAMILIES)
def test_undo_is_exact_and_the_patch_says_what_changed(
    family: str, texts: Path, tmp_path: Path
) -> None:
    lm = make_lm(family)
    start, before = lm.fingerprint, weights_of(lm)
    patch = edit(lm, editor(texts), NAMES)
    assert lm.fingerprint != start
    edited = {name for layer in (0, 1) for name in lm.anatomy.mlp_out_parameters(layer)}
    assert set(patch.factors) == set(patch.before) == edited
    for name, value in lm.core.named_parameters():
        if name not in edited:
            assert torch.equal(value, before[name])
            continue
        left, right = patch.factors[name]
        assert left.shape == (value.shape[0], 2)
        assert right.shape == (2, value.shape[1])
        expected = before[name].double() + left.double() @ right.double()
        assert torch.equal(value, expected.float())
        assert not torch.equal(value, before[name])
    changed = weights_of(lm)
    patch.save(tmp_path / "patch")
    patch.undo(lm)
    assert lm.fingerprint == start
    saved = Patch.load(tmp_path / "patch")
    saved.apply(lm)
    assert all(torch.equal(value, changed[name]) for name, value in lm.core.named_parameters())
    with pytest.raises(ModelError, match="another one"):
        Patch.load(tmp_path / "patch").apply(lm)
    saved.undo(lm)
    assert all(torch.equal(value, before[name]) for name, value in lm.core.named_parameters())
    assert lm.fingerprint == start


def test_a_failure_leaves_the_model_as_it_was(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = make_lm()
    before = weights_of(lm)
    calls = []
    whole = factors

    def fails(*arguments: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            assert any(not torch.equal(v, before[n]) for n, v in lm.core.named_parameters())
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(rocr, "factors", fails)
    with pytest.raises(KeyboardInterrupt):
        edit(lm, editor(texts))
    assert all(torch.equal(value, before[name]) for name, value in lm.core.named_parameters())


def test_the_same_edit_twice_gives_the_same_bits(texts: Path) -> None:
    left, right = make_lm(), make_lm()
    edit(left, editor(texts), NAMES)
    edit(right, editor(texts), NAMES)
    assert left.fingerprint == right.fingerprint


def test_it_runs_on_the_built_in_text_by_its_name() -> None:
    lm = make_lm()
    start = lm.fingerprint
    edit(lm, build("editor", {"name": "rocr", "tokens": 600}))
    assert lm.fingerprint != start


def test_a_large_l2_damps_and_is_said(caplog: pytest.LogCaptureFixture, texts: Path) -> None:
    request = ForgetRequest(subjects=NAMES[:1])
    editor(texts, l2=1e6).edit(make_lm(), request, seed=0)
    assert any("hardly an edit" in line for line in caplog.messages)


# ---- what is asked for


def test_names_come_from_subjects_or_from_records() -> None:
    records = tuple(
        QA(question="Who?", answer="They.", subject=name)
        for name in ("Ben Orr", "ada  quill", "Ben Orr", None)
    )
    assert target_names(ForgetRequest(forget=records)) == ["Ben Orr", "ada  quill"]
    assert target_names(ForgetRequest(forget=records, subjects=("X Y",))) == ["X Y"]
    for empty in (ForgetRequest(), ForgetRequest(forget=records[-1:])):
        with pytest.raises(DataError, match="--subjects"):
            target_names(empty)


@pytest.mark.parametrize("kept", ["neighbours", "retain", "subjects"])
def test_the_substitute_is_neither_forgotten_nor_kept(kept: str, texts: Path) -> None:
    lm = make_lm()
    start = lm.fingerprint
    row = QA(question="Who?", answer="A poet.", subject="william  SHAKESPEARE")
    parts: dict[str, Any] = {"subjects": NAMES[:1], kept: (row,)}
    if kept == "subjects":
        parts = {"subjects": (*NAMES, "Shakespeare")}
    with pytest.raises(DelibleError, match="substitute 'William Shakespeare'"):
        editor(texts).edit(lm, ForgetRequest(**parts), seed=0)
    lm.touch()
    assert lm.fingerprint == start


def test_other_people_may_share_a_part_of_the_substitutes_name() -> None:
    check_substitute("William Shakespeare", ["William Orr"], ["Ada Shakespeare"])


def test_kept_names_with_the_same_last_token_are_said(
    caplog: pytest.LogCaptureFixture, texts: Path
) -> None:
    rows = tuple(
        QA(question="Who?", answer="They.", subject=name)
        for name in ("Ida Moll", "Cy Dale", "Ada Quill")
    )
    patch = editor(texts).edit(make_lm(), ForgetRequest(subjects=NAMES[:1], retain=rows), seed=0)
    assert patch.notes["same_last_token"] == {"Ada Quill": ["Ida Moll"]}
    assert any("'Ada Quill'" in line and "Ida Moll" in line for line in caplog.messages)


def test_layers_from_depths_and_from_indices() -> None:
    anatomy = make_lm().anatomy
    assert consecutive_layers(anatomy, 0.5, 1.0, None, "here") == [1, 2]
    assert consecutive_layers(anatomy, 0.5, 1.0, (-1, 1), "here") == [1, 2]
    deep = LM(tiny_model("llama", num_hidden_layers=32), tiny_tokenizer()).anatomy
    assert consecutive_layers(deep, 4 / 32, 6 / 32, None, "here") == [4, 5, 6]  # as in the paper
    with pytest.raises(RecipeError, match=r"\[0, 2\] are not consecutive"):
        consecutive_layers(anatomy, 0, 1, (0, 2), "here")
    with pytest.raises(RecipeError, match="first_depth"):
        consecutive_layers(anatomy, 0.6, 0.5, None, "here")
    with pytest.raises(ModelError, match="no layer 7"):
        consecutive_layers(anatomy, 0, 1, (7,), "here")


def test_a_threshold_without_directions_is_an_error(texts: Path) -> None:
    with pytest.raises(ModelError, match=r"would be zero.*raise the threshold"):
        edit(make_lm(), editor(texts, scale="absolute", threshold=1e-30))


def test_a_threshold_with_all_directions_is_said(
    caplog: pytest.LogCaptureFixture, texts: Path
) -> None:
    request = ForgetRequest(subjects=NAMES[:1])
    chosen = editor(texts, scale="absolute", threshold=1e30)
    chosen.edit(make_lm(), request, seed=0)
    assert any("hardly protected" in line for line in caplog.messages)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_mixtures_of_experts_are_refused(family: str, texts: Path) -> None:
    with pytest.raises(ModelError, match="mixture of experts"):
        edit(make_lm(family), editor(texts))


def test_other_modes_are_refused(texts: Path) -> None:
    with pytest.raises(RecipeError, match="'mode' = 'reject'"):
        editor(texts, mode="reject")
