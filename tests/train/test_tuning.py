"""Fine-tuning as attacks do it: a copy, so many steps, at one rate, on top of what is worn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from delible.lm.lm import LM
from delible.records import QA, RecordBase
from delible.system.asks import Prompt, Score
from delible.system.questions import ask
from delible.testing.tiny import tiny_model, tiny_tokenizer
from delible.train.tuning import FineTuning

ROWS: list[RecordBase] = [
    QA(question=f"Where lives {name}?", answer=town)
    for name, town in (("Ada", "Oslo"), ("Ben", "Rome"), ("Cy", "Bern"))
]
ASKED = [Score(Prompt.ask("Where lives Ada?"), "Oslo")]


def make(seed: int = 0) -> LM:
    return LM(tiny_model(seed=seed), tiny_tokenizer(), precision="float32")


def logprobs(lm: LM) -> Any:
    return lm.score(ASKED)[0].logprobs  # type: ignore[union-attr]


@pytest.mark.parametrize("rank", [None, 2])
def test_so_many_steps_are_taken_and_the_model_given_stays(rank: int | None) -> None:
    lm, before = make(), logprobs(make())
    seen: list[tuple[int, int]] = []
    tuned = FineTuning(5, 1e-2, 2, rank).tuned(
        lm, ROWS, 0, lambda twin, step, steps: seen.append((step, steps))
    )
    assert seen == [(step, 5) for step in range(6)]
    assert logprobs(lm) == pytest.approx(before)
    assert abs(logprobs(tuned.lm) - before).max() > 1e-3
    assert tuned.losses[1] < 0.95 * tuned.losses[0]


def test_the_first_loss_and_all_tokens_by_hand() -> None:
    lm = make()
    tuned = FineTuning(4, 1e-3, 3).tuned(lm, ROWS, 0)
    twin: Any = lm.copy().model.double()
    total = tokens = read = 0.0
    for row in ROWS:
        prompt = ask(row)
        assert prompt is not None
        one = lm.template.encode(prompt, row.answer)  # type: ignore[attr-defined]
        with torch.no_grad():
            logs = twin(torch.tensor([one.ids])).logits[0].log_softmax(1)
        places = range(one.start, len(one.ids))
        total -= sum(float(logs[at - 1, one.ids[at]]) for at in places)
        tokens, read = tokens + len(places), read + len(one.ids)
    assert tuned.losses[0] == pytest.approx(total / tokens, rel=1e-4)
    assert tuned.tokens == 4 * read


def test_the_rate_stays_and_rises_over_a_tenth_of_the_steps() -> None:
    training = FineTuning(40, 1e-4).recipe(make(), 10).training
    assert (training.schedule, training.warmup_steps, training.max_steps) == ("constant", 4, 40)
    assert training.epochs * 3 >= 40 > (training.epochs - 1) * 3


@pytest.mark.parametrize("rank", [None, 2])
def test_it_starts_from_what_the_model_wears(rank: int | None, tmp_path: Path) -> None:
    lm = make()
    paths = [name.removesuffix(".weight") for name in lm.anatomy.mlp_out_parameters(1)]
    worn = get_peft_model(make().core, LoraConfig(r=2, target_modules=paths))
    with torch.no_grad():
        for name, value in worn.named_parameters():
            if "lora_" in name:
                value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(0)))
    worn.save_pretrained(tmp_path)
    lm.put_on(tmp_path)
    dressed = logprobs(lm)
    assert abs(dressed - logprobs(make())).max() > 1e-2
    tuned = FineTuning(1, 1e-8, rank=rank).tuned(lm, ROWS, 0).lm
    assert logprobs(tuned) == pytest.approx(dressed, abs=1e-3)
    assert not tuned.wears_adapter
    assert lm.wears_adapter
