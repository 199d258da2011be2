"""Sparse autoencoders: what they compute, their files, and that training finds a dictionary."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from delible.component import build
from delible.errors import DataError, RunError
from delible.intervene import sae_training
from delible.intervene.sae import SAE
from delible.intervene.sae_training import (
    Training,
    fit_sae,
    silent_share,
    states_of,
    trained_sae,
)
from delible.intervene.sites import Site
from delible.lm.lm import LM
from delible.testing.tiny import tiny_model, tiny_tokenizer

QUICK = Training(expansion=2, active=2, passes=20, batch=64, learning_rate=3e-3)


def drawn(activation: Any = "relu", active: int = 0, seed: int = 0) -> SAE:
    random = np.random.default_rng(seed)

    def one(*shape: int) -> Tensor:
        return torch.tensor(random.normal(size=shape))

    threshold = one(9).abs() if activation == "jumprelu" else None
    return SAE(one(4, 9), one(9), one(9, 4), one(4), activation, active, threshold)


@lru_cache(maxsize=1)
def dictionary() -> tuple[np.ndarray, Tensor, np.ndarray]:
    """Atoms, more than dimensions, states that are sums of two of them, and which."""
    random = np.random.default_rng(1)
    atoms = random.normal(size=(28, 16))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    which = np.stack([random.permutation(28)[:2] for _ in range(3000)])
    weights = random.uniform(0.5, 2, which.shape)
    states = np.einsum("nk,nkd->nd", weights, atoms[which]) * 40 + 7
    return atoms, torch.tensor(states).float(), which


@lru_cache(maxsize=1)
def fitted() -> SAE:
    return fit_sae(dictionary()[1], QUICK, seed=0)


@pytest.mark.parametrize(
    ("activation", "active"), [("relu", 0), ("jumprelu", 0), ("topk", 2), ("topk", 8)]
)
def test_it_computes_what_the_formulas_say(activation: str, active: int) -> None:
    sae = drawn(activation, active)
    states = np.random.default_rng(5).normal(size=(6, 4))
    w, b, d, m = (one.numpy() for one in (
        sae.encoder, sae.encoder_bias, sae.decoder, sae.decoder_bias))  # fmt: skip
    pre = np.array([
        [sum((x[i] - m[i]) * w[i, j] for i in range(4)) + b[j] for j in range(9)] for x in states
    ])  # fmt: skip
    latents = np.zeros_like(pre)
    for row, values in enumerate(pre):
        for j, value in enumerate(values):
            speaks = value > 0
            if activation == "jumprelu":
                assert sae.threshold is not None
                speaks = speaks and value > float(sae.threshold[j])
            if activation == "topk":
                speaks = speaks and (values > value).sum() < active
            latents[row, j] = value if speaks else 0
    given = torch.tensor(states)
    np.testing.assert_allclose(sae.pre(given), pre, atol=1e-12)
    np.testing.assert_allclose(sae.encode(given), latents, atol=1e-12)
    decoded = latents @ d + m
    np.testing.assert_allclose(sae.decode(sae.encode(given)), decoded, atol=1e-12)
    share = ((states - decoded) ** 2).sum() / ((states - states.mean(axis=0)) ** 2).sum()
    assert sae.unexplained(given) == pytest.approx(share)
    assert replace(sae, centred=False).pre(given).numpy() == pytest.approx(pre + m @ w)
    again = SAE.of(sae.tensors())
    assert torch.equal(again.encode(given), sae.encode(given))
    assert silent_share(sae, given) == pytest.approx(1 - (latents > 0).any(axis=0).mean())


@pytest.mark.parametrize(("activation", "active"), [("relu", 0), ("jumprelu", 0), ("topk", 2)])
def test_files_are_those_of_sae_lens(activation: str, active: int, tmp_path: Path) -> None:
    sae = replace(drawn(activation, active), about={"hook_name": "blocks.3.hook_resid_post"})
    sae.save(tmp_path / "sae")
    config = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    weights = load_file(tmp_path / "sae" / "sae_weights.safetensors")
    name = {"relu": "standard"}.get(activation, activation)
    assert {key: config[key] for key in ("architecture", "d_in", "d_sae")} == {
        "architecture": name, "d_in": 4, "d_sae": 9,
    }  # fmt: skip
    assert config.get("k") == (active or None)
    assert config["apply_b_dec_to_input"] is True
    assert config["normalize_activations"] == config["reshape_activations"] == "none"
    shapes = {key: tuple(value.shape) for key, value in weights.items()}
    expected = {"W_enc": (4, 9), "W_dec": (9, 4), "b_enc": (9,), "b_dec": (4,)}
    assert shapes == expected | ({"threshold": (9,)} if activation == "jumprelu" else {})
    states = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    loaded = SAE.load(tmp_path / "sae")
    np.testing.assert_allclose(loaded.encode(states), sae.encode(states.double()), atol=1e-4)
    assert loaded.about["hook_name"] == "blocks.3.hook_resid_post"


def written(folder: Path, sae: SAE, **config: Any) -> Path:
    sae.save(folder)
    settings = json.loads((folder / "cfg.json").read_text())
    settings = {key: value for key, value in {**settings, **config}.items() if value is not None}
    (folder / "cfg.json").write_text(json.dumps(settings))
    return folder


def test_older_and_rescaled_ones_are_read(tmp_path: Path) -> None:
    sae, states = drawn("topk", 2), torch.tensor(np.random.default_rng(6).normal(size=(8, 4)))
    older = written(
        tmp_path / "older", sae, architecture="standard", k=None, activation_fn_str="topk",
        activation_fn_kwargs={"k": 2}, hook_name="blocks.1.hook_resid_pre",
    )  # fmt: skip
    found = SAE.load(older)
    assert (found.activation, found.active) == ("topk", 2)
    assert found.about["hook_name"] == "blocks.1.hook_resid_pre"
    # latents chosen, and scaled, by the lengths of the decoder's rows
    found = SAE.load(written(tmp_path / "scaled", sae, rescale_acts_by_decoder_norm=True))
    norms = sae.decoder.norm(dim=1)
    latents = sae.act(sae.pre(states) * norms)
    expected = (latents / norms) @ sae.decoder + sae.decoder_bias
    np.testing.assert_allclose(found.encode(states.float()), latents, atol=1e-5)
    np.testing.assert_allclose(found.decode(found.encode(states.float())), expected, atol=1e-5)


def test_what_is_not_known_is_refused(tmp_path: Path) -> None:
    sae = drawn("topk", 2)
    for number, (config, told) in enumerate([
        ({"architecture": "gated"}, "the kind 'gated'"),
        ({"normalize_activations": "layer_norm"}, "normed"),
        ({"reshape_activations": "hook_z"}, "attention heads"),
        ({"k": None}, "says its 'k'"),
        ({"architecture": "jumprelu"}, "'threshold'"),
    ]):  # fmt: skip
        with pytest.raises(DataError, match=told):
            SAE.load(written(tmp_path / str(number), sae, **config))
    with pytest.raises(DataError, match="no sparse autoencoder can be read"):
        SAE.load(tmp_path / "none")
    folder = written(tmp_path / "torn", sae)
    weights = load_file(folder / "sae_weights.safetensors")
    save_file({**weights, "b_enc": torch.zeros(3)}, folder / "sae_weights.safetensors")
    with pytest.raises(DataError, match="do not fit"):
        SAE.load(folder)
    with pytest.raises(DataError, match="states of 4 values, and the model gives 32"):
        sae.checked(32, "folder")
    assert sae.checked(4, "folder") is sae


def test_training_finds_the_atoms() -> None:
    atoms, states, _ = dictionary()
    sae = fitted()
    assert sae.unexplained(states) < 0.2
    assert silent_share(sae, states) < 0.2
    np.testing.assert_allclose(sae.decoder.norm(dim=1), 1, atol=1e-5)
    near = np.abs(atoms @ sae.decoder.numpy().T).max(axis=1)
    assert (near > 0.9).mean() > 0.8, near
    assert ((sae.encode(states) > 0).sum(dim=1) <= 2).all()
    # larger states, the same autoencoder: the scale is folded in (a power of 2: the same bits)
    larger = fit_sae(states * 1024, QUICK, seed=0)
    assert sae.encoder_bias.abs().max() > 1e-3
    for name in ("encoder_bias", "decoder_bias"):
        np.testing.assert_allclose(getattr(larger, name), getattr(sae, name) * 1024, rtol=1e-3)
    np.testing.assert_allclose(larger.encoder, sae.encoder, rtol=1e-3, atol=1e-5)


def test_what_would_only_lengthen_decoder_rows_is_no_step() -> None:
    fit = sae_training._Fit(torch.zeros(16), QUICK, seed=0)
    seen: list[Tensor] = []
    fit.optimizer.step = lambda: seen.append(fit.decoder.grad.clone())  # type: ignore
    fit.loss(dictionary()[1][:64], 10**9).backward()  # type: ignore[no-untyped-call]
    before = fit.decoder.grad.clone()  # type: ignore[union-attr]
    rows = fit.decoder.detach()
    along = (before * rows).sum(dim=1, keepdim=True)
    assert along.abs().max() > 1
    fit.update(0.1)
    (found,) = seen
    torch.testing.assert_close(found, before - along * rows)
    assert (found * rows).sum(dim=1).abs().max() < 1e-3


@pytest.mark.parametrize("active", [3, 30])
def test_silent_latents_are_called_back(active: int) -> None:
    states = dictionary()[1][:5].double()
    fit = sae_training._Fit(torch.zeros(16), replace(QUICK, active=active), seed=0)
    for weight in fit.weights:
        random = torch.Generator().manual_seed(weight.numel())
        weight.data = torch.randn(weight.shape, generator=random).double() * 0.3
    fit.silent_for[[4, 5, 30]] = 100
    encoder, bias, decoder, middle = (weight.detach().numpy() for weight in fit.weights)
    total, slopes = 0.0, np.zeros_like(decoder)
    for x in states.numpy():
        pre = (x - middle) @ encoder + bias
        top = np.argsort(-pre)[:active]
        left = x - middle - sum(max(pre[j], 0) * decoder[j] for j in top)
        missed = left - sum(max(pre[j], 0) * decoder[j] for j in (4, 5, 30))
        for j in top:
            slopes[j] -= 2 * max(pre[j], 0) * left / 5
        total += ((left**2).sum() + (missed**2).sum() / 32) / 5
    loss = fit.loss(states, 99)
    assert float(loss.detach()) == pytest.approx(total)
    loss.backward()  # type: ignore[no-untyped-call]
    assert fit.decoder.grad is not None
    moved = fit.decoder.grad.abs().sum(dim=1) > 0
    pre = (states.numpy() - middle) @ encoder + bias
    spoken = {int(j) for row in pre for j in np.argsort(-row)[:active] if row[j] > 0}
    called = {j for j in (4, 5, 30) if (pre[:, j] > 0).any()}
    assert called - spoken or active > 3
    assert set(moved.nonzero()[:, 0].tolist()) == spoken | called
    loud = sorted(spoken - {4, 5, 30})  # what others missed moves none but the silent ones
    np.testing.assert_allclose(fit.decoder.grad[loud], slopes[loud], rtol=1e-5, atol=1e-9)
    assert fit.silent_for[sorted(spoken)].tolist() == [0] * len(spoken)
    assert set(fit.silent_for.tolist()) <= {0, 5, 105}


def test_the_seed_decides_and_a_stopped_training_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    states, short = dictionary()[1][:400], replace(QUICK, passes=3)
    torch.manual_seed(3)
    whole = fit_sae(states, short, seed=1)
    torch.manual_seed(4)
    assert torch.equal(fit_sae(states, short, seed=1).encoder, whole.encoder)
    assert not torch.equal(fit_sae(states, short, seed=2).encoder, whole.encoder)

    class Stop(Exception):  # noqa: N818 (nothing is wrong)
        pass

    place = tmp_path / "checkpoint"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sae_training, "CHECKPOINT_SECONDS", -1.0)
        update = sae_training._Fit.update

        def failing(self: Any, rate: float) -> None:
            if self.step == 8:
                raise Stop
            update(self, rate)

        patch.setattr(sae_training._Fit, "update", failing)
        with pytest.raises(Stop):
            fit_sae(states, short, seed=1, checkpoint=place)
    assert int(load_file(place)["step"]) == 8
    resumed = fit_sae(states, short, seed=1, checkpoint=place)
    for name, value in whole.tensors().items():
        assert torch.equal(resumed.tensors()[name], value), name


def test_numbers_that_are_none_are_refused() -> None:
    with pytest.raises(DataError, match="are no numbers"):
        fit_sae(torch.full((100, 4), torch.nan), QUICK)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sae_training, "AUXILIARY", float("nan"))
        patch.setattr(sae_training, "DEAD_AFTER", -1.0)
        with pytest.raises(RunError, match="not finite"):
            fit_sae(dictionary()[1][:100], QUICK)


def test_the_states_are_those_of_the_site_without_first_and_outlying_ones() -> None:
    lm = LM(tiny_model("llama"), tiny_tokenizer(), precision="float32")
    rows = [[3 + n, 40, 50 + n, 60, 9] for n in range(20)]
    states, held, layer = states_of(lm, Site(layers=(1,)), rows)
    assert layer == 1
    with torch.no_grad():
        out = lm.core(input_ids=torch.tensor(rows), output_hidden_states=True)
    expected = out.hidden_states[2][:, 1:]
    np.testing.assert_allclose(states, expected[:19].reshape(-1, 32), atol=1e-5)
    np.testing.assert_allclose(held, expected[19], atol=1e-5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sae_training, "LONG", 1.0)
        fewer = states_of(lm, Site(layers=(1,)), rows)[0]
    norms = expected.reshape(-1, 32).norm(dim=1)
    assert len(fewer) == int((norms[:76] <= norms.median()).sum()) < len(states)


def test_it_is_trained_once_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("DELIBLE_CACHE", str(tmp_path))
    lm = LM(tiny_model("llama"), tiny_tokenizer(), precision="float32")
    random = np.random.default_rng(0)
    rows = [random.integers(3, 200, 30).tolist() for _ in range(24)]
    quick = replace(QUICK, passes=2)
    found = trained_sae(lm, Site(layers=(1,)), rows, quick)
    assert found.about["hook_name"] == "blocks.1.hook_resid_post"
    held = states_of(lm, Site(layers=(1,)), rows)[1]
    assert found.about["unexplained"] == pytest.approx(found.unexplained(held))
    assert "of the variance unexplained" in caplog.text
    with monkeypatch.context() as patch:
        patch.setattr(sae_training, "fit_sae", lambda *_, **__: pytest.fail("trained again"))
        again = trained_sae(lm, Site(layers=(1,)), rows, quick)
        assert torch.equal(again.encoder, found.encoder)
    made = []
    own = sae_training.fit_sae

    def counted(*given: Any, **named: Any) -> SAE:
        made.append(1)
        return own(*given, **named)

    monkeypatch.setattr(sae_training, "fit_sae", counted)
    trained_sae(lm, Site(layers=(2,)), rows, quick)
    trained_sae(lm, Site(layers=(1,)), rows[:-1], quick)
    trained_sae(lm, Site(layers=(1,)), rows, replace(quick, active=5))
    other = LM(tiny_model("llama", seed=1), tiny_tokenizer(), precision="float32")
    trained_sae(other, Site(layers=(1,)), rows, quick)
    assert len(made) == 4
    with pytest.raises(DataError, match="no text"):
        trained_sae(lm, Site(layers=(1,)), [[5]], quick)


@pytest.mark.parametrize("name", ["sae_steering", "sauce"])
def test_a_search_turns_latents_down_within_what_is_allowed(name: str) -> None:
    ranges = build("intervention", name).ranges()
    assert {"factor", "most_frequent"} == set(ranges)
    for option, one in ranges.items():
        for end in (one.low, one.high):
            build("intervention", {"name": name, option: end})
    assert ranges["factor"].low < -1 < 0 < ranges["factor"].high < 1
