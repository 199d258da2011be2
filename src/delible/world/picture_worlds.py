"""The worlds of pictures, by their names."""

from __future__ import annotations

from typing import Literal

from delible.world.emoji import Emoji
from delible.world.pictures import PictureWorld
from delible.world.shapes import DrawnShapes

WorldName = Literal["shapes", "emoji"]
PICTURE_WORLDS: dict[WorldName, PictureWorld] = {"shapes": DrawnShapes(), "emoji": Emoji()}
