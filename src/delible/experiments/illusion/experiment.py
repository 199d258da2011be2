"""The erasure illusion: do numbers say "forgotten" of texts that are still known in other words?

A model learns sentences about made-up people and forgets those about some of them. For each forget
text a surrogate is searched for: far from all of them for a sentence encoder, and likelier the more
a model learned of them. Every number is read on both:

    gap = forgotten(forget texts) - forgotten(surrogates),  0 = original, 1 = reference
    illusion where forgotten(forget texts) >= 0.8 and gap >= 0.2

Controls: unrelated texts that are known as well, of like length and loss; paraphrases of the forget
texts; the model that never saw the forget texts, asked about the surrogates.

Paper: arXiv 2512.19025; no code is public. Deviations: made-up people; the search and its limits
are ours (:mod:`delible.search.surrogate`, :mod:`delible.search.illusion`), and so are the seven
numbers (:mod:`delible.experiments.illusion.readings`), as the paper's could not be read. Texts that
nobody saw stand beside the unrelated ones where limits are drawn, and are the non-members.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

from pydantic import Field

from delible.api import unlearn
from delible.bench.prepare import learned
from delible.bench.table import write_parquet
from delible.component import build
from delible.errors import DataError, RecipeError
from delible.experiments.illusion.findings import (
    ORIGINAL,
    RETRAINED,
    UNSEEN,
    Cell,
    findings,
    rows_of,
)
from delible.experiments.illusion.making import (
    Effort,
    by_tuned_model,
    by_writer,
    surrogate,
)
from delible.experiments.illusion.readings import COMPLETE, Item, halves, values
from delible.experiments.illusion.sets import Texts, sets
from delible.lm.encoder import sentence_encoder
from delible.lm.lm import LM
from delible.measure.benchmark import Benchmark, Experiment, Findings, Setting
from delible.measure.starting import roles_of
from delible.method import Method
from delible.records import QA, ForgetRequest, Passage, RecordBase
from delible.registry import register
from delible.resolving import resolve_method
from delible.search.illusion import limits
from delible.search.surrogate import Judge
from delible.system.role import Role
from delible.train.randomness import generator
from delible.world import World
from delible.world.split import Split

METHODS = ("gradient_ascent", "npo", "simnpo")
#: One fact of each kind per person, none of which is a person.
RELATIONS = ("birthplace", "occupation", "employer", "award", "instrument", "residence", "hobby")
#: Of the search, by model: candidates, steps, substitutions per step.
TRIES = {"tiny": (8, 3, 16), "default": (8, 20, 64)}
#: Light fine-tuning on the forget texts: learning rate and epochs.
LIGHT = {"tiny": (1e-3, 3), "default": (1e-4, 3)}


@register(
    kind="benchmark",
    name="illusion",
    title="The erasure illusion",
    summary="Finds numbers that say 'forgotten' of what is still known in other words.",
    paper="2512.19025",
    year=2025,
    family="fictional",
    needs=("forget", "retain", "weights"),
    capability="weights",
    misleads="A surrogate that the retrained model knows too need not be forgotten: read its row. "
    "Single tokens are replaced, so surrogates read badly: look at them. Where two ends of a scale "
    "are alike nothing is said. An exact-data request (privacy) asks for no more than the texts.",
    badges=("variant",),
    variant="Made-up people; search terms, limits and numbers are ours where the paper's are not "
    "known.",
)
class ErasureIllusion(Experiment):
    """Every method on forget texts, surrogates and controls."""

    casts: ClassVar[bool] = True

    people: int = Field(16, ge=6, description="People in the world.")
    forget: int = Field(2, ge=1, description="People to forget.")
    texts: int = Field(100, ge=2, description="Forget texts that are rewritten at most.")
    rounds: int = Field(3, ge=0, description="Rounds of rewriting; 0: the forget texts themselves.")
    candidates: int | None = Field(
        None, ge=1, description="Rewritten sentences per round; none: by the model."
    )
    steps: int | None = Field(
        None, ge=0, description="Of the token search per round; none: by the model."
    )
    batch: int | None = Field(
        None, ge=1, description="Substitutions per step; none: by the model."
    )  # fmt: skip
    top_k: int = Field(64, ge=1, description="Tokens that are tried per place.")
    epochs: int | None = Field(
        None, ge=1, description="Of learning the sentences; none: by the model. What is known by "
        "heart gains nothing from light fine-tuning.",
    )  # fmt: skip
    light_rate: float | None = Field(
        None, gt=0, description="Of light fine-tuning on the forget texts; none: by the model."
    )
    light_epochs: int | None = Field(None, ge=1, description="Of it; none: by the model.")
    most_loss: float = Field(
        1.25, gt=0, description="Loss of a surrogate by the original, as a multiple of the mean "
        "loss of texts that nobody saw.",
    )  # fmt: skip
    reference: Literal["retrained", "unseen"] = Field(
        "retrained", description="What counts as 1: the model that never saw the forget texts, or "
        "what the original says of texts that nobody saw.",
    )  # fmt: skip
    learning_rate: float | None = Field(
        None, gt=0, description="Of unlearning; none: the recipe's own (tiny models: 2e-4)."
    )
    max_steps: int | None = Field(
        None, ge=1, description="Of unlearning; none: the recipe's own (tiny models: 20)."
    )
    max_new_tokens: int = Field(24, ge=1, description="Longest continuation in tokens.")
    world_seed: int = Field(0, ge=0, description="Seed of the world.")

    # ---- who and what

    def split(self) -> Split:
        """Who is forgotten, kept, never seen.

        Raises:
            RecipeError: Too few would be kept.
        """
        unseen = max(2, self.people // 5)
        if self.people - self.forget - unseen < self.forget + 2:
            raise RecipeError(
                f"{self.people} people, {self.forget} to forget and {unseen} whom nobody saw leave "
                "too few unrelated ones.",
                where="benchmark 'illusion'",
                hint="Give more people, or forget fewer.",
            )
        return self._world().split(forget=self.forget, holdout=unseen)

    def _world(self) -> World:
        return World(
            people=self.people, seed=self.world_seed, relations=RELATIONS, answers="sentence"
        )

    def sentences(self, split: Split) -> Texts:
        """The forget texts (so many at most), their paraphrases, kept and unseen ones."""
        rows = split.qa("forget")[: self.texts]
        return Texts(
            {one.answer: one.subject or "" for one in rows},
            [one.paraphrased_answers[0] for one in rows],
            [one.answer for one in split.qa("retain")],
            [one.answer for one in split.qa("holdout")],
        )

    def method(self, name: str, model: str) -> Method:
        """A method with the experiment's options where it trains.

        Raises:
            RecipeError: Unknown, or one that leaves the weights alone.
        """
        chosen = resolve_method(name)
        if not chosen.needs_model:
            raise RecipeError(
                f"'{name}' changes no weights, and half of the numbers need scores.",
                where="benchmark 'illusion'",
                hint="Name recipes or editors.",
            )
        rate, most = (2e-4, 20) if model == "tiny" else (None, None)
        given = {
            "training.learning_rate": self.learning_rate or rate,
            "training.max_steps": self.max_steps or most,
        }
        return chosen.with_options(
            {key: value for key, value in given.items() if value and chosen.takes(key)}
        )

    def effort(self, model: str) -> Effort:
        """How much is tried for one text."""
        candidates, steps, batch = TRIES.get(model, TRIES["default"])
        return Effort(
            self.rounds, self.candidates or candidates,
            steps if self.steps is None else self.steps, self.batch or batch, self.top_k,
        )  # fmt: skip

    # ---- the run

    def run(self, setting: Setting) -> Findings:
        split = self.split()
        texts = self.sentences(split)
        names = tuple(dict.fromkeys(setting.methods or METHODS))
        methods = {Path(name).stem: self.method(name, setting.model) for name in names}
        roles = roles_of(setting.roles)
        writer = roles.role("writer") if roles.given("writer") else None
        request = ForgetRequest(
            forget=tuple(cast("list[Passage]", split.records("forget", "passage"))),
            subjects=tuple(person.name for person in split.forget),
            retain=tuple(cast("list[Passage]", split.records("retain", "passage"))),
            neighbours=tuple(cast("list[Passage]", split.records("neighbours", "passage"))),
        )
        total = 6 + len(texts.forget) * bool(self.rounds) + setting.seeds * len(methods)
        done = 0

        def step(what: str) -> None:
            nonlocal done
            setting.progress(what, done, total)
            done += 1

        step("learning the sentences")
        target = self._learned(setting, split, "known", "target")
        step("learning without the forget texts")
        retrained = self._learned(setting, split, "kept", "reference")
        step("light fine-tuning on the forget texts")
        tuned = self._tuned(setting, target, request)
        who = {"writer": roles.named().get("writer")} if writer else {}
        made = self._texts(setting, texts, target, tuned, writer, who, step)
        models = {}
        for name, folder in ((ORIGINAL, target), (RETRAINED, retrained)):
            step(name)
            models[name] = self.kept(
                setting, name, {"items": made["items"]},
                lambda at=folder: self.read(LM.load(str(at)), made),
            )  # fmt: skip
        found: dict[str, list[Cell]] = {name: [] for name in methods}
        for seed in range(setting.seeds):
            for name, method in methods.items():
                step(f"{name}, seed {seed}")
                found[name].append(self.kept(
                    setting, f"{name}-{seed}",
                    {"method": method.spec(), "seed": seed, "items": made["items"]},
                    lambda m=method, s=seed: self._unlearned(m, s, target, request, made),
                ))  # fmt: skip
        setting.progress("done", total, total)
        result = findings(made, models, found, self.reference)
        write_parquet(setting.folder / "illusion.parquet", rows_of(result.runs))
        return result

    def _learned(
        self, setting: Setting, split: Split, part: Literal["known", "kept"], title: str
    ) -> Path:
        learning = cast(Benchmark, build("benchmark", "world")).learning(setting.model)
        return learned(
            setting.model, cast("list[Passage]", split.records(part, "passage")),
            options={**learning.options, **({"epochs": self.epochs} if self.epochs else {})},
            slots=learning.slots, title=title,
        )  # fmt: skip

    def _tuned(self, setting: Setting, target: Path, request: ForgetRequest) -> Path:
        rate, epochs = LIGHT.get(setting.model, LIGHT["default"])
        return learned(
            str(target), request.forget, title="tuned-on-the-forget-texts",
            options={"learning_rate": self.light_rate or rate,
                     "epochs": self.light_epochs or epochs, "batch_size": 4},
            slots={"place": {"name": "lora", "rank": 8, "alpha": 16.0}, "finish": "merge_adapter"},
        )  # fmt: skip

    def _unlearned(
        self, method: Method, seed: int, target: Path, request: ForgetRequest, made: Cell
    ) -> Mapping[str, Any]:
        def unlearned(asked: ForgetRequest) -> LM:
            start = LM.load(str(target))
            return unlearn(start, asked, method=method, seed=seed, shown=0, measured=False).model

        try:
            lm, asked = unlearned(request), False
        except DataError:  # a method that teaches what to say needs questions
            questions = request.model_copy(
                update={"forget": tuple(as_question(one) for one in request.forget)}
            )
            lm, asked = unlearned(questions), True
        return {**self.read(lm, made), "as questions": asked}

    def read(self, lm: LM, made: Cell) -> Mapping[str, Any]:
        """The seven numbers of a model, by set."""
        encoder, unseen = sentence_encoder(), made["sets"][UNSEEN]
        return {
            name: values(lm, [Item.read(one) for one in row], unseen, encoder, self.max_new_tokens)
            for name, row in made["items"].items()
        }

    # ---- the surrogates

    def _texts(
        self,
        setting: Setting,
        texts: Texts,
        target: Path,
        tuned: Path,
        writer: Role | None,
        who: Mapping[str, Any],
        step: Any,
    ) -> Cell:
        """All sets, each text as it is asked about, and what the search says of them.

        Raises:
            DataError: No surrogate keeps to all limits.
        """
        lms: list[LM] = []

        def judge() -> Judge:
            if not lms:
                lms.extend(LM.load(str(folder)) for folder in (target, tuned))
            return Judge(lms[0], lms[1], sentence_encoder(), tuple(texts.forget))

        rewritten = []
        for place, (text, subject) in enumerate(texts.forget.items() if self.rounds else ()):
            step(f"surrogate {place + 1} of {len(texts.forget)}")
            cell = self.kept(
                setting, f"text-{place}", {"text": text, "folder": tuned.parent.name, **who},
                lambda t=text, s=subject, at=place: self.surrogate(
                    judge(), texts, t, s, at, setting, writer
                ),
            )  # fmt: skip
            rewritten.append(cell)
        step("surrogates and controls")
        described = {"rewritten": rewritten, "folder": tuned.parent.name, **who}
        found = self.kept(
            setting, "texts", described,
            lambda: sets(
                judge(), texts, [one["text"] for one in rewritten if "failed" not in one], writer,
                most_loss=self.most_loss if self.rounds else None,
            ),
        )  # fmt: skip
        if "failed" in found:
            raise DataError(found["failed"], where="benchmark 'illusion'")
        return found

    def surrogate(
        self,
        judge: Judge,
        texts: Texts,
        text: str,
        subject: str,
        place: int,
        setting: Setting,
        writer: Role | None,
    ) -> Mapping[str, Any]:
        """One forget text, rewritten; with the distances that it was taken at."""
        others = judge([*texts.kept, *texts.unseen])
        made = surrogate(
            judge, text, subject, by_writer(writer) if writer else by_tuned_model(judge.tuned),
            least_gain=limits(others, 0.0).gain, effort=self.effort(setting.model),
            random=generator(self.world_seed, "illusion", place), seed=place,
        )  # fmt: skip
        return {"text": made.text, "distances": list(made.distances)}


def as_question(record: RecordBase) -> QA:
    """A sentence as a question for its second half."""
    assert isinstance(record, Passage)
    head, rest = halves(record.text)
    return QA(
        question=COMPLETE.format(head=head), answer=rest, subject=record.subject,
        group=record.group,
    )  # fmt: skip
