"""The routes of a gateway."""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ValidationError
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from delible.errors import DelibleError, RecipeError
from delible.gateway.answering import Answer, failure
from delible.gateway.asked import (
    BODIES,
    ChatRequest,
    CheckRequest,
    ResponsesRequest,
    TargetChange,
    TextRequest,
)
from delible.gateway.errors import CallFailed, of_system
from delible.gateway.front import CALL, Front
from delible.gateway.guarding import verdict
from delible.gateway.keys import Callers
from delible.gateway.models import ServedModel, chosen
from delible.gateway.reading import conversation, read_chat, read_text
from delible.gateway.responses import Responses, read_responses
from delible.gateway.settings import GatewaySettings
from delible.gateway.telling import Numbers
from delible.gateway.writing import Chat, Text
from delible.system.asks import Prompt
from delible.system.replies import Unanswered

logger = logging.getLogger(__name__)

#: Seconds between two looks at files that may change.
LOOK = 2.0

Body = TypeVar("Body", bound=BaseModel)


def gateway(models: Sequence[ServedModel], settings: GatewaySettings) -> ASGIApp:
    """The application that serves some models.

    Raises:
        RecipeError: The file of keys, or the variable of the admin's key, cannot be read.
    """
    numbers = Numbers()
    callers = Callers(settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        looking = asyncio.create_task(_look(callers, models))
        yield
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)
        for model in models:
            await model.aclose()

    app = FastAPI(
        title="delible", docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=lifespan
    )
    _answers(app, models, settings, numbers)
    _states(app, models, numbers)
    if settings.admin_key_variable:
        _admin(app, models, settings)
    _described(app)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        """Paths and methods that there are not: nothing is passed through."""
        known = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid")
        about = f"{request.method} {request.url.path[:200]}: {error.detail}"
        reply = failure(CallFailed(error.status_code, about, code=known))
        reply.headers.update(error.headers or {})
        return reply

    @app.exception_handler(CallFailed)
    async def failed(request: Request, error: CallFailed) -> Response:
        request.scope[CALL].failed = error.code or str(error.status)
        return failure(error)

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        return failure(CallFailed(500, "Something failed here.", code="internal_error"))

    front: ASGIApp = Front(app, settings, numbers, callers)
    if settings.allowed_origins:
        front = CORSMiddleware(
            front,
            allow_origins=settings.allowed_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("authorization", "content-type", "x-request-id"),
            expose_headers=("x-request-id", "x-delible-warning", "x-delible-policy"),
        )
    return front


async def _look(callers: Callers, models: Sequence[ServedModel]) -> None:
    """Follows the files of keys and of targets, whether or not somebody calls."""
    while True:
        await asyncio.sleep(LOOK)
        try:
            await asyncio.to_thread(callers.poll)
            for model in models:
                for one in model.following:
                    await one.look()
        except Exception as error:  # the next look may succeed
            logger.error("a file could not be followed (%s)", type(error).__name__)


async def _body(request: Request, form: type[Body], settings: GatewaySettings) -> Body:
    """What a client sent.

    Raises:
        CallFailed: It is too long, takes too long, or is not of this form.
    """
    content = bytearray()
    try:
        async with asyncio.timeout(settings.body_seconds):
            async for chunk in request.stream():
                content += chunk
                if len(content) > settings.body_bytes:
                    problem = f"A body has at most {settings.body_bytes:,} bytes."
                    raise CallFailed(413, problem, code="body_too_large")
    except TimeoutError:
        raise CallFailed(408, "The body did not come in time.", code="timeout") from None
    try:
        return form.model_validate_json(bytes(content))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        param = ".".join(map(str, first["loc"]))[:200]
        problem = f"{param}: {first['msg']}"[:500] if param else first["msg"][:500]
        raise CallFailed(400, problem, code=first["type"], param=param or None) from None


def _answers(
    app: FastAPI, models: Sequence[ServedModel], settings: GatewaySettings, numbers: Numbers
) -> None:
    def answer(request: Request, asked: Any, writer: Any) -> Response:
        made = writer(asked, undisclosed=settings.undisclosed)
        return Answer(asked, made, request.scope[CALL], settings, numbers)

    @app.post("/v1/chat/completions", summary="Answer a conversation.")
    async def chat(request: Request) -> Response:
        body = await _body(request, ChatRequest, settings)
        model = chosen(models, body.model)
        return answer(request, read_chat(body, model, settings), Chat)

    @app.post("/v1/completions", summary="Go on with a text.")
    async def text(request: Request) -> Response:
        body = await _body(request, TextRequest, settings)
        model = chosen(models, body.model)
        return answer(request, read_text(body, model, settings), Text)

    @app.post("/v1/responses", summary="Answer a text, without a state.")
    async def responses(request: Request) -> Response:
        body = await _body(request, ResponsesRequest, settings)
        model = chosen(models, body.model)
        return answer(request, read_responses(body, model, settings), Responses)

    @app.post("/v1/check", summary="A guard's verdict, without an answer.")
    async def check(request: Request) -> Response:
        body = await _body(request, CheckRequest, settings)
        model = chosen(models, body.model)
        request.scope[CALL].model = model.name
        if not model.checks:
            raise CallFailed(501, "No guard that gives verdicts is here.", code="no_guard")
        if (body.messages is None) == (body.prompt is None):
            raise CallFailed(400, "Give either messages or a prompt.", param="messages")
        asked = Prompt(text=body.prompt)
        if body.messages is not None:
            asked = Prompt(conversation(body.messages, settings))
        elif len(body.prompt or "") > settings.prompt_characters:
            raise CallFailed(400, "The prompt is too long.", code="context_length_exceeded")
        try:
            async with asyncio.timeout(settings.total_seconds):
                found = await verdict(model.checks, asked, body.answer)
        except Unanswered as error:
            raise of_system(error) from None
        except TimeoutError:
            raise CallFailed(504, "There was no verdict in time.", code="timeout") from None
        word = "allowed" if found.allowed else "failed" if found.failed else "refused"
        numbers.verdicts.labels(found.guard, word).inc()
        if not found.allowed:
            request.scope[CALL].withheld_by.append(found.guard)
            request.scope[CALL].guard_failed = found.failed
        named = {} if settings.undisclosed else {"guard": found.guard}
        return JSONResponse(
            {"object": "check", "model": model.name, "allowed": found.allowed, **named}
        )


def _states(app: FastAPI, models: Sequence[ServedModel], numbers: Numbers) -> None:
    @app.get("/v1/models", summary="What is served.")
    async def listed() -> Response:
        return JSONResponse({"object": "list", "data": [one.described() for one in models]})

    @app.get("/v1/models/{name:path}", summary="One of what is served.")
    async def model(name: str) -> Response:
        return JSONResponse(chosen(models, name).described())

    @app.get("/health", summary="Whether the process lives.")
    async def health() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/ready", summary="Whether it would answer.")
    async def ready() -> Response:
        all_ready = all([await one.ready() for one in models])
        word = "ready" if all_ready else "an upstream server does not answer"
        return JSONResponse({"status": word}, 200 if all_ready else 503)

    @app.get("/metrics", summary="Numbers for Prometheus.")
    async def metrics() -> Response:
        return Response(numbers.page(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _admin(app: FastAPI, models: Sequence[ServedModel], settings: GatewaySettings) -> None:
    variable = settings.admin_key_variable or ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise RecipeError(f"the environment variable {variable} is not set, or is empty.")

    @app.post("/admin/targets", summary="Guard other targets from now on.")
    async def targets(request: Request) -> Response:
        given = request.headers.get("authorization", "").encode("latin-1")
        if not hmac.compare_digest(given, f"Bearer {key}".encode()):
            raise CallFailed(401, "This is not the admin's key.", code="invalid_api_key")
        body = await _body(request, TargetChange, settings)
        model = chosen(models, body.model)
        if model.targets is None:
            raise CallFailed(501, "No guard here takes other targets.", code="no_guard")
        try:
            count = await model.targets.change_targets(body.add, body.remove)
        except DelibleError as error:
            raise CallFailed(400, error.problem, code="invalid_target") from None
        return JSONResponse({"object": "targets", "count": count})


def _described(app: FastAPI) -> None:
    """Adds the bodies to the schema: they are read by hand, so that nothing is read twice."""
    made = app.openapi
    forms = [form for path, form in BODIES.items() if any(_has(app, path))]
    _, schemas = models_json_schema(
        [(form, "validation") for form in forms], ref_template="#/components/schemas/{model}"
    )

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = made()
            found.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
            for path, form in BODIES.items():
                if path not in found["paths"]:
                    continue
                about = {"$ref": f"#/components/schemas/{form.__name__}"}
                found["paths"][path]["post"]["requestBody"] = {
                    "required": True,
                    "content": {"application/json": {"schema": about}},
                }
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _has(app: FastAPI, path: str) -> list[bool]:
    return [getattr(route, "path", "") == path for route in app.routes]
