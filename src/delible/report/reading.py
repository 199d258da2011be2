"""What a report is made of, and how it is read from run directories."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from delible.achieved import Achieved
from delible.audit.result import AuditResult, SystemRole
from delible.errors import RunError
from delible.report.words import finite

ROLES: tuple[SystemRole, ...] = ("original", "unlearned", "reference")


class ReportData(BaseModel):
    """What a page is made of; every part may be missing.

    Attributes:
        story: Sentences in plain words: what was done.
        manifest: The run's manifest. The page reads ``command`` (text or list), ``method``,
            ``model`` and ``seed`` (there, in ``run`` or in ``config``), ``versions``,
            ``hardware``, ``cost`` (with ``seconds``), ``started``, ``ended``, ``stopped`` and
            ``examples`` where they are there, and prints all of it.
        events: Training events with ``step``, ``forget_loss``, ``keep_loss`` and others.
        runs: Several runs to compare; the page starts with a table of them.
    """

    model_config = ConfigDict(extra="forbid")

    title: str
    story: list[str] = Field(default_factory=list)
    manifest: dict[str, Any] = Field(default_factory=dict)
    events: list[dict[str, Any]] = Field(default_factory=list)
    audit: AuditResult | None = None
    notes: list[str] = Field(default_factory=list)
    runs: list[ReportData] = Field(default_factory=list)


def _json(path: Path, hint: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError("the file does not exist.", where=str(path), hint=hint) from None
    except OSError as error:
        raise RunError(f"cannot be read ({error.strerror}).", where=str(path), hint=hint) from None
    except UnicodeDecodeError:
        raise RunError("is not UTF-8 text.", where=str(path), hint=hint) from None
    except json.JSONDecodeError as error:
        raise RunError(
            f"is not valid JSON ({error.msg}).", where=f"{path}:{error.lineno}", hint=hint
        ) from None


def read_events(path: Path, interruptions: int = 0) -> tuple[list[dict[str, Any]], int]:
    """The events of a run and the number of lines left out.

    A killed run leaves a half-written last line, and a resumed one writes on behind it.

    Args:
        interruptions: How often the run was resumed: so many broken lines are to be expected.

    Raises:
        RunError: More broken lines than that, or a file that cannot be read.
    """
    hint = "Delete the broken line, or run the training again."
    try:
        rows = path.read_bytes().split(b"\n")
    except OSError as error:
        raise RunError(f"cannot be read ({error.strerror}).", where=str(path), hint=hint) from None
    while rows and not rows[-1].strip():
        rows.pop()
    events: list[dict[str, Any]] = []
    broken = 0
    for number, row in enumerate(rows, start=1):
        if not row.strip():
            continue
        try:
            event = json.loads(row)
        except ValueError:
            event = None
        if isinstance(event, dict):
            events.append(event)
            continue
        broken += 1
        if number < len(rows) and broken > interruptions:
            raise RunError("is not a JSON object.", where=f"{path}:{number}", hint=hint)
    return events, broken


def read_run(directory: str | Path) -> ReportData:
    """Reads ``manifest.json``, ``events.jsonl`` and ``metrics.json`` of a run directory.

    A run without events or without an audit is told as such on the page.

    Raises:
        RunError: No directory, no manifest, or a file that cannot be read.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise RunError(
            "is not a directory.",
            where=str(folder),
            hint="Give the --out directory of 'delible unlearn' or 'delible audit'.",
        )
    manifest = _json(
        folder / "manifest.json",
        "Give the --out directory of 'delible unlearn' or 'delible audit'; "
        "every run writes this file at its start.",
    )
    if not isinstance(manifest, dict):
        raise RunError(
            "is not a JSON object.",
            where=str(folder / "manifest.json"),
            hint="Run 'delible unlearn' or 'delible audit' again.",
        )
    events_path, audit_path = folder / "events.jsonl", folder / "metrics.json"
    events: list[dict[str, Any]] = []
    notes = []
    if events_path.exists():
        resumed = manifest.get("resumed")
        events, broken = read_events(events_path, len(resumed) if isinstance(resumed, list) else 0)
        if broken:
            notes.append(
                f"The run was interrupted: {broken} half-written "
                f"{'line' if broken == 1 else 'lines'} of its log could not be read."
            )
    if manifest.get("stopped"):
        notes.append(f"The training was stopped early: {manifest['stopped']}")
    if chain := manifest.get("chain"):
        earlier = ", then ".join(
            f"{one['method']} in {one['folder']} (ended {str(one['ended'])[:10]})" for one in chain
        )
        notes.append(f"It goes on from the result of {earlier}.")
    notes += _shortened(manifest)
    audit = None
    if audit_path.exists():
        hint = f"Run 'delible audit {folder}' again."
        try:
            audit = AuditResult.model_validate(_json(audit_path, hint))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise RunError(
                f"is not an audit result: '{key}': {first['msg']}.",
                where=str(audit_path),
                hint=hint,
            ) from None
    if audit is None or (audit.verdict is None and not audit.leaks):
        notes.append(f"This run has not been audited. Run 'delible audit {folder}'.")
    method, model = lookup(manifest, "method", "recipe"), lookup(manifest, "model")
    title = manifest.get("title")
    if not isinstance(title, str):
        title = " on ".join(part for part in (named(method), named(model)) if part) or folder.name
    story = manifest.get("story")
    if not isinstance(story, list):
        story = tell(named(method), named(model), events, audit)
    story = [*story, *_achieved(manifest)]
    return ReportData(
        title=title,
        story=[str(sentence) for sentence in story],
        manifest=manifest,
        events=events,
        audit=audit,
        notes=notes,
    )


def _shortened(manifest: dict[str, Any]) -> list[str]:
    """Rows of which the training saw a part only, as the run counted them."""
    notes = manifest.get("notes")
    counts = notes.get("truncated_rows") if isinstance(notes, dict) else None
    if not isinstance(counts, dict) or not counts:
        return []
    parts = [f"{count} {role} row{'s' * (count != 1)}" for role, count in counts.items()]
    were = "was" if list(counts.values()) == [1] else "were"
    return [f"{_and(parts)} {were} longer than the training's rows, which saw only a part of them."]


def read_runs(directories: Sequence[str | Path], title: str | None = None) -> ReportData:
    """One directory: its page. Several: one page that compares them.

    Raises:
        RunError: No directory given, or one that cannot be read.
    """
    if not directories:
        raise RunError("no run directory given.", hint="Give one or more: delible report DIR…")
    runs = [read_run(directory) for directory in directories]
    if len(runs) == 1:
        return runs[0] if title is None else runs[0].model_copy(update={"title": title})
    return ReportData(
        title=title or f"{len(runs)} runs compared",
        story=[f"{len(runs)} runs, side by side. Each run directory has a report of its own."],
        runs=runs,
    )


def tell(
    method: str | None,
    model: str | None,
    events: Sequence[dict[str, Any]],
    audit: AuditResult | None,
) -> list[str]:
    """What was done, in plain words, as far as the files say."""
    sentences = []
    if method or model:
        sentences.append(
            f"{model or 'A language model'} was asked to forget"
            + (f" with the method {method}." if method else ".")
        )
    steps = [event["step"] for event in events if finite(event.get("step"))]
    if steps:
        sentences.append(f"Training took {max(steps):,} steps.")
    if audit is not None and (audit.verdict is not None or audit.leaks):
        asked = ", ".join(f"{count:,} {split}" for split, count in audit.splits.items())
        attacks = sum(leak.attack != "none" for leak in audit.leaks)
        sentences.append(
            f"The audit compared {_and([role for role in ROLES if role in audit.systems])} on "
            f"these records: {asked or 'none'}."
        )
        if attacks:
            sentences.append(
                f"It then tried to bring the knowledge back in {attacks} "
                f"{'way' if attacks == 1 else 'ways'}."
            )
    return sentences


def _achieved(manifest: dict[str, Any]) -> list[str]:
    """What the run itself measured, as it was told on the screen."""
    found = manifest.get("achieved")
    if not isinstance(found, dict):
        return []
    try:
        return [Achieved.from_json(found).sentence()]
    except (KeyError, TypeError):  # of another version
        return []


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def lookup(manifest: dict[str, Any], *keys: str) -> Any:
    """The first of the keys found at the top, in ``run`` or in ``config``; else ``None``."""
    places = [manifest, *(manifest.get(name) for name in ("run", "config"))]
    for place in places:
        if isinstance(place, dict):
            for key in keys:
                if place.get(key) is not None:
                    return place[key]
    return None


def named(value: Any) -> str | None:
    """The name of a method or model that is written as a name or as ``{"name": …}``."""
    if isinstance(value, dict):
        value = value.get("name") or value.get("id")
    return value if isinstance(value, str) and value else None
