"""What is released: wheel and sdist hold what they should, and are the same bytes twice."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def built(folder: Path) -> dict[str, Path]:
    """Wheel and sdist, built without an environment of its own (nor a network)."""
    pytest.importorskip("hatchling", reason="hatchling is not installed")
    environment = {**os.environ, "SOURCE_DATE_EPOCH": "1767225600"}
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(folder)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {path.suffix: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return built(tmp_path_factory.mktemp("first"))


def test_the_same_bytes_twice(first: dict[str, Path], tmp_path: Path) -> None:
    def hashes(found: dict[str, Path]) -> dict[str, str]:
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in found.values()}

    assert hashes(first) == hashes(built(tmp_path))
    assert set(first) == {".whl", ".gz"}


def test_the_wheel_holds_the_library_with_its_data_and_nothing_else(
    first: dict[str, Path],
) -> None:
    with zipfile.ZipFile(first[".whl"]) as wheel:
        names = wheel.namelist()
    source = ROOT / "src"
    wanted = {
        str(path.relative_to(source).as_posix())
        for path in (source / "delible").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    information = f"delible-{PROJECT['version']}.dist-info/"
    assert {name for name in names if not name.startswith(information)} == wanted
    assert f"{information}licenses/LICENSE" in names
    assert "delible/py.typed" in names
    assert any(name.endswith(".yaml") for name in names), "recipes"


def test_the_sdist_is_enough_to_build_and_test_and_holds_nothing_private(
    first: dict[str, Path],
) -> None:
    with tarfile.open(first[".gz"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for one in ("pyproject.toml", "LICENSE", "README.md", "Makefile", "tests/conftest.py",
                "docs/ledger.md", "CITATION.cff", "src/delible/__init__.py"):  # fmt: skip
        assert one in names, one
    ignored = ("build/", "dist/", "runs/", ".venv", ".git/", ".hypothesis", ".mypy_cache")
    assert not [name for name in names if name.startswith(ignored) or "__pycache__" in name]


def test_the_citation_is_of_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert (cited["cff-version"], cited["type"]) == ("1.2.0", "software")
    assert cited["version"] == PROJECT["version"]
    assert cited["license"] == PROJECT["license"]
    assert all(cited[field] for field in ("message", "title", "authors", "repository-code"))
