"""Which checks are for which kind, and :func:`check`, which runs them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args
from unittest import mock

import torch
from pydantic import ValidationError

from delible.cards import SLOTS, Kind
from delible.component import Component
from delible.context import Context
from delible.errors import ModelError
from delible.system.base import System
from delible.system.role import RoleName
from delible.system.roles import Roles
from delible.testing.contract.attack import (
    attacked_model_is_a_copy,
    conversing_is_deterministic,
    inferring_leaves_no_trace,
    looking_leaves_no_trace,
    rewriting_is_deterministic,
)
from delible.testing.contract.component import (
    card_is_complete,
    config_comes_back_from_its_spec,
    config_is_frozen,
    options_are_described,
    unknown_option_is_refused,
)
from delible.testing.contract.editor import edit_is_undone_exactly
from delible.testing.contract.guard import (
    guard_changes_the_fingerprint,
    guard_fails_closed,
    guard_gives_no_scores,
    guard_refuses_what_is_forgotten,
    guard_streams_what_it_answers,
)
from delible.testing.contract.intervention import (
    intervention_holds_on_every_road,
    intervention_is_taken_off_exactly,
    intervention_survives_saving,
)
from delible.testing.contract.method import outcome_is_kept_opened_and_taken_off
from delible.testing.contract.metric import (
    benchmark_declares_its_table,
    metric_gives_a_value_or_a_reason,
    summary_is_a_number_or_nothing,
)
from delible.testing.contract.procedure import (
    killed_anywhere_it_goes_on_to_the_same_bits,
    stages_are_declared,
)
from delible.testing.contract.reward import (
    reward_judges_each_completion_alone,
    reward_tells_answers_apart,
)
from delible.testing.contract.slots import (
    answers_survive_saving,
    card_names_what_is_needed,
    choice_is_of_rows,
    finished_model_answers,
    forget_loss_falls,
    hardening_adds_and_puts_back,
    micro_batches_do_not_matter,
    only_placed_parameters_move,
    pairs_are_of_rows,
    placing_changes_no_answer,
    resumes_to_the_same_bits,
    retain_loss_holds,
    rows_are_partners,
    runs_are_deterministic,
    trains_with_finite_losses,
    weights_have_mean_one,
    weights_of_losses_are_finite,
)
from delible.testing.contract.trial import SEES, ContractError, Trial, require, tiny_lm

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
    "attack": (attacked_model_is_a_copy, looking_leaves_no_trace),
    "editor": (edit_is_undone_exactly,),
    "intervention": (
        intervention_is_taken_off_exactly, intervention_survives_saving,
        intervention_holds_on_every_road,
    ),
    "procedure": (stages_are_declared,),
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
    "attack": (
        rewriting_is_deterministic, conversing_is_deterministic, inferring_leaves_no_trace,
    ),
    "metric": (metric_gives_a_value_or_a_reason, summary_is_a_number_or_nothing),
    "reward": (reward_judges_each_completion_alone, reward_tells_answers_apart),
    "editor": (outcome_is_kept_opened_and_taken_off,),
    "intervention": (outcome_is_kept_opened_and_taken_off,),
    "procedure": (
        killed_anywhere_it_goes_on_to_the_same_bits, outcome_is_kept_opened_and_taken_off,
    ),
    "guard": (
        guard_refuses_what_is_forgotten, guard_gives_no_scores, guard_fails_closed,
        guard_changes_the_fingerprint, guard_streams_what_it_answers,
        outcome_is_kept_opened_and_taken_off,
    ),
}  # fmt: skip


def check(
    component: type[Component] | Component,
    families: Sequence[str] = ("llama", "gpt2", "gemma2", "qwen2_moe"),
    *,
    slots: Mapping[str, Any] | None = None,
    players: Mapping[RoleName, System] | None = None,
) -> list[str]:
    """Runs the contract of a component on tiny random models.

    Args:
        component: A registered class (its defaults are used) or an instance, of any kind.
        families: Architectures, names of :data:`delible.testing.FAMILIES` (a component that needs
            pictures has a model that sees instead, and needs Pillow). One that the component
            refuses with a :class:`ModelError` is passed over, if another one is not.
        slots: What else a recipe must hold for the component to work, such as
            ``{"place": "lora"}`` for a finisher of adapters; the default is NPO with a
            likelihood loss on retain rows.
        players: Who plays the parts that a guard consults (scripted systems), so that forgotten
            people are caught and small talk passes.

    Returns:
        The checks that ran, such as ``"runs_are_deterministic on gpt2"``.

    Raises:
        ContractError: A check failed; the message names component, architecture and check.
        ModelError: An unknown family.
    """
    built = _built(component)
    if "pictures" in built.card.needs:
        families = (SEES,)
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
            tiny_lm(family)  # an unknown name is no refusal
            context = Context(roles=Roles(dict(players or {})))
            trial = Trial(built, family, slots or {}, place, context)
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
