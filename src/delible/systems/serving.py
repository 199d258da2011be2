"""From a system that is asked in batches to one that many ask at once, and back.

A local model answers all calls under way in one batch, which they join and leave between two
tokens; a cancelled call leaves it. Any other system is handed the calls that wait together.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import torch

from delible.lm.adapters import check_name, wearing
from delible.lm.decode import Speaking
from delible.lm.lm import LM
from delible.lm.speaker import Row, said_by
from delible.lm.tools import CALL, said_and_called
from delible.messages import ToolCall
from delible.system.asks import Decoding, NoAnswer, Prompt
from delible.system.base import BlackBox, Responder, System
from delible.system.replies import (
    WITHHELD,
    FinishReason,
    Piece,
    Reply,
    ToolCallPiece,
    Unanswered,
    Usage,
)
from delible.systems.thoughts import settled


class Served:
    """A local model that answers concurrent calls in one batch.

    While it serves, the model is its own: ask it through this object only.

    Args:
        lm: The model.
    """

    def __init__(self, lm: LM) -> None:
        self.lm, self.name = lm, lm.name
        self._inbox: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    async def respond(self, prompt: Prompt, decoding: Decoding) -> Reply:
        """The whole answer; cancelling the call frees its row."""
        return await whole_of(self.stream(prompt, decoding))

    async def stream(self, prompt: Prompt, decoding: Decoding) -> AsyncIterator[Piece]:
        """The answer as it is spoken: no character is taken back, no stop text is begun.

        Calls of tools come with the last piece.
        """
        tools = prompt.tools and prompt.tool_choice != "none"
        if tools and not self.lm.template.calls_are_known:
            raise Unanswered("in which form this model calls tools is not known here.", status=400)
        ids = self.lm.template.prompt_ids(prompt)
        room = self.lm.template.max_length - 1
        if len(ids) > room:
            raise Unanswered(f"the prompt is longer than {room} tokens.", status=400)
        if prompt.adapter is not None:
            check_name(self.lm, prompt.adapter)
        seed = f"{decoding.seed}/{self.lm.template.render(prompt)}"
        row = Row(decoding, seed, adapter=prompt.adapter)
        call = _Call(row, ids, asyncio.get_running_loop(), calls=bool(tools))
        self._start()
        self._inbox.put(call)
        try:
            while True:
                piece = await call.pieces.get()
                if isinstance(piece, Unanswered):
                    raise piece
                yield piece
                if piece.finish is not None:
                    return
        finally:
            call.left = True

    def close(self) -> None:
        """Ends the thread once nobody is speaking any more."""
        if self._thread is not None:
            self._inbox.put(None)
            self._thread.join()
            self._thread = None

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="delible-serving", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        with torch.inference_mode(), self.lm.evaluating(), self.lm.computing():
            self._serve()

    def _serve(self) -> None:
        waiting, speaking = deque[_Call](), Speaking(self.lm)
        calls: dict[Row, _Call] = {}
        open_ = True
        while open_ or waiting or calls:
            idle = not waiting and not calls
            with contextlib.suppress(queue.Empty):
                while (call := self._inbox.get(block=idle)) is not None:
                    waiting.append(call)
                    idle = False
                open_ = False
            try:
                self._turn(speaking, waiting, calls)
            except Exception as error:  # whoever is speaking is told; the others go on
                for call in calls.values():
                    call.fail(f"the model failed: {error}")
                calls.clear()
                speaking = Speaking(self.lm)

    def _turn(self, speaking: Speaking, waiting: deque[_Call], calls: dict[Row, _Call]) -> None:
        """Lets rows go, takes rows in, and speaks one token."""
        gone = [call for call in calls.values() if call.left]
        for call in gone:
            call.row.finish = "stop"
            del calls[call.row]
        if gone:
            speaking.leave()
        new = self._admitted(speaking, waiting, calls)
        if new:
            calls.update((call.row, call) for call in new)
            for adapter in dict.fromkeys(call.row.adapter for call in new):
                mine = [call for call in new if call.row.adapter == adapter]
                with wearing(self.lm, adapter):
                    speaking.join([call.row for call in mine], [call.ids for call in mine])
        if speaking.goes_on:
            speaking.step()
        for call in list(calls.values()):
            call.tell(self.lm)
            if call.row.finish is not None:
                del calls[call.row]

    def _admitted(
        self, speaking: Speaking, waiting: deque[_Call], calls: dict[Row, _Call]
    ) -> list[_Call]:
        """Calls that find room now, in the order they came."""
        found: list[_Call] = []
        budget = self.lm.budget
        longest = max((call.length for call in calls.values()), default=0)
        while waiting and speaking.takes_more:
            call = waiting[0]
            if call.left:
                waiting.popleft()
                continue
            longest = max(longest, call.length)
            count = len(calls) + len(found) + 1
            if count > 1 and (count > budget.rows or count * longest > budget.cached_tokens):
                break
            found.append(waiting.popleft())
        return found


@dataclass(eq=False)
class _Call:
    """A call under way: its row, and where its pieces go."""

    row: Row
    ids: Sequence[int]
    loop: asyncio.AbstractEventLoop
    pieces: asyncio.Queue[Piece | Unanswered] = field(default_factory=asyncio.Queue)
    calls: bool = False
    told: str = ""
    left: bool = False

    @property
    def length(self) -> int:
        return len(self.ids) + self.row.decoding.max_new_tokens

    def tell(self, lm: LM) -> None:
        """Sends what can no longer change."""
        if self.row.finish == "broken":
            self.fail("the model's logits are not numbers.")
            return
        stop = self.row.decoding.stop
        if self.row.finish is None:
            text = said_by(lm, self.row.said, stop, stripped=False)
            if self.calls:  # nothing of a call is shown as text
                text, stop = text.partition(CALL)[0], (*stop, CALL)
            text = settled(text, stop)
            if len(text) <= len(self.told) or not text.startswith(self.told):
                return
            self._send(Piece(text[len(self.told) :]))
            self.told = text
            return
        text = said_by(lm, self.row.said, stop)
        text, calls = said_and_called(text) if self.calls else (text, ())
        finish: FinishReason = "length" if self.row.finish == "length" else "stop"
        if calls:
            finish = "tool_calls"
        usage = Usage(len(self.ids), len(self.row.said))
        called = tuple(
            ToolCallPiece(index, one.id, one.name, one.arguments) for index, one in enumerate(calls)
        )
        self._send(Piece(text[len(self.told) :], finish, usage, called))

    def fail(self, reason: str) -> None:
        self._send(Unanswered(reason))

    def _send(self, piece: Piece | Unanswered) -> None:
        with contextlib.suppress(RuntimeError):  # the loop of a caller that is gone is closed
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, piece)


class Gathered:
    """Any other system: calls that wait together are one batch, answers come whole."""

    def __init__(self, system: System) -> None:
        self.system, self.name = system, system.name
        self._waiting: list[tuple[Prompt, Decoding, asyncio.Future[str | NoAnswer]]] = []
        self._task: asyncio.Task[None] | None = None

    async def respond(self, prompt: Prompt, decoding: Decoding) -> Reply:
        """The whole answer; a call that is cancelled before its batch begins is not asked."""
        if prompt.tools:
            raise Unanswered("this system answers in texts, and cannot call tools.", status=400)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[str | NoAnswer] = loop.create_future()
        self._waiting.append((prompt, decoding, future))
        if self._task is None or self._task.done():
            self._task = loop.create_task(self._work())
        answer = await future
        if isinstance(answer, NoAnswer):
            raise Unanswered(answer.reason)
        return Reply(answer)

    async def stream(self, prompt: Prompt, decoding: Decoding) -> AsyncIterator[Piece]:
        """The whole answer as one piece."""
        reply = await self.respond(prompt, decoding)
        yield Piece(reply.text, reply.finish, reply.usage)

    async def _work(self) -> None:
        while self._waiting:
            decoding = self._waiting[0][1]
            batch = [one for one in self._waiting if one[1] == decoding]
            self._waiting = [one for one in self._waiting if one[1] != decoding]
            batch = [one for one in batch if not one[2].cancelled()]
            if not batch:
                continue
            prompts = [prompt for prompt, _, _ in batch]
            try:
                answers = await asyncio.to_thread(self.system.generate, prompts, decoding)
            except Exception as error:  # each caller is told
                answers = [NoAnswer(f"the system failed: {error}")] * len(batch)
            for (_, _, future), answer in zip(batch, answers, strict=True):
                if not future.cancelled():
                    future.set_result(answer)


class Waiting(BlackBox):
    """A responder, asked in batches: all calls are under way at once."""

    def __init__(self, responder: Responder, fingerprint: str | None = None) -> None:
        self.responder, self.name, self.fingerprint = responder, responder.name, fingerprint

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str | NoAnswer]:
        """Answers, in the order of the prompts."""

        async def one(prompt: Prompt) -> str | NoAnswer:
            try:
                reply = await self.responder.respond(prompt, decoding)
                withheld = reply.finish == "content_filter" and not reply.text
                return NoAnswer(WITHHELD) if withheld else reply.text
            except Unanswered as error:
                return NoAnswer(error.problem)

        async def every() -> list[str | NoAnswer]:
            return list(await asyncio.gather(*(one(prompt) for prompt in prompts)))

        return asyncio.run(every())


def responder(system: System | Responder) -> Responder:
    """What answers many at once: the system itself, a served model, or gathered calls."""
    if isinstance(system, Responder):
        return system
    if isinstance(system, LM) and system.road != "plain":  # on that road rows go one by one
        return Served(system)
    return Gathered(system)


async def whole_of(pieces: AsyncIterator[Piece]) -> Reply:
    """The reply whose pieces these are.

    Raises:
        Unanswered: They have no end.
    """
    texts: list[str] = []
    async for piece in pieces:
        texts.append(piece.text)
        if piece.finish is not None:
            calls = tuple(
                ToolCall(id=one.id, name=one.name, arguments=one.arguments)
                for one in piece.tool_calls
            )
            return Reply("".join(texts), piece.finish, piece.usage or Usage(), calls)
    raise Unanswered("the answer broke off.")


__all__ = ["Gathered", "Served", "Waiting", "responder", "settled", "whole_of"]
