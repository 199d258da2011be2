"""The store of what is made once: by one process, whole after any kill, within a bound."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from delible import kept
from delible.errors import ModelError, RunError
from delible.kept import store, upkeep
from delible.kept.places import entry_of
from delible.kept.using import used_now
from delible.measure.cache import Cache
from delible.system.asks import Decoding, Generate, Prompt


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "cache"
    monkeypatch.setenv("DELIBLE_CACHE", str(home))
    monkeypatch.delenv("DELIBLE_CACHE_SIZE", raising=False)
    store._say_once.cache_clear()
    return home


def started(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A process of its own; it prints one line when it is in the middle of its work."""
    prelude = "import sys, time\nfrom pathlib import Path\nfrom delible import kept\n"
    return subprocess.Popen(
        [sys.executable, "-c", prelude + code, *map(str, arguments)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def killed(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


def put(home: Path, name: str, size: int, days: float) -> Path:
    """An entry of so many bytes, last used so many days ago."""
    path = home / name
    path.mkdir(parents=True)
    (path / "content").write_bytes(b"x" * size)
    then = time.time() - days * 86_400
    os.utime(path, (then, then))
    return path


def left(home: Path) -> list[str]:
    return sorted(one.path.relative_to(home).as_posix() for one in upkeep.entries())


def never(*_: object) -> Any:
    raise AssertionError("made again")


# ---- made once


def test_two_processes_at_once_make_it_once(tmp_path: Path) -> None:
    code = """
def make():
    with Path(sys.argv[1]).open("a") as made:
        made.write("made\\n")
    time.sleep(0.5)
    return {"value": 7}
print(kept.cell(kept.place("tune", {"x": 1}, ending=".json"), make)["value"])
"""
    both = [started(code, tmp_path / "made") for _ in range(2)]
    assert [process.communicate()[0] for process in both] == ["7\n", "7\n"]
    assert (tmp_path / "made").read_text() == "made\n"
    assert [one.suffix for one in (tmp_path / "cache" / "tune").iterdir()] == [".json"]


def test_a_second_process_says_that_it_waits(caplog: pytest.LogCaptureFixture, home: Path) -> None:
    code = """
with kept.alone(kept.cache_folder() / "tune" / "x"):
    print("in", flush=True)
    time.sleep(0.3)
"""
    first = started(code)
    assert first.stdout is not None
    first.stdout.readline()
    with kept.alone(home / "tune" / "x"):
        assert first.wait(5) == 0
    assert caplog.messages == ["Another process makes or uses x just now: waiting for it."]
    first.stdout.close()


def test_a_cell_is_made_once_and_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    path = tmp_path / "out" / "cells" / "a.json"
    told: list[str] = []
    made = kept.cell(path, lambda: {"steps": (1, 2), "by": {3: None}}, lambda: told.append("kept"))
    assert made == {"steps": [1, 2], "by": {"3": None}} == kept.cell(path, never, never)
    assert told == ["kept"]
    assert [one.name for one in path.parent.iterdir()] == ["a.json"]  # no lock is left
    assert kept.cell(None, lambda: {"a": 1}, never) == {"a": 1}


def test_a_failed_cell_is_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert kept.cell(path, lambda: {"failed": "so"}, never) == {"failed": "so"}
    with pytest.raises(RunError):
        kept.cell(path, lambda: (_ for _ in ()).throw(RunError("no")))
    assert list(tmp_path.iterdir()) == []
    assert kept.cell(path, lambda: {"done": 1}) == {"done": 1}


@pytest.mark.parametrize("content", ["", '{"a": ', "[3]", "7", "\udcff"])
def test_a_broken_cell_is_made_anew_and_said(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, content: str
) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    assert kept.cell(path, lambda: {"a": 1}) == {"a": 1} == kept.cell(path, never)
    (said,) = caplog.messages
    assert said.startswith(f"{path} cannot be read")
    assert said.endswith("it is made anew.")


# ---- killed


def test_a_kill_in_the_middle_leaves_nothing_half(home: Path) -> None:
    code = """
path = kept.place("tune", {"x": 1}, ending=".json")
def make():
    (path.parent / f".{path.name}.abc.unfinished").write_text("{")
    print("in", flush=True)
    time.sleep(60)
kept.cell(path, make)
"""
    killed(started(code))
    assert left(home) == []
    path = kept.place("tune", {"x": 1}, ending=".json")
    assert kept.cell(path, lambda: {"value": 7}) == {"value": 7}


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_killed_folder_is_made_again_and_its_work_goes_on_if_it_can(
    home: Path, goes_on: bool
) -> None:
    code = """
def make(work):
    (work / "half").write_text("x")
    print("in", flush=True)
    time.sleep(60)
kept.folder(kept.cache_folder() / "models" / "m", make, space="1 GB", goes_on=sys.argv[1] == "True")
"""
    killed(started(code, goes_on))
    assert not (home / "models" / "m").exists()
    seen: list[bool] = []

    def make(work: Path) -> Path:
        seen.append((work / "half").exists())
        (work / "result").mkdir()
        (work / "result" / "config.json").write_text("{}")
        return work / "result"

    folder = kept.folder(home / "models" / "m", make, space="1 GB", goes_on=goes_on)
    assert seen == [goes_on]
    assert kept.damage(folder) is None
    assert [one.name for one in (home / "models").iterdir()] == ["m"]
    assert kept.folder(folder, never, space="1 GB") == folder


def test_a_failed_folder_leaves_nothing(home: Path) -> None:
    def make(work: Path) -> Path:
        (work / "half").write_text("x")
        raise ModelError("no")

    with pytest.raises(ModelError, match="no"):
        kept.folder(home / "models" / "m", make, space="1 GB")
    assert list((home / "models").iterdir()) == []


# ---- a cache that cannot be written


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    class ReadOnly:
        def __init__(self, path: Path) -> None: ...

        def acquire(self, timeout: float = -1) -> None:
            raise OSError(errno.EROFS, "Read-only file system")

    return lambda: monkeypatch.setattr(store, "FileLock", ReadOnly)


def test_a_cache_that_cannot_be_written_says_so_once_and_goes_on(
    caplog: pytest.LogCaptureFixture, home: Path, read_only: Callable[[], None]
) -> None:
    path = kept.place("tune", {"x": 1}, ending=".json")
    kept.cell(path, lambda: {"a": 1})
    read_only()
    assert kept.cell(path, never) == kept.cell(path, never) == {"a": 1}
    with kept.alone(home / "corpora" / "x", required=False) as writes:
        assert not writes
    assert caplog.messages == [
        f"{home} cannot be written (Read-only file system): what is there is used, nothing new is "
        "kept."
    ]
    with pytest.raises(RunError, match="read-only"), kept.alone(home / "corpora" / "x"):
        never()


def test_a_file_where_the_cache_should_be(home: Path, tmp_path: Path) -> None:
    home.write_text("")
    with pytest.raises(RunError, match="file"):
        kept.cell(kept.place("tune", {}), never)
    with pytest.raises(ModelError, match=r"cannot write the cache.*DELIBLE_CACHE"):
        kept.folder(home / "models" / "m", never, space="1 GB")
    with pytest.raises(RunError, match="in the way"):
        kept.cell(home / "a.json", never)


# ---- the layout


def test_entries_of_earlier_versions_are_found_by_the_same_names(home: Path) -> None:
    described = {"model": "tiny", "seed": 0}
    key = "8770c5c115236d20"  # SHA-256 of its JSON, as ever
    assert kept.place("tune", described) == home / "tune" / key
    assert kept.place("requests", described, ending=".json") == home / "requests" / f"{key}.json"
    assert (
        kept.place("learned", described, title="target", digits=12)
        == home / "learned" / f"target-{key[:12]}"
    )
    assert kept.place("attacks", described).parent == home / "answers" / "attacks"


def test_an_entry_is_what_lies_in_a_collection(home: Path, tmp_path: Path) -> None:
    for path, entry in {
        "learned/target-1/model/config.json": "learned/target-1",
        "learned/target-1": "learned/target-1",
        "answers/abc/answers-1.parquet": "answers/abc",
        "answers/attacks/k.json": "answers/attacks/k.json",
        "roles/judge/abc/x": "roles/judge/abc",
        "of a plugin/thing/x": "of a plugin/thing",
    }.items():
        assert entry_of(home / path) == home / entry
    for path in ("learned", "roles/judge", "answers/attacks", "wheels/a.whl", "."):
        assert entry_of(home / path) is None
    assert entry_of(tmp_path / "out" / "cells" / "a.json") is None


def test_what_lies_there_is_listed_with_size_and_time(home: Path) -> None:
    put(home, "learned/target-1", 10, days=3)
    put(home, "roles/judge/abc", 20, days=2)
    put(home, "answers/abc", 30, days=5)
    put(home, "of a plugin/thing", 40, days=1)
    (home / "answers" / "attacks").mkdir()
    (home / "answers" / "attacks" / "k.json").write_text("{}")
    (home / "wheels").mkdir()
    (home / "wheels" / "a.whl").write_text("mine")
    (home / "learned" / "target-1.lock").touch()  # of an earlier version
    found = upkeep.entries()
    assert [(one.collection, one.path.name, one.bytes) for one in found] == [
        ("answers", "abc", 30), ("learned", "target-1", 10), ("roles", "abc", 20),
        ("of a plugin", "thing", 40), ("attacks", "k.json", 2),
    ]  # fmt: skip
    assert [round((time.time() - one.used) / 86_400) for one in found] == [5, 3, 2, 1, 0]
    assert [one.path.name for one in upkeep.entries("roles")] == ["abc"]


# ---- the bound


def test_what_was_not_used_for_the_longest_goes_first_and_models_last(
    caplog: pytest.LogCaptureFixture, home: Path
) -> None:
    put(home, "models/old", 100, days=9)
    put(home, "learned/b", 100, days=3)
    put(home, "answers/c", 100, days=5)
    put(home, "tune/d", 100, days=1)
    assert upkeep.keep_within(400) == []
    assert caplog.messages == []
    upkeep.keep_within(399)
    assert left(home) == ["learned/b", "models/old", "tune/d"]
    upkeep.keep_within(150)
    assert left(home) == ["models/old"]
    assert "The cache held 300 bytes, more than 150 bytes" in caplog.messages[-1]
    assert "(learned/b, tune/d)" in caplog.messages[-1]
    upkeep.keep_within(99)
    assert left(home) == []


def test_a_new_entry_keeps_the_cache_within_its_bound(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(home, "learned/b", 900, days=3)
    monkeypatch.setenv("DELIBLE_CACHE_SIZE", "1KB")
    kept.cell(home / "tune" / "a.json", lambda: {"a": "x" * 200})
    assert left(home) == ["tune/a.json"]  # just made, so in use
    put(home, "learned/b", 900, days=3)
    request = Generate(Prompt.ask("Who?"), Decoding(4))
    Cache(home / "answers").write("weights", {request: "Ada"})
    assert {one.collection for one in upkeep.entries()} == {"tune", "answers"}
    kept.cell(home.parent / "out" / "a.json", lambda: {"a": "x" * 2000})  # not of the cache
    assert (home.parent / "out" / "a.json").exists()


def test_use_counts_as_use(home: Path) -> None:
    put(home, "learned/a", 100, days=9)
    put(home, "learned/b", 100, days=3)
    kept.use(home / "learned" / "a" / "model")
    assert [one.path.name for one in upkeep.entries()] == ["b", "a"]
    (home / "answers" / "x").mkdir(parents=True)
    os.utime(home / "answers" / "x", (0, 0))
    cache = Cache(home / "answers")
    cache.folder_of = lambda _: home / "answers" / "x"  # type: ignore[method-assign]
    cache.read("weights", [])
    assert upkeep.entries()[0].path.name == "b"


def test_what_a_living_process_uses_stays_until_it_ends(home: Path) -> None:
    put(home, "learned/a", 100, days=9)
    put(home, "learned/b", 100, days=3)
    code = """
kept.use(kept.cache_folder() / "learned" / "a" / "model")
print("in", flush=True)
time.sleep(60)
"""
    process = started(code)
    assert process.stdout is not None
    process.stdout.readline()
    assert used_now(home) == {"learned/a"}
    assert [one.path.name for one in upkeep.keep_within(0)] == ["b"]
    gone, stayed = upkeep.clear()
    assert (gone, [one.path.name for one in stayed]) == ([], ["a"])
    process.kill()
    process.wait()
    process.stdout.close()
    assert [one.path.name for one in upkeep.keep_within(0)] == ["a"]
    assert list((home / ".using").iterdir()) == []


def test_what_is_being_made_stays(home: Path) -> None:
    put(home, "learned/a", 100, days=9)
    with store.FileLock(home / "learned" / ".a.lock"):
        assert upkeep.clear()[0] == []
    assert [one.path.name for one in upkeep.clear()[0]] == ["a"]


@pytest.mark.parametrize(
    ("given", "size"),
    [("500MB", 500e6), ("1.5 TB", 1.5e12), ("2k", 2e3), ("7gb", 7e9), ("", 20e9), (" ", 20e9)],
)
def test_sizes(monkeypatch: pytest.MonkeyPatch, given: str, size: float) -> None:
    monkeypatch.setenv("DELIBLE_CACHE_SIZE", given)
    assert upkeep.size_bound() == int(size)


@pytest.mark.parametrize("given", ["20", "much", "-1GB", "1 PB", "1e3MB"])
def test_a_wrong_size_is_told_before_the_work(
    monkeypatch: pytest.MonkeyPatch, home: Path, given: str
) -> None:
    monkeypatch.setenv("DELIBLE_CACHE_SIZE", given)
    with pytest.raises(RunError, match=r"no size.*500MB"):
        kept.cell(home / "tune" / "a.json", never)


def test_sizes_in_words() -> None:
    assert [upkeep.in_words(size) for size in (0, 999, 1_500, 2 * 10**6, 20 * 10**9, 10**12)] == [
        "0 bytes", "999 bytes", "1.5 kB", "2.0 MB", "20.0 GB", "1.0 TB",
    ]  # fmt: skip


# ---- clearing


def test_clearing_by_collection_and_age(home: Path) -> None:
    for name, days in {"learned/a": 9, "learned/b": 3, "tune/c": 9}.items():
        put(home, name, 10, days)
    (home / "wheels").mkdir()
    (home / "wheels" / "a.whl").write_text("mine")
    assert [one.path.name for one in upkeep.clear("learned", older_than=5)[0]] == ["a"]
    assert left(home) == ["learned/b", "tune/c"]
    assert [one.path.name for one in upkeep.clear(older_than=5)[0]] == ["c"]
    assert [one.path.name for one in upkeep.clear()[0]] == ["b"]
    assert (home / "wheels" / "a.whl").exists()


def test_what_killed_processes_left_goes_when_it_is_old(home: Path) -> None:
    old = time.time() - 2 * upkeep.ABANDONED_SECONDS
    names: Mapping[str, bool] = {
        "models/.m.building": True, "tune/.a.json.x.unfinished": True, "tune/.b.unfinished": False,
        "roles/judge/.r.unfinished": True, "learned/.t.123.removed": False,
    }  # fmt: skip
    for name, is_old in names.items():
        path = put(home, name, 1, days=0)
        if is_old:
            os.utime(path, (old, old))
    upkeep.keep_within()
    assert [one.relative_to(home).as_posix() for one in home.glob("**/.*") if one.is_dir()] == [
        "tune/.b.unfinished"
    ]


def test_a_removal_that_was_killed_is_no_entry(home: Path) -> None:
    put(home, "learned/.t.123.removed", 5, days=0)
    assert upkeep.entries() == []
    upkeep.clear()
    assert list((home / "learned").iterdir()) == []
