"""The training engine: everything around the steps of a run.

It knows nothing of any method: slots decide which rows, parameters and losses. It adds what every
run needs: rows of every role, the cached reference, an optimiser, how many tokens fit the memory;
``loop.py`` has the steps.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from delible.context import Context
from delible.errors import RecipeError, RunError
from delible.files import write_json
from delible.lm.budget import free_memory
from delible.lm.forward import Forward
from delible.lm.lm import LM
from delible.lm.sharded import asked_for, share_of
from delible.precision import short_types
from delible.prompts import read_lines
from delible.records import RecordBase
from delible.train import generated, savings
from delible.train.estimate import tokens_that_fit
from delible.train.fitting import described, shortened, split_passages
from delible.train.footprint import weights_bytes
from delible.train.generated import Generated
from delible.train.gradients import Gradients
from delible.train.loop import Job, Loop
from delible.train.losses import Keep, Loss, Role
from delible.train.needs import GIVEN_ROLES, check_needs
from delible.train.optimizers import make_optimizer
from delible.train.plan import Plan, make_plan
from delible.train.processes import open_processes
from delible.train.randomness import generator
from delible.train.reach import check_reach, check_rows, deepest_read, moved_blocks
from delible.train.recipe import Recipe
from delible.train.reference import Reference
from delible.train.row import Row
from delible.train.rows import make_rows, refusal_rows
from delible.train.sharding import check_shares, explain_loss, least, spread_out
from delible.train.simulated import Shape, rough_activation_bytes
from delible.train.slots import FinishContext, Placement, SlotContext

logger = logging.getLogger(__name__)

#: Roles whose answers were made for training: cut off, they would teach something else.
WHOLE_ANSWERS: tuple[Role, ...] = ("alternate", "target")
#: Said when the model to be trained wears an adapter.
MERGED_FIRST = (
    "The model wears an adapter: it is merged into the weights first, and the result is a whole "
    "model."
)


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


class Trainer:
    """One training run.

    Args:
        lm: The model; trained in place.
        recipe: What to do.
        records: Records by role: ``forget``, ``retain``.
        context: Of the run: its seed, its folder, who writes generated rows, who is told what.
        reference: The reference model; None is the model as it is at the start.
        start: Loads the start model again (for finishers that mix with it).
        refusals: Refusal sentences; None takes the built-in ones.
        generated: Generated rows by role, to be used instead of generating any.
    """

    def __init__(
        self,
        lm: LM,
        recipe: Recipe,
        records: Mapping[str, Sequence[RecordBase]],
        *,
        context: Context | None = None,
        reference: LM | None = None,
        start: Callable[[], LM] | None = None,
        refusals: Sequence[str] | None = None,
        generated: Generated | None = None,
    ) -> None:
        self.lm, self.recipe, self.records = lm, recipe.fitted(lm), records
        self.context, self.reference_lm, self.start = context or Context(), reference, start
        self.run, self.refusals, self.generated = self.context.run, refusals, generated
        self.keep: Keep | None = None if recipe.keep.card.name == "none" else recipe.keep
        self.notes: dict[str, Any] = {}
        self.context_tokens = lm.template.max_length

    def train(self) -> TrainResult:
        """Runs (or resumes) to the end and returns the finished model.

        Raises:
            RecipeError: The composition cannot work with these records.
            RunError: The loss collapsed, nothing moved, or the checkpoint is another run's.
        """
        check_needs(self.recipe, self.records, self.generated)
        check_shares(self.recipe, self.lm)
        if self.lm.wears_adapter and not self.recipe.place.continues:
            self.lm.merge_adapter()
            logger.info(MERGED_FIRST)
        self.lm.hold(self.recipe.training.base_precision)
        savings.check_savings(self.recipe, self.lm)
        with (
            self._shorter_rows(),
            savings.saving(self.recipe, self.lm),
            explain_loss(),
            self._phase("training"),
        ):
            return self._train()

    @contextmanager
    def _shorter_rows(self) -> Iterator[None]:
        """Rows of training may be shorter than what the model can be asked."""
        template = self.lm.template
        longest = template.max_length
        template.max_length = min(self.recipe.training.max_length, longest)
        try:
            yield
        finally:
            template.max_length = longest

    def _train(self) -> TrainResult:
        began = time.perf_counter()
        training = self.recipe.training
        losses = [loss for loss in (self.recipe.objective, self.keep) if loss is not None]
        inside = all(deepest_read(loss, self.lm) is not None for loss in losses)
        accelerator = open_processes(inside=inside)
        accelerator.wait_for_everyone()  # the first process has written the manifest
        self.lm.precision = self.lm.resolved(training.precision)
        if self.recipe.finish.needs_start and self.start is None:
            raise RecipeError(
                f"finish '{self.recipe.finish.card.name}' needs the start model.",
                hint="Pass start= when training from Python.",
            )
        check_reach(self.recipe, self.lm)
        context = self.rows()
        silent = check_rows(
            self.recipe.objective, context.rows[self.recipe.objective.roles[0]], self.recipe.name,
        )  # fmt: skip
        if silent:
            self.notes["rows_without_effect"] = silent
        weights = self.recipe.weigh.weights(context)
        placement = self.recipe.place.apply(context)
        if not placement.parameters:
            raise RecipeError(
                "no parameter may move.", where=f"place '{self.recipe.place.card.name}'"
            )
        moving = moved_blocks(self.lm, placement.parameters.values())
        self._settle([block for block in moving if block < self.lm.anatomy.layers])
        check_reach(self.recipe, self.lm, min(moving, default=self.lm.anatomy.layers))
        self._widen(placement)
        plan = make_plan(
            self.recipe, context.rows["forget"], context.rows["retain"], self.context.seed
        )
        self.recipe.finish.check(len(plan.steps))
        if asked_for():
            placement = spread_out(self.lm, placement, accelerator)
        reference = self._reference(context, plan)
        optimizer = make_optimizer(self.recipe.training, placement)
        self.lm.model.eval()  # dropout would make cached reference values wrong
        forward: torch.nn.Module = Forward(self.lm)
        if self.lm.sharded is None:
            forward, optimizer = accelerator.prepare(forward, optimizer)
        budget = least(self.token_budget(context, plan, placement), accelerator.num_processes)
        job = Job(self.lm, self.recipe, self.keep, self.records, self.context, budget)
        loop = Loop(
            job, accelerator, context, placement, plan, weights, reference, forward, optimizer
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
            {**self.notes, **loop.notes},
        )

    def _phase(self, doing: savings.Phase) -> AbstractContextManager[None]:
        return savings.phase(doing, self.recipe, self.lm.device_type)

    def _settle(self, moving: Sequence[int]) -> None:
        """The losses, once it is known in which blocks weights move."""
        objective = self.recipe.objective.settled(moving)
        keep = self.recipe.keep.settled(moving)
        self.recipe = self.recipe.model_copy(update={"objective": objective, "keep": keep})
        self.keep = None if self.keep is None else keep

    def rows(self) -> SlotContext:
        """Tokenized rows of every role, with the forget rows that the recipe selects."""
        with self._shorter_rows():
            return self._rows()

    def _rows(self) -> SlotContext:
        template, recipe = self.lm.template, self.recipe
        recipe.generate.prepare(self.lm)
        records = self._in_pieces()
        before = self._context({}, dict(records))
        records.update({str(role): part for role, part in self._generated(before).items()})
        keeps = any("retain" in component.own_needs for component in recipe.components())
        partners = [role for role in recipe.objective.roles if role not in GIVEN_ROLES]
        generated.check_partners(records, partners)
        told = generated.instruction(recipe, self.keep, before)
        forget_told = told if recipe.objective.instructed else None
        keep_told = told if self.keep is not None and self.keep.instructed else None
        rows: dict[str, list[Row]] = {
            role: make_rows(
                template,
                records[role],
                forget_told,
                role=role,
                whole_answer=role in WHOLE_ANSWERS,
                contexts=recipe.objective.contexts if role == "forget" else None,
            )
            for role in ("forget", *partners)
        }
        kept = records.get("retain", ()) if keeps else ()
        rows["retain"] = make_rows(template, kept, keep_told, role="retain")
        if "refusal" in recipe.objective.roles:
            rows["refusal"] = refusal_rows(
                template,
                records["forget"],
                self.refusals or read_lines("refusals.txt"),
                generator(self.context.seed, "refusals"),
            )
        context = self._context(rows, records)
        chosen = recipe.select.choose(context)
        for role in (role for role in generated.ROLES if role != "retain"):
            if role in rows:
                rows[role] = [rows[role][index] for index in chosen]
            if role in records:
                records[role] = [records[role][index] for index in chosen]
        if lost := described(rows, template.max_length, self.context_tokens):
            logger.warning(lost)
        self.notes["truncated_rows"] = shortened(rows)
        return context

    def _in_pieces(self) -> dict[str, Sequence[RecordBase]]:
        """The records by role, passages that are too long for a row in pieces."""
        found: dict[str, Sequence[RecordBase]] = {}
        for role, records in self.records.items():
            found[role], cut = split_passages(self.lm.template, records)
            if cut:
                more = len(found[role]) - len(records)
                logger.warning(
                    f"{cut} of {len(records)} {role} records are passages of more than "
                    f"{self.lm.template.max_length} tokens: they are cut in {cut + more} pieces."
                )
                self.notes[f"{role}_passages_cut"] = {"passages": cut, "pieces": cut + more}
        return found

    def _context(
        self, rows: Mapping[str, Sequence[Row]], records: Mapping[str, Sequence[RecordBase]]
    ) -> SlotContext:
        run = self.context
        return SlotContext(
            self.lm, rows, records, Gradients(self.lm, stage=run.stage), self.recipe.objective,
            self.keep, run.seed, run.plays("writer"), run.stage,
        )  # fmt: skip

    def _generated(self, context: SlotContext) -> Generated:
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

    def _make_rows(self, context: SlotContext) -> Generated:
        return self.recipe.generate.rows(context) if self.generated is None else self.generated

    def _reference(self, context: SlotContext, plan: Plan) -> Reference:
        """The reference's values for rows, and what losses learn of it."""
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
        losses: list[tuple[Loss, Mapping[str, Sequence[Row]]]] = [(objective, context.rows)]
        if keep is not None:
            losses.append((keep, {**context.rows, "retain": wanted[-1][0]}))
        if folder is not None:
            reference.load(folder)
        for rows, kinds in wanted:
            with self._phase("the reference values"):
                reference.prepare(lm, rows, kinds, self.context.stage)
        for loss, known in losses:
            if not reference.knows(loss.full_name):
                seed, stage = self.context.seed, self.context.stage
                reference.learn(loss.full_name, loss.learn(lm, known, reference, seed, stage))
        own = self.reference_lm is None and reference.values
        if own and self.run is not None and self.run.writes:
            reference.save(self.run.path / "checkpoint" / "reference")
        return reference

    def token_budget(self, context: SlotContext, plan: Plan, placement: Placement) -> int:
        """Padded tokens per pass: as said, or what makes a device busy and fits its memory."""
        chosen = self.recipe.training.micro_batch_tokens
        if chosen != "auto":
            return chosen
        lm, kind = self.lm, self.lm.device_type
        enough = 32768 if kind == "cuda" else 1024
        free = int((0.6 if kind == "cuda" else 0.4) * free_memory(torch.device(kind)))
        most = Shape(max(1, enough // 8), 8, 0, enough)
        moving = 16 * sum(share_of(value).numel() for value in placement.parameters.values())
        if lm.sharded is not None:  # what fits is not estimated by blocks, but halved until it does
            while enough > 64 and rough_activation_bytes(lm, most) + moving > free:
                enough, most = enough // 2, Shape(max(1, enough // 16), 8, 0, enough // 2)
            return enough
        held = 0 if lm.device.type == "meta" else weights_bytes(lm, self.recipe)
        if rough_activation_bytes(lm, most) + moving < free:
            return enough
        parts = (lm, self.recipe, plan, placement, context.rows)
        return max(64, min(enough, tokens_that_fit(*parts, free + held, enough) or 64))

    def _widen(self, placement: Placement) -> None:
        """Weights that move are fp32: a small update of a shorter number rounds away."""
        if short := short_types(placement.parameters.values()):
            logger.warning(
                f"The weights are {' and '.join(short)}, in which most small updates would round "
                "away: the model is converted to float32 and stays so (twice the memory)."
            )
            self.lm.model.float()
            self.lm.touch()

    def _finish_context(self, loop: Loop) -> FinishContext:
        start = self.start or (lambda: self.lm)
        return FinishContext(
            self.lm, start, self.records, self.run.path if self.run else None, loop.notes,
            loop.placement.parameters, loop.memory, self.context.stage,
        )  # fmt: skip
