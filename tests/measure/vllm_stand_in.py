"""A stand-in for the module ``vllm``: its interface, computing with transformers, row by row.

It keeps vLLM's rules: a row and one more token must fit ``max_model_len``, ``max_tokens`` is at
least 1, the first position has no log-probability, the prompt's token and the most likely one
are both given, and a stop text ends an answer without being in it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from enum import Enum
from types import ModuleType
from typing import Any

import torch


@dataclass
class SamplingParams:
    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: list[str] | None = None
    stop_token_ids: list[int] | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    output_kind: Any = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or not 0 < self.top_p <= 1 or self.temperature < 0:
            raise ValueError("out of range")


@dataclass
class Logprob:
    logprob: float
    rank: int


@dataclass
class CompletionOutput:
    text: str
    token_ids: list[int]
    finish_reason: str


@dataclass
class RequestOutput:
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None


@dataclass
class Engine:
    model: str
    tokenizer: str
    dtype: str
    load_format: str
    max_model_len: int
    generation_config: str
    gpu_memory_utilization: float
    asked: list[tuple[list[int], SamplingParams]] = field(default_factory=list)

    def __post_init__(self) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.net: Any = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)
        self.words: Any = AutoTokenizer.from_pretrained(self.tokenizer)

    def generate(
        self, prompts: list[Any], parameters: list[SamplingParams], *, use_tqdm: bool
    ) -> list[RequestOutput]:
        assert len(prompts) == len(parameters)
        rows = [list(prompt["prompt_token_ids"]) for prompt in prompts]
        if any(len(row) >= self.max_model_len for row in rows):
            raise ValueError("the prompt is longer than the maximum model length")
        self.asked += zip(rows, parameters, strict=True)
        return [self.answer(row, how) for row, how in zip(rows, parameters, strict=True)]

    @torch.no_grad()
    def logprobs(self, ids: list[int]) -> torch.Tensor:
        return self.net(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(dim=1)

    def answer(self, ids: list[int], how: SamplingParams) -> RequestOutput:
        seen: list[dict[int, Logprob] | None] | None = None
        if how.prompt_logprobs is not None:
            seen = [None]
            for token, row in zip(ids[1:], self.logprobs(ids), strict=False):
                found = {token: Logprob(float(row[token]), int((row >= row[token]).sum()))}
                best = row.topk(how.prompt_logprobs)
                for rank, (value, place) in enumerate(zip(*best, strict=True), start=1):
                    found[int(place)] = Logprob(float(value), rank)
                seen.append(found)
        said: list[int] = []
        random = torch.Generator().manual_seed(how.seed or 0)
        text, reason = "", "length"
        while len(said) < how.max_tokens and len(ids) + len(said) < self.max_model_len:
            shares = self.logprobs([*ids, *said])[-1]
            if how.temperature == 0:
                token = int(shares.argmax())
            else:
                token = self.drawn((shares / how.temperature).softmax(dim=0), how.top_p, random)
            said.append(token)
            if how.detokenize:
                text = self.words.decode(said, skip_special_tokens=True)
            stops = [text.find(one) for one in how.stop or () if one in text]
            if token in (how.stop_token_ids or ()) or stops:
                reason = "stop"
                text = text[: min(stops)] if stops else text
                break
        return RequestOutput([CompletionOutput(text, said, reason)], seen)

    def drawn(self, shares: torch.Tensor, top_p: float, random: torch.Generator) -> int:
        ordered, tokens = shares.sort(descending=True)
        ordered[ordered.cumsum(0) - ordered >= top_p] = 0.0
        return int(tokens[torch.multinomial(ordered, 1, generator=random)])


def module() -> ModuleType:
    """What ``import vllm`` would give."""
    made: Any = ModuleType("vllm")
    made.LLM, made.SamplingParams, made.__version__ = Engine, SamplingParams, "stand-in"
    made.AsyncLLMEngine, made.AsyncEngineArgs = AsyncEngine, AsyncEngineArgs
    return made


class RequestOutputKind(Enum):
    CUMULATIVE, DELTA, FINAL_ONLY = range(3)


def parameters_module() -> ModuleType:
    """What ``import vllm.sampling_params`` would give."""
    made: Any = ModuleType("vllm.sampling_params")
    made.RequestOutputKind, made.SamplingParams = RequestOutputKind, SamplingParams
    return made


@dataclass
class AsyncEngineArgs:
    model: str
    tokenizer: str
    dtype: str
    load_format: str
    max_model_len: int
    generation_config: str
    gpu_memory_utilization: float
    disable_log_stats: bool


class AsyncEngine:
    """Says an answer token by token, in the loop that first asked it, until the caller leaves.

    A stop text is never begun: what may become one is held, as vLLM does.
    """

    def __init__(self, given: AsyncEngineArgs) -> None:
        fields = {name: value for name, value in vars(given).items() if "log" not in name}
        self.inner = Engine(**fields)
        self.loop: Any = None
        self.under_way: set[str] = set()
        self.most, self.aborted, self.ended = 0, list[str](), False
        self.fails = False

    @classmethod
    def from_engine_args(cls, given: AsyncEngineArgs) -> AsyncEngine:
        return cls(given)

    async def generate(
        self, prompt: Any, how: SamplingParams, request_id: str
    ) -> AsyncIterator[RequestOutput]:
        here = asyncio.get_running_loop()
        self.loop = self.loop or here
        assert self.loop is here, "one engine, one loop"
        assert how.output_kind is RequestOutputKind.DELTA
        assert request_id not in self.under_way
        self.under_way.add(request_id)
        self.most = max(self.most, len(self.under_way))
        try:
            if self.fails:
                raise RuntimeError(f"out of memory at {prompt}")
            whole = self.inner.answer(prompt["prompt_token_ids"], how).outputs[0]
            sent = ""
            for place in range(1, len(whole.token_ids) + 1):
                await asyncio.sleep(0.002)
                last = place == len(whole.token_ids)
                text = self.inner.words.decode(whole.token_ids[:place], skip_special_tokens=True)
                held = max((len(one) for one in how.stop or ()), default=1) - 1
                text = text.rstrip("\ufffd")
                text = whole.text if last else whole.text[: max(0, len(text) - held)]
                new = text[len(sent) :] if text.startswith(sent) else ""
                sent += new
                reason = whole.finish_reason if last else None
                yield RequestOutput(
                    [CompletionOutput(new, [whole.token_ids[place - 1]], reason)], None
                )
        except (asyncio.CancelledError, GeneratorExit):
            self.aborted.append(request_id)
            raise
        finally:
            self.under_way.discard(request_id)

    def shutdown(self) -> None:
        self.ended = True
