"""The ten slots: a component in a recipe that trains."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from delible import registry
from delible.context import Context
from delible.errors import RecipeError
from delible.lm.lm import LM
from delible.rundir import RunDirectory
from delible.testing.contract.trial import (
    FALLING_RATES,
    FALLING_STEPS,
    FORGET,
    RECORDS,
    RETAIN,
    SPLIT_TOLERANCE,
    ContractError,
    Trial,
    answers,
    require,
    require_same,
    weights,
)
from delible.train import slots
from delible.train.generated import check_partners
from delible.train.losses import Objective, State
from delible.train.passes import Passes
from delible.train.randomness import generator
from delible.train.rows import make_rows
from delible.train.slots import (
    Balance,
    Harden,
    Place,
    Weigh,
)
from delible.train.step import Step
from delible.watching import shown

#: A step's rows at most: more than the records or what a generator makes of them.
ALL_ROWS = 1000


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
        trial.trainer(recipe, context=Context(run=run, steps=interrupt)).train()
        raise ContractError("the run was too short to be interrupted")
    except Interruption:
        with shown(told.append):
            result = trial.trainer(recipe, context=Context(run=run)).train()
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
    context = trainer.rows()  # which may give the model new tokens
    before, words = answers(trainer.lm)
    placement = cast(Place, trial.component).apply(context)
    after, other_words = answers(trainer.lm)
    require(words == other_words, "the placed model says something else")
    close = all(np.allclose(one, two, atol=1e-5) for one, two in zip(before, after, strict=True))
    require(close, "the placed model scores differently")
    require(
        all(value.requires_grad for value in placement.parameters.values()),
        "a placed parameter takes no gradient",
    )


def forget_loss_falls(trial: Trial) -> None:
    """A few steps of its own gradient, on all rows at once.

    What a loss draws at a step is the first step's at all of them: at the others it would be
    another loss.
    """

    def first(step: Step, *purpose: object) -> torch.Generator:
        return generator(step.seed, *purpose, 0)

    with mock.patch.object(Step, "generator", first):
        _require_falling(trial)


def _require_falling(trial: Trial) -> None:
    for rate in FALLING_RATES:
        recipe = trial.recipe(
            {"keep": "none"}, learning_rate=rate, batch_size=ALL_ROWS,
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
        both = balance.weights(state, step / 3)
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

        def weights(self, state: State, progress: float) -> tuple[float, float]:
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
