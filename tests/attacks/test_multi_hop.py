"""Multi-hop: paths and kept probes by brute force, scores by hand, aliases longest first."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations, product
from typing import Any

import pytest
from asking import CONTEXT, KNOWN, context, values

from delible.attacks.multi_hop import MultiHop, paths, probe, retention, scores
from delible.component import build
from delible.errors import DataError
from delible.records import QA
from delible.system.questions import ask
from delible.world import World, relations
from delible.world.told import Edge, edges, renamed

#: Seven edges: a -> b, c; b -> c, d; c -> a, e; d -> e.
ARROWS = [("a", "b"), ("a", "c"), ("b", "c"), ("b", "d"), ("c", "a"), ("c", "e"), ("d", "e")]


def graph(arrows: Sequence[tuple[str, str]] = ARROWS, relation: str = "teacher") -> list[Edge]:
    return [
        Edge(one, relations()[relation], other, QA(question=f"{one}?", answer=other, subject=one))
        for one, other in arrows
    ]


def by_force(arrows: Sequence[tuple[str, str]], start: str, hops: int) -> set[tuple[str, ...]]:
    """Every sequence of different nodes that starts there and follows the arrows."""
    nodes = sorted({node for arrow in arrows for node in arrow} - {start})
    return {
        (start, *rest) for rest in permutations(nodes, hops)
        if all(pair in arrows for pair in zip((start, *rest), rest, strict=False))
    }  # fmt: skip


@pytest.mark.parametrize("start", "abcde")
@pytest.mark.parametrize("hops", [1, 2, 3, 4])
def test_simple_paths_are_those_of_brute_force(start: str, hops: int) -> None:
    found = [(start, *(edge.value for edge in path)) for path in paths(graph(), start, hops)]
    assert len(set(found)) == len(found)
    assert set(found) == by_force(ARROWS, start, hops)


def test_kept_probes_share_no_end_with_any_forgotten_path() -> None:
    arrows = [("k", "u"), ("s", "u"), ("u", "m"), ("m", "w"), ("u", "x"), ("x", "s"), ("k", "l"),
              ("l", "w")]  # fmt: skip
    known = graph(arrows)
    forgotten = paths(known, "s", 1)  # B = {s, u}
    kept = retention(known, forgotten, ["s"])
    nodes = {"s", "u"}
    one = {("u", w) for u, w in arrows if u == "u" and w not in nodes}
    two = {
        (u, m, w) for (u, m), (n, w) in product(arrows, arrows)
        if u == "u" and m == n and not {m, w} & nodes and w != u
    }  # fmt: skip
    outside = [arrow for arrow in arrows if not set(arrow) & nodes]
    assert (
        {(path[0].subject, path[0].value) for path in kept.one} == one == {("u", "m"), ("u", "x")}
    )
    assert {(p[0].subject, p[0].value, p[1].value) for p in kept.two} == two == {("u", "m", "w")}
    assert [(p[0].subject, p[0].value) for p in kept.relation] == [outside[0]]


def test_each_frequent_relation_has_one_kept_edge_the_most_frequent_first() -> None:
    known = graph([("k", "l"), ("l", "m")], "teacher") + graph([("k", "n")], "spouse")
    kept = retention(known, [], ["s"])
    assert [path[0].relation.name for path in kept.relation] == ["teacher", "spouse"]
    assert [path[0].value for path in kept.relation] == ["l", "n"]


def test_a_worlds_chains_are_those_of_its_own_graph() -> None:
    world = World(people=12)
    request = world.request(forget=2)
    records = [*request.forget, *request.retain, *request.neighbours]
    known = edges(records)
    told = {(edge.subject, edge.relation.name, edge.value) for edge in known}
    for seed in request.subjects:
        mine = {
            tuple(chain.chain) for chain in world.multi_hop(seed)
            if (chain.chain[0], chain.chain[1], chain.chain[2]) in told
            and (chain.chain[2], chain.chain[3], chain.chain[4]) in told
        }  # fmt: skip
        found = {
            (seed, one.relation.name, one.value, two.relation.name, two.value)
            for one, two in paths(known, seed, 2)
        }
        assert found == mine
        for one, two in paths(known, seed, 2):
            (chain,) = [c for c in world.multi_hop(seed) if tuple(c.chain) == (
                seed, one.relation.name, one.value, two.relation.name, two.value)]  # fmt: skip
            made = probe((one, two), "forget", 2)
            if made is not None:
                assert made.question == chain.qa().question
                assert made.answer == chain.qa().answer


def test_a_question_names_neither_what_is_on_the_way_nor_the_end() -> None:
    attack = MultiHop()
    for record in attack.held_out(CONTEXT):
        assert isinstance(record, QA)
        for text in (record.question, *record.paraphrases):
            assert record.answer not in text
            others = {one.subject for one in KNOWN if one.subject} - {record.subject}
            assert not any(name in text for name in others)
    inside = Edge("Ada Lund", relations()["teacher"], "Lund",
                  QA(question="?", answer="Lund", subject="Ada Lund"))  # fmt: skip
    assert probe((inside,), "forget", 0) is None


def test_only_people_can_stand_on_the_way() -> None:
    town = Edge("a", relations()["birthplace"], "b", QA(question="?", answer="b", subject="a"))
    assert probe((town, *graph([("b", "c")])), "forget", 0) is None


def test_aliases_replace_longer_names_first() -> None:
    assert renamed("In New York City or New York", ["New York", "New York City"], "NYC") == (
        "In NYC or NYC"
    )
    assert renamed("Yorkshire and york", ["York"], "X") == "Yorkshire and X"


def test_the_gold_wording_comes_first_and_another_name_last() -> None:
    attack = MultiHop(forms=9)
    record = attack.held_out(CONTEXT)[0]
    assert isinstance(record, QA)
    prompt = ask(record)
    assert prompt is not None
    asked = [one.messages[-1].text for one in attack.prompts(record, prompt)]
    assert asked == [record.question, *record.paraphrases]
    assert record.subject is not None
    assert record.subject not in asked[-1]
    assert all(record.subject in text for text in asked[:-1])


def test_lengths_are_balanced_and_the_seed_draws() -> None:
    attack = MultiHop(hops=2, paths=5)
    found = attack.held_out(CONTEXT)
    assert [(one.group or "").split("/")[1] for one in found] == ["1"] * 5 + ["2"] * 5
    assert found == attack.held_out(CONTEXT)
    assert found != attack.held_out(context(seed=1))
    beside = attack.beside(CONTEXT)
    forgotten = {one.subject for one in CONTEXT.forget}
    assert not {one.subject for one in beside["retain"]} & forgotten
    lasts = {one.question for one in beside["last hop"]}
    assert lasts
    assert all((one.group or "").startswith("last/1/") for one in beside["last hop"])


def test_rows_without_relations_are_not_run() -> None:
    rows = [QA(question="Who baked it?", answer="Ada", subject="It")]
    with pytest.raises(DataError, match="no chain of facts"):
        MultiHop().held_out(context(forget=rows))


# ---- scores

FORGET = [QA(question=f"q{i}?", answer="a", group=f"forget/{hops}/x")
          for i, hops in enumerate((1, 1, 2, 3))]  # fmt: skip
RETAIN = [QA(question=f"r{i}?", answer="a", group=f"kept {kind}/1/x")
          for i, kind in enumerate(("one", "one", "two", "relation"))]  # fmt: skip
SPLITS = {"forget": FORGET, "retain": RETAIN, "last hop": []}
RIGHT = values({"forget": [[1, 1]] * 4, "retain": [[1]] * 4})


def found(after: Any, before: Any = RIGHT) -> dict[str, float | None]:
    got = build("attack", "multi_hop").findings({"unlearned": after, "original": before}, SPLITS)
    return {name: row["unlearned"] for name, row in got.items()}


def test_nothing_forgotten_nothing_kept_and_the_oracle() -> None:
    same = found(RIGHT)
    assert (same["residual knowledge F"], same["retention R"], same["overall"]) == (1, 1, 0)
    assert same["residual rate"] == 0
    wrong = found(values({"forget": [[0, 0]] * 4, "retain": [[0]] * 4}))
    assert (wrong["residual knowledge F"], wrong["retention R"], wrong["overall"]) == (0, 0, 0)
    oracle = found(values({"forget": [[0, 0]] * 4, "retain": [[1]] * 4}))
    assert (oracle["residual knowledge F"], oracle["overall"]) == (0, 1)


def test_only_another_wording_brings_it_out() -> None:
    got = found(values({"forget": [[0, 1]] * 4, "retain": [[1]] * 4}))
    assert got["residual rate"] == 1
    assert got["residual knowledge F"] == 0


def test_hops_weigh_alike_and_longer_paths_are_the_mirage() -> None:
    got = found(
        values({"forget": [[1, 0], [0, 0], [1, 0], [1, 0]], "retain": [[1], [0], [1], [0]]})
    )
    assert got["residual knowledge F"] == pytest.approx((0.5 + 1 + 1) / 3)
    assert got["retention R"] == pytest.approx((0.5 + 1 + 0) / 3)
    low, high = 1 - 2.5 / 3, 0.5
    assert got["overall"] == pytest.approx(2 * low * high / (low + high))
    assert got["hop gap"] == pytest.approx(1 - 0.5)


def test_what_the_original_cannot_answer_is_dropped() -> None:
    before = values({"forget": [[1, 1], [0, 1], [1, 1], [0, 0]], "retain": [[1], [0], [1], [1]]})
    after = values({"forget": [[0, 0], [1, 1], [0, 1], [1, 1]], "retain": [[1], [0], [1], [1]]})
    got = found(after, before)
    assert got["residual knowledge F"] == 0
    assert got["residual rate"] == pytest.approx(1 / 2)
    assert got["retention R"] == 1


def test_nothing_asked_says_nothing() -> None:
    empty = scores([], {})
    assert (empty.forget, empty.retain, empty.overall, empty.hop_gap) == (None,) * 4
