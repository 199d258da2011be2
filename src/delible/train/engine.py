"""The training engine: makes a model move, one optimiser step after the other.

It knows nothing of any method: slots decide which rows, which parameters, which losses and how
they are balanced. It adds what every run needs: micro-batches that fit the memory, the cached
reference, exact checkpoints, early stops, a guard against collapse, and progress.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor

from delible.errors import RecipeError, RunError
from delible.files import write_json
from delible.lm.forward import Forward
from delible.lm.lm import LM
from delible.lm.precision import is_out_of_memory, resolve
from delible.measure.requests import System
from delible.prompts import read_lines
from delible.records import RecordBase
from delible.rundir import RunDirectory
from delible.train import checkpoint, generated
from delible.train.generated import Generated
from delible.train.gradients import Gradients
from delible.train.monitor import Monitor
from delible.train.passes import MicroBatch, Passes, split, units_of
from delible.train.randomness import generator
from delible.train.recipe import Recipe
from delible.train.reference import Reference
from delible.train.rows import make_rows, refusal_rows
from delible.train.schedule import learning_rate_factor
from delible.train.slots import Context, FinishContext, Keep, Memory, Placement, Role, State
from delible.train.step import Reads, Row

#: Nats by which the retain loss may exceed its start before the run counts as collapsed.
COLLAPSE_NATS = 5.0
#: Where forget rows that were weighed anew keep their weights.
WEIGHTS = "weigh.weights"
#: Roles whose rows come from the records or from the engine, not from a generator.
GIVEN_ROLES: tuple[Role, ...] = ("forget", "retain", "refusal")


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


def check_needs(
    recipe: Recipe,
    records: Mapping[str, Sequence[RecordBase]],
    generated: Iterable[Role] | None = None,
) -> None:
    """Refuses a composition that cannot work, before any work.

    Args:
        generated: Roles of rows that were generated before; None: the recipe generates them.

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
    made = {*GIVEN_ROLES, *(recipe.generate.makes if generated is None else generated)}
    for role in recipe.objective.roles:
        if role not in made:
            raise RecipeError(
                f"objective '{recipe.objective.card.name}' reads '{role}' rows, and nobody makes "
                "them.",
                where=f"method '{recipe.name}'",
                hint="Add --generate NAME ('delible list slots'), or --generated FOLDER with a "
                f"file {role}.jsonl.",
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
        writer: The system that writes generated rows; None: the offline templates do.
        generated: Generated rows by role, to be used instead of generating any.
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
        writer: System | None = None,
        generated: Generated | None = None,
    ) -> None:
        self.lm, self.recipe, self.records, self.seed = lm, recipe, records, seed
        self.run, self.reference_lm, self.start = run, reference, start
        self.refusals, self.say, self.progress = refusals, say, progress
        self.writer, self.generated = writer, generated
        self.keep: Keep | None = None if recipe.keep.card.name == "none" else recipe.keep
        self.budget = 0

    def train(self) -> TrainResult:
        """Runs (or resumes) to the end and returns the finished model.

        Raises:
            RecipeError: The composition cannot work with these records.
            RunError: The loss collapsed, nothing moved, or the checkpoint is another run's.
        """
        check_needs(self.recipe, self.records, self.generated)
        longest = self.lm.template.max_length
        self.lm.template.max_length = min(self.recipe.training.max_length, longest)
        try:
            return self._train()
        finally:  # rows of training may be cut shorter than what the model can be asked
            self.lm.template.max_length = longest

    def _train(self) -> TrainResult:
        began = time.perf_counter()
        training = self.recipe.training
        accelerator = Accelerator()
        accelerator.wait_for_everyone()  # the first process has written the manifest
        self.lm.precision = resolve(training.precision, self.lm.device.type)
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
        finished = self.recipe.finish.apply(self._finish_context(loop))
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
        template, recipe = self.lm.template, self.recipe
        before = self._context({}, self.records)
        records: dict[str, Sequence[RecordBase]] = dict(self.records)
        records.update({str(role): part for role, part in self._generated(before).items()})
        keeps = any("retain" in component.card.needs for component in recipe.components())
        partners = [role for role in recipe.objective.roles if role not in GIVEN_ROLES]
        generated.check_partners(records, partners)
        told = self._instruction(before)
        forget_told = told if recipe.objective.instructed else None
        keep_told = told if self.keep is not None and self.keep.instructed else None
        rows: dict[str, list[Row]] = {
            role: make_rows(template, records[role], forget_told) for role in ("forget", *partners)
        }
        rows["retain"] = make_rows(template, records.get("retain", ()), keep_told) if keeps else []
        if "refusal" in recipe.objective.roles:
            rows["refusal"] = refusal_rows(
                template,
                records["forget"],
                self.refusals or read_lines("refusals.txt"),
                generator(self.seed, "refusals"),
            )
        context = self._context(rows, records)
        chosen = recipe.select.choose(context)
        for role in (role for role in generated.ROLES if role != "retain"):
            if role in rows:
                rows[role] = [rows[role][index] for index in chosen]
            if role in records:
                records[role] = [records[role][index] for index in chosen]
        return context

    def _context(
        self, rows: Mapping[str, Sequence[Row]], records: Mapping[str, Sequence[RecordBase]]
    ) -> Context:
        return Context(
            self.lm, rows, records, Gradients(self.lm), self.recipe.objective, self.keep,
            self.seed, self.say, self.writer,
        )  # fmt: skip

    def _generated(self, context: Context) -> Generated:
        """The generated rows: given, of an earlier start of this run, or made now and kept.

        Processes that train together make them together, as they measure together.
        """
        if self.run is None:
            return self._make_rows(context)
        folder = self.run.path / "generated"
        before = self.run.path / "checkpoint" / "generated.json"
        if folder.exists() and before.exists():
            made: Generated = generated.read(folder)
            if generated.described(made) != json.loads(before.read_text("utf-8")):
                raise RunError(
                    "the generated rows were changed after this run had started.",
                    where=str(folder),
                    hint="Give them to a new run: --generated FOLDER.",
                )
        else:
            made = self._make_rows(context)
            if made and self.run.writes:
                generated.write(made, folder)
                write_json(before, generated.described(made))
        if made:
            self.run.update(generated=generated.described(made))
        return made

    def _make_rows(self, context: Context) -> Generated:
        return self.recipe.generate.rows(context) if self.generated is None else self.generated

    def _instruction(self, context: Context) -> str | None:
        """What an instructed reference model is told; None if there is none."""
        losses = (self.recipe.objective, self.keep)
        for loss in losses:
            if loss is not None and loss.instructed:
                told = self.recipe.generate.instruction(context)
                if told is None:
                    raise RecipeError(
                        f"{loss.card.kind} '{loss.card.name}' learns from a teacher that is told "
                        f"what to refuse, and generate '{self.recipe.generate.card.name}' has no "
                        "instruction for it.",
                        where=f"method '{self.recipe.name}'",
                        hint="Add --generate unified.",
                    )
                return told
        return None

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

    def _finish_context(self, loop: _Loop) -> FinishContext:
        folder: Path | None = self.run.path if self.run else None
        start = self.start or (lambda: self.lm)
        return FinishContext(
            self.lm, start, self.records, folder, self.say, loop.notes,
            loop.placement.parameters, loop.memory,
        )  # fmt: skip


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
        self.memory: Memory = {}
        self.masks = placement.masks
        self.history: list[dict[str, float]] = []
        self.stopped: str | None = None
        self.notes: dict[str, Any] = {}
        self.tokens, self.padding = 0, list[float]()
        self.first_keep: float | None = None
        self.folder = trainer.run.path / "checkpoint" if trainer.run else None
        self.last_saved = time.monotonic()
        self.monitor = Monitor(
            trainer.lm, self.training, trainer.records, placement.parameters, trainer.run,
            trainer.say, trainer.seed,
        )  # fmt: skip
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
        if (self.stopped and self.monitor.restores) or self.monitor.asked:
            self.accelerator.wait_for_everyone()
            self.monitor.restore()
        self.notes["parameters"] = sum(v.numel() for v in self.placement.parameters.values())

    def _step(self, step: int, total: int) -> None:
        began = time.perf_counter()
        self._weigh_anew(step)
        rate = self.training.learning_rate * learning_rate_factor(
            self.training.schedule, step, total, self.training.warmup_steps
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        passes = self._gradient(step)
        norm = self._clip()
        forget, keep = self._losses(passes)
        if not math.isfinite(norm) or not math.isfinite(forget):
            self._collapse(step, "the loss or its gradient is not finite")
        self._mask_gradients()
        with self._held_outside_masks():
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

    def _weigh_anew(self, step: int) -> None:
        epoch, within = divmod(step, self.plan.steps_per_epoch)
        weigh = self.trainer.recipe.weigh
        if epoch and not within and weigh.due(epoch):
            self.weights = weigh.weights(self.context)
            self.memory[WEIGHTS] = [self.weights]

    def _gradient(self, step: int) -> Passes:
        """The step's gradient; micro-batches are halved until they fit the memory."""
        while True:
            passes = self._passes(step)
            try:
                if self.placement.each_step is not None:
                    self.masks = self.placement.each_step(passes)
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

    def _passes(self, step: int) -> Passes:
        pairs = self.plan.steps[step]
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
            memory=self.memory,
            seed=self.trainer.seed,
            step=step,
            units=units_of({role: [rows[role][i] for i in forget] for role in roles}),
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
        if self.masks:
            for name, mask in self.masks.items():
                gradient = self.placement.parameters[name].grad
                if gradient is not None:
                    gradient.mul_(mask)

    @contextmanager
    def _held_outside_masks(self) -> Iterator[None]:
        """Where masks change from step to step, the optimiser's momentum does not see them."""
        held = self.masks if self.placement.each_step is not None and self.masks else {}
        with torch.no_grad():
            kept = {name: self.placement.parameters[name].detach().clone() for name in held}
            yield
            for name, mask in held.items():
                parameter = self.placement.parameters[name]
                parameter.copy_(torch.where(mask, parameter, kept[name]))

    @torch.no_grad()
    def _decay_masked(self, rate: float) -> None:
        if self.masks and self.placement.masked_decay and self.training.weight_decay:
            for name, mask in self.masks.items():
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
        done = step + 1
        self.stopped = self.monitor.after(done, last=done == total)
        if not self.stopped:
            self.trainer.recipe.finish.observe(
                done, total, list(self.placement.parameters.values()), self.memory
            )
        due = (
            done % self.training.checkpoint_steps == 0
            if self.training.checkpoint_steps
            else time.monotonic() - self.last_saved > self.training.checkpoint_seconds
        )
        if due and done < total:
            self._save(done)

    # ---- keeping and restoring

    def _save(self, step: int) -> None:
        if self.folder is None or self.trainer.run is None or not self.trainer.run.writes:
            return
        state = {
            "step": step,
            "identity": self.trainer.run.manifest.get("identity") if self.trainer.run else None,
            "balance": self.state,
            "history": self.history,
            "first_keep": self.first_keep,
            "monitor": self.monitor.state(),
            "tokens": self.tokens,
            "padding": self.padding,
        }
        checkpoint.save(
            self.folder / "last", self.placement.parameters, self.optimizer, state, self.memory
        )
        self.last_saved = time.monotonic()

    def _resume(self) -> int:
        found = checkpoint.read_state(self.folder / "last") if self.folder else None
        if found is None or self.folder is None:
            self.monitor.begin(None)
            return 0
        mine = self.trainer.run.manifest.get("identity") if self.trainer.run else None
        if found["identity"] != mine:
            raise RunError(
                "the checkpoint belongs to another run.",
                where=str(self.folder),
                hint="Choose another --out folder, or delete this one.",
            )
        checkpoint.restore(self.folder / "last", self.placement.parameters, self.optimizer)
        self.memory = checkpoint.read_memory(self.folder / "last", self.trainer.lm.device)
        if WEIGHTS in self.memory:
            self.weights = self.memory[WEIGHTS][0].cpu()
        self.state = dict(found["balance"])
        self.history, self.first_keep = found["history"], found["first_keep"]
        self.tokens, self.padding = found["tokens"], found["padding"]
        self.monitor.begin(found["monitor"])
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
        if self.placement.each_step is not None:  # which rows will move is not known yet
            return flat[:: max(1, len(flat) // 256)]
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
