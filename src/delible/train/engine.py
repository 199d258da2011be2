"""The training engine: makes a model move, one optimiser step after the other.

It knows nothing of any method: slots decide which rows, which parameters, which losses and how
they are balanced. It adds what every run needs: micro-batches that fit the memory, the cached
reference, exact checkpoints, early stops, a guard against collapse, and progress.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor

from delible.errors import RecipeError, RunError
from delible.lm.forward import Forward
from delible.lm.lm import LM
from delible.lm.precision import is_out_of_memory, resolve
from delible.measure.asking import answer_of, ask
from delible.measure.requests import Score
from delible.prompts import read_lines
from delible.records import RecordBase
from delible.rundir import RunDirectory
from delible.train import checkpoint
from delible.train.gradients import Gradients
from delible.train.passes import MicroBatch, Passes, split
from delible.train.randomness import generator
from delible.train.recipe import Recipe
from delible.train.reference import Reference
from delible.train.rows import make_rows, refusal_rows
from delible.train.schedule import learning_rate_factor
from delible.train.slots import Context, FinishContext, Keep, Placement, State
from delible.train.step import Reads, Row

#: Nats by which the retain loss may exceed its start before the run counts as collapsed.
COLLAPSE_NATS = 5.0
#: Rows that a monitor looks at, at most.
MONITORED_ROWS = 32


class Progress(Protocol):
    """Where training reports to; the command line draws bars from it."""

    def __call__(self, step: int, total: int, numbers: Mapping[str, float]) -> None: ...


@dataclass
class TrainResult:
    """What training did.

    Attributes:
        lm: The finished model.
        history: One mapping of numbers per step: losses, learning rate, tokens per second.
        stopped: Why it ended before its last step, if it did.
        seconds: Wall-clock seconds of this process's part.
        padding_share: Padding among computed positions, in [0, 1].
        notes: What components had to say.
    """

    lm: LM
    history: list[dict[str, float]]
    steps: int
    stopped: str | None
    seconds: float
    tokens: int
    padding_share: float
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """Which rows meet in which step; made once, from the seed alone."""

    steps: tuple[tuple[tuple[int, int | None], ...], ...]
    steps_per_epoch: int

    @property
    def retain_indices(self) -> set[int]:
        return {kept for step in self.steps for _, kept in step if kept is not None}


def make_plan(recipe: Recipe, forget: Sequence[Row], retain: Sequence[Row], seed: int) -> Plan:
    """The plan of a run."""
    training = recipe.training
    steps: list[tuple[tuple[int, int | None], ...]] = []
    per_epoch = 1
    for epoch in range(training.epochs):
        random = generator(seed, "sample", epoch)
        pairs = recipe.sample.epoch(forget, retain, epoch, random)
        size = training.batch_size
        chunks = [tuple(pairs[at : at + size]) for at in range(0, len(pairs), size)]
        per_epoch = len(chunks)
        steps += chunks
        if training.max_steps is not None and len(steps) >= training.max_steps:
            steps = steps[: training.max_steps]
            break
    return Plan(tuple(steps), per_epoch)


def check_needs(recipe: Recipe, records: Mapping[str, Sequence[RecordBase]]) -> None:
    """Refuses a composition that cannot work, before any work.

    Raises:
        RecipeError: With the flag to add.
    """
    for component in recipe.components():
        if "retain" in component.card.needs and not records.get("retain"):
            raise RecipeError(
                f"{component.card.kind} '{component.card.name}' needs retain records.",
                where=f"method '{recipe.name}'",
                hint="Add --retain FILE, or choose a method without a retain loss.",
            )
    if not records.get("forget"):
        raise RecipeError(
            "the forget set is empty.",
            where=f"method '{recipe.name}'",
            hint="Add --forget FILE with at least one record.",
        )


class Trainer:
    """One training run.

    Args:
        lm: The model; trained in place.
        recipe: What to do.
        records: Records by role: ``forget``, ``retain``.
        seed: Of every random choice.
        run: Where checkpoints and events go; None keeps nothing.
        reference: The reference model; None is the model as it is at the start.
        start: Loads the start model again (for finishers that mix with it).
        refusals: Refusal sentences; None takes the built-in ones.
    """

    def __init__(
        self,
        lm: LM,
        recipe: Recipe,
        records: Mapping[str, Sequence[RecordBase]],
        *,
        seed: int = 0,
        run: RunDirectory | None = None,
        reference: LM | None = None,
        start: Callable[[], LM] | None = None,
        refusals: Sequence[str] | None = None,
        say: Callable[[str], None] = lambda _: None,
        progress: Progress | None = None,
    ) -> None:
        self.lm, self.recipe, self.records, self.seed = lm, recipe, records, seed
        self.run, self.reference_lm, self.start = run, reference, start
        self.refusals, self.say, self.progress = refusals, say, progress
        self.keep: Keep | None = None if recipe.keep.card.name == "none" else recipe.keep
        self.budget = 0

    def train(self) -> TrainResult:
        """Runs (or resumes) to the end and returns the finished model.

        Raises:
            RecipeError: The composition cannot work with these records.
            RunError: The loss collapsed, nothing moved, or the checkpoint is another run's.
        """
        check_needs(self.recipe, self.records)
        began = time.perf_counter()
        training = self.recipe.training
        accelerator = Accelerator()
        accelerator.wait_for_everyone()  # the first process has written the manifest
        self.lm.precision = resolve(training.precision, self.lm.device.type)
        self.lm.template.max_length = min(training.max_length, self.lm.template.max_length)
        if self.recipe.finish.needs_start and self.start is None:
            raise RecipeError(
                f"finish '{self.recipe.finish.card.name}' needs the start model.",
                hint="Pass start= when training from Python.",
            )
        context = self.rows()
        weights = self.recipe.weigh.weights(context)
        placement = self.recipe.place.apply(context)
        if not placement.parameters:
            raise RecipeError(
                "no parameter may move.", where=f"place '{self.recipe.place.card.name}'"
            )
        plan = make_plan(self.recipe, context.rows["forget"], context.rows["retain"], self.seed)
        reference = self._reference(context, plan)
        optimizer = self._optimizer(placement)
        self.lm.model.eval()  # dropout would make cached reference values wrong
        forward, optimizer = accelerator.prepare(Forward(self.lm), optimizer)
        self.budget = self.token_budget()
        loop = _Loop(
            self,
            accelerator,
            context,
            placement,
            plan,
            weights,
            reference,
            forward,
            optimizer,
        )
        loop.run()
        self.lm.touch()
        finished = self.recipe.finish.apply(self._finish_context(loop.notes))
        finished.touch()
        return TrainResult(
            finished,
            loop.history,
            len(loop.history),
            loop.stopped,
            time.perf_counter() - began,
            loop.tokens,
            sum(loop.padding) / max(1, len(loop.padding)),
            loop.notes,
        )

    # ---- before the first step

    def rows(self) -> Context:
        """Tokenized rows of every role, with the forget rows that the recipe selects."""
        template, records, recipe = self.lm.template, self.records, self.recipe
        keeps = any("retain" in component.card.needs for component in recipe.components())
        rows: dict[str, list[Row]] = {
            "forget": make_rows(template, records["forget"]),
            "retain": make_rows(template, records.get("retain", ())) if keeps else [],
        }
        if "refusal" in recipe.objective.roles:
            rows["refusal"] = refusal_rows(
                template,
                records["forget"],
                self.refusals or read_lines("refusals.txt"),
                generator(self.seed, "refusals"),
            )
        context = Context(
            self.lm, rows, records, Gradients(self.lm), recipe.objective, self.keep, self.seed,
            self.say,
        )  # fmt: skip
        chosen = recipe.select.choose(context)
        for role in ("forget", "refusal"):
            if role in rows:
                rows[role] = [rows[role][index] for index in chosen]
        return context

    def _reference(self, context: Context, plan: Plan) -> Reference:
        reference = Reference()
        folder = self.run.path / "checkpoint" / "reference" if self.run else None
        lm = self.reference_lm or self.lm
        objective, keep = self.recipe.objective, self.keep
        wanted: list[tuple[list[Row], tuple[str, ...]]] = [
            (list(context.rows[role]), objective.reference_kinds(self.lm))
            for role in objective.roles
        ]
        if keep is not None:
            used = [context.rows["retain"][i] for i in sorted(plan.retain_indices)]
            wanted.append((used, keep.reference_kinds(self.lm)))
        if any(kinds for _, kinds in wanted):
            if folder is not None:
                reference.load(folder)
            for rows, kinds in wanted:
                if kinds:
                    reference.prepare(lm, rows, kinds)
            if self.run is not None and self.run.writes and self.reference_lm is None:
                reference.save(self.run.path / "checkpoint" / "reference")
        return reference

    def _optimizer(self, placement: Placement) -> torch.optim.Optimizer:
        training = self.recipe.training
        # with masks the engine decays by hand, so that frozen entries stay where they are
        decay = 0.0 if placement.masks and placement.masked_decay else training.weight_decay
        matrices = [value for value in placement.parameters.values() if value.ndim >= 2]
        vectors = [value for value in placement.parameters.values() if value.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=training.learning_rate, fused=True
        )

    def token_budget(self) -> int:
        chosen = self.recipe.training.micro_batch_tokens
        if chosen != "auto":
            return chosen
        anatomy, config = self.lm.anatomy, self.lm.core.config.get_text_config()
        width = anatomy.hidden_size
        inner = getattr(config, "intermediate_size", None) or 4 * width
        # stored activations of a block per position, in fp32: ~14 of hidden and ~4 of inner width
        per_token = 4 * anatomy.layers * (14 * width + 4 * inner) + 12 * self.lm.vocabulary
        if self.lm.device.type == "cuda":
            free = torch.cuda.mem_get_info()[0]
            return max(64, min(32768, int(0.6 * free / per_token)))
        free = psutil.virtual_memory().available
        return max(64, min(1024, int(0.4 * free / per_token)))

    def _finish_context(self, notes: dict[str, Any]) -> FinishContext:
        folder: Path | None = self.run.path if self.run else None
        start = self.start or (lambda: self.lm)
        return FinishContext(self.lm, start, self.records, folder, self.say, notes)


class _Loop:
    """The steps of one run."""

    def __init__(
        self,
        trainer: Trainer,
        accelerator: Accelerator,
        context: Context,
        placement: Placement,
        plan: Plan,
        weights: Tensor,
        reference: Reference,
        forward: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.trainer, self.accelerator, self.context = trainer, accelerator, context
        self.placement, self.plan = placement, plan
        self.weights, self.reference = weights, reference
        self.forward, self.optimizer = forward, optimizer
        self.training = trainer.recipe.training
        self.state: State = trainer.recipe.balance.start()
        self.history: list[dict[str, float]] = []
        self.stopped: str | None = None
        self.notes: dict[str, Any] = {}
        self.tokens, self.padding = 0, list[float]()
        self.first_keep: float | None = None
        self.start_retain: float | None = None
        self.folder = trainer.run.path / "checkpoint" if trainer.run else None
        self.last_saved = time.monotonic()
        self.good: dict[str, Tensor] = {}
        objective = trainer.recipe.objective
        self.reads: dict[str, Sequence[Reads]] = {
            role: objective.reads(trainer.lm) for role in objective.roles
        }
        if trainer.keep is not None:
            self.reads["retain"] = trainer.keep.reads(trainer.lm)

    def run(self) -> None:
        begin = self._resume()
        total = len(self.plan.steps)
        before = self._fingerprints() if begin == 0 else None
        if begin == 0 and self.training.utility_budget is not None:
            self._keep_good()  # should the first look already be outside the budget
        try:
            for step in range(begin, total):
                if self.stopped:
                    break
                self._step(step, total)
                if before is not None and step - begin == min(2, total - 1):
                    self._check_moves(before)
                self._after(step, total)
        except KeyboardInterrupt:
            self._save(len(self.history))
            raise
        if self.stopped and self.training.utility_budget is not None:
            self._restore_good()
        self.notes["parameters"] = sum(v.numel() for v in self.placement.parameters.values())

    def _step(self, step: int, total: int) -> None:
        began = time.perf_counter()
        rate = self.training.learning_rate * learning_rate_factor(
            self.training.schedule, step, total, self.training.warmup_steps
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        passes = self._gradient(self.plan.steps[step])
        norm = self._clip()
        forget, keep = self._losses(passes)
        if not math.isfinite(norm) or not math.isfinite(forget):
            self._collapse(step, "the loss or its gradient is not finite")
        self._mask_gradients()
        self.optimizer.step()
        self._decay_masked(rate)
        for parameter in self.placement.parameters.values():
            parameter.grad = None
        epoch = step / self.plan.steps_per_epoch
        self.trainer.recipe.balance.observe(forget, keep, epoch, self.state)
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
            self.first_keep = keep if self.first_keep is None else self.first_keep
            if keep > self.first_keep + COLLAPSE_NATS and self.trainer.keep.unit != "position":  # type: ignore[union-attr]
                self._collapse(
                    step, f"the retain loss rose from {self.first_keep:.2f} to {keep:.2f}"
                )

    def _gradient(self, pairs: Sequence[tuple[int, int | None]]) -> Passes:
        """The step's gradient; micro-batches are halved until they fit the memory."""
        while True:
            passes = self._passes(pairs)
            try:
                self.trainer.recipe.balance.gradient(passes, self.trainer.recipe.harden)
                return passes
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or self.trainer.budget <= 16:
                    raise
                passes.clear()
                self.trainer.budget //= 2
                self.trainer.say(
                    f"Out of memory: continuing with {self.trainer.budget} tokens per pass."
                )
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()

    def _passes(self, pairs: Sequence[tuple[int, int | None]]) -> Passes:
        recipe, rows = self.trainer.recipe, self.context.rows
        forget = [index for index, _ in pairs]
        retain = [index for _, index in pairs if index is not None] if self.trainer.keep else []
        roles = recipe.objective.roles
        units = sum(rows[roles[0]][i].units(recipe.objective.unit) for i in forget)
        keep_units = 1
        if self.trainer.keep is not None:
            keep_units = sum(rows["retain"][i].units(self.trainer.keep.unit) for i in retain)
        return Passes(
            lm=self.trainer.lm,
            forward=self.forward,
            objective=recipe.objective,
            keep_loss=self.trainer.keep,
            reads=self.reads,
            reference=self.reference,
            micro_batches=self._micro_batches(forget, retain),
            parameters=list(self.placement.parameters.values()),
            weights=recipe.balance.weights(self.state),
            forget_units=units,
            retain_units=keep_units,
            world=self.accelerator.num_processes,
            accumulating=self._accumulating,
            backward=self.accelerator.backward,
        )

    def _micro_batches(self, forget: list[int], retain: list[int]) -> list[MicroBatch]:
        """This process's share of a step; missing rows are filled up with weight 0."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        rows, roles = self.context.rows, self.trainer.recipe.objective.roles

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
                self.trainer.budget,
                at_least=count,
                at_most=limit,
            )

        count = 1
        limit = None
        if world > 1:  # all processes need the same number of micro-batches
            limit = -(-len(forget) // world)
            count = max(len(share(other)) for other in range(world))
        return share(rank)

    @contextmanager
    def _accumulating(self, more: bool) -> Iterator[None]:
        if more and self.accelerator.num_processes > 1:
            with self.accelerator.no_sync(self.forward):
                yield
        else:
            yield

    def _losses(self, passes: Passes) -> tuple[float, float | None]:
        both = torch.tensor([passes.totals.forget, passes.totals.keep], dtype=torch.float64)
        if self.accelerator.num_processes > 1:
            both = self.accelerator.reduce(both.float().to(self.accelerator.device), "sum").double()
        keep = float(both[1]) if self.trainer.keep is not None else None
        return float(both[0]), keep

    def _clip(self) -> float:
        parameters = [p for p in self.placement.parameters.values() if p.grad is not None]
        limit = self.training.max_gradient_norm
        norm = torch.nn.utils.clip_grad_norm_(
            parameters, math.inf if limit is None else limit, foreach=True
        )
        return float(norm)

    def _mask_gradients(self) -> None:
        if self.placement.masks:
            for name, mask in self.placement.masks.items():
                gradient = self.placement.parameters[name].grad
                if gradient is not None:
                    gradient.mul_(mask)

    @torch.no_grad()
    def _decay_masked(self, rate: float) -> None:
        if self.placement.masks and self.placement.masked_decay and self.training.weight_decay:
            for name, mask in self.placement.masks.items():
                parameter = self.placement.parameters[name]
                if parameter.ndim >= 2:
                    parameter.mul_(1 - rate * self.training.weight_decay * mask)

    # ---- after a step

    def _after(self, step: int, total: int) -> None:
        numbers = self.history[-1]
        if self.trainer.progress is not None:
            self.trainer.progress(step + 1, total, numbers)
        if self.trainer.run is not None:
            self.trainer.run.event("step", **numbers)
        self._monitor(step)
        done = step + 1
        due = (
            done % self.training.checkpoint_steps == 0
            if self.training.checkpoint_steps
            else time.monotonic() - self.last_saved > self.training.checkpoint_seconds
        )
        if due and done < total:
            self._save(done)

    def _monitor(self, step: int) -> None:
        """Early stops: on a forget target, and on a utility budget."""
        target, budget = self.training.stop_at_forget_probability, self.training.utility_budget
        if target is None and budget is None:
            return
        if self.start_retain is None and budget is not None:
            raise RunError("the utility budget was not measured at the start")
        if (step + 1) % self.training.monitor_steps:
            return
        self.trainer.lm.touch()
        forget = self._probability("forget")
        retain = self._probability("retain") if self.context.records.get("retain") else None
        if self.trainer.run is not None:
            self.trainer.run.event("monitor", step=step + 1, forget=forget, retain=retain)
        if budget is not None and retain is not None and self.start_retain is not None:
            if retain < budget * self.start_retain:
                self.stopped = f"the utility budget was used up at step {step + 1}"
                return
            self._keep_good()
        if target is not None and forget <= target:
            self.stopped = f"the forget target was reached at step {step + 1}"

    def _probability(self, role: str) -> float:
        """Mean answer probability over the first rows of a role."""
        asked = []
        for record in self.context.records[role][:MONITORED_ROWS]:
            prompt = ask(record)
            if prompt is not None:
                asked.append(Score(prompt, answer_of(record)))
        scores = self.trainer.lm.score(asked)
        return sum(math.exp(float(score.logprobs.mean())) for score in scores) / len(scores)

    # ---- keeping and restoring

    def _keep_good(self) -> None:
        """Keeps the weights that last met the utility budget: on disk, or in memory."""
        if self.folder is None:
            self.good = {
                name: value.detach().clone() for name, value in self.placement.parameters.items()
            }
        elif self.trainer.run is not None and self.trainer.run.writes:
            checkpoint.save(self.folder / "good", self.placement.parameters, None, {})

    @torch.no_grad()
    def _restore_good(self) -> None:
        self.accelerator.wait_for_everyone()
        if self.folder is not None:
            checkpoint.restore(self.folder / "good", self.placement.parameters, None)
        for name, value in self.good.items():
            self.placement.parameters[name].copy_(value)

    def _save(self, step: int) -> None:
        if self.folder is None or self.trainer.run is None or not self.trainer.run.writes:
            return
        state = {
            "step": step,
            "identity": self.trainer.run.manifest.get("identity") if self.trainer.run else None,
            "balance": self.state,
            "history": self.history,
            "first_keep": self.first_keep,
            "start_retain": self.start_retain,
            "tokens": self.tokens,
            "padding": self.padding,
        }
        checkpoint.save(self.folder / "last", self.placement.parameters, self.optimizer, state)
        self.last_saved = time.monotonic()

    def _resume(self) -> int:
        if self.training.utility_budget is not None and self.context.records.get("retain"):
            self.start_retain = self._probability("retain")
        found = checkpoint.read_state(self.folder / "last") if self.folder else None
        if found is None or self.folder is None:
            return 0
        mine = self.trainer.run.manifest.get("identity") if self.trainer.run else None
        if found["identity"] != mine:
            raise RunError(
                "the checkpoint belongs to another run.",
                where=str(self.folder),
                hint="Choose another --out folder, or delete this one.",
            )
        checkpoint.restore(self.folder / "last", self.placement.parameters, self.optimizer)
        self.state = dict(found["balance"])
        self.history, self.first_keep = found["history"], found["first_keep"]
        self.start_retain, self.tokens = found["start_retain"], found["tokens"]
        self.padding = found["padding"]
        self.trainer.say(f"Resuming after step {found['step']}.")
        return int(found["step"])

    def _collapse(self, step: int, reason: str) -> None:
        kept = ""
        if self.folder is not None and (self.folder / "last").exists():
            kept = f" The last good checkpoint is in {self.folder / 'last'}."
        raise RunError(
            f"training collapsed at step {step + 1}: {reason}.{kept}",
            where=f"method '{self.trainer.recipe.name}'",
            hint="Lower --learning-rate, or use --strength gentle.",
        )

    # ---- precision guard

    @torch.no_grad()
    def _fingerprints(self) -> dict[str, Tensor]:
        return {
            name: self._sample(name, value).clone()
            for name, value in self.trainer.lm.model.named_parameters()
        }

    def _sample(self, name: str, value: Tensor) -> Tensor:
        """A few entries of a parameter: among those that may move, if it is masked."""
        mask = (self.placement.masks or {}).get(name)
        flat = value.detach().flatten()
        if mask is None:
            return flat[:256]
        return flat[mask.flatten().nonzero()[:256, 0]]

    @torch.no_grad()
    def _check_moves(self, before: Mapping[str, Tensor]) -> None:
        """After the first steps: what should move did, and the rest did not."""
        own = {id(value): name for name, value in self.placement.parameters.items()}
        moved = 0
        for name, value in self.trainer.lm.model.named_parameters():
            same = torch.equal(self._sample(name, value), before[name])
            if id(value) not in own and not same:
                raise RunError(f"the frozen parameter {name} moved; this is a bug.")
            moved += not same
        if not moved:
            raise RunError(
                "nothing moved in the first steps.",
                where=f"place '{self.trainer.recipe.place.card.name}'",
                hint="Raise --learning-rate, or check that the forget loss is not 0.",
            )


__all__ = ["Plan", "Progress", "TrainResult", "Trainer", "check_needs", "make_plan"]
