"""What was asked for in a conversation, as ``requests.json`` keeps it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from delible.component import Config
from delible.errors import RunError
from delible.files import read_json
from delible.records import ForgetRequest
from delible.repair.surgeon import Plan
from delible.system.artefact import Base

STATE = "requests.json"


class Entry(Config):
    """A request that was carried out."""

    number: int = Field(ge=1, description="By which it is called.")
    folder: str = Field(description="Of its patch.")
    asked: str = Field(description="The user's words.")
    subject: str = Field("", description="The name or topic.")
    request: ForgetRequest = Field(description="What was edited, and what was kept.")
    plan: Plan = Field(description="How.")
    notes: dict[str, Any] = Field(default_factory=dict, description="What the editor measured.")
    enabled: bool = Field(True, description="False: it was taken back.")

    @property
    def title(self) -> str:
        """For people."""
        return self.subject or self.asked


class State(Config):
    """What ``requests.json`` holds."""

    base: Base = Field(description="The model below.")
    entries: tuple[Entry, ...] = Field((), description="All requests, in order.")


def is_chain(folder: Path) -> bool:
    """Whether a folder holds the edits of a conversation."""
    return (folder / STATE).is_file()


def next_folder(folder: str) -> str:
    """Where an edit that is made again lies: ``002-ben-orr.2``, then ``.3``."""
    name, _, revision = folder.partition(".")
    return f"{name}.{int(revision or 1) + 1}"


def read_state(folder: Path) -> State:
    """What a folder's ``requests.json`` says.

    Raises:
        RunError: It cannot be read.
    """
    path = folder / STATE
    try:
        return State.model_validate(read_json(path))
    except (OSError, ValueError, ValidationError) as error:
        raise RunError(
            f"the requests cannot be read ({' '.join(str(error).split())[:200]}).",
            where=str(path),
            hint="Talk to the model below, with another --out folder.",
        ) from error


__all__ = ["STATE", "Entry", "State", "is_chain", "next_folder", "read_state"]
