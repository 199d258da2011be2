"""What all pages share: the environment of the templates, and how a page is written.

``layout.html.j2`` is the frame of a page, ``style.css`` its looks and ``script.js`` what tables
do when they are clicked; all three end up inside the page. The content security policy names the
hash of the script, so nothing else can run, whatever the data hold.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import os
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from delible.errors import RunError
from delible.report.words import duration, finite, number, pretty

FOLDER = Path(__file__).parent
NO_RECORD = "not measured in this audit"


def shown(value: float | None, reason: str | None = None, digits: int = 3) -> Markup:
    """A number, or a dash whose tooltip says why there is none."""
    if value is not None and finite(value):
        return Markup(escape(number(value, digits)))
    reason = reason or (NO_RECORD if value is None else f"the value is {value}")
    return Markup('<span class="none" title="{}">–<span class="hidden"> ({})</span></span>').format(
        reason, reason
    )


def score(value: float | None, reason: str | None = None) -> Markup:
    """A knowledge score for a narrow cell: two decimals, ``<0.01`` where that would be 0.00."""
    if value is not None and 0 < value < 0.005:
        return Markup('<span title="{}">&lt;0.01</span>').format(number(value))
    return shown(value, reason, 2)


def elapsed(seconds: float | None) -> Markup:
    """A duration, or a dash whose tooltip says why there is none."""
    if seconds is None or not finite(seconds):
        return shown(None, "no time was recorded")
    return Markup(escape(duration(seconds)))


def _script_hash(text: str) -> str:
    """The source expression that lets a content security policy run exactly this script."""
    digest = hashlib.sha256(str(text).encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


@functools.cache
def environment() -> jinja2.Environment:
    """The templates' environment; made once, because compiling takes longer than filling in.

    Everything that a template prints is escaped.
    """
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(
        pretty=pretty,
        number=number,
        shown=shown,
        score=score,
        elapsed=elapsed,
        duration=duration,
        script_hash=_script_hash,
    )
    made.globals.update(
        style=Markup((FOLDER / "style.css").read_text(encoding="utf-8")),
        script=Markup((FOLDER / "script.js").read_text(encoding="utf-8")),
    )
    return made


def write(text: str, path: str | Path) -> Path:
    """Writes a page; a reader never sees a half-written file.

    Raises:
        RunError: The file cannot be written.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunError(
            f"the report cannot be written ({error.strerror}).",
            where=str(target),
            hint="Choose a directory that exists and can be written to.",
        ) from None
    return target
