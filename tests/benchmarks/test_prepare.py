"""Models that are taught once and kept: found again, and taught anew when they are damaged."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from delible.bench.prepare import learned
from delible.errors import RunError
from delible.kept import store
from delible.records import QA
from delible.testing.tiny import tiny_model, tiny_tokenizer

RECORDS = tuple(QA(question=f"Who is {name}?", answer=f"{name} sings.") for name in ("Ada", "Bo"))
OPTIONS = {"max_steps": 1, "batch_size": 2}


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("DELIBLE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "start"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def teach(start: str) -> tuple[Path, list[Any]]:
    """The folder and the steps that were trained."""
    steps = list[Any]()
    folder = learned(
        start, RECORDS, options=OPTIONS,
        progress=lambda step, total, numbers: steps.append(step),
    )  # fmt: skip
    return folder, steps


def test_a_taught_model_is_kept_until_it_is_damaged(
    caplog: pytest.LogCaptureFixture, start: str
) -> None:
    folder, steps = teach(start)
    assert steps == [1]
    whole = (folder / "model.safetensors").read_bytes()
    assert (folder / "hashes.json").is_file()
    again, steps = teach(start)
    assert (again, steps) == (folder, [])
    assert caplog.messages[-1].startswith("target taken from the cache")
    for damaged in (whole[:-5], whole[:-1] + bytes([whole[-1] ^ 1])):
        (folder / "model.safetensors").write_bytes(damaged)
        caplog.clear()
        again, steps = teach(start)
        assert (again, steps) == (folder, [1])
        assert "target in the cache is damaged (model.safetensors has" in caplog.messages[0]
        assert (folder / "model.safetensors").read_bytes() == whole


def test_a_model_that_an_earlier_version_taught_is_found(start: str) -> None:
    folder, _ = teach(start)
    (folder / "hashes.json").unlink()
    folder.parent.with_suffix(".lock").touch()
    assert teach(start) == (folder, [])
    assert (folder / "hashes.json").is_file()


def test_what_an_earlier_version_described_otherwise_is_learned_anew(
    caplog: pytest.LogCaptureFixture, start: str
) -> None:
    folder, _ = teach(start)
    manifest = folder.parent / "manifest.json"
    content = json.loads(manifest.read_text())
    content["run"]["model_fingerprint"] = content["identity"] = "of an earlier version"
    manifest.write_text(json.dumps(content))
    again, steps = teach(start)
    assert (again, steps) == (folder, [1])
    assert "target in the cache is of an earlier version" in caplog.text
    again, steps = teach(start)
    assert (again, steps) == (folder, [])


def test_a_cache_that_cannot_be_written_gives_what_it_has(
    start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class ReadOnly:
        def __init__(self, path: Path) -> None:
            pass

        def acquire(self, timeout: float = -1) -> None:
            raise OSError(errno.EROFS, "Read-only file system")

        def release(self) -> None:
            pass

    monkeypatch.setattr(store, "FileLock", ReadOnly)
    with pytest.raises(RunError, match="read-only"):
        teach(start)
    monkeypatch.undo()
    monkeypatch.setenv("DELIBLE_CACHE", str(Path(start).parent / "cache"))
    folder, _ = teach(start)
    monkeypatch.setattr(store, "FileLock", ReadOnly)
    assert teach(start)[0] == folder
