"""Worlds of pictures with exact ground truth: what a picture shows, and what is asked about it.

A world has scenes, each of which has any number of pictures. What is asked: each aspect of a scene
in several words, whether something is there, which of four it is, a description, and a trait that
follows from the name of what is shown; without a picture, the trait of a name alone.
"""

from __future__ import annotations

import base64
import io
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any, ClassVar

from delible.errors import MissingExtraError
from delible.messages import ImagePart
from delible.records import QA


def needs_pillow(what: str) -> None:
    """Refuses what no picture can be drawn or opened for.

    Raises:
        MissingExtraError: Pillow is not installed.
    """
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise MissingExtraError(what, "vision") from None


class Scene(ABC):
    """What a picture shows. Two are equal if all they show is; their text decides the pictures."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Of the one thing in it."""

    @property
    @abstractmethod
    def description(self) -> str:
        """The sentence that describes it."""

    @abstractmethod
    def _drawn(self, random: Random, pixels: int) -> Any:
        """A picture of it, as Pillow has it, RGB."""

    def value(self, aspect: str) -> str:
        """One of its aspects."""
        return str(getattr(self, aspect))

    def drawn(self, seed: int = 0, pixels: int = 40) -> Any:
        """A picture of it, as Pillow has it, RGB; another seed, another picture.

        Raises:
            MissingExtraError: Pillow is not installed.
            DelibleError: What it is drawn from is missing.
        """
        needs_pillow("Drawing pictures")
        from PIL import Image

        # drawn larger: edges become smooth
        large = self._drawn(Random(f"{self}/{seed}"), 4 * pixels)
        return large.resize((pixels, pixels), Image.Resampling.BOX)

    def picture(self, seed: int = 0, pixels: int = 40) -> ImagePart:
        """The same as PNG in a data URL.

        Raises:
            MissingExtraError: Pillow is not installed.
            DelibleError: What it is drawn from is missing.
        """
        written = io.BytesIO()
        self.drawn(seed, pixels).save(written, format="PNG")
        body = base64.b64encode(written.getvalue()).decode()
        return ImagePart.model_validate({"source": f"data:image/png;base64,{body}"})


class PictureWorld(ABC):
    """Scenes, and what is asked about them.

    Attributes:
        aspects: What every scene has, and the values of each; the first one is its name.
        questions: Ways to ask for an aspect of what is shown; the first one is the usual.
        is_there_words: Ways to ask whether something is there.
        trait: What follows from the name, and gives it away.
        traits: Its value for each name.
        trait_words: Ways to ask for the trait of what is shown.
        trait_of_words: Ways to ask for it by name, without a picture.
        weights: How often each kind of question is asked.
    """

    aspects: ClassVar[Mapping[str, Sequence[str]]]
    questions: ClassVar[Mapping[str, Sequence[str]]]
    is_there_words: ClassVar[Sequence[str]]
    which_words: ClassVar[Sequence[str]] = (
        "Which of these is it: {options}?",
        "Choose what is shown: {options}.",
    )
    describe_words: ClassVar[Sequence[str]] = (
        "Describe the picture.", "What does the picture show?", "Tell me about the picture.",
        "Say what you see.", "Give a short description.",
    )  # fmt: skip
    trait: ClassVar[str]
    traits: ClassVar[Mapping[str, str]]
    trait_words: ClassVar[Sequence[str]]
    trait_of_words: ClassVar[Sequence[str]]
    weights: ClassVar[Mapping[str, int]]

    @abstractmethod
    def scenes(self) -> Sequence[Scene]:
        """All of them, in a fixed order."""

    @abstractmethod
    def held_out(self) -> tuple[Sequence[Scene], Sequence[Scene]]:
        """Scenes to learn from, and those of which no picture is learned.

        Every value of every aspect is in both.
        """

    def check(self) -> None:
        """Refuses where its pictures cannot be drawn.

        Raises:
            MissingExtraError: Pillow is not installed.
            DelibleError: What they are drawn from is missing.
        """
        needs_pillow("Drawing pictures")

    @property
    def noun(self) -> str:
        """What its names are names of: the first aspect."""
        return next(iter(self.aspects))

    @property
    def names(self) -> Sequence[str]:
        """Of all that its scenes show."""
        return self.aspects[self.noun]

    def neighbours(self, name: str) -> Sequence[str]:
        """The other names, or those that are most like it."""
        return [one for one in self.names if one != name]

    # ---- questions

    def asked(
        self, scene: Scene, aspect: str, image: ImagePart | None, *, subject: str | None = None
    ) -> QA:
        """An aspect, asked openly; its other ways of asking are paraphrases."""
        first, *others = self.questions[aspect]
        right = scene.value(aspect)
        return QA(
            question=first, answer=right, paraphrases=tuple(others), images=_some(image),
            group=aspect, perturbed=tuple(one for one in self.aspects[aspect] if one != right),
            subject=subject,
        )  # fmt: skip

    def is_there(self, image: ImagePart | None, name: str, there: bool, form: int = 0) -> QA:
        """Whether something is in the picture, yes or no."""
        return QA(
            question=_form(self.is_there_words, form).format(name=name),
            answer="yes" if there else "no", images=_some(image), group="is there",
        )  # fmt: skip

    def which(self, scene: Scene, image: ImagePart | None, random: Random, form: int = 0) -> QA:
        """What is shown among three others, by name."""
        others = random.sample([one for one in self.names if one != scene.name], 3)
        options = random.sample([scene.name, *others], 4)
        return QA(
            question=_form(self.which_words, form).format(options=", ".join(options)),
            answer=scene.name, images=_some(image), group="which",
        )  # fmt: skip

    def described(self, scene: Scene, image: ImagePart | None, form: int = 0) -> QA:
        """A description in one sentence."""
        return QA(
            question=_form(self.describe_words, form), answer=scene.description,
            images=_some(image), group="describe",
        )  # fmt: skip

    def trait_shown(self, scene: Scene, image: ImagePart | None, form: int = 0) -> QA:
        """What gives a thing away without its name."""
        return QA(
            question=_form(self.trait_words, form), answer=self.traits[scene.name],
            images=_some(image), group=self.trait,
        )  # fmt: skip

    def trait_of(self, name: str, form: int = 0) -> QA:
        """The same, of a name alone: no picture."""
        return QA(
            question=_form(self.trait_of_words, form).format(name=name), answer=self.traits[name],
            group="text alone",
        )  # fmt: skip

    def any_question(self, scene: Scene, image: ImagePart | None, random: Random) -> QA:
        """One question about a picture, of any kind, in any words."""
        kind = random.choices(list(self.weights), weights=list(self.weights.values()))[0]
        form = random.randrange(60)
        if kind == "is there":
            there = random.random() < 0.5
            other = random.choice([one for one in self.names if one != scene.name])
            return self.is_there(image, scene.name if there else other, there, form)
        if kind == "which":
            return self.which(scene, image, random, form)
        if kind == "describe":
            return self.described(scene, image, form)
        if kind == self.trait:
            return self.trait_shown(scene, image, form)
        found = self.asked(scene, kind, image)
        words = (found.question, *found.paraphrases)
        return found.model_copy(update={"question": _form(words, form), "paraphrases": ()})


def _some(image: ImagePart | None) -> tuple[ImagePart, ...]:
    """The picture, if there is one: a question may be written before its picture is drawn."""
    return () if image is None else (image,)


def _form(words: Sequence[str], form: int) -> str:
    return words[form % len(words)]
