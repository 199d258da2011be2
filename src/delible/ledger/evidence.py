"""What a run left to show: hashes of its files, and numbers, as the ledger writes them down."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from delible.achieved import Achieved, Change
from delible.rundir import RunDirectory
from delible.system import artefact as artefacts

#: Parts of a manifest that may tell what was forgotten, or only where and how often it was begun.
_LEFT_OUT = ("examples", "notes", "command", "resumed", "hardware")


def sha256_of(path: Path) -> str:
    """Of a file's content (hexadecimal)."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def file_hashes(folder: Path) -> dict[str, str]:
    """Of an artefact's file and all its parts, by path in the run."""
    artefact = artefacts.read(folder)
    paths = [folder / artefacts.FILE]
    for part in artefact.parts.values():
        place = folder / part
        inside = sorted(one for one in place.rglob("*") if one.is_file())
        paths += inside if place.is_dir() else [place]
    return {str(path.relative_to(folder)): sha256_of(path) for path in dict.fromkeys(paths)}


def manifest_hash(folder: Path) -> str:
    """Of what a run's manifest says apart from forgotten texts; the same after they have gone."""
    content = {
        key: value for key, value in RunDirectory(folder).manifest.items() if key not in _LEFT_OUT
    }
    run = content.get("run")
    if isinstance(run, dict):
        content["run"] = {key: value for key, value in run.items() if key != "subjects"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def run_facts(folder: Path) -> dict[str, Any]:
    """Which artefact a run made, and hashes of it and of the manifest.

    Raises:
        RunError: There is none.
    """
    artefact = artefacts.read(folder)
    base = artefact.base
    return {
        "artefact": {
            "kind": artefact.kind,
            "identity": artefact.identity,
            "base": None if base is None else {"name": base.name, "identity": base.identity},
        },
        "files": file_hashes(folder),
        "manifest": manifest_hash(folder),
    }


def numbers_of(achieved: Achieved | None) -> dict[str, Any] | None:
    """Answers before and after, as the ledger writes numbers."""
    if achieved is None:
        return None
    changes = {name: change_numbers(one) for name, one in achieved.changes.items()}
    return {"state": achieved.state, **changes}


def change_numbers(one: Change) -> dict[str, Any]:
    """What became of one split, as the ledger writes numbers."""
    said = one.said
    return {
        "before": f"{one.before:.6g}", "after": f"{one.after:.6g}", "rows": one.rows,
        "texts_only": one.texts_only,
        "said": None if said is None
        else {"before": said.before, "after": said.after, "rows": said.rows},
    }  # fmt: skip
