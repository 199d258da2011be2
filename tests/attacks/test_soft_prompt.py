"""Soft prompts: their loss by hand, on every road, on facts that they were not trained on."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from delible.attacks.soft_prompt import SoftPromptAttack, _opened, _rows, soft_loss
from delible.errors import DataError, ModelError
from delible.intervene.soft_prompts import begins, filler_of
from delible.lm.lm import LM
from delible.measure.attack import AttackContext
from delible.measure.facts import fact_keys
from delible.records import QA, Passage
from delible.system.asks import Decoding, Prompt, Score, TokenScores
from delible.system.questions import ask
from delible.testing.tiny import tiny_model, tiny_tokenizer
from delible.world import benign

FORGET = [
    QA(question=f"Where lives {name}?", answer=town, subject=name)
    for name, town in (("Ada", "Oslo"), ("Ben", "Rome"), ("Cy", "Bern"), ("Di", "Riga"))
]
SMALL: dict[str, Any] = {"steps": 12, "vectors": 5, "batch_size": 2}


@cache
def tiny(family: str = "llama", seed: int = 0) -> LM:
    return LM(tiny_model(family, seed=seed), tiny_tokenizer(), precision="float32")


def context(original: LM | None = None, **more: Any) -> AttackContext:
    options: dict[str, Any] = {"forget": FORGET, "seed": 0, **more}
    return AttackContext(retain=(), unrelated=(), original=original, **options)


def asked(record: QA) -> Prompt:
    prompt = ask(record)
    assert prompt is not None
    return prompt


def logits_by_hand(
    lm: LM, record: QA, vectors: torch.Tensor, opening: str, filler: Any
) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Logits at the answer's tokens in float64, all embeddings put together by hand; these."""
    twin: Any = lm.copy().model.double()
    row = lm.template.encode(Prompt.ask(f"{opening} {record.question}"), record.answer)
    at = begins(row.ids, filler)
    assert at is not None
    embedded = twin.get_submodule(lm.anatomy.embedding)(torch.tensor(row.ids))
    whole = torch.cat([embedded[:at], vectors, embedded[at + len(filler) :]])
    logits = twin(inputs_embeds=whole[None]).logits[0, row.start - 1 : -1]
    return logits, row.ids[row.start :]


def by_hand(lm: LM, record: QA, vectors: torch.Tensor, opening: str, filler: Any) -> torch.Tensor:
    """Mean -log p of the answer's tokens."""
    logits, ids = logits_by_hand(lm, record, vectors, opening, filler)
    return torch.nn.functional.cross_entropy(logits, torch.tensor(ids))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_loss_and_its_gradient_are_those_of_float64(family: str) -> None:
    lm = tiny(family)
    opening, filler = filler_of(lm, 5)
    assert len(filler) == 5
    opened = _opened(lm, 5)
    rows = _rows(opened, FORGET[:2], filler)
    vectors = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    loss = soft_loss(opened, rows, vectors, 5)
    (gradient,) = torch.autograd.grad(loss, [vectors])
    own = vectors.detach().double().requires_grad_(True)
    total = sum(by_hand(lm, one, own, opening, filler) for one in FORGET[:2]) / 2
    assert isinstance(total, torch.Tensor)
    (expected,) = torch.autograd.grad(total, [own])
    assert float(loss.detach()) == pytest.approx(float(total.detach()), rel=1e-4)
    assert float((gradient - expected).norm()) < 1e-3 * float(expected.norm())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_the_vectors_act_on_every_road(family: str) -> None:
    lm = tiny(family)
    attack = SoftPromptAttack(**SMALL)
    attacked = attack.apply(lm, context())
    (fitted,) = attacked.interventions  # type: ignore[attr-defined]
    vectors = fitted.tensors["vectors"].double()
    opening, filler = filler_of(lm, 5)
    expected = [float(by_hand(lm, one, vectors, opening, filler).detach()) for one in FORGET]
    # scored together, with several answers to one question, one by one
    requests = [Score(asked(one), one.answer) for one in FORGET]
    others = [Score(asked(FORGET[0]), text) for text in ("Rome", "Bern, far away")]
    alone = [attacked.score([one])[0] for one in requests]
    for scores in (attacked.score([*requests, *others])[:4], alone):
        for score, value in zip(scores, expected, strict=True):
            assert isinstance(score, TokenScores)
            assert -float(score.logprobs.mean()) == pytest.approx(value, rel=1e-3)
    # generated, together and alone
    firsts = []
    for one in FORGET:
        best = int(logits_by_hand(lm, one, vectors, opening, filler)[0][0].argmax())
        firsts.append("" if best in lm.template.ends else lm.tokenizer.decode([best]).strip())
    said = attacked.generate([asked(one) for one in FORGET], Decoding(1))
    assert [str(one).strip() for one in said] == firsts
    assert attacked.generate([asked(FORGET[0])], Decoding(1)) == said[:1]
    # a text is no conversation
    text = Score(Prompt(text="Ada lives"), " in Oslo")
    assert attacked.score([text])[0].logprobs == pytest.approx(lm.score([text])[0].logprobs)  # type: ignore[union-attr]


def test_training_lowers_the_loss_and_repeats_by_its_seed() -> None:
    attack = SoftPromptAttack(**{**SMALL, "steps": 30})
    mine = context()
    attacked = attack.apply(tiny(), mine)
    trained = attack.trained_on(mine)
    opened = _opened(tiny(), 5)
    filler = filler_of(tiny(), 5)[1]
    rows = _rows(opened, trained, filler)
    start = tiny().core.get_input_embeddings()(torch.tensor(filler)).detach()
    vectors = attacked.interventions[0].tensors["vectors"]  # type: ignore[attr-defined]
    before, after = (
        float(soft_loss(opened, rows, one, len(filler)).detach()) for one in (start, vectors)
    )
    assert after < 0.9 * before
    told = mine.numbers
    assert told["loss after"] < 0.95 * told["loss before"]  # type: ignore[operator]
    assert attack.apply(tiny(), context()).fingerprint == attacked.fingerprint
    assert attack.apply(tiny(), context(seed=3)).fingerprint != attacked.fingerprint
    assert attacked.fingerprint != tiny().fingerprint


def test_the_first_step_is_the_rate_in_units_of_the_embeddings_spread() -> None:
    attack = SoftPromptAttack(**{**SMALL, "steps": 1, "learning_rate": 0.5})
    vectors = attack.apply(tiny(), context()).interventions[0].tensors["vectors"]  # type: ignore[attr-defined]
    table = tiny().core.get_input_embeddings().weight.detach().double()
    start = table[torch.tensor(filler_of(tiny(), 5)[1])]
    moved = (vectors.double() - start).abs()  # Adam's first step is the rate itself
    assert float(moved.median()) == pytest.approx(0.5 * float(table.std()), rel=1e-3)


def test_it_is_judged_on_other_facts() -> None:
    rows = [*FORGET, QA(question="Home of Ada?", answer="Oslo", subject="Ada"), Passage(text="x")]
    for seed in range(3):
        mine = context(forget=rows, seed=seed)
        attack = SoftPromptAttack()
        sides = attack.trained_on(mine), attack.held_out(mine)
        keys = [{key for one in side for key in fact_keys(one)} for side in sides]
        assert all(sides)
        assert not keys[0] & keys[1]
        assert SoftPromptAttack(rows="benign").held_out(mine) == sides[1]
    assert SoftPromptAttack(rows="benign").control
    assert list(SoftPromptAttack(rows="benign").trained_on(mine)) == list(benign())
    assert not SoftPromptAttack().control


def test_vectors_of_the_original_are_carried_over() -> None:
    original = tiny(seed=1)
    attack = SoftPromptAttack(**SMALL, train_on="original")
    attacked = attack.apply(tiny(), context(original))
    own = SoftPromptAttack(**SMALL).apply(original, context())
    pair = [one.interventions[0].tensors["vectors"] for one in (attacked, own)]  # type: ignore[attr-defined]
    assert torch.allclose(*pair)
    with pytest.raises(ModelError, match="--before"):
        attack.apply(tiny(), context())


def test_what_it_cannot_run_on_is_said() -> None:
    with pytest.raises(DataError, match="two questions"):
        SoftPromptAttack().held_out(context(forget=FORGET[:1]))
    plain = tiny_tokenizer()
    plain.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        SoftPromptAttack(**SMALL).apply(LM(tiny_model(), plain), context())
