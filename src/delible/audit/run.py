"""The audit: the same questions and attacks to the unlearned system, the original and the
reference, and what can be said from the answers."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

from delible.audit.attacked import Attacked, Kept, attacked_key, preparation_key
from delible.audit.findings import Findings, write_items
from delible.audit.leaks import LEAK_MEASURES, WITHOUT_PART, Setting
from delible.audit.parts import without_parts
from delible.audit.result import AuditResult, SystemInfo, SystemRole
from delible.audit.unanswered import check_answered, unanswered
from delible.audit.utility import SPLITS as KEPT_SPLITS
from delible.audit.utility import Answers
from delible.component import build
from delible.context import Context
from delible.errors import DataError, DelibleError, RecipeError, nearest
from delible.files import atomic_file
from delible.lm.lm import LM
from delible.measure.attack import AttackContext, ModelAttack, PromptAttack
from delible.measure.cache import Cache
from delible.measure.engine import measure
from delible.measure.evaluate import evaluate, item_asks
from delible.measure.metric import (
    ItemMetric,
    SummaryMetric,
    SystemValues,
)
from delible.measure.starting import started
from delible.records import ForgetRequest, RecordBase, digest
from delible.rundir import RunDirectory
from delible.system.asks import NoAnswer, Prompt
from delible.system.base import System
from delible.system.roles import Player
from delible.systems.opening import is_address, open_system
from delible.watching import Stage

logger = logging.getLogger(__name__)

Splits = dict[str, Sequence[RecordBase]]

#: What is measured when nothing is chosen.
DEFAULT_METRICS = (
    "answer_probability",
    "paraphrase_probability",
    "rouge_l_recall",
    "exact_memorisation",
    "extraction_strength",
    "truth_ratio",
    "outcome",
    "forget_quality",
    "model_utility",
)
DEFAULT_ATTACKS = ("paraphrase", "prefix", "prefill", "relearn", "quantize")
#: Records per split that are asked, and retain and holdout records that are asked under attack.
ROWS, ATTACKED_RETAIN, ATTACKED_HOLDOUT = 200, 8, 40
#: Held-out records that a curve is measured on.
CURVE_ROWS = 16
#: Examples per split in the report, and answers per kept split that are looked at for damage.
EXAMPLES, SAMPLED = 6, 12


def _spaced(records: Sequence[RecordBase], count: int) -> Sequence[RecordBase]:
    """At most so many records, evenly spaced."""
    return records[:: max(1, len(records) // count)][:count]


def _setting(attack: PromptAttack | ModelAttack) -> Setting:
    """An attack's row, still empty."""
    card = attack.card
    return Setting(
        card.name,
        attack.variant_title(),
        card.title,
        family="prompt" if isinstance(attack, PromptAttack) else card.family or "",
        control=attack.control,
        changes=card.changes or "",
    )


def audit(
    system: str | System,
    request: ForgetRequest,
    *,
    model: str | None = None,
    before: str | System | None = None,
    reference: str | System | None = None,
    metrics: Sequence[str | Mapping[str, Any]] | None = None,
    attacks: Sequence[str | Mapping[str, Any]] | None = None,
    leaks: Sequence[str] = LEAK_MEASURES,
    guard: str | None = None,
    out: Path | str | None = None,
    seed: int = 0,
    cache: bool = True,
    rows: int = ROWS,
    progress: Stage | None = None,
    roles: Mapping[str, Player] | None = None,
    context: Context | None = None,
) -> AuditResult:
    """Asks and attacks a system, and says what is left of what it was to forget.

    Args:
        system: The unlearned system: a model's name or folder, ``vllm:`` before either, the
            address of an OpenAI-compatible server, or any :class:`System`.
        request: What was to be forgotten; retain, neighbour and holdout records make the audit
            stronger.
        model: Name of the model at that address.
        before: The model before unlearning.
        reference: A model trained without the forgotten records.
        metrics: Names or ``{"name": …, option: value}``; None takes the standard ones.
        attacks: Names or ``{"name": …, option: value}``; None takes the standard ones, an empty
            list none.
        leaks: Metrics that are measured under attack, as knowledge scores (larger = more known).
        guard: Name of a guard to put in front of the system (and of no other).
        out: Run directory for ``metrics.json`` and ``items.parquet``.
        cache: Take answers of the same weights to the same questions from earlier audits.
        rows: Records per split that are asked at most.
        progress: Called as ``progress(title, done, total)`` by everything that takes long.
        roles: Who judges, … by talking: by role a system, a name, or options such as
            ``{"system": "https://host/v1#MODEL", "calls": 500}``.
        context: All of out, seed, cache, progress and roles, made before; instead of them.

    Raises:
        DelibleError: Nothing to ask about, an unknown name, or a model that cannot be read.
    """
    context = started(
        context, seed=seed, run=None if out is None else RunDirectory(out), stage=progress,
        roles=roles, cache=cache,
    )  # fmt: skip
    made = _Audit(
        context,
        system,
        request,
        model,
        before,
        reference,
        metrics,
        attacks,
        leaks,
        guard,
        rows,
    )
    with nullcontext() if made.out is None else made.out.locked():
        return made.run()


class _Audit:
    def __init__(
        self,
        context: Context,
        system: str | System,
        request: ForgetRequest,
        model: str | None,
        before: str | System | None,
        reference: str | System | None,
        metrics: Sequence[str | Mapping[str, Any]] | None,
        attacks: Sequence[str | Mapping[str, Any]] | None,
        leaks: Sequence[str],
        guard: str | None,
        rows: int,
    ) -> None:
        self.began = time.perf_counter()
        self.context, self.request = context, request
        self.cache = Cache(context.cache / "answers") if context.cache else None
        self.metrics = self._metrics(metrics)
        self.attacks = self._attacks(attacks)
        self.leaks = self._leaks(leaks)
        self.out = context.run
        self.not_tested: list[str] = []
        self.splits = self._splits(rows)
        self.white_box = True
        self.systems = self._systems(system, model, before, reference, guard)
        self.measured: dict[str, int] = {}
        self.kept = Kept(self.cache)

    # ---- what is asked of whom

    def _metrics(
        self, specs: Sequence[str | Mapping[str, Any]] | None
    ) -> list[ItemMetric | SummaryMetric]:
        roles = self.context.roles
        return [
            build("metric", spec if isinstance(spec, str) else dict(spec)).with_roles(roles)
            for spec in specs or DEFAULT_METRICS
        ]

    def _attacks(
        self, specs: Sequence[str | Mapping[str, Any]] | None
    ) -> list[PromptAttack | ModelAttack]:
        found: list[PromptAttack | ModelAttack] = []
        for spec in DEFAULT_ATTACKS if specs is None else specs:
            attack = build("attack", spec if isinstance(spec, str) else dict(spec))
            if isinstance(spec, str):
                found += [
                    build("attack", {"name": spec, **options}) for options in attack.variants()
                ]
            else:
                found.append(attack)
        return found

    def _splits(self, rows: int) -> Splits:
        from delible.world import general

        request = self.request
        if not request.forget:
            raise DataError(
                "an audit asks about forget records, and there are none.",
                hint="Add --forget FILE with questions about what was to be forgotten.",
            )
        splits: Splits = {}
        for name in ("forget", "retain", "neighbours", "holdout"):
            records = getattr(request, name)
            if len(records) > rows:
                step = len(records) / rows
                splits[name] = [records[int(index * step)] for index in range(rows)]
                self.not_tested.append(
                    f"Only {rows} of {len(records)} {name} records were asked (evenly spaced)."
                )
            elif records:
                splits[name] = records
        splits["general"] = general()[:rows]
        return splits

    def _systems(
        self,
        system: str | System,
        model: str | None,
        before: str | System | None,
        reference: str | System | None,
        guard: str | None,
    ) -> dict[SystemRole, Callable[[], System]]:
        """Loaders, so that no more than two models are in memory at once."""

        def loader(given: str | System, model: str | None = None) -> Callable[[], System]:
            if not isinstance(given, str):
                return lambda: given
            if is_address(given) or model is not None:
                # takes no memory, and a wrong address or key is told before anything is asked
                endpoint = open_system(given, model=model)
                self._note_endpoint()
                return lambda: endpoint
            return lambda: open_system(given)

        unlearned = loader(system, model)
        if guard is not None:
            unguarded, name = unlearned, guard

            def guarded() -> System:
                from delible.systems.guarded import guard as put_before

                return put_before(unguarded(), self.request, name)

            unlearned = guarded
        systems: dict[SystemRole, Callable[[], System]] = {"unlearned": unlearned}
        for role, given in (("original", before), ("reference", reference)):
            if given is None:
                self.not_tested.append(_WITHOUT[role])
            else:
                systems[cast(SystemRole, role)] = loader(given)
        return systems

    def _note_endpoint(self) -> None:
        prefills = any(attack.card.name == "prefill" for attack in self.attacks)
        lines = [_TEXTS_ONLY, _PREFILLED] if prefills else [_TEXTS_ONLY]
        self.not_tested += [line for line in lines if line not in self.not_tested]

    # ---- the run

    def run(self) -> AuditResult:
        plain = Setting("none", "", "Asked plainly", records=self.splits["forget"])
        attacked = [_setting(attack) for attack in self.attacks]
        findings = Findings(
            self.splits, self.metrics, self.context.seed, plain, attacked, notes=self.not_tested
        )
        for role, load in self.systems.items():
            system = load()
            findings.infos[role] = SystemInfo(
                name=system.name,
                capabilities=sorted(system.capabilities),
                fingerprint=system.fingerprint,
            )
            logger.info(f"Asking the {role} system.")
            plain.values[role] = self._evaluate(
                system, self.splits, self.metrics, role, must_answer=True
            )
            findings.answers[role], findings.samples[role] = self._answers(system)
            if role == "unlearned":
                self.white_box = isinstance(system, LM)
                findings.parts = self._take_away(system)
            for attack, setting in zip(self.attacks, attacked, strict=True):
                self._attack(role, system, attack, setting)
            for note in getattr(system, "notes", ()):
                self._leave_out(f"{role}: {note}")
            del system
            gc.collect()
        for part in findings.parts:
            part.values |= {
                role: found for role, found in plain.values.items() if role != "unlearned"
            }
        result = findings.result(time.perf_counter() - self.began, self.measured)
        if self.out is not None:
            self._write(result, findings.settings)
        return result

    def _take_away(self, system: System) -> list[Setting]:
        """The unlearned system without the parts that can be taken away, one after the other."""
        found = []
        splits: Splits = {"forget": self.splits["forget"], "retain": self._attacked_retain()}
        for title, without in without_parts(system):
            began = time.perf_counter()
            logger.info(f"unlearned: without the {title}.")
            values = self._evaluate(without, splits, self.leaks, "unlearned")
            found.append(
                Setting(
                    WITHOUT_PART, title, "Part taken away", {"unlearned": values},
                    seconds=time.perf_counter() - began, records=splits["forget"], family="part",
                )
            )  # fmt: skip
        return found

    def _evaluate(
        self,
        system: System,
        splits: Splits,
        metrics: Sequence[ItemMetric | SummaryMetric],
        title: str,
        rewrite: Any = None,
        *,
        cached: bool = True,
        must_answer: bool = False,
    ) -> SystemValues:
        def show(done: int, total: int) -> None:
            self.context.stage(title, done, total)

        values = evaluate(
            system, splits, metrics, rewrite=rewrite, cache=self.cache if cached else None,
            progress=show,
        )  # fmt: skip
        for key, count in values.measured.items():
            self.measured[key] = self.measured.get(key, 0) + count
        if must_answer:
            check_answered(f"the {title} system", values.asked, values.unanswered)
        missing = unanswered(title, values.asked, values.unanswered)
        if missing is not None:
            self._leave_out(missing)
        return values

    def _leave_out(self, sentence: str) -> None:
        """Says what was not asked, or not as it was meant, at once and in the report."""
        logger.warning(sentence)
        self.not_tested.append(sentence)

    def _leaks(self, names: Sequence[str]) -> list[ItemMetric]:
        """The knowledge scores that are measured under attack, among the chosen metrics."""
        wanted = item_asks(self.metrics)
        for name in names:
            if name not in LEAK_MEASURES:
                raise RecipeError(
                    f"'{name}' is no knowledge score.", hint=nearest(name, LEAK_MEASURES)
                )
        return [
            cast(ItemMetric, wanted[name].metric)
            for name in LEAK_MEASURES
            if name in wanted and name in names
        ]

    def _attacked_retain(self) -> Sequence[RecordBase]:
        records = self.splits.get("retain") or self.splits.get("neighbours") or ()
        return _spaced(records, ATTACKED_RETAIN)

    def _attack(
        self, role: SystemRole, system: System, attack: PromptAttack | ModelAttack, setting: Setting
    ) -> None:
        began = time.perf_counter()
        splits: Splits = {"forget": self.splits["forget"], "retain": self._attacked_retain()}
        if role == "original" and "reference" not in self.systems:
            splits["holdout"] = _spaced(self.splits.get("holdout", ()), ATTACKED_HOLDOUT)
        title = f"{role}: {setting.title}{f' ({setting.variant})' if setting.variant else ''}"
        if isinstance(attack, PromptAttack):
            self._attack_prompts(role, system, attack, setting, splits, title)
        elif not self.white_box:  # nothing to compare attacked models with
            setting.notes["skipped"] = (
                "the unlearned system gives no weights, so this attack cannot be run on it"
            )
        elif not isinstance(system, LM):
            setting.notes["skipped"] = (
                f"the {role} system gives no weights, so this attack cannot be run on it"
            )
        else:
            self._attack_weights(role, system, attack, setting, splits, title)
        setting.seconds += time.perf_counter() - began

    def _attack_prompts(
        self,
        role: SystemRole,
        system: System,
        attack: PromptAttack,
        setting: Setting,
        splits: Splits,
        title: str,
    ) -> None:
        logger.info(f"{title}.")
        if attack.searches_on() is not None:
            context = self._context(role, [], title)
            try:
                splits["forget"] = attack.held_out(context)
                attack = self._prepared(role, system, attack, context, title)
            except DelibleError as error:
                setting.notes["skipped"] = f"not run: {error}"
                return
            if role == "unlearned":
                setting.notes.update(context.notes)
        setting.records = splits["forget"]
        setting.values[role] = self._evaluate(system, splits, self.leaks, title, attack.prompts)

    def _prepared(
        self,
        role: SystemRole,
        system: System,
        attack: PromptAttack,
        context: AttackContext,
        title: str,
    ) -> PromptAttack:
        """The attack after its search, which is made once per system, attack, records and seed."""
        if attack.searches_on() == "original" and role != "original":
            if "original" not in self.systems:
                raise DataError(
                    "it searches on the original model, which was not given.",
                    hint="Add --before MODEL.",
                )
            system = self._original()
        known = system.fingerprint
        key = None if known is None else preparation_key(known, attack, context)
        with self.kept.alone(key):
            kept = None if key is None else self.kept.preparation(key)
            if kept is not None:
                logger.info(f"{title}: the search is known.")
                spec, notes = kept
                context.notes.update(notes)
                return cast(PromptAttack, build("attack", spec))
            prepared = attack.prepare(system, context)
            if key is not None:
                self.kept.keep_preparation(key, prepared, context.notes)
            return prepared

    def _attack_weights(
        self,
        role: SystemRole,
        lm: LM,
        attack: ModelAttack,
        setting: Setting,
        splits: Splits,
        title: str,
    ) -> None:
        curve: list[tuple[int, float | None]] = []
        context = self._context(role, curve, title)
        try:
            splits["forget"] = attack.held_out(context)
        except DelibleError as error:
            setting.notes["skipped"] = f"not run: {error}"
            return
        self._held = splits["forget"][:CURVE_ROWS]
        setting.records = splits["forget"]
        key = attacked_key(lm.fingerprint, attack, context, splits, self.leaks)
        with self.kept.alone(key):
            found = self.kept.attacked(key)
            if found is not None:
                logger.info(f"{title}: known from an earlier audit.")
            else:
                logger.info(f"{title}.")
                try:
                    attacked = attack.apply(lm, context)
                except DelibleError as error:
                    setting.notes["skipped"] = f"not run: {error}"
                    return
                values = self._evaluate(attacked, splits, self.leaks, title, cached=False)
                found = Attacked(values, curve, dict(context.notes))
                self.kept.keep_attacked(key, found)
                del attacked
                gc.collect()
        setting.values[role], setting.curves[role] = found.values, found.curve
        if role == "unlearned":
            setting.notes.update(found.notes)

    def _context(
        self, role: SystemRole, curve: list[tuple[int, float | None]], title: str
    ) -> AttackContext:
        from delible.world import unrelated

        original = None
        if role == "unlearned" and "original" in self.systems:
            loaded = self._original()
            original = loaded if isinstance(loaded, LM) else None

        def observe(lm: LM, step: int) -> None:
            metric = build("metric", "answer_probability")
            values = evaluate(lm, {"forget": self._held}, [metric])
            curve.append((step, values.means["answer_probability"]["forget"]))

        def progress(done: int, total: int) -> None:
            self.context.stage(title, done, total)

        return AttackContext(
            forget=self.splits["forget"],
            retain=self.splits.get("retain") or self.splits.get("neighbours") or (),
            unrelated=unrelated(),
            original=original,
            seed=self.context.seed,
            observe=observe,
            progress=progress,
        )

    _loaded_original: System | None = None
    #: Records that the running attack's curve is measured on.
    _held: Sequence[RecordBase] = ()

    def _original(self) -> System:
        if self._loaded_original is None:
            self._loaded_original = self.systems["original"]()
            self.systems["original"] = lambda: cast(System, self._loaded_original)
        return self._loaded_original

    def _answers(self, system: System) -> tuple[Answers, Answers]:
        """Answers for the report, and answers to questions that were to be kept."""
        chosen = [metric for metric in self.metrics if metric.card.name == "outcome"]
        metric = cast(ItemMetric, chosen[0] if chosen else build("metric", "outcome"))
        shown = self._asked(metric, ("forget", "retain"), EXAMPLES)
        sampled = self._asked(metric, KEPT_SPLITS, SAMPLED)
        requests = [
            request
            for record, prompt in {**shown, **sampled}.values()
            for request in metric.requests(record, prompt)
        ]
        answers = measure(system, requests, cache=self.cache)

        def read(record: RecordBase, prompt: Prompt) -> tuple[str, str] | str:
            texts = [answers[request] for request in metric.requests(record, prompt)]
            failed = [one for one in texts if isinstance(one, NoAnswer)]
            if failed:  # not an answer: it has no class
                return failed[0].reason
            text = next((text for text in texts if isinstance(text, str)), "")
            return text, metric.score(record, prompt, answers).detail or ""

        found: Answers = {}
        for place, (record, prompt) in shown.items():
            answer = read(record, prompt)
            found[place] = (f"(no answer: {answer})", "") if isinstance(answer, str) else answer
        samples = {place: read(record, prompt) for place, (record, prompt) in sampled.items()}
        return found, {place: one for place, one in samples.items() if not isinstance(one, str)}

    def _asked(
        self, metric: ItemMetric, splits: Sequence[str], count: int
    ) -> dict[tuple[str, int], tuple[RecordBase, Prompt]]:
        """Evenly spaced records of some splits that can be asked."""
        found = {}
        for split in splits:
            records = self.splits.get(split, ())
            for index in range(0, len(records), max(1, len(records) // count))[:count]:
                prompt = metric.prompt(records[index])
                if prompt is not None:
                    found[split, index] = (records[index], prompt)
        return found

    # ---- the files

    def _write(self, result: AuditResult, settings: Sequence[Setting]) -> None:
        assert self.out is not None
        if not self.out.manifest:
            self.out.begin(
                {
                    "command": "audit",
                    "system": result.systems["unlearned"].model_dump(),
                    "seed": self.context.seed,
                    "forget": digest(self.request.forget),
                    "metrics": [metric.spec() for metric in self.metrics],
                    "attacks": [attack.spec() for attack in self.attacks],
                }
            )
        write_items(self.out.path / "items.parquet", settings)
        with atomic_file(self.out.path / "metrics.json") as handle:
            handle.write(result.model_dump_json(indent=2))
        if self.out.manifest.get("status") != "done":
            self.out.finish(cost={"seconds": result.seconds})


_TEXTS_ONLY = (
    "An endpoint gives texts only: log-probabilities, hidden states and weights were not looked "
    "at, so metrics that read them and attacks that change weights were left out."
)
_PREFILLED = (
    "Whether the endpoint went on from a prefilled answer is not known: some servers begin anew."
)
_WITHOUT = {
    "original": "The original model was not given (--before), so nothing is compared with it.",
    "reference": (
        "No model trained without the forgotten records was given (--reference), so what "
        "unlearning should reach is not known exactly."
    ),
}
