"""Attacks: on a copy, or on prompts, the same every time."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from delible.lm.lm import LM
from delible.measure.attack import AttackContext, ConversationAttack, ModelAttack, PromptAttack
from delible.records import QA, Passage
from delible.system.asks import (
    Prompt,
    Score,
    TokenScores,
)
from delible.system.questions import ask
from delible.testing.contract.trial import (
    EVERY_KIND,
    FORGET,
    RETAIN,
    Trial,
    require,
    require_same,
    weights,
)


def _attack_context(original: LM) -> AttackContext:
    unrelated = (QA(question="Tea?", answer="Hot."), Passage(text="Bread rises slowly."))
    return AttackContext(FORGET, RETAIN, unrelated, original, 0)


def _variants(attack: ModelAttack) -> Iterable[ModelAttack]:
    """All settings of an attack; an option ``steps`` is made small, to be fast."""
    short = {"steps": 2} if "steps" in type(attack).model_fields else {}
    for variant in attack.variants("deep"):
        options = {**attack.spec(), **variant, **short}
        del options["name"]
        yield type(attack).build(f"attack '{attack.card.name}'", **options)


def attacked_model_is_a_copy(trial: Trial) -> None:
    """The model given stays as it was; the same attack makes the same model."""
    if not isinstance(trial.component, ModelAttack):
        return
    for attack in _variants(trial.component):
        title = attack.variant_title() or "the attack"
        lm = trial.lm()
        before = weights(lm)
        held_out = attack.held_out(_attack_context(lm))
        require(held_out, f"{title}: no forget record is held out")
        require(all(record in FORGET for record in held_out), f"{title}: holds out other records")
        made = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            made.append(attack.apply(lm, _attack_context(lm)))
        require_same(before, weights(lm), f"{title}: the given model was changed")
        pointers = {value.data_ptr() for value in lm.model.parameters()}
        shared = any(value.data_ptr() in pointers for value in made[0].model.parameters())
        require(not shared, f"{title}: the attacked model shares weights with the given one")
        require_same(weights(made[0]), weights(made[1]), f"{title}: not deterministic")
        if type(attack).each is not ModelAttack.each:
            judged = [one for _, part in attack.each(lm, _attack_context(lm)) for one in part]
            require(judged == list(held_out), f"{title}: judges other records than it holds out")
        score = made[0].score([Score(Prompt.ask(FORGET[0].question), FORGET[0].answer)])[0]
        require(isinstance(score, TokenScores), f"{title}: scores are not finite")


def world_context(original: LM | None) -> AttackContext:
    """A few people of a world: what attacks that only ask are tried on."""
    from delible.world import World

    world = World(people=12)
    request = world.request(forget=2, holdout=1)
    return AttackContext(
        request.forget, request.retain, world.unrelated(), original, 0, holdout=request.holdout,
        neighbours=request.neighbours,
    )  # fmt: skip


def rewriting_is_deterministic(trial: Trial) -> None:
    """Distinct prompts other than the plain one, the same every time.

    A probe that the attack made itself may be asked plainly.
    """
    attack = trial.component
    if not isinstance(attack, PromptAttack):
        return
    context = world_context(trial.lm())
    probes = [one for one in attack.held_out(context) if one not in context.forget]
    count = 0
    for record in (*FORGET, *EVERY_KIND, *context.forget[:4], *probes[:4]):
        prompt = ask(record)
        if prompt is None:
            continue
        found = tuple(attack.rewrite(record, prompt))
        require(all(isinstance(one, Prompt) for one in found), "it returns more than prompts")
        require(found == tuple(attack.rewrite(record, prompt)), "not deterministic")
        require(len(set(found)) == len(found), f"the same prompt twice for {record}")
        if record not in probes:
            require(prompt not in found, f"the plain prompt is returned for {record}")
        count += len(found)
    require(count, "it applies to no record")


def talking_is_deterministic(trial: Trial) -> None:
    """Each record has its conversations, distinct, the same every time; they end in a question."""
    attack = trial.component
    if not isinstance(attack, ConversationAttack):
        return
    lm = trial.lm()
    records = attack.held_out(world_context(lm))[:3]
    require(records, "it asks about no record")
    first, again = (attack.converse(lm, records, world_context(lm)) for _ in range(2))
    require(len(first) == len(records), "some records have no place")
    require([*map(tuple, first)] == [*map(tuple, again)], "not deterministic")
    require(any(first), "it applies to no record")
    for prompts in first:
        require(len(set(prompts)) == len(prompts), "the same conversation twice")
        for prompt in prompts:
            require(prompt.messages[-1].role == "user", "a conversation does not end in a question")
