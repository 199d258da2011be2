"""The steps of one training run: gradient, clipping, masks, update, and what follows each step.

It keeps exact checkpoints, stops early, notices a collapse, and checks after the first steps that
what should move did, and the rest did not.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from delible.context import Context
from delible.errors import RunError
from delible.lm.lm import LM
from delible.lm.sharded import whole
from delible.precision import is_out_of_memory
from delible.records import RecordBase
from delible.train import checkpoint
from delible.train.losses import Keep, Memory, Role, State
from delible.train.masking import decay_masked, held_outside, mask_gradients
from delible.train.monitor import Monitor
from delible.train.moves import check_moves, sampled
from delible.train.optimizers import set_rate
from delible.train.passes import MicroBatch, Passes, split, units_of
from delible.train.plan import Plan
from delible.train.reach import explain, has_gradient, probe
from delible.train.recipe import Recipe
from delible.train.reference import Reference
from delible.train.schedule import learning_rate_factor
from delible.train.sharding import does_not_fit, first_says
from delible.train.slots import Placement, SlotContext
from delible.train.step import Reads
from delible.train.watch import CollapseWatch, watched_rows

logger = logging.getLogger(__name__)

#: Where forget rows that were weighed anew keep their weights.
WEIGHTS = "weigh.weights"


@dataclass(frozen=True)
class Job:
    """What a run is, as far as its steps are concerned.

    Attributes:
        keep: The retain loss, if there is one.
        records: As they were given, by role.
        context: Of the run: its seed, its folder, who is told of its steps.
        budget: Padded tokens per pass, at first.
    """

    lm: LM
    recipe: Recipe
    keep: Keep | None
    records: Mapping[str, Sequence[RecordBase]]
    context: Context
    budget: int


class Loop:
    """The steps of one run."""

    def __init__(
        self,
        job: Job,
        accelerator: Accelerator,
        context: SlotContext,
        placement: Placement,
        plan: Plan,
        weights: Tensor,
        reference: Reference,
        forward: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.job, self.accelerator, self.context = job, accelerator, context
        self.budget = job.budget
        self.placement, self.plan = placement, plan
        self.weights, self.reference = weights, reference
        self.forward, self.optimizer = forward, optimizer
        self.training = job.recipe.training
        self.state: State = job.recipe.balance.start()
        self.memory: Memory = {}
        self.masks = placement.masks
        self.history: list[dict[str, float]] = []
        self.stopped: str | None = None
        self.notes: dict[str, Any] = {}
        self.tokens, self.padding = 0, list[float]()
        self.folder = job.context.run.path / "checkpoint" if job.context.run else None
        self.last_saved = time.monotonic()
        self.monitor = Monitor(
            job.lm, self.training, job.records, placement.parameters, job.context.run,
            job.context.seed,
        )  # fmt: skip
        objective = job.recipe.objective
        self.reads: dict[str, Sequence[Reads]] = {
            role: objective.reads(job.lm) for role in objective.roles
        }
        self.roles: tuple[Role, ...] = objective.roles  # of rows that are aligned with forget rows
        if job.keep is not None:
            self.reads["retain"] = job.keep.reads(job.lm)
            if beside := job.keep.reads_beside(job.lm):
                self.reads["forget"] = (*self.reads.get("forget", ()), *beside)
                self.roles = tuple(dict.fromkeys((*self.roles, "forget")))
        self.watch = CollapseWatch(
            job.lm, forward, watched_rows(context.rows["retain"], plan.retain_indices),
            in_passing="answers" in self.reads.get("retain", ()), budget=lambda: self.budget,
        )  # fmt: skip

    def run(self) -> None:
        begin = self._resume()
        if self.job.keep is None and self.job.recipe.objective.card.intention:
            logger.warning(
                "There is no retain loss: nothing but numbers that are not finite stops a run that "
                "damages the rest of the model."
            )
        total = len(self.plan.steps)
        before = sampled(self.job.lm, self.placement) if begin == 0 else None
        try:
            for step in range(begin, total):
                if self.stopped:
                    break
                self._step(step, total)
                if before is not None and step - begin == min(2, total - 1):
                    place = self.job.recipe.place.card.name
                    check_moves(self.job.lm, self.placement, before, place)
                self._after(step, total)
        except KeyboardInterrupt:
            if self.job.lm.sharded is None:  # all processes would have to be at the same step
                self._save(len(self.history))
            raise
        if (self.stopped and self.monitor.restores) or self.monitor.asked:
            self.accelerator.wait_for_everyone()
            self.monitor.restore()
        self.notes["parameters"] = sum(v.numel() for v in self.placement.parameters.values())
        if self.watch.start is not None:
            self.notes["retain_nats"] = {"start": self.watch.start, "end": self.watch.now}

    def _step(self, step: int, total: int) -> None:
        began = time.perf_counter()
        self._weigh_anew(step)
        rate = self.training.learning_rate * learning_rate_factor(
            self.training.schedule, step, total, self.training.warmup(total)
        )
        set_rate(self.optimizer, rate)
        passes = self._gradient(step)
        norm = self._clip()
        forget, keep, nats, kept_tokens = self._sums(passes)
        if not math.isfinite(norm) or not math.isfinite(forget):
            self._collapse(step, "the loss or its gradient is not finite")
        self.job.lm.settle()
        mask_gradients(self.placement, self.masks)
        moving = list(self.placement.parameters.values())
        with (
            held_outside(self.placement, self.masks),
            self.job.recipe.balance.updating(moving, self.memory),
        ):
            self.optimizer.step()
            decay_masked(self.placement, self.masks, rate * self.training.weight_decay)
        passes.clear()
        epoch = step / self.plan.steps_per_epoch
        self.job.recipe.balance.observe(forget, keep, epoch, self.state)
        seconds = time.perf_counter() - began
        tokens = passes.totals.tokens * self.accelerator.num_processes
        numbers = {
            "step": step + 1,
            "forget_loss": forget,
            **({"keep_loss": keep} if keep is not None else {}),
            "learning_rate": rate,
            "gradient_norm": norm,
            "tokens_per_second": tokens / seconds,
            **self.state,
        }
        self.tokens += tokens
        self.padding += passes.totals.padding
        self.history.append(numbers)
        if keep is not None:
            rows = sum(kept is not None for _, kept in self.plan.steps[step])
            last = step + 1 == total
            if reason := self.watch.after(step + 1, nats, kept_tokens, rows, last=last):
                self._collapse(step, reason)

    def _weigh_anew(self, step: int) -> None:
        epoch, within = divmod(step, self.plan.steps_per_epoch)
        weigh = self.job.recipe.weigh
        if epoch and not within and weigh.due(epoch):
            self.weights = weigh.weights(self.context)
            self.memory[WEIGHTS] = [self.weights]

    def _gradient(self, step: int) -> Passes:
        """The step's gradient; micro-batches are halved until they fit the memory."""
        beside = self.job.keep is not None  # a retain loss, which moves weights in any case
        while True:
            passes = self._passes(step)
            try:
                if step == 0 and beside:
                    self._check_gradient(passes, probe)
                if self.placement.each_step is not None:
                    self.masks = self.placement.each_step(passes)
                self.job.recipe.balance.gradient(passes, self.job.recipe.harden)
                if step == 0 and not beside:
                    self._check_gradient(passes, has_gradient)
                return passes
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or self.budget <= 16:
                    raise
                if self.accelerator.num_processes > 1:
                    raise does_not_fit(self.accelerator.process_index, self.budget) from error
                passes.clear()
                self.budget //= 2
                logger.warning(f"Out of memory: continuing with {self.budget} tokens per pass.")
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()

    def _check_gradient(
        self, passes: Passes, look: Callable[[Passes, Mapping[int, Tensor]], bool]
    ) -> None:
        """In the first step: whether the forget loss has a gradient of its own."""
        masks = self.placement.masks if self.placement.each_step is None else None
        opened = {id(self.placement.parameters[name]): mask for name, mask in (masks or {}).items()}
        if passes.weights[0] and not look(passes, opened):
            explain(passes, self.job.recipe.name)

    def _passes(self, step: int) -> Passes:
        pairs = self.plan.steps[step]
        recipe, rows = self.job.recipe, self.context.rows
        forget = [index for index, _ in pairs]
        retain = [index for _, index in pairs if index is not None] if self.job.keep else []
        roles = recipe.objective.roles
        units = sum(rows[roles[0]][i].units(recipe.objective.unit) for i in forget)
        keep_units = 1
        if self.job.keep is not None:
            keep_units = sum(rows["retain"][i].units(self.job.keep.unit) for i in retain)
        return Passes(
            lm=self.job.lm,
            forward=self.forward,
            objective=recipe.objective,
            keep_loss=self.job.keep,
            reads=self.reads,
            reference=self.reference,
            micro_batches=self._micro_batches(forget, retain),
            parameters=list(self.placement.parameters.values()),
            weights=recipe.balance.weights(self.state, step / len(self.plan.steps)),
            forget_units=units,
            retain_units=keep_units,
            world=self.accelerator.num_processes,
            accumulating=self._accumulating,
            backward=self.accelerator.backward,
            memory=self.memory,
            seed=self.job.context.seed,
            step=step,
            units=units_of(
                {str(role): [rows[role][i] for i in forget] for role in self.roles}
                | {"retain": [rows["retain"][i] for i in retain]}
            ),
        )

    def _micro_batches(self, forget: list[int], retain: list[int]) -> list[MicroBatch]:
        """This process's share of a step; missing rows are filled up with weight 0."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        rows, roles = self.context.rows, self.roles

        def share(of: int) -> list[MicroBatch]:
            def part(indices: list[int]) -> tuple[list[int], list[float]]:
                filled = indices + indices[:1] * (-len(indices) % world)
                weights = [1.0] * len(indices) + [0.0] * (len(filled) - len(indices))
                return filled[of::world], weights[of::world]

            mine, mine_weights = part(forget)
            kept, kept_weights = part(retain)
            return split(
                {role: [rows[role][i] for i in mine] for role in roles},
                [rows["retain"][i] for i in kept],
                [
                    weight * float(self.weights[i])
                    for weight, i in zip(mine_weights, mine, strict=True)
                ],
                kept_weights,
                self.budget,
                at_least=count,
                at_most=limit,
            )

        count = 1
        limit = None
        if world > 1:  # all processes need the same number of micro-batches
            limit = -(-len(forget) // world)
            count = max(len(share(other)) for other in range(world))
        return share(rank)

    def _accumulating(self, more: bool) -> AbstractContextManager[None]:
        # shares of gradients are added up as they are: whole ones would not fit
        several = self.accelerator.num_processes > 1 and self.job.lm.sharded is None
        return self.accelerator.no_sync(self.forward) if more and several else nullcontext()

    def _sums(self, passes: Passes) -> tuple[float, float | None, float, int]:
        """Both losses, and nats and tokens of the retain answers, over all processes."""
        totals = passes.totals
        sums = [totals.forget, totals.keep, totals.retain_nats, totals.retain_tokens]
        found = torch.tensor(sums, dtype=torch.float64)
        if self.accelerator.num_processes > 1:
            found = self.accelerator.reduce(found.float().to(self.accelerator.device), "sum")
        forget, keep, nats, tokens = found.tolist()
        return forget, keep if self.job.keep is not None else None, nats, round(tokens)

    def _clip(self) -> float:
        parameters = [p for p in self.placement.parameters.values() if p.grad is not None]
        limit = self.training.max_gradient_norm
        most = math.inf if limit is None else limit
        return float(whole(torch.nn.utils.clip_grad_norm_(parameters, most, foreach=True)))

    # ---- after a step

    def _after(self, step: int, total: int) -> None:
        numbers = self.history[-1]
        if self.job.context.steps is not None:
            self.job.context.steps(step + 1, total, numbers)
        if self.job.context.run is not None:
            self.job.context.run.event("step", **numbers)
        done = step + 1
        self.stopped = self.monitor.after(done, last=done == total)
        if not self.stopped:
            self.job.recipe.finish.observe(
                done, total, list(self.placement.parameters.values()), self.memory
            )
        due = (
            done % self.training.checkpoint_steps == 0
            if self.training.checkpoint_steps
            else time.monotonic() - self.last_saved > self.training.checkpoint_seconds
        )
        if self.job.lm.sharded is not None:  # all write at once, when the first one's time is up
            due = first_says(due, self.accelerator.num_processes)
        if due and done < total:
            self._save(done)

    # ---- keeping and restoring

    def _save(self, step: int) -> None:
        lm, run = self.job.lm, self.job.context.run
        if self.folder is None or run is None or not (run.writes or lm.sharded is not None):
            return
        lm.settle()
        state = {
            "step": step,
            "identity": run.manifest.get("identity"),
            "balance": self.state,
            "history": self.history,
            "watch": self.watch.state(),
            "monitor": self.monitor.state(),
            "tokens": self.tokens,
            "padding": self.padding,
        }
        moving = self.placement.parameters
        checkpoint.save(self.folder / "last", moving, self.optimizer, state, self.memory)
        self.last_saved = time.monotonic()

    def _resume(self) -> int:
        found = checkpoint.read_state(self.folder / "last") if self.folder else None
        if found is None or self.folder is None:
            self.monitor.begin(None)
            self.watch.begin(None)
            self.memory |= self.job.recipe.balance.prepare(self.context, self.placement)
            return 0
        run = self.job.context.run
        if found["identity"] != (run.manifest.get("identity") if run else None):
            raise RunError(
                "the checkpoint belongs to another run.",
                where=str(self.folder),
                hint="Choose another --out folder, or delete this one.",
            )
        self.job.lm.settle()
        moving, last = self.placement.parameters, self.folder / "last"
        checkpoint.restore(last, moving, self.optimizer)
        self.memory = checkpoint.read_memory(last, self.job.lm.device, list(moving.values()))
        if WEIGHTS in self.memory:
            self.weights = self.memory[WEIGHTS][0].cpu()
        self.state = dict(found["balance"])
        self.history = found["history"]
        self.tokens, self.padding = found["tokens"], found["padding"]
        self.monitor.begin(found["monitor"])
        self.watch.begin(found.get("watch"))
        logger.info(f"Resuming after step {found['step']}.")
        return int(found["step"])

    def _collapse(self, step: int, reason: str) -> None:
        last = self.folder / "last" if self.folder is not None else None
        kept = f" The last good checkpoint is in {last}." if last and last.exists() else ""
        raise RunError(
            f"training collapsed at step {step + 1}: {reason}.{kept}",
            where=f"method '{self.job.recipe.name}'",
            hint="Lower --learning-rate, or use --strength gentle.",
        )
