"""What machines can take, whether they run the same, and what is lost with one: without Ray."""

from __future__ import annotations

import pytest

from delible.errors import RunError
from delible.spread.machines import (
    Machine,
    Share,
    Tries,
    check_same,
    check_shared,
    share_of,
)

HEAD = Machine("10.0.0.1", cpus=8)
NODE = Machine("10.0.0.2", cpus=64, gpus=8)
SMALL = Machine("10.0.0.3", cpus=6, gpus=2)


@pytest.mark.parametrize(
    ("machines", "cpus", "share", "at_once"),
    [
        ([HEAD], None, Share(4, 0), 2),
        ([HEAD, Machine("b", 2)], None, Share(2, 0), 5),  # 8 / 2 and 2 / 2
        ([HEAD], 3, Share(3, 0), 2),
        ([Machine("b", 0), HEAD], None, Share(4, 0), 2),  # one that takes no work
        # one GPU each; where there are GPUs, machines without one take nothing
        ([HEAD, NODE], None, Share(8, 1), 8),
        ([NODE, SMALL], None, Share(3, 1), 10),
        ([NODE, SMALL], 16, Share(16, 1), 4),
        ([Machine("b", 0, 4)], None, Share(0, 1), 4),  # its CPUs were not given to Ray
    ],
)
def test_what_a_piece_takes(
    machines: list[Machine], cpus: int | None, share: Share, at_once: int
) -> None:
    assert share_of(machines, cpus) == share
    assert share.at_once(machines) == at_once


def test_what_a_piece_takes_is_told() -> None:
    assert str(Share(1, 0)) == "1 CPU"
    assert str(Share(8, 1)) == "1 GPU and 8 CPUs"


@pytest.mark.parametrize("machines", [[], [HEAD, NODE]])
def test_a_piece_that_fits_nowhere_is_refused(machines: list[Machine]) -> None:
    with pytest.raises(RunError, match="no machine of the cluster can take") as caught:
        share_of(machines, 65)
    assert "10.0.0.2: 64 CPUs, 8 GPUs" in str(caught.value) or not machines


def test_machines_that_run_something_else_are_refused_by_name() -> None:
    mine = {"python": "3.12.1", "torch": "2.13.0", "delible": "1.0"}
    check_same(mine, {"a": dict(mine), "b": dict(mine)})
    check_same(mine, {})
    with pytest.raises(RunError) as caught:
        check_same(
            mine,
            {
                "a": dict(mine),
                "b": {**mine, "torch": "2.12.0", "peft": "0.1"},
                "c": {"python": "3.12.1", "torch": "2.12.1"},
            },
        )
    said = str(caught.value)
    assert "torch is 2.13.0 here, 2.12.0 on b, 2.12.1 on c" in said
    assert "delible is 1.0 here, none on c" in said
    assert "peft is none here, 0.1 on b" in said
    assert "python" not in said.partition("Numbers")[0]
    assert " on a" not in said.partition("Numbers")[0]


def test_machines_that_do_not_see_a_folder_are_refused_by_name() -> None:
    check_shared({"a": [], "b": []})
    with pytest.raises(RunError, match=r"b does not see /out, /cache\. Results"):
        check_shared({"a": [], "b": ["/out", "/cache"]})


def test_a_piece_is_lost_a_few_times_only() -> None:
    tries = Tries(most=3)
    for key in ((0, 0), (1, 0)):
        tries.begin(key)
    for _ in range(2):
        tries.lost((0, 0), "its machine died")
        tries.begin((0, 0))
    tries.lost((1, 0), "its machine died")  # counted by piece
    with pytest.raises(RunError, match=r"lost 3 times .* its memory ran out") as caught:
        tries.lost((0, 0), "its memory ran out")
    assert "--cpus" in str(caught.value)
