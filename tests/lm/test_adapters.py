"""Several adapters side by side: each question gets the answer of the adapter that it names."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from delible.errors import DelibleError, ModelError
from delible.lm.adapters import names_of
from delible.lm.decode import Speaking
from delible.lm.lm import LM
from delible.measure.cache import request_key
from delible.measure.engine import measure
from delible.system.asks import Decoding, Generate, Hidden, Prompt, Score
from delible.systems.opening import described, keep, open_lm, open_system
from delible.systems.scripted import Scripted
from delible.systems.serving import Served
from delible.testing.tiny import tiny_model, tiny_tokenizer

NAMES = ("first", "second", "third")
QUESTIONS = [Prompt.ask(text) for text in ("Who is Ada?", "Where?", "What is made in Norrby?")]
MIXED = [
    replace(prompt, adapter=name) for prompt in QUESTIONS for name in (*NAMES, "", None, "second")
]
DECODING = Decoding(7)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three adapters of different ranks, each saved by PEFT alone."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("adapters")
    LM(tiny_model(request.param), tiny_tokenizer()).save(folder / "base")
    for rank, name in enumerate(NAMES, start=1):
        lm = open_lm(str(folder / "base"))
        paths = [
            parameter.removesuffix(".weight")
            for layer in (0, 2)
            for parameter in lm.anatomy.mlp_out_parameters(layer)
            if parameter.endswith(".weight")
        ]
        model = get_peft_model(lm.core, LoraConfig(r=rank, target_modules=paths))
        draw = torch.Generator().manual_seed(rank)
        with torch.no_grad():
            for key, value in model.named_parameters():
                if "lora_" in key:
                    value.copy_(torch.randn(value.shape, generator=draw))
        model.save_pretrained(folder / name)
    return folder


def precise(lm: LM) -> LM:
    lm.precision = "float32"
    return lm


def alone(place: Path, name: str) -> LM:
    """The base with one adapter, or without any."""
    lm = precise(open_lm(str(place / "base")))
    if name:
        lm.put_on(place / name)
    return lm


def together(place: Path) -> LM:
    lm = precise(open_lm(str(place / "base")))
    for name in NAMES:
        lm.put_on(place / name, name)
    return lm


def expected(place: Path, prompts: Sequence[Prompt]) -> list[str]:
    systems = {name: alone(place, name) for name in (*NAMES, "")}
    return [
        str(systems[prompt.adapter if prompt.adapter is not None else "first"].generate(
            [replace(prompt, adapter=None)], DECODING)[0])
        for prompt in prompts
    ]  # fmt: skip


def test_each_question_is_answered_by_its_adapter(place: Path) -> None:
    lm = together(place)
    assert names_of(lm) == NAMES
    before = lm.fingerprint
    found = lm.generate(MIXED, DECODING)
    assert found == expected(place, MIXED)
    assert len(set(found[:4])) == 4, "the adapters answer alike"
    for prompt in MIXED[:4]:
        name = str(prompt.adapter)
        plain = alone(place, name)
        for ask in (Score, lambda *what: Hidden(*what, layer=1)):
            (mine,) = (lm.score if ask is Score else lm.inspect)([ask(prompt, "In a mill.")])
            (theirs,) = (plain.score if ask is Score else plain.inspect)(
                [ask(replace(prompt, adapter=None), "In a mill.")]
            )
            values = [getattr(one, "logprobs", one) for one in (mine, theirs)]
            np.testing.assert_allclose(*values, atol=1e-5, rtol=1e-5)
    assert lm.fingerprint == before, "asking changed which adapter is on"
    assert lm.model.active_adapter == "first"


def test_rows_of_one_batch_speak_with_different_adapters(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Concurrent calls are mixed row by row, by PEFT's own forward."""
    seen: list[set[str | None]] = []
    step = Speaking.step

    def watched(self: Speaking) -> None:
        seen.append({row.adapter for row in self.rows})
        step(self)

    monkeypatch.setattr(Speaking, "step", watched)
    lm = together(place)
    served = Served(lm)

    async def every() -> list[str]:
        replies = await asyncio.gather(*(served.respond(prompt, DECODING) for prompt in MIXED))
        return [reply.text for reply in replies]

    try:
        assert asyncio.run(every()) == expected(place, MIXED)
    finally:
        served.close()
    assert max(len(adapters) for adapters in seen) == 5, "the batches were not mixed"
    assert lm.model.active_adapter == "first"


def test_side_by_side_is_one_artefact(place: Path, tmp_path: Path) -> None:
    lm = together(place)
    below = described(open_lm(str(place / "base")))
    lm.switch("second")
    keep("adapter", lm, tmp_path / "run", below, lm)
    opened = open_lm(str(tmp_path / "run"))
    precise(opened)
    assert names_of(opened) == NAMES
    assert opened.model.active_adapter == "second"
    assert opened.generate(MIXED, DECODING) == lm.generate(MIXED, DECODING)
    off = opened.taken_off()
    assert off is not None
    assert off[1].generate(QUESTIONS, DECODING) == alone(place, "").generate(QUESTIONS, DECODING)


def test_which_adapter_is_asked_is_part_of_the_question(place: Path) -> None:
    """Kept answers of one adapter are never another's; those of plain questions stay."""
    keys = {
        request_key(Generate(replace(QUESTIONS[0], adapter=name))) for name in (None, "", *NAMES)
    }
    assert len(keys) == 5
    answers = measure(together(place), [Generate(prompt, DECODING) for prompt in MIXED])
    assert [answers[Generate(prompt, DECODING)] for prompt in MIXED] == expected(place, MIXED)
    with pytest.raises(ModelError, match="cannot 'adapters'"):
        measure(Scripted(["hello"]), [Generate(MIXED[0], DECODING)])


def test_a_name_that_no_adapter_has_is_told(place: Path) -> None:
    wrong = replace(QUESTIONS[0], adapter="fourth")
    with pytest.raises(ModelError, match=r"no adapter 'fourth'.*first, second, third"):
        together(place).generate([wrong], DECODING)
    with pytest.raises(ModelError, match="It has none"):
        alone(place, "").generate([wrong], DECODING)
    lm = together(place)
    with pytest.raises(ModelError, match="already"):
        lm.put_on(place / "first", "first")
    with pytest.raises(DelibleError):
        open_system(str(place / "nowhere"))
