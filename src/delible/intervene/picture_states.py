"""States of a tower for images, picture by picture; and which block of it is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from delible.errors import DataError, ModelError
from delible.intervene.sites import Positions, Site, vision_blocks
from delible.intervene.taps import Tap, Taps, Where
from delible.lm.lm import LM
from delible.lm.pictures import Pictures
from delible.lm.seeing import look, ramp
from delible.messages import ImagePart
from delible.records import RecordBase, images_of

#: Pictures that go through the tower at once.
TOGETHER = 32
#: Endings of the files of a folder that are taken for pictures.
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")


def eyes(lm: LM, who: str) -> Pictures:
    """What a model is shown pictures with.

    Raises:
        ModelError: It sees none.
    """
    if lm.pictures is None:
        raise ModelError(
            f"{who} acts on what a model makes of pictures, and '{lm.name}' is given texts only.",
            hint="Take a model that sees: '--model tiny-vlm', or a folder with its processor.",
        )
    return lm.pictures


@torch.no_grad()
def picture_states(
    lm: LM, images: Sequence[ImagePart], site: Site
) -> Iterator[tuple[int, dict[int | None, Float[Tensor, "patch width"]]]]:
    """The states of pictures at blocks of the tower, picture by picture, fp32 on the CPU.

    What stands before the patches (see :func:`before_patches`) is there, too, in a tower that has
    it. Interventions on the model act.

    Yields:
        Place in ``images``, and by layer the states of its tokens.
    """
    eyes(lm, "what reads states of pictures")
    for at in range(0, len(images), TOGETHER):
        part = images[at : at + TOGETHER]
        seen: dict[int | None, list[Tensor]] = {}

        def keep(states: Tensor, where: Where, seen: dict[int | None, list[Tensor]] = seen) -> None:
            rows = states.reshape(*where.shape, states.shape[-1]).float().cpu().clone()
            seen.setdefault(where.layer, []).append(rows)

        with Taps(lm, [Tap(site, Positions(), keep)]).on(first=False):
            sizes = [len(one) for one in look(lm, part)]
        apart = {layer: _apart(rows, sizes) for layer, rows in seen.items()}
        for place in range(len(part)):
            yield at + place, {layer: rows[place] for layer, rows in apart.items()}


def _apart(found: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
    """The states of each picture, from those of all calls of the tower.

    A tower gives [picture or tile, token, width], or the patches of all pictures in one row.
    """
    rows: list[Tensor] = []
    for one in found:
        rows += list(one) if one.dim() == 3 else [one]
    if len(rows) % len(sizes) == 0:  # one or several tiles for each picture
        count = len(rows) // len(sizes)
        return [torch.cat(rows[i * count : (i + 1) * count]) for i in range(len(sizes))]
    whole = torch.cat(rows)
    shares = [len(whole) * size // sum(sizes) for size in sizes]
    if sum(shares) != len(whole):
        raise ModelError("the tower's states cannot be told apart by pictures.")
    return list(whole.split(shares))


def read_layer(lm: LM) -> int:
    """The deepest block of the tower of which the language model reads something, from 0.

    Tried, for families differ: many projectors read the block before the last.

    Raises:
        ModelError: It has no tower, or nothing of it is read.
    """
    eyes(lm, "what changes a tower")
    image = ramp()
    count = len(lm.core.get_submodule(vision_blocks(lm)))
    plain = look(lm, [image])[0]
    for layer in reversed(range(count)):
        site = Site(what="vision", layers=(layer,))
        with torch.no_grad(), Taps(lm, [Tap(site, Positions(), _shifted)]).on():
            if not torch.equal(look(lm, [image])[0], plain):
                return layer
    raise ModelError("nothing of its tower for images reaches the language model.")


def _shifted(states: Tensor, where: Where) -> Tensor:
    size = states.abs().amax().clamp(min=1e-3)
    return states + size * torch.linspace(-1, 2, states.shape[-1], device=states.device)


def before_patches(lm: LM, layer: int) -> int:
    """How many tokens stand before the patches in a tower (a class token, registers)."""
    pictures, found = eyes(lm, "what changes a tower"), list[tuple[int, ...]]()

    def keep(states: Tensor, where: Where) -> None:
        found.append(where.shape)

    image = ramp()
    site = Site(what="vision", layers=(layer,))
    with torch.no_grad(), Taps(lm, [Tap(site, Positions(), keep)]).on():
        look(lm, [image])
    inputs = pictures.inputs(pictures.shown(image))
    pixels = inputs.get("pixel_values")
    size = getattr(getattr(lm.core.config, "vision_config", None), "patch_size", None)
    if pixels is None or pixels.dim() < 4 or not isinstance(size, int) or len(found[0]) != 2:
        return 0  # patches in one row: nothing stands before them
    patches = (pixels.shape[-2] // size) * (pixels.shape[-1] // size)
    return max(0, found[0][1] - patches)


def pictures_in(records: Sequence[RecordBase]) -> list[ImagePart]:
    """The different pictures of some records, in order."""
    return list(dict.fromkeys(image for record in records for image in images_of(record)))


def pictures_of_folder(folder: Path) -> list[ImagePart]:
    """The pictures of a folder, by name.

    Raises:
        DataError: There are none.
    """
    files = sorted(p for p in folder.expanduser().glob("*") if p.suffix.lower() in ENDINGS)
    if not files:
        raise DataError(
            "the folder holds no pictures.",
            where=str(folder),
            hint=f"Known endings: {', '.join(ENDINGS)}.",
        )
    return [ImagePart.model_validate({"source": str(path)}) for path in files]
