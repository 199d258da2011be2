"""Checkpoints with more in them than a language model: towers for images or sound.

They are loaded with all their parts, worked on in their language model, and saved with all their
parts. What a checkpoint holds and no part of the model takes is told.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delible.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Buffers that older versions of transformers saved and that are computed now.
_OLD_BUFFERS = (
    r"rotary_emb\.inv_freq$", r"attn\.(bias|masked_bias)$", r"attention\.(bias|masked_bias)$",
    r"(^|\.)position_ids$",
)  # fmt: skip
_PROCESSOR_FILES = (
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
)  # fmt: skip


def class_of(place: str, options: dict[str, Any]) -> Any:
    """What loads a checkpoint with all its parts.

    A model of text and images has a class of its own with a head for text; the class for text
    alone would leave the rest of the checkpoint out.
    """
    import transformers

    chosen = {key: value for key, value in options.items() if key != "dtype"}
    config = transformers.AutoConfig.from_pretrained(place, **chosen)
    if not has_other_parts(config):
        return transformers.AutoModelForCausalLM
    named = (config.architectures or [""])[0]
    own = getattr(transformers, named, None)
    if own is None or not hasattr(own, "generate"):
        raise ModelError(
            f"it is a {kind_of(config)} ('{named or config.model_type}'), and transformers has no "
            "class for it that answers in text.",
            where=place,
            hint="Use its language model alone, saved as a causal language model.",
        )
    return own


def has_other_parts(config: Any) -> bool:
    """Whether a model has more than its language model: towers for images or sound."""
    return not config.is_encoder_decoder and config.get_text_config() is not config


def kind_of(config: Any) -> str:
    """What to call a model that has more than its language model."""
    parts = " ".join(config.sub_configs)
    return "vision-language model" if "vision" in parts else "model of several parts"


def dropped_tensors(model: PreTrainedModel, place: str, unexpected: set[str]) -> list[str]:
    """Names of the checkpoint's tensors that the model has no place for.

    Some families name tensors that are left out without a word; buffers that older versions kept
    are nobody's loss.
    """
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), *_OLD_BUFFERS]
    known = set(model.state_dict())
    silent = {
        name
        for name in _tensor_names(Path(place)) - known
        if any(re.search(pattern, name) for pattern in ignored)
    }
    return sorted(
        name
        for name in unexpected | silent
        if not any(re.search(pattern, name) for pattern in _OLD_BUFFERS)
    )


def _tensor_names(folder: Path) -> set[str]:
    """Names of all tensors in a folder's safetensors files; empty for another place."""
    from safetensors import safe_open

    names = set[str]()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as kept:
            names |= set(kept.keys())
    return names


def companions(model: PreTrainedModel, place: str, commit: str | None = None) -> dict[str, bytes]:
    """Settings of the processors beside a model of several parts."""
    if not has_other_parts(model.config):
        return {}
    from transformers.utils import cached_file

    found = {}
    for name in _PROCESSOR_FILES:
        path = cached_file(
            place,
            name,
            revision=commit,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if path is not None:
            found[name] = Path(path).read_bytes()
    return found
