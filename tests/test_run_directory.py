"""A run folder has one writer, and a killed one blocks nobody."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from delible.errors import RunError
from delible.rundir import LOCK, RunDirectory

RUN = {"command": "test", "seed": 0}
#: Begins the run, says so, and stays until it is killed.
HOLDER = """
import sys, time
from delible import rundir
rundir.hardware = dict
run = rundir.RunDirectory(sys.argv[1])
run.begin({"command": "test", "seed": 0})
run.event("step", number=1)
print("begun", flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("delible.rundir.hardware", dict)


def holder(path: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)],
        env=environment, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


def test_a_second_writer_is_told_and_writes_nothing_until_the_first_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "run"
    first = holder(path)
    try:
        before = {file.name: file.read_bytes() for file in path.iterdir()}
        for second in (RunDirectory(path).begin, RunDirectory(path).locked().__enter__):
            with pytest.raises(RunError, match="another process is writing this run") as error:
                second(RUN) if second.__name__ == "begin" else second()
            assert error.value.where == str(path)
        assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    (path / ".model.abcdefgh.unfinished").mkdir()
    (path / "data").mkdir()
    (path / "data" / ".forget.jsonl.1.unfinished").write_text("half")
    run = RunDirectory(path)
    assert run.begin(RUN) is False
    assert len(run.manifest["resumed"]) == 1
    run.finish()
    run.release()
    assert sorted(file.name for file in path.iterdir()) == ["data", "events.jsonl", "manifest.json"]
    assert list((path / "data").iterdir()) == []


def test_a_finished_run_needs_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "run"
    run = RunDirectory(path)
    run.begin(RUN)
    run.finish()
    run.release()
    assert RunDirectory(path).begin(RUN) is True
    assert not (path / LOCK).exists()


def test_the_same_process_may_start_again_what_failed(tmp_path: Path) -> None:
    failed = RunDirectory(tmp_path / "run")
    failed.begin(RUN)
    again = RunDirectory(tmp_path / "run")
    assert again.begin(RUN) is False
    again.finish()
    again.release()
    assert not (tmp_path / "run" / LOCK).exists()


def test_the_folder_of_another_run_is_left_alone(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.begin(RUN)
    run.finish()
    run.release()
    before = sorted(file.name for file in run.path.iterdir())
    with pytest.raises(RunError, match=r"another run \(different: seed\)"):
        RunDirectory(run.path).begin({**RUN, "seed": 1})
    assert sorted(file.name for file in run.path.iterdir()) == before


def test_whoever_writes_into_a_finished_run_clears_it_too(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.begin(RUN)
    run.finish()
    run.release()
    left = run.path / ".metrics.json.abc.unfinished"
    left.touch()
    with RunDirectory(run.path).locked():
        assert not left.exists()
    assert not (run.path / LOCK).exists()


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(RunError, match="not a run directory"):
            RunDirectory(path).begin(RUN)
        with pytest.raises(RunError, match="not a run directory"):
            RunDirectory(path).lock()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "notes.txt"]


def test_a_start_that_was_killed_at_once_can_be_started_again(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.mkdir()
    (path / LOCK).touch()
    (path / ".manifest.json.abc.unfinished").write_text("{")
    assert RunDirectory(path).begin(RUN) is False
    assert not list(path.glob("*.unfinished"))


def test_other_processes_of_one_training_do_not_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = holder(tmp_path / "run")
    try:
        monkeypatch.setenv("RANK", "1")
        assert RunDirectory(tmp_path / "run").begin(RUN) is False
    finally:
        first.kill()
        first.wait()
