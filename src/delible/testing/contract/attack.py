"""Attacks: on a copy, or on prompts, the same every time; what only looks leaves no trace."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch

from delible.lm.lm import LM
from delible.measure.attack import (
    Attack,
    AttackContext,
    ConversationAttack,
    InferenceAttack,
    InsideAttack,
    ModelAttack,
    PromptAttack,
    Seen,
)
from delible.records import QA, Passage, RecordBase
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

#: Largest difference of a score between two copies of a model, and from the end of its scale.
CLOSE = 1e-3

A = TypeVar("A", bound=Attack)


def _attack_context(original: LM, reference: LM | None = None) -> AttackContext:
    unrelated = (QA(question="Tea?", answer="Hot."), Passage(text="Bread rises slowly."))
    return AttackContext(
        FORGET, RETAIN, unrelated, original, 0, holdout=RETAIN, reference=reference
    )


def _variants(attack: A) -> Iterable[A]:
    """An attack's first and last settings; an option ``steps`` is made small, to be fast."""
    short = {"steps": 2} if "steps" in type(attack).model_fields else {}
    settings = attack.variants("deep")
    for variant in (*settings[:1], *settings[1:][-1:]):
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


def looking_leaves_no_trace(trial: Trial) -> None:
    """Hidden states are looked at, and nothing else: the same scores every time, one a record.

    An attack that compares with the original and the reference puts them at the ends: all is
    known, nothing is.
    """
    if not isinstance(trial.component, InsideAttack):
        return
    original = trial.lm()
    reference = _moved(original)
    for attack in _variants(trial.component):
        title = attack.variant_title() or "the attack"
        found = []
        for lm in (original, reference):

            def look(lm: LM = lm, attack: InsideAttack = attack) -> Seen:
                context = _attack_context(original, reference)
                return attack.look(lm, attack.held_out(context), context)

            seen = _twice(lm, look, title)
            _has_scores(seen, attack.held_out(_attack_context(original)), title)
            if lm is original:
                require(_far(seen, look(lm.copy())) <= CLOSE, f"{title}: a copy has other scores")
            found.append(seen)
        if set(attack.compares) == {"original", "reference"}:
            for seen, name, end in zip(found, ("original", "reference"), (1.0, 0.0), strict=True):
                known = [one for one in (*_values(seen), *seen.layers) if one is not None]
                require(known, f"{title}: no layer and no record has a score for the {name}")
                away = max(abs(one - end) for one in known)
                require(away <= CLOSE, f"{title}: the {name} does not score {end:g}")


def inferring_leaves_no_trace(trial: Trial) -> None:
    """A system is asked, and nothing else: the same scores every time, one a forget record."""
    if not isinstance(trial.component, InferenceAttack):
        return
    lm = trial.lm()
    for attack in _variants(trial.component):
        title = attack.variant_title() or "the attack"

        def infer(lm: LM = lm, attack: InferenceAttack = attack) -> Seen:
            return attack.infer(lm, _attack_context(lm, lm))

        seen = _twice(lm, infer, title)
        _has_scores(seen, FORGET, title)
        require(_far(seen, infer(lm.copy())) <= CLOSE, f"{title}: a copy has other scores")


def conversing_is_deterministic(trial: Trial) -> None:
    """Conversations that end in a question, the same every time; the model stays as it was."""
    if not isinstance(trial.component, ConversationAttack):
        return
    lm = trial.lm()
    for attack in _variants(trial.component):
        title = attack.variant_title() or "the attack"
        known = world_context(lm)
        forget = tuple(attack.held_out(known)[:3])
        require(forget, f"{title}: it asks about no record")
        for records in (forget, tuple(known.retain[:2])):

            def converse(
                records: Sequence[RecordBase] = records, attack: ConversationAttack = attack
            ) -> list[tuple[Prompt, ...]]:
                return [tuple(one) for one in attack.converse(lm, records, world_context(lm))]

            found = _twice(lm, converse, title)
            require(len(found) == len(records), f"{title}: not one entry for each record")
            require(any(found) or records is not forget, f"{title}: it talks about no record")
            for record, prompts in zip(records, found, strict=True):
                require(
                    len(set(prompts)) == len(prompts), f"{title}: the same talk twice: {record}"
                )
                own = record not in (*known.forget, *known.retain)  # a probe may be asked plainly
                plainly = bool(prompts) and not own and set(prompts) <= {ask(record)}
                require(not plainly, f"{title}: nothing but the plain prompt for {record}")
                for prompt in prompts:
                    require(isinstance(prompt, Prompt), f"{title}: it returns more than prompts")
                    asks = bool(prompt.messages) and prompt.messages[-1].role == "user"
                    require(asks, f"{title}: a talk does not end in a question: {record}")


T = TypeVar("T")


def _twice(lm: LM, attack: Callable[[], T], title: str) -> T:
    """What an attack finds, twice the same, on a model that stays as it was."""
    before, fingerprint, training = weights(lm), lm.fingerprint, lm.model.training
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(attack())
    require_same(before, weights(lm), f"{title}: the given model was changed")
    require(lm.fingerprint == fingerprint, f"{title}: something was left on the given model")
    require(lm.model.training == training, f"{title}: the given model is in another mode")
    frozen = [name for name, one in lm.model.named_parameters() if one.grad is not None]
    require(not frozen, f"{title}: gradients were left on {', '.join(frozen[:3])}")
    require(found[0] == found[1], f"{title}: not deterministic")
    return found[0]


def _has_scores(seen: Seen, records: Sequence[RecordBase], title: str) -> None:
    require(
        seen.items is not None or seen.numbers or seen.layers, f"{title}: it gives no scores at all"
    )
    numbers = [*_values(seen), *seen.numbers.values(), *seen.layers]
    require(
        all(one is None or math.isfinite(one) for one in numbers), f"{title}: a score is no number"
    )
    if seen.items is None:
        return
    require("forget" in seen.items, f"{title}: there are no scores of forget records")
    require(len(seen.items["forget"]) == len(records), f"{title}: not one score for each record")
    for items in seen.items.values():
        require(
            all(item.value is not None or item.reason for item in items),
            f"{title}: neither a score nor a reason",
        )


def _values(seen: Seen) -> list[float | None]:
    return [item.value for items in (seen.items or {}).values() for item in items]


def _far(one: Seen, other: Seen) -> float:
    """The largest difference of two findings; infinite where only one has a score."""
    pairs = [
        *zip(_values(one), _values(other), strict=True),
        *zip(one.layers, other.layers, strict=True),
        *((one.numbers[name], other.numbers[name]) for name in one.numbers),
    ]
    return max(
        (
            abs(a - b) if a is not None and b is not None else math.inf
            for a, b in pairs
            if (a, b) != (None, None)
        ),
        default=0.0,
    )


def _moved(lm: LM) -> LM:
    """Another model of the same form."""
    found = lm.copy("another")
    random = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in found.model.parameters():
            if weight.dim() > 1:
                weight += 0.5 * weight.std() * torch.randn(weight.shape, generator=random)
    found.touch()
    return found
