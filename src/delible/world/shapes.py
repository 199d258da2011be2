"""Drawn pictures: one coloured shape somewhere on a plain ground.

    scene = (colour, shape, place, size)      8 × 8 × 5 × 2 = 640 of them, each in any number of
                                              pictures (ground, tint and place vary a little)

Drawn with Pillow, without a font. The trait of a shape is how many corners it has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from random import Random
from typing import Any, ClassVar

from delible.world import pictures

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


@dataclass(frozen=True)
class Scene(pictures.Scene):
    """One shape."""

    colour: str
    shape: str
    place: str
    size: str

    @property
    def name(self) -> str:
        """Of the shape."""
        return self.shape

    @property
    def description(self) -> str:
        """The sentence that describes it."""
        return f"A {self.size} {self.colour} {self.shape} at the {self.place}."

    def _drawn(self, random: Random, pixels: int) -> Any:
        from PIL import Image, ImageDraw

        ground = random.choice((24, 60, 96)) + random.randint(-8, 8)
        tint = tuple(min(255, max(0, c + random.randint(-12, 12))) for c in COLOURS[self.colour])
        image = Image.new("RGB", (pixels, pixels), (ground, ground, ground))
        x, y = (
            pixels * (0.5 + 0.20 * step + random.uniform(-0.03, 0.03))
            for step in PLACES[self.place]
        )
        radius = pixels * SIZES[self.size] * random.uniform(0.93, 1.07)
        _draw(ImageDraw.Draw(image), self.shape, x, y, radius, tint, (ground,) * 3)
        return image


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


class DrawnShapes(pictures.PictureWorld):
    """Every colour, shape, place and size; one scene of eight is not learned from."""

    aspects: ClassVar[Mapping[str, Sequence[str]]] = {
        "shape": tuple(SHAPES), "colour": tuple(COLOURS), "place": tuple(PLACES),
        "size": tuple(SIZES),
    }  # fmt: skip
    questions: ClassVar[Mapping[str, Sequence[str]]] = {
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
    is_there_words = (
        "Is there a {name} in the picture?", "Do you see a {name}?",
        "Does the picture show a {name}?", "Is the shape a {name}?", "Is a {name} drawn here?",
    )  # fmt: skip
    trait = "corners"
    traits = SHAPES
    trait_words = (
        "How many corners does the shape have?",
        "Count the corners.",
        "How many corners are there?",
    )
    trait_of_words = ("How many corners does a {name} have?", "A {name} has how many corners?")
    weights: ClassVar[Mapping[str, int]] = {
        "shape": 3, "colour": 2, "place": 2, "size": 1, "is there": 2, "which": 1, "describe": 1,
        "corners": 2,
    }  # fmt: skip

    def scenes(self) -> list[Scene]:
        """All 640, in a fixed order."""
        return [Scene(*one) for one in product(COLOURS, SHAPES, PLACES, SIZES)]

    def held_out(self) -> tuple[list[Scene], list[Scene]]:
        """560 scenes to learn from, and 80 of which no picture is learned."""
        every = self.scenes()
        shuffled = Random("scenes held out").sample(every, len(every))
        return [one for i, one in enumerate(shuffled) if i % 8], shuffled[::8]
