"""Forgetting a concept in pictures: SAUCE, a gradient method on the language side, and nothing.

A model that sees is asked about pictures of scenes that it never learned, drawn shapes or emoji:
what it is (the concept, its neighbours, and others), every other aspect (such as its colour), and
around it: is there one, which of four, describe, a trait (how many corners, which kind of thing).
Then it forgets one concept: by SAUCE, whose number of latents and factor are chosen on other
pictures (most forgotten with at most 2 points of everything else lost); by a recipe on image
questions; and by SAUCE for two concepts at once.

Paper of SAUCE: arXiv 2503.14530. Its models and sets are others; the check on a toy model is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, cast

import torch
from pydantic import Field

from delible.api import unlearn
from delible.component import build
from delible.errors import RecipeError, nearest
from delible.experiments.vision.exam import (
    Questions,
    Shown,
    accuracies,
    exam,
    kept,
    pictures_of,
)
from delible.experiments.vision.findings import findings, two
from delible.intervene.base import Fitted
from delible.intervene.picture_states import eyes, picture_states
from delible.intervene.sae import SAE
from delible.intervene.sae_training import silent_share
from delible.intervene.system import intervened
from delible.lm.lm import LM
from delible.lm.tiny_vlm import MODELS
from delible.measure.benchmark import Experiment, Findings, Setting
from delible.records import QA, ForgetRequest
from delible.registry import register
from delible.resolving import recipe_named
from delible.train.recipe import Recipe
from delible.world.picture_worlds import PICTURE_WORLDS, WorldName
from delible.world.pictures import PictureWorld

METHODS = ("npo",)
#: What is forgotten, and what with it, unless something else is asked for.
CONCEPTS: dict[WorldName, tuple[str, str]] = {"shapes": ("star", "ring"), "emoji": ("cat", "dog")}
#: What everything else may lose on the pictures by which latents and factor are chosen.
DROP = 0.02


@register(
    kind="benchmark",
    name="vision",
    title="A concept in pictures",
    summary="Forgets a shape or a thing that a model sees, by its tower or by its language model.",
    paper="2503.14530",
    year=2025,
    family="fictional",
    needs=("forget", "retain", "pictures", "weights"),
    capability="generate",
    misleads="A model that says another name with confidence scores as one that forgot. What a "
    "hook turns down comes back with the weights alone; what is known of the name without a "
    "picture is untouched by it. Eight drawn shapes are no photographs, nor is one emoji a thing.",
    badges=("variant",),
    variant="Shapes or emoji and a model of a million weights instead of photographs and LLaVA.",
)
class VisionForgetting(Experiment):
    """The model before, SAUCE on one and on two concepts, and every method."""

    world: WorldName = Field(
        "shapes", description="What the pictures show; the model 'tiny-vlm-emoji' learned emoji."
    )
    concept: str | None = Field(
        None, description="The shape or thing that is forgotten; none: the star, or the cat."
    )
    second: str | None = Field(
        None, description="What is forgotten with it, in a run more; none: the ring, or the dog."
    )
    pictures: int = Field(100, ge=8, description="Pictures with the concept that are learned from.")
    without: int = Field(400, ge=8, description="Pictures without it.")
    unlabelled: int = Field(2000, ge=0, description="Further pictures for the autoencoder.")
    each: int = Field(1, ge=1, description="Pictures of every scene that is asked about.")
    more: int = Field(4, ge=0, description="Further pictures of scenes with one of the two.")
    tried: int = Field(96, ge=16, description="Pictures by which latents and factor are chosen.")
    features: tuple[int, ...] = Field((8, 16, 32), description="Latents to choose from.")
    factors: tuple[float, ...] = Field((0.0, -1.0, -2.0), description="Factors, likewise.")
    active: int = Field(16, ge=1, description="Latents of the autoencoder that speak at once.")
    passes: int = Field(8, ge=1, description="How often the autoencoder sees each state.")
    most_frequent: float = Field(0.1, gt=0, le=1, description="See method 'sauce'.")
    learning_rate: float | None = Field(
        None, gt=0, description="Of recipes; none: 3e-4 (tiny-vlm, tiny-vlm-emoji), or their own."
    )

    def run(self, setting: Setting) -> Findings:
        noun, names = self.scenery.noun, self.scenery.names
        for name in self.both:
            if name not in names:
                raise RecipeError(f"there is no {noun} '{name}'.", hint=nearest(name, names))
        concept, second = self.both
        if concept == second:
            raise RecipeError(f"the two {noun}s are the same.", where="benchmark 'vision'")
        self.scenery.check()
        methods = {name: self.recipe(name, setting.model) for name in setting.methods or METHODS}
        eyes(LM.load(setting.model), "benchmark 'vision'")
        plan: list[tuple[str, str, Any]] = [
            ("as it was", "before", lambda: self._plain(setting)),
            ("sauce", "sauce", lambda: self._sauce(setting, (concept,))),
            (two(self.scenery), "sauce-2", lambda: self._sauce(setting, self.both)),
            *((name, f"{Path(name).stem}-{seed}",
               lambda r=recipe, s=seed: self._recipe(setting, r, s))
              for name, recipe in methods.items() for seed in range(setting.seeds)),
        ]  # fmt: skip
        found: dict[str, list[dict[str, Any]]] = {}
        for done, (title, name, work) in enumerate(plan):
            setting.progress(title, done, len(plan))
            recipe = methods.get(title)
            described = {"recipe": recipe.spec()} if recipe is not None else {}
            cell = self.kept(setting, name, {"of": name, **described}, work)
            found.setdefault(title, []).append(cell)
        setting.progress("done", len(plan), len(plan))
        return findings(found, self.scenery, *self.both)

    @property
    def scenery(self) -> PictureWorld:
        """The world of the pictures."""
        return PICTURE_WORLDS[self.world]

    @property
    def both(self) -> tuple[str, str]:
        """What is forgotten, and what is forgotten with it."""
        concept, second = CONCEPTS[self.world]
        return self.concept or concept, self.second or second

    def recipe(self, name: str, model: str) -> Recipe:
        """The recipe at a rate that suits the model.

        Raises:
            RecipeError: Unknown, or no recipe.
        """
        taught_here = {name for name, *_ in MODELS.values()}
        rate = self.learning_rate or (3e-4 if model in taught_here else None)
        options: dict[str, Any] = {"training.stop_at_forget_share": 0.02}
        if rate is not None:
            options["training.learning_rate"] = rate
        return recipe_named(name, "it is no baseline here").changed({}, options)

    # ---- data

    def asked(self) -> list[Shown]:
        """Pictures of scenes that nobody learned."""
        unseen = self.scenery.held_out()[1]
        named = [one for one in unseen if one.name in self.both]
        return [
            *pictures_of(unseen, self.each, 900_000),
            *pictures_of(named, self.more, 950_000),
        ]

    def request(self, concepts: tuple[str, ...]) -> ForgetRequest:
        """Pictures of learned scenes, with the concepts and without, and questions about them."""
        random, world = Random(f"vision request/{concepts}"), self.scenery
        learned = world.held_out()[0]
        forget, retain = list[QA](), list[QA]()
        for name in concepts:
            mine = [one for one in learned if one.name == name]
            for number in range(self.pictures):
                scene = mine[number % len(mine)]
                image = scene.picture(100_000 + number)
                one = world.asked(scene, world.noun, image, subject=name)
                words = (one.question, *one.paraphrases)
                forget.append(one.model_copy(update={"question": words[number % len(words)]}))
        others = [one for one in learned if one.name not in concepts]
        for number in range(self.without):
            scene = random.choice(others)
            image = scene.picture(200_000 + number)
            retain.append(world.any_question(scene, image, random))
        return ForgetRequest(forget=tuple(forget), retain=tuple(retain))

    # ---- cells

    def _plain(self, setting: Setting) -> dict[str, Any]:
        lm = LM.load(setting.model)
        return {
            "accuracies": self._examined(lm), "second": self._second(lm),
            "without": self._examined(lm, self.both),
        }  # fmt: skip

    def _examined(self, lm: LM, forgotten: tuple[str, ...] = ()) -> dict[str, float]:
        """Accuracies; another concept that was forgotten too is no neighbour."""
        concept, _ = self.both
        gone = [one for one in forgotten if one != concept]
        shown = [one for one in self.asked() if one.scene.name not in gone]
        return accuracies(lm, exam(self.scenery, shown, concept, 0))

    def _second(self, lm: LM) -> float:
        """Accuracy on the second concept."""
        asked = exam(self.scenery, self.asked(), self.both[1], 0)
        return accuracies(lm, {"concept": asked["concept"]})["concept"]

    def _recipe(self, setting: Setting, recipe: Recipe, seed: int) -> dict[str, Any]:
        lm = LM.load(setting.model)
        request = self.request(self.both[:1])
        result = unlearn(lm, request, method=recipe, seed=seed, shown=0, measured=False)
        return {
            "accuracies": self._examined(result.model),
            "stopped": result.stopped,
            "steps": result.notes.get("steps"),
        }

    def _sauce(self, setting: Setting, concepts: tuple[str, ...]) -> dict[str, Any]:
        lm = LM.load(setting.model)
        request, folder = self.request(concepts), self._unlabelled(setting)
        questions = {one: self._validation(one, concepts) for one in concepts}
        before = {one: accuracies(lm, asked) for one, asked in questions.items()}
        tries: list[dict[str, Any]] = []
        best: tuple[tuple[float, float], Fitted] | None = None
        for count in self.features:
            for factor in self.factors:
                options = {
                    "name": "sauce", "features": count, "factor": factor, "active": self.active,
                    "passes": self.passes, "pictures": folder,
                    "most_frequent": self.most_frequent,
                }  # fmt: skip
                fitted = build("intervention", options).fit(lm, request)
                found = intervened(lm, [fitted])
                after = {one: accuracies(found, asked) for one, asked in questions.items()}
                value = _weighed(before, after, kept(self.scenery))
                tries.append({"features": count, "factor": factor, **value})
                # a forgetting that costs too much counts after all that cost less
                within = float(value["lost"] <= DROP)
                rank = (within, -value["concept"] if within else -value["lost"])
                if best is None or rank > best[0]:
                    best = rank, fitted
        assert best is not None
        found = intervened(lm, [best[1]])
        chosen = cast(Any, best[1].intervention)
        return {
            "accuracies": self._examined(found, concepts),
            "second": self._second(found),
            "off": self._examined(found.taken_off()[1]),
            "chosen": {"features": chosen.features, "factor": chosen.factor,
                       "layer": chosen.layer},
            "tries": tries,
            **self._quality(best[1], lm),
        }  # fmt: skip

    def _validation(self, concept: str, concepts: tuple[str, ...]) -> Questions:
        """Questions about other pictures, with a concept and without any."""
        random = Random(f"vision validation/{concept}")
        learned = self.scenery.held_out()[0]
        mine = [one for one in learned if one.name == concept]
        others = [one for one in learned if one.name not in concepts]
        half = self.tried // 2
        drawn = [*random.choices(mine, k=half), *random.choices(others, k=half)]
        shown = [
            Shown(scene, scene.picture(300_000 + number)) for number, scene in enumerate(drawn)
        ]
        kinds = ("concept", "neighbours", "others", *self.scenery.aspects)
        asked = exam(self.scenery, shown, concept, 0)
        return {kind: part for kind, part in asked.items() if kind in kinds}

    def _unlabelled(self, setting: Setting) -> Path | None:
        """A folder of further pictures, of all learned scenes."""
        if not self.unlabelled:
            return None
        folder = setting.folder / f"{self.world}-{self.unlabelled}"
        folder.mkdir(parents=True, exist_ok=True)
        random, every = Random("vision unlabelled"), self.scenery.held_out()[0]
        for number in range(self.unlabelled):
            scene = random.choice(every)
            path = folder / f"{number:06d}.png"
            if not path.exists():
                path.write_bytes(scene.picture(400_000 + number).content())
        return folder

    def _quality(self, fitted: Fitted, lm: LM) -> dict[str, float]:
        """How well the autoencoder does on the pictures that are asked about."""
        tensors = {
            name.removeprefix("sae."): one
            for name, one in fitted.tensors.items()
            if name.startswith("sae.")
        }
        sae, before = SAE.of(tensors), int(fitted.tensors["before"])
        images = [one.image for one in self.asked()]
        read = picture_states(lm, images, fitted.intervention.sites[0])
        states = torch.cat([one[before:] for _, found in read for one in found.values()])
        return {"unexplained": sae.unexplained(states), "silent": silent_share(sae, states)}


def _weighed(
    before: Mapping[str, Mapping[str, float]],
    after: Mapping[str, Mapping[str, float]],
    kinds: Sequence[str],
) -> dict[str, float]:
    """Highest accuracy on a concept, and the largest loss on what must stay."""
    lost = [
        before[concept][kind] - values[kind]
        for concept, values in after.items()
        for kind in kinds
        if kind in values
    ]
    return {"concept": max(one["concept"] for one in after.values()), "lost": max(lost)}
