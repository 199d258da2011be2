"""Asks a system and sends what it says, as long as somebody listens and time is left.

The reply to the client begins with the first text, so that what fails before has a status of its
own; a stream for which that takes long begins with comments. When the client leaves, the system's
work is cancelled, before the first text and for answers that are not streamed, too.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from typing import Any, cast

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from delible.gateway.errors import CallFailed, of_system
from delible.gateway.reading import Asked
from delible.gateway.settings import GatewaySettings
from delible.gateway.telling import Call, Numbers
from delible.gateway.writing import COMMENT, Writer
from delible.system.asks import Decoding, Prompt
from delible.system.replies import Piece, Reply, Unanswered, Usage

logger = logging.getLogger(__name__)

#: Parts of answers that wait for a slow client.
_WAITING = 64
#: Characters of a token, where a system does not count them.
_CHARACTERS_PER_TOKEN = 4
_WARNING_CHARACTERS = 800
#: Who withheld an answer that the server behind withheld itself.
UPSTREAM = "upstream"


class Answer(Response):
    """An answer on its way.

    Args:
        asked: What is asked.
        writer: How it is written.
        call: What is told of it.
        settings: Limits of time.
        numbers: Where verdicts are counted.
    """

    def __init__(
        self,
        asked: Asked,
        writer: Writer,
        call: Call,
        settings: GatewaySettings,
        numbers: Numbers,
    ) -> None:
        super().__init__()
        self.asked, self.writer, self.call = asked, writer, call
        self.settings, self.numbers = settings, numbers
        call.model, call.streamed = asked.model.name, asked.streamed
        call.warnings = len(asked.warnings)
        self._usages: list[Usage | None] = [None] * len(asked.prompts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.create_task(self._stream(send) if self.asked.streamed else self._whole(send))
        leaving = asyncio.create_task(_left(receive))
        try:
            await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
            else:
                self.call.gone = True
        except CallFailed as failed:
            self.call.failed = failed.code or str(failed.status)
            await failure(failed)(scope, receive, send)
        finally:
            await _ended([work, leaving])
            self._account()

    # ---- whole

    async def _whole(self, send: Send) -> None:
        tasks = [
            asyncio.create_task(self._reply(prompt, decoding))
            for prompt, decoding in zip(self.asked.prompts, self.asked.decodings, strict=True)
        ]
        try:
            async with asyncio.timeout(self.settings.total_seconds):
                replies = await asyncio.gather(*tasks)
        except TimeoutError:
            raise _too_late("a whole answer", self.settings.total_seconds) from None
        finally:
            await _ended(tasks)
        policy = ""
        for index, reply in enumerate(replies):
            self._usages[index] = reply.usage
            self.call.told += len(reply.text)
            self._judged(reply)
            policy = policy or self._policy(reply)
        body = self.writer.whole(replies, self._usage())
        await JSONResponse(body, headers=self._told(policy))({"type": "http"}, _nothing, send)

    async def _reply(self, prompt: Prompt, decoding: Decoding) -> Reply:
        try:
            return await self.asked.model.answers.respond(prompt, decoding)
        except Exception as error:
            raise _failed(error) from error

    # ---- in pieces

    async def _stream(self, send: Send) -> None:
        begun = False

        async def say(content: bytes, policy: str = "", *, more: bool = True) -> None:
            nonlocal begun
            if not begun:
                begun = True
                head = {
                    "content-type": "text/event-stream; charset=utf-8",
                    "cache-control": "no-cache",
                    "x-accel-buffering": "no",
                    **self._told(policy),
                }
                raw = [(name.encode(), value.encode("latin-1")) for name, value in head.items()]
                await send({"type": "http.response.start", "status": 200, "headers": raw})
                content = self.writer.opening() + content
            await send({"type": "http.response.body", "body": content, "more_body": more})

        try:
            # a client that reads nothing holds an answer no longer than one that takes long
            async with (
                asyncio.timeout(self.settings.total_seconds + self.settings.keep_alive_seconds),
                aclosing(self._pieces()) as pieces,
            ):
                async for batch in pieces:
                    if not batch:
                        await say(COMMENT)
                        continue
                    content, policy = b"", ""
                    for index, piece in batch:
                        self._heard(index, piece)
                        content += self.writer.piece(index, piece)
                        policy = policy or self._policy(piece)
                    if content:
                        await say(content, policy)
                await say(self.writer.closing(self._usage()), more=False)
        except CallFailed as failed:
            if not begun:
                raise
            self.call.failed = failed.code or str(failed.status)
            await say(self.writer.failed(failed), more=False)

    def _heard(self, index: int, piece: Piece) -> None:
        if self.call.first is None and (piece.text or piece.tool_calls):
            self.call.first = time.monotonic() - self.call.started
        self.call.told += len(piece.text)
        if piece.finish is not None:
            self._usages[index] = piece.usage or Usage()
            self._judged(piece)

    async def _pieces(self) -> AsyncGenerator[list[tuple[int, Piece]]]:
        """Parts of all answers as they come; none when there was nothing to send for long.

        What has come meanwhile is sent at once: a busy machine sends less often.
        """
        came: asyncio.Queue[tuple[int, Piece | CallFailed]] = asyncio.Queue(_WAITING)
        tasks = [
            asyncio.create_task(self._pump(index, prompt, decoding, came))
            for index, (prompt, decoding) in enumerate(
                zip(self.asked.prompts, self.asked.decodings, strict=True)
            )
        ]
        clock, settings, left = time.monotonic, self.settings, len(tasks)
        began = last = sent = clock()
        first = True
        try:
            while left:
                patience = settings.first_token_seconds if first else settings.idle_seconds
                if self.asked.model.guarded:  # a guard that holds text is silent, and not idle
                    patience = settings.total_seconds
                ends = min(last + patience, began + settings.total_seconds)
                until = min(ends, sent + settings.keep_alive_seconds)
                try:
                    async with asyncio.timeout(max(0.0, until - clock())):
                        came_now = [await came.get()]
                except TimeoutError:
                    if clock() >= ends:
                        late = "the first text" if first else "more text"
                        raise _too_late(late, ends - last) from None
                    sent = clock()
                    yield []
                    continue
                while not came.empty():
                    came_now.append(came.get_nowait())
                last, first = clock(), False
                batch: list[tuple[int, Piece]] = []
                failed: CallFailed | None = None
                for index, piece in came_now:
                    if isinstance(piece, CallFailed):
                        failed = piece
                        break
                    batch.append((index, piece))
                    left -= piece.finish is not None
                    if piece.text or piece.tool_calls or piece.finish is not None:
                        sent = last
                if batch:
                    yield batch
                if failed is not None:
                    raise failed
        finally:
            await _ended(tasks)

    async def _pump(
        self,
        index: int,
        prompt: Prompt,
        decoding: Decoding,
        came: asyncio.Queue[tuple[int, Piece | CallFailed]],
    ) -> None:
        try:
            stream = cast(AsyncGenerator[Piece], self.asked.model.answers.stream(prompt, decoding))
            async with aclosing(stream):
                async for piece in stream:
                    await came.put((index, piece))
                    if piece.finish is not None:
                        return
            await came.put((index, CallFailed(502, "The answer broke off.", code="no_answer")))
        except Exception as error:
            await came.put((index, _failed(error)))

    # ---- what is told

    def _told(self, policy: str) -> dict[str, str]:
        found: dict[str, str] = {}
        if self.asked.warnings:
            found["x-delible-warning"] = _plain("; ".join(self.asked.warnings))
        if policy and self.settings.name_policy and not self.settings.undisclosed:
            found["x-delible-policy"] = _plain(policy)
        return found

    def _policy(self, said: Reply | Piece) -> str:
        """Who withheld an answer, if somebody did: a guard, or the filter of the server behind."""
        if said.finish != "content_filter":
            return ""
        model = self.asked.model
        return said.withheld_by or (model.guard if model.endpoint is None else UPSTREAM)

    def _judged(self, said: Reply | Piece) -> None:
        self.call.finishes.append(said.finish or "")
        if policy := self._policy(said):
            verdict = "failed" if said.guard_failed else "withheld"
            self.numbers.verdicts.labels(policy, verdict).inc()
            self.call.withheld_by.append(policy)
            self.call.guard_failed |= said.guard_failed
        elif self.asked.model.guarded:
            self.numbers.verdicts.labels(self.asked.model.guard, "passed").inc()

    def _usage(self) -> Usage:
        """Of all answers; a prompt that is answered several times went in once."""
        told = [one or Usage() for one in self._usages]
        prompts = {
            prompt: one.prompt_tokens for prompt, one in zip(self.asked.prompts, told, strict=True)
        }
        return Usage(sum(prompts.values()), sum(one.completion_tokens for one in told))

    def _account(self) -> None:
        """Counts what was used, of answers that broke off as well."""
        usage = self._usage()
        self.call.usage = usage
        spent = usage.prompt_tokens + usage.completion_tokens
        if not all(one and one.prompt_tokens for one in self._usages):
            asked = sum(map(_characters, set(self.asked.prompts)))
            spent = max(spent, (asked + self.call.told) // _CHARACTERS_PER_TOKEN)
        if self.call.caller is not None:
            self.call.caller.spent(spent)


def failure(failed: CallFailed) -> JSONResponse:
    """The reply to a call that failed."""
    return JSONResponse(failed.content(), failed.status, headers=failed.headers())


def _failed(error: Exception) -> CallFailed:
    if isinstance(error, CallFailed):
        return error
    if isinstance(error, Unanswered):
        return of_system(error)
    # its words may hold what was asked, so they stay out of log and reply
    logger.error("a system failed (%s)", type(error).__name__)
    logger.debug("how it failed", exc_info=error)
    return CallFailed(500, "Something failed here.", code="internal_error")


def _too_late(what: str, seconds: float) -> CallFailed:
    return CallFailed(504, f"There was not {what} within {seconds:.3g} seconds.", code="timeout")


def _characters(prompt: Prompt) -> int:
    return len(prompt.text or "") + sum(len(turn.text) for turn in prompt.messages)


def _plain(text: str) -> str:
    """A text that a header may have."""
    shown = text.encode("ascii", errors="backslashreplace").decode()
    return "".join(one if one.isprintable() else "?" for one in shown)[:_WARNING_CHARACTERS]


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _nothing() -> Any:
    return {"type": "http.disconnect"}


async def _ended(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancels what is not done, and waits until it has let go of what it holds."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
