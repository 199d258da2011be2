"""The walks of the four doors do, and print, what their pages say."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

import walk_model
from delible import precision
from delible.gateway.telling import access
from delible.lm import embedded
from walks import DOCS, Command, Walk, commands, masked, missing, walking

#: The page of each door.
DOORS = {
    "owner": "ledger.md", "researcher": "researching.md", "red team": "reading-an-audit.md",
    "operator": "gateway.md",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def in_fp32() -> Iterator[None]:
    """Toys answer otherwise in bf16, which some CPUs compute in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "has_matrix_units", lambda: False)
        yield


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("walks") / "default"
    walk_model.make(folder)
    return folder


@pytest.fixture
def walk(default: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Walk]:
    for name in ("LINES", "FORCE_COLOR", "TTY_COMPATIBLE", "KEY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "DELIBLE_LEDGER": str(tmp_path / "ledger.sqlite"), "COLUMNS": "200",
        "DELIBLE_CACHE": str(default.parent / "cache"), "HF_HUB_OFFLINE": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(embedded, "default_model", lambda: default)
    monkeypatch.chdir(tmp_path)
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]

    kept = access.handlers[:], access.propagate, access.level
    with walking(tmp_path, port, walk_model.STAND_INS) as made:
        yield made
    access.handlers[:], access.propagate = kept[:2]
    access.setLevel(kept[2])


@pytest.mark.parametrize("door", DOORS)
def test_the_walk_of_a_door(door: str, walk: Walk) -> None:
    if door == "owner":
        pytest.importorskip("cryptography")
    if door in ("operator", "red team"):
        pytest.importorskip("fastapi")
    walk.go(DOCS / DOORS[door])


def test_the_first_page_leads_to_every_walk() -> None:
    page = (DOCS / "index.md").read_text("utf-8")
    parts = page.split("\n## ")[1:]
    assert len(parts) == len(DOORS)
    for part, name in zip(parts, DOORS.values(), strict=True):
        assert f"({name}#a-walk)" in part


# ---- the executor itself

PAGE = """# Page

```console
$ not of the walk
```

## A walk

Words.

```console
$ cat a.csv
one,2

$ ls
a.csv
$ delible list metrix  # exit code 2
error: … Did you mean …
$ delible \\
  list '
  '
```

## Later

```console
$ nor this
```
"""


@pytest.fixture
def page(tmp_path: Path) -> Path:
    place = tmp_path / "page.md"
    place.write_text(PAGE, "utf-8")
    return place


def test_commands_of_a_walk_alone(page: Path) -> None:
    assert commands(page) == [
        Command(12, "cat a.csv", ("one,2",), 0),
        Command(15, "ls", ("a.csv",), 0),
        Command(17, "delible list metrix  # exit code 2", ("error: … Did you mean …",), 2),
        Command(19, "delible \\\n  list '\n  '", (), 0),
    ]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("Did you", "Have you", "does not print: error: … Have you mean …"),
        ("# exit code 2", "", "exit code 2"),
        ("$ ls\na.csv", "$ ls\nb.csv", "does not print: b.csv"),
    ],
)
def test_a_page_that_drifts_is_found(
    old: str, new: str, told: str, page: Path, walk: Walk, tmp_path: Path
) -> None:
    plain = PAGE.replace("$ delible \\\n  list '\n  '\n", "")
    assert old in plain
    page.write_text(plain, "utf-8")
    walk.go(page)
    page.write_text(plain.replace(old, new), "utf-8")
    with pytest.raises(AssertionError, match=told):
        walk.go(page)


def test_lines_are_looked_for_in_order() -> None:
    out = "a  1\nb 22\n\nc 3 and more"
    assert masked(" a  12 b") == "a 0 b"
    assert missing(["a 9", "…", "c 7 and …"], out) is None
    assert missing(["b 1", "a 1"], out) == "a 1"
    assert missing(["b 1", "b 1"], out) == "b 1", "one line is printed once"
    assert missing(["c 7 and"], out) == "c 7 and", "a part of a line is not the line"
    assert missing([], "") is None
