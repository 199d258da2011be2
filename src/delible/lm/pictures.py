"""Pictures as tokens: each token of a picture has a number of its own, beyond every vocabulary.

    number = 2^62 + (42 bits of the picture's SHA-256) 2^20 + (which of its tokens)

So rows of token ids say which pictures they hold: two beginnings are the same only if their
pictures are, and whatever is shared, cached or told apart by token ids (prefixes, trees, reference
values) is right for pictures too. What stands for them in the model is put in its place where ids
become embeddings (:mod:`delible.lm.seeing`).
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from delible.errors import DataError, MissingExtraError, ModelError
from delible.messages import ImagePart

#: Ids from here on are tokens of pictures.
FIRST = 1 << 62
_PLACE_BITS, _NUMBER_BITS = 20, 42
#: Bytes of what towers read that are kept.
KEPT_BYTES = 256 * 2**20
#: Larger pictures are not opened: width times height.
MOST_PIXELS = 64_000_000
#: What a processor gives besides what the tower reads.
_OF_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


def is_picture(ids: Int[Tensor, ...]) -> Tensor:
    """Which ids are tokens of pictures."""
    return ids >= FIRST


def numbers_of(ids: Int[Tensor, " token"]) -> tuple[Tensor, Tensor]:
    """Of tokens of pictures: the number of the picture, and which of its tokens each is."""
    inner = ids - FIRST
    return inner >> _PLACE_BITS, inner & ((1 << _PLACE_BITS) - 1)


def without_pictures(ids: Sequence[int], tokenizer: Any) -> list[int]:
    """The ids with a special token in place of each one of a picture, for reading as text."""
    if not any(token >= FIRST for token in ids):
        return list(ids)
    named = getattr(tokenizer, "image_token", None)
    instead = tokenizer.convert_tokens_to_ids(named) if named else tokenizer.all_special_ids[0]
    return [instead if token >= FIRST else token for token in ids]


@dataclass(frozen=True)
class Picture:
    """What a processor makes of a picture.

    Attributes:
        text: What stands in a text in place of the picture's token.
        ids: The tokens of that text, those of the picture with their own numbers.
    """

    text: str
    ids: tuple[int, ...]


class Pictures:
    """The pictures that a model was shown, and how its processor reads them.

    Args:
        processor: Of transformers, with a tokenizer and an image processor.

    Raises:
        ModelError: The processor has no token that stands for a picture.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        token = getattr(processor, "image_token", None)
        if not isinstance(token, str):
            raise ModelError("its processor has no token that stands for a picture.")
        self.token = token
        self.token_id = int(processor.tokenizer.convert_tokens_to_ids(token))
        self._images: dict[int, ImagePart] = {}
        self._pictures: dict[str, Picture] = {}
        self._read: OrderedDict[int, Mapping[str, Tensor]] = OrderedDict()
        self.fingerprint = _settings(processor)

    def picture(self, image: ImagePart) -> Picture:
        """The tokens of a picture.

        Raises:
            DataError: It cannot be opened.
            MissingExtraError: Pillow is not installed.
        """
        known = self._pictures.get(image.sha256)
        if known is None:
            ids, inputs = self._processed(image)
            text = str(
                self.processor.tokenizer.decode(
                    ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
                )
            )
            number = self._number(image)
            own, count = list[int](), 0
            for token in ids:
                if token == self.token_id:
                    own.append(FIRST + (number << _PLACE_BITS) + count)
                    count += 1
                else:
                    own.append(token)
            if not count or count >= 1 << _PLACE_BITS:
                raise ModelError(f"its processor makes {count} tokens of a picture.")
            known = self._pictures[image.sha256] = Picture(text, tuple(own))
            self._images[number] = image
            self._keep(number, inputs)
        return known

    def inputs(self, number: int) -> Mapping[str, Tensor]:
        """What the tower reads of a picture that was shown; by names of arguments.

        Raises:
            DataError: No such picture was shown in this process, or it is gone since.
        """
        if number not in self._read:
            if number not in self._images:
                raise DataError("tokens of a picture that was never shown to this model.")
            self._keep(number, self._processed(self._images[number])[1])
        self._read.move_to_end(number)
        return self._read[number]

    def shown(self, image: ImagePart) -> int:
        """The number of a picture, by which :meth:`inputs` knows it.

        Raises:
            DataError: It cannot be opened.
        """
        return next((t - FIRST) >> _PLACE_BITS for t in self.picture(image).ids if t >= FIRST)

    # ---- texts

    def told(self, text: str, images: Sequence[ImagePart]) -> str:
        """A text with what stands for each picture in place of its token.

        Raises:
            ModelError: It has more or fewer of these tokens than there are pictures.
        """
        parts = text.split(self.token)
        if len(parts) != len(images) + 1:
            raise ModelError(
                f"the conversation has {len(images)} pictures, and the text that the model reads "
                f"has {len(parts) - 1} times '{self.token}', which stands for one.",
                hint="A text must not hold that token; and the chat template must place pictures.",
            )
        shown = [self.picture(image).text for image in images]
        return "".join(piece for pair in zip(parts, [*shown, ""], strict=True) for piece in pair)

    def numbered(self, ids: Sequence[int], images: Sequence[ImagePart]) -> list[int]:
        """Tokens of a text of :meth:`told`, those of pictures with their own numbers."""
        own = [token for image in images for token in self.picture(image).ids if token >= FIRST]
        found, at = list(ids), 0
        for place, token in enumerate(found):
            if token == self.token_id:
                if at >= len(own):
                    raise ModelError("the text has more tokens of pictures than its pictures.")
                found[place] = own[at]
                at += 1
        if at != len(own):
            raise ModelError("the text has fewer tokens of pictures than its pictures.")
        return found

    # ---- inside

    def _number(self, image: ImagePart) -> int:
        digest = hashlib.sha256(f"{image.sha256}/{self.fingerprint}".encode()).digest()
        number = int.from_bytes(digest[:8], "big") >> (64 - _NUMBER_BITS)
        other = self._images.get(number)
        if other is not None and other.sha256 != image.sha256:
            raise DataError(  # one in 10^7 for a thousand pictures
                "two pictures cannot be told apart by their numbers.",
                hint="Save one of them anew.",
            )
        return number

    def _processed(self, image: ImagePart) -> tuple[list[int], Mapping[str, Tensor]]:
        opened = opened_picture(image)
        try:
            found = self.processor(
                text=[self.token], images=[opened], return_tensors="pt", add_special_tokens=False
            )
        except Exception as error:  # processors raise many kinds
            raise DataError(
                f"the model's processor cannot read the picture: {type(error).__name__}: {error}",
                where=image.source[:200],
            ) from error
        inputs = {
            name: value
            for name, value in found.items()
            if name not in _OF_TEXT and torch.is_tensor(value)
        }
        return list(map(int, found["input_ids"][0])), inputs

    def _keep(self, number: int, inputs: Mapping[str, Tensor]) -> None:
        self._read[number] = inputs
        self._read.move_to_end(number)
        size = sum(one.nbytes for kept in self._read.values() for one in kept.values())
        while size > KEPT_BYTES and len(self._read) > 1:
            _, gone = self._read.popitem(last=False)
            size -= sum(one.nbytes for one in gone.values())


def opened_picture(image: ImagePart) -> Any:
    """The picture as Pillow has it, RGB.

    Raises:
        DataError: It is broken, too large, or of a kind that Pillow does not know.
        MissingExtraError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError:
        raise MissingExtraError("Looking at pictures", "vision") from None
    content = image.content()
    where = image.source if not image.source.startswith("data:") else f"picture {image.sha256[:12]}"
    try:
        with Image.open(io.BytesIO(content)) as found:
            width, height = found.size
            if width * height > MOST_PIXELS:
                raise DataError(
                    f"the picture is too large: {width} × {height}.", where=where,
                    hint="Make it smaller.",
                )  # fmt: skip
            return found.convert("RGB")
    except DataError:
        raise
    except Exception as error:  # Pillow's readers raise what they meet
        raise DataError(
            f"the picture is broken: {error}", where=where, hint="Open it, and save it anew."
        ) from error


def _settings(processor: Any) -> str:
    """SHA-256 over what the image processor does."""
    inner = getattr(processor, "image_processor", None)
    settings = inner.to_dict() if inner is not None else {}
    told = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(f"{type(inner).__name__} {told}".encode()).hexdigest()
