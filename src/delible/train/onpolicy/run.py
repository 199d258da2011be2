"""An on-policy run: from questions and rewards to a trained model.

Which questions meet in which step is planned before the first one, and every random number depends
on the seed, the step and the question alone: a run that goes on from a checkpoint reaches the same
weights as one that was never stopped (bit by bit where the same completions share batches, which
they do on one machine). Checkpoints are ours (safetensors and JSON), never TRL's pickles.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from delible.component import build
from delible.context import NO_CONTEXT, Context
from delible.errors import RunError
from delible.lm.lm import LM
from delible.records import RecordBase
from delible.system.asks import Decoding
from delible.train import checkpoint
from delible.train.monitor import Monitor
from delible.train.moves import check_moves, sampled
from delible.train.onpolicy.advantages import Advantages, adapted, advantages
from delible.train.onpolicy.guards import Guards
from delible.train.onpolicy.numbers import numbers, rates
from delible.train.onpolicy.retained import Retained
from delible.train.onpolicy.rewards import Reward, Rewards
from delible.train.onpolicy.rows import Completion, Question
from delible.train.onpolicy.sampling import Said, complete
from delible.train.onpolicy.settings import OnPolicyTraining
from delible.train.onpolicy.starting import (
    masked_optimizer,
    placed,
    planned,
    require_extra,
    require_one_process,
    tokenized,
)
from delible.train.randomness import generator
from delible.train.recipe import Training
from delible.train.schedule import learning_rate_factor
from delible.train.slots import Place

logger = logging.getLogger(__name__)

#: Held-out questions that a look asks.
LOOKED_AT = 64


@dataclass
class Trained:
    """What a run made.

    Attributes:
        lm: The model, trained in place.
        history: Numbers of every step.
        tokens: That were generated.
        stopped: Why it ended before its last step, if it did.
        notes: What happened: completions without a value, hits by reward.
    """

    lm: LM
    history: list[dict[str, float]]
    tokens: int
    stopped: str | None
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return len(self.history)


def train(
    lm: LM,
    questions: Sequence[Question],
    rewards: Sequence[Reward | str | Mapping[str, Any]],
    settings: OnPolicyTraining,
    *,
    place: str | Mapping[str, Any] | Place = "all",
    context: Context = NO_CONTEXT,
    retain: Sequence[RecordBase] = (),
    held_out: Sequence[Question] = (),
    name: str = "on-policy",
) -> Trained:
    """Trains a model on its own completions, in place.

    The reference, from which ``kl_weight`` holds it back, is the model as it is given.

    Args:
        questions: Of both tags.
        rewards: What completions are worth, see :class:`Rewards`.
        place: What moves.
        retain: Records that are learned beside (``retain_weight``), and of which the utility
            budget keeps a share.
        held_out: Questions that are never trained on, for looks; none: the forget questions.
        name: Of the run, in messages; its checkpoints lie in a folder of this name.

    Raises:
        MissingExtraError: The extra ``rl`` is not installed.
        DataError: A question is too long, or there is none.
        RecipeError: The rewards or the place do not fit.
        RunError: It collapsed, or a reward broke down; the last checkpoint stays.
    """
    require_extra()
    require_one_process(name)
    return _Run(lm, questions, rewards, settings, place, context, retain, held_out, name).run()


class _Run:
    def __init__(
        self,
        lm: LM,
        questions: Sequence[Question],
        rewards: Sequence[Reward | str | Mapping[str, Any]],
        settings: OnPolicyTraining,
        place: str | Mapping[str, Any] | Place,
        context: Context,
        retain: Sequence[RecordBase],
        held_out: Sequence[Question],
        name: str,
    ) -> None:
        self.lm, self.settings, self.context, self.name = lm, settings, context, name
        self.questions = list(questions)
        self.place: Place = build("place", dict(place) if isinstance(place, Mapping) else place)
        if lm.wears_adapter:
            lm.merge_adapter()
        lm.precision = lm.resolved(settings.precision)
        self.ids = tokenized(lm, self.questions, settings, name)
        self.rewards = Rewards(rewards, self.questions, context)
        self.retained = Retained.of(lm, retain, settings, context.seed)
        self.placement = placed(lm, self.place, self.questions, retain, context, name)
        self.optimizer = masked_optimizer(settings, self.placement)
        self.monitor = self._monitor(retain)
        self.looked_at = list(held_out or [q for q in self.questions if q.tag == "forget"])
        self.guards = Guards(settings)
        self.weight = settings.kl_weight
        self.history: list[dict[str, float]] = []
        self.step_numbers: dict[str, float] = {}
        self.judged: Advantages | None = None
        self.tokens, self.began, self.stopped = 0, 0, ""
        self.last_saved = self.last_step = time.monotonic()
        run = context.run
        self.folder = None if run is None else run.path / "checkpoint" / name

    # ---- before the first step

    def _monitor(self, retain: Sequence[RecordBase]) -> Monitor:
        training = Training.build(
            "training", utility_budget=self.settings.utility_budget,
            monitor_steps=self.settings.monitor_steps,
        )  # fmt: skip
        records: dict[str, list[RecordBase]] = {
            "forget": [one.known for one in self.questions if one.known is not None],
            "retain": list(retain),
        }
        return Monitor(
            self.lm, training, records, self.placement.parameters, self.context.run,
            self.context.seed,
        )  # fmt: skip

    # ---- the steps

    def run(self) -> Trained:
        from delible.train.onpolicy import trl_adapter

        begin = self._resume()
        if begin < self.settings.steps and not self.stopped:
            before = sampled(self.lm, self.placement) if begin == 0 else None
            self.before, self.began = before, begin
            reference = trl_adapter.reference_of(self.lm, self.placement)
            self._to_last(begin)
            with trl_adapter.left_as_it_was(self.lm), tempfile.TemporaryDirectory() as folder:
                try:
                    self._steps(begin, reference, Path(folder))
                except KeyboardInterrupt:
                    self._save(len(self.history))
                    raise
        if self.stopped and self.monitor.restores:
            self.monitor.restore()
        for value in self.placement.parameters.values():
            value.grad = None
        self.lm.touch()
        notes = {
            "generated_tokens": self.tokens,
            "no_value": dict(self.rewards.tally.no_value),
            "hits": dict(self.rewards.tally.hits.most_common(50)),
            "equal_groups": int(sum(one.get("equal_groups", 0) for one in self.history)),
            "parameters": sum(v.numel() for v in self.placement.parameters.values()),
            "kl_weight": self.weight,
        }
        return Trained(self.lm, self.history, self.tokens, self.stopped or None, notes)

    def _steps(self, begin: int, reference: Any, folder: Path) -> None:
        from delible.train.onpolicy import trl_adapter

        settings = self.settings
        plan = planned(len(self.questions), settings, self.context.seed)
        self.offset = begin // settings.inner_steps * settings.questions_per_step
        self.order = plan
        hooks = trl_adapter.Hooks(
            self._prompts, self._generate, self._judge, self._begin, self._before_update,
            self._after, self._retain,
        )  # fmt: skip
        trl_adapter.run(
            self.lm, settings, self.placement, hooks,
            texts=[self.questions[one].text or "?" for one in plan[self.offset :]],
            begin=begin,
            passes=settings.passes(self._fits()),
            seed=self.context.seed,
            optimizer=self.optimizer,
            factor=lambda step: learning_rate_factor(
                settings.schedule, step, settings.steps, settings.warmup_steps
            ),
            folder=folder,
            reference=reference,
            weight=lambda: self.weight,
        )  # fmt: skip

    def _fits(self) -> int:
        """Completions per pass: about as many tokens as a scoring pass takes, a fourth of it."""
        longest = max(len(one) for one in self.ids) + self.settings.max_new_tokens
        return max(1, self.lm.budget.tokens // (4 * longest))

    def _prompts(self, places: Sequence[int]) -> list[list[int]]:
        return [list(self.ids[self.order[self.offset + place]]) for place in places]

    def _generate(self, places: Sequence[int], ids: list[list[int]]) -> list[list[int]]:
        settings, seen, seeds = self.settings, dict[int, int](), list[str]()
        for place in places:
            number = seen[place] = seen.get(place, -1) + 1
            seeds.append(f"{self.context.seed}/on-policy/{self.offset + place}/{number}")
        decoding = Decoding(
            settings.max_new_tokens, temperature=settings.temperature, top_p=settings.top_p
        )
        self.said = complete(self.lm, ids, decoding, seeds)
        return [list(one.tokens) for one in self.said]

    def _judge(self, places: Sequence[int], said: list[list[int]]) -> list[float]:
        completions = [
            self._completion(self.questions[self.order[self.offset + place]], tokens)
            for place, tokens in zip(places, said, strict=True)
        ]
        totals = self.rewards.of(completions)
        values = [one.value for one in totals]
        lengths = [len(tokens) for tokens in said]
        found = advantages(values, self.settings.group_size, self.settings.advantage, lengths)
        self.step_numbers = numbers(completions, totals, found)
        self.tokens += sum(lengths)
        self.guards.judged(self.step_numbers, len(completions), self.rewards.tally)
        return found.values

    def _completion(self, question: Question, tokens: Sequence[int]) -> Completion:
        ended = bool(tokens) and tokens[-1] in self.lm.ends
        text = self.lm.tokenizer.decode(list(tokens), skip_special_tokens=True).strip()
        return Completion(question, text, tuple(tokens), ended)

    def _begin(self, step: int) -> None:
        seed = generator(self.context.seed, "on-policy step", self.began + step).initial_seed()
        torch.manual_seed(seed)

    def _retain(self, step: int, number: int, count: int) -> Any:
        if self.retained is None:
            return None
        return self.retained.loss(self.began + step, number, count)

    def _before_update(self) -> None:
        for name, value in self.placement.parameters.items():
            if value.grad is not None and not bool(value.grad.isfinite().all()):
                self._collapse(f"the gradient of {name} is not finite")

    def _after(self, step: int, found: Mapping[str, float]) -> bool:
        done, settings = self.began + step, self.settings
        now = time.monotonic()
        told = {"step": float(done), **self.step_numbers}
        for ours, theirs in TOLD.items():
            if (value := found.get(theirs)) is not None:
                told[ours] = float(value)
        told["kl_weight"] = self.weight
        told["tokens_per_second"] = told.get("generated_tokens", 0.0) / max(1e-9, now -
            self.last_step)  # fmt: skip
        self.last_step = now
        self._check_moved(told)
        if settings.kl_target is not None and "kl" in told:
            self.weight = adapted(self.weight, told["kl"], settings.kl_target, settings.kl_horizon)
        if done % settings.monitor_steps == 0 or done == settings.steps:
            told |= self._look()
        self.history.append(told)
        if self.context.steps is not None:
            self.context.steps(done, settings.steps, told)
        if self.context.run is not None:
            self.context.run.event("step", **told)
        if reason := self.guards.collapsed(told):
            self._collapse(reason, done)
        self.stopped = (
            self.guards.stopped(told, self.tokens)
            or self.monitor.after(done, last=done == settings.steps)
            or ""
        )
        due = (
            done % settings.checkpoint_steps == 0
            if settings.checkpoint_steps
            else now - self.last_saved > settings.checkpoint_seconds
        )
        if due and done % settings.inner_steps == 0 and not self.guards.garbage:
            self._save(done)
        return bool(self.stopped)

    def _look(self) -> dict[str, float]:
        """Greedy answers to held-out questions, if a target is set on them."""
        if self.settings.stop_at_leak_rate is None:
            return {}
        asked = self.looked_at[:LOOKED_AT]
        ids = [self.lm.template.prompt_ids(one.prompt) for one in asked]
        answers: list[Said] = complete(
            self.lm, ids, Decoding(self.settings.max_new_tokens), [""] * len(ids)
        )
        found = rates([Completion(q, one.text) for q, one in zip(asked, answers, strict=True)])
        told = {"held_out_leak_rate": found.leak, "held_out_refusal_rate": found.refusal}
        return {name: value for name, value in told.items() if value is not None}

    def _check_moved(self, told: Mapping[str, float]) -> None:
        """Once, after the first step with a gradient: what should move did, the rest did not."""
        if self.before is not None and told.get("gradient_norm", 0.0) > 0:
            check_moves(self.lm, self.placement, self.before, self.place.card.name)
            self.before = None

    def _collapse(self, reason: str, step: int | None = None) -> None:
        kept = ""
        if self.folder is not None and (self.folder / "last").exists():
            kept = f" The last good checkpoint is in {self.folder / 'last'}."
        raise RunError(
            f"training collapsed at step {step or len(self.history) + 1}: {reason}.{kept}",
            where=self.name,
            hint="Lower learning_rate, or raise kl_weight.",
        )

    # ---- keeping and restoring

    def _identity(self) -> Any:
        return None if self.context.run is None else self.context.run.manifest.get("identity")

    def _save(self, step: int) -> None:
        run = self.context.run
        if self.folder is None or run is None or not run.writes:
            return
        state = {
            "step": step, "identity": self._identity(), "history": self.history,
            "weight": self.weight, "tokens": self.tokens, "monitor": self.monitor.state(),
            "guards": self.guards.state(), "stopped": self.stopped,
            "no_value": dict(self.rewards.tally.no_value), "hits": dict(self.rewards.tally.hits),
        }  # fmt: skip
        checkpoint.save(self.folder / "last", self.placement.parameters, self.optimizer, state)
        self.last_saved = time.monotonic()

    def _resume(self) -> int:
        self.state = checkpoint.read_state(self.folder / "last") if self.folder else None
        found = self.state
        if found is None or self.folder is None:
            self.monitor.begin(None)
            return 0
        if found["identity"] != self._identity():
            raise RunError(
                "the checkpoint belongs to another run.",
                where=str(self.folder),
                hint="Choose another --out folder, or delete this one.",
            )
        self.history, self.weight = found["history"], found["weight"]
        self.tokens, self.stopped = found["tokens"], found["stopped"]
        self.monitor.begin(found["monitor"])
        self.guards.restore(found["guards"])
        self.rewards.tally.no_value.update(found["no_value"])
        self.rewards.tally.hits.update(found["hits"])
        logger.info(f"Resuming after step {found['step']}.")
        return int(found["step"])

    def _to_last(self, begin: int) -> None:
        """Weights and moments of the checkpoint, once the reference is taken of the start."""
        if begin and self.folder is not None:
            checkpoint.restore(self.folder / "last", self.placement.parameters, self.optimizer)
            self.lm.touch()


#: Our names of numbers that TRL tells.
TOLD = {
    "loss": "loss", "kl": "kl", "entropy": "entropy", "gradient_norm": "grad_norm",
    "learning_rate": "learning_rate", "retain_loss": "retain_loss",
    "clipped": "clip_ratio/region_mean",
}  # fmt: skip

__all__ = ["Trained", "require_extra", "train"]
