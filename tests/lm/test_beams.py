"""Beam search with a judge: the library's own beams where nobody objects, none where all do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList

from delible.lm.beams import beam_search
from delible.lm.lm import LM
from delible.system.asks import Prompt
from delible.testing import tiny_model, tiny_tokenizer

QUESTIONS = ("Hi", "Where was Ada born, and when?", "So?")
TOKENS = 10


def tiny(family: str) -> LM:
    return LM(tiny_model(family), tiny_tokenizer(), precision="float32")


def ids_of(lm: LM) -> list[list[int]]:
    return [list(lm.template.prompt_ids(Prompt.ask(one))) for one in QUESTIONS]


def fine(place: int, said: Sequence[int], chosen: Sequence[int]) -> list[float]:
    return [0.0] * len(chosen)


def library(lm: LM, ids: list[int], beams: int, **options: Any) -> list[int]:
    """The best beam of transformers alone, one prompt at a time."""
    found = lm.core.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        num_beams=beams,
        max_new_tokens=TOKENS,
        do_sample=False,
        length_penalty=1.0,
        eos_token_id=sorted(lm.ends),
        pad_token_id=lm.pad_id,
        **options,
    )[0, len(ids) :].tolist()
    ends = [place for place, token in enumerate(found) if token in lm.ends]
    return found[: ends[0]] if ends else found


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("beams", [2, 5])
def test_without_objections_it_is_ordinary_beam_search(family: str, beams: int) -> None:
    lm = tiny(family)
    found = beam_search(lm, ids_of(lm), fine, beams=beams, max_new_tokens=TOKENS)
    for ids, answers in zip(ids_of(lm), found, strict=True):
        assert answers is not None
        assert answers[0] == library(lm, ids, beams)
        assert len({tuple(one) for one in answers}) == len(answers) == beams


def test_a_model_that_answers_alone_gives_the_same() -> None:
    lm = tiny("llama")
    batch = beam_search(lm, ids_of(lm), fine, beams=3, max_new_tokens=TOKENS)
    lm.road = "plain"
    assert beam_search(lm, ids_of(lm), fine, beams=3, max_new_tokens=TOKENS) == batch


def test_beams_end_where_the_context_is_full() -> None:
    lm = tiny("gpt2")
    prompt = [7] * (lm.context - 3)
    beams = beam_search(lm, [prompt], fine, beams=2, max_new_tokens=TOKENS)[0]
    assert beams
    assert max(map(len, beams)) == 3


def test_penalties_are_taken_off_the_log_probabilities() -> None:
    lm = tiny("llama")

    def odd(place: int, said: Sequence[int], chosen: Sequence[int]) -> list[float]:
        return [3.0 * (token % 2) for token in chosen]

    def same(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores - 3.0 * (torch.arange(scores.shape[1]) % 2)

    found = beam_search(lm, ids_of(lm), odd, beams=3, max_new_tokens=TOKENS, candidates=260)
    plain = beam_search(lm, ids_of(lm), fine, beams=3, max_new_tokens=TOKENS)
    for ids, answers in zip(ids_of(lm), found, strict=True):
        assert answers is not None
        processors = LogitsProcessorList([same])
        assert answers[0] == library(lm, ids, 3, logits_processor=processors)
    assert found != plain


def test_a_judge_sees_the_prompt_s_own_beams_and_their_likeliest_tokens() -> None:
    lm = tiny("llama")
    seen: dict[int, set[tuple[int, ...]]] = {0: set(), 1: set(), 2: set()}

    def looks(place: int, said: Sequence[int], chosen: Sequence[int]) -> list[float]:
        seen[place].add(tuple(said))
        assert len(chosen) == 6
        return [0.0] * 6

    found = beam_search(lm, ids_of(lm), looks, beams=3, max_new_tokens=3, candidates=6)
    for place, answers in enumerate(found):
        assert answers is not None
        assert () in seen[place]
        assert all(tuple(one[:2]) in seen[place] for one in answers if len(one) == 3)
        with torch.inference_mode():
            logits = lm.core(torch.tensor([ids_of(lm)[place]])).logits[0, -1]
        best = set(logits.topk(6).indices.tolist())
        assert {one[0] for one in answers} <= best


def test_where_all_are_dropped_nothing_is_said_and_others_go_on() -> None:
    lm = tiny("llama")

    def stops(place: int, said: Sequence[int], chosen: Sequence[int]) -> list[float]:
        return [math.inf if place == 1 and len(said) >= 2 else 0.0] * len(chosen)

    found = beam_search(lm, ids_of(lm), stops, beams=3, max_new_tokens=TOKENS)
    free = beam_search(lm, ids_of(lm), fine, beams=3, max_new_tokens=TOKENS)
    assert found == [free[0], [], free[2]]


def test_a_dropped_token_is_in_no_beam() -> None:
    lm = tiny("llama")
    free = beam_search(lm, ids_of(lm), fine, beams=3, max_new_tokens=TOKENS)
    used = {token for answers in free for one in answers or () for token in one}

    def without(place: int, said: Sequence[int], chosen: Sequence[int]) -> list[float]:
        return [math.inf if token in used else 0.0 for token in chosen]

    found = beam_search(lm, ids_of(lm), without, beams=3, max_new_tokens=4, candidates=200)
    assert all(answers for answers in found)
    assert not used & {token for answers in found for one in answers or () for token in one}


def test_logits_that_are_no_numbers_are_told() -> None:
    lm = tiny("llama")
    with torch.no_grad():
        lm.core.get_output_embeddings().weight[5] = math.nan
    assert beam_search(lm, ids_of(lm)[:1], fine, beams=2, max_new_tokens=3) == [None]


def test_others_may_use_the_model_between_two_tokens() -> None:
    from threading import Thread

    from delible.lm.layout import turn

    lm = tiny("llama")
    taken: list[bool] = []

    def other() -> None:
        taken.append(turn(lm.core).acquire(timeout=5))
        turn(lm.core).release()

    def asks(place: int, said: Sequence[int], chosen: Sequence[int]) -> list[float]:
        thread = Thread(target=other)
        thread.start()
        thread.join()
        return [0.0] * len(chosen)

    beam_search(lm, ids_of(lm)[:1], asks, beams=2, max_new_tokens=3)
    assert taken
    assert all(taken)
