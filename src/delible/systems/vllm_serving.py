"""vLLM as a system that serves: ``delible serve vllm:MODEL``.

The same model, template and options as in :mod:`delible.systems.vllm`, in vLLM's asynchronous
engine: rows join and leave its batch, and a call that is cancelled leaves it. The engine lives in
an event loop of its own, so that it can be asked from any other, and from none. It gives no scores.

It was tested with vLLM 0.32 on a processor, and with a stand-in; not on a GPU.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from importlib import import_module
from typing import Any

from delible.lm.tools import CALL, said_and_called
from delible.system.asks import Decoding, NoAnswer, Prompt
from delible.system.replies import FinishReason, Piece, Reply, ToolCallPiece, Unanswered, Usage
from delible.systems.serving import Waiting, settled, whole_of
from delible.systems.vllm import VLLM


class ServingVLLM(VLLM):
    """A model in vLLM's asynchronous engine; made by :meth:`load`."""

    capabilities = frozenset({"generate"})
    memory_share = 0.9

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="delible-vllm", daemon=True
        )
        self._thread.start()

    @classmethod
    def _engine(cls, module: Any, arguments: dict[str, Any]) -> Any:
        made = module.AsyncEngineArgs(disable_log_stats=True, **arguments)
        return module.AsyncLLMEngine.from_engine_args(made)

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str | NoAnswer]:
        """Answers, all of them under way at once."""
        return Waiting(self).generate(prompts, decoding)

    def score(self, requests: Sequence[Any]) -> Any:
        """Nothing.

        Raises:
            TypeError: Always: what serves gives no scores.
        """
        raise TypeError("this system answers, but gives no scores")

    async def respond(self, prompt: Prompt, decoding: Decoding) -> Reply:
        """The whole answer; cancelling the call frees its row."""
        return await whole_of(self.stream(prompt, decoding))

    async def stream(self, prompt: Prompt, decoding: Decoding) -> AsyncIterator[Piece]:
        """The answer as it is spoken: no character is taken back, no stop text is begun.

        Calls of tools come with the last piece.

        Raises:
            Unanswered: The prompt is too long, tools cannot be called, or the engine failed.
        """
        tools = bool(prompt.tools) and prompt.tool_choice != "none"
        if tools and not self.template.calls_are_known:
            raise Unanswered("in which form this model calls tools is not known here.", status=400)
        ids = self.template.prompt_ids(prompt)
        room = self.template.max_length - 1
        if len(ids) > room:
            raise Unanswered(f"the prompt is longer than {room} tokens.", status=400)
        stop = (*decoding.stop, CALL) if tools else decoding.stop
        text, told, count = "", "", 0
        outputs = self._outputs(ids, self._speaking(prompt, decoding))
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                text += output.text
                count += len(output.token_ids)
                if output.finish_reason is not None:
                    yield self._last(text, told, output, decoding, tools, Usage(len(ids), count))
                    return
                sure = settled(_cut(text, stop), stop)
                if len(sure) > len(told):
                    yield Piece(sure[len(told) :])
                    told = sure
        raise Unanswered("the answer broke off.")

    def _last(
        self, text: str, told: str, output: Any, decoding: Decoding, tools: bool, usage: Usage
    ) -> Piece:
        text = _cut(text, decoding.stop).strip()
        text, calls = said_and_called(text) if tools else (text, ())
        finish: FinishReason = "length" if output.finish_reason == "length" else "stop"
        if calls:
            finish = "tool_calls"
        called = tuple(
            ToolCallPiece(index, one.id, one.name, one.arguments) for index, one in enumerate(calls)
        )
        return Piece(text[len(told) :], finish, usage, called)

    def _speaking(self, prompt: Prompt, decoding: Decoding) -> Any:
        """The engine's parameters of one answer that is told in pieces."""
        found = self._drawing(prompt, decoding)
        found.output_kind = import_module("vllm.sampling_params").RequestOutputKind.DELTA
        return found

    async def _outputs(self, ids: Sequence[int], parameters: Any) -> AsyncGenerator[Any]:
        """What the engine says, from its loop to this one; closing this frees the row."""
        here = asyncio.get_running_loop()
        came: asyncio.Queue[Any] = asyncio.Queue()

        def say(one: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop of a caller that is gone is closed
                here.call_soon_threadsafe(came.put_nowait, one)

        work = asyncio.run_coroutine_threadsafe(self._spoken(ids, parameters, say), self._loop)
        try:
            while (one := await came.get()) is not None:
                if isinstance(one, Unanswered):
                    raise one
                yield one
        finally:
            work.cancel()

    async def _spoken(
        self, ids: Sequence[int], parameters: Any, say: Callable[[Any], None]
    ) -> None:
        try:
            outputs = self.engine.generate(
                {"prompt_token_ids": list(ids)}, parameters, uuid.uuid4().hex
            )
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    say(output.outputs[0])
        except Exception as error:  # its words may hold what was asked
            say(Unanswered(f"the engine failed ({type(error).__name__})."))
        finally:
            say(None)

    def close(self) -> None:
        """Ends the engine and its thread."""
        if self._thread.is_alive():
            self.engine.shutdown()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)


def _cut(text: str, stop: Sequence[str]) -> str:
    for one in stop:
        text = text.partition(one)[0]
    return text


__all__ = ["ServingVLLM"]
