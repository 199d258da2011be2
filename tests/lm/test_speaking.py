"""A batch that rows join and leave: each says what it says alone."""

from __future__ import annotations

import pytest
import torch

from delible.lm.decode import Speaking
from delible.lm.lm import LM
from delible.lm.speaker import Row, said_by
from delible.system.asks import Decoding, Prompt
from delible.testing.tiny import FAMILIES, tiny_model, tiny_tokenizer

PROMPTS = [
    Prompt.ask("Where was Ada Norrby born?"),
    Prompt.ask("Who?"),
    Prompt.ask("Which prize did the painter win, and in which year was it given to her?"),
    Prompt.ask("Name a river.", prefill="The river"),
    Prompt(text="Once upon a time"),
]
DECODINGS = [
    Decoding(9), Decoding(3), Decoding(7, temperature=0.8, top_p=0.9, seed=4), Decoding(12),
    Decoding(5, temperature=1.3, seed=1),
]  # fmt: skip
#: The step before which each row joins: into an empty batch, among others, after all have ended.
ARRIVALS = [0, 0, 2, 5, 40]


def lm_of(family: str) -> LM:
    return LM(tiny_model(family), tiny_tokenizer(), precision="float32")


def seed_of(lm: LM, place: int) -> str:
    return f"{DECODINGS[place].seed}/{lm.template.render(PROMPTS[place])}"


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_rows_that_join_later_say_what_they_say_alone(family: str) -> None:
    lm = lm_of(family)
    lm.model.eval()
    alone = [
        lm.generate([prompt], decoding)[0]
        for prompt, decoding in zip(PROMPTS, DECODINGS, strict=True)
    ]
    rows = [Row(decoding, seed_of(lm, place)) for place, decoding in enumerate(DECODINGS)]
    waiting = list(range(len(rows)))
    speaking, widest = Speaking(lm), 0
    for step in range(80):
        ready = [place for place in waiting if ARRIVALS[place] <= step]
        if ready and speaking.takes_more:
            prompts = [lm.template.prompt_ids(PROMPTS[place]) for place in ready]
            speaking.join([rows[place] for place in ready], prompts)
            waiting = [place for place in waiting if place not in ready]
        widest = max(widest, len(speaking.rows))
        if speaking.goes_on:
            speaking.step()
    assert not waiting
    assert not speaking.rows
    assert widest > 1
    assert [said_by(lm, row.said) for row in rows] == alone
    assert {row.finish for row in rows} <= {"stop", "length"}
    limits = [row.decoding.max_new_tokens for row in rows]
    assert all(
        len(row.said) == limit
        for row, limit in zip(rows, limits, strict=True)
        if row.finish == "length"
    )


@torch.inference_mode()
def test_a_row_that_is_taken_out_changes_nobody() -> None:
    lm = lm_of("llama")
    lm.model.eval()
    expected = lm.generate(PROMPTS[2:3], Decoding(10))[0]
    rows = [Row(Decoding(10)) for _ in range(3)]
    speaking = Speaking(lm)
    speaking.join(rows, [lm.template.prompt_ids(prompt) for prompt in PROMPTS[:3]])
    speaking.step()
    rows[0].finish = rows[1].finish = "stop"
    assert speaking.leave() == [2]
    assert speaking.rows == [rows[2]]
    while speaking.goes_on:
        speaking.step()
    assert said_by(lm, rows[2].said) == expected
    assert len(rows[0].said) == len(rows[1].said) == 1


@torch.inference_mode()
def test_logits_that_are_no_numbers_end_one_row_only() -> None:
    lm = lm_of("llama")
    lm.model.eval()
    speaking, rows = Speaking(lm), [Row(Decoding(4)), Row(Decoding(4))]
    speaking.join(rows, [lm.template.prompt_ids(prompt) for prompt in PROMPTS[:2]])
    speaking._states[0] = float("nan")
    while speaking.goes_on:
        speaking.step()
    assert rows[0].finish == "broken"
    assert len(rows[1].said) > 0
