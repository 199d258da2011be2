"""A kind of artefact: how what a method made is written, and how it becomes a system again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from delible.component import Component
from delible.context import Context
from delible.errors import RunError
from delible.system.artefact import Artefact
from delible.system.base import System


class ArtefactKind(Component):
    """One kind of artefact: how it is written, and how it becomes a system again.

    The card says whether it can be taken off (``reversible``).
    """

    def save(self, content: Any, folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
        """Writes the parts into a folder.

        Args:
            content: What a method made, in the form that the kind documents.

        Returns:
            Relative paths of the parts by name, and the options.
        """
        raise NotImplementedError

    def open(
        self, artefact: Artefact, folder: Path, base: Callable[[], System], context: Context
    ) -> System:
        """The system again.

        Args:
            base: Opens what it stands on.
            context: Who judges or writes for it by talking.

        Raises:
            DelibleError: A part is missing or damaged, or does not fit the base.
        """
        raise NotImplementedError

    def check_without(self, artefact: Artefact, folder: Path) -> None:
        """Whether what an artefact names as taken out alone (``without``) can be.

        Raises:
            RunError: It holds no such part, or is of one piece; says what it holds.
        """
        raise RunError(
            f"the {artefact.kind} is of one piece: nothing can be taken out of it alone.",
            where=str(folder),
            hint="Take it off as a whole (without --only).",
        )


__all__ = ["ArtefactKind"]
