"""In which order forget and retain rows meet."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from scipy.stats import chi2

from delible.component import build
from delible.errors import RecipeError
from delible.lm.template import Encoded
from delible.train.randomness import generator
from delible.train.row import RetainKind, Row

Pairs = list[tuple[int, int | None]]


def make_row(
    index: int,
    subject: str | None = None,
    neighbour_of: str | None = None,
    kind: RetainKind = "general",
) -> Row:
    return Row(index, Encoded((1, 2, 3), 1, True), f"{index}", subject, neighbour_of, kind)


def forget_rows(**counts: int) -> list[Row]:
    subjects = [subject for subject, count in counts.items() for _ in range(count)]
    return [make_row(index, subject) for index, subject in enumerate(subjects)]


def retain_rows(
    direct: dict[str, int], indirect: dict[str | None, int] | None = None, general: int = 0
) -> list[Row]:
    described: list[tuple[str | None, str | None, RetainKind]] = []
    for subject, count in direct.items():
        described += [(f"work {subject}", subject, "direct")] * count
    for linked, count in (indirect or {}).items():
        described += [("someone else", linked, "indirect")] * count
    described += [(None, None, "general")] * general
    return [make_row(index, *values) for index, values in enumerate(described)]


def epoch(
    sample: Any, forget: Sequence[Row], retain: Sequence[Row], number: int = 0, seed: int = 0
) -> Pairs:
    made = build("sample", sample)
    return made.epoch(forget, retain, number, generator(seed, "sample", number))  # type: ignore[no-any-return]


FORGET = forget_rows(a=3, b=5, c=2)
RETAIN = retain_rows({"a": 7, "b": 2, "c": 4}, {"a": 9, "b": 9, "c": 9}, general=6)
ALL: list[Any] = [
    "one_to_one",
    "cyclic",
    "balanced",
    "modular",
    {"name": "modular", "order": "blocks"},
]


@pytest.mark.parametrize("sample", ALL, ids=str)
def test_epochs_repeat_with_the_seed_and_differ_from_each_other(sample: Any) -> None:
    first = epoch(sample, FORGET, RETAIN)
    assert first == epoch(sample, FORGET, RETAIN)
    assert first != epoch(sample, FORGET, RETAIN, number=1)
    assert first != epoch(sample, FORGET, RETAIN, seed=1)
    assert {forget for forget, _ in first} == set(range(len(FORGET)))  # nothing stays unforgotten


# ---- one-to-one


def test_one_to_one_has_no_fixed_pairing() -> None:
    forget, retain = forget_rows(a=4), retain_rows({}, general=20)
    met = Counter(dict(epoch("one_to_one", forget, retain, number))[0] for number in range(1000))
    statistic = sum((met[index] - 50) ** 2 / 50 for index in range(20))
    assert statistic < chi2.ppf(0.99, 19)


# ---- cyclic


@pytest.mark.parametrize("redraw", [True, False])
@pytest.mark.parametrize(("some", "others"), [(4, 11), (11, 4), (3, 3)])
def test_cyclic_uses_the_longer_set_once(some: int, others: int, redraw: bool) -> None:
    forget, retain = forget_rows(a=some), retain_rows({}, general=others)
    pairs = epoch({"name": "cyclic", "redraw": redraw}, forget, retain)
    assert len(pairs) == max(some, others)
    for counts, size in (
        (Counter(pair[0] for pair in pairs), some),
        (Counter(pair[1] for pair in pairs), others),
    ):
        assert len(counts) == size
        assert max(counts.values()) - min(counts.values()) <= 1
        assert size < max(some, others) or set(counts.values()) == {1}


def test_cyclic_by_index_keeps_partners_and_redraw_does_not() -> None:
    forget, retain = forget_rows(a=3), retain_rows({}, general=7)
    fixed = [epoch({"name": "cyclic", "redraw": False}, forget, retain, n) for n in (0, 1)]
    assert sorted(fixed[0]) == sorted(fixed[1]) == sorted((k % 3, k) for k in range(7))
    drawn = [epoch("cyclic", forget, retain, n) for n in (0, 1)]
    assert sorted(drawn[0]) != sorted(drawn[1])


def test_cyclic_restricts_kinds() -> None:
    pairs = epoch({"name": "cyclic", "kinds": ["direct", "general"]}, FORGET, RETAIN)
    used = Counter(RETAIN[kept].kind for _, kept in pairs if kept is not None)
    assert used == {"direct": 13, "general": 6}
    with pytest.raises(RecipeError, match="no retain row is of kind indirect"):
        epoch({"name": "cyclic", "kinds": ["indirect"]}, FORGET, retain_rows({"a": 1}))


@pytest.mark.parametrize("sample", ["cyclic", "balanced"])
def test_without_retain_rows_forget_rows_go_alone(sample: str) -> None:
    pairs = epoch(sample, FORGET, [])
    assert sorted(pairs) == [(index, None) for index in range(len(FORGET))]


# ---- balanced


def test_balanced_has_as_many_indirect_as_direct_rows_per_subject() -> None:
    pairs = epoch("balanced", FORGET, RETAIN)
    used = [RETAIN[kept] for kept in {kept for _, kept in pairs} if kept is not None]
    linked = Counter((row.kind, row.neighbour_of) for row in used)
    for subject, count in (("a", 7), ("b", 2), ("c", 4)):
        assert linked["direct", subject] == linked["indirect", subject] == count
    assert linked["general", None] == 6
    assert len(pairs) == len(used) == 32


def test_balanced_fills_up_with_rows_that_are_linked_to_nobody() -> None:
    retain = retain_rows({"a": 5, "b": 5}, {"a": 2, None: 30}, general=1)
    used = {kept for _, kept in epoch("balanced", FORGET, retain) if kept is not None}
    kinds = Counter((retain[kept].kind, retain[kept].neighbour_of) for kept in used)
    assert kinds["indirect", "a"] == 2
    assert kinds["indirect", None] == 8
    seen = set().union(
        *({kept for _, kept in epoch("balanced", FORGET, retain, n)} for n in range(30))
    )
    assert seen == set(range(len(retain)))  # drawn anew: in time all are used


def test_balanced_takes_all_when_there_are_too_few() -> None:
    retain = retain_rows({"a": 5}, {None: 2})
    used = {kept for _, kept in epoch("balanced", FORGET, retain)}
    assert used == set(range(7))


def test_balanced_without_direct_neighbours_says_what_to_give() -> None:
    with pytest.raises(RecipeError, match="'neighbour_of'"):
        epoch("balanced", FORGET, retain_rows({}, {None: 3}, general=3))


# ---- modular


@pytest.mark.parametrize("redraw", [True, False])
@pytest.mark.parametrize("order", ["shuffled", "blocks"])
def test_modular_table(order: str, redraw: bool) -> None:
    pairs = epoch({"name": "modular", "order": order, "redraw": redraw}, FORGET, RETAIN)
    # max(3, 7 + 9) + max(5, 2 + 9) + max(2, 4 + 9) pairs of subjects and 6 general ones
    assert len(pairs) == 16 + 11 + 13 + 6
    assert {kept for _, kept in pairs} == set(range(len(RETAIN)))
    for forget, kept in pairs:
        assert kept is not None
        linked = RETAIN[kept].neighbour_of
        assert linked is None or FORGET[forget].subject == linked
    for subject, size in (("a", 3), ("b", 5), ("c", 2)):
        mine = Counter(f for f, r in pairs if r is not None and RETAIN[r].neighbour_of == subject)
        assert len(mine) == size
        assert max(mine.values()) - min(mine.values()) <= 1


def test_modular_blocks_keep_a_subject_together() -> None:
    pairs = epoch({"name": "modular", "order": "blocks"}, FORGET, RETAIN)
    labels = [RETAIN[kept].neighbour_of for _, kept in pairs if kept is not None]
    changes = sum(one != other for one, other in itertools.pairwise(labels))
    assert changes == 3  # four blocks
    mixed = [RETAIN[k].neighbour_of for _, k in epoch("modular", FORGET, RETAIN) if k is not None]
    assert sum(one != other for one, other in itertools.pairwise(mixed)) > 10


def test_modular_repeats_the_shorter_side() -> None:
    forget, retain = forget_rows(a=6), retain_rows({"a": 4})
    pairs = epoch("modular", forget, retain)
    assert len(pairs) == 6
    assert {f for f, _ in pairs} == set(range(6))
    assert {kept for _, kept in pairs} == set(range(4))


def test_modular_with_one_subject_is_cyclic() -> None:
    forget, retain = forget_rows(a=4), retain_rows({"a": 9})
    modular = epoch({"name": "modular", "redraw": False}, forget, retain)
    assert sorted(modular) == sorted(epoch({"name": "cyclic", "redraw": False}, forget, retain))


def test_modular_general_rows_meet_any_forget_row() -> None:
    forget, retain = forget_rows(a=2, b=2), retain_rows({"a": 1, "b": 1}, general=1)
    partners = {
        next(f for f, r in epoch("modular", forget, retain, number) if r == 2)
        for number in range(40)
    }
    assert partners == {0, 1, 2, 3}


def test_modular_drops_no_row() -> None:
    # "b" has no neighbours, "x" no forget rows, the last forget row no subject
    forget = [*forget_rows(a=2, b=3), make_row(5)]
    retain = retain_rows({"a": 2, "x": 3}, general=1)
    pairs = epoch("modular", forget, retain)
    assert {f for f, _ in pairs} == set(range(6))
    assert {r for _, r in pairs} == set(range(6))
    assert len(pairs) == 2 + 4 + 4


def test_modular_restricts_kinds() -> None:
    pairs = epoch({"name": "modular", "kinds": ["direct"]}, FORGET, RETAIN)
    assert {RETAIN[kept].kind for _, kept in pairs if kept is not None} == {"direct"}


@pytest.mark.parametrize(
    ("forget", "retain", "problem"),
    [
        (FORGET, [], "no retain record is a neighbour"),
        (FORGET, retain_rows({}, {None: 3}, general=2), "no retain record is a neighbour"),
        (FORGET, retain_rows({"x": 3}), "no retain record is a neighbour"),
        ([make_row(0)], RETAIN, "no forget record has a 'subject'"),
    ],
)
def test_modular_says_what_to_give(forget: list[Row], retain: list[Row], problem: str) -> None:
    with pytest.raises(RecipeError, match=problem) as caught:
        epoch("modular", forget, retain)
    assert "'neighbour_of'" in str(caught.value)


def test_global_random_numbers_are_left_alone() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    for sample in ALL:
        epoch(sample, FORGET, RETAIN)
    assert torch.equal(torch.get_rng_state(), state)
