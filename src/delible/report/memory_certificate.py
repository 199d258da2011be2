"""The page of a certificate: what was deleted from a memory, and what that does not say."""

from __future__ import annotations

from pathlib import Path

from delible.files import write_json
from delible.memory import Certificate
from delible.report import html

TITLES = {
    "nothing found": "Nothing was found",
    "remains found": "Remains were found",
    "not shown": "Nothing is shown",
}


def write_certificate(path: Path, certificate: Certificate) -> Path:
    """Writes ``NAME.json`` and ``NAME.html``; both hold nothing that was said.

    Args:
        path: Of the JSON file; its folder is made.

    Returns:
        The page.

    Raises:
        RunError: It cannot be written.
    """
    write_json(path, certificate.model_dump(mode="json"))
    return html.write(render_certificate(certificate), path.with_suffix(".html"))


def render_certificate(certificate: Certificate) -> str:
    """The page as HTML text."""
    record = certificate.deletion
    return html.environment().get_template("memory_certificate.html.j2").render(
        certificate=certificate,
        title=TITLES[certificate.verdict],
        actions=[
            (action, record[action])
            for action in ("removed", "quarantined", "rebuilt")
            if record.get(action)
        ],
    )  # fmt: skip


__all__ = ["render_certificate", "write_certificate"]
