"""What every registered attack must keep."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from delible import registry
from delible.cards import DEPTHS
from delible.component import build
from delible.errors import RecipeError
from delible.lm.lm import LM
from delible.measure.attack import (
    Attack,
    AttackContext,
    ConversationAttack,
    InferenceAttack,
    InsideAttack,
    ModelAttack,
    PromptAttack,
)
from delible.records import QA, Choice, Passage, RecordBase
from delible.system.asks import Decoding
from delible.system.questions import ask
from delible.testing.contract.attack import world_context
from delible.testing.tiny import tiny_model, tiny_tokenizer

KINDS = (PromptAttack, ConversationAttack, ModelAttack, InsideAttack, InferenceAttack)
NAMES = [card.name for card in registry.cards("attack")]
FORGET: list[RecordBase] = [
    QA(question=f"Where was {name} born?", answer=f"In {town}.", subject=name)
    for name, town in (("Ada", "Norrby"), ("Ben", "Casta"), ("Cy", "Umber"))
]
KEPT: list[RecordBase] = [QA(question="Snow?", answer="White."), Passage(text="Bread rises.")]


@cache
def tiny(family: str) -> LM:
    return LM(tiny_model(family), tiny_tokenizer(), precision="float32")


def context(original: LM | None = None) -> AttackContext:
    return AttackContext(FORGET, KEPT, KEPT, original, 0)


def model_attacks() -> list[tuple[str, int]]:
    found = [(name, build("attack", name)) for name in NAMES]
    return [
        (name, index)
        for name, attack in found if isinstance(attack, ModelAttack)
        for index in range(len(attack.variants()))
    ]  # fmt: skip


def test_every_attack_is_found() -> None:
    assert set(NAMES) >= {"paraphrase", "prefix", "prefill", "relearn", "quantize"}


@pytest.mark.parametrize("name", NAMES)
def test_the_card_says_what_a_reader_needs(name: str) -> None:
    card = registry.card("attack", name)
    for field in ("title", "summary", "paper", "year", "family", "needs", "changes", "capability"):
        assert getattr(card, field), field
    assert card.summary.endswith(".")
    assert card.capability in {"generate", "score", "distribution", "hidden", "weights"}
    assert ("variant" in card.badges) == bool(card.variant)
    loaded = registry.load("attack", name)
    assert loaded.card == card
    changes = {PromptAttack: "prompts", ConversationAttack: "prompts", ModelAttack: "weights",
               InsideAttack: "nothing", InferenceAttack: "nothing"}  # fmt: skip
    assert card.changes == next(what for kind, what in changes.items() if issubclass(loaded, kind))
    if issubclass(loaded, ModelAttack):
        assert card.capability == "weights"
        assert "weights" in card.needs


@pytest.mark.parametrize("name", NAMES)
def test_options_are_described_and_come_back_from_their_spec(name: str) -> None:
    attack = build("attack", name)
    assert isinstance(attack, Attack)
    assert all(field.description for field in type(attack).model_fields.values())
    assert build("attack", attack.spec()) == attack
    assert attack.spec()["name"] == name
    with pytest.raises(RecipeError, match="unknown option 'surely_unknown'"):
        build("attack", {"name": name, "surely_unknown": 1})


@pytest.mark.parametrize(("name", "index"), model_attacks())
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gpt_neox"])
def test_a_model_attack_changes_a_copy_only(family: str, name: str, index: int) -> None:
    lm = tiny(family)
    lm.touch()
    before = {key: value.clone() for key, value in lm.model.state_dict().items()}
    fingerprint, anatomy = lm.fingerprint, lm.anatomy
    attack = build("attack", name)
    variant = {**attack.spec(), **attack.variants()[index]}
    if "steps" in variant:
        variant |= {"steps": 2}
    attack = build("attack", variant)
    held_out = attack.held_out(context(lm))
    assert held_out
    assert all(record in FORGET for record in held_out)

    attacked = attack.apply(lm, context(lm))
    after = lm.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    lm.touch()
    assert lm.fingerprint == fingerprint
    assert lm.anatomy is anatomy
    assert attacked is not lm
    assert attacked.fingerprint != fingerprint
    shared = {p.data_ptr() for p in lm.model.parameters()} & {
        p.data_ptr() for p in attacked.model.parameters()
    }
    assert not shared
    prompts = [prompt for record in FORGET if (prompt := ask(record)) is not None]
    assert len(attacked.generate(prompts, Decoding(2))) == len(FORGET)


@pytest.mark.parametrize("name", NAMES)
def test_variants_have_titles_of_their_own(name: str) -> None:
    attack = build("attack", name)
    for depth in DEPTHS:
        settings = attack.variants(depth)
        variants = [build("attack", {**attack.spec(), **each}) for each in settings]
        titles = [variant.variant_title() for variant in variants]
        assert len(set(titles)) == len(titles)
        assert all(titles) or len(titles) == 1


@pytest.mark.parametrize("name", NAMES)
def test_prompt_attacks_are_the_same_every_time_and_distinct(name: str) -> None:
    attack = build("attack", name)
    if not isinstance(attack, PromptAttack):
        return
    choice = Choice(question="Where?", options=("Oslo", "Norrby"), correct=1)
    few = world_context(None)
    probes = [one for one in attack.held_out(few) if one not in few.forget][:3]
    for record in probes or (*FORGET, choice):
        prompt = ask(record)
        assert prompt is not None
        found = tuple(attack.rewrite(record, prompt))
        assert found == tuple(attack.rewrite(record, prompt))
        assert found
        assert len(set(found)) == len(found)
        assert probes or prompt not in found
