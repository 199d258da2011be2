"""Named pictures: one emoji on a plain ground.

    scene = (thing, ground, size)      36 × 8 × 2 = 576 of them, each in any number of pictures
                                       (place and tint vary a little, and so does the size)

Names are those of Unicode. Pillow draws the bitmaps of a colour font, Noto Color Emoji, that is on
the machine; nothing of it is shipped. The trait of a thing is its kind.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from random import Random
from typing import Any, ClassVar

from delible.errors import DelibleError
from delible.world import pictures

#: Things by their kind. "a" fits before each: all begin with a consonant and can be counted.
KINDS = {
    "animal": ("cat", "dog", "horse", "pig", "rabbit", "turtle"),
    "fruit": ("banana", "lemon", "peach", "pear", "pineapple", "strawberry"),
    "vehicle": ("bicycle", "bus", "rocket", "sailboat", "taxi", "tractor"),
    "food": ("cookie", "croissant", "doughnut", "hamburger", "pretzel", "taco"),
    "plant": ("cactus", "hibiscus", "rose", "seedling", "sunflower", "tulip"),
    "tool": ("hammer", "magnet", "microscope", "pick", "telescope", "wrench"),
}
THINGS = {thing: kind for kind, things in KINDS.items() for thing in things}
GROUNDS = {
    "white": (240, 240, 240), "grey": (120, 120, 120), "red": (200, 60, 60),
    "blue": (60, 90, 200), "green": (60, 150, 80), "yellow": (225, 205, 90),
    "purple": (130, 70, 170), "black": (20, 20, 20),
}  # fmt: skip
#: Widths, as parts of the picture's.
SIZES = {"large": (0.74, 0.86), "small": (0.48, 0.58)}

#: Names the file of the font, where it is in none of the usual places.
VARIABLE = "DELIBLE_EMOJI_FONT"
PLACES = tuple(
    Path(folder, "NotoColorEmoji.ttf")
    for folder in (
        "/usr/share/fonts/truetype/noto", "/usr/share/fonts/noto",
        "/usr/share/fonts/google-noto-emoji", "~/.local/share/fonts", "~/.fonts",
    )
)  # fmt: skip
#: The one size in which the font has bitmaps.
BITMAPS = 109


@dataclass(frozen=True)
class Scene(pictures.Scene):
    """One thing."""

    thing: str
    ground: str
    size: str

    @property
    def name(self) -> str:
        """Of the thing."""
        return self.thing

    @property
    def description(self) -> str:
        """The sentence that describes it."""
        return f"A {self.size} {self.thing} on a {self.ground} ground."

    def _drawn(self, random: Random, pixels: int) -> Any:
        from PIL import Image, ImageChops

        def tinted(value: int) -> int:
            return min(255, max(0, value + random.randint(-12, 12)))

        image = Image.new("RGB", (pixels, pixels), tuple(map(tinted, GROUNDS[self.ground])))
        glyph = _glyph(str(font_file()), unicodedata.lookup(self.thing.upper()))
        scale = pixels * random.uniform(*SIZES[self.size]) / glyph.width
        size = round(glyph.width * scale), round(glyph.height * scale)
        glyph = glyph.resize(size, Image.Resampling.BILINEAR)
        tint = Image.new("RGB", size, tuple(random.randint(0, 32) for _ in "RGB"))
        left, top = (
            round((pixels - side) / 2 + pixels * random.uniform(-0.08, 0.08)) for side in size
        )
        tinted_glyph = ImageChops.add(glyph.convert("RGB"), tint, offset=-16)
        image.paste(tinted_glyph, (left, top), glyph.getchannel("A"))
        return image


def font_file() -> Path:
    """The font that the pictures come from.

    Raises:
        DelibleError: It is not on this machine.
    """
    given = os.environ.get(VARIABLE)
    for path in (Path(given),) if given else PLACES:
        if path.expanduser().is_file():
            return path.expanduser()
    raise DelibleError(
        "Emoji pictures need the font Noto Color Emoji, which is not on this machine.",
        where=f"{VARIABLE}={given}" if given else None,
        hint="Install it (Debian and Ubuntu: apt install fonts-noto-color-emoji), or set "
        f"{VARIABLE} to the path of NotoColorEmoji.ttf.",
    )


@cache
def _glyph(font: str, character: str) -> Any:
    """A character as the font has it, RGBA."""
    from PIL import Image, ImageDraw, ImageFont

    try:
        face = ImageFont.truetype(font, BITMAPS)
    except OSError as error:
        raise DelibleError(
            f"This is no font with colour bitmaps of size {BITMAPS} ({error}).", where=font,
            hint=f"Let {VARIABLE} name NotoColorEmoji.ttf as Debian has it.",
        ) from None  # fmt: skip
    image = Image.new("RGBA", face.getbbox(character)[2:])
    ImageDraw.Draw(image).text((0, 0), character, font=face, embedded_color=True)
    return image


class Emoji(pictures.PictureWorld):
    """Every thing on every ground in both sizes; one scene of eight is not learned from."""

    aspects: ClassVar[Mapping[str, Sequence[str]]] = {
        "thing": tuple(THINGS),
        "ground": tuple(GROUNDS),
        "size": tuple(SIZES),
    }
    questions: ClassVar[Mapping[str, Sequence[str]]] = {
        "thing": (
            "What is in the picture?", "What do you see?", "Name what is shown.",
            "What is shown here?", "The picture shows which thing?", "What is the main object?",
        ),
        "ground": (
            "What colour is the ground?", "Which colour is behind it?",
            "Name the colour of the ground.", "On which colour is it shown?",
            "What is the colour of the background?",
        ),
        "size": (
            "How large is it?", "Is it large or small?", "Name the size.",
            "Which size does it have?", "What is the size of the object?",
        ),
    }  # fmt: skip
    is_there_words = (
        "Is there a {name} in the picture?", "Do you see a {name}?",
        "Does the picture show a {name}?", "Is it a {name}?", "Is a {name} shown here?",
    )  # fmt: skip
    trait = "kind"
    traits = THINGS
    trait_words = (
        "What kind of thing is it?",
        "Which kind of thing is shown?",
        "Name the kind of thing.",
    )
    trait_of_words = ("What kind of thing is a {name}?", "A {name} is which kind of thing?")
    weights: ClassVar[Mapping[str, int]] = {
        "thing": 4,
        "ground": 2,
        "size": 1,
        "is there": 2,
        "which": 1,
        "describe": 1,
        "kind": 2,
    }

    def check(self) -> None:
        """Refuses where its pictures cannot be drawn.

        Raises:
            MissingExtraError: Pillow is not installed.
            DelibleError: The font is missing, or another one.
        """
        super().check()
        _glyph(str(font_file()), unicodedata.lookup(self.names[0].upper()))

    def neighbours(self, name: str) -> list[str]:
        """The others of its kind."""
        return [one for one in KINDS[THINGS[name]] if one != name]

    def scenes(self) -> list[Scene]:
        """All 576, in a fixed order."""
        return [Scene(*one) for one in product(THINGS, GROUNDS, SIZES)]

    def held_out(self) -> tuple[list[Scene], list[Scene]]:
        """504 scenes to learn from, and 72 of which no picture is learned.

        Of every thing one is large and one small, and in the other size it is learned on that
        ground: what is never seen together tells a model nothing of the name.
        """
        learned, unseen = list[Scene](), list[Scene]()
        for (i, thing), (j, ground) in product(enumerate(THINGS), enumerate(GROUNDS)):
            held = {0: "large", 4: "small"}.get((i + j) % 8)
            for size in SIZES:
                (unseen if size == held else learned).append(Scene(thing, ground, size))
        return learned, unseen
