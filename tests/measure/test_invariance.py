"""The exactness rule: how a measurement is carried out changes no value.

Batch sizes, padding, the order of requests, sharing of prefixes, the chunks of the engine and what
is on disk already are chosen by hypothesis; in fp32 nothing may differ by more than 1e-5. (Several
processes: ``test_processes.py``.)
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache

import numpy as np
import pytest
import torch
from every_kind import ANSWERS, PROMPTS, every_kind, require_equal, tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as draw

from delible.lm.body import Budget
from delible.lm.lm import LM
from delible.measure import engine
from delible.measure.cache import Cache
from delible.measure.engine import measure
from delible.system.asks import (
    Answer,
    Distribution,
    Generate,
    GradientNorm,
    Hidden,
    Request,
    Score,
)
from delible.testing.tiny import tiny_model, tiny_tokenizer

FAMILIES = ("llama", "gpt2", "gemma3", "mixtral")


@cache
def model(family: str) -> LM:
    return tiny(family)


@cache
def one_by_one(family: str) -> Mapping[Request, Answer]:
    """The values to agree with: every request alone, so that nothing is shared or padded."""
    lm, found = model(family), {}
    with settled(lm, sharing=False):
        for request in every_kind():
            found[request] = measure(lm, [request])[request]
    return found


@contextmanager
def settled(
    lm: LM, *, tokens: int = 2048, rows: int = 192, sharing: bool = True, chunk: int = 256
) -> Iterator[None]:
    """One way to carry a measurement out."""
    before, trees, size = lm.shares_prefix, lm.grows_trees, engine.CHUNK
    lm.__dict__["budget"] = Budget(tokens, tokens, rows)
    lm.shares_prefix, engine.CHUNK = sharing and before, chunk
    lm.grows_trees = sharing and trees
    try:
        yield
    finally:
        lm.shares_prefix, lm.grows_trees, engine.CHUNK = before, trees, size
        del lm.__dict__["budget"]


def shuffled(requests: Sequence[Request], seed: int) -> list[Request]:
    found = list(requests)
    random.Random(seed).shuffle(found)
    return found


WAYS = {
    "tokens": draw.sampled_from([16, 64, 150, 333, 1000, 100_000]),
    "rows": draw.sampled_from([1, 2, 3, 7, 192]),
    "sharing": draw.booleans(),
    "chunk": draw.sampled_from([1, 3, 10, 256]),
    "seed": draw.integers(0, 2**16),
    "part": draw.floats(0.1, 0.7),
    "stored": draw.floats(0.0, 1.0),
}


@pytest.mark.parametrize("family", FAMILIES)
@settings(
    max_examples=3, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
@given(**WAYS)
def test_no_value_depends_on_how_it_is_measured(
    family: str, tokens: int, rows: int, sharing: bool, chunk: int, seed: int, part: float,
    stored: float,
) -> None:  # fmt: skip
    lm, wanted = model(family), one_by_one(family)
    requests = shuffled(every_kind(), seed)
    requests = requests[: max(1, int(part * len(requests)))]
    with (
        settled(lm, tokens=tokens, rows=rows, sharing=sharing, chunk=chunk),
        tempfile.TemporaryDirectory() as folder,
    ):
        memory = Cache(folder)
        known = requests[: int(stored * len(requests))]
        if known:
            require_equal(measure(lm, known, cache=memory), wanted, known)
        asked = shuffled([*requests, *requests[::2]], seed + 1)
        require_equal(measure(lm, asked, cache=memory), wanted, requests)
        again = measure(lm, asked, cache=Cache(folder))
        require_equal(again, wanted, requests)
        distributions = sum(isinstance(request, Distribution) for request in requests)
        assert again.report.unique - again.report.cached == distributions


@pytest.mark.parametrize("family", FAMILIES)
def test_values_alone_are_those_of_the_definition(family: str) -> None:
    """What everything is compared with is right itself: plain forward passes of a whole row."""
    lm, wanted = model(family), one_by_one(family)
    exact = tiny_model(family)
    if family != "mixtral":  # its grouped matrix products take no float64
        exact = exact.double()
    for prompt in PROMPTS:
        row = lm.template.encode(prompt, ANSWERS[0])
        with torch.no_grad():
            output = exact(input_ids=torch.tensor([row.ids]), output_hidden_states=True)
        logprobs = output.logits[0].log_softmax(dim=1)[row.start - 1 : -1].numpy()
        targets = np.array(row.ids[row.start :])
        for request, answer in wanted.items():
            if request.prompt != prompt or getattr(request, "answer", None) != ANSWERS[0]:
                continue
            if isinstance(request, Distribution):
                assert np.allclose(answer, logprobs, atol=1e-4)
            elif isinstance(request, Score):
                expected = logprobs[np.arange(len(targets)), targets]
                assert np.allclose(answer.logprobs, expected, atol=1e-4)  # type: ignore[union-attr]
            elif isinstance(request, Hidden) and request.layer == 0:
                states = output.hidden_states[1][0, row.start - 1 : -1].numpy()
                assert np.allclose(answer, states, atol=1e-4)


def test_every_kind_of_request_is_there_and_says_something() -> None:
    kinds = {type(request) for request in every_kind()}
    assert kinds == {Score, Generate, Distribution, Hidden, GradientNorm}
    for family in FAMILIES:
        found = one_by_one(family)
        texts = {answer for answer in found.values() if isinstance(answer, str)}
        assert len(texts) > 8
        assert all(
            np.ptp(a) > 0.1 for r, a in found.items() if isinstance(r, Distribution | Hidden)
        )


def test_a_difference_is_noticed() -> None:
    lm, wanted = model("llama"), one_by_one("llama")
    other = LM(tiny_model("llama"), tiny_tokenizer(), precision="float32")
    with torch.no_grad():
        next(other.model.parameters()).mul_(1.0003)
    for kind in (Score, Distribution, Hidden, GradientNorm):
        requests = [request for request in every_kind() if isinstance(request, kind)]
        require_equal(measure(lm, requests), wanted, requests)
        with pytest.raises(AssertionError):
            require_equal(measure(other, requests), wanted, requests)
