"""How the flags of a command are described: types, groups, and docstrings that flow."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

from cyclopts import Group, Parameter

DATA = Group("Data", sort_key=1)
METHOD = Group("Method", sort_key=2)
TRAINING = Group("Training", sort_key=3)
SLOTS = Group("Slots (another component for a part of the method)", sort_key=4)
ASKED = Group("What is asked", sort_key=5)
THRESHOLDS = Group("Thresholds (exit code 1 when one fails)", sort_key=6)
RUN = Group("Run", sort_key=7)
OTHER = Group("Options of the method", sort_key=8)

Data = Annotated[str | None, Parameter(group=DATA)]
Several = Annotated[list[str] | None, Parameter(group=DATA)]
Subjects = Annotated[list[str] | None, Parameter(name=("--subjects", "--subject"), group=DATA)]
DropOverlap = Annotated[bool, Parameter(group=DATA, show_default=False)]
Slot = Annotated[str | None, Parameter(group=SLOTS)]
Seed = Annotated[int, Parameter(group=RUN)]
Jobs = Annotated[int, Parameter(group=RUN)]
Ray = Annotated[bool, Parameter(group=RUN, show_default=False)]
Cpus = Annotated[int | None, Parameter(group=RUN)]
Out = Annotated[Path | None, Parameter(group=RUN)]
Roles = Annotated[list[str] | None, Parameter(name="--role", group=RUN)]
Json = Annotated[bool, Parameter(name="--json", show_default=False)]

Command = TypeVar("Command", bound=Callable[..., int])


def flowing(command: Command) -> Command:
    """Decorates a command: joins the lines of each paragraph of its docstring, so that the help
    breaks lines where the terminal ends.
    """
    lines = [""]
    for line in inspect.cleandoc(command.__doc__ or "").split("\n"):
        goes_on = line.strip() and lines[-1].strip() and _depth(line) == _depth(lines[-1])
        if goes_on and not line.startswith("---") and not lines[-1].startswith("---"):
            lines[-1] += f" {line.strip()}"
        else:
            lines.append(line)
    command.__doc__ = "\n".join(lines[1:])
    return command


def _depth(line: str) -> int:
    return len(line) - len(line.lstrip())
