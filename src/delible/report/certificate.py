"""The page of a certificate: what a signed statement says, for people.

Everything on it comes from the statement, so that page and file cannot say different things.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from delible.report import html

#: What a label means, for people; others are shown as they are.
TITLES = {
    "asked plainly only": "Carried out; asked plainly, and not attacked",
    "guarded": "It stands where a guard goes by it; the model is unchanged",
    "memories only": "Memories forgot; the model is unchanged",
    "leaks": "It is said again",
    "untested": "Carried out; nothing was asked about it",
    "removal-consistent": "Carried out; nothing was found by the attacks that were run",
    "suppression": "It is hidden, not gone",
    "incomplete": "It is still said",
    "destructive": "It is not said, and other things were damaged",
    "undetermined": "The audit could not decide",
}


def write_certificate(
    path: Path, statement: Mapping[str, Any], signature: Mapping[str, str], hidden: Any = None
) -> Path:
    """Writes the page.

    Args:
        statement: An in-toto statement of the ledger.
        signature: ``sha256`` of what was signed, ``key``, and ``file``: where the envelope lies.
        hidden: What was asked to be forgotten (``asker``, ``subjects``, ``questions``), if the
            page may show it.

    Raises:
        RunError: It cannot be written.
    """
    return html.write(render_certificate(statement, signature, hidden), path)


def render_certificate(
    statement: Mapping[str, Any], signature: Mapping[str, str], hidden: Any = None
) -> str:
    """The page as HTML text; the same statement, the same text."""
    told = statement["predicate"]
    label = told["verdict"]["label"]
    return (
        html.environment()
        .get_template("certificate.html.j2")
        .render(
            told=told,
            title=TITLES.get(label, label),
            subjects=statement["subject"],
            signature=signature,
            hidden=hidden,
            size=_size(told["request"]["texts"]),
            attacks=[
                attack
                for test in told["tested"]
                if test.get("audit")
                for attack in test["audit"]["attacks"]
            ],
        )
    )


def _size(texts: Mapping[str, str]) -> str:
    """How much was asked to be forgotten, in words."""
    parts = []
    for kind, noun in (("records.", "record"), ("subjects.", "name")):
        count = sum(name.startswith(kind) for name in texts)
        if count:
            parts.append(f"{count} {noun}{'' if count == 1 else 's'}")
    return " and ".join(parts) or "nothing"
