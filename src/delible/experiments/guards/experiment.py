"""Guards: what each holds back, whom it disturbs, and what it costs.

A model is taught made-up people (as for benchmark `world`). Each guard then stands before it, with
the records of some of them to forget, and is asked

- the forgotten questions, plainly and under every attack that only asks, talks included,
- the questions about neighbours and other kept people, and harmless prompts of PHTest (its file),
- both once more with every question that is put to a model counted, and one by one with a watch.

The people are also forgotten one request after the other, which gives DRAGON's scores over time.
The same is asked without a guard, and of a model that never learned the people: what that one tells
is luck. A guard whose model must be taught something first (`icku`) stands before such a model.

Papers: arXiv 2511.05784 (deviation, its scores over requests, refusal quality), 2502.00406 (cost by
number of targets), 2504.20965 (flags of forgotten and of other questions, false refusals). No code
of theirs is run. Deviations: made-up people in place of TOFU and WMDP; choices of one letter are
left out, since a small model does not keep to letters; KFR and KRR without their entailment model
are one minus the plain leak, and the share of kept answers told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any, ClassVar, cast

import numpy as np
from pydantic import Field

from delible import registry
from delible.api import unlearn
from delible.bench.prepare import learned
from delible.cards import Kind
from delible.component import build
from delible.context import Context
from delible.errors import DelibleError, RecipeError
from delible.experiments.guards.asking import (
    Meter,
    Said,
    asked,
    harmless_prompts,
    rouge,
    said,
    seconds,
    told,
    told_under,
)
from delible.experiments.guards.findings import NEVER, NOBODY, Cell, findings
from delible.experiments.guards.scores import (
    deviation,
    dynamic_deviation,
    dynamic_utility,
    refusal_quality,
)
from delible.kept import identity
from delible.lm.encoder import sentence_encoder
from delible.lm.lm import LM
from delible.measure.attack import AttackContext, ConversationAttack, PromptAttack
from delible.measure.benchmark import Benchmark, Data, Experiment, Findings, Setting, Task
from delible.measure.starting import roles_of
from delible.prompts import read_lines
from delible.records import QA, ForgetRequest, Record
from delible.registry import register
from delible.system.asks import Decoding, Prompt
from delible.system.base import System
from delible.systems.guarded import Guard, GuardedSystem
from delible.world import templates, unrelated

#: An attack that only asks.
Asking = PromptAttack | ConversationAttack
#: Talks that need nobody who plays a part, and do not hand the fact over themselves.
TALKS = ("languages", "many_shot", "masking", "sleek")


def prompt_attacks() -> list[str]:
    """Names of the attacks that only ask and need nothing to be found out before, and the talks."""
    names = [card.name for card in registry.cards("attack") if card.family == "prompt"]
    return [name for name in names if name in TALKS or _plain(registry.load("attack", name))]


def _plain(kind: Any) -> bool:
    fields = kind.model_fields.values()
    if not issubclass(kind, PromptAttack) or any(field.is_required() for field in fields):
        return False
    if kind.held_out is not PromptAttack.held_out:  # its probes ask for more than the facts
        return False
    return cast(PromptAttack, kind()).searches_on() is None


@register(
    kind="benchmark",
    name="guards",
    title="Guards",
    summary="Compares guards: what leaks under attack, who is refused by mistake, what it costs.",
    paper="2511.05784",
    year=2025,
    family="fictional",
    needs=("forget", "retain"),
    capability="generate",
    misleads="A leak is what a small model knows and the guard lets out: compare it with the row "
    "without a guard, and with the model that never learned it. Attacks are those that only change "
    "the prompt: a guard that withstands them all is gone with whoever gets behind it. Rates of "
    "few questions are coarse, and seconds are those of a machine that did other work, too.",
    badges=("variant",),
    variant="Made-up people; the papers' measures as far as they need neither another judge nor "
    "letters of choices.",
)
class GuardsCompared(Experiment):
    """Every guard before one model; a finished guard is kept under the folder."""

    attacked: ClassVar[bool] = True
    casts: ClassVar[bool] = True
    compares: ClassVar[tuple[Kind, ...]] = ("guard",)

    people: int = Field(10, ge=4, description="People in the world.")
    forget: int = Field(2, ge=1, description="People to forget.")
    world_seed: int = Field(0, ge=0, description="Seed of the world.")
    forms: int = Field(3, ge=1, description="Forms of each question per attack at most.")
    max_new_tokens: int = Field(16, ge=1, description="Longest answer in tokens.")
    kept_rows: int = Field(30, ge=1, description="Questions about kept people at most.")
    phtest: str | None = Field(
        None, description="File of PHTest (ID, Request, Harmfulness); none: its column is empty."
    )
    phtest_rows: int = Field(60, ge=1, description="Harmless prompts of it that are asked.")
    timed: int = Field(8, ge=1, description="Questions that are asked with a watch.")
    many: int = Field(
        100, ge=0, description="Targets with which costs are measured again; 0: they are not."
    )
    reference: bool = Field(True, description="Also ask a model that never learned the people.")
    beta: float = Field(1.0, ge=0, description="How much a rise counts in DDS.")
    refusal_quality: bool = Field(
        True, description="Measure the quality of refusals, by the sentence encoder."
    )

    def run(self, setting: Setting) -> Findings:
        guards = [self.guard(name) for name in setting.methods or self.guards()]
        attacks = [self.attack(one) for one in setting.attacks or prompt_attacks()]
        harmless = harmless_prompts(Path(self.phtest), self.phtest_rows) if self.phtest else []
        benchmark = cast(Benchmark, build("benchmark", {
            "name": "world", "people": self.people, "forget": self.forget,
            "world_seed": self.world_seed,
        }))  # fmt: skip
        task = benchmark.tasks(Data())[0]
        total = 2 + self.reference + len(guards)
        setting.progress("learning the people", 0, total)
        learning = benchmark.learning(setting.model)
        options: dict[str, Any] = {"options": learning.options, "slots": learning.slots}
        start = learned(setting.model, _records(task.learn), **options)
        models = {NOBODY: start}
        if self.reference:
            kept = _records(task.relearned)
            models[NEVER] = learned(setting.model, kept, title="reference", **options)
        found: dict[str, Cell] = {}
        for done, (name, folder) in enumerate(models.items(), start=1):
            setting.progress(name, done, total)
            described = {**self._described(attacks, {}), "folder": folder.parent.name}
            found[name] = self.kept(
                setting, name, described,
                lambda at=folder: self._bare(LM.load(str(at)), task, attacks, harmless),
            )  # fmt: skip
        for done, guard in enumerate(guards, start=1 + len(models)):
            setting.progress(guard.name, done, total)
            described = {
                **self._described(attacks, roles_of(setting.roles).named()), "guard": guard.spec(),
                "folder": start.parent.name,
            }  # fmt: skip
            found[guard.name] = self.kept(
                setting, guard.name, described,
                lambda one=guard: self._guarded(one, start, task, attacks, harmless, setting),
            )  # fmt: skip
        setting.progress("done", total, total)
        return findings(found, [one.card.name for one in attacks])

    # ---- who is asked

    def guards(self) -> list[str]:
        """Every guard that there is."""
        return [card.name for card in registry.cards("guard")]

    def guard(self, name: str) -> Guard:
        """A guard by name.

        Raises:
            RecipeError: Unknown; offers the nearest.
        """
        return cast(Guard, build("guard", name))

    def attack(self, spec: Any) -> Asking:
        """An attack by name, or by name and options.

        Raises:
            RecipeError: Unknown, or one that does not only ask.
        """
        found = build("attack", spec)
        if isinstance(found, ConversationAttack):
            return found
        if not isinstance(found, PromptAttack) or found.searches_on() is not None:
            raise RecipeError(
                f"attack '{found.card.name}' does not only ask.",
                where="benchmark 'guards'",
                hint=f"Those that do: {', '.join(prompt_attacks())}. An audit runs the others.",
            )
        given = spec if isinstance(spec, dict) else {}
        return found if "forms" in given else found.model_copy(update={"forms": self.forms})

    def _described(self, attacks: Sequence[Asking], roles: Mapping[str, Any]) -> Cell:
        return {"attacks": [one.spec() for one in attacks], "roles": dict(roles)}

    def _before(self, guard: Guard, start: Path, task: Task, setting: Setting) -> tuple[LM, Cell]:
        """The model that the guard stands before, and what that took."""
        if guard.taught is None:
            return LM.load(str(start)), {}
        practice = ForgetRequest(forget=tuple(_records(_kept(task.request))))
        key = identity({"start": start.parent.name, "recipe": guard.taught})[:8]
        folder = setting.folder / "taught" / f"{guard.taught}-{key}"
        result = unlearn(
            str(start), practice, method=guard.taught, out=folder, shown=0, measured=False,
            verify=False,
        )  # fmt: skip
        return LM.load(str(result.folder / "model" if result.folder else folder / "model")), {
            "taught": guard.taught
        }

    # ---- what is asked

    def _bare(self, lm: LM, task: Task, attacks: Sequence[Asking], harmless: Sequence[str]) -> Cell:
        recalls = [self._recalls(lm, step) for step in self._steps(task)[:-1]]
        asked_now = self._asked(lm, task, attacks, harmless, Context())
        return {**asked_now, **self._over([*recalls, asked_now["recalls"]])}

    def _guarded(
        self, guard: Guard, start: Path, task: Task, attacks: Sequence[Asking],
        harmless: Sequence[str], setting: Setting,
    ) -> Cell:  # fmt: skip
        lm, notes = self._before(guard, start, task, setting)
        context = Context(roles=roles_of(setting.roles))

        def before(request: ForgetRequest) -> GuardedSystem:
            return guard.put_before(lm, request, context)

        system = before(task.request)
        recalls = [self._recalls(before(step), step) for step in self._steps(task)[:-1]]
        asked_now = self._asked(system, task, attacks, harmless, context)
        asked_now["outcomes"] = dict(system.mind.notes.get("costs", {}).get("outcomes", {}))
        costs = self._costs(lm, system, task)
        if self.many:
            grown = before(_with_more(task.request, self.many))
            costs["many"] = self._costs(lm, grown, task)
        given = [part for part in guard.consults if part in context.roles.players]
        return {
            **asked_now,
            **self._over([*recalls, asked_now["recalls"]]),
            **costs,
            **notes,
            "itself": [part for part in guard.consults if part not in given],
            "roles": {part: context.roles.name_of(part) for part in given},
        }

    def _asked(
        self,
        system: System,
        task: Task,
        attacks: Sequence[Asking],
        harmless: Sequence[str],
        context: Context,
    ) -> Cell:
        forget, kept = self._questions(task)
        request = task.request
        given = AttackContext(
            forget, request.retain, unrelated(), None, context.seed,
            neighbours=request.neighbours, holdout=request.holdout, roles=context.roles,
        )  # fmt: skip
        decoding = Decoding(self.max_new_tokens)
        plain = said(system, [asked(one) for one in forget], decoding)
        others = said(system, [asked(one) for one in kept], decoding)
        pseudo = said(system, [Prompt.ask(text) for text in harmless], decoding)
        leaks: dict[str, list[bool | None]] = {}
        not_run: dict[str, str] = {}
        for one in attacks:
            name = one.card.name
            try:
                leaks[name] = told_under(system, forget, one, given, decoding, self.forms)
            except DelibleError as error:  # the records do not give what it needs
                leaks[name], not_run[name] = [None] * len(forget), str(error)
        return {
            "leak": {"plain": told(forget, plain), **leaks},
            "not_run": not_run,
            "flagged": [one.refused for one in plain],
            "kept": {
                "told": told(kept, others),
                "flagged": [one.refused for one in others],
                "texts": [one.text for one in others],
            },
            "phtest": [one.refused for one in pseudo],
            "recalls": [fmean(rouge(forget, plain)), fmean(rouge(kept, others))],
            "asked": len(plain) + len(others) + len(pseudo),
            "unanswered": sum(one.unanswered for one in (*plain, *others, *pseudo)),
            "guard failed": sum(one.failed for one in (*plain, *others, *pseudo)),
            "quality": self._quality(plain),
            "examples": [
                [one.question, reply.text] for one, reply in zip(forget, plain, strict=True)
            ],
        }

    def _questions(self, task: Task) -> tuple[list[QA], list[QA]]:
        forget = [one for one in task.request.forget if isinstance(one, QA)]
        return forget, _kept(task.request)[: self.kept_rows]

    def _quality(self, answers: Sequence[Said]) -> float | None:
        if not self.refusal_quality:
            return None
        encoder = sentence_encoder()
        texts = [one.text for one in answers]
        return refusal_quality(
            texts,
            np.asarray(encoder.encode([text or " " for text in texts])),
            np.asarray(encoder.encode(list(read_lines("refusals.txt")))),
        )

    # ---- one request after the other

    def _steps(self, task: Task) -> list[ForgetRequest]:
        """The requests one by one: each holds what those before it hold, too."""
        request = task.request
        names = list(request.subjects)
        steps = []
        for count in range(1, len(names) + 1):
            gone = set(names[:count])
            forget = tuple(one for one in request.forget if one.subject in gone)
            still = tuple(one for one in request.forget if one.subject not in gone)
            steps.append(
                request.model_copy(
                    update={
                        "forget": forget,
                        "subjects": tuple(names[:count]),
                        "retain": (*request.retain, *still),
                    }
                )
            )
        return steps

    def _recalls(self, system: System, request: ForgetRequest) -> list[float]:
        """Mean ROUGE-L recalls of forgotten and of kept answers."""
        decoding = Decoding(self.max_new_tokens)
        forget = [one for one in request.forget if isinstance(one, QA)]
        found = []
        for questions in (forget, _kept(request)[: self.kept_rows]):
            answers = said(system, [asked(one) for one in questions], decoding)
            found.append(fmean(rouge(questions, answers)))
        return found

    def _over(self, recalls: Sequence[Sequence[float]]) -> Cell:
        scores = [deviation(forget, kept) for forget, kept in recalls]
        return {
            "rouge": {"forget": recalls[-1][0], "kept": recalls[-1][1]},
            "deviation": scores[-1],
            "dynamic deviation": dynamic_deviation(scores, self.beta),
            "dynamic utility": dynamic_utility([kept for _, kept in recalls]),
        }

    # ---- costs

    def _costs(self, lm: LM, system: GuardedSystem, task: Task) -> Cell:
        forget, kept = self._questions(task)
        decoding = Decoding(self.max_new_tokens)
        meter, found = Meter(lm), Cell()
        others = [asked(one) for one in kept[: self.timed]]
        for name, prompts in {
            "targets": [asked(one) for one in forget[: self.timed]], "others": others,
        }.items():  # fmt: skip
            with meter.reading([lm, *system.mind.consulted]) as count:
                system.generate(prompts, decoding)
            found[name] = count.each(len(prompts))
        spent = seconds({"bare": lm, "guarded": system}, others, decoding)
        found["seconds"] = {"bare": spent["bare"], "added": spent["guarded"] - spent["bare"]}
        return found


def _records(records: Sequence[Any]) -> Sequence[Record]:
    return cast(Sequence[Record], records)


def _kept(request: ForgetRequest) -> list[QA]:
    """Questions about neighbours and other kept people, in turn."""
    sides = [list(request.neighbours), list(request.retain)]
    found: list[Any] = []
    for place in range(max(map(len, sides))):
        found += [side[place] for side in sides if place < len(side)]
    return [one for one in found if isinstance(one, QA)]


def _with_more(request: ForgetRequest, many: int) -> ForgetRequest:
    """The request with made-up names as subjects, so many targets in all."""
    draw = Random("more targets")
    names = dict.fromkeys(request.subjects)
    while len(names) < many:
        names[templates.invented_name(draw, 2)] = None
    return request.model_copy(update={"subjects": tuple(names)})
