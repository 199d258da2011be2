"""SAUCE by hand: which latents are chosen, what is taken out of patches, and what stays."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("PIL", reason="the extra 'vision' is not installed")

import itertools

from delible.component import build
from delible.errors import DataError, ModelError
from delible.intervene.base import Fitted
from delible.intervene.picture_states import before_patches, picture_states, read_layer
from delible.intervene.sae import SAE
from delible.intervene.sae_features import Activity, by_subject, features_of
from delible.intervene.sae_training import Training, fit_sae, silent_share
from delible.intervene.sites import Site
from delible.intervene.system import intervened
from delible.lm.lm import LM
from delible.lm.seeing import look
from delible.records import QA, ForgetRequest
from delible.system.asks import Decoding, Prompt, Score, TokenScores
from delible.system.questions import ask
from delible.testing.seeing import picture, seeing_lm
from delible.testing.tiny import tiny_model, tiny_tokenizer


def shows(seed: int, subject: str | None = None) -> QA:
    return QA(question="What?", answer="A star", images=(picture(seed),), subject=subject)


FORGET = tuple(shows(seed, "star") for seed in range(5)) + tuple(
    shows(seed, "ring") for seed in range(20, 24)
)
RETAIN = tuple(shows(100 + seed) for seed in range(6))
REQUEST = ForgetRequest(forget=FORGET, retain=RETAIN)


@lru_cache(maxsize=2)
def model() -> LM:
    return seeing_lm("llava", seed=2)


def drawn(width: int, latents: int, active: int, seed: int = 0) -> SAE:
    random = torch.Generator().manual_seed(seed)
    decoder = torch.nn.functional.normalize(torch.randn(latents, width, generator=random), dim=1)
    return SAE(decoder.T.contiguous(), torch.zeros(latents), decoder,
               torch.randn(width, generator=random) * 0.1, "topk", active)  # fmt: skip


def fitted(folder: Path, request: ForgetRequest = REQUEST, **options: Any) -> Fitted:
    if not (folder / "sae").exists():
        drawn(32, 96, 12).save(folder / "sae")
    given = {"sae": folder / "sae", "features": 6, "most_frequent": 0.9, **options}
    return build("intervention", {"name": "sauce", **given}).fit(model(), request)  # type: ignore[no-any-return]


def tower_states(records: tuple[QA, ...]) -> list[np.ndarray]:
    """States of the patches behind the third of four blocks, without the class token."""
    lm, found = model(), list[Tensor]()
    block = lm.core.get_submodule("model.vision_tower.encoder.layers.2")
    handle = block.register_forward_hook(
        lambda m, g, out: found.append(out[0] if isinstance(out, tuple) else out), prepend=True
    )
    with torch.no_grad():
        for one in records:
            number = lm.pictures.shown(one.images[0])  # type: ignore[union-attr]
            lm.core.get_image_features(**lm.pictures.inputs(number))  # type: ignore[union-attr]
    handle.remove()
    return [one[0, 1:].double().numpy() for one in found]


def latents_of(states: np.ndarray, sae: SAE) -> np.ndarray:
    pre = (states - sae.decoder_bias.double().numpy()) @ sae.encoder.double().numpy()
    low = np.sort(pre, axis=1)[:, -sae.active][:, None]
    return np.where((pre >= low) & (pre > 0), pre, 0)


def by_hand(
    factor: float, form: str = "scale", request: ForgetRequest = REQUEST, count: int = 6
) -> dict[int, tuple[float, float]]:
    """Latent -> (threshold, factor), float64."""
    sae, expected = drawn(32, 96, 12), dict[int, tuple[float, float]]()
    kept = latents_of(np.concatenate(tower_states(request.retain)), sae)  # type: ignore[arg-type]
    for subject in dict.fromkeys(one.subject for one in request.forget):
        records = tuple(one for one in request.forget if one.subject == subject)
        mine = latents_of(np.concatenate(tower_states(records)), sae)  # type: ignore[arg-type]
        score = mine.mean(0) / (mine.mean(0).sum() + 1e-8)
        score = score - kept.mean(0) / (kept.mean(0).sum() + 1e-8)
        score[(kept > 0).mean(0) > 0.9] = -np.inf
        threshold = np.concatenate([mine, kept]).mean(0)
        for j in np.argsort(-score)[:count]:
            assert score[j] > 0
            by = factor * (mine.mean(0)[j] if form == "mean_scale" else 1.0)
            old = expected.get(int(j), (np.inf, np.inf))
            expected[int(j)] = min(float(threshold[j]), old[0]), min(float(by), old[1])
    return expected


# ---- the choice, in double precision


@pytest.mark.parametrize("form", ["scale", "mean_scale"])
def test_latents_thresholds_and_factors_are_those_of_the_patches(form: str, tmp_path: Path) -> None:
    found, expected = fitted(tmp_path, factor=-2.0, form=form), by_hand(-2.0, form)
    order = sorted(expected)
    assert found.tensors["latents"].tolist() == order
    np.testing.assert_allclose(
        found.tensors["thresholds"], [expected[j][0] for j in order], rtol=1e-4
    )
    np.testing.assert_allclose(found.tensors["factors"], [expected[j][1] for j in order], rtol=1e-4)
    assert int(found.tensors["before"]) == 1


def test_the_block_is_the_one_that_the_projector_reads(tmp_path: Path) -> None:
    assert read_layer(model()) == 2
    assert before_patches(model(), 2) == 1
    assert fitted(tmp_path).intervention.layer == 2  # type: ignore[attr-defined]
    with pytest.raises(ModelError, match="does not reach"):
        intervened(model(), [fitted(tmp_path, layer=-1)])


def test_the_atoms_of_a_concept_are_found_at_the_right_count() -> None:
    random = np.random.default_rng(1)
    atoms = np.linalg.qr(random.normal(size=(32, 32)))[0]
    matrix = torch.tensor(atoms).float()
    sae = SAE(matrix.T.contiguous(), torch.full((32,), -0.05), matrix, torch.zeros(32), "relu")
    concept, others = [5, 17], [j for j in range(32) if j not in (5, 17)]

    def pictures(with_it: bool) -> list[Tensor]:
        made = []
        for _ in range(40):
            states = []
            for patch in range(9):
                active = random.choice(others, 3, replace=False)
                if with_it and patch < 3:  # the concept is on some patches alone
                    active[0] = random.choice(concept)
                states.append(random.uniform(0.5, 1.5, 3) @ atoms[active])
            made.append(torch.tensor(np.stack(states)).float())
        return made

    mine, kept = Activity.of(sae, pictures(True)), Activity.of(sae, pictures(False))
    for count in (1, 2, 3):
        found = features_of(mine, kept, count, 0.5, "selective", -1.0).latents.tolist()
        right = len(set(found) & set(concept))
        precision, recall = right / len(found), right / len(concept)
        assert (precision == 1, recall == 1) == (count <= 2, count >= 2)


# ---- the act


def features_after(found: Fitted, record: QA) -> np.ndarray:
    return look(intervened(model(), [found]), record.images)[0].double().numpy()


def test_patches_are_changed_by_the_latents_that_fire_and_by_nothing_else(tmp_path: Path) -> None:
    sae, expected = drawn(32, 96, 12), by_hand(-2.0, count=1)
    found = fitted(tmp_path, factor=-2.0, features=1)
    lm, changed = model(), 0
    for record in (*FORGET[:2], *RETAIN[:2]):
        (states,) = tower_states((record,))
        latents, new = latents_of(states, sae), states.copy()
        for j, (threshold, factor) in expected.items():
            fired = latents[:, j] > threshold
            new[fired] += (
                (factor - 1) * latents[fired, j][:, None] * sae.decoder[j].double().numpy()
            )
        changed += int((new != states).any(axis=1).sum())
        with torch.no_grad():
            said = lm.core.model.multi_modal_projector(torch.tensor(new).float()[None])[0]
        np.testing.assert_allclose(features_after(found, record), said, atol=1e-4)
    assert 2 < changed < 16


def test_a_picture_on_which_nothing_fires_is_read_bit_by_bit(tmp_path: Path) -> None:
    lm, found = model(), fitted(tmp_path)
    high = torch.full_like(found.tensors["thresholds"], 1e9)
    silent = replace(found, tensors={**found.tensors, "thresholds": high})
    none = replace(found, tensors={
        **found.tensors, **{name: found.tensors[name][:0] for name in ("latents", "thresholds",
                                                                       "factors")},
    })  # fmt: skip
    same = replace(found, tensors={
        **found.tensors, "factors": torch.ones_like(found.tensors["factors"])
    })  # fmt: skip
    asks = [Score(prompt, one.answer) for one in (*FORGET, *RETAIN) if (prompt := ask(one))]

    def said(lm: LM) -> list[bytes]:
        return [one.logprobs.tobytes() for one in lm.score(asks)]  # type: ignore[union-attr]

    plain = said(lm)
    for one in (silent, none, same):
        assert said(intervened(lm, [one])) == plain
    on = intervened(lm, [found])
    assert said(on) != plain
    assert said(lm) == plain, "the bare model is changed"
    off = on.taken_off()[1]
    assert said(off) == plain
    text = [Score(Prompt.ask("What is a star?"), "A shape")]
    assert said(on) != plain
    before, after = lm.score(text)[0], on.score(text)[0]
    assert isinstance(before, TokenScores)
    assert isinstance(after, TokenScores)
    assert before.logprobs.tobytes() == after.logprobs.tobytes(), "texts alone are changed"


def test_less_of_a_latent_is_more_of_its_direction_taken_away(tmp_path: Path) -> None:
    sae, record = drawn(32, 96, 12), FORGET[0]
    (states,) = tower_states((record,))
    latents = latents_of(states, sae)
    found = fitted(tmp_path)
    strongest = max(found.tensors["latents"].tolist(), key=lambda j: latents[:, j].max())
    patch = int(latents[:, strongest].argmax())
    along = []
    for factor in (1.0, 0.0, -1.0, -4.0):
        one = replace(found, tensors={
            **found.tensors, "latents": torch.tensor([strongest]),
            "thresholds": torch.tensor([0.0]), "factors": torch.tensor([factor]),
        })  # fmt: skip
        seen = dict(picture_states(
            intervened(model(), [one]), record.images, Site(what="vision", layers=(2,))
        ))  # fmt: skip
        seen_bare = seen[0][2][1:][patch].double().numpy()
        along.append(float(seen_bare @ sae.decoder[strongest].double().numpy()))
    steps = [a - b for a, b in itertools.pairwise(along)]
    np.testing.assert_allclose(steps, latents[patch, strongest] * np.array([1, 1, 3]), rtol=1e-3)


def test_two_concepts_are_their_union_in_either_order(tmp_path: Path) -> None:
    turned = ForgetRequest(forget=(*FORGET[5:], *FORGET[:5]), retain=RETAIN)
    one, other = fitted(tmp_path), fitted(tmp_path, request=turned)
    for name in ("latents", "thresholds", "factors"):
        assert torch.equal(one.tensors[name], other.tensors[name])
    alone = [
        set(fitted(tmp_path, request=ForgetRequest(forget=tuple(mine), retain=RETAIN))
            .tensors["latents"].tolist())
        for mine in by_subject(FORGET)
    ]  # fmt: skip
    assert set(one.tensors["latents"].tolist()) == alone[0] | alone[1]


# ---- whole


def test_an_autoencoder_of_patches_is_trained_kept_and_explains_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DELIBLE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "more"
    folder.mkdir()
    for seed in range(40):
        (folder / f"{seed}.png").write_bytes(picture(500 + seed).content())
    options = {"expansion": 2, "active": 8, "tokens": 1000, "passes": 3, "pictures": folder,
               "most_frequent": 0.9, "features": 4}  # fmt: skip
    one, other = (
        build("intervention", {"name": "sauce", **options}).fit(model(), REQUEST) for _ in "ab"
    )
    assert one.identity == other.identity
    assert len(list((tmp_path / "cache" / "saes").iterdir())) == 1
    read = picture_states(
        model(), [picture(s) for s in range(20)], Site(what="vision", layers=(2,))
    )
    assert [tuple(states[2].shape) for _, states in read] == [(5, 32)] * 20
    assert tuple(one.tensors["sae.W_enc"].shape) == (32, 64)
    # few directions on few states: little is left, and few latents are silent
    random = torch.Generator().manual_seed(0)
    atoms = torch.nn.functional.normalize(torch.randn(24, 32, generator=random), dim=1)
    which = torch.rand(4000, 24, generator=random) < 3 / 24
    states = (which * torch.rand(4000, 24, generator=random)) @ atoms
    sae = fit_sae(states, Training(2, 6, passes=30, batch=128))
    assert sae.unexplained(states) < 0.2
    assert silent_share(sae, states) < 0.2


def test_it_is_saved_opened_and_generates_with_it(tmp_path: Path) -> None:
    found = fitted(tmp_path, factor=-4.0)
    found.save(tmp_path / "kept")
    again = Fitted.load(tmp_path / "kept")
    assert again.identity == found.identity
    assert again.intervention.layer == 2  # type: ignore[attr-defined]
    prompts = [prompt for one in (*FORGET, *RETAIN) if (prompt := ask(one))]
    one, other = (intervened(model(), [x]).generate(prompts, Decoding(6)) for x in (found, again))
    assert one == other
    assert one != model().generate(prompts, Decoding(6))


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    blind = LM(tiny_model("llama"), tiny_tokenizer(), precision="float32")
    with pytest.raises(ModelError, match="given texts only"):
        build("intervention", "sauce").fit(blind, REQUEST)
    words = (QA(question="Who?", answer="A", subject="star"),)
    with pytest.raises(DataError, match="without any picture"):
        fitted(tmp_path, request=ForgetRequest(forget=words, retain=RETAIN))
    with pytest.raises(DataError, match="no retain record holds a picture"):
        fitted(tmp_path, request=ForgetRequest(forget=FORGET, retain=words))
    drawn(16, 40, 4).save(tmp_path / "other")
    with pytest.raises(DataError, match="16 values, and the model gives 32"):
        fitted(tmp_path, sae=tmp_path / "other")
    with pytest.raises(DataError, match="holds no pictures"):
        build("intervention", {"name": "sauce", "pictures": tmp_path}).fit(model(), REQUEST)
