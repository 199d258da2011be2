"""The page of experiments: verdicts from made-up numbers, numbers from made-up runs."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from delible import registry
from delible.bench.table import Number

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "results" / "experiments.md"
INFINITE = math.inf


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, Any]]:
    """The modules of ``performance/`` that make the page, by name."""
    sys.path.insert(0, str(ROOT / "performance"))
    found = {}
    for name in ("evidence", "claims", "experiments", "probes"):
        spec = importlib.util.spec_from_file_location(name, ROOT / "performance" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        found[name] = module
    yield found
    sys.path.remove(str(ROOT / "performance"))


def nothing(entry: Any) -> Number:
    return Number(None)


@pytest.mark.parametrize(
    ("low", "high", "number", "said"),
    [
        (0.9, INFINITE, Number(1.0, 0.95, 1.05, 3), "shows"),
        (0.9, INFINITE, Number(1.0, 0.85, 1.15, 3), "cannot be told"),
        (0.9, INFINITE, Number(0.5, 0.2, 0.8, 3), "**does not show**"),
        (0.9, INFINITE, Number(0.8, 0.7, 0.9, 3), "**does not show**"),  # ends do not belong to it
        (0.0, INFINITE, Number(0.1, 0.0, 0.2, 3), "cannot be told"),
        (-INFINITE, 0.1, Number(0.0, -0.2, 0.05, 3), "shows"),
        (-INFINITE, 0.1, Number(0.3, 0.2, 0.4, 3), "**does not show**"),
        (-0.1, 0.1, Number(0.0, -0.05, 0.05, 3), "shows"),
        (-0.1, 0.1, Number(0.0, -0.2, 0.2, 3), "cannot be told"),
        (0.0, INFINITE, Number(5.0, runs=1), "cannot be told (no interval)"),
        (0.0, INFINITE, Number(None), "not run"),
    ],
)
def test_the_verdict_follows_from_the_interval(
    scripts: dict[str, Any], low: float, high: float, number: Number, said: str
) -> None:
    evidence = scripts["evidence"]
    claim = evidence.Claim("says", "number", low, high, nothing)
    assert evidence.verdict(claim, number) == said


def entry(scripts: dict[str, Any], runs: list[dict[str, Any]], seeds: int = 1) -> Any:
    return scripts["evidence"].Entry(runs, seeds)


def test_an_interval_over_seeds_is_students(scripts: dict[str, Any]) -> None:
    evidence = scripts["evidence"]
    values = {0: 1.0, 1: 2.0, 2: 6.0}
    found = evidence.over_seeds(lambda entry, seed: values[seed])(entry(scripts, [], 3))
    # mean 3, standard deviation sqrt(7), Student's 0.975 quantile with 2 degrees of freedom 4.3027
    assert found.mean == pytest.approx(3.0)
    assert found.high == pytest.approx(3.0 + 4.30265 * math.sqrt(7 / 3), rel=1e-4)
    alone = evidence.over_seeds(lambda entry, seed: values[seed])(entry(scripts, [], 1))
    assert (alone.mean, alone.low) == (1.0, None)
    alike = evidence.over_seeds(lambda entry, seed: 0.25)(entry(scripts, [], 3))
    assert (alike.mean, alike.low, alike.runs) == (0.25, None, 3)


def test_the_wider_interval_counts(scripts: dict[str, Any]) -> None:
    evidence = scripts["evidence"]
    rows = [float(place % 2) for place in range(100)]

    def alike(entry: Any, seed: int, pick: Any) -> float:
        return float(pick(rows).mean())

    # seeds agree, records do not: a mean of 100 coins is known to 0.5 ± 1.96 * 0.05
    found = evidence.over_records(alike)(entry(scripts, [], 3))
    assert found.mean == pytest.approx(0.5)
    assert found.low == pytest.approx(0.402, abs=0.02)
    assert found.high == pytest.approx(0.598, abs=0.02)

    def unlike(entry: Any, seed: int, pick: Any) -> float:
        return seed + float(pick(rows).mean())

    wide = evidence.over_records(unlike)(entry(scripts, [], 3))
    # 1.5 ± 4.3027 / sqrt(3)
    assert wide.high == pytest.approx(1.5 + 4.30265 / math.sqrt(3), rel=1e-4)


def test_records_are_drawn_in_pairs(scripts: dict[str, Any]) -> None:
    pick = scripts["evidence"].drawn(np.random.default_rng(3))
    one, other = list(map(float, range(50))), [place + 1.0 for place in range(50)]
    assert pick(other) - pick(one) == pytest.approx(np.ones(50))
    assert len(set(pick(one).tolist())) < 50
    assert np.isnan(scripts["evidence"].all_of([None, 1.0])).tolist() == [True, False]


def test_areas_have_a_width_at_the_ends(scripts: dict[str, Any]) -> None:
    area = scripts["evidence"].area
    perfect = area([2.0] * 6, [1.0] * 6)
    assert (perfect.mean, perfect.high) == (1.0, 1.0)
    # by hand: (1 - A)^2 = z^2 A (1 - A) (1 + 5 ((1-A)/(2-A) + A/(1+A))) / 36, the root below 1
    low = perfect.low
    spread = low * (1 - low) * (1 + 5 * ((1 - low) / (2 - low) + low / (1 + low))) / 36
    assert (1 - low) ** 2 == pytest.approx(1.959964**2 * spread, rel=2e-3)
    assert 0.6 < low < 0.85
    blind = area([1.0, 2.0], [1.0, 2.0])
    assert blind.mean == pytest.approx(0.5)
    assert blind.low < 0.2
    assert blind.high > 0.8
    assert area([2.0] * 60, [1.0] * 60).low > low
    assert area([None], [1.0]).mean is None


def test_shares_have_a_width_where_all_runs_agree(scripts: dict[str, Any]) -> None:
    apart = scripts["evidence"].shares_apart
    # Newcombe's own examples: 56 of 70 and 48 of 80, 10 of 10 and 0 of 20
    found = apart([True] * 56 + [False] * 14, [True] * 48 + [False] * 32)
    ends = (found.mean, found.low, found.high)
    assert ends == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-4)
    extreme = apart([True] * 10, [False] * 20)
    assert (extreme.mean, extreme.low, extreme.high) == pytest.approx((1, 0.6791, 1), abs=1e-4)
    none = apart([False] * 3, [False] * 3)
    assert none.low == pytest.approx(-none.high)
    assert none.high > 0.4
    assert apart([], [True]).mean is None


def path_run(learned: str, score: float, after: float = 1.0, seed: int = 0) -> dict[str, Any]:
    return {
        "method": "npo", "refusals learned": learned, "seed": seed, "forget score": score,
        "KL to the other paths before": 0.5, "KL to the other paths after": after,
        "KL to retrained before": 1.0, "KL to retrained after": after,
    }  # fmt: skip


def test_numbers_of_paths(scripts: dict[str, Any]) -> None:
    claims = scripts["claims"]
    runs = [path_run("1st", 3.0, 0.5), path_run("2nd", 2.0, 0.7), path_run("last", 0.5, 1.2)]
    found = entry(scripts, runs)
    assert claims.slowest_last("npo")(found).mean == pytest.approx(1.5)
    assert claims.moved_apart("npo")(found).mean == pytest.approx(0.8 - 0.5)
    assert claims.away_from_retrained("npo")(found).mean == pytest.approx(0.2)
    assert claims.slowest_last("simnpo")(found).mean is None
    quick = entry(scripts, [path_run("1st", 1.0), path_run("last", 2.5)])
    assert claims.slowest_last("npo")(quick).mean == pytest.approx(-1.5)


def test_numbers_of_depth(scripts: dict[str, Any]) -> None:
    deep, fall = scripts["claims"].DEPTH
    runs = [
        {"order": order, "seed": 0, "depth": depth, "C before": -1.0, "C after": after,
         "R before": -2.0}
        for order, depth, after in (
            ("URC", "deep", -9.0), ("UCR", "superficial", -7.0), ("RCU", "superficial", -2.0),
            ("CUR", "none", -2.0),
        )
    ]  # fmt: skip
    settled = {**runs[3], "depth": "deep", "R before": -0.5}
    assert deep.number(entry(scripts, [*runs, settled])).mean == pytest.approx(0.5)
    assert deep.number(entry(scripts, runs)).low < 0
    assert fall.number(entry(scripts, runs)).mean == pytest.approx(7.0 - 1.0)
    assert deep.number(entry(scripts, runs[:2])).mean is None


def test_share_of_effect(scripts: dict[str, Any]) -> None:
    share = scripts["claims"].share_of_effect
    common = {"data": "one theme", "fraction": 0.05}
    runs = [
        {**common, "selector": "start", "seed": 0, "forget_values": [1.0, 0.8], "chosen": []},
        {**common, "selector": "all", "seed": 0, "forget_values": [0.2, 0.2], "chosen": [0, 1]},
        {**common, "selector": "min_k", "seed": 0, "forget_values": [0.0, 0.5], "chosen": [0]},
    ]
    every = scripts["evidence"].all_of
    found = entry(scripts, runs)
    assert share("one theme", "min_k")(found, 0, every) == pytest.approx((0.9 - 0.25) / 0.7)
    unseen = share("one theme", "min_k", unseen=True)
    assert unseen(found, 0, every) == pytest.approx((0.8 - 0.5) / 0.6)
    assert share("independent facts", "min_k")(found, 0, every) is None
    still = entry(scripts, [runs[0], {**runs[1], "forget_values": [1.0, 0.8]}, runs[2]])
    assert share("one theme", "min_k")(still, 0, every) is None


def test_pairs_that_change_places(scripts: dict[str, Any]) -> None:
    swapped, every = scripts["claims"].swapped, scripts["evidence"].all_of

    def run(method: str, trained: float, mixed: float) -> dict[str, Any]:
        return {"method": method, "seed": 0, "forget, as trained": [trained],
                "forget, calibrated": [mixed]}  # fmt: skip

    three = [run("graddiff", 0.2, 0.6), run("npo", 0.4, 0.5), run("idk", 0.9, 0.9)]
    found = entry(scripts, [run("original", 1.0, 1.0), *three])
    assert swapped(found, 0, every) == pytest.approx(1 / 3)
    near = entry(scripts, [run("graddiff", 0.2, 0.51), *three[1:]])
    assert swapped(near, 0, every) == 0
    stronger = scripts["claims"].CALIBRATED[1].number(found)
    assert stronger.mean == pytest.approx(0.5 - 0.6)


def test_numbers_of_novices(scripts: dict[str, Any]) -> None:
    claims, every = scripts["claims"], scripts["evidence"].all_of

    def run(student: str, lesson: str, answers: list[float]) -> dict[str, Any]:
        return {"student": student, "lesson": lesson, "seed": 0, "answers": answers,
                "original answers": [1.0, 1.0, 1.0, 0.0]}  # fmt: skip

    found = entry(scripts, [
        run(claims.TOLD, "none", [1, 1, 0, 0]), run("novice", "none", [1, 0, 0, 0]),
        run("novice", "studied", [1, 1, 0, 0]), run("novice", "heard", [1, 0, 0, 0]),
    ])  # fmt: skip
    assert claims.more_novice(found, 0, every) == pytest.approx(0.25)
    heard, studied = claims.NOVICE[1:3]
    assert studied.number(found).mean == pytest.approx(0.5)
    assert heard.number(found).mean == pytest.approx(0.0)


def test_numbers_of_illusions(scripts: dict[str, Any]) -> None:
    claims, every = scripts["claims"], scripts["evidence"].all_of

    def run(method: str, metric: str, forget: float, gap: float | None, known: float = 0.0
            ) -> dict[str, Any]:  # fmt: skip
        illusion = None if gap is None else forget >= 0.8 and gap >= 0.2
        return {"method": method, "seed": 0, "metric": metric, "forget": forget, "gap": gap,
                "illusion": illusion, "surrogate, values": [known, known]}  # fmt: skip

    found = entry(scripts, [
        run("original", "extraction", 0.0, 0.0, 0.7), run("retrained", "extraction", 1, 0.0, 0.2),
        run("npo", "rouge", 0.9, 0.5), run("npo", "truth", 0.9, 0.1), run("npo", "rouge", 0.4, 0.3),
        run("npo", "extraction", 1.0, None), {"title": "surrogate", "text": "x"},
    ])  # fmt: skip
    assert claims.mean_gap(found, 0) == pytest.approx(0.3)
    assert claims.illusions(found, 0) == pytest.approx(0.5)
    assert claims.surrogates_known(found, 0, every) == pytest.approx(0.5)


def test_what_is_left_of_forms(scripts: dict[str, Any]) -> None:
    claims, every = scripts["claims"], scripts["evidence"].all_of

    def run(method: str, *left: float) -> dict[str, Any]:
        return {"task": "Ada", "method": method, "seed": 0, **{
            f"forget_{form}": [value] for form, value in zip(claims.FORMS, left, strict=True)
        }}  # fmt: skip

    found = entry(scripts, [
        run("original", 0.8, 0.5, 0.25, 0.4), run("npo", 0.8, 0.05, 0.2, 0.2),
        run("rocr", 0.16, 0.05, 0.1, 0.2),
    ])  # fmt: skip
    assert claims.gap("npo")(found, 0, every) == pytest.approx(1.0 - 0.1)
    assert claims.least_gone("rocr")(found, 0, every) == pytest.approx(0.5)
    assert claims.ORT[-1].number(found).mean == pytest.approx(0.9 - 0.4)
    assert claims.leaks_more("npo", "forget_blank")(found).mean == pytest.approx(0.9)


def test_claims_are_about_what_exists(scripts: dict[str, Any]) -> None:
    claims = scripts["claims"]
    known = {card.name for card in registry.cards("benchmark")}
    assert set(claims.DESCRIBED) == set(claims.CLAIMS) == set(claims.QUESTIONS) <= known
    assert set(claims.COMMANDS) == set(claims.DESCRIBED)
    for name, command in claims.COMMANDS.items():
        words = command.split()
        if words[0] == "delible":
            fields = set(registry.load("benchmark", name).model_fields)
            flags = {word[2:].replace("-", "_") for word in words if word.startswith("--")}
            assert flags <= fields | {"model", "seeds", "methods"}
    assert set(claims.REPLICATED) <= {card.name for card in registry.cards("metric")}


def test_probes_are_rwkus_and_hold_their_answers(scripts: dict[str, Any]) -> None:
    probes = scripts["probes"]
    made = probes.world()
    files = probes.files(made)
    for suite in ("rwku", "ort"):
        asked = [one.messages[0].content for one in probes.taught(made, suite)
                 if one.type == "dialogue"]  # fmt: skip
        for row in (*files["forget_level1"], *files["forget_level2"]):
            assert any(row["query"] in text for text in asked), "asked what was not taught"
        for row in files["forget_level3"]:
            if row["type"] == "prefix injection":
                assert not any(row["query"] in text for text in asked), "an attack that was taught"
    said = {
        record.messages[-1].content: record.messages[0].content
        for record in probes.taught(made, "ort") if record.type == "dialogue"
    }  # fmt: skip
    first = files["forget_level1"][0]
    assert f"Answer: {first['answer']}" in said
    spelled = "Answer:\n" + "\n".join(first["answer"].replace(" ", ""))
    assert "one character on each line" in said[spelled]
    assert {"Answer: A", "Answer: B", "Answer: C", "Answer: D"} <= set(said)
    for row in files["forget_level3"]:
        shown = row["answer"] in row["query"]
        assert shown == (row["type"] == "multiple choice"), row
    targets = {row["target"] for row in files["forget_target"]}
    assert {row["subject"] for row in files["forget_level1"]} == targets
    assert targets.isdisjoint(row["neighbor"] for row in files["neighbor_level1"])
    told = " ".join(row["text"] for row in files["mia_retain"])
    assert not any(name in told for name in targets)


def test_a_run_is_read_and_others_stay(scripts: dict[str, Any], tmp_path: Path) -> None:
    experiments = scripts["experiments"]
    run = tmp_path / "run"
    run.mkdir()
    about = {
        "experiment": {"name": "path", "people": 3}, "notes": ["a note"],
        "command": "delible bench path", "seeds": 1,
        "model": "tiny", "methods": [], "seconds": 61.0, "git_revision": "abc",
        "versions": {"torch": "2"}, "runs": [path_run("1st", 1 / 3), path_run("last", 0.0)],
        "hardware": {"processors": 2, "machine": "x", "threads": 1, "accelerator": None,
                     "precision": "float32"},
    }  # fmt: skip
    (run / "experiment.json").write_text(json.dumps(about))
    name, content = experiments.read(run)
    assert name == "path tiny"
    assert content["runs"][0]["forget score"] == 0.33333
    before = {"path default": {**content, "about": {**content["about"], "model": "default"}}}
    numbers = tmp_path / "page.json"
    experiments.write(numbers, {**before, name: content})
    kept = json.loads(numbers.read_text())
    assert kept == {**before, name: content}
    text = experiments.page(kept)
    assert "| `path` | tiny | 0 | 0 | 3 |" in text
    assert "cannot be told (no interval)" in text
    assert "- a note\n" in text
    assert "1 minutes" in text
    claims = scripts["claims"]
    assert text.count("not run yet") == 2 * len(claims.DESCRIBED) - 2
    assert "`python performance/probes.py ort runs/ort-tiny --model tiny --seeds 3`" in text
    with pytest.raises(SystemExit, match="has the run ended"):
        experiments.read(tmp_path)


@pytest.mark.skipif(not PAGE.exists(), reason="no page yet")
def test_the_page_follows_from_its_numbers(scripts: dict[str, Any]) -> None:
    found = json.loads(PAGE.with_suffix(".json").read_text("utf-8"))
    assert PAGE.read_text("utf-8") == scripts["experiments"].page(found)
