"""A package of somebody else: found by its entry point, checked, and used by `delible unlearn`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from delible.lm.lm import LM
from delible.loaders import write_records
from delible.testing import tiny_model, tiny_tokenizer
from delible.testing.contract.trial import FORGET, RETAIN

PLUGIN = Path(__file__).parents[2] / "examples" / "plugin"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The plugin as an installer would leave it, without an installer (nor a network)."""
    site = tmp_path_factory.mktemp("site")
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text("utf-8"))["project"]
    shutil.copytree(PLUGIN / "src" / "delible_example", site / "delible_example")
    information = site / f"delible_example-{project['version']}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    (information / "entry_points.txt").write_text(
        "".join(
            f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in points.items())
            for group, points in project["entry-points"].items()
        )
    )
    path = os.pathsep.join([str(site), *filter(None, sys.path)])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def run(environment: dict[str, str], *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_is_listed(environment: dict[str, str]) -> None:
    found = json.loads(run(environment, "delible", "list", "objectives", "--json"))
    names = {card["name"] for card in found}
    assert {"tempered_ascent", "npo"} <= names
    bare = {**environment, "PYTHONPATH": environment["PYTHONPATH"].partition(os.pathsep)[2]}
    found = json.loads(run(bare, "delible", "list", "objectives", "--json"))
    assert names - {card["name"] for card in found} == {"tempered_ascent"}


@pytest.mark.slow
def test_its_own_tests_pass(environment: dict[str, str]) -> None:
    told = run(
        environment, "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", PLUGIN,
        "-c", PLUGIN / "pyproject.toml", PLUGIN / "tests",
    )  # fmt: skip
    assert "4 passed" in told


@pytest.mark.slow
def test_unlearn_takes_its_recipe(environment: dict[str, str], tmp_path: Path) -> None:
    model = LM(tiny_model("llama", num_hidden_layers=2), tiny_tokenizer())
    model.save(tmp_path / "model")
    write_records(FORGET, tmp_path / "forget.jsonl")
    write_records(RETAIN, tmp_path / "retain.jsonl")
    run(
        environment, "delible", "unlearn", tmp_path / "model",
        "--method", PLUGIN / "tempered.yaml", "--q", 0.3,
        "--forget", tmp_path / "forget.jsonl", "--retain", tmp_path / "retain.jsonl",
        "--precision", "float32", "--max-steps", 2, "--learning-rate", 1e-3,
        "--out", tmp_path / "run",
    )  # fmt: skip
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["status"] == "done"
    assert manifest["run"]["method"]["objective"] == {"name": "tempered_ascent", "q": 0.3}
    unlearned = LM.load(str(tmp_path / "run"))
    assert unlearned.fingerprint != model.fingerprint
