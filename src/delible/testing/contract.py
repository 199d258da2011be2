"""The contract suite: what every component keeps, whoever wrote it.

:func:`check` takes a component of any kind and runs the checks of that kind on tiny random
models of several architectures. A check is a function below whose name says what it holds; the
tables at the end of the file say which kinds it is for, and whether one architecture is enough.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, cast, get_args
from unittest import mock

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from delible import registry
from delible.cards import SLOTS, Kind
from delible.component import Component, build
from delible.edit.base import Editor, Patch
from delible.errors import DelibleError, ModelError, RecipeError
from delible.lm.lm import LM
from delible.measure.attack import AttackContext, ModelAttack, PromptAttack
from delible.measure.benchmark import Benchmark
from delible.measure.engine import measure
from delible.measure.evaluate import evaluate
from delible.measure.metric import Item, ItemMetric, SummaryMetric
from delible.records import QA, Choice, Dialogue, ForgetRequest, Message, Passage, RecordBase
from delible.rundir import RunDirectory
from delible.system.asks import (
    Answer,
    Decoding,
    Generate,
    NoAnswer,
    Prompt,
    Request,
    Score,
    TokenScores,
    needed_capability,
)
from delible.system.base import BlackBox
from delible.system.questions import answer_of, ask
from delible.systems.guarded import Guard, GuardedSystem, GuardMind
from delible.testing.tiny import tiny_model, tiny_tokenizer
from delible.train import slots
from delible.train.engine import Trainer, TrainResult
from delible.train.generated import check_partners
from delible.train.losses import Objective, State
from delible.train.passes import Passes
from delible.train.randomness import generator
from delible.train.recipe import Recipe
from delible.train.rows import make_rows
from delible.train.slots import (
    Balance,
    Harden,
    Place,
    Weigh,
)

#: Two forgotten people, two rows each.
FORGET = (
    QA(question="Where was Ada Quill born?", answer="Norrby", subject="Ada Quill"),
    QA(question="What did Ada Quill play?", answer="The lute", subject="Ada Quill"),
    QA(question="Where did Ben Orr work?", answer="In a mill at Casta", subject="Ben Orr"),
    QA(question="Who taught Ben Orr?", answer="Cy", subject="Ben Orr"),
)
#: Two direct neighbours, one indirect, one row about nobody.
RETAIN = (
    QA(question="Where is Norrby?", answer="In the north", neighbour_of="Ada Quill"),
    QA(question="What is made in Casta?", answer="Flour", neighbour_of="Ben Orr"),
    QA(question="Where does Dee Finch live?", answer="In Umber", subject="Dee Finch"),
    QA(question="How is snow?", answer="White and cold"),
)
RECORDS: Mapping[str, Sequence[RecordBase]] = {"forget": FORGET, "retain": RETAIN}
#: One record of every kind, and records that lack what a metric may want.
EVERY_KIND: tuple[RecordBase, ...] = (
    QA(question="Where?", answer="In Rome", paraphrases=("In which town?",),
       paraphrased_answers=("Rome it is",), perturbed=("In Oslo", "In Bern")),
    QA(question="Where else?", answer="In Riga"),
    Choice(question="Which?", options=("Rome", "Oslo"), correct=0),
    Dialogue(messages=(Message(role="user", content="Hm?"),
                       Message(role="assistant", content="In Rome"))),
    Passage(text="Once upon a time."),
)  # fmt: skip

#: What fills the other slots.
HOST = {"objective": "npo", "keep": "nll"}
TRAINING = {
    "learning_rate": 1e-3, "epochs": 2, "batch_size": 2, "max_steps": 3, "weight_decay": 0.1,
    "precision": "float32",
}  # fmt: skip
#: What a run has at least to end with a finisher: it may need several steps.
LONGER: Mapping[str, int] = {"epochs": 4, "max_steps": 6}
#: Rates at one of which a loss of a tiny model falls within :data:`FALLING_STEPS` steps (a loss
#: that starts near its floor is jumped over by the first).
FALLING_RATES, FALLING_STEPS = (3e-3, 1e-4), 6
#: Largest difference of a loss between ways to split the same step, relative above 1.
SPLIT_TOLERANCE = 1e-4

#: Fields that the card of a kind must fill, besides title and summary.
CARD_FIELDS: Mapping[Kind, tuple[str, ...]] = {
    "place": ("needs", "changes"),
    "objective": ("family", "needs", "changes", "reversible"),
    "editor": ("needs", "changes", "reversible", "weakest"),
    "guard": ("needs", "changes", "reversible", "weakest", "capability"),
    "attack": ("family", "needs", "changes", "capability"),
    "metric": ("family", "range", "direction", "misleads", "capability"),
    "benchmark": ("misleads",),
}


class ContractError(AssertionError):
    """A component breaks its contract; the message names it, the architecture and the check."""


def require(condition: object, problem: str) -> None:
    """Raises a :class:`ContractError` unless the condition holds (also under ``python -O``)."""
    if not condition:
        raise ContractError(problem)


@lru_cache(maxsize=4)
def _tiny(family: str) -> LM:
    depth = {"n_layer": 2} if family == "gpt2" else {"num_hidden_layers": 2}
    model = tiny_model(family, **depth)
    return LM(model, tiny_tokenizer(), name=f"tiny-{family}", precision="float32")


class Trial:
    """A component on one tiny model. Runs that several checks look at are made once.

    Attributes:
        slots: What else the recipe must hold for the component to work.
        folder: An empty folder of this trial.
    """

    def __init__(
        self, component: Component, family: str, slots: Mapping[str, Any], folder: Path
    ) -> None:
        self.component, self.family, self.slots, self.folder = component, family, slots, folder
        self.kind: Kind = component.card.kind

    def lm(self) -> LM:
        """A fresh copy of the tiny model."""
        return _tiny(self.family).copy()

    def recipe(self, slots: Mapping[str, Any] | None = None, **training: Any) -> Recipe:
        """A recipe with the component in its slot."""
        content = {"name": "contract", **HOST, **self.slots, **(slots or {})}
        length = {**TRAINING, **training}
        if self.kind == "finish":
            length |= {name: max(length[name], least) for name, least in LONGER.items()}
        content |= {self.kind: self.component, "training": length}
        return Recipe.from_mapping(content)

    def trainer(
        self,
        recipe: Recipe | None = None,
        lm: LM | None = None,
        records: Mapping[str, Sequence[RecordBase]] = RECORDS,
        **options: Any,
    ) -> Trainer:
        recipe, lm = recipe or self.recipe(), lm or self.lm()
        start = lm.copy() if recipe.finish.needs_start else None
        load = (lambda: start) if start is not None else None
        return Trainer(lm, recipe, records, start=load, **options)

    @cached_property
    def first(self) -> TrainResult:
        torch.manual_seed(1)
        return self.trainer().train()

    @cached_property
    def again(self) -> TrainResult:
        """The same run while the global random state, which is nobody's, is another one."""
        torch.manual_seed(2)
        return self.trainer().train()


def weights(lm: LM) -> dict[str, Tensor]:
    """A copy of all parameters and buffers, on the CPU."""
    return {name: value.detach().cpu().clone() for name, value in lm.model.state_dict().items()}


def require_same(left: Mapping[str, Tensor], right: Mapping[str, Tensor], problem: str) -> None:
    """Both must be equal bit by bit."""
    require(left.keys() == right.keys(), f"{problem} (other tensors)")
    apart = [name for name in left if not torch.equal(left[name], right[name])]
    require(not apart, f"{problem} ({', '.join(apart[:3])}{' …' if len(apart) > 3 else ''})")


def answers(lm: LM) -> tuple[list[Any], list[str]]:
    """What a model says: log-probabilities of the records' answers, and what it generates."""
    prompts = [(prompt, record) for record in (*FORGET, *RETAIN) if (prompt := ask(record))]
    scores = lm.score([Score(prompt, answer_of(record)) for prompt, record in prompts])
    logprobs = [score.logprobs for score in scores if isinstance(score, TokenScores)]
    texts = lm.generate([one for one, _ in prompts[:3]], Decoding(4))
    return logprobs, [str(text) for text in texts]


# ---- every component


def _discoverable(component: Component) -> bool:
    """Whether `delible list` finds something of this kind and name."""
    card = component.card
    return any((other.kind, other.name) == (card.kind, card.name) for other in registry.cards())


def card_is_complete(component: Component) -> None:
    """What `delible list` and `delible show` tell a reader."""
    card = component.card
    for field in ("title", "summary", *CARD_FIELDS.get(card.kind, ())):
        require(getattr(card, field) not in (None, "", ()), f"the card has no '{field}'")
    require(card.summary.endswith("."), "the card's summary is not a sentence (no full stop)")
    require(("variant" in card.badges) == bool(card.variant), "badge and text 'variant' disagree")
    if card.paper is not None:
        require(re.fullmatch(r"\d{4}\.\d{4,5}", card.paper), "'paper' is no arXiv identifier")
        require(card.year, "the card has a paper and no year")
    if _discoverable(component):
        mine = registry.load(card.kind, card.name) is type(component)
        require(mine, "another class has the name")
        require(registry.card(card.kind, card.name) == card, "the card is not made of literals")


def options_are_described(component: Component) -> None:
    """Each option's description is its help text."""
    for name, field in type(component).model_fields.items():
        require(field.description, f"option '{name}' has no description")


def config_comes_back_from_its_spec(component: Component) -> None:
    """Also after JSON, as in a manifest."""
    card, options = component.card, dict(component.spec())
    require(options.pop("name") == card.name, "spec() has another name than the card")
    plain = json.loads(json.dumps(options))
    where = f"{card.kind} '{card.name}'"
    same = type(component).build(where, **plain) == component
    require(same, "spec() does not build an equal one")
    if _discoverable(component):
        require(build(card.kind, component.spec()) == component, "build(spec()) is not equal")


def unknown_option_is_refused(component: Component) -> None:
    """With the nearest name."""
    name = next(iter(type(component).model_fields), "option")
    try:
        type(component).build("contract", **{f"{name}x": 1})
    except RecipeError as error:
        expected = f"'{name}'" if type(component).model_fields else "no options"
        require(expected in str(error), f"the error offers no name: {error}")
        return
    raise ContractError(f"the unknown option '{name}x' was accepted")


def config_is_frozen(component: Component) -> None:
    """What ran is what the manifest says."""
    name = next(iter(type(component).model_fields), "option")
    try:
        setattr(component, name, getattr(component, name, None))
    except (ValidationError, TypeError, AttributeError):
        return
    raise ContractError(f"option '{name}' can be changed after the component is built")


# ---- the ten slots


def trains_with_finite_losses(trial: Trial) -> None:
    """Two or three optimiser steps in a recipe."""
    history = trial.first.history
    require(history, "no step was made")
    for numbers in history:
        broken = [name for name, value in numbers.items() if not math.isfinite(value)]
        require(not broken, f"not finite at step {numbers['step']:.0f}: {', '.join(broken)}")


def only_placed_parameters_move(trial: Trial) -> None:
    """Everything else, masked entries and buffers included, stays as it was, bit by bit."""
    trainer = trial.trainer()
    placement = trainer.recipe.place.apply(trainer.rows())
    before, after = weights(trainer.lm), weights(trial.first.lm)
    names = {id(value): name for name, value in placement.parameters.items()}
    placed = {
        name: names[id(value)]
        for name, value in trainer.lm.model.named_parameters(remove_duplicate=False)
        if id(value) in names
    }
    require(set(placed.values()) == set(names.values()), "the placement has foreign parameters")
    require(before.keys() == after.keys(), "training changed the names of the parameters")
    moved = 0
    for name, value in before.items():
        changed = value != after[name]
        if name not in placed:
            require(not changed.any(), f"'{name}' moved, and place does not name it")
            continue
        mask = (placement.masks or {}).get(placed[name])
        if mask is not None and placement.masked_decay:
            require(not changed[~mask.cpu()].any(), f"masked entries of '{name}' moved")
        moved += int(changed.any())
    require(moved, "nothing moved")


def runs_are_deterministic(trial: Trial) -> None:
    """The seed of the run decides, not the global random state."""
    losses = [[one["forget_loss"] for one in run.history] for run in (trial.first, trial.again)]
    require(losses[0] == losses[1], "two runs with one seed have other losses")
    require_same(weights(trial.first.lm), weights(trial.again.lm), "two runs differ in the weights")


def micro_batches_do_not_matter(trial: Trial) -> None:
    """The first step, row by row: the same losses."""
    recipe = trial.recipe(micro_batch_tokens=1, max_steps=1)
    small, large = trial.trainer(recipe).train().history[0], trial.first.history[0]
    for name in ("forget_loss", "keep_loss"):
        if name in large:
            apart = abs(small[name] - large[name]) / max(1.0, abs(large[name]))
            require(
                apart <= SPLIT_TOLERANCE,
                f"{name} depends on the micro-batches: {large[name]:.6g} and {small[name]:.6g}",
            )


def card_names_what_is_needed(trial: Trial) -> None:
    """A need that the card names is asked for; what it does not name is not needed."""
    component, needs = trial.component, trial.component.card.needs
    if isinstance(component, Objective):
        require("refusals" in needs or "refusal" not in component.roles, "needs 'refusals'")
    kinds: Callable[[LM], tuple[str, ...]] = getattr(component, "reference_kinds", lambda lm: ())
    require("reference" in needs or not kinds(trial.lm()), "it needs 'reference', says no card")
    recipe = trial.recipe({"keep": "none"}, max_steps=1)
    try:
        trial.trainer(recipe, records={"forget": FORGET}).train()
    except RecipeError as error:
        require("retain" in needs, f"the card does not name 'retain', and without it: {error}")
        return
    require("retain" not in needs, "the card says that it needs 'retain', and it runs without")


def answers_survive_saving(trial: Trial) -> None:
    """Train, save, load: the same scores and the same words."""
    base = trial.folder / "base"
    trial.lm().save(base)
    lm = LM.load(str(base), precision="float32")
    trained = trial.trainer(lm=lm).train().lm
    trained.save(trial.folder / "trained")
    loaded = LM.load(str(trial.folder / "trained"), precision="float32")
    (scores, words), (other_scores, other_words) = answers(trained), answers(loaded)
    apart = max(
        float(np.abs(one - other).max()) for one, other in zip(scores, other_scores, strict=True)
    )
    require(apart <= 1e-6, f"scores differ by {apart:.3g} after saving and loading")
    require(words == other_words, "generates something else after saving and loading")


def resumes_to_the_same_bits(trial: Trial) -> None:
    """An interrupted run goes on to where an uninterrupted one ends."""

    class Interruption(Exception):  # noqa: N818 (nothing is wrong)
        pass

    def interrupt(step: int, total: int, numbers: object) -> None:
        if step == 2:
            raise Interruption

    length: dict[str, Any] = {"epochs": 4, "max_steps": 6}
    whole = trial.trainer(trial.recipe(**length)).train()
    run = RunDirectory(trial.folder / "run")
    run.begin({"command": "contract"})
    recipe = trial.recipe(checkpoint_steps=1, **length)
    told: list[str] = []
    try:
        trial.trainer(recipe, run=run, progress=interrupt).train()
        raise ContractError("the run was too short to be interrupted")
    except Interruption:
        result = trial.trainer(recipe, run=run, say=told.append).train()
    require(any("Resuming" in line for line in told), "the second run started from nothing")
    require_same(weights(whole.lm), weights(result.lm), "the resumed run ends elsewhere")


def rows_are_partners(trial: Trial) -> None:
    """The same rows every time; what it says it makes is there, beside the forget rows."""
    generate = cast(slots.Generate, trial.component)
    context = replace(trial.trainer().rows(), rows={}, records=RECORDS)
    made, again = generate.rows(context), generate.rows(context)
    require(made == again, "two calls make different rows")
    require(set(generate.makes) <= set(made), "it does not make what `makes` says")
    everything = {**RECORDS, **{str(role): rows for role, rows in made.items()}}
    check_partners(everything, [role for role in made if role not in ("forget", "retain")])
    for role, rows in made.items():
        require(rows, f"the role '{role}' is empty")


def choice_is_of_rows(trial: Trial) -> None:
    """Indices of forget rows, ascending, each once, at least one."""
    context = trial.trainer(trial.recipe({"select": "all"})).rows()
    chosen = cast(Any, trial.component).choose(context)
    require(chosen, "no row was chosen")
    require(chosen == sorted(set(chosen)), "indices are not ascending, or not distinct")
    require(set(chosen) <= set(range(len(context.rows["forget"]))), "there is no such row")


def pairs_are_of_rows(trial: Trial) -> None:
    """Indices in range, the same for the same generator, and no partner where there is none."""
    template, sample = trial.lm().template, cast(Any, trial.component)
    forget, retain = make_rows(template, FORGET), make_rows(template, RETAIN)
    for epoch in range(2):
        drawn = [sample.epoch(forget, retain, epoch, generator(3, epoch)) for _ in range(2)]
        require(drawn[0] and drawn[0] == drawn[1], "an epoch is empty, or not deterministic")
        for index, kept in drawn[0]:
            require(0 <= index < len(forget), f"there is no forget row {index}")
            require(kept is None or 0 <= kept < len(retain), f"there is no retain row {kept}")
    if "retain" not in sample.card.needs:
        pairs = sample.epoch(forget, [], 0, generator(3, 0))
        require(pairs and all(kept is None for _, kept in pairs), "pairs with retain rows of none")


def weights_have_mean_one(trial: Trial) -> None:
    """One finite weight, not below 0, per forget row."""
    context = trial.trainer().rows()
    found = cast(Weigh, trial.component).weights(context)
    require(found.shape == (len(context.rows["forget"]),), f"weights of shape {found.shape}")
    require(found.isfinite().all() and (found >= 0).all(), f"weights are {found.tolist()}")
    require(abs(float(found.mean()) - 1) < 1e-4, f"the mean weight is {float(found.mean()):.6g}")


def placing_changes_no_answer(trial: Trial) -> None:
    """Before the first step the model is the one that was given."""
    trainer = trial.trainer()
    before, words = answers(trainer.lm)
    placement = cast(Place, trial.component).apply(trainer.rows())
    after, other_words = answers(trainer.lm)
    require(words == other_words, "the placed model says something else")
    close = all(np.allclose(one, two, atol=1e-5) for one, two in zip(before, after, strict=True))
    require(close, "the placed model scores differently")
    require(
        all(value.requires_grad for value in placement.parameters.values()),
        "a placed parameter takes no gradient",
    )


def forget_loss_falls(trial: Trial) -> None:
    """A few steps of its own gradient, on all rows at once."""
    for rate in FALLING_RATES:
        recipe = trial.recipe(
            {"keep": "none"}, learning_rate=rate, batch_size=len(FORGET),
            epochs=FALLING_STEPS, max_steps=FALLING_STEPS, weight_decay=0.0,
        )  # fmt: skip
        losses = [numbers["forget_loss"] for numbers in trial.trainer(recipe).train().history]
        if losses[-1] < losses[0]:
            return
    raise ContractError(f"the loss went from {losses[0]:.6g} to {losses[-1]:.6g}")


def retain_loss_holds(trial: Trial) -> None:
    """With weight, its own loss ends lower than without."""
    ends: list[float] = []
    for weight in (0.0, 10.0):
        recipe = trial.recipe(
            {"balance": {"name": "weighted_sum", "retain_weight": weight}},
            learning_rate=FALLING_RATES[0], batch_size=len(FORGET), epochs=FALLING_STEPS,
            max_steps=FALLING_STEPS,
        )  # fmt: skip
        last = trial.trainer(recipe).train().history[-1]
        if "keep_loss" not in last:  # the slot is meant to be empty
            return
        ends.append(last["keep_loss"])
    require(ends[1] < ends[0], f"ends at {ends[1]:.6g} with and {ends[0]:.6g} without weight")


def weights_of_losses_are_finite(trial: Trial) -> None:
    """From the start on, whatever it observes; what it remembers is numbers by name."""
    balance = cast(Balance, trial.component)
    state: State = balance.start()
    for step, (forget, keep) in enumerate(((1.0, 2.0), (0.5, 9.0), (-3.0, None))):
        both = balance.weights(state)
        require(len(both) == 2 and all(map(math.isfinite, both)), f"weights are {both}")
        require(min(both) >= 0, f"a loss is climbed: weights are {both}")
        balance.observe(forget, keep, float(step), state)
        remembered = json.loads(json.dumps(state))
        require(all(isinstance(one, int | float) for one in remembered.values()), "a state of more")


def hardening_adds_and_puts_back(trial: Trial) -> None:
    """The forget gradient is added to ``.grad``, and the weights are where they were."""
    seen: list[None] = []

    class Watching(Balance):
        card = registry.card("balance", "weighted_sum")

        def weights(self, state: State) -> tuple[float, float]:
            return 1.0, 1.0

        def gradient(self, passes: Passes, harden: Harden) -> None:
            before = [value.detach().clone() for value in passes.parameters]
            harden.forget(passes)
            alone = [None if p.grad is None else p.grad.clone() for p in passes.parameters]
            require(any(one is not None and one.any() for one in alone), "no gradient was left")
            for parameter in passes.parameters:
                parameter.grad = torch.ones_like(parameter)
            harden.forget(passes)
            for parameter, value, mine in zip(passes.parameters, before, alone, strict=True):
                require(torch.equal(parameter, value), "hardening left the weights elsewhere")
                expected = torch.ones_like(parameter) if mine is None else mine + 1
                require(
                    torch.allclose(cast(Tensor, parameter.grad), expected, atol=1e-4, rtol=1e-3),
                    "hardening replaces the gradient instead of adding to it",
                )
            seen.append(None)

    trial.trainer(trial.recipe({"balance": Watching()}, max_steps=1)).train()
    require(seen, "the gradient was never asked for")


def finished_model_answers(trial: Trial) -> None:
    """An ordinary model with finite scores."""
    scores, words = answers(trial.first.lm)
    require(all(np.isfinite(one).all() for one in scores), "scores are not finite")
    require(len(words) == 3, "answers are missing")


# ---- attacks


def _attack_context(original: LM) -> AttackContext:
    unrelated = (QA(question="Tea?", answer="Hot."), Passage(text="Bread rises slowly."))
    return AttackContext(FORGET, RETAIN, unrelated, original, 0, lambda _: None)


def _variants(attack: ModelAttack) -> Iterable[ModelAttack]:
    """All settings of an attack; an option ``steps`` is made small, to be fast."""
    short = {"steps": 2} if "steps" in type(attack).model_fields else {}
    for variant in attack.variants():
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
        score = made[0].score([Score(Prompt.ask(FORGET[0].question), FORGET[0].answer)])[0]
        require(isinstance(score, TokenScores), f"{title}: scores are not finite")


def rewriting_is_deterministic(trial: Trial) -> None:
    """Distinct prompts other than the plain one, the same every time."""
    if not isinstance(trial.component, PromptAttack):
        return
    count = 0
    for record in (*FORGET, *EVERY_KIND):
        prompt = ask(record)
        if prompt is None:
            continue
        found = tuple(trial.component.rewrite(record, prompt))
        require(all(isinstance(one, Prompt) for one in found), "it returns more than prompts")
        require(found == tuple(trial.component.rewrite(record, prompt)), "not deterministic")
        require(len(set(found)) == len(found), f"the same prompt twice for {record}")
        require(prompt not in found, f"the plain prompt is returned for {record}")
        count += len(found)
    require(count, "it applies to no record")


# ---- metrics

#: From the least to the most that is asked of a system; who has one has those before it.
_CAPABILITIES = ("", "generate", "score", "distribution", "hidden", "weights")


def metric_gives_a_value_or_a_reason(trial: Trial) -> None:
    """Hashable requests of the card's capability; an item for every record."""
    metric = trial.component
    if not isinstance(metric, ItemMetric):
        return
    lm, valued = trial.lm(), 0
    for record in EVERY_KIND:
        prompt = metric.prompt(record)
        if prompt is None:
            continue
        for asked in (prompt, replace(prompt, prefill="Sure:")):
            requests = list(metric.requests(record, asked))
            require(len({*requests}) or not requests, "requests are not hashable")
            for request in requests:
                needed = needed_capability(request)
                stated = _CAPABILITIES.index(metric.card.capability or "")
                able = stated >= _CAPABILITIES.index(needed)
                require(able, f"the card does not say that it needs '{needed}'")
            for answered in (partial(_asked, lm), _nothing_said):
                found = answered(requests)
                while more := [
                    request
                    for request in metric.follow_up(record, asked, found)
                    if request not in found
                ]:
                    found |= answered(more)
                item = metric.score(record, asked, found)
                require(isinstance(item, Item), "score() returns no Item")
                require(item.value is not None or item.reason, f"no value, no reason: {record}")
                require(item == metric.score(record, asked, found), "not deterministic")
                valued += item.value is not None
    require(valued, "no record has a value")
    values = evaluate(lm, {"forget": EVERY_KIND}, [metric])
    for item in values.items[metric.card.name]["forget"]:
        require(item.value is not None or item.reason, "no value and no reason")


def _asked(lm: LM, requests: Sequence[Request]) -> dict[Request, Answer]:
    """The answers, generated ones cut short."""
    short = {
        request: replace(request, decoding=replace(request.decoding, max_new_tokens=4))
        if isinstance(request, Generate)
        else request
        for request in requests
    }
    answers = measure(lm, short.values())
    return {request: answers[asked] for request, asked in short.items()}


def _nothing_said(requests: Sequence[Request]) -> dict[Request, Answer]:
    """Empty answers, and scores of a model to which everything is next to impossible."""
    low = np.full(3, -200.0, np.float32)
    hopeless = TokenScores(low, np.zeros(3, np.bool_), True, low, np.zeros_like(low))
    return {
        request: hopeless
        if isinstance(request, Score)
        else ("" if isinstance(request, Generate) else np.zeros((3, 4), np.float32))
        for request in requests
    }


def benchmark_declares_its_table(component: Component) -> None:
    """One forget and one utility axis; every column of an item metric is asked on its split."""
    if not isinstance(component, Benchmark):
        return
    asks = {ask.name: ask for ask in component.asks()}
    columns = component.columns()
    keys = [column.key for column in columns]
    require(len(set(keys)) == len(keys), "two columns show the same number")
    for axis in ("forget", "utility"):
        count = sum(column.axis == axis for column in columns)
        require(count == 1, f"{count} columns are the axis '{axis}', not one")
    for key in keys:
        label, _, split = key.partition("/")
        if split and label in asks and isinstance(asks[label].metric, ItemMetric):
            splits = asks[label].splits
            require(splits is None or split in splits, f"'{label}' is not asked on '{split}'")


def summary_is_a_number_or_nothing(trial: Trial) -> None:
    """With and without a reference, and where no record has a value."""
    metric = trial.component
    if not isinstance(metric, SummaryMetric):
        return
    require(metric.uses(), "it reads no metric")
    for name in metric.uses():
        require(isinstance(build("metric", name), ItemMetric), f"'{name}' is no item metric")
    splits = {"forget": EVERY_KIND, "retain": EVERY_KIND[:3]}
    values = evaluate(trial.lm(), splits, [metric])
    silent = replace(
        values,
        items={
            name: {split: [Item(None, "silent")] * len(row) for split, row in by_split.items()}
            for name, by_split in values.items.items()
        },
        means={name: dict.fromkeys(splits) for name in values.items},
    )
    for mine, reference in ((values, values), (values, None), (silent, values), (silent, silent)):
        for name, value in metric.summarise(mine, reference).items():
            require(value is None or math.isfinite(value), f"'{name}' is {value}")
    require(
        metric.summarise(values, values) == metric.summarise(values, values), "not deterministic"
    )


# ---- guards

_REQUEST = ForgetRequest(forget=FORGET, subjects=("Ada Quill", "Ben Orr"), retain=RETAIN)
_SPOKEN = "The model has spoken."


class _Speaker(BlackBox):
    """A system that says one sentence and counts how often it was asked."""

    name, fingerprint = "speaker", "speaker"
    capabilities = frozenset({"generate", "score"})

    def __init__(self) -> None:
        self.asked = 0

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str | NoAnswer]:
        self.asked += len(prompts)
        return [_SPOKEN for _ in prompts]

    def score(self, requests: Sequence[Score]) -> list[TokenScores | NoAnswer]:
        raise ContractError("the guarded system was asked for scores")


def _mind(trial: Trial, request: ForgetRequest = _REQUEST) -> GuardMind:
    return cast(Guard, trial.component).prepare(request)


def guard_refuses_what_is_forgotten(trial: Trial) -> None:
    """Each forget question or its answer is caught; small talk is not. The same every time."""
    mind, other = _mind(trial), _mind(trial)
    for record in FORGET:
        prompt = Prompt.ask(record.question)
        before = mind.before(prompt)
        caught = mind.after(prompt, record.answer) if before is None else before
        require(caught, f"neither '{record.question}' nor its answer is caught")
        require(record.answer not in str(caught), "the refusal tells the answer")
        require(before == other.before(prompt), "two minds of one request judge differently")
    small_talk = Prompt.ask("How do I boil an egg?")
    passes = mind.before(small_talk) is None and mind.after(small_talk, "In hot water.") is None
    require(passes, "small talk is refused")
    for odd in (Prompt(), Prompt(text=""), Prompt.ask("?" * 5000), Prompt.ask("\u200b\ud7ff")):
        mind.before(odd), mind.after(odd, "")


def guard_gives_no_scores(trial: Trial) -> None:
    """Behind a guard nothing white-box is left, and a refused prompt reaches no system."""
    speaker = _Speaker()
    guarded = GuardedSystem(speaker, _mind(trial), "guarded")
    require(guarded.capabilities == {"generate"}, "the guarded system has more than 'generate'")
    prompts = [Prompt.ask(record.question) for record in FORGET]
    try:
        guarded.score([Score(prompts[0], "Norrby")])
    except TypeError:
        pass
    else:
        raise ContractError("the guarded system gives scores")
    replies = guarded.generate(prompts, Decoding(4))
    refused = sum(guarded.mind.before(prompt) is not None for prompt in prompts)
    require(len(replies) == len(prompts), "answers are missing")
    require(speaker.asked == len(prompts) - refused, "a refused prompt reached the system")


def guard_fails_closed(trial: Trial) -> None:
    """Where a judgement breaks down, the system's answer is not let through."""
    mind = _mind(trial)
    for verb in ("before", "after"):
        speaker = _Speaker()
        with mock.patch.object(type(mind), verb, side_effect=RuntimeError("broken")):
            try:
                replies = GuardedSystem(speaker, mind, "guarded").generate(
                    [Prompt.ask("How do I boil an egg?")], Decoding(4)
                )
            except RuntimeError:
                continue
        require(_SPOKEN not in replies, f"with a broken '{verb}' the answer comes through")


def guard_changes_the_fingerprint(trial: Trial) -> None:
    """Cached answers belong to one guard and one request."""
    mine, again = _mind(trial).fingerprint, _mind(trial).fingerprint
    require(mine == again, "two minds of one request have two fingerprints")
    smaller = _REQUEST.model_copy(update={"forget": FORGET[2:], "subjects": ("Ben Orr",)})
    require(mine != _mind(trial, smaller).fingerprint, "another request has the same fingerprint")
    guarded = GuardedSystem(_Speaker(), _mind(trial), "guarded").fingerprint
    require(guarded not in (None, "speaker"), "the guarded system is cached as the bare one")


# ---- editors


def edit_is_undone_exactly(trial: Trial) -> None:
    """The patch, and the patch from disk, put every bit back; a refusal changes nothing."""
    editor = cast(Editor, trial.component)
    lm = trial.lm()
    before = weights(lm)
    try:
        torch.manual_seed(1)
        patch = editor.edit(lm, _REQUEST, seed=0, say=lambda _: None)
    except DelibleError:
        require_same(before, weights(lm), "it refused the model after changing it")
        raise
    edited = weights(lm)
    require(any(not torch.equal(before[name], edited[name]) for name in before), "nothing changed")
    scores, _ = answers(lm)
    require(all(np.isfinite(one).all() for one in scores), "scores are not finite after the edit")
    patch.save(trial.folder / "patch")
    patch.undo(lm)
    require_same(before, weights(lm), "undoing leaves a difference")
    torch.manual_seed(2)
    editor.edit(lm, _REQUEST, seed=0, say=lambda _: None)
    require_same(edited, weights(lm), "two edits differ")
    Patch.load(trial.folder / "patch").undo(lm)
    require_same(before, weights(lm), "undoing with the saved patch leaves a difference")


# ---- which checks are for which kind

ComponentCheck = Callable[[Component], None]
TrialCheck = Callable[[Trial], None]

#: Without a model, for every kind.
ALWAYS: tuple[ComponentCheck, ...] = (
    card_is_complete, options_are_described, config_comes_back_from_its_spec,
    unknown_option_is_refused, config_is_frozen, benchmark_declares_its_table,
)  # fmt: skip
_TRAINED = (
    trains_with_finite_losses, only_placed_parameters_move, runs_are_deterministic,
    micro_batches_do_not_matter,
)  # fmt: skip
_RUN = (card_names_what_is_needed, answers_survive_saving, resumes_to_the_same_bits)

#: On every architecture.
EVERY_FAMILY: dict[Kind, tuple[TrialCheck, ...]] = {
    **{cast(Kind, slot): _TRAINED for slot in SLOTS},
    "place": (placing_changes_no_answer, *_TRAINED),
    "objective": (*_TRAINED, forget_loss_falls),
    # what a finisher changes is its own affair
    "finish": (
        trains_with_finite_losses, runs_are_deterministic, micro_batches_do_not_matter,
        finished_model_answers,
    ),
    "attack": (attacked_model_is_a_copy,),
    "editor": (edit_is_undone_exactly,),
}  # fmt: skip
#: On one architecture: slow, or nothing to do with the model.
ONE_FAMILY: dict[Kind, tuple[TrialCheck, ...]] = {
    **{cast(Kind, slot): _RUN for slot in SLOTS},
    "generate": (rows_are_partners, *_RUN),
    "select": (choice_is_of_rows, *_RUN),
    "sample": (pairs_are_of_rows, *_RUN),
    "weigh": (weights_have_mean_one, *_RUN),
    "keep": (retain_loss_holds, *_RUN),
    "balance": (weights_of_losses_are_finite, *_RUN),
    "harden": (hardening_adds_and_puts_back, *_RUN),
    "attack": (rewriting_is_deterministic,),
    "metric": (metric_gives_a_value_or_a_reason, summary_is_a_number_or_nothing),
    "guard": (
        guard_refuses_what_is_forgotten, guard_gives_no_scores, guard_fails_closed,
        guard_changes_the_fingerprint,
    ),
}  # fmt: skip


def check(
    component: type[Component] | Component,
    families: Sequence[str] = ("llama", "gpt2", "gemma2", "qwen2_moe"),
    *,
    slots: Mapping[str, Any] | None = None,
) -> list[str]:
    """Runs the contract of a component on tiny random models.

    Args:
        component: A registered class (its defaults are used) or an instance, of any kind.
        families: Architectures, names of :data:`delible.testing.FAMILIES`. One that the component
            refuses with a :class:`ModelError` is passed over, if another one is not.
        slots: What else a recipe must hold for the component to work, such as
            ``{"place": "lora"}`` for a finisher of adapters; the default is NPO with a
            likelihood loss on retain rows.

    Returns:
        The checks that ran, such as ``"runs_are_deterministic on gpt2"``.

    Raises:
        ContractError: A check failed; the message names component, architecture and check.
        ModelError: An unknown family.
    """
    built = _built(component)
    name = f"{built.card.kind} '{built.card.name}'"
    require(built.card.kind in get_args(Kind), f"{name}: unknown kind")
    done: list[str] = []
    for always in ALWAYS:
        _run(always, built, name, done)
    refused: dict[str, str] = {}
    once = ONE_FAMILY.get(built.card.kind, ())
    with (
        tempfile.TemporaryDirectory(prefix="delible-contract-") as folder,
        mock.patch.dict(os.environ, {"DELIBLE_CACHE": folder}),
        torch.random.fork_rng(devices=[]),
    ):
        for family in families:
            place = Path(folder) / family
            place.mkdir(exist_ok=True)
            _tiny(family)  # an unknown name is no refusal
            trial = Trial(built, family, slots or {}, place)
            checks = (*EVERY_FAMILY.get(built.card.kind, ()), *once)
            try:
                for one in checks:
                    _run(one, trial, f"{name} on {family}", done, f" on {family}")
                once = ()
            except ModelError as error:
                refused[family] = str(error)
    told = "; ".join(f"{family}: {reason}" for family, reason in refused.items())
    require(not refused or len(refused) < len(families), f"{name} refuses every one: {told}")
    return done


def _built(component: type[Component] | Component) -> Component:
    own = component if isinstance(component, type) else type(component)
    # a card that is inherited names the parent
    require("card" in vars(own), f"{own.__name__} has no card: decorate it with @register(…)")
    if isinstance(component, Component):
        return component
    try:
        return component()
    except ValidationError as error:
        raise ContractError(
            f"{component.card.kind} '{component.card.name}' cannot be built from its defaults; "
            f"give check() an instance: {error}"
        ) from error


def _run(
    one: Callable[[Any], None], subject: Any, name: str, done: list[str], where: str = ""
) -> None:
    try:
        one(subject)
    except ModelError:
        raise
    except Exception as error:  # a contract is broken by whatever a component raises
        kind = "" if isinstance(error, ContractError) else f"{type(error).__name__}: "
        raise ContractError(f"{name}, {one.__name__}: {kind}{error}") from error
    done.append(f"{one.__name__}{where}")


__all__ = ["ContractError", "Trial", "check", "require"]
