"""ALTER: experts of domains, each loss moves its own tensors, and what a run of it gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from people import ANSWERS, RETAIN, about, probability, taught

import delible
from delible.cli import main
from delible.context import Context
from delible.errors import ModelError, RecipeError
from delible.loaders import write_records
from delible.procedures.alter import Alter, domains_of, encoded, k_means
from delible.records import QA, ForgetRequest
from delible.routed.system import Routed
from delible.routed.tokens import ByToken, TokenRouter
from delible.stages.experts import ExpertTraining, Moves
from delible.stages.work import Stage, Work
from delible.system.asks import Decoding, Prompt

REQUEST = ForgetRequest(forget=(*about("ada"), *about("bo")), retain=(*RETAIN, *about("cy")))
OPTIONS: dict[str, Any] = {"learning_rate": 1e-2, "epochs": 30, "batch_size": 12}


def test_two_domains_are_forgotten_and_the_rest_is_kept() -> None:
    lm = taught()
    before = {name: probability(lm, about(name)) for name in ANSWERS}
    identity = lm.identity
    outcome = Alter(**OPTIONS).apply(lm, REQUEST, Context())
    found = outcome.system
    assert isinstance(found, Routed)
    assert lm.identity == identity
    assert outcome.kind == "router"
    assert outcome.notes["domains"] == {"ada": 4, "bo": 4}
    for name in ("ada", "bo"):
        assert probability(found, about(name)) < 0.3 * before[name]
    for name in ("cy", "dee"):
        assert probability(found, about(name)) > 0.9 * before[name]
    prompts = [Prompt.ask(one.question) for name in ANSWERS for one in about(name)[:2]]
    together = found.generate(prompts, Decoding(8))
    assert [found.generate([one], Decoding(8))[0] for one in prompts] == together
    assert together[4:] == lm.generate(prompts, Decoding(8))[4:]


def training(tmp: Path | None = None, **options: Any) -> tuple[ExpertTraining, Any]:
    lm, alter = taught(), Alter(**{**OPTIONS, **options})
    work = Work(alter, lm, REQUEST, Context())
    forget = encoded(lm, REQUEST.forget)
    started = work.stage("domains", lambda stage: alter._start(stage, lm, REQUEST, forget))
    rows = encoded(lm, REQUEST.retain)
    made = ExpertTraining(
        alter, lm, started["names"], started.tensors, forget, rows, started["owners"]
    )
    return made, started.tensors


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {
        name.rpartition(".")[2] for name, one in after.items() if not torch.equal(before[name], one)
    }


def test_each_loss_moves_its_own_tensors_only() -> None:
    made, start = training()
    drawn = torch.Generator().manual_seed(0)
    start = {
        name: one + 0.05 * torch.randn(one.shape, generator=drawn) for name, one in start.items()
    }
    lm, acting = made.model(start, 1.1)
    moves = Moves(acting, made.options)
    kept = made.retain[:4]

    def now() -> dict[str, torch.Tensor]:
        return {name: one.detach().clone() for name, one in acting.tensors.items()}

    with made.at_work():
        for domain in (0, 1, 0):
            before = now()
            value, easy, every = made.forget_loss(lm, acting, made.domains[domain])
            assert value is not None
            assert 0 < easy <= every
            moves.step("forget", value, domain)
            after = now()
            assert changed(before, after) == {"forget", "gate"}
            for name, one in after.items():
                if name.endswith(".forget"):
                    assert torch.equal(one[1 - domain], before[name][1 - domain])
            before = now()
            moves.step("kept", made.keep_loss(lm, acting, kept))
            assert changed(before, now()) == {"kept"}
            before = now()
            moves.step("shared", made.shape_loss(lm, acting, kept, start))
            assert changed(before, now()) == {"A"}
    assert all(one.requires_grad for one in made.lm.model.parameters())


def test_losses_are_means_over_their_tokens() -> None:
    made, start = training()
    drawn = torch.Generator().manual_seed(0)
    start = {
        name: one + 0.05 * torch.randn(one.shape, generator=drawn) for name, one in start.items()
    }
    lm, acting = made.model(start, 1.1)
    rows = [*made.domains[0][:2], *made.retain[:2]]
    shares, entropy, targets = [], [], []
    for row in rows:  # whole texts, one by one
        from delible.lm.forward import Forward, collate
        from delible.lm.template import Encoded

        batch = collate([Encoded(row.ids, 1, False)], lm.pad_id, lm.device)
        with torch.no_grad(), lm.evaluating():
            shares.append(lm.head(Forward(lm)(batch)[0]).double().softmax(1))
        bare = made.lm.core(torch.tensor([row.ids])).logits[0].double().softmax(1)
        entropy.append((1 - (bare**1.1).sum(1))[:-1] / 0.1)
        targets.append(torch.tensor(row.ids[1:]))
    hard = float(torch.cat(entropy).median())
    made.options = made.options.model_copy(update={"threshold": hard, "forget_weight": 2.0,
                                                   "retain_weight": 3.0})  # fmt: skip
    acting.routing = acting.routing.model_copy(update={"threshold": 1.2})
    own = [one.gather(1, t[:, None])[:, 0] for one, t in zip(shares, targets, strict=True)]
    hinge = [
        1 + mine - one.scatter(1, t[:, None], 0).amax(1)
        for mine, one, t in zip(own, shares, targets, strict=True)
    ]
    answers = [torch.arange(len(t)) >= row.start - 1 for t, row in zip(targets, rows, strict=True)]
    every = torch.cat(answers)
    easy = every & (torch.cat(entropy) <= hard)
    hardest = torch.cat(entropy) > hard
    moved = sum(float((start[n].double() * 0.1).square().sum()) for n in start if n.endswith(".A"))
    with torch.no_grad():
        value, count, of = made.forget_loss(lm, acting, rows)
        assert (count, of) == (int(easy.sum()), int(every.sum()))
        expected = 2 * torch.cat(hinge)[easy].mean()
        if count:
            assert float(value) == pytest.approx(float(expected), rel=1e-4)  # type: ignore[arg-type]
        kept = made.keep_loss(lm, acting, rows)
        nll = -torch.cat(own).log()
        assert float(kept) == pytest.approx(float(3 * nll[every].mean()), rel=1e-4)
        apart = {name: one * 1.1 for name, one in start.items() if name.endswith(".A")}
        shaped = made.shape_loss(lm, acting, rows, apart)
        assert float(shaped) == pytest.approx(float(nll[hardest].mean()) + 0.01 * moved, rel=1e-4)


def test_domains_are_the_records_own_or_found() -> None:
    assert domains_of(REQUEST.forget) == (["ada", "bo"], [0] * 4 + [1] * 4)
    grouped = [QA(question="?", answer="!", group=one) for one in ("x", "y", "x")]
    assert domains_of(grouped) == (["x", "y"], [0, 1, 0])
    assert domains_of([*grouped, QA(question="?", answer="!")]) == ([], [])
    drawn = np.random.default_rng(0)
    points = np.concatenate([drawn.normal(size=(9, 5)) + shift for shift in (-9, 0, 9)])
    found = k_means(points, 3, torch.Generator().manual_seed(0))
    assert [len(set(found[start : start + 9])) for start in (0, 9, 18)] == [1, 1, 1]
    assert len(set(found)) == 3
    made, tensors = training(domains=2)
    assert list(made.names) == ["domain-1", "domain-2"]
    gate = next(one for name, one in tensors.items() if name.endswith(".gate"))
    assert gate.shape[0] == 2


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(RecipeError, match="never reached"):
        Alter.build("procedure 'alter'", order=2.0)
    lm = taught()
    with pytest.raises(RecipeError, match="reaches the threshold"):
        Alter(threshold=5.0).check(lm, REQUEST)
    with pytest.raises(RecipeError, match="8 forget records for 9 domains"):
        Alter(domains=9).check(lm, REQUEST)
    quick = Alter(epochs=1, structure_epochs=0, batch_size=12)
    found = quick.apply(lm, REQUEST, Context()).system
    with pytest.raises(ModelError, match="already"):
        quick.check(found, REQUEST)


@pytest.mark.slow
def test_a_domain_is_taken_back_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taught().save(tmp_path / "model")
    write_records(REQUEST.forget, tmp_path / "forget.jsonl")
    write_records(REQUEST.retain, tmp_path / "retain.jsonl")
    run = str(tmp_path / "run")
    data = ["--forget", str(tmp_path / "forget.jsonl"), "--retain", str(tmp_path / "retain.jsonl")]
    options = ["--learning-rate", "0.01", "--epochs", "3"]
    words = ["unlearn", str(tmp_path / "model"), "--method", "alter", "--out", run]
    assert main([*words, *data, *options]) == 0, capsys.readouterr().err
    whole: Any = delible.open(run)
    assert main(["undo", run, "--only", "bo"]) == 0
    left: Any = delible.open(run)
    assert (whole.router.members, left.router.members) == (("ada", "bo"), ("ada",))
    assert isinstance(left.router, TokenRouter)
    assert left.fingerprint != whole.fingerprint
    assert main(["undo", run]) == 0
    assert delible.open(run).fingerprint == delible.open(str(tmp_path / "model")).fingerprint


def test_structure_and_experts_go_by_entropies_of_their_own_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, start = training(structure_epochs=1, epochs=1, structure_order=0.9, order=1.1)
    made.forget, made.retain = made.forget[:4], made.retain[:2]
    made.domains = [rows[:2] for rows in made.domains]
    seen = list[float]()
    entropies = ByToken._read

    def read(self: ByToken, *given: Any) -> Any:
        seen.append(self.routing.order)
        return entropies(self, *given)

    monkeypatch.setattr(ByToken, "_read", read)
    with made.at_work():
        made.structure(Stage("structure", Context()))
        assert set(seen) == {0.9}
        seen.clear()
        made.experts(Stage("experts", Context()), start)
        assert set(seen) == {1.1}
    assert made.options.routing() == made.options.routing(1.1)


def test_a_stage_is_told_step_by_step() -> None:
    made, start = training(structure_epochs=1)
    told = list[tuple[int, int]]()
    stage = Stage("structure", Context(stage=lambda title, done, total: told.append((done, total))))
    with made.at_work():
        made.structure(stage)
    assert told == [(place + 1, len(told)) for place in range(len(told))]
    assert start
