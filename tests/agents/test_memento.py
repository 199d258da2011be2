"""Memento: its formulas, its loop, and that forgotten cases leave nothing."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from delible.acting.scorer import Scorer, ScorerOptions, positive_weight, trained
from delible.acting.word_vectors import WordVectors
from delible.acting.world_policy import Searcher, planner
from delible.acting.world_tasks import Question, passages, questions, search_tool
from delible.agents.memento import (
    ROW,
    SCORER,
    TRACE,
    Memento,
    MementoOptions,
    choice,
    examples,
    kernel_value,
    target,
)
from delible.errors import RunError
from delible.measure.scoring.separation import area_under_curve
from delible.memory import CASE, Item, Memory
from delible.names import Names
from delible.system.role import Role
from delible.systems.scripted import Scripted
from delible.world import World

# ---- the formulas


def test_choice_is_a_softmax_between_the_best_and_all_alike() -> None:
    values = np.array([0.2, 0.9, -1.0, 0.9])
    for temperature in (0.3, 1.0, 7.0):
        powers = [math.exp(one / temperature) for one in values]
        expected = [one / sum(powers) for one in powers]
        np.testing.assert_allclose(choice(values, temperature), expected)
    np.testing.assert_allclose(choice(values, 0), [0, 0.5, 0, 0.5])
    np.testing.assert_allclose(choice(values[:3], 1e-4), [0, 1, 0], atol=1e-12)
    np.testing.assert_allclose(choice(values, 1e9), [0.25] * 4, atol=1e-6)
    np.testing.assert_allclose(choice(values, math.inf), [0.25] * 4)


def test_the_target_is_soft_and_nothing_follows_one_step() -> None:
    following = np.array([0.1, 0.7, 0.4])
    soft = 0.5 * math.log(sum(math.exp(one / 0.5) for one in following))
    assert target(1.0, following, 0.9, 0.5) == pytest.approx(1 + 0.9 * soft)
    assert target(0.0, following, 1.0, 1e-6) == pytest.approx(0.7)
    assert target(1.0, np.array([]), 0.9, 0.5) == 1.0


def test_kernel_values_are_means_of_what_was() -> None:
    assert kernel_value(np.array([0.3]), np.array([0.8])) == pytest.approx(0.8)
    draw = np.random.default_rng(0)
    for _ in range(20):
        weights, values = draw.random(5), draw.normal(size=5)
        found = kernel_value(weights, values)
        assert values.min() <= found <= values.max()
        assert found == pytest.approx(sum(weights * values) / sum(weights))


# ---- the scorer


def pairs(count: int) -> tuple[Any, Any, list[int]]:
    """Separable: a case leads to success if it goes the question's way."""
    draw = np.random.default_rng(3)
    asked, shown = draw.normal(size=(2, count, 6)).astype(np.float32)
    return asked, shown, [int(a[0] + c[0] > 0) for a, c in zip(asked, shown, strict=True)]


def test_the_scorer_learns_what_can_be_told_apart() -> None:
    asked, shown, labels = pairs(400)
    options = ScorerOptions(hidden=64, learning_rate=3e-3)
    scorer = trained(asked[:300], shown[:300], labels[:300], options)
    found = scorer.scores(asked[300:], shown[300:])
    low = [one for one, label in zip(found, labels[300:], strict=True) if not label]
    high = [one for one, label in zip(found, labels[300:], strict=True) if label]
    curve = area_under_curve(low, high)
    assert curve is not None
    assert max(curve, 1 - curve) > 0.95
    assert np.mean(high) > np.mean(low) + 0.3
    assert positive_weight([0, 0, 0, 1]) == 3
    assert positive_weight([1, 1, 0]) == 1
    assert positive_weight([0, 0]) == 1


def test_rare_successes_weigh_as_much_as_failures() -> None:
    nothing = np.zeros((100, 3), dtype=np.float32)  # only the share of successes can be learned
    labels = [int(place % 10 == 0) for place in range(100)]
    options = ScorerOptions(hidden=8, learning_rate=0.02, epochs=40, batch_size=100)
    scorer = trained(nothing, nothing, labels, options)
    np.testing.assert_allclose(scorer.scores(nothing, nothing), 0.5, atol=0.05)


def test_training_is_that_of_a_hand_computation() -> None:
    """Four steps of AdamW on all rows, in float64: warm-up over two, gradients no longer than 1."""
    asked, shown, _ = pairs(12)
    asked, shown, labels = asked * 20, shown * 20, [1, 0, 0, 0] * 3
    options = ScorerOptions(
        hidden=5, dropout=0, epochs=4, batch_size=12, learning_rate=0.05, weight_decay=0.1,
        warmup_share=0.5,
    )  # fmt: skip
    weights = [one.detach().double().numpy() for one in Scorer(6, options).network.parameters()]
    first, second = [one * 0 for one in weights], [one * 0 for one in weights]
    x = np.concatenate([asked, shown], axis=1).astype(np.float64)
    share = np.array([1.0, 3.0])[labels] / np.array([1.0, 3.0])[labels].sum()
    lengths = []
    for step in range(1, 5):
        one, bias, two, last = weights
        before = x @ one.T + bias
        powers = np.exp(np.maximum(before, 0) @ two.T + last)
        missed = powers / powers.sum(axis=1, keepdims=True)
        missed[range(12), labels] -= 1
        missed *= share[:, None]
        back = missed @ two * (before > 0)
        slopes = [back.T @ x, back.sum(0), missed.T @ np.maximum(before, 0), missed.sum(0)]
        lengths.append(math.sqrt(sum((one**2).sum() for one in slopes)))
        rate = 0.05 * min(1, step / 2)
        for place, slope in enumerate(slopes):
            slope = slope * min(1, 1 / (lengths[-1] + 1e-6))
            first[place] = 0.9 * first[place] + 0.1 * slope
            second[place] = 0.999 * second[place] + 0.001 * slope**2
            mean, spread = first[place] / (1 - 0.9**step), second[place] / (1 - 0.999**step)
            weights[place] = weights[place] * (1 - rate * 0.1) - rate * mean / (
                np.sqrt(spread) + 1e-8
            )
    assert max(lengths) > 1.5  # some gradient is shortened
    for mine, its in zip(
        weights, trained(asked, shown, labels, options).network.parameters(), strict=True
    ):
        np.testing.assert_allclose(its.detach().numpy(), mine, atol=1e-4)


def test_a_score_is_that_of_the_formula() -> None:
    asked, shown, _ = pairs(20)
    scorer = Scorer(6, ScorerOptions(hidden=5))
    one, _, _, two = (part.double() for part in scorer.network)
    x = torch.from_numpy(np.concatenate([asked, shown], axis=1)).double()
    with torch.inference_mode():
        last = torch.relu(x @ one.weight.T + one.bias) @ two.weight.T + two.bias
    expected = torch.exp(last[:, 1]) / torch.exp(last).sum(1)
    scorer.network.float()
    np.testing.assert_allclose(scorer.scores(asked, shown), expected.numpy(), atol=1e-6)


# ---- the agent


def agent(folder: Path, world: World, **options: Any) -> tuple[Memento, list[Question]]:
    library = Memory(folder / "library")
    library.add(passages(world))
    asked = questions(world)
    bank = Memory(folder / "bank", WordVectors())
    made = Memento(
        bank, Role("planner", Scripted(planner)), Role("writer", Scripted(Searcher(asked))),
        [search_tool(library)], MementoOptions(**options),
    )  # fmt: skip
    return made, asked


def one_pass(made: Memento, asked: Sequence[Question]) -> list[int]:
    found = [made.solve(one.text, one.subject, one.reward) for one in asked]
    return [int(one.reward or 0) for one in found]


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, World, list[list[int]]]:
    """An agent after three passes over a world's questions."""
    from delible.memory import database

    world, folder = World(people=5, seed=3, relations=4), tmp_path_factory.mktemp("lived")
    with pytest.MonkeyPatch.context() as fast:
        fast.setattr(database, "SYNCHRONOUS", "OFF")
        fast.setattr("os.fsync", lambda _: None)
        made, asked = agent(folder, world)
        passes = [one_pass(made, asked) for _ in range(3)]
    return folder, world, passes


@pytest.fixture
def again(
    lived: tuple[Path, World, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Memento, list[Question]]]:
    """Copies of that agent."""
    import shutil

    from delible.memory import database

    monkeypatch.setattr(database, "SYNCHRONOUS", "OFF")
    monkeypatch.setattr("os.fsync", lambda _: None)

    def copy(name: str = "copy", **options: Any) -> tuple[Memento, list[Question]]:
        folder, world, _ = lived
        shutil.copytree(folder / "bank", tmp_path / name / "bank")
        return agent(tmp_path / name, world, **options)

    return copy


def test_success_rises_from_pass_to_pass(
    lived: tuple[Path, World, list[list[int]]], tmp_path: Path
) -> None:
    means = [float(np.mean(one)) for one in lived[2]]
    assert all(later >= earlier for earlier, later in pairwise(means))
    assert means[2] > means[0] + 0.1
    world = lived[1]
    alone, asked = agent(tmp_path, world, cases=0)
    assert means[2] > np.mean(one_pass(alone, asked)) + 0.2


def test_retrieval_by_likeness_is_the_best_of_all_cosines(again: Any) -> None:
    made, asked = again()
    cases = made.memory.items(CASE)

    def cosine(one: str, other: str) -> Fraction:
        rows = WordVectors().encode([one, other])
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        return sum((Fraction(float(a)) * Fraction(float(b)) for a, b in zip(*rows, strict=True)),
                   Fraction(0))  # fmt: skip

    for question in (asked[0].text, asked[11].text, "Who is it?"):
        order = sorted(range(len(cases)), key=lambda n: (-cosine(question, cases[n].key), n))
        assert made.retrieve(question) == [cases[place] for place in order[:4]]
    made.options = MementoOptions(cases=0)
    assert made.retrieve(asked[0].text) == []


def test_what_is_shown_and_what_is_written(again: Any) -> None:
    made, asked = again()
    question = asked[5]
    cases = made.retrieve(question.text)
    solved = made.solve(question.text, question.subject, question.reward)
    shown = made.planner.system.prompts[0].messages[1].text
    assert shown.startswith(examples(cases, 8))
    assert f"Question: {question.text}" in shown
    good = [one.text for one in cases if one.data["reward"] == 1]
    assert all(text in shown.partition("Plans that did not work:")[0] for text in good)
    case = made.memory.get(str(solved.case))
    assert case.parents == tuple(sorted(one.id for one in cases))
    assert case.data == {"plan": [case.text.partition("\n1. ")[2]], "reward": solved.reward}
    assert (case.key, case.subject) == (question.text, question.subject)
    mine = [one for one in made.memory.items(ROW) if solved.case in one.parents]
    assert {str(one.data["case"]) for one in mine} == {one.id for one in cases}
    assert {one.data["label"] for one in mine} == {solved.reward}
    (trace,) = [one for one in made.memory.items(TRACE) if solved.case in one.parents]
    rows = [json.loads(line) for line in trace.text.splitlines()]
    assert rows[0] == {"case": case.id}
    assert rows[1]["tool"] == "search"
    before = len(made.memory)
    assert made.solve(question.text).case is None  # nobody judged
    assert len(made.memory) == before


def test_a_plan_that_cannot_be_read_is_no_case(again: Any) -> None:
    made, asked = again()
    made.planner = Role("planner", Scripted(lambda _: "no JSON"))
    before = len(made.memory)
    solved = made.solve(asked[0].text, asked[0].subject, asked[0].reward)
    assert (solved.reward, solved.case, len(made.memory)) == (None, None, before)
    assert solved.reason


def test_forgetting_a_person_leaves_no_trace_and_others_as_they_were(
    again: Any, tmp_path: Path
) -> None:
    made, asked = again()
    name = asked[0].subject
    theirs = [one for one in asked if one.subject == name]
    others = [one for one in asked if one.subject != name]
    before, _ = again("before")
    kept = float(np.mean(one_pass(before, others)))
    gone = [one.id for one in made.memory.items() if one.subject == name]
    deletion = made.forget(subject=name)
    assert made.memory.certificate(deletion).verdict == "nothing found"
    for one in theirs:
        assert all(case.subject != name for case in made.retrieve(one.text))
    names = Names([name])
    left = made.memory.items()
    assert not any(names.occur(text) for one in left for text in one.says())
    whole = b"".join(path.read_bytes() for path in made.memory.folder.glob("*"))
    assert not any(id_.encode() in whole for id_ in (*gone, name))
    never = Memory(tmp_path / "never", WordVectors())
    never.add(left)
    assert never.state == made.memory.state
    fresh, _ = agent(tmp_path / "fresh", World(people=5, seed=3, relations=4))
    fresh.memory = never
    prompts = []
    for one in (made, fresh):
        for question in others:
            one.retrieve(question.text)
            one.solve(question.text)
        prompts.append(list(one.planner.system.prompts))
    assert prompts[0] == prompts[1]
    assert not any(names.occur(turn.text) for prompt in prompts[0] for turn in prompt.messages)
    assert abs(float(np.mean(one_pass(made, others))) - kept) < 0.02
    again_asked = made.solve(theirs[0].text, name, theirs[0].reward)
    assert again_asked.case is None  # and it is not learned again


def test_deleting_with_descendants_is_never_having_had_them(again: Any, tmp_path: Path) -> None:
    made, asked = again()
    victim = made.memory.items(CASE)[-3]
    items = {one.id: one for one in made.memory.items()}
    gone = {one.id for one in items.values() if one.key == victim.key and one.kind == CASE}
    gone |= {one.id for one in items.values() if one.text == victim.text}
    while more := {one.id for one in items.values() if set(one.parents) & gone} - gone:
        gone |= more
    made.forget(ids=[victim.id], descendants="delete")
    left = {one.id for one in made.memory.items()}
    assert left.isdisjoint(gone)
    for one in made.memory.items():
        assert not set(one.parents) & gone
        assert not any(id_ in text for id_ in gone for text in one.says())
    never = Memory(tmp_path / "never", WordVectors())
    never.add([one for one in items.values() if one.id in left])
    for one in asked:
        assert never.search(one.text, 4, CASE) == made.memory.search(one.text, 4, CASE)


def test_the_scorer_is_stale_until_it_is_trained_without_what_went(
    again: Any, tmp_path: Path
) -> None:
    options = {"retrieval": "learned", "scorer": ScorerOptions(hidden=16, epochs=2)}
    made, asked = again(**options)
    with pytest.raises(RunError, match="never trained"):
        made.retrieve(asked[0].text)
    first = made.retrain()
    cases = made.memory.items(CASE)
    vectors = WordVectors().encode([asked[3].text, *(
        f"[CASE] {one.key} [PLAN] {one.text.partition(chr(10))[2]}" for one in cases)])  # fmt: skip
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    values = first.scores(np.repeat(vectors[:1], len(cases), axis=0), vectors[1:])
    best = [cases[n] for n in sorted(range(len(cases)), key=lambda n: (-values[n], n))[:4]]
    assert [one.id for one in made.retrieve(asked[3].text)] == [one.id for one in best]
    made.forget(subject=asked[0].subject)
    assert made.memory.stale()[SCORER] > 0
    with pytest.raises(RunError, match="trained on"):
        made.retrieve(asked[3].text)
    second = made.retrain()
    assert made.memory.stale() == {}
    never = Memory(tmp_path / "never", WordVectors())
    never.add(made.memory.items())
    other = Memento(never, made.planner, made.executor, [], made.options).retrain()
    for mine, theirs in zip(second.network.parameters(), other.network.parameters(), strict=True):
        assert float((mine - theirs).abs().max()) == 0
    assert any(
        float((mine - theirs).abs().max()) > 0
        for mine, theirs in zip(second.network.parameters(), first.network.parameters(),
                                strict=True)
    )  # fmt: skip
    saved = Scorer.open(made.memory.folder / f"{SCORER}.safetensors", made.options.scorer)
    np.testing.assert_allclose(saved.scores(vectors[:1], vectors[1:2]),
                               second.scores(vectors[:1], vectors[1:2]))  # fmt: skip


def test_no_reader_ever_gets_a_forgotten_case(again: Any) -> None:
    made, asked = again()
    done, wrong = threading.Event(), list[str]()

    def read() -> None:
        while not done.is_set():
            gone = set(forgotten)
            for one in asked[::5]:
                wrong.extend(c.id for c in made.retrieve(one.text) if c.subject in gone)

    forgotten: list[str] = []
    readers = [threading.Thread(target=read) for _ in range(2)]
    for one in readers:
        one.start()
    try:
        for name in dict.fromkeys(one.subject for one in asked):
            made.forget(subject=name)
            forgotten.append(name)
    finally:
        done.set()
        for one in readers:
            one.join()
    assert wrong == []
    assert made.memory.items(CASE) == []


def test_a_later_case_goes_where_a_name_stands_in_it_or_none_is_known(tmp_path: Path) -> None:
    memory = Memory(tmp_path, WordVectors())
    made = Memento(memory, Role("planner", Scripted([])), Role("writer", Scripted([])), [])
    memory.add([
        Item(id="ada", kind=CASE, text="Where does Ada Brook live?\n1. look", subject="Ada Brook"),
        Item(id="says", kind=CASE, text="Who sings?\n1. ask ADA  BROOK", parents=("ada",)),
        Item(id="clean", kind=CASE, text="Who sails?\n1. ask around", parents=("ada",)),
        Item(id="row", kind=ROW, text="row of clean", parents=("ada", "clean")),
        Item(id="of-clean", kind=ROW, text="another row", parents=("clean",)),
        Item(id="jon", kind=CASE, text="Where is it?\n1. look"),
        Item(id="after", kind=CASE, text="Where was it?\n1. look again", parents=("jon",)),
    ])  # fmt: skip
    made.forget(ids=["ada"])
    assert [one.id for one in memory.items()] == ["clean", "of-clean", "jon", "after"]
    assert memory.get("clean").parents == ()
    made.forget(ids=["jon"])  # about nobody: nothing can be looked for
    assert [one.id for one in memory.items()] == ["clean", "of-clean"]
