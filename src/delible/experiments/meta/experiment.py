"""Meta-evaluation: which metrics tell forgetting from hiding?

Each metric is asked about models that know (P) and models that never saw (N) the forget facts,
and about unlearned models before and after relearning and quantization. The formulas are in
:mod:`delible.experiments.meta.scores`.

    P: all facts | the kept facts and biographies | the kept facts and questions in other words
    N: the kept facts | ... and wrong answers | ... and unrelated facts

Paper: OpenUnlearning (arXiv 2506.12618), reference code locuslab/open-unlearning; replication:
gnueaj/unlearning-depth-score. Deviations: the facts are those of a made-up world; two seeds
instead of 5 learning rates times 2 numbers of epochs per variant (options widen it to that);
quantization rounds to nearest on a uniform 4-bit grid instead of NF4, which needs bitsandbytes;
unrelated facts are neutral rows instead of biographies of celebrities; the utility is the harmonic
mean over retained, neighbouring and general records, without the parts that the model before has
next to nothing of. Membership attacks are read, as there, by the area that tells forget from
holdout records, and the truth ratio as 1 - min(TR, 1 / TR).
"""

from __future__ import annotations

import gc
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from delible.api import unlearn
from delible.bench.prepare import learned
from delible.bench.run import method_names
from delible.component import build
from delible.errors import DelibleError, RecipeError, nearest
from delible.experiments.meta.findings import Model, chart, notes, pooled, row, value, verdict
from delible.experiments.meta.pools import Pool, spread, variants
from delible.experiments.meta.readings import READINGS, Seen, seen, utility
from delible.kept import cell, identity
from delible.lm.lm import LM
from delible.measure.attack import AttackContext, ModelAttack
from delible.measure.benchmark import (
    Experiment,
    Findings,
    Setting,
)
from delible.records import ForgetRequest, RecordBase, digest
from delible.registry import register
from delible.resolving import resolve_method
from delible.watching import aside
from delible.world import World, general
from delible.world.split import Split

logger = logging.getLogger(__name__)

#: One fact of each kind per person; none is answered by a person.
RELATIONS = ("birthplace", "occupation", "employer", "award", "instrument")
#: Unlearned and measured if none are named.
METHODS = ("graddiff", "npo", "simnpo", "idk")
#: Learning rate and epochs of the pools, by model.
LEARNING = {"tiny": (2e-3, 20), "default": (3e-4, 6)}
#: Learning rates, each in a run of its own, and epochs of every recipe: the same budget for all.
UNLEARNING = {"tiny": ((3e-4, 6e-4, 9e-4), 14), "default": ((4e-5,), 5)}
#: Learning rate of relearning. Much more, and the model before itself loses what it knows.
RELEARNING = {"tiny": 5e-4, "default": 1e-4}


# ---- the experiment


@register(
    kind="benchmark",
    name="meta",
    title="Meta-evaluation of metrics",
    summary="Judges metrics: who sees knowledge, and sees it before an attack digs it up.",
    paper="2506.12618",
    year=2025,
    family="fictional",
    needs=("forget", "retain"),
    capability="score",
    misleads="With a few models per pool the area has few steps, and robustness rests on the "
    "unlearned models that pass both filters (column 'models'): with one or two of them it is an "
    "anecdote. Where relearning leaves the reference as it was, as coarse metrics do, R is 0. A "
    "metric that never moves is perfectly robust, so read it with the faithfulness.",
    badges=("variant",),
    variant="A made-up world, few models, and rounding to nearest instead of NF4.",
)
class Meta(Experiment):
    """Pools, unlearned models, and the metrics that are judged on them."""

    metrics: tuple[str, ...] = Field(
        (
            "answer_probability", "paraphrase_probability", "rouge_l_recall",
            "extraction_strength", "exact_memorisation", "truth_ratio", "knowledge_truth_ratio",
            "loss_attack", "zlib_attack", "min_k", "min_k_plus_plus",
        ),
        min_length=1,
        description="Metrics to judge; also paraphrase_rouge, jailbreak_rouge and a few more.",
    )  # fmt: skip
    people: int = Field(16, ge=6, description="People in the world.")
    forget: int = Field(3, ge=1, description="People to forget; as many are never seen.")
    world_seed: int = Field(0, ge=0, description="Seed of the world.")
    learning_rates: tuple[Annotated[float, Field(gt=0, le=1)], ...] | None = Field(
        None, description="Of the pools (published: 1e-5 to 5e-5); by default one for the model."
    )
    epochs: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        None, description="Of the pools (published: 5, 10); by default one for the model."
    )
    batch_size: int = Field(8, ge=1, description="Rows per optimiser step of the pools.")
    pool_seeds: int = Field(2, ge=1, description="Models per variant, rate and epochs.")
    unlearning_rates: tuple[Annotated[float, Field(gt=0, le=1)], ...] | None = Field(
        None, description="Every recipe is run with each; by default a few for the model."
    )
    unlearning_epochs: int | None = Field(
        None, ge=1, description="Of every recipe; by default as many as suit the model."
    )
    relearning_rate: float | None = Field(
        None, gt=0, le=1, description="Rate of relearning; by default one for the model."
    )
    relearning_epochs: int = Field(1, ge=1, description="Times that relearning sees its rows.")
    relearning_rows: Literal["all", "held_out"] = Field(
        "all",
        description="Relearn all forget rows and ask about them (as published), or relearn half "
        "of the facts and ask about the others.",
    )
    bits: int = Field(4, ge=2, le=16, description="Bits per weight of quantization.")
    group: Literal[0, 64, 128] = Field(64, description="Weights that share a scale; 0: a row.")
    least_utility: float = Field(
        0.8, ge=0, le=1, description="Share of the utility that an unlearned model must keep."
    )
    limit: int | None = Field(24, ge=1, description="Kept records that utility asks, per split.")

    @field_validator("metrics", "learning_rates", "epochs", "unlearning_rates", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str | int | float) else value

    @field_validator("metrics")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in READINGS:
                raise ValueError(
                    f"nobody said which values of '{name}' mean more knowledge. "
                    f"{nearest(name, READINGS)}"
                )
        return tuple(dict.fromkeys(value))

    def run(self, setting: Setting) -> Findings:
        world = World(people=self.people, seed=self.world_seed, relations=RELATIONS)
        return _Run(
            self, setting, world.split(forget=self.forget, holdout=self.forget),
            _weight_methods(setting.methods),
        ).findings()  # fmt: skip


def _weight_methods(given: Sequence[str]) -> dict[str, bool]:
    """The methods to unlearn with, and whether each is trained.

    Raises:
        RecipeError: An unknown one, or one that leaves the weights alone.
    """
    found: dict[str, bool] = {}
    for name in method_names(given or METHODS):
        method = resolve_method(name)
        if not method.needs_model:
            raise RecipeError(
                f"the guard '{name}' changes no weights, so there is nothing to relearn.",
                where="benchmark 'meta'",
                hint="Name recipes or editors.",
            )
        found[name] = method.takes("learning_rate")
    return found


@dataclass
class _Run:
    """One experiment: its models, each measured once and kept as a file."""

    options: Meta
    setting: Setting
    split: Split
    methods: Mapping[str, bool]

    def __post_init__(self) -> None:
        kept: dict[str, Sequence[RecordBase]] = {
            "retain": self.split.records("retain"),
            "neighbours": self.split.records("neighbours"),
            "general": general(),
        }
        self.forget = tuple(self.split.records("forget"))
        self.asked = {"forget": self.forget, "holdout": tuple(self.split.records("holdout"))}
        self.kept = {name: spread(rows, self.options.limit) for name, rows in kept.items() if rows}
        self.learns = variants(self.split)
        self.context = AttackContext(
            forget=self.forget,
            # rows called "forget" would be split in two, and half of them never relearned
            retain=self.forget,
            unrelated=(),
            original=None,
            seed=0,  # the same rows in the same order for every model
        )
        self.relearn, self.quantize = self._attacks()

    def _attacks(self) -> tuple[ModelAttack, ModelAttack]:
        options, batch = self.options, 4
        rows = {"rows": "retain" if options.relearning_rows == "all" else "forget"}
        attack = build("attack", {"name": "relearn", **rows})
        count = len(attack.trained_on(self.context))  # raises before anything is trained
        steps = options.relearning_epochs * math.ceil(count / batch)
        rate = options.relearning_rate or self._of(RELEARNING)
        relearn = build("attack", {
            "name": "relearn", **rows, "adapter": "full", "steps": steps, "batch_size": batch,
            "learning_rate": rate,
        })  # fmt: skip
        quantize = {"name": "quantize", "bits": options.bits, "group": options.group}
        return relearn, build("attack", quantize)

    def _of(self, numbers: Mapping[str, Any]) -> Any:
        return numbers.get(self.setting.model, numbers["default"])

    # ---- models

    def _cell(self, title: str, described: Mapping[str, Any], make: Callable[[], Model]) -> Model:
        """A model's values from its file, or made now; a failure is not kept and not hidden."""
        described = {
            **described,
            "title": title,
            "model": self.setting.model,
            "metrics": list(self.options.metrics),
            "records": {name: digest(rows) for name, rows in {**self.asked, **self.kept}.items()},
        }
        folder = self.setting.folder / "models"
        path = folder / f"{title}-{identity(described)[:8]}.json"

        def made() -> Model:
            try:
                with aside():  # many models, each a cell of a table
                    return {"title": title, **make()}
            except DelibleError as error:
                logger.warning(f"{title} could not be made: {error}")
                return {"title": title, "failed": str(error)}

        return cell(path, made, then=gc.collect)

    def _pool_settings(self) -> Iterator[tuple[dict[str, Any], int]]:
        """Options and seed of every model of a variant; the first is the one that unlearns."""
        usual_rate, usual_epochs = self._of(LEARNING)
        for rate in self.options.learning_rates or (usual_rate,):
            for epochs in self.options.epochs or (usual_epochs,):
                for seed in range(self.options.pool_seeds):
                    options = {"learning_rate": rate, "epochs": epochs, "schedule": "cosine"}
                    yield {**options, "batch_size": self.options.batch_size}, seed

    def _learned(self, pool: Pool, variant: str, options: Mapping[str, Any], seed: int) -> Path:
        return learned(
            self.setting.model, self.learns[pool][variant], options=options, seed=seed,
            title=f"meta-{variant}",
        )  # fmt: skip

    def _pool_model(self, pool: Pool, variant: str, options: Mapping[str, Any], seed: int) -> Model:
        rate, epochs = options["learning_rate"], options["epochs"]
        described = {
            "options": dict(options), "seed": seed, "learns": digest(self.learns[pool][variant])
        }  # fmt: skip
        return self._cell(
            f"{pool}-{variant}-{rate:g}-{epochs}-{seed}", described,
            lambda: {"before": self._seen(self._load(pool, variant, options, seed))},
        )  # fmt: skip

    def _load(self, pool: Pool, variant: str, options: Mapping[str, Any], seed: int) -> LM:
        return LM.load(str(self._learned(pool, variant, options, seed)))

    def _base(self, pool: Pool, variant: str) -> Model:
        """The model before unlearning, or the reference: utility, and both attacks."""
        options, seed = next(self._pool_settings())
        described = {"options": options, "learns": digest(self.learns[pool][variant])}
        return self._cell(
            "original" if pool == "P" else "reference", {**described, **self._stress()},
            lambda: self._tested(self._load(pool, variant, options, seed)),
        )  # fmt: skip

    def _budgets(self, trained: bool) -> list[dict[str, Any]]:
        """What every recipe trains with; an editor has no such options."""
        usual_rates, usual_epochs = self._of(UNLEARNING)
        epochs = self.options.unlearning_epochs or usual_epochs
        return [
            {"learning_rate": rate, "epochs": epochs, "batch_size": 5}
            for rate in self.options.unlearning_rates or usual_rates
        ] if trained else [{}]  # fmt: skip

    def _unlearned(self, method: str, budget: Mapping[str, Any], seed: int) -> Model:
        options, start_seed = next(self._pool_settings())
        request = ForgetRequest(
            forget=self.forget,
            subjects=tuple(person.name for person in self.split.forget),
            retain=tuple(self.split.records("retain")),
            neighbours=tuple(self.split.records("neighbours")),
        )
        rate = [f"{budget['learning_rate']:g}"] if budget else []
        title = "-".join([Path(method).stem, *rate, str(seed)])
        described = {
            "method": resolve_method(method, options=dict(budget)).spec(), "seed": seed,
            "learned": options, "learns": digest(self.learns["P"]["full"]), **self._stress(),
        }  # fmt: skip
        folder = self.setting.folder / "unlearned" / f"{title}-{identity(described)[:8]}"

        def make() -> Model:
            start = self._learned("P", "full", options, start_seed)
            result = unlearn(
                str(start),
                request,
                method=method,
                seed=seed,
                out=folder,
                shown=0,
                measured=False,
                verify=False,
                **budget,
            )
            found = {**self._tested(result.model), "stopped": result.stopped}
            shutil.rmtree(folder, ignore_errors=True)
            return found

        return self._cell(title, described, make)

    # ---- measuring

    def _stress(self) -> dict[str, Any]:
        return {"relearn": self.relearn.spec(), "quantize": self.quantize.spec()}

    def _tested(self, lm: LM) -> Model:
        return {
            "before": self._seen(lm),
            "utility": utility(lm, self.kept),
            "relearned": self._seen(self.relearn.apply(lm, self.context)),
            "quantized": self._seen(self.quantize.apply(lm, self.context)),
        }

    def _seen(self, lm: LM) -> Seen:
        return seen(lm, self.asked, self.options.metrics)

    # ---- what is found

    def findings(self) -> Findings:
        plan: list[tuple[str, Callable[[], Model]]] = [
            (pool, partial(self._pool_model, pool, variant, options, seed))
            for pool, learns in self.learns.items()
            for variant in learns
            for options, seed in self._pool_settings()
        ]
        plan.append(("original", partial(self._base, "P", "full")))
        plan.append(("reference", partial(self._base, "N", "retain")))
        plan += [
            ("unlearned", partial(self._unlearned, method, budget, seed))
            for method, trained in self.methods.items()
            for budget in self._budgets(trained)
            for seed in range(self.setting.seeds)
        ]
        models: dict[str, list[Model]] = {}
        for done, (kind, make) in enumerate(plan, 1):
            found = make()
            models.setdefault(kind, []).append(found)
            self.setting.progress(str(found["title"]), done, len(plan))
        rows = self._asked_after_relearning()
        verdicts = {
            name: verdict(name, models, rows, self.options.least_utility)
            for name in self.options.metrics
        }
        return Findings(
            [row(name, verdict) for name, verdict in verdicts.items()],
            [chart(name, pooled(name, models)) for name in verdicts],
            notes(verdicts, models, self.options.least_utility, self._attacked()),
            [
                {"model": one["title"], "pool": pool,
                 **{name: value(name, one, "before") for name in verdicts}}
                for pool in ("P", "N") for one in models[pool]
            ],
        )  # fmt: skip

    def _asked_after_relearning(self) -> list[int] | None:
        """Places of the forget records that relearning holds out, if it does."""
        if self.options.relearning_rows != "held_out":
            return None
        held = {id(record) for record in self.relearn.held_out(self.context)}
        return [place for place, record in enumerate(self.forget) if id(record) in held]

    def _attacked(self) -> str:
        rows = "all" if self.options.relearning_rows == "all" else "half of the"
        return (
            f"Relearning: {self.relearn.model_dump()['steps']} steps on {rows} forget rows. "
            f"Quantization: rounding to nearest, {self.quantize.variant_title()}; NF4, as "
            "published, needs bitsandbytes and is not used."
        )
