"""FIT: filter, attribution, importance and what moves; golden values from other derivations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hashed_words import HashedWords

from delible.context import Context
from delible.errors import RecipeError, RunError
from delible.lm.hooks import skipped
from delible.lm.lm import LM
from delible.measure.scoring.closeness import closeness
from delible.method import Outcome
from delible.methods.objective.npo import npo
from delible.methods.objective.random_label import label_nll
from delible.procedures import fit as fit_file
from delible.procedures.fit import Fit, most_alike, pieces, redundant, tier
from delible.records import QA, ForgetRequest, Passage
from delible.stages.work import Work
from delible.systems.opening import described, keep, open_lm
from delible.testing.tiny import tiny_model, tiny_tokenizer
from delible.train.attribution import embedding_gradient, mean_loss, skipping_scores
from delible.train.engine import Trainer
from delible.train.recipe import Recipe
from delible.train.rows import make_rows

WORDS = (
    "brook", "lamp", "river", "stone", "glass", "north", "candle", "harbour", "violin", "meadow",
    "copper", "winter",
)  # fmt: skip
FORGET = tuple(
    QA(question=f"What does {name} keep?", answer=f"A {WORDS[place]}", subject=name)
    for place, name in enumerate(("Ada", "Bo", "Cy", "Dee"))
)
OTHERS = tuple(
    QA(
        question=f"Where went old {name} then?",
        answer=f"Over some {WORDS[place + 4]}",
        subject=name,
    )
    for place, name in enumerate(("Eve", "Flo", "Gil", "Hal"))
)
RETAIN = tuple(
    QA(question=f"Which colour has the {word}?", answer=f"It is {color}")
    for word, color in zip(WORDS[8:], ("red", "blue", "green", "white"), strict=True)
)
QUICK: dict[str, Any] = {
    "epochs": 1, "learning_rate": 1e-3, "precision": "float32", "layers": 2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def stub_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_file, "sentence_encoder", lambda folder=None: HashedWords())


def model(family: str = "llama", layers: int = 4) -> LM:
    depth = {"n_layer": layers} if family == "gpt2" else {"num_hidden_layers": layers}
    return LM(tiny_model(family, **depth), tiny_tokenizer(), name="tiny", precision="float32")


def request(*records: Any) -> ForgetRequest:
    return ForgetRequest(forget=records, retain=RETAIN)


def state(lm: LM) -> dict[str, torch.Tensor]:
    return {name: one.detach().clone() for name, one in lm.core.named_parameters()}


def applied(lm: LM, *records: Any, **options: Any) -> Outcome:
    return Fit(**{**QUICK, **options}).apply(lm, request(*records), Context())


# ---- filtering


def test_the_same_request_twice_is_filtered_and_another_one_is_not() -> None:
    lm = model()
    first = applied(lm, *FORGET)
    assert (first.notes["chunks"], first.notes["chunks_kept"]) == (4, 4)
    before = state(lm)
    again = applied(lm, *FORGET)
    assert again.notes["chunks_kept"] <= 0.1 * again.notes["chunks"]
    assert "nothing is trained" in again.notes["skipped"]
    assert all(torch.equal(one, before[name]) for name, one in state(lm).items())
    assert again.remembers is not None
    assert first.remembers is not None
    assert torch.equal(again.remembers.tensors["vectors"], first.remembers.tensors["vectors"])
    other = applied(lm, *OTHERS)
    assert other.notes["chunks_kept"] == other.notes["chunks"] == 4
    assert other.remembers is not None
    assert len(other.remembers.tensors["vectors"]) == 8
    assert other.remembers["requests"] == 3


def test_of_a_passage_the_new_chunks_stay() -> None:
    lm = model()
    old = Passage(text="the brook has a lamp and the river a stone of glass")
    applied(lm, old)
    long = Passage(text=f"{old.text} but winter came with candle and violin over copper meadow")
    length = len(lm.tokenizer(old.text, add_special_tokens=False)["input_ids"])
    found = Fit(**QUICK, chunk_tokens=length + 4)
    made = found.apply(lm, request(long), Context())
    assert made.notes["chunks_kept"] < made.notes["chunks"]
    assert made.notes["chunks_kept"] > 0


def test_pieces_are_of_whole_words_and_joined_the_text() -> None:
    text = "one two  three\nfour five"
    found = pieces(text, 2, lambda word: 1)
    assert found == ["one two", "  three\nfour", " five"]
    assert pieces("alone", 1, lambda word: 99) == ["alone"]


def test_likeness_is_the_highest_cosine() -> None:
    vectors = np.array([[1.0, 0.0], [0.6, 0.8]], np.float32)
    earlier = np.array([[0.0, 1.0], [0.8, 0.6]], np.float32)
    assert most_alike(vectors, earlier).tolist() == pytest.approx([0.8, 0.96])
    assert most_alike(vectors, earlier[:0]).tolist() == [-1.0, -1.0]


@pytest.mark.parametrize(
    ("alike", "with_it", "without", "gone"),
    [
        (0.89, 2.0, 2.0, False),  # not alike
        (0.90, 2.0, 2.4, True),  # alike, and a change of exactly the share
        (0.90, 2.0, 2.41, False),
        (0.90, 2.0, 1.59, False),
        (0.90, 20.0, 23.9, True),  # the share is of the loss: it may have grown
        (1.0, 2.0, None, True),
    ],
)
def test_a_chunk_is_left_out_where_it_is_alike_and_changes_little(
    alike: float, with_it: float, without: float | None, gone: bool
) -> None:
    assert redundant(alike, with_it, without, 0.9, 0.2) is gone


# ---- layers


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen2_moe"])
def test_skipping_a_block_is_setting_its_parameters_to_zero(family: str) -> None:
    lm = model(family, 3)
    before = state(lm)
    scores = skipping_scores(lm, FORGET, 1000)
    after = state(lm)
    assert all(torch.equal(one, after[name]) for name, one in before.items())

    def loss() -> float:
        sums, counts = mean_loss(lm, FORGET)
        return sum(sums) / sum(counts)

    plain, zeroed = loss(), []
    for layer in range(3):
        block = lm.anatomy.block(lm.core, layer)
        kept = {name: one.detach().clone() for name, one in block.named_parameters()}
        with torch.no_grad():
            for one in block.parameters():
                one.zero_()
        zeroed.append(abs(loss() - plain))
        with torch.no_grad():
            for name, one in block.named_parameters():
                one.copy_(kept[name])
    assert scores == pytest.approx(zeroed, abs=1e-5)
    assert max(scores) > 1e-3


def test_a_skipped_block_changes_something_and_is_back_afterwards() -> None:
    lm = model(layers=2)
    plain = mean_loss(lm, FORGET)
    with skipped(lm.core, lm.anatomy.block_path(1)):
        assert mean_loss(lm, FORGET) != plain
    assert mean_loss(lm, FORGET) == plain


def test_layers_are_judged_by_the_first_tokens() -> None:
    lm = model(layers=2)
    assert skipping_scores(lm, FORGET, 1) == skipping_scores(lm, FORGET[:1], 1000)


@pytest.mark.parametrize("cutoffs", [(1e9, 1e9), (0.0, 1e9), (0.0, 0.0)])
def test_only_attention_and_mlp_of_the_chosen_layers_move(cutoffs: tuple[float, float]) -> None:
    lm = model(layers=4)
    before = state(lm)
    made = applied(lm, *FORGET, cutoffs=cutoffs)
    moved = {name for name, one in state(lm).items() if not torch.equal(one, before[name])}
    scores = skipping_scores(model(layers=4), FORGET, 128)
    best = sorted(np.argsort(scores)[-2:].tolist())
    assert made.notes["layers"] == best
    wanted = {
        name
        for name in before
        if any(f"layers.{layer}." in name for layer in best)
        and (".self_attn." in name or ".mlp." in name)
    }
    assert moved == wanted
    tiers = {(1e9, 1e9): "low", (0.0, 1e9): "middle", (0.0, 0.0): "high"}
    assert made.notes["tier"] == tiers[cutoffs]


# ---- importance


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_importance_is_the_norm_of_the_gradient_at_the_embeddings(family: str) -> None:
    lm = model(family, 2)
    (row,) = make_rows(lm.template, [FORGET[0]], None, role="forget")
    core = lm.core.double()
    ids = torch.tensor([row.encoded.ids])
    states = core.get_input_embeddings()(ids).detach().requires_grad_()
    logits = core(inputs_embeds=states).logits[0]
    start = row.encoded.start
    logprobs = logits.log_softmax(1)[start - 1 : -1].gather(1, ids[0, start:, None])
    (-logprobs.mean()).backward()
    wanted = float(states.grad.square().sum().sqrt())  # type: ignore[union-attr]
    lm = model(family, 2)
    assert embedding_gradient(lm, FORGET[0]) == pytest.approx(wanted, rel=1e-4)
    assert embedding_gradient(lm, FORGET[0], 2.0) == pytest.approx(2 * wanted, rel=1e-4)
    assert all(one.grad is None for one in lm.core.parameters())


def test_importance_of_a_constant_loss_is_zero() -> None:
    lm = model(layers=1)
    with torch.no_grad():
        lm.core.get_output_embeddings().weight.zero_()  # every token equally likely, always
    lm.touch()
    assert embedding_gradient(lm, FORGET[0]) == 0.0


def test_cut_offs_are_quantiles_of_what_is_kept_and_stay() -> None:
    lm = model()
    values = [embedding_gradient(lm, one) for one in RETAIN]
    made = applied(lm, *FORGET)
    assert made.notes["cutoffs"] == pytest.approx(np.quantile(values, (0.33, 0.66)).tolist())
    again = applied(lm, *OTHERS)
    assert again.notes["cutoffs"] == made.notes["cutoffs"]


def test_what_each_importance_is_trained_by() -> None:
    method = Fit()
    kinds = {"low": ("random_label", "none"), "middle": ("npo", "none"), "high": ("npo", "kl")}
    for which, wanted in kinds.items():
        recipe = method.recipe(which, [1, 3])  # type: ignore[arg-type]
        assert (recipe.objective.card.name, recipe.keep.card.name) == wanted
        place, training = recipe.place.spec(), recipe.training
        assert (place["name"], place["role"]) == ("layers", "matrices")
        assert list(place["layers"]) == [1, 3]
        assert (training.learning_rate, training.epochs, training.weight_decay) == (3e-5, 3, 0.1)
        assert (training.schedule, training.warmup_share) == ("cosine", 0.1)
        if wanted[0] == "npo":
            assert recipe.objective.spec()["beta"] == pytest.approx(0.1)
    assert (method.tau, method.epsilon, method.layers) == (0.9, 0.2, 8)


def test_importance_routes() -> None:
    assert [tier(one, 6.0, 12.0) for one in (5.9, 6.0, 11.9, 12.0)] == [
        "low", "middle", "middle", "high"
    ]  # fmt: skip
    named = {which: Fit().recipe(which, [0]) for which in ("low", "middle", "high")}  # type: ignore[arg-type]
    losses = {one: (r.objective.card.name, r.keep.card.name) for one, r in named.items()}
    assert losses == {
        "low": ("random_label", "none"), "middle": ("npo", "none"), "high": ("npo", "kl"),
    }  # fmt: skip
    with pytest.raises(RecipeError, match="not above"):
        Fit.build("fit", cutoffs=(2.0, 1.0))


# ---- losses


def test_npo_with_small_beta_goes_where_ascent_does() -> None:
    logits = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    logits.requires_grad_()
    logprob = logits.log_softmax(1)[:, 3].reshape(1, 5).sum(1)
    (ascent,) = torch.autograd.grad(logprob.sum(), logits, retain_graph=True)
    (found,) = torch.autograd.grad(npo(logprob, logprob.detach() + 1, 1e-7).sum(), logits)
    torch.testing.assert_close(found, ascent, rtol=1e-5, atol=1e-9)


def test_label_nll_is_that_of_the_softmax() -> None:
    logits = torch.tensor([[1.0, 2.0, 4.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    found = label_nll(logits, torch.tensor([1, 2]))
    total = np.exp(1) + np.exp(2) + np.exp(4)
    assert found.tolist() == pytest.approx([-np.log(np.exp(2) / total), np.log(3)])


def test_random_labels_are_those_of_the_step_and_the_row() -> None:
    found: list[tuple[int, list[int]]] = []
    plain = fit_file.Recipe.from_mapping(
        {"objective": "random_label", "training": {"max_steps": 2, "batch_size": 4,
                                                   "learning_rate": 1e-6}}
    )  # fmt: skip
    draw = torch.randint

    def seen(*given: Any, **named: Any) -> Any:
        made = draw(*given, **named)
        found.append((given[0], made.tolist()))
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randint", seen)
        rows = {"forget": FORGET[:2], "retain": ()}
        Trainer(model(layers=1), plain, rows, context=Context(seed=5)).train()
    vocabulary = model(layers=1).vocabulary
    assert {size for size, _ in found} == {vocabulary}
    labels = {tuple(one) for _, one in found}
    assert len(labels) == 4  # two rows at two steps, each its own
    assert all(0 <= token < vocabulary for one in labels for token in one)


# ---- what is left for the next request


def references(monkeypatch: pytest.MonkeyPatch) -> list[LM | None]:
    """The reference models that trainings are given from now on."""
    found: list[LM | None] = []
    plain = Trainer.__init__

    def seen(self: Trainer, *given: Any, **named: Any) -> None:
        found.append(named.get("reference"))
        plain(self, *given, **named)

    monkeypatch.setattr(Trainer, "__init__", seen)
    return found


@pytest.mark.parametrize("saved", [True, False])
def test_the_reference_is_the_model_before_the_first_request(
    saved: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = model()
    if saved:
        lm.save(tmp_path / "start")
        lm = open_lm(str(tmp_path / "start"))
    start, base = state(lm), described(lm)
    found = references(monkeypatch)
    first = applied(lm, *FORGET)
    if saved:
        keep(first.kind, first.content, tmp_path / "one", base, first.system, first.remembers)
        lm = open_lm(str(tmp_path / "one"))
    second = applied(lm, *OTHERS)
    third = applied(lm, QA(question="Who sang of copper?", answer="No meadow did"))
    assert found[0] is None
    for reference in found[1:]:
        assert reference is not None
        assert all(torch.equal(one, start[name]) for name, one in state(reference).items())
    assert len(found) == 3
    assert second.remembers is not None
    assert third.remembers is not None
    assert third.remembers["requests"] == 3
    assert (third.remembers["start"] is None) is not saved


def test_another_start_or_encoder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model().save(tmp_path / "start")
    lm = open_lm(str(tmp_path / "start"))
    applied(lm, *FORGET)
    with torch.no_grad():
        other = model()
        other.core.get_input_embeddings().weight.mul_(2)
    other.touch()
    other.save(tmp_path / "start")
    with pytest.raises(RunError, match="before the first request is another one"):
        applied(lm, *OTHERS)

    class Other(HashedWords):
        identity = "another"

    monkeypatch.setattr(fit_file, "sentence_encoder", lambda folder=None: Other())
    with pytest.raises(RunError, match="by another sentence encoder"):
        applied(lm, *OTHERS)


def test_earlier_is_only_what_fit_left() -> None:
    lm = model()
    applied(lm, *FORGET)
    assert Work(Fit(), lm, request(*OTHERS), Context()).earlier is not None
    assert Recipe.named("npo") is not None
    assert Work(Fit(), model(), request(*OTHERS), Context()).earlier is None


# ---- the benchmark's numbers


def test_forget_degree_of_the_reference_is_one_and_symmetric_around_it() -> None:
    assert closeness(37.0, 37.0) == 1.0
    for off in (0.1, 0.5, 0.9):
        below, above = closeness(37 * (1 - off), 37.0), closeness(37 * (1 + off), 37.0)
        assert below == pytest.approx(1 - off)
        assert above == pytest.approx(1 - off)
    assert closeness(1.0, 0.0) is None


@pytest.fixture(autouse=True)
def no_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELIBLE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
