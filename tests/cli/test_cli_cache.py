"""``delible cache``: what it lists and what it removes, in the words that people read."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from runs_of_commands import Run


@pytest.fixture
def home(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DELIBLE_CACHE", str(here / "cache"))
    monkeypatch.delenv("DELIBLE_CACHE_SIZE", raising=False)
    for name, size, days in (
        ("learned/target-1", 3_000_000, 40), ("learned/reference-1", 500_000, 1),
        ("tune/x", 20, 0), ("of a plugin/y", 7, 2),
    ):  # fmt: skip
        path = here / "cache" / name
        path.mkdir(parents=True)
        (path / "content").write_bytes(b"x" * size)
        then = time.time() - days * 86_400 - 60
        os.utime(path, (then, then))
    return here / "cache"


def test_it_lists_collections(run: Run, home: Path) -> None:
    ran = run("cache")
    assert (ran.code, ran.err) == (0, "")
    rows = [" ".join(line.split()) for line in ran.out.splitlines()]
    assert "learned 2 3.5 MB yesterday models that benchmarks taught training" in rows
    assert "of a plugin 1 7 bytes 2 days ago - -" in rows
    assert "tune 1 20 bytes today options that searches found searching" in rows
    assert f"{home}: 4 entries, 3.5 MB; the whole cache holds at most 20.0 GB" in ran.out
    assert run("cache", "list").out == ran.out
    only = run("cache", "size", "--collection", "tune")
    assert only.out.startswith(f"{home}: 1 entry, 20 bytes;")
    assert "training" not in only.out


def test_it_clears_and_tells_what_went(run: Run, home: Path) -> None:
    ran = run("cache", "clear", "--collection", "learned", "--older-than", "30")
    assert ran.out == "Removed: 1 entry, 3.0 MB.\n  learned/target-1 (3.0 MB)\n"
    assert [path.name for path in (home / "learned").iterdir()] == ["reference-1"]
    assert run("cache", "clear", "--older-than", "30").out == "There is nothing to remove.\n"
    assert "Removed: 3 entries" in run("cache", "clear").out
    assert f"{home}: 0 entries, 0 bytes" in run("cache").out


def test_what_is_in_use_is_told(run: Run, home: Path) -> None:
    from delible import kept

    kept.use(home / "tune" / "x")
    ran = run("cache", "clear", "--collection", "tune")
    assert ran.out == (
        "Left, because it is in use or may not be removed: 1 entry, 20 bytes.\n"
        "  tune/x (20 bytes)\n"
    )
    assert (home / "tune" / "x").is_dir()


def test_many_are_counted(run: Run, home: Path) -> None:
    for number in range(15):
        (home / "statistics" / str(number)).mkdir(parents=True)
    out = run("cache", "clear", "--collection", "statistics").out
    assert "Removed: 15 entries" in out
    assert out.count("statistics/") == 10
    assert out.endswith("  and 5 more\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--collection", "lerned"), "Did you mean 'learned'?"),
        (("list", "--older-than", "3"), "clear --older-than DAYS"),
        (("clear", "--older-than", "-1"), "0 or more days"),
        (("clean",), "clear"),
    ],
)
def test_wrong_words_are_told(run: Run, home: Path, words: tuple[str, ...], said: str) -> None:
    ran = run("cache", *words)
    assert ran.code == 2
    assert said in ran.err
    assert len(list(home.rglob("content"))) == 4


def test_a_wrong_size_is_told(run: Run, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELIBLE_CACHE_SIZE", "20")
    ran = run("cache")
    assert ran.code == 2
    assert "DELIBLE_CACHE_SIZE: '20' is no size. Write a number and a unit" in ran.err
