"""Kept folders carry hashes: what has changed since is noticed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from delible import kept
from delible.kept import hashes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "inner").mkdir(parents=True)
    save_file({"w": np.arange(50, dtype=np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "inner" / "words.txt").write_text("a b c")
    return folder


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "inner/words.txt"])
@pytest.mark.parametrize(
    ("change", "words"),
    [(flip, "has other content"), (shorten, "bytes, not"), (Path.unlink, "cannot be read")],
)
def test_every_change_of_a_sealed_folder_is_noticed(
    folder: Path, name: str, change: Callable[[Path], None], words: str
) -> None:
    kept.seal(folder)
    assert kept.damage(folder) is None
    change(folder / name)
    found = kept.damage(folder)
    assert found is not None
    assert found.startswith(name)
    assert words in found


@pytest.mark.parametrize("content", ["", "{", "[]", '{"config.json": 3}', '{"a": {"bytes": 1}}'])
def test_hashes_that_cannot_be_read_are_damage(folder: Path, content: str) -> None:
    (folder / kept.HASHES).write_text(content)
    assert kept.damage(folder) == "hashes.json cannot be read"


def test_a_folder_of_an_earlier_version_is_sealed_if_it_is_whole(folder: Path) -> None:
    assert kept.damage(folder) is None
    assert set(json.loads((folder / kept.HASHES).read_text())) == {
        "model.safetensors", "config.json", "inner/words.txt",
    }  # fmt: skip
    flip(folder / "model.safetensors")
    assert kept.damage(folder) == "model.safetensors has other content"


def test_a_broken_folder_of_an_earlier_version_is_not_sealed(folder: Path, tmp_path: Path) -> None:
    shorten(folder / "model.safetensors")
    assert "model.safetensors cannot be read" in str(kept.damage(folder))
    assert not (folder / kept.HASHES).exists()
    (tmp_path / "empty").mkdir()
    assert kept.damage(tmp_path / "empty") == "it holds no files"
    assert kept.damage(tmp_path / "missing") == "it holds no files"


def test_files_are_read_once_per_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept.seal(folder)
    read: list[str] = []
    real = hashes._sha256
    monkeypatch.setattr(hashes, "_sha256", lambda path: [read.append(path.name), real(path)][1])
    for _ in range(3):
        assert kept.damage(folder) is None
    assert sorted(read) == ["config.json", "model.safetensors", "words.txt"]
