"""The results page of agents: made by one command, and its sentences follow from the numbers."""

from __future__ import annotations

import copy
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"
NAMES = (
    "evidence", "agents_cases", "agents_cascade", "agents_forgetting", "agents_claims",
    "agents_page", "agents",
)  # fmt: skip


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, Any]]:
    """The modules of ``performance/`` that make the page, by name."""
    sys.path.insert(0, str(ROOT / "performance"))
    before = {name: sys.modules.pop(name, None) for name in NAMES}
    yield {name: importlib.import_module(name) for name in NAMES}
    sys.path.remove(str(ROOT / "performance"))
    for name, module in before.items():
        sys.modules.pop(name)
        if module is not None:
            sys.modules[name] = module


@pytest.fixture(scope="module")
def made(scripts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of tiny sizes."""
    from delible.memory import database

    page = tmp_path_factory.mktemp("results") / "agents.md"
    with pytest.MonkeyPatch.context() as fast:
        fast.setattr(database, "SYNCHRONOUS", "OFF")
        fast.setattr("os.fsync", lambda _: None)
        scripts["agents"].main([str(page), "--seeds", "1"], _sizes(scripts))
    return page


def _sizes(scripts: dict[str, Any]) -> dict[str, Any]:
    return {
        "memento": scripts["agents_cases"].Sizes(people=4, relations=3, passes=1),
        "cascade": scripts["agents_cascade"].Sizes(shown=5, asked=6, demonstrations=2),
        "forgetting": scripts["agents_forgetting"].Sizes(candidates=3, kept=2, looking=False),
    }


@pytest.fixture
def found(made: Path) -> dict[str, Any]:
    return copy.deepcopy(json.loads(made.with_suffix(".json").read_text("utf-8")))


def test_one_command_makes_the_page_and_runs_nothing_twice(
    made: Path, scripts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = made.read_text("utf-8")
    for title in ("Memento", "In-context distillation", "Secure Forgetting", "What a step costs"):
        assert f"## {title}" in text
    assert "policies by rule or scripts" in text
    numbers = json.loads(made.with_suffix(".json").read_text("utf-8"))
    for name in ("memento", "cascade", "forgetting"):
        assert list(numbers[name]["seeds"]) == ["0"]
        monkeypatch.setattr(scripts["agents"].PARTS[name], "run", None)
    scripts["agents"].main([str(made), "--seeds", "1"], _sizes(scripts))
    assert made.read_text("utf-8") == text
    with pytest.raises(TypeError):  # another seed is wanted
        scripts["agents"].main([str(made), "--seeds", "2"], _sizes(scripts))


def test_what_was_measured_is_what_the_agents_do(found: dict[str, Any]) -> None:
    cases = found["memento"]["seeds"]["0"]
    assert (cases["verdict"], cases["stale"], cases["learned_again"]) == (
        "nothing found", True, [False])  # fmt: skip
    assert cases["scorers_apart"] == 0
    way = cases["ways"]["likeness"]
    assert way["before"]["theirs"]["retrieved"] > 0
    assert way["after"]["theirs"]["retrieved"] == way["after"]["theirs"]["shown"] == 0
    cascade = found["cascade"]["seeds"]["0"]
    assert cascade["ways"]["teacher"]["success"] == 1
    assert cascade["ways"]["teacher"]["student"] == {"in": 0, "out": 0}
    assert cascade["forgotten"]["same"] == 1
    rows = {(one["kind"], one["variant"]): one for one in found["forgetting"]["seeds"]["0"]}
    for kind in ("state", "trajectory", "environment"):
        assert rows[kind, "untouched"]["used"] > 0
        assert rows[kind, "all parts"]["used"] == 0
        assert rows[kind, "all parts"]["verdict"] == "nothing found"
        assert rows[kind, "without memory"]["scan"] == "remains found"
        assert rows[kind, "prompt names it"]["quoted"] == (kind != "state")  # masked in an answer
    assert rows["state", "only told not to mention it"]["quoted"]
    assert rows["state", "prompt alone"]["used"] == rows["state", "untouched"]["used"]
    gone, never = (rows["state", one]["advantage"] for one in ("all parts", "never learned it"))
    assert gone == never
    best = rows["state", "untouched"]["advantage"]["asks"]["output"]
    assert best == pytest.approx(1 - 1 / 3)


def test_a_forgetting_that_did_not_happen_is_said(
    found: dict[str, Any], scripts: dict[str, Any]
) -> None:
    page = scripts["agents_page"].page
    text = page(found)
    assert "Not forgotten** in" not in text
    assert "Still retrieved" not in text
    assert "- all parts: " not in text
    cases = found["memento"]["seeds"]["0"]
    cases["verdict"] = "remains found"
    cases["ways"]["learned"]["after"]["theirs"]["retrieved"] = 0.25
    cases["ways"]["learned"]["after"]["others"]["shown"] = 0.25
    text = page(found)
    assert '**Not forgotten** in 1 of 1 worlds: the certificate says "remains found".' in text
    assert "**Still retrieved.** Of the cases retrieved (learned)" in text
    assert "25 % after" in text
    assert "still stands in cases that the planner is shown" in text
    forgotten = found["cascade"]["seeds"]["0"]["forgotten"]
    forgotten["verdict"], forgotten["retrieved"] = "not shown", 0.5
    text = page(found)
    assert '**Not forgotten** in 1 of 1 towns: the certificate says "not shown".' in text
    assert "some of what is retrieved names it" in text


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("used", 1.0, "**Not forgotten**: the target is used in 100 % of its tasks"),
        ("scan", "remains found", "Falls short: its notes are still in the memory's files in 1 of"),
        ("verdict", "not shown", 'Falls short: the certificate says "not shown" in 1 of 1'),
        ("kept", 0.5, "Falls short: success on other tasks falls by 50 points"),
        ("advantage", 0.4, "Falls short: the adversary finds out 0.40 more"),
    ],
)
def test_what_a_request_did_not_do_is_said(
    key: str, value: Any, said: str, found: dict[str, Any], scripts: dict[str, Any]
) -> None:
    def told() -> list[str]:
        lines = scripts["agents_page"].forgetting(found["forgetting"])
        return lines[: lines.index("### A routine\n")]

    whole = "- Nothing shows of a place having been known with: all parts,"
    assert any(one.startswith(whole) for one in told())
    (row,) = (one for one in found["forgetting"]["seeds"]["0"]
              if (one["kind"], one["variant"]) == ("state", "all parts"))  # fmt: skip
    row[key] = value
    if key == "advantage":
        row[key] = {one: dict.fromkeys(("output", "actions", "method"), 0.0)
                    for one in ("asks", "sends")}  # fmt: skip
        row[key]["sends"]["actions"] = value
    assert any(one.startswith(f"- all parts: {said}") for one in told())
    assert not any(one.startswith(whole) for one in told())


def test_a_use_that_the_reference_makes_as_well_is_said(
    found: dict[str, Any], scripts: dict[str, Any]
) -> None:
    rows = [one for one in found["forgetting"]["seeds"]["0"] if one["kind"] == "trajectory"]
    told = scripts["agents_page"].sentences(rows, "a routine")
    said = "**used all the same**, in 100 % of its tasks, which one that never learned it does, too"
    assert any(one.startswith(f"- without mask: {said} (100 %)") for one in told)
    assert not any(one.startswith("- all parts: ") for one in told)


def test_an_adversary_that_finds_nothing_anywhere_is_no_evidence(
    found: dict[str, Any], scripts: dict[str, Any]
) -> None:
    told = scripts["agents_page"].sentences
    rows = [one for one in found["forgetting"]["seeds"]["0"] if one["kind"] == "environment"]
    for one in rows:
        one["advantage"]["sends"]["actions"] = 0.9 if one["variant"] == "untouched" else 0.0
    assert not any("no evidence" in one for one in told(rows, "x"))
    for one in rows:
        for script in one["advantage"].values():
            script.update(output=0.0, actions=0.0, method=0.0)
    assert any("no evidence" in one for one in told(rows, "x"))


def test_costs_by_hand(scripts: dict[str, Any], found: dict[str, Any]) -> None:
    claims = scripts["agents_claims"]
    alone = {"student": {"in": 0, "out": 0}, "teacher": {"in": 100, "out": 20}, "episodes": 2}
    both = {"student": {"in": 300, "out": 20}, "teacher": {"in": 30, "out": 4}, "episodes": 2}
    row = {"ways": {"teacher": alone, "cascade": both}, "demonstrations": {"in": 75, "out": 10}}
    assert claims.cost(alone, 10) == pytest.approx(1000)  # (100 + 5 * 20) * 10 / 2
    assert claims.cost(both, 10) == pytest.approx(450)  # (300 + 100 + (30 + 20) * 10) / 2
    assert claims.pays(row, 10, "cascade") == pytest.approx(1250 / 550)
    at = claims.cheaper_from(row, "cascade")
    assert at == pytest.approx(400 / 150)
    assert claims.cost(alone, at) == pytest.approx(claims.cost(both, at))
    assert claims.pays(row, at / 2, "cascade") == float("inf")
    part = found["cascade"]["seeds"]["0"]["ways"]
    part["cascade"]["success"], part["larger"]["success"] = 0.5, 1.0
    said = claims.cascade_sentences(list(found["cascade"]["seeds"].values()))
    assert said[0].startswith("- cascade: **not as good as** the teacher within 5 points (-0.50)")
    assert ": as good as the teacher" in said[1]
    number = scripts["agents_claims"].Number
    assert claims.equally(number(-0.1, -0.2, 0.0, 5)) == "cannot be told to be as good as"
    assert claims.equally(number(-0.2, -0.3, -0.1, 5)) == "**not as good as**"
    assert claims.equally(number(-0.01, -0.04, 0.0, 5)) == "as good as"


def test_a_slow_loop_is_said(scripts: dict[str, Any]) -> None:
    part = {"steps": [6], "rounds": 3, "loop 6": 0.5, "agent 6": 1.5}
    assert "within 2 ms" in scripts["agents_page"].speed(part)[-1]
    assert "**Over 2 ms**: 2.50" in scripts["agents_page"].speed({**part, "agent 6": 2.5})[-1]


def test_the_page_in_the_documentation_is_that_of_its_numbers(scripts: dict[str, Any]) -> None:
    numbers = json.loads((RESULTS / "agents.json").read_text("utf-8"))
    assert all(len(numbers[one]["seeds"]) >= 5 for one in ("memento", "cascade", "forgetting"))
    text = (RESULTS / "agents.md").read_text("utf-8")
    assert text == scripts["agents_page"].page(numbers)
