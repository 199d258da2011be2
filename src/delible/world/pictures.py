"""Drawn pictures with exact ground truth: one coloured shape somewhere on a plain ground.

    scene = (colour, shape, place, size)      8 × 8 × 5 × 2 = 640 of them, each in any number of
                                              pictures (ground, tint and place vary a little)

Drawn with Pillow, without a font. Questions ask for each attribute in several words, as yes or no,
as a choice, around the shape (its corners), and for a description; without a picture, what the
name of a shape says of its corners.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from random import Random
from typing import Any, Literal

from delible.errors import MissingExtraError
from delible.messages import ImagePart
from delible.records import QA

COLOURS = {
    "red": (214, 40, 40), "green": (46, 160, 67), "blue": (38, 84, 214), "yellow": (240, 214, 40),
    "purple": (140, 50, 180), "orange": (240, 130, 30), "white": (245, 245, 245),
    "pink": (245, 130, 190),
}  # fmt: skip
#: Shapes, and how many corners each has, in words.
SHAPES = {
    "circle": "none", "square": "four", "triangle": "three", "star": "ten", "cross": "twelve",
    "ring": "none", "diamond": "four", "moon": "two",
}  # fmt: skip
PLACES = {
    "left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1), "middle": (0, 0),
}  # fmt: skip
SIZES = {"large": 0.29, "small": 0.19}

Aspect = Literal["shape", "colour", "place", "size"]
ASPECTS: dict[Aspect, Mapping[str, object]] = {
    "shape": SHAPES, "colour": COLOURS, "place": PLACES, "size": SIZES,
}  # fmt: skip
#: Ways to ask for an attribute of what is shown; the first one is the usual.
QUESTIONS: dict[Aspect, tuple[str, ...]] = {
    "shape": (
        "What shape is in the picture?", "Which shape do you see?", "Name the shape.",
        "What is shown here?", "The picture shows which shape?", "What is the main object?",
    ),
    "colour": (
        "What colour is the shape?", "Which colour does it have?", "Name the colour.",
        "In which colour is it drawn?", "What is the main colour?",
    ),
    "place": (
        "Where is the shape?", "In which part of the picture is it?", "Name the place.",
        "Where in the picture do you see it?", "At which place is it drawn?",
    ),
    "size": (
        "How large is the shape?", "Is it large or small?", "Name the size.",
        "Which size does it have?", "What is the size of the object?",
    ),
}  # fmt: skip
IS_THERE = (
    "Is there a {name} in the picture?", "Do you see a {name}?", "Does the picture show a {name}?",
    "Is the shape a {name}?", "Is a {name} drawn here?",
)  # fmt: skip
WHICH = ("Which of these is it: {options}?", "Choose what is shown: {options}.")
DESCRIBE = ("Describe the picture.", "What does the picture show?", "Tell me about the picture.",
            "Say what you see.", "Give a short description.")  # fmt: skip
CORNERS = (
    "How many corners does the shape have?",
    "Count the corners.",
    "How many corners are there?",
)
CORNERS_OF = ("How many corners does a {name} have?", "A {name} has how many corners?")


@dataclass(frozen=True)
class Scene:
    """What a picture shows."""

    colour: str
    shape: str
    place: str
    size: str

    def value(self, aspect: Aspect) -> str:
        """One of its attributes."""
        return str(getattr(self, aspect))

    @property
    def description(self) -> str:
        """The sentence that describes it."""
        return f"A {self.size} {self.colour} {self.shape} at the {self.place}."

    def picture(self, seed: int = 0, pixels: int = 40) -> ImagePart:
        """A picture of it, as PNG in a data URL; another seed, another picture.

        Raises:
            MissingExtraError: Pillow is not installed.
        """
        written = io.BytesIO()
        self.drawn(seed, pixels).save(written, format="PNG")
        body = base64.b64encode(written.getvalue()).decode()
        return ImagePart.model_validate({"source": f"data:image/png;base64,{body}"})

    def drawn(self, seed: int = 0, pixels: int = 40) -> Any:
        """The picture as Pillow has it, RGB."""
        try:
            from PIL import Image, ImageDraw
        except ImportError:
            raise MissingExtraError("Drawing pictures", "vision") from None
        random = Random(f"{self}/{seed}")
        fine = 4 * pixels  # drawn larger: edges become smooth
        ground = random.choice((24, 60, 96)) + random.randint(-8, 8)
        tint = tuple(min(255, max(0, c + random.randint(-12, 12))) for c in COLOURS[self.colour])
        image = Image.new("RGB", (fine, fine), (ground, ground, ground))
        x, y = (
            fine * (0.5 + 0.20 * step + random.uniform(-0.03, 0.03)) for step in PLACES[self.place]
        )
        radius = fine * SIZES[self.size] * random.uniform(0.93, 1.07)
        _draw(ImageDraw.Draw(image), self.shape, x, y, radius, tint, (ground,) * 3)
        return image.resize((pixels, pixels), Image.Resampling.BOX)


def _draw(on: Any, shape: str, x: float, y: float, r: float, fill: Any, ground: Any) -> None:
    def ring(count: int, first: float, radii: Sequence[float]) -> list[tuple[float, float]]:
        return [
            (x + radii[i % len(radii)] * math.cos(first + 2 * math.pi * i / count),
             y + radii[i % len(radii)] * math.sin(first + 2 * math.pi * i / count))
            for i in range(count)
        ]  # fmt: skip

    up = -math.pi / 2
    if shape in ("circle", "ring", "moon"):
        on.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        if shape == "ring":
            on.ellipse((x - r / 2, y - r / 2, x + r / 2, y + r / 2), fill=ground)
        if shape == "moon":
            on.ellipse((x - r / 4, y - r, x + 7 * r / 4, y + r), fill=ground)
    elif shape == "square":
        on.rectangle((x - 0.8 * r, y - 0.8 * r, x + 0.8 * r, y + 0.8 * r), fill=fill)
    elif shape == "triangle":
        on.polygon(ring(3, up, (1.1 * r,)), fill=fill)
    elif shape == "star":
        on.polygon(ring(10, up, (1.15 * r, 0.45 * r)), fill=fill)
    elif shape == "diamond":
        on.polygon(
            [(x, y - 1.15 * r), (x + 0.7 * r, y), (x, y + 1.15 * r), (x - 0.7 * r, y)], fill=fill
        )
    else:
        on.rectangle((x - 0.3 * r, y - r, x + 0.3 * r, y + r), fill=fill)
        on.rectangle((x - r, y - 0.3 * r, x + r, y + 0.3 * r), fill=fill)


def scenes() -> list[Scene]:
    """All of them, in a fixed order."""
    return [Scene(*one) for one in product(COLOURS, SHAPES, PLACES, SIZES)]


def held_out(every: int = 8) -> tuple[list[Scene], list[Scene]]:
    """Scenes to learn from, and those of which no picture is learned: one of so many.

    Every colour, shape, place and size is in both.
    """
    shuffled = Random("scenes held out").sample(scenes(), len(scenes()))
    return [one for i, one in enumerate(shuffled) if i % every], shuffled[::every]


def _some(image: ImagePart | None) -> tuple[ImagePart, ...]:
    """The picture, if there is one: a question may be written before its picture is drawn."""
    return () if image is None else (image,)


def asked(
    scene: Scene, aspect: Aspect, image: ImagePart | None, *, subject: str | None = None
) -> QA:
    """An attribute, asked openly; its other ways of asking are paraphrases."""
    first, *others = QUESTIONS[aspect]
    values = ASPECTS[aspect]
    right = scene.value(aspect)
    return QA(
        question=first, answer=right, paraphrases=tuple(others), images=_some(image), group=aspect,
        perturbed=tuple(one for one in values if one != right), subject=subject,
    )  # fmt: skip


def is_there(image: ImagePart | None, name: str, there: bool, form: int = 0) -> QA:
    """Whether a shape is in the picture, yes or no."""
    return QA(
        question=IS_THERE[form % len(IS_THERE)].format(name=name),
        answer="yes" if there else "no", images=_some(image), group="is there",
    )  # fmt: skip


def which(scene: Scene, image: ImagePart | None, random: Random, form: int = 0) -> QA:
    """The shape among three others, by name."""
    others = random.sample([one for one in SHAPES if one != scene.shape], 3)
    options = random.sample([scene.shape, *others], 4)
    return QA(
        question=WHICH[form % len(WHICH)].format(options=", ".join(options)),
        answer=scene.shape, images=_some(image), group="which",
    )  # fmt: skip


def described(scene: Scene, image: ImagePart | None, form: int = 0) -> QA:
    """A description in one sentence."""
    return QA(
        question=DESCRIBE[form % len(DESCRIBE)], answer=scene.description, images=_some(image),
        group="describe",
    )  # fmt: skip


def corners(scene: Scene, image: ImagePart | None, form: int = 0) -> QA:
    """What gives the shape away without its name."""
    return QA(
        question=CORNERS[form % len(CORNERS)], answer=SHAPES[scene.shape], images=_some(image),
        group="corners",
    )  # fmt: skip


def corners_of(name: str, form: int = 0) -> QA:
    """The same, of a name alone: no picture."""
    return QA(
        question=CORNERS_OF[form % len(CORNERS_OF)].format(name=name), answer=SHAPES[name],
        group="text alone",
    )  # fmt: skip


def any_question(scene: Scene, image: ImagePart | None, random: Random) -> QA:
    """One question about a picture, of any kind, in any words."""
    kind = random.choices(
        ("shape", "colour", "place", "size", "is there", "which", "describe", "corners"),
        weights=(3, 2, 2, 1, 2, 1, 1, 2),
    )[0]  # fmt: skip
    form = random.randrange(60)
    if kind == "is there":
        there = random.random() < 0.5
        other = random.choice([one for one in SHAPES if one != scene.shape])
        return is_there(image, scene.shape if there else other, there, form)
    if kind == "which":
        return which(scene, image, random, form)
    if kind == "describe":
        return described(scene, image, form)
    if kind == "corners":
        return corners(scene, image, form)
    found = asked(scene, kind, image)  # type: ignore[arg-type]
    words = (found.question, *found.paraphrases)
    return found.model_copy(update={"question": words[form % len(words)], "paraphrases": ()})


def with_shape(shape: str, among: Iterable[Scene]) -> list[Scene]:
    """The scenes of one shape."""
    return [one for one in among if one.shape == shape]
