"""``delible report --serve``: runs side by side on a page of this machine, with live answers.

``GET /`` is the comparison, filtered by what its form asks for (it works without a script);
``GET /runs/N`` a run's own page; ``POST /answers`` asks the models between a run's start and its
result. Only this machine is answered, and only pages that came from here may ask.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import anyio
from markupsafe import Markup
from pydantic import Field, ValidationError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from delible.component import Config
from delible.errors import DelibleError, RunError
from delible.loaders import read_records
from delible.records import QA
from delible.report.html import FOLDER, environment
from delible.report.line import Line
from delible.report.page import comparison_of, render
from delible.report.reading import ReportData, read_run
from delible.report.side_by_side import Row, choices, compared, read_rows
from delible.system.artefact import is_artefact

logger = logging.getLogger(__name__)

#: Names by which a browser on this machine calls it.
HOSTS = ["127.0.0.1", "localhost", "[::1]"]
LONGEST_QUESTION = 4000
LONGEST_BODY = 20_000
QUESTIONS = ("forget", "neighbours", "retain")
SHOWN_QUESTIONS = 40


class Asked(Config):
    """A question to the models between a run's start and its result."""

    run: int = Field(ge=1, description="Place of the run on the page.")
    share: float = Field(ge=0, le=1, description="How far from the start; 1 is the result.")
    question: str = Field(min_length=1, max_length=LONGEST_QUESTION, description="What is asked.")


@dataclass(frozen=True)
class Content:
    """What a run's files say.

    Attributes:
        written: When its manifest was, in nanoseconds.
        known: Questions of the run's own records with their answers, what is to be forgotten first.
    """

    written: int
    data: ReportData
    rows: list[Row]
    known: dict[str, str]


class Run:
    """A run as it is shown and asked.

    Args:
        folder: Of ``delible unlearn`` or ``delible audit``.

    Raises:
        RunError: It cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._opening = Lock()
        self._content = self._read()

    @property
    def content(self) -> Content:
        """What its files say, read again once its manifest was written again: texts may have gone.

        Raises:
            RunError: They cannot be read any more.
        """
        if self._content.written != self._written():
            self._content = self._read()
        return self._content

    def _written(self) -> int:
        path = self.folder / "manifest.json"
        return path.stat().st_mtime_ns if path.exists() else 0

    def _read(self) -> Content:
        written = self._written()  # before it is read, so that nothing newer is taken for older
        return Content(written, read_run(self.folder), read_rows(self.folder), self._questions())

    def _questions(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for role in QUESTIONS:
            path = self.folder / "data" / f"{role}.jsonl"
            if path.exists():
                rows = [one for one in read_records(path) if isinstance(one, QA)]
                found.update({one.question: one.answer for one in rows[:SHOWN_QUESTIONS]})
        return found

    @property
    def can_be_asked(self) -> bool:
        """Whether there is something to open."""
        return is_artefact(self.folder)

    def line(self) -> Line:
        """Its models, loaded once.

        Raises:
            DelibleError: They cannot be opened, or there is nothing between them.
        """
        with self._opening:
            return self._line

    @cached_property
    def _line(self) -> Line:
        logger.info(f"Loading the start and the result of {self.folder} …")
        return Line(self.folder)


def page(runs: Sequence[Run], asked: dict[str, str]) -> str:
    """The comparison as HTML.

    Args:
        asked: ``subject``, ``attack`` and ``metric``; what is not known chooses all.
    """
    contents = [run.content for run in runs]
    comparison = comparison_of([one.data for one in contents])
    rows = [one.rows for one in contents]
    can = choices(rows)
    subject = asked.get("subject") if asked.get("subject") in can.subjects else None
    attack = asked.get("attack") if asked.get("attack") in can.attacks else None
    metric = asked.get("metric", "")
    metric = metric if metric in can.metrics else next(iter(can.metrics), "")
    return (
        environment()
        .get_template("served.html.j2")
        .render(
            runs=runs,
            comparison=comparison,
            names=[f"{row['mark']}. {row['method']}" for row in comparison["rows"]],
            can=can,
            chosen={"subject": subject, "attack": attack, "metric": metric},
            table=compared(rows, metric, subject, attack),
            titles=_titles([one.data for one in contents]),
            questions=list(dict.fromkeys(text for one in contents for text in one.known)),
            script=_script(),
        )
    )


def _titles(runs: Sequence[ReportData]) -> dict[str, str]:
    """What attacks are called."""
    found = {"none": "Plain question"}
    for data in runs:
        found |= {leak.attack: leak.title for leak in (data.audit.leaks if data.audit else ())}
    return found


def _script() -> Markup:
    return Markup(
        "\n".join((FOLDER / name).read_text(encoding="utf-8") for name in ("script.js", "live.js"))
    )


def application(folders: Sequence[Path | str]) -> Starlette:
    """The pages and answers of runs.

    Raises:
        RunError: A folder is no run.
    """
    if not folders:
        raise RunError("no run directory is given.", hint="Write: delible report DIR… --serve")
    runs = [Run(Path(folder)) for folder in folders]

    async def front(request: Request) -> Response:
        return _page(page(runs, dict(request.query_params)))

    async def one(request: Request) -> Response:
        place = request.path_params["place"]
        if not 1 <= place <= len(runs):
            return JSONResponse({"error": "There is no such run."}, 404)
        return _page(render(runs[place - 1].content.data))

    async def answers(request: Request) -> Response:
        # a page from elsewhere can send a form, or text, without being asked whether it may
        if request.headers.get("content-type", "").split(";")[0] != "application/json":
            return JSONResponse({"error": "Ask in JSON."}, 415)
        body = await request.body()
        try:
            asked = Asked.model_validate_json(body[:LONGEST_BODY])
        except ValidationError as error:
            return JSONResponse({"error": error.errors()[0]["msg"]}, 422)
        if asked.run > len(runs):
            return JSONResponse({"error": "There is no such run."}, 404)
        return await anyio.to_thread.run_sync(_answered, runs[asked.run - 1], asked)

    return Starlette(
        routes=[
            Route("/", front),
            Route("/runs/{place:int}", one),
            Route("/answers", answers, methods=["POST"]),
        ],
        exception_handlers={DelibleError: _told},
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS)],
    )


def _answered(run: Run, asked: Asked) -> Response:
    try:
        expected = run.content.known.get(asked.question)
        said = run.line().said(asked.question, asked.share, expected)
    except DelibleError as error:
        return JSONResponse({"error": str(error)}, 409)
    named = zip(("start", "between", "result"), said, strict=True)
    return JSONResponse(
        {
            "expected": expected,
            **{name: {"text": one.text, "probability": one.probability} for name, one in named},
        }
    )


async def _told(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, 409)


def _page(text: str) -> HTMLResponse:
    return HTMLResponse(text, headers={"Cache-Control": "no-store", "X-Frame-Options": "DENY"})


def serve(
    folders: Sequence[Path | str], port: int, began: Callable[[str], None] = lambda _: None
) -> None:
    """Serves runs on this machine until a signal ends it.

    Args:
        port: 0: any free one.
        began: Told the address once it can be opened.

    Raises:
        RunError: A folder is no run, or the port is taken.
        MissingExtraError: The extra ``gateway`` is not installed.
    """
    from delible.gateway.running import listening, needs_extra
    from delible.gateway.settings import GatewaySettings

    needs_extra()
    import uvicorn

    app: Any = application(folders)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, ws="none"))
    with listening(GatewaySettings(port=port)) as place:
        began(f"http://127.0.0.1:{place.getsockname()[1]}/")
        server.run(sockets=[place])
