"""In-context distillation: who decides, what is retrieved, what it costs, what is forgotten."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from delible.acting.agreeing import canonical_code, consistent, reliability, same
from delible.acting.cost import Metered, Usage, break_even
from delible.acting.loop import Action, Budget
from delible.acting.town import SOLD, Goal, Town, Visit, optimal
from delible.acting.town_teaching import Student, Teacher
from delible.acting.word_vectors import WordVectors
from delible.agents.icd_cascade import (
    PLAN,
    STEP,
    Cascade,
    IcdCascadeOptions,
    Snippet,
    examples,
    situation,
)
from delible.errors import DataError, RunError
from delible.memory import DEMONSTRATION, Memory
from delible.system.asks import Decoding, NoAnswer, Prompt
from delible.system.base import BlackBox
from delible.system.role import Role, RoleOptions
from delible.systems.scripted import Scripted

BUDGET = Budget(steps=40, tokens=40 * 64, step_tokens=64)


def cascade(folder: Path, student: BlackBox, teacher: BlackBox | None, **options: Any) -> Cascade:
    attempts = RoleOptions(attempts=1)
    above = Role("writer", teacher, attempts) if teacher else None
    settings = IcdCascadeOptions(**{"budget": BUDGET, "alarm": 1.0, **options})
    return settings.agent(Memory(folder, WordVectors()), Role("planner", student, attempts), above)


@pytest.fixture(scope="module")
def town() -> Town:
    return Town.made(11, width=6, height=6, each=2)


def tasks(town: Town) -> tuple[list[Goal], list[Goal]]:
    """For demonstrations, and thirty others."""
    things, names = list(SOLD.values()), [one.name for one in town.places]
    bring = [Goal(thing, name) for name in names for thing in things]
    shown = [one for number, one in enumerate(bring) if number % 3 == 0]
    asked = [Goal(place=one) for one in names] + [Goal(one) for one in things]
    return shown, asked + [one for one in bring if one not in shown][: 30 - len(asked)]


def taught(agent: Cascade, town: Town, goals: Sequence[Goal]) -> list[str]:
    ids = []
    for goal in goals:
        visit = Visit(town)
        _, id_ = agent.demonstrate(goal.text, visit, lambda _, v=visit, g=goal: v.reached(g),
                                   subject=goal.thing)  # fmt: skip
        assert id_ is not None
        ids.append(id_)
    return ids


def rate(agent: Cascade, town: Town, goals: Sequence[Goal]) -> tuple[dict[str, bool], float]:
    """Which goals are reached, and the share of steps that the teacher decides."""
    reached, by = {}, list[str]()
    for goal in goals:
        visit = Visit(town)
        solved = agent.solve(goal.text, visit)
        reached[goal.text] = visit.reached(goal)
        by += [one.by for one in solved.decisions]
    return reached, by.count("teacher") / len(by)


# ---- agreement


def test_actions_are_the_same_as_texts() -> None:
    one = Action(tool="Walk", arguments={"direction": " North ", "steps": 2})
    assert consistent([one, Action(tool="walk", arguments={"steps": 2, "direction": "north"})])
    for other in (
        Action(tool="walk", arguments={"direction": "south", "steps": 2}),
        Action(tool="run", arguments={"direction": "north", "steps": 2}),
        Action(tool="walk", arguments={"direction": "north"}), Action(answer="walk"), NoAnswer("x"),
    ):  # fmt: skip
        assert not consistent([one, one, other])
    assert not consistent([NoAnswer("x"), NoAnswer("x")])
    assert consistent([Action(answer="Done"), Action(answer="done ")])


def test_programs_are_the_same_but_for_names_and_spaces() -> None:
    first = "songs = api.songs(page=1)  # all\nfor s in songs:\n    print(s['title'])"
    again = "items=api.songs( page = 1 )\nfor x in items:\n\n  print(x['title'])"
    assert canonical_code(first) == canonical_code(again)
    for other in (
        first.replace("page=1", "page=2"), first.replace("api.songs", "api.playlists"),
        first.replace("title", "artist"), first.replace("print(s", "print(songs"),
        first.replace("api", "other"), first.replace("page=", "index="),
    ):  # fmt: skip
        assert canonical_code(other) != canonical_code(first)
    assert canonical_code("a = b\nb = a") != canonical_code("a = b\nb = b")
    assert canonical_code("Not a  program") == canonical_code("not a program")
    calls = [Action(tool="run", arguments={"code": one}) for one in (first, again)]
    assert consistent(calls, "code")
    assert not consistent(calls, "text")
    assert same(Action(tool="run", arguments={"code": "f(1)"}), "code") != same(
        Action(tool="run", arguments={"code": "f(2)"}), "code"
    )


def test_agreement_is_worth_what_it_was() -> None:
    assert reliability([True, True, False, True], [True, False, True, True]) == pytest.approx(2 / 3)
    assert reliability([False], [True]) is None


# ---- who decides


def test_one_sample_never_asks_the_teacher(town: Town, tmp_path: Path) -> None:
    teacher = Teacher(town)
    agent = cascade(tmp_path, Student(0.5), teacher, samples=1)
    for goal in tasks(town)[1][:6]:
        solved = agent.solve(goal.text, Visit(town))
        assert solved.escalated == 0
        assert solved.teacher == Usage()
    assert teacher.prompts == []


def test_who_never_agrees_always_asks_the_teacher(town: Town, tmp_path: Path) -> None:
    class Never(Student):
        def _acted(self, prompt: Prompt, decoding: Decoding) -> str:
            return json.dumps({"answer": f"{decoding.seed}"})

    alone = cascade(tmp_path / "alone", Teacher(town), None, samples=1, demonstrations=0)
    agent = cascade(tmp_path / "never", Never(0), Teacher(town), demonstrations=0)
    for goal in tasks(town)[1][::5]:
        ours, theirs = (one.solve(goal.text, Visit(town)) for one in (agent, alone))
        assert ours.escalated == 1
        assert ours.episode == theirs.episode
        assert len(ours.episode.steps) - 1 == len(optimal(town, goal) or ())
        assert not any(one.consistent for one in ours.decisions)
    loud = cascade(tmp_path / "loud", Never(0), Teacher(town), demonstrations=0, alarm=0.9)
    assert loud.solve("Get bread.", Visit(town)).note == "100% of the steps were given to the " \
        "teacher."  # fmt: skip
    closed = cascade(tmp_path / "closed", Never(0), None)
    solved = closed.solve("Get bread.", Visit(town))
    assert (solved.episode.ended, solved.decisions[0].by) == ("unreadable", "nobody")
    assert "no teacher" in solved.episode.reason
    with pytest.raises(RunError, match="teacher"):
        closed.demonstrate("Get bread.", Visit(town), lambda _: True)
    with pytest.raises(RunError, match="encoder"):
        Cascade(Memory(tmp_path / "words"), Role("planner", Never(0)))


def test_samples_are_drawn_apart_and_warm(town: Town, tmp_path: Path) -> None:
    seen: list[Decoding] = []

    class Watched(Student):
        def _acted(self, prompt: Prompt, decoding: Decoding) -> str:
            seen.append(decoding)
            return json.dumps({"answer": "Done."})

    cascade(tmp_path, Watched(0), None, samples=4, temperature=0.7).solve("x", Visit(town))
    assert [(one.temperature, one.seed) for one in seen] == [(0.7, seed) for seed in range(4)]


# ---- retrieval


def test_the_score_is_the_mean_of_the_keys_there_are(town: Town, tmp_path: Path) -> None:
    agent = cascade(tmp_path, Student(0), Teacher(town), window=1)
    taught(agent, town, tasks(town)[0][:6])
    goal, plan, now = "Get apples.", "1. Find apples.", "You are at 2,3."

    def cosine(one: str, other: str) -> Fraction:
        rows = WordVectors().encode([one, other])
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        return sum((Fraction(float(a)) * Fraction(float(b)) for a, b in zip(*rows, strict=True)),
                   Fraction(0))  # fmt: skip

    items = agent.memory.items()
    demos = {one.id: one for one in items if one.kind == DEMONSTRATION}
    for told in (plan, ""):
        scores: dict[str, tuple[float, int]] = {}
        for step in (one for one in items if one.kind == STEP):
            (id_,) = step.parents
            keys = [cosine(goal, demos[id_].key), cosine(now, step.key)]
            if told:
                keys.append(cosine(told, str(demos[id_].data["plan"])))
            mean, number = float(sum(keys) / len(keys)), int(step.data["number"])
            if id_ not in scores or mean > scores[id_][0]:
                scores[id_] = (mean, number)
        order = sorted(scores, key=lambda id_: -scores[id_][0])
        found = agent.retrieved(goal, told, now)
        assert [one.demonstration for one in found] == order
        assert len({one.demonstration for one in found}) == len(found) == 6
        for one in found:
            assert one.score == pytest.approx(scores[one.demonstration][0], abs=1e-6)
            count = sum(step.parents == (one.demonstration,) for step in items
                        if step.kind == STEP)  # fmt: skip
            inner = 0 < one.number < count - 1
            assert len(one.steps) == (3 if inner else 2)
            whole = demos[one.demonstration].text
            assert "\n".join(one.steps) in whole
    assert situation("a", "b") == "a\nb"


def test_without_demonstrations_prompts_are_zero_shot(town: Town, tmp_path: Path) -> None:
    bare, shown = Student(0), Student(0)
    zero = cascade(tmp_path, bare, Teacher(town), demonstrations=0, samples=1)
    taught(zero, town, tasks(town)[0][:4])
    zero.solve("Get bread.", Visit(town))
    empty = cascade(tmp_path / "empty", shown, Teacher(town), samples=1)
    empty.solve("Get bread.", Visit(town))
    assert bare.prompts == shown.prompts
    assert not any("Example:" in turn.text for one in bare.prompts for turn in one.messages)
    full = Student(0)
    cascade(tmp_path, full, None, samples=1, demonstrations=2).solve("Get bread.", Visit(town))
    assert full.prompts[0].messages[1].text.count("Plan:") == 2
    assert full.prompts[1].messages[1].text.count("Example:") == 2


def test_failures_and_known_goals_are_not_remembered(town: Town, tmp_path: Path) -> None:
    agent = cascade(tmp_path, Student(0), Teacher(town))
    _, id_ = agent.demonstrate("Get bread.", Visit(town), lambda _: False)
    assert id_ is None
    assert len(agent.memory) == 0
    taught(agent, town, [Goal("bread")])
    count = len(agent.memory)
    _, id_ = agent.demonstrate("get  BREAD.", Visit(town), lambda _: True)
    assert id_ is None
    assert len(agent.memory) == count


def test_old_steps_of_long_examples_go_first() -> None:
    long = Snippet("a", 2, 1.0, "Long", ("first " * 9, "second " * 9, "third"))
    short = Snippet("b", 0, 0.5, "Short", ("only",))
    assert examples([long, short], 999) == (
        f"Example: Long\n{'first ' * 9}\n{'second ' * 9}\nthird\n\nExample: Short\nonly"
    )
    assert examples([long, short], 110).split("\n")[1].startswith("second")
    assert examples([long, short], 50) == "Example: Long\nthird\n\nExample: Short\nonly"
    assert examples([long], 3) == ""


# ---- costs


def test_tokens_are_those_counted_by_hand(tmp_path: Path) -> None:
    """Three steps, three samples each; the teacher decides the second."""
    town = Town("t", 3, 1, frozenset(), ())
    east = json.dumps({"tool": "walk", "arguments": {"direction": "east"}})
    west = json.dumps({"tool": "walk", "arguments": {"direction": "west"}})
    done = json.dumps({"answer": "Done."})
    lines = [east, east, east, east, west, east, done, done, done]
    student, teacher = Scripted(lines), Scripted([east])
    agent = IcdCascadeOptions(plan=False, demonstrations=0, budget=BUDGET).agent(
        Memory(tmp_path, WordVectors()), Role("planner", student), Role("writer", teacher), len
    )
    solved = agent.solve("Walk east twice.", Visit(town))
    assert [one.by for one in solved.decisions] == ["student", "teacher", "student"]
    sizes = [sum(len(turn.text) for turn in one.messages) for one in student.prompts]
    assert sizes[0] == sizes[1] == sizes[2] < sizes[3] == sizes[5] < sizes[6]
    assert solved.student == Usage(9, sum(sizes), 2 * (sizes[0] + sizes[3] + sizes[6]),
                                   sum(map(len, lines)))  # fmt: skip
    assert solved.teacher == Usage(1, sizes[3], 0, len(east))
    once = sizes[0] + sizes[3] + sizes[6]
    assert solved.student.cost(2, 3) == 2 * once + 3 * sum(map(len, lines))
    assert solved.student.cost(2, 3, repeats_paid=True) == 6 * once + 3 * sum(map(len, lines))
    assert solved.escalated == pytest.approx(1 / 3)
    again = agent.solve("Walk east twice.", Visit(town))  # the script has ended
    assert again.student.calls == 3
    assert again.student.output_tokens == 0


def test_break_even_by_hand() -> None:
    assert break_even(30, 2, 1.5) == pytest.approx(60)
    assert break_even(30, 2, 2) == math.inf
    assert break_even(30, 2, 3) == math.inf
    meter = Metered(Scripted(["a b", NoAnswer("no")]))
    meter.generate([Prompt.ask("one two!", system="x")], Decoding())
    meter.generate([Prompt.ask("three")], Decoding())
    assert meter.usage == Usage(2, 5, 0, 2)
    assert meter.usage - Usage(1, 4, 0, 2) == Usage(1, 1)


# ---- all of it


def test_the_cascade_is_best_and_forgets_a_kind(town: Town, tmp_path: Path) -> None:
    shown, asked = tasks(town)
    assert len(asked) == 30
    assert not {one.text for one in shown} & {one.text for one in asked}
    teacher = Teacher(town)
    slips = 0.08
    agent = cascade(tmp_path, Student(slips), teacher)
    taught(agent, town, shown)

    def with_(**options: Any) -> Cascade:
        return cascade(tmp_path, Student(slips), teacher, **options)

    zero, _ = rate(with_(demonstrations=0, samples=1), town, asked)
    alone, none = rate(with_(samples=1), town, asked)
    both, share = rate(agent, town, asked)
    assert sum(both.values()) >= sum(alone.values()) + 3
    assert sum(alone.values()) >= sum(zero.values()) + 3
    assert sum(both.values()) > 27
    assert none == 0
    assert 0.05 < share < 0.5

    deletion = agent.forget(subject="nails")
    assert agent.memory.certificate(deletion).verdict == "nothing found"
    left = agent.memory.items()
    assert {one.kind for one in left} == {DEMONSTRATION, PLAN, STEP}
    assert not any("nails" in text for one in left for text in one.says())
    ids = {one.id for one in left if one.kind == DEMONSTRATION}
    assert all(set(one.parents) <= ids for one in left)
    for goal in ("Get nails.", "Nails are needed!", "Where are nails sold?"):
        for one in agent.retrieved(goal, "", "You are at 0,0."):
            assert one.demonstration in ids
            assert "nails" not in "\n".join((one.goal, *one.steps))
    others = [one for one in asked if one.thing != "nails" and "Smithy" not in one.place]
    kept, _ = rate(agent, town, others)
    assert len(others) >= 15
    assert sum(kept.values()) >= sum(both[one.text] for one in others) - 1
    _, back = agent.demonstrate(deleted_goal(shown), Visit(town), lambda _: True)
    assert back is None  # it is not shown again
    with pytest.raises(DataError, match="no demonstration"):
        agent.forget(subject="nails")


def deleted_goal(shown: Sequence[Goal]) -> str:
    return next(one.text for one in shown if one.thing == "nails")


def test_forgetting_one_leaves_others_that_saw_the_same(town: Town, tmp_path: Path) -> None:
    """Steps with equal observations belong to their own demonstrations."""
    agent = cascade(tmp_path, Student(0), Teacher(town))
    first, second = taught(agent, town, tasks(town)[0][:2])
    steps = {one.id: one for one in agent.memory.items(STEP)}
    mine = {id_ for id_, one in steps.items() if one.parents == (first,)}
    keys = [{one.key for one in steps.values() if one.parents == (id_,)} for id_ in (first, second)]
    assert keys[0] & keys[1]
    agent.forget(ids=[first])
    assert {one.id for one in agent.memory.items(STEP)} == set(steps) - mine
    never = dataclasses.replace(agent.retrieved("Get bread.", "", "You are at 0,0.")[0])
    assert never.demonstration == second


def test_a_demonstration_that_names_it_goes_too(town: Town, tmp_path: Path) -> None:
    agent = cascade(tmp_path, Student(0), Teacher(town))
    smithy = next(one.name for one in town.places if one.kind == "smithy")
    clinic = next(one.name for one in town.places if one.kind == "clinic")
    taught(agent, town, [Goal(place=smithy), Goal(place=clinic)])
    first, second = agent.memory.items(DEMONSTRATION)
    assert (first.subject, "nails" in first.text, "nails" in second.text) == ("", True, False)
    agent.forget(subject="nails")
    assert agent.memory.items(DEMONSTRATION) == [second]
