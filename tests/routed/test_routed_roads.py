"""Rows of one batch with different adapters answer as plain models with these merged do."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from routers import (
    ANSWERS,
    PROMPTS,
    REQUESTS,
    adapter,
    bare,
    by_hand,
    detector,
    gate,
    merged,
    said,
    scored,
)

from delible.api import unlearn
from delible.errors import ModelError, RecipeError
from delible.intervene.system import intervened
from delible.lm.body import ROADS, Road
from delible.records import QA, ForgetRequest
from delible.routed.detector import Detector
from delible.routed.requests import Member, RequestRouter
from delible.routed.system import Routed, routed
from delible.routed.texts import Asked
from delible.system.asks import Decoding, Distribution, Hidden, Prompt, Score
from delible.systems.serving import responder

FAMILIES = ("llama", "gpt2", "qwen2_moe")
TOKENS = 5


def expected(lm: Any, found: Routed, prompt: Prompt, loads: str = "own") -> Any:
    """The bare module with what this prompt gets merged into its matrices."""
    text = prompt.messages[-1].text if prompt.messages else prompt.text or ""
    weights = gate(text)
    adapters = [one.adapter for one in found.router.parts]  # type: ignore[attr-defined]
    if prompt.adapter is not None:
        weights = [float(name == prompt.adapter) for name in REQUESTS]
    if loads == "cumulative":
        return merged(lm, adapters[-1:], [max(weights)])
    return merged(lm, adapters, weights)


def require_all(lm: Any, found: Routed, prompts: list[Prompt], loads: str = "own") -> None:
    modules = [expected(lm, found, prompt, loads) for prompt in prompts]
    requests = [Score(prompt, answer) for prompt in prompts for answer in ANSWERS]
    scores = found.score(requests)
    for place, (request, score) in enumerate(zip(requests, scores, strict=True)):
        row = lm.template.encode(request.prompt, request.answer)
        wanted = scored(modules[place // len(ANSWERS)], row)
        np.testing.assert_allclose(score.logprobs, wanted, atol=5e-5, rtol=1e-4)
    answers = [said(lm, module, p, TOKENS) for module, p in zip(modules, prompts, strict=True)]
    assert found.generate(prompts, Decoding(TOKENS)) == answers
    assert [found.generate([one], Decoding(TOKENS))[0] for one in prompts] == answers


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_is_that_of_merged_models(family: str) -> None:
    lm = bare(family)
    found = by_hand(lm)
    before = lm.generate(PROMPTS, Decoding(TOKENS))
    require_all(lm, found, PROMPTS)
    assert lm.generate(PROMPTS, Decoding(TOKENS)) == before
    assert sum(map(len, (one._forward_hooks for one in lm.core.modules()))) == 0
    hidden = found.inspect([Hidden(one, "No", 1) for one in PROMPTS])
    whole = found.inspect([Distribution(one, "No") for one in PROMPTS])
    plain = lm.inspect([Distribution(one, "No") for one in PROMPTS])
    for prompt, states, logprobs, other in zip(PROMPTS, hidden, whole, plain, strict=True):
        row, module = lm.template.encode(prompt, "No"), expected(lm, found, prompt)
        with torch.no_grad():
            every = module(torch.tensor([row.ids]), output_hidden_states=True)
        wanted = every.logits[0].log_softmax(1)[row.start - 1 : -1].numpy()
        np.testing.assert_allclose(logprobs, wanted, atol=5e-5, rtol=1e-4)
        assert states.shape == (row.answer_tokens, lm.anatomy.hidden_size)
        assert np.allclose(logprobs, other, atol=1e-6) != any(gate(prompt.messages[-1].text))


@pytest.mark.parametrize(
    ("road", "loads"), [*((road, "own") for road in get_args(Road)), ("trees", "cumulative")]
)
def test_every_road_gives_the_same(road: Road, loads: Any) -> None:
    lm = bare("llama")
    found = by_hand(lm, loads)
    found.road, found.grows_trees = road, road == "trees"
    found.shares_prefix = road in ROADS[:2]
    require_all(lm, found, PROMPTS, loads)


def test_a_question_can_name_a_request_and_an_unknown_one_is_refused() -> None:
    lm = bare("llama")
    found = by_hand(lm)
    asked = [
        Prompt(one.messages, adapter=name)
        for one, name in zip(
            PROMPTS, (REQUESTS[1], "", None, REQUESTS[0], REQUESTS[0]), strict=True
        )
    ]
    require_all(lm, found, asked)
    with pytest.raises(ModelError, match=r"no adapter 'who'.*It has: aaaaaaaa, bbbbbbbb"):
        found.generate([Prompt(PROMPTS[0].messages, adapter="who")], Decoding(2))


def test_served_rows_have_their_own_adapters() -> None:
    lm = bare("llama")
    found = by_hand(lm)
    named = Prompt(PROMPTS[4].messages, adapter=REQUESTS[1])
    prompts = (*PROMPTS, named)
    wanted = [said(lm, expected(lm, found, prompt), prompt, 8) for prompt in prompts]
    served = responder(found)

    async def every() -> list[str]:
        calls = (served.respond(one, Decoding(8)) for one in prompts)
        return [reply.text for reply in await asyncio.gather(*calls)]

    try:
        assert asyncio.run(every()) == wanted
    finally:
        served.close()  # type: ignore[attr-defined]


def test_a_closed_gate_is_the_bare_model_bit_by_bit() -> None:
    lm = bare("llama")
    found = by_hand(lm)
    closed = [PROMPTS[2], PROMPTS[4]]
    for mine, theirs in zip(
        found.score([Score(one, "In Ob") for one in closed]),
        lm.score([Score(one, "In Ob") for one in closed]), strict=True,
    ):  # fmt: skip
        assert np.array_equal(mine.logprobs, theirs.logprobs)
    # a row with weight 0 beside one with another: what is added to it is exactly 0
    for path in ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"):
        module, seen = lm.core.get_submodule(path), list[Any]()

        def keep(_: Any, given: Any, out: Any, seen: list[Any] = seen) -> None:
            seen.append((given[0], out.clone()))

        with module.register_forward_hook(keep):
            found.score([Score(PROMPTS[0], "In"), Score(PROMPTS[4], "In")])
        received, out = seen[-1]
        with torch.no_grad():
            plain = torch.nn.functional.linear(received.clone(), module.weight, module.bias)
        same = (plain == out.clone()).reshape(-1, out.shape[-1]).all(1)
        assert bool(same.any())
        assert not bool(same.all())


def test_the_gate_is_asked_once_for_each_prompt() -> None:
    found = by_hand(bare("llama"))
    for _ in range(2):
        found.generate(PROMPTS, Decoding(6))
        found.score([Score(one, "In Ob") for one in PROMPTS])
    asked = found.asked_of_the_gate  # type: ignore[attr-defined]
    assert len(asked) == len(set(asked)) == len(PROMPTS)


def test_a_beginning_is_shared_where_all_get_the_same() -> None:
    lm = bare("llama")
    found = by_hand(lm)
    ids = [lm.template.prompt_ids(one) for one in PROMPTS]
    assert found.alike(7, lambda: [ids[2], ids[4]]) == 7
    assert found.alike(7, lambda: [ids[0], ids[4]]) == 0
    assert found.alike(7, lambda: [ids[0], ids[0]]) == 7


def test_what_is_read_is_what_was_asked() -> None:
    template = bare("llama").template
    read = Asked(template)
    for text in ("Who is Ada?", " Two\nlines "):
        assert read(template.prompt_ids(Prompt.ask(text))) == (text.strip(),)
    with_prefill = template.prompt_ids(Prompt.ask("Who is Ada?", prefill="She is"))
    assert read(with_prefill) == ("Who is Ada?\nShe is", "Who is Ada?", "She is")
    assert read(template.prompt_ids(Prompt(text="Ada was"))) == ("Ada was",)
    turns = Prompt.ask("Who is Ada?").messages
    talk = Prompt((*turns, type(turns[0])(role="assistant", content="A poet"), *turns))
    assert read(template.prompt_ids(talk)) == (
        "Who is Ada?\nA poet\nWho is Ada?", "Who is Ada?", "A poet"
    )  # fmt: skip
    told = Prompt((type(turns[0])(role="system", content="Be brief."), *turns))
    assert read(template.prompt_ids(told)) == ("Be brief.\nWho is Ada?", "Be brief.", "Who is Ada?")


@pytest.mark.parametrize(("loads", "wanted"), [("own", [[0.9, 0.4], [0.0, 0.4], [0.0, 0.0]]),
                                               ("cumulative", [[0.9], [0.4], [0.0]])])  # fmt: skip
def test_the_turn_that_opens_a_gate_most_counts(loads: Any, wanted: list[list[float]]) -> None:
    lm = bare("llama")

    class Sure(Detector):
        def weights(self, vectors: Any) -> Any:
            return vectors[:, 0, int(self.tensors["numbers"][0])]

    class Read:
        identity = "by hand"

        def __call__(self, texts: Any, *_: Any) -> Any:
            return np.array([[[0.9 * (one == "Ada?"), 0.4 * (one == "Bo?")]] for one in texts])

    parts = [
        Member(name, adapter(lm, place), Sure(**vars(detector(place))))
        for place, name in enumerate(REQUESTS)
    ]
    acting: Any = routed(lm, RequestRouter(parts, loads, lm.identity)).acting
    acting._sources = {("states", None): Read()}
    ada, bo = (Prompt.ask(text).messages[0] for text in ("Ada?", "Bo?"))
    talk = Prompt((ada, type(ada)(role="assistant", content="A poet"), bo))
    asked = [lm.template.prompt_ids(one) for one in (talk, Prompt.ask("Bo?"), Prompt.ask("Cy?"))]
    np.testing.assert_allclose(acting.weights(asked), wanted)


def test_fingerprint_follows_whatever_changes_answers() -> None:
    lm = bare("llama")
    found = by_hand(lm)
    router = found.router
    assert isinstance(router, RequestRouter)
    others = [
        router.without([REQUESTS[0]]),
        RequestRouter(router.parts[::-1], "own", lm.identity),
        RequestRouter(router.parts, "cumulative", lm.identity),
        router.extended(type(router.parts[0])("c", adapter(lm, 9), router.parts[0].detector)),
    ]
    prints = {found.fingerprint, lm.fingerprint, *(Routed(lm, one).fingerprint for one in others)}
    assert len(prints) == 6
    assert by_hand(lm).fingerprint == found.fingerprint


def test_copies_are_independent_and_other_weights_are_refused() -> None:
    lm = bare("llama")
    found = by_hand(lm)
    twin = found.copy()
    with torch.no_grad():
        twin.bare.core.get_submodule("model.layers.0.mlp.down_proj").weight.mul_(2)
    twin.touch()
    assert twin.fingerprint != found.fingerprint
    with pytest.raises(ModelError, match="another model"):
        routed(twin.bare, found.router)
    with pytest.raises(ModelError, match="no more can act above"):
        intervened(found, [])
    assert found.taken_off() == ("router", lm)


def test_training_that_could_not_be_kept_is_refused_before_any_work(tmp_path: Path) -> None:
    request = ForgetRequest(forget=(QA(question="Who is Ada?", answer="A painter"),))
    with pytest.raises(RecipeError, match="not in the weights"):
        unlearn(by_hand(bare("llama")), request, method="gradient_ascent", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
