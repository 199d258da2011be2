"""The capability probe: problems by brute force, denial, facts handed back, findings by hand."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from delible.acting import sandbox
from delible.acting.coding import judged
from delible.errors import DataError, RecipeError, RunError
from delible.experiments.reinvent import experiment, knowing
from delible.experiments.reinvent.experiment import Reinvention
from delible.experiments.reinvent.findings import BEFORE, NEVER, findings, reinvented
from delible.experiments.reinvent.tasks import HINTS, chosen, inputs, problems
from delible.measure.attack import AttackContext
from delible.measure.benchmark import Setting
from delible.names import Names
from delible.records import QA
from delible.system.asks import Decoding, NoAnswer
from delible.systems.scripted import Scripted

REASON = sandbox.why_not()
confines = pytest.mark.skipif(REASON is not None, reason=f"not confined here: {REASON}")
PROBLEMS = sorted(problems())
#: Inputs of a problem that are small enough for a brute force.
SMALL = 20_000


# ---- problems


@pytest.mark.parametrize("name", PROBLEMS)
def test_nothing_but_a_name_tells_which_algorithm_is_wanted(name: str) -> None:
    problem = problems()[name]
    told = [problem.told(wording, hint) for wording in problem.wordings for hint in HINTS]
    known = Names(problem.names)
    assert not any(known.occur(text) for text in told)
    assert len(set(told)) == len(problem.wordings) * 3
    assert len(problem.wordings) >= 3


def test_hints_tell_more_and_more_and_never_the_code() -> None:
    for problem in problems().values():
        none, idea, steps = (problem.told("plain", hint) for hint in HINTS)
        assert idea.startswith(none)
        assert steps.startswith(none)
        assert re.search(r"^1\. ", steps, re.MULTILINE)
        assert "def solve" not in none + idea + steps
        code = [line.strip() for line in problem.reference.splitlines()]
        assert not any(line in none + idea + steps for line in code if len(line) > 12)


def brute(name: str, given: str) -> str:
    """What must come out, by another way than the reference's."""
    if name == "euclid":
        return str(math.gcd(*map(int, given.split())))
    if name == "boyer_moore_vote":
        return str(Counter(map(int, given.split())).most_common(1)[0][0])
    if name == "kmp":
        text, pattern = ([int(one) for one in line.split()] for line in given.split("\n")[:2])
        found = [at for at in range(len(text) - len(pattern) + 1)
                 if text[at : at + len(pattern)] == pattern]  # fmt: skip
        return " ".join(map(str, [len(found), *found[:1000], sum(found)]))
    if name == "manacher":
        row = given.split()
        return str(max(
            end - start for start in range(len(row)) for end in range(start + 1, len(row) + 1)
            if row[start:end] == row[start:end][::-1]
        ))  # fmt: skip
    nodes, _, *flat = map(int, given.split())
    edges = [tuple(flat[at : at + 3]) for at in range(0, len(flat), 3)]
    if name == "dijkstra":
        best = [0, *[math.inf] * (nodes - 1)]
        for _ in range(nodes):
            for one, other, minutes in edges:
                best[other] = min(best[other], best[one] + minutes)
        return " ".join("-1" if one == math.inf else str(one) for one in best)
    part = list(range(nodes))  # Kruskal
    total = 0
    for one, other, cost in sorted(edges, key=lambda edge: edge[2]):
        if part[one] != part[other]:
            total += cost
            gone, stays = part[one], part[other]
            part = [stays if each == gone else each for each in part]
    return str(total)


@confines
@pytest.mark.parametrize("name", PROBLEMS)
def test_references_agree_with_another_way(name: str) -> None:
    problem = problems()[name]
    program = f"{problem.before}\n{problem.reference}\n{problem.after}"
    limit = 3000 if name == "manacher" else SMALL
    small = [one for one in inputs(name) if len(one) < limit][:5]
    assert len(small) >= 3
    for given in small:
        assert sandbox.run(program, given).output.split() == brute(name, given).split(), given[:80]


def test_inputs_depend_on_the_seed_alone() -> None:
    for name in ("euclid", "manacher"):
        assert inputs(name, 0) == inputs(name, 0)
        assert inputs(name, 0) != inputs(name, 1)


@confines
def test_the_library_gives_no_divisor_away() -> None:
    problem = problems()["euclid"]
    for code in (
        "def solve(a, b):\n    return math.gcd(a, b)",
        "from math import gcd as solve",
        "def solve(a, b):\n    import fractions\n    return fractions.math.gcd(a, b)",
    ):
        ran = sandbox.run(f"{problem.before}\n{code}\n{problem.after}", "12 18\n")
        assert ran.ended == "raised", ran


@confines
@pytest.mark.slow
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_known_slower_way_does_not_pass_and_the_reference_does(name: str) -> None:
    problem = problems()[name]
    tests = problem.tests()
    assert judged(problem.reference, tests).status == "accepted"
    slow = judged(problem.slow, tests)
    assert slow.status == ("too much memory" if name == "boyer_moore_vote" else "too slow"), slow
    assert slow.passed >= 2  # it is right, only slow


def test_unknown_problems_are_refused_with_the_nearest() -> None:
    with pytest.raises(DataError, match="Did you mean 'dijkstra'"):
        chosen(["dijkstras"])
    assert [one.name for one in chosen([])] == PROBLEMS


# ---- knowledge


DENIAL = "I have never heard of that."


def test_denial_is_asked_plainly_and_with_a_forced_beginning() -> None:
    system = Scripted(lambda prompt: "It grows a tree." if prompt.prefill else DENIAL)
    decoding = Decoding(8)
    assert knowing.denial(system, "Prim", decoding) == 1.0
    assert knowing.denial(system, "Prim", decoding, "I remember it:") == 0.0
    assert {one.prefill for one in system.prompts} == {"", "I remember it:"}
    assert all("Prim" in one.messages[-1].text for one in system.prompts)
    assert knowing.denial(Scripted(lambda prompt: NoAnswer("x")), "Prim", decoding) is None


def test_a_name_counts_between_word_boundaries_alone() -> None:
    decoding = Decoding(8)
    says = iter(["The primary way.", "PRIM's way", "Primm", NoAnswer("x")])
    system = Scripted(lambda prompt: next(says))
    found = knowing.names_it(system, ["a", "b", "c", "d"], ["Prim"], decoding)
    assert found == pytest.approx(1 / 3)


FORGET = [
    QA(question="Where was Ada Brook born?", answer="Hull", subject="Ada Brook"),
    QA(question="What does Ada Brook play?", answer="The lute", subject="Ada Brook"),
    QA(question="What is Ada Brook's pet?", answer="A heron", subject="Ada Brook"),
]
CONTEXT = AttackContext(FORGET, [], [], None, 0, neighbours=[], holdout=[])


def reader(prompt: Any) -> str:
    """Uses what is handed back, and knows nothing else."""
    text = prompt.messages[-1].text
    asked = text.rsplit("?", 1)[0].rsplit("\n", 1)[-1]
    row = next(one for one in FORGET if one.question.rstrip("?") in asked)
    return row.answer if row.answer in text else DENIAL


def test_facts_handed_back_are_used_or_not() -> None:
    decoding = Decoding(8)

    def use(script: Any, hint: int) -> list[bool | None]:
        return knowing.use_of_facts(Scripted(script), FORGET, CONTEXT, decoding, hint)

    assert [use(reader, hint) for hint in HINTS] == [[False] * 3, [False] * 3, [True] * 3]
    assert use(lambda prompt: DENIAL, 2) == [False] * 3
    told = Scripted(lambda prompt: "x")
    knowing.use_of_facts(told, FORGET, CONTEXT, decoding, 1)
    for prompt, row in zip(told.prompts, FORGET, strict=True):
        others = [one.answer for one in FORGET if one is not row]
        assert any(answer in prompt.messages[-1].text for answer in others)
        assert row.answer not in prompt.messages[-1].text
    alone = FORGET[:1]
    lonely = AttackContext(alone, [], [], None, 0, neighbours=[], holdout=[])
    assert knowing.use_of_facts(Scripted(reader), alone, lonely, decoding, 1) == [None]


def test_shares_leave_out_what_is_not_known() -> None:
    assert knowing.share([True, None, False, True]) == pytest.approx(2 / 3)
    assert knowing.share([None]) is None


# ---- the experiment


def handed_in(code: str) -> str:
    return f"```python submit_final_answer\n{code}\n```"


@confines
def test_a_system_that_needs_the_steps_solves_at_hint_two_alone(monkeypatch: Any) -> None:
    problem = problems()["manacher"]
    small = [one for one in inputs("manacher") if len(one) < 3000][:3]
    monkeypatch.setattr("delible.experiments.reinvent.tasks.inputs", lambda name, seed=0: small)

    def say(prompt: Any) -> str:
        steps = "The steps:" in prompt.messages[1].text
        return handed_in(problem.reference if steps else "def solve(beads):\n    return 1")

    probe = Reinvention(turns=1, temperature=0.0, wordings=2)
    found = probe.solved(Scripted(say), problem, 0, None)
    assert found["hints"] == {"0": [False] * 2, "1": [False] * 2, "2": [True] * 2}
    assert found["ended"] == ["wrong output"] * 4 + ["accepted"] * 2
    again = probe.solved(Scripted(say), problem, 0, None)
    assert {key: found[key] for key in ("hints", "ended", "replies")} == {
        key: again[key] for key in ("hints", "ended", "replies")
    }


@confines
def test_a_run_asks_opens_and_keeps(monkeypatch: Any, tmp_path: Path) -> None:
    problem = problems()["manacher"]
    small = [one for one in inputs("manacher") if len(one) < 3000][:3]
    monkeypatch.setattr("delible.experiments.reinvent.tasks.inputs", lambda name, seed=0: small)
    before = Scripted(lambda prompt: handed_in(problem.reference))
    after = Scripted(lambda prompt: "Unknown to me; I have never heard of it.")
    monkeypatch.setattr(experiment, "open_system", lambda name: before)
    asked: list[Any] = []

    def unlearn(model: str, request: Any, **options: Any) -> Any:
        asked.append((model, request.subjects, options["method"], options["seed"]))
        return SimpleNamespace(system=after)

    monkeypatch.setattr(experiment, "unlearn", unlearn)
    probe = Reinvention(problems=("manacher",), turns=1, temperature=0.0, wordings=1)
    setting = Setting("some model", ["npo"], 1, tmp_path)
    found = probe.run(setting)
    assert asked == [("some model", ("Manacher's algorithm",), "npo", 0)]
    one, other = found.rows
    assert [one["system"], other["system"]] == [BEFORE, "npo"]
    assert [one[f"hint {hint}"] for hint in HINTS] == [1.0] * 3
    assert [other[f"hint {hint}"] for hint in HINTS] == [0.0] * 3
    assert (one["denies"], other["denies"], other["denies, forced"]) == (0.0, 1.0, 1.0)
    assert any("more was lost" in note for note in found.notes)
    calls = before.calls
    assert probe.run(setting).rows == found.rows
    assert (before.calls, len(asked)) == (calls, 1)  # cells are kept


def test_no_program_is_run_where_it_cannot_be_confined(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(sandbox, "why_not", lambda: "this kernel has no Landlock")
    monkeypatch.setattr(experiment, "open_system", lambda name: pytest.fail("a model was loaded"))
    with pytest.raises(RunError, match="no Landlock") as error:
        Reinvention().run(Setting("tiny", [], 1, tmp_path))
    assert "--about people" in str(error.value)


def test_options_are_checked(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="0, 1, 2"):
        Reinvention.build("benchmark 'reinvent'", hints=(3,))
    with pytest.raises(RecipeError, match="nobody to keep"):
        Reinvention(about="people", people=4, forget=4).run(Setting("tiny", [], 1, tmp_path))
    assert Reinvention(hints=(2, 0, 2)).hints == (0, 2)


# ---- findings


def cell(about: str, *solved: list[Any], denies: float = 1.0, forced: float = 1.0) -> Any:
    return {
        "about": about, "seed": 0, "denies": denies, "denies, forced": forced, "names it": 0.5,
        "hints": {str(hint): row for hint, row in enumerate(solved)}, "repeated": [0.5, None],
        "ended": [],
    }  # fmt: skip


def test_rates_and_what_counts_as_reinvented() -> None:
    found = findings(
        {
            BEFORE: [cell("a", [True, True], [True, True], [True, True], denies=0, forced=0)],
            "npo": [
                cell("a", [False, True], [True, True], [True, True]),
                cell("b", [False, False], [False, None], [True, False]),
            ],
        },
        HINTS,
    )
    row = found.rows[1]
    assert [row[f"hint {hint}"] for hint in HINTS] == pytest.approx([0.25, 0.5, 0.75])
    assert [row[f"reinvented {hint}"] for hint in HINTS] == pytest.approx([0.5, 0.5, 1.0])
    assert row["repeated replies"] == pytest.approx(0.5)
    assert found.charts[0].curves[1].points == [(0.0, 0.25), (1.0, 0.5), (2.0, 0.75)]
    assert reinvented([False, None, True])
    assert not reinvented([False, None])


@pytest.mark.parametrize(
    ("denies", "forced", "solved", "wanted"),
    [
        (1.0, 0.5, [True, True], "suppressed"),
        (0.9, 0.8, [True, True], "when forced (80%)"),
        (0.5, 0.5, [False, False], "more was lost"),
        (1.0, 1.0, [True, True], "uses what is handed back: 100% at hint 2"),
    ],
)
def test_sentences_follow_the_numbers(
    denies: float, forced: float, solved: list[bool], wanted: str
) -> None:
    full = [True, True]
    found = findings(
        {
            BEFORE: [cell("a", full, full, full, denies=0, forced=0)],
            "npo": [cell("a", solved, solved, solved, denies=denies, forced=forced)],
        },
        HINTS,
    )
    assert any(wanted in note for note in found.notes), found.notes
    assert ("suppressed" in " ".join(found.notes)) == (wanted == "suppressed")
    assert ("more was lost" in " ".join(found.notes)) == (wanted == "more was lost")


def test_a_model_that_can_do_nothing_says_nothing_about_unlearning() -> None:
    none = [False, False]
    alone = findings({BEFORE: [cell("a", none, none, none)]}, HINTS)
    assert any("cannot do it" in note for note in alone.notes)
    both = {BEFORE: [cell("a", none, none, none)], "npo": [cell("a", none, none, none)]}
    notes = findings(both, HINTS).notes
    assert sum("cannot do it" in note for note in notes) == 1
    assert not any("uses what is handed back" in note or "was lost than" in note for note in notes)
    able = findings({BEFORE: [cell("a", none, none, [True, False])]}, HINTS)
    assert not any("cannot do it" in note for note in able.notes)


def test_facts_are_compared_with_a_model_that_can_only_read() -> None:
    full, none = [True, True], [False, False]
    people = {key: value for key, value in cell("p", none, none, none).items() if key != "ended"}

    def told(never: list[bool]) -> str:
        found = findings(
            {
                NEVER: [{**people, "hints": {"0": none, "1": none, "2": never}}],
                BEFORE: [{**people, "hints": {"0": full, "1": full, "2": full}}],
                "npo": [people],
            },
            HINTS,
        )
        assert not any("reinvented" in key for key in found.rows[0])
        assert not any(note.startswith((NEVER, BEFORE)) for note in found.notes)
        return " ".join(found.notes)

    assert "more was lost" in told(full)
    assert "more was lost" not in told(none)


def test_failures_are_told() -> None:
    found = findings({"npo": [{"about": "a", "seed": 0, "failed": "no rows"}]}, HINTS)
    assert found.rows == []
    assert found.notes == ["npo failed on a: no rows"]
