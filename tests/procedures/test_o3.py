"""O3: requests one after the other, each forgotten, kept apart, taken back and found again."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from people import ANSWERS, REQUESTS, RETAIN, about, encoder, probability, taught

import delible
from delible.cli import main
from delible.context import Context
from delible.errors import DataError, ModelError, RecipeError, RunError
from delible.lm.lm import LM
from delible.loaders import write_records
from delible.loaders.requests import Named
from delible.methods.place.orthogonal_lora import overlap, overlap_gradient
from delible.procedures.o3 import O3, texts_of
from delible.records import ForgetRequest, Passage
from delible.routed.detector import Detector, DetectorOptions
from delible.routed.features import EncoderFeatures
from delible.routed.low_rank import LowRank, worn
from delible.routed.requests import RequestRouter
from delible.routed.system import Routed
from delible.sequence.undoing import undo_request
from delible.system.artefact import read
from delible.system.asks import Decoding, Prompt, Score
from delible.train.engine import Trainer
from delible.train.recipe import Recipe

LENGTH = {"learning_rate": 1e-2, "epochs": 12}


@dataclass
class Walk:
    """Three runs, one on the other, and what was measured after each."""

    place: Path
    base: LM
    values: list[dict[str, float]]

    def run(self, number: int) -> Path:
        return self.place / f"run{number}"

    def copy(self, number: int, to: Path) -> Path:
        return Path(shutil.copytree(self.run(number), to / "run"))

    def open(self, number: int) -> Routed:
        return opened(self.run(number))


def opened(folder: Path) -> Any:
    found: Any = delible.open(str(folder))
    for one in (found, getattr(found, "bare", found)):
        one.precision = "float32"
    return found


def measured(lm: LM) -> dict[str, float]:
    return {
        **{name: probability(lm, about(name)) for name in ANSWERS},
        **{f"{name}'": probability(lm, about(name), other=True) for name in ANSWERS},
        "retain": probability(lm, RETAIN),
    }


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Walk:
    place = tmp_path_factory.mktemp("o3")
    taught().save(place / "model")
    encoder(place / "encoder")
    method = O3(encoder_folder=str(place / "encoder"), **LENGTH)  # type: ignore[arg-type]
    base = opened(place / "model")
    system, values = str(place / "model"), [measured(base)]
    for number, request in enumerate(REQUESTS, start=1):
        found = delible.unlearn(
            system, request, method=method, out=place / f"run{number}", measured=False,
            verify=False,  # one test below does it
        )  # fmt: skip
        system = str(place / f"run{number}")
        assert isinstance(found.system, Routed)
        values.append(measured(opened(Path(system))))
    return Walk(place, base, values)


def test_each_request_is_forgotten_and_stays_so(walk: Walk) -> None:
    before = walk.values[0]
    assert all(value > 0.9 for value in before.values())
    for number, name in enumerate(("ada", "bo", "cy"), start=1):
        for later in walk.values[number:]:
            assert later[name] < 0.05, "the request is not forgotten"
            assert abs(later[name] - walk.values[number][name]) < 0.1
            assert later[f"{name}'"] < 0.4, "not in other words"
        for earlier in walk.values[:number]:
            assert earlier[name] == pytest.approx(before[name], abs=1e-6)


def test_what_is_kept_is_answered_by_the_bare_model(walk: Walk) -> None:
    for after in walk.values:
        assert after["retain"] == pytest.approx(walk.values[0]["retain"], abs=1e-6)
    found = walk.open(3)
    asked = [Score(Prompt.ask(one.question), one.answer) for one in RETAIN]
    for mine, theirs in zip(found.score(asked), walk.base.score(asked), strict=True):
        assert np.array_equal(mine.logprobs, theirs.logprobs)  # type: ignore[union-attr]


def test_answers_alone_are_those_in_a_mixed_batch(walk: Walk) -> None:
    found = walk.open(3)
    prompts = [Prompt.ask(one.question) for name in ANSWERS for one in about(name)[:2]]
    together = found.generate(prompts, Decoding(8))
    assert [found.generate([one], Decoding(8))[0] for one in prompts] == together
    plain = walk.base.generate(prompts, Decoding(8))
    assert [one == other for one, other in zip(together, plain, strict=True)] == 6 * [False] + 2 * [
        True
    ]


def test_the_artefact_stands_on_the_model_and_holds_all_requests(walk: Walk) -> None:
    artefact, first = read(walk.run(3)), read(walk.run(1))
    assert artefact.kind == "router"
    assert artefact.base == first.base
    members = walk.open(3).router.members
    assert len(members) == 3
    assert members[:1] == walk.open(1).router.members
    peft = walk.run(3) / artefact.parts[members[0]] / "adapter"
    assert (peft / "adapter_config.json").is_file()
    worn = walk.base.copy()
    worn.put_on(peft)  # plain PEFT reads it
    asked = [Score(Prompt.ask(one.question, prefill=""), one.answer) for one in about("ada")]
    named = [Score(Prompt(one.prompt.messages, adapter=members[0]), one.answer) for one in asked]
    for mine, theirs in zip(walk.open(3).score(named), worn.score(asked), strict=True):
        np.testing.assert_allclose(mine.logprobs, theirs.logprobs, atol=1e-4)  # type: ignore[union-attr]


def test_one_request_of_several_is_taken_back_exactly(
    walk: Walk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = walk.copy(3, tmp_path)
    first, second, third = walk.open(3).router.members
    assert main(["undo", str(run), "--only", second[:10]]) == 0
    found = opened(run)
    assert found.router.members == (first, third)
    asked = {name: [Score(Prompt.ask(one.question), one.answer) for one in about(name)]
             for name in ANSWERS}  # fmt: skip
    whole = walk.open(3)
    for name, requests in asked.items():
        expected = (walk.base if name in ("bo", "dee") else whole).score(requests)
        for mine, theirs in zip(found.score(requests), expected, strict=True):
            assert np.array_equal(mine.logprobs, theirs.logprobs), name  # type: ignore[union-attr]
    assert found.fingerprint != whole.fingerprint
    capsys.readouterr()
    assert main(["undo", str(run), "--only", "nobody"]) != 0
    told = capsys.readouterr().err
    assert "no request 'nobody'" in told
    assert first in told
    assert main(["undo", str(run)]) == 0
    assert opened(run).fingerprint == walk.base.fingerprint
    assert main(["undo", str(run), "--back"]) == 0
    assert opened(run).fingerprint == whole.fingerprint


def test_a_member_that_is_missing_or_changed_is_one_message(walk: Walk, tmp_path: Path) -> None:
    run = walk.copy(3, tmp_path)
    artefact = read(run)
    home = run / artefact.parts[walk.open(3).router.members[1]]
    tensors = home / "adapter" / "adapter_model.safetensors"
    kept = tensors.read_bytes()
    shutil.copy(
        run / artefact.parts[walk.open(3).router.members[0]] / "adapter" / tensors.name, tensors
    )
    with pytest.raises(RunError, match="its files were changed"):
        delible.open(str(run))
    tensors.unlink()
    with pytest.raises(RunError, match="the adapter cannot be read"):
        delible.open(str(run))
    tensors.write_bytes(kept[: len(kept) // 2])
    with pytest.raises(RunError, match="the adapter cannot be read"):
        delible.open(str(run))
    shutil.rmtree(home)
    with pytest.raises(RunError, match="is missing"):
        delible.open(str(run))


def test_a_request_that_is_covered_is_said_and_nothing_trained(
    walk: Walk, caplog: pytest.LogCaptureFixture
) -> None:
    method = O3(encoder_folder=str(walk.place / "encoder"), **LENGTH)  # type: ignore[arg-type]
    system = walk.open(3)
    part = ForgetRequest(forget=about("bo")[:2])
    outcome = method.apply(system, part, Context())
    assert outcome.notes["covered"] is True
    assert outcome.notes["stages"] == {}
    assert "cover this one already" in caplog.text
    assert outcome.system.fingerprint == system.fingerprint


def test_an_unknown_request_and_other_options_are_refused(walk: Walk) -> None:
    with pytest.raises(ModelError, match="no adapter 'who'"):
        walk.open(3).generate([Prompt(Prompt.ask("hm ?").messages, adapter="who")], Decoding(2))
    with pytest.raises(ModelError, match="another kind"):
        O3(adapters="cumulative").check(walk.open(3), REQUESTS[0])
    one = ForgetRequest(forget=(about("ada")[0].model_copy(update={"paraphrases": ()}),))
    with pytest.raises(DataError, match="two different questions"):
        O3().check(walk.base, one)


def test_other_encoders_are_refused(walk: Walk, tmp_path: Path) -> None:
    run = walk.copy(1, tmp_path)
    other = encoder(tmp_path / "other")
    settings = other / "config.json"
    changed = json.loads(settings.read_text()) | {"layer_norm_eps": 1e-3}
    settings.write_text(json.dumps(changed))
    for path in run.glob("members/0*/detector/router.json"):
        member = opened(walk.run(1)).router.parts[0]
        options = {**member.detector.options.model_dump(), "encoder_folder": str(other)}
        detector = Detector(
            DetectorOptions(**options), member.detector.tensors, member.detector.features_of
        )
        again = type(member)(member.request, member.adapter, detector)
        content = json.loads(path.read_text()) | {
            "options": options, "identity": again.identity
        }  # fmt: skip
        path.write_text(json.dumps(content))
    with pytest.raises(ModelError, match="another encoder"):
        opened(run).generate([Prompt.ask("who taught ada ?")], Decoding(2))


def test_cumulative_is_one_adapter_that_any_detector_opens(walk: Walk) -> None:
    method = O3(
        encoder_folder=str(walk.place / "encoder"), adapters="cumulative", **LENGTH  # type: ignore[arg-type]
    )  # fmt: skip
    system: Any = walk.base.copy()
    for request in REQUESTS[:2]:
        system = method.apply(system, request, Context()).system
    first, second = system.router.parts
    assert system.acting.adapters == [second.adapter]
    assert probability(system, about("ada")) < 0.1
    assert probability(system, about("bo")) < 0.1
    assert probability(system, RETAIN) == pytest.approx(walk.values[0]["retain"], abs=1e-6)
    with pytest.raises(RunError, match="cannot be taken out alone"):
        system.router.without([first.request])
    assert system.router.without([second.request]).members == (first.request,)


def test_a_tuned_encoder_is_kept_with_its_request(walk: Walk, tmp_path: Path) -> None:
    source = EncoderFeatures.of(walk.place / "encoder")
    options = DetectorOptions(encoder_epochs=3, encoder_batch_size=4, encoder_learning_rate=1e-2)
    draws = lambda: torch.Generator().manual_seed(1)  # noqa: E731
    texts = texts_of(about("ada"))
    found = Detector.fit(texts, source, options, draws())
    assert any(bool(value.any()) for name, value in found.tuned.items() if name.endswith(".B"))
    assert found.identity == Detector.fit(texts, source, options, draws()).identity
    plain = source(texts)
    assert not np.allclose(found.features(texts, source), plain)
    assert np.array_equal(source(texts), plain), "the encoder keeps what it wore"
    member = walk.open(1).router.parts[0]
    router = RequestRouter((type(member)("tuned", member.adapter, found),), "own", None)
    parts = router.save(tmp_path, "base")
    again = RequestRouter.load(tmp_path, parts)
    assert again.identity == router.identity
    assert np.array_equal(
        again.parts[0].detector.features(texts, source), found.features(texts, source)
    )


def test_what_the_adapter_is_trained_by() -> None:
    for given, start in ({}, "fresh"), ({"adapters": "cumulative", "rank": 4}, "last"):
        method = O3(**given, alpha=12.0, orthogonality=0.3, max_steps=7)  # type: ignore[arg-type]
        recipe = method.recipe()
        place = recipe.place.spec()
        assert (recipe.objective.card.name, recipe.keep.card.name) == ("idk", "none")
        assert (place["name"], place["rank"], place["alpha"]) == (
            "orthogonal_lora", given.get("rank", 8), 12.0,
        )  # fmt: skip
        assert (place["orthogonality"], place["start"]) == (0.3, start)
        training = recipe.training
        assert (training.epochs, training.least_steps, training.batch_size) == (15, 40, 16)
        assert (training.max_steps, training.learning_rate_width) == (7, 576)
    assert O3(learning_rate=3e-4).recipe().training.learning_rate_width is None
    plain = O3()
    assert (plain.orthogonality, plain.gamma, plain.zeta, plain.offset) == (0.1, 1000, 10, 2)
    assert (plain.nu, plain.floor, plain.encoder_rank, plain.encoder_alpha) == (0.1, 0.2, 8, 32)


def test_passages_are_read_as_they_are() -> None:
    assert texts_of([Passage(text="Ada was born."), *about("bo")[:1]]) == [
        "Ada was born.", "where was bo born ?", "in which town was bo born ?",
    ]  # fmt: skip


# ---- the place


def trained(weight: float, *earlier: LowRank, **options: Any) -> LowRank:
    recipe = Recipe.from_mapping({
        "objective": "idk",
        "place": {"name": "orthogonal_lora", "orthogonality": weight, "rank": 4, **options},
        "training": {"learning_rate": 1e-2, "max_steps": 60, "epochs": 60, "precision": "float32"},
    })  # fmt: skip
    lm = taught()
    lm.earlier_adapters = earlier
    result = Trainer(lm, recipe, {"forget": about("ada")[:2], "retain": ()}).train()
    return worn(result.lm)


def cosines(one: LowRank, other: LowRank) -> float:
    values = []
    for path, (down, _) in one.pairs.items():
        mine, theirs = down.double(), other.pairs[path][0].double()
        mine, theirs = (a / a.norm(dim=1, keepdim=True) for a in (mine, theirs))
        values.append((mine @ theirs.T).abs().mean())
    return float(torch.stack(values).mean())


def test_orthogonality_holds_after_training() -> None:
    first = trained(0.0)
    free, held = (cosines(trained(weight, first), first) for weight in (0.0, 0.1))
    assert free > 0.05
    assert held < free / 3


def placed(*earlier: LowRank, **options: Any) -> LowRank:
    """Where an adapter starts."""
    recipe = Recipe.from_mapping({
        "objective": "idk", "place": {"name": "orthogonal_lora", "rank": 4, **options},
        "training": {"learning_rate": 1e-6, "max_steps": 1, "precision": "float32"},
    })  # fmt: skip
    lm = taught()
    lm.earlier_adapters = earlier
    return worn(Trainer(lm, recipe, {"forget": about("bo"), "retain": ()}).train().lm)


def test_it_starts_anew_or_from_the_last_adapter(tmp_path: Path) -> None:
    first = placed()
    again, fresh, last = placed(), placed(first), placed(first, start="last")
    first.save(tmp_path / "first", "base")
    read_from = placed(start="last", earlier=(str(tmp_path / "first"),))
    for path, pair in first.pairs.items():
        torch.testing.assert_close(again.pairs[path][0], pair[0])
        assert float((fresh.pairs[path][0] - pair[0]).abs().max()) > 0.01
        for mine, theirs, kept in zip(pair, last.pairs[path], read_from.pairs[path], strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)
            torch.testing.assert_close(mine, kept, atol=1e-5, rtol=0)
    with pytest.raises(RecipeError, match="another rank"):
        placed(first, start="last", rank=2)


def test_the_penalty_is_that_of_its_formula() -> None:
    draws = torch.Generator().manual_seed(0)
    down = torch.randn(3, 7, generator=draws, dtype=torch.float64, requires_grad=True)
    earlier = [torch.randn(2, 7, generator=draws, dtype=torch.float64) for _ in range(2)]
    by_hand = sum(float((a @ b) ** 2) for one in earlier for a in one for b in down.detach())
    value = overlap(down, earlier)
    assert float(value) == pytest.approx(by_hand, rel=1e-12)
    value.backward()
    assert down.grad is not None
    torch.testing.assert_close(overlap_gradient(down.detach(), torch.cat(earlier)), down.grad)
    apart = torch.eye(7, dtype=torch.float64)
    assert float(overlap(apart[:3], [apart[3:5]])) == 0
    assert float(overlap(apart[:3], [apart[2:5]])) == 1


# ---- the contract, and the command line


def test_unlearn_audit_and_undo_from_the_command_line(
    walk: Walk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_records(about("ada"), tmp_path / "forget.jsonl")
    write_records(RETAIN, tmp_path / "retain.jsonl")
    run, data = str(tmp_path / "run"), ["--forget", str(tmp_path / "forget.jsonl")]
    options = [
        "--encoder-folder", str(walk.place / "encoder"), "--learning-rate", "0.01", "--epochs",
        "6",
    ]  # fmt: skip
    words = ["unlearn", str(walk.place / "model"), "--method", "o3", "--out", run, *data, *options]
    assert main(words) == 0, capsys.readouterr().err
    retain = ["--retain", str(tmp_path / "retain.jsonl")]
    audit = ["audit", run, *data, *retain, "--attacks", "prefix", "--metrics", "answer_probability"]
    assert main(audit) == 0, capsys.readouterr().err
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    parts = {row["variant"] for row in metrics["leaks"] if row["attack"] == "without_part"}
    assert parts, "the audit does not take the router away"
    assert main(["undo", run]) == 0
    assert opened(Path(run)).fingerprint == walk.base.fingerprint


@pytest.mark.slow
def test_one_of_a_sequence_is_undone_by_its_own_id(walk: Walk, tmp_path: Path) -> None:
    method = O3(encoder_folder=str(walk.place / "encoder"), max_steps=2, learning_rate=1e-2)
    named = [Named(name, ForgetRequest(forget=about(name))) for name in ("ada", "bo", "cy")]
    result = delible.unlearn_sequence(
        str(walk.place / "model"), named, method=method, out=tmp_path / "all", retain=RETAIN[:2],
        rows=1, verify=False,
    )  # fmt: skip
    assert [one.what for one in result.steps[1:]] == ["done"] * 3
    whole = opened(Path(result.steps[-1].state))
    state = undo_request(tmp_path / "all", "bo")
    left = opened(Path(state))
    assert left.router.members == (whole.router.members[0], whole.router.members[2])
