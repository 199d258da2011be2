"""A run stays the same run when a later version adds an option that is off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from delible.errors import RunError
from delible.rundir import RunDirectory


def run(**training: Any) -> dict[str, Any]:
    return {"command": "unlearn", "method": {"training": {"epochs": 3, **training}}, "seed": 0}


def test_an_option_that_is_off_changes_no_run(tmp_path: Path) -> None:
    path = tmp_path / "run"
    first = RunDirectory(path)
    assert first.begin(run()) is False
    identity = first.manifest["identity"]
    assert RunDirectory(path).begin(run(least_steps=None)) is False
    assert RunDirectory(path).manifest["identity"] == identity, "checkpoints belong to it"
    first.finish()
    assert RunDirectory(path).begin(run(least_steps=None)) is True
    with pytest.raises(RunError, match=r"another run \(different: method\)"):
        RunDirectory(path).begin(run(least_steps=3))
    with pytest.raises(RunError, match=r"another run \(different: seed\)"):
        RunDirectory(path).begin({**run(), "seed": 1})
