"""Generation in batches: what comes out depends on the prompt alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from delible.lm import decode, speaker
from delible.lm.body import Road
from delible.lm.decode import _closed_up
from delible.lm.lm import LM
from delible.lm.roomy import RoomyLayer
from delible.lm.speaker import Row
from delible.system.asks import (
    Decoding,
    Distribution,
    GradientNorm,
    Hidden,
    NoAnswer,
    Prompt,
    Score,
    TokenScores,
)
from delible.testing.tiny import FAMILIES, tiny_model, tiny_tokenizer

PROMPTS = [
    Prompt.ask("Where was Ada Norrby born?"),
    Prompt.ask("Who?"),
    Prompt.ask("Which prize did the painter win, and in which year was it given to her?"),
    Prompt.ask("Name a river.", prefill="The river"),
    Prompt(text="Once upon a time"),
]


def lm_of(family: str = "llama") -> LM:
    return LM(tiny_model(family), tiny_tokenizer(), precision="float32")


def greedy_by_hand(lm: LM, prompt: Prompt, steps: int) -> list[int]:
    """One row, the whole model, no cache."""
    ids = list(lm.template.prompt_ids(prompt))
    start = len(ids)
    for _ in range(steps):
        token = int(lm.core(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token in lm.ends:
            break
        ids.append(token)
    return ids[start:]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_those_of_the_plain_model(family: str) -> None:
    lm = lm_of(family)
    found = lm.generate(PROMPTS, Decoding(12))
    with torch.inference_mode():
        for prompt, text in zip(PROMPTS, found, strict=True):
            expected = lm.tokenizer.decode(greedy_by_hand(lm, prompt, 12), skip_special_tokens=True)
            assert text == expected.strip()


def test_the_last_rows_take_the_places_of_those_that_leave() -> None:
    assert _closed_up([True, False, True, False, True, True]) == [0, 5, 2, 4]
    assert _closed_up([True, True, False]) == [0, 1]
    assert _closed_up([False, False]) == []


def test_rows_that_end_leave_the_batch_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = lm_of()
    spoken = {greedy_by_hand(lm, prompt, 12)[3] for prompt in PROMPTS[:3]}
    monkeypatch.setattr(type(lm), "ends", frozenset(spoken))  # rows end after 1 to 4 tokens
    expected = [greedy_by_hand(lm, prompt, 12) for prompt in PROMPTS]
    assert len({len(ids) for ids in expected}) > 1
    widths = []
    backbone = lm.core.get_submodule(lm.anatomy.backbone)
    hook = backbone.register_forward_hook(
        lambda module, args, kwargs, out: widths.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    found = lm.generate(PROMPTS, Decoding(12))
    hook.remove()
    assert found == [lm.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in expected]
    assert widths[-1] < len(PROMPTS)


def test_an_answer_is_cut_before_a_stop_text() -> None:
    lm = lm_of()
    whole = str(lm.generate(PROMPTS[:1], Decoding(12))[0])
    stop = whole[3:5]
    expected = whole.partition(stop)[0].strip()
    assert lm.generate(PROMPTS[:1], Decoding(12, stop=(stop,))) == [expected]


def test_draws_depend_on_seed_and_prompt_not_on_the_batch() -> None:
    lm = lm_of()
    decoding = Decoding(8, temperature=1.0, top_p=0.9, seed=3)
    together = lm.generate(PROMPTS, decoding)
    assert together == [lm.generate([prompt], decoding)[0] for prompt in PROMPTS]
    other = Decoding(8, temperature=1.0, top_p=0.9, seed=4)
    assert together != lm.generate(PROMPTS, other)


def test_draws_have_the_frequencies_of_the_softmax() -> None:
    lm = lm_of()
    prompt = PROMPTS[0]
    ids = torch.tensor([lm.template.prompt_ids(prompt)])
    with torch.inference_mode():
        logits = lm.core(input_ids=ids).logits[0, -1].double()
    top = int(logits.argmax())
    share = float((logits / 0.5).softmax(0)[top])
    word = lm.tokenizer.decode([top], skip_special_tokens=True).strip()
    same_text = [
        token
        for token in range(len(logits))
        if lm.tokenizer.decode([token], skip_special_tokens=True).strip() == word
    ]
    share = float((logits / 0.5).softmax(0)[same_text].sum())
    draws = [
        lm.generate([prompt], Decoding(1, temperature=0.5, seed=seed))[0] == word
        for seed in range(120)
    ]
    assert np.mean(draws) == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / 120) + 1e-9)


def test_a_tiny_top_p_is_greedy() -> None:
    lm = lm_of()
    drawn = lm.generate(PROMPTS, Decoding(6, temperature=1.0, top_p=1e-9, seed=1))
    assert drawn == lm.generate(PROMPTS, Decoding(6))


def test_what_cannot_be_answered_says_why() -> None:
    lm = lm_of()
    long = Prompt.ask("long " * 3000)
    generated = lm.generate([PROMPTS[0], long], Decoding(2))
    assert isinstance(generated[0], str)
    assert isinstance(generated[1], NoAnswer)
    assert "longer than" in generated[1].reason
    scored = lm.score([Score(PROMPTS[0], "a"), Score(long, "a")])
    assert isinstance(scored[0], TokenScores)
    assert isinstance(scored[1], NoAnswer)
    with torch.no_grad():
        lm.core.get_output_embeddings().weight[5] = torch.nan
    assert "finite" in lm.score([Score(PROMPTS[0], "a")])[0].reason  # type: ignore[union-attr]
    assert isinstance(lm.generate(PROMPTS[:1], Decoding(2))[0], NoAnswer)
    assert isinstance(lm.inspect([Distribution(PROMPTS[0], "a")])[0], NoAnswer)


@pytest.mark.parametrize("road", ["trees", "plain"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_answer_ends_where_the_context_is_full(
    family: str, road: Road, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = lm_of(family)
    lm.model.eval()
    lm.road = road
    monkeypatch.setattr(speaker, "_stops", lambda *_: False)
    monkeypatch.setattr(type(lm), "ends", frozenset[int]())  # so that nothing else ends an answer
    prompts = [[7] * (lm.context - left) for left in (6, 3)]
    rows = [Row(Decoding(20)) for _ in prompts]
    with torch.inference_mode():
        decode.speak(lm, rows, prompts)
    assert [(len(row.said), row.finish) for row in rows] == [(6, "length"), (3, "length")]


# ---- white-box values, against the whole model in float64


def by_hand(lm: LM, prompt: Prompt, answer: str) -> tuple[torch.Tensor, torch.Tensor]:
    """All log-probabilities at the answer's tokens [answer, vocab], and the tokens."""
    row = lm.template.encode(prompt, answer)
    ids = torch.tensor([row.ids])
    logits = lm.core.double()(input_ids=ids).logits[0, row.start - 1 : -1]
    lm.core.float()
    return logits.log_softmax(dim=1), ids[0, row.start :]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_inspections_equal_the_definitions(family: str) -> None:
    lm = lm_of(family)
    asked = [(PROMPTS[0], "In Port Laven."), (PROMPTS[1], "Nobody at all, I am sure of it.")]
    distributions = lm.inspect([Distribution(*one) for one in asked])
    layer = lm.anatomy.layers - 1
    hidden = lm.inspect([Hidden(*one, layer) for one in asked])
    moments = lm.score([Score(*one, moments=True) for one in asked])
    norms = lm.inspect([GradientNorm(*one) for one in asked])
    plain = lm.score([Score(*one) for one in asked])
    for place, one in enumerate(asked):
        every, tokens = by_hand(lm, *one)
        assert np.allclose(distributions[place], every.detach().numpy(), atol=1e-4)
        mean = (every.exp() * every).sum(dim=1)
        variance = (every.exp() * every.square()).sum(dim=1) - mean.square()
        found = moments[place]
        assert isinstance(found, TokenScores)
        assert np.allclose(found.means, mean.detach().numpy(), atol=1e-4)
        assert np.allclose(found.variances, variance.detach().numpy(), atol=1e-4)
        assert np.allclose(found.logprobs, plain[place].logprobs, atol=1e-5)
        assert np.array_equal(found.hits, plain[place].hits)
        row = lm.template.encode(*one)
        with torch.no_grad():
            output = lm.core(input_ids=torch.tensor([row.ids]), output_hidden_states=True)
        states = output.hidden_states[layer]  # the input of the last block
        before = lm.inspect([Hidden(*one, layer - 1)])[0]
        assert np.allclose(before, states[0, row.start - 1 : -1].numpy(), atol=1e-5)
        assert hidden[place].shape == before.shape
        parameters = list(lm.model.parameters())
        lm.model.double()
        logits = lm.core(input_ids=torch.tensor([row.ids])).logits[0, row.start - 1 : -1]
        kept = row.answer_tokens - 1
        losses = -logits.log_softmax(1).gather(1, tokens[:, None])[:kept, 0]
        gradients = torch.autograd.grad(losses.mean(), parameters, allow_unused=True)
        lm.model.float()
        used = [float(one.norm()) for one in gradients if one is not None]
        assert float(norms[place][0]) == pytest.approx(np.mean(used), rel=1e-4)


def test_inspecting_leaves_the_model_as_it_was() -> None:
    lm = lm_of()
    frozen = next(iter(lm.model.parameters()))
    frozen.requires_grad_(False)
    before, digest = [value.requires_grad for value in lm.model.parameters()], lm.fingerprint
    lm.inspect([GradientNorm(PROMPTS[0], "a")])
    assert [value.requires_grad for value in lm.model.parameters()] == before
    assert all(value.grad is None for value in lm.model.parameters())
    lm.touch()
    assert lm.fingerprint == digest


def test_the_cache_has_room_and_is_rarely_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("delible.lm.roomy.ROOM", 4)
    roomy, plain = RoomyLayer(), DynamicLayer()
    places = set()
    for step in range(12):
        if step == 6:  # two rows leave, and the last takes the place of the second
            for layer in (roomy, plain):
                layer.batch_select_indices(torch.tensor([0, 3]))
        if step == 10:
            for layer in (roomy, plain):
                layer.batch_repeat_interleave(2)
        rows = 4 if step < 6 else 2 if step < 10 else 4
        new = [torch.randn(rows, 2, 3 if step == 0 else 1, 5) for _ in range(2)]
        found, expected = roomy.update(*new), plain.update(*new)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        assert roomy.get_seq_length() == plain.get_seq_length() == 3 + step
        places.add(roomy.keys.data_ptr())
    assert len(places) < 6


@pytest.mark.parametrize("family", FAMILIES)
def test_room_changes_no_text(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("delible.lm.roomy.ROOM", 3)
    lm = lm_of(family)
    found = lm.generate(PROMPTS, Decoding(12))
    monkeypatch.setattr(decode, "roomy_cache", lambda lm: DynamicCache(config=lm.core.config))
    assert lm.generate(PROMPTS, Decoding(12)) == found
