"""A model and its tokenizer by transformers: safetensors only, complete, and a pair."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delible.errors import ModelError
from delible.lm import embedded
from delible.lm.load_errors import (
    first_line,
    told_of_loading,
)
from delible.lm.parts import class_of, dropped_tensors, has_other_parts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt",
    "spiece.model",
)  # fmt: skip


def pretrained_model(
    place: str, options: dict[str, Any], *, likely_path: Path | None = None
) -> PreTrainedModel:
    """``from_pretrained`` with safetensors only, complete weights, and errors in one sentence."""
    try:
        with embedded.quiet():
            loaded: Any = class_of(place, options).from_pretrained(
                place, use_safetensors=True, output_loading_info=True, **options
            )
    except ModelError:
        raise
    except Exception as error:  # transformers and safetensors raise many kinds
        raise told_of_loading(place, error, likely_path) from error
    model: PreTrainedModel = loaded[0]
    missing = sorted(loaded[1]["missing_keys"])
    if missing:
        raise ModelError(
            f"{len(missing)} weights are missing, first '{missing[0]}'.",
            where=place,
            hint="The checkpoint is incomplete or not one of a causal language model.",
        )
    dropped = dropped_tensors(model, place, set(loaded[1]["unexpected_keys"]))
    if dropped:
        logger.warning(
            f"{len(dropped)} tensors of {place} are no part of {type(model).__name__} and will "
            f"not be in a result, first '{dropped[0]}'."
        )
    model.eval()
    return model


def pretrained_tokenizer(
    place: str, options: dict[str, Any], **more: Any
) -> PreTrainedTokenizerBase:
    """A tokenizer as it was saved.

    Raises:
        ModelError: It cannot be loaded.
    """
    from transformers import AutoTokenizer

    chosen = {key: value for key, value in options.items() if key != "dtype"}
    try:
        with embedded.quiet():
            return AutoTokenizer.from_pretrained(place, **chosen, **more)
    except Exception as error:  # transformers and tokenizers raise many kinds
        raise ModelError(
            f"the tokenizer cannot be loaded: {first_line(error)}",
            where=place,
            hint="Save the tokenizer next to the model: tokenizer.save_pretrained(folder).",
        ) from error


def processor_of(
    model: PreTrainedModel, tokenizer: Any, place: str, revision: str | None = None
) -> Any:
    """What reads pictures for a model that sees, with this tokenizer; None: there is none.

    Why there is none is told: then the model is given texts only.
    """
    if not has_other_parts(model.config) or not hasattr(model, "get_image_features"):
        return None
    from transformers import AutoProcessor

    where = {"revision": revision} if revision and not Path(place).is_dir() else {}
    try:
        with embedded.quiet():
            found = AutoProcessor.from_pretrained(place, trust_remote_code=False, **where)
        if getattr(found, "image_processor", None) is None:
            raise ValueError("it has none for pictures")
    except Exception as error:  # transformers raises many kinds, and Pillow may be missing
        needs = "" if find_spec("PIL") else " Looking at pictures needs the extra 'vision'."
        logger.warning(
            f"{place} is given texts only, no pictures: its processor cannot be loaded "
            f"({first_line(error)}).{needs}"
        )
        return None
    if not getattr(tokenizer, "chat_template", None):
        tokenizer.chat_template = getattr(found, "chat_template", None)
    found.tokenizer = tokenizer
    return found


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a tokenizer's files."""
    return any((folder / file).is_file() for file in _TOKENIZER_FILES)


def require_tokenizer(folder: Path) -> None:
    """Refuses a folder without a tokenizer.

    Raises:
        ModelError: There is none.
    """
    if not has_tokenizer(folder):
        raise ModelError(
            "the folder has no tokenizer.",
            where=str(folder),
            hint="Save the tokenizer next to the model: tokenizer.save_pretrained(folder).",
        )


def fitting_tokenizer(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, name: str
) -> PreTrainedTokenizerBase:
    """A tokenizer that can pad and whose tokens the model knows."""
    embedding: Any = model.get_input_embeddings()
    rows = int(embedding.weight.shape[0])
    pad = tokenizer.pad_token_id
    if pad is None or pad >= rows:
        if pad is not None:
            logger.warning(
                f"The padding token of {name} is number {pad} and the model embeds {rows} tokens: "
                "another one pads (masks are explicit, so it changes no value)."
            )
        stand_in = (
            tokenizer.eos_token
            or tokenizer.sep_token
            or tokenizer.bos_token
            or tokenizer.unk_token
            or tokenizer.convert_ids_to_tokens(0)
        )
        tokenizer.pad_token = stand_in
    # Added tokens beyond the embedding are harmless until a text names them, and some readers add
    # an unused one; a vocabulary or an end token beyond it is not.
    used = {"last token": tokenizer.vocab_size - 1, "end token": tokenizer.eos_token_id}
    for what, index in used.items():
        if index is not None and index >= rows:
            raise ModelError(
                f"the {what} of the tokenizer is number {index}, the model embeds {rows} tokens.",
                where=name,
                hint="They do not belong together; use the tokenizer the model was trained with.",
            )
    return tokenizer


@contextmanager
def no_conversion_requests() -> Iterator[None]:
    """Keeps transformers from asking a conversion service on the hub for missing safetensors."""
    key = "DISABLE_SAFETENSORS_CONVERSION"
    before = os.environ.get(key)
    os.environ[key] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before
