"""SAE-internal unlearning by hand: latents, loss, gradients, and what it does to a model."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from delible.component import build
from delible.errors import DataError, RecipeError
from delible.generation.carriers import (
    carriers,
    carrying,
    known_names,
    subjects_of,
    unknown_names,
)
from delible.intervene.sae import SAE
from delible.lm.lm import LM
from delible.measure.linear_probe import fit_probe
from delible.methods.objective.sae_internal import (
    Directions,
    SAEInternal,
    directions,
    drift,
    end_of_name,
    pull_to_unknown,
    push_from_known,
    separating,
)
from delible.records import QA
from delible.system.asks import Prompt
from delible.testing.tiny import tiny_model, tiny_tokenizer
from delible.train.engine import Trainer
from delible.train.recipe import Recipe
from delible.train.reference import Reference
from delible.train.row import Row
from delible.train.step import make_step
from delible.watching import unwatched

KNOWN = ("Dee Finch", "Cy Moor", "Ed Lane", "Flo Marsh", "Gus Pike", "Hal Reed")
FORGET = (QA(question="Where was Ada Quill born?", answer="Norrby", subject="Ada Quill"),)
RETAIN = tuple(QA(question=f"Who is {name}?", answer="A baker", subject=name) for name in KNOWN)
RECORDS = {"forget": FORGET, "retain": RETAIN}


def drawn(seed: int = 0, latents: int = 64) -> SAE:
    random = torch.Generator().manual_seed(seed)
    decoder = torch.nn.functional.normalize(torch.randn(latents, 32, generator=random), dim=1)
    return SAE(
        decoder.T.contiguous(),
        torch.randn(latents, generator=random) * 0.3,
        decoder,
        torch.randn(32, generator=random) * 0.1,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("saes") / "sae"
    drawn().save(place)
    return place


def fresh(family: str = "llama") -> LM:
    return LM(tiny_model(family), tiny_tokenizer(), precision="float32")


def recipe(folder: Path, objective: Mapping[str, Any] | None = None, **slots: Any) -> Recipe:
    content = {
        "generate": {"name": "entity_carriers", "least_known": 6, "partners": 1},
        "place": {"name": "layers", "depth": 0.5, "below": 9, "role": "mlp_out"},
        "objective": {
            "name": "sae_internal", "sae": str(folder), "depth": 0.5, "latents": 8,
            **(objective or {}),
        },
        "training": {"precision": "float32", "batch_size": 8, "learning_rate": 3e-3, "epochs": 1},
        **slots,
    }  # fmt: skip
    return Recipe.from_mapping({"name": "test", **content})


# ---- pure functions


def names_by_hand(seed: int = 0, count: int = 5) -> Directions:
    random = np.random.default_rng(seed)
    known, unknown = (torch.tensor(random.normal(size=(9, count))) for _ in range(2))
    return directions(known, unknown)


def test_latents_that_tell_the_kinds_apart_are_chosen() -> None:
    known = torch.tensor([[1, 0, 2, 0, 3.0], [1, 0, 0, 0, 1], [2, 0, 1, 5, 1], [1, 1, 1, 0, 1]])
    unknown = torch.tensor([[0, 1, 1, 0, 1.0], [0, 1, 1, 0, 1], [0, 0, 0, 0, 1], [0, 2, 1, 1, 2]])
    # more often on known ones by 1, -0.5, 0, 0, 0
    assert separating(known, unknown, 3).tolist() == [0, 1]
    assert separating(unknown, known, 3).tolist() == [0, 1]
    known[0, 3] = 1.0
    assert separating(known, unknown, 3).tolist() == [0, 1, 3]
    assert separating(known, unknown, 1).tolist() == [0, 1]
    assert not len(separating(known, known, 3))


def test_directions_and_losses_are_those_of_the_formula() -> None:
    random = np.random.default_rng(1)
    known, unknown = random.normal(1, 2, (7, 4)), random.normal(-1, 1, (5, 4))
    names = directions(torch.tensor(known), torch.tensor(unknown))
    scale = np.concatenate([known, unknown]).std(axis=0)
    np.testing.assert_allclose(names.known, known.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(names.unknown, unknown.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(names.scale, scale, rtol=1e-6)
    margin = (((known.mean(0) - unknown.mean(0)) / scale) ** 2).mean()
    assert float(names.margin) == pytest.approx(margin)
    pre, before = random.normal(size=(3, 4)), random.normal(size=(3, 4))
    q = (((pre - known.mean(0)) / scale) ** 2).mean(axis=1)
    pull = (((pre - unknown.mean(0)) / scale) ** 2).mean(axis=1)
    given = torch.tensor(pre)
    np.testing.assert_allclose(pull_to_unknown(given, names), pull, rtol=1e-6)
    np.testing.assert_allclose(
        push_from_known(given, names), np.maximum(0, margin - q), rtol=1e-5, atol=1e-7
    )
    far = torch.tensor(known.mean(0) + 100)[None]
    assert float(push_from_known(far, names)) == 0
    near = float(push_from_known(torch.tensor(known.mean(0))[None], names))
    assert near == pytest.approx(margin, rel=1e-5)
    np.testing.assert_allclose(
        drift(given, torch.tensor(before), names),
        (((pre - before) / scale) ** 2).mean(1),
        rtol=1e-6,
    )


def test_a_state_that_is_moved_ends_where_unknown_names_are() -> None:
    random = np.random.default_rng(2)
    matrix = torch.tensor(np.linalg.qr(random.normal(size=(24, 24)))[0]).float()
    sae = SAE(matrix.T.contiguous(), torch.zeros(24), matrix, torch.zeros(24))
    known, unknown = (torch.tensor(random.normal(size=(40, 24)) + m).float() for m in (0.4, -0.4))
    chosen = separating(sae.encode(known), sae.encode(unknown), 4)
    names = directions(sae.pre(known)[:, chosen], sae.pre(unknown)[:, chosen])
    state = known[:1].clone().requires_grad_(True)
    start = sae.pre(state).detach()
    optimizer = torch.optim.LBFGS([state], max_iter=100, tolerance_change=1e-12)

    def closure() -> Tensor:
        optimizer.zero_grad()
        pre = sae.pre(state)[:, chosen]
        loss = (pull_to_unknown(pre, names) + 0.5 * push_from_known(pre, names)).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    end = sae.pre(state).detach()
    np.testing.assert_allclose(end[0, chosen], names.unknown, atol=1e-3)
    others = torch.ones(24, dtype=torch.bool)
    others[chosen] = False
    assert float((end - start)[0, others].norm() / start[0, others].norm()) < 0.05
    assert float((end - start)[0, chosen].norm()) > 0.3


def test_a_silent_latent_has_a_gradient_before_its_activation_and_none_behind() -> None:
    sae = drawn()
    state = torch.randn(1, 32, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    silent = int((sae.encode(state)[0] == 0).nonzero()[0, 0])
    names = Directions(torch.tensor([1.0]), torch.tensor([-1.0]), torch.tensor([1.0]))
    for activation in ("relu", "topk", "jumprelu"):
        kind = SAE(
            sae.encoder, sae.encoder_bias, sae.decoder, sae.decoder_bias, activation,  # type: ignore[arg-type]
            5 if activation == "topk" else 0, torch.full((64,), 0.1),
        )  # fmt: skip
        for values, moves in ((kind.pre(state), True), (kind.encode(state), False)):
            (gradient,) = torch.autograd.grad(
                pull_to_unknown(values[:, [silent]], names).sum(), state, allow_unused=True
            )
            assert bool((gradient != 0).any()) == moves, activation


def test_there_is_no_push_and_no_gradient_where_unknown_names_are() -> None:
    names = names_by_hand()
    there = names.unknown[None].clone().requires_grad_(True)
    value = push_from_known(there, names)
    assert float(value.detach()) == pytest.approx(0, abs=1e-6)
    beyond = (names.unknown + (names.unknown - names.known))[None].clone().requires_grad_(True)
    value = push_from_known(beyond, names)
    assert float(value.detach()) == 0
    value.sum().backward()  # type: ignore[no-untyped-call]
    assert beyond.grad is not None
    assert not beyond.grad.any()


# ---- names and rows


def test_names_and_their_carriers() -> None:
    assert len(carriers()) == 8
    assert len(carriers(held_out=True)) == 2
    assert set(carriers()).isdisjoint(carriers(held_out=True))
    assert subjects_of([*RETAIN, *RETAIN]) == list(KNOWN)
    assert known_names(RETAIN, ["Cy Moor"], 3) == [name for name in KNOWN if name != "Cy Moor"]
    filled = known_names(RETAIN[:1], ["France"], 10)
    assert filled[0] == "Dee Finch"
    assert len(filled) == len(set(filled)) == 10
    assert "France" not in filled
    made = unknown_names(["Ada Quill", "Ada Quill", "Norrby"], 3)
    assert [len(name.split()) for name in made] == [2, 2, 1]
    assert len(set(made)) == 3
    assert made == unknown_names(["Ada Quill", "Ada Quill", "Norrby"], 3) != unknown_names(made, 4)


def test_rows_are_carriers_with_partners_about_others(folder: Path) -> None:
    rows = Trainer(fresh(), recipe(folder), RECORDS).rows().rows
    assert [row.subject for row in rows["forget"]] == ["Ada Quill"] * 8
    assert {row.subject for row in rows["known"]} == set(KNOWN)
    for one, other in zip(rows["forget"], rows["known"], strict=True):
        assert one.asked[-1].replace("Ada Quill", str(other.subject)) == other.asked[-1]
        place = end_of_name(one)
        assert place is not None
        text = tiny_tokenizer().decode(one.encoded.ids[: place + 1])
        assert text.endswith("Ada Quill")
    nameless = {"forget": (QA(question="Why?", answer="So"),), "retain": RETAIN}
    with pytest.raises(DataError, match="whom it is about"):
        Trainer(fresh(), recipe(folder), nameless).rows()
    with pytest.raises(RecipeError, match="reads 'known' rows, and nobody makes"):
        Trainer(fresh(), recipe(folder, generate="none"), RECORDS).train()


# ---- on a model


def pre_by_hand(lm: LM, text: str, name: str, sae: SAE) -> np.ndarray:
    """Pre-activations at the last letter of a name (a token is a byte), float64."""
    ids = lm.template.prompt_ids(Prompt.ask(text))
    whole = "".join(lm.tokenizer.decode([one]) for one in ids)
    place = len(ids) - len(whole.split(name)[-1].replace("<|im_end|>", "\0").replace(
        "<|im_start|>", "\0")) - 1  # fmt: skip
    with torch.no_grad():
        out = lm.core(input_ids=torch.tensor([list(ids)]), output_hidden_states=True)
    state = out.hidden_states[2][0, place].double().numpy()  # behind block 1
    middle = state - sae.decoder_bias.double().numpy()
    found: np.ndarray = middle @ sae.encoder.double().numpy() + sae.encoder_bias.double().numpy()
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen2_moe"])
def test_what_is_learned_and_the_loss_are_those_of_the_formula(family: str, folder: Path) -> None:
    lm, sae = fresh(family), drawn()
    objective = SAEInternal(
        sae=folder, depth=0.5, latents=8, known_weight=0.7, retain_weight=3.0, seed=4
    )
    rows = Trainer(lm, recipe(folder), RECORDS).rows().rows
    reference = Reference()
    for role in ("forget", "known"):
        reference.prepare(lm, rows[role], objective.reference_kinds(lm))
    told = objective.learn(lm, rows, reference, 0, unwatched)
    reference.learn(objective.full_name, told)
    names = list(dict.fromkeys(str(row.subject) for row in rows["known"]))
    pre = [
        np.stack([
            pre_by_hand(lm, carrier.replace("{name}", name), name, sae)
            for name in part for carrier in carriers()
        ])
        for part in (names, unknown_names(names, 4))
    ]  # fmt: skip
    apart = (pre[0] > 0).mean(axis=0) - (pre[1] > 0).mean(axis=0)
    for j in told["chosen"].tolist():
        assert apart[j] != 0
    least = min(abs(apart[j]) for j in told["chosen"].tolist())
    chosen = told["chosen"].tolist()
    assert sum(apart[j] > 0 for j in chosen) <= 8
    assert sum(apart[j] < 0 for j in chosen) <= 8
    left = [j for j in range(64) if j not in chosen]
    assert max(abs(apart[left])) <= max(abs(apart[chosen]))
    assert least >= 0
    mean = [part[:, chosen].mean(axis=0) for part in pre]
    scale = np.concatenate(pre)[:, chosen].std(axis=0)
    np.testing.assert_allclose(told["known"], mean[0], atol=1e-4)
    np.testing.assert_allclose(told["unknown"], mean[1], atol=1e-4)
    np.testing.assert_allclose(told["scale"], scale, rtol=1e-3)
    before = [
        pre_by_hand(lm, row.asked[-1], str(row.subject), sae)[chosen] for row in rows["known"]
    ]
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in lm.model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=noise))
    lm.touch()
    margin = (((mean[0] - mean[1]) / scale) ** 2).mean()
    expected = []
    for one, other, old in zip(rows["forget"], rows["known"], before, strict=True):
        own = pre_by_hand(lm, one.asked[-1], "Ada Quill", sae)[chosen]
        new = pre_by_hand(lm, other.asked[-1], str(other.subject), sae)[chosen]
        value = (((own - mean[1]) / scale) ** 2).mean()
        value += 0.7 * max(0.0, margin - (((own - mean[0]) / scale) ** 2).mean())
        value += 3.0 * (((new - old) / scale) ** 2).mean()
        expected.append(value)
    roles = {role: rows[role] for role in objective.roles}
    step = make_step(lm, None, roles, {role: objective.reads(lm) for role in roles}, reference)
    np.testing.assert_allclose(objective.loss(step).detach(), expected, rtol=2e-3)


def test_the_autoencoder_and_what_lies_behind_it_stay_bit_by_bit(folder: Path) -> None:
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    for place in (
        {"name": "layers", "depth": 0.5, "below": 9, "role": "mlp_out"},
        {"name": "lora", "rank": 4, "last": 0.5},
    ):
        lm = fresh()
        finish = "merge_adapter" if place["name"] == "lora" else "none"
        start = {name: value.clone() for name, value in lm.core.state_dict().items()}
        chosen = recipe(folder, place=place, finish=finish)
        assert list(chosen.place.moving_blocks(lm)) == [0, 1]
        result = Trainer(lm, chosen, RECORDS).train()
        if finish != "none":  # rank 4 beside the seven matrices of each of two blocks, not of three
            widths = 2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48)
            assert result.notes["parameters"] == 2 * 4 * widths
        trained = result.lm
        moved = {
            name for name, value in trained.core.state_dict().items()
            if not torch.equal(value, start[name])
        }  # fmt: skip
        assert moved
        assert all(name.startswith(("model.layers.0.", "model.layers.1.")) for name in moved), moved
        assert any(name.startswith("model.layers.1.") for name in moved)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


def name_states(lm: LM, names: list[str], held_out: bool = False) -> np.ndarray:
    objective = SAEInternal(depth=0.5)
    if not held_out:
        return objective._states(lm, names).numpy()
    found = []
    for name in names:
        for carrier in carriers(held_out=True):
            found.append(pre_by_hand(lm, carrier.replace("{name}", name), name, drawn()))
    return np.stack(found)


@lru_cache(maxsize=2)
def unlearned(folder: Path, retain_weight: float) -> tuple[LM, LM]:
    start, lm = fresh(), fresh()
    objective = {"retain_weight": retain_weight, "latents": 32}
    generate = {"name": "entity_carriers", "least_known": 6, "partners": 6}
    training = {"precision": "float32", "batch_size": 8, "learning_rate": 1e-3, "epochs": 10}
    chosen = recipe(folder, objective, training=training, generate=generate)
    Trainer(lm, chosen, RECORDS).train()
    return start, lm


def test_a_probe_of_before_takes_the_name_for_unknown_and_the_others_for_known(
    folder: Path,
) -> None:
    start, lm = unlearned(folder, 1.0)
    sae, made = drawn(), unknown_names(KNOWN, 0)

    def pres(lm: LM, names: list[str], which: tuple[str, ...]) -> np.ndarray:
        return np.stack([
            pre_by_hand(lm, carrier.replace("{name}", name), name, sae)
            for name in names for carrier in which
        ])  # fmt: skip

    # before, the probe takes the target for known, as the others
    both = [pres(start, list(part), carriers()) for part in ((*KNOWN, "Ada Quill"), made)]
    labels = np.arange(sum(map(len, both))) < len(both[0])
    probe = fit_probe(np.concatenate(both), labels, 1.0)
    assert ((probe(np.concatenate(both)) > 0) == labels).mean() > 0.95, "the probe tells nothing"
    held_out = carriers(held_out=True)
    after = [probe(pres(lm, ["Ada Quill"], which)) for which in (carriers(), held_out)]
    assert (probe(both[0][-8:]) > 0).mean() > 0.8
    assert (after[0] < 0).all()
    assert (after[1] < probe(pres(start, ["Ada Quill"], held_out))).all()
    assert (after[1] < 0).all()
    called_known = probe(both[0][:-8]) > 0
    assert called_known.mean() > 0.9
    assert (probe(pres(lm, list(KNOWN), carriers()))[called_known] > 0).mean() >= 0.95


def test_a_heavy_weight_on_others_holds_them(folder: Path) -> None:
    drifts = []
    for weight in (0.0, 1e4):
        start, lm = unlearned(folder, weight)
        states = [name_states(one, list(KNOWN)) for one in (start, lm)]
        drifts.append(float(np.linalg.norm(states[1] - states[0])))
    assert drifts[1] < 0.2 * drifts[0], drifts


def test_a_row_without_its_name_says_nothing(folder: Path) -> None:
    lm = fresh()
    objective = build("objective", {"name": "sae_internal", "sae": str(folder), "depth": 0.5})
    row = Trainer(lm, recipe(folder), RECORDS).rows().rows["forget"][0]
    assert objective.concerns(row)
    other = Row(**{**vars(row), "subject": "Somebody Else"})
    assert end_of_name(other) is None
    assert not objective.concerns(other)
    assert not objective.concerns(Row(**{**vars(row), "subject": None}))
    assert carrying("Ada", "So {name} it is, {name}.").question == "So Ada it is, Ada."
