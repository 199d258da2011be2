"""``delible bench`` with an experiment: options as a user writes them, and what is left."""

from __future__ import annotations

import json
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from delible import registry
from delible.cli.bench import bench
from delible.experiments.coreset.experiment import CoresetEffect
from delible.experiments.guards.experiment import GuardsCompared
from delible.measure.benchmark import Findings, Setting


@pytest.mark.parametrize(
    ("written", "understood"), [("0.05", (0.05,)), ("0.05,0.5", (0.05, 0.5)), ("1", (1.0,))]
)
def test_one_value_or_several(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str, understood: Any
) -> None:
    seen: list[CoresetEffect] = []

    def found(self: CoresetEffect, setting: Setting) -> Findings:
        seen.append(self)
        return Findings([{"share": 0.5}], runs=[{"share": 0.5, "seed": 0}])

    monkeypatch.setattr(CoresetEffect, "run", found)
    asked = ("bench", "coreset", "--fractions", written, "--kinds", "one theme", "--model", "none")
    ran = run(*asked, "--out", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert seen[0].fractions == understood
    assert seen[0].kinds == ("one theme",)


@pytest.mark.parametrize("card", registry.cards("benchmark"), ids=lambda card: card.name)
def test_no_option_hides_behind_one_of_the_command(card: Any) -> None:
    own = {name for name in signature(bench).parameters if name not in ("suite", "options")}
    assert own.isdisjoint(registry.load("benchmark", card.name).model_fields)


def test_a_stage_says_how_long_the_rest_takes(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    clock = SimpleNamespace(perf_counter=lambda: 0.0, monotonic=lambda: now[0])
    monkeypatch.setattr("delible.cli.bench.time", clock)

    def found(self: CoresetEffect, setting: Setting) -> Findings:
        for what, done in (("learning", 0), ("npo, seed 0", 1), ("npo, seed 1", 3), ("done", 4)):
            now[0] = 60.0 * done
            setting.progress(what, done, 4)
        return Findings([])

    monkeypatch.setattr(CoresetEffect, "run", found)
    said = run("bench", "coreset", "--model", "none", "--out", tmp_path / "out")
    lines = (said.out + said.err).splitlines()
    assert "  learning" in lines
    assert "  npo, seed 0 (1 of 4 done, about 3 min left)" in lines
    assert "  npo, seed 1 (3 of 4 done, about 60 s left)" in lines
    assert "  done" in lines


def test_an_experiment_leaves_its_numbers_and_all_of_its_time(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter((0.0, 5.0, 100.0, 107.0))
    clock = SimpleNamespace(perf_counter=lambda: next(times), monotonic=lambda: 0.0)
    monkeypatch.setattr("delible.cli.bench.time", clock)

    def broken(self: CoresetEffect, setting: Setting) -> Findings:
        raise KeyboardInterrupt

    monkeypatch.setattr(CoresetEffect, "run", broken)
    asked = ("bench", "coreset", "--model", "none", "--out", tmp_path / "out")
    assert run(*asked).code != 0
    findings = Findings([{"share": 0.5}], runs=[{"share": 0.25, "seed": 1}])
    monkeypatch.setattr(CoresetEffect, "run", lambda *_: findings)
    assert run(*asked).code == 0
    kept = json.loads((tmp_path / "out" / "experiment.json").read_text("utf-8"))
    assert kept["runs"] == [{"share": 0.25, "seed": 1}]
    assert kept["seconds"] == 12.0
    assert kept["command"].startswith("delible bench coreset --model none")


@pytest.mark.parametrize("group", ["all", "all-guards"])
def test_an_experiment_gets_the_methods_of_a_group(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: str
) -> None:
    seen: list[Setting] = []

    def found(self: GuardsCompared, setting: Setting) -> Findings:
        seen.append(setting)
        return Findings([{"measure": "leak", "no guard": 0.5}])

    monkeypatch.setattr(GuardsCompared, "run", found)
    ran = run("bench", "guards", "--methods", group, "--model", "none", "--out", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert list(seen[0].methods) == [card.name for card in registry.cards("guard")]


def test_experiments_take_roles_and_attacks_or_say_that_they_do_not(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Setting] = []

    def found(self: GuardsCompared, setting: Setting) -> Findings:
        seen.append(setting)
        return Findings([{"measure": "leak", "no guard": 0.5}])

    monkeypatch.setattr(GuardsCompared, "run", found)
    asked = ("--model", "none", "--out", tmp_path / "out")
    given = ("--attacks", "prefix,paraphrase", "--role", "guard=http://localhost:1/v1#m")
    ran = run("bench", "guards", "--methods", "icul", *given, *asked)
    assert ran.code == 0, ran.err
    assert list(seen[0].attacks) == ["prefix", "paraphrase"]
    assert list(seen[0].roles) == ["guard"]
    command = json.loads((tmp_path / "out" / "experiment.json").read_text())["command"]
    assert "--attacks prefix --attacks paraphrase --role guard=http" in command.replace("'", "")
    for flags, said in ((given[:2], "attacks nothing"), (given[2:], "casts nobody")):
        ran = run("bench", "coreset", *flags, *asked)
        assert ran.code == 2
        assert said in ran.err
