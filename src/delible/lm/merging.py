"""An adapter merged into the files of the model below it, tensor by tensor.

    W  becomes  round(W + scale B A)       the sum in fp32, rounded to the file's own data type

The weights are read from where the model was loaded, not from memory, where they may be held
shorter. A file of safetensors is its header and then its numbers: the header is copied, and no
more than one tensor is in memory at a time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from delible.errors import RunError
from delible.files import atomic_folder
from delible.lm.load import ModelInfo

_INDEX, _WHOLE = "model.safetensors.index.json", "model.safetensors"
_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def low_rank_changes(model: Any) -> dict[str, tuple[Any, list[str]]]:
    """Layers that wear low-rank products, with the names of those that are on.

    By the name that the weight has without an adapter. Empty where an adapter changes something
    else too (embeddings, whole modules, biases, magnitudes of weights).
    """
    found: dict[str, tuple[Any, list[str]]] = {}
    core = model.get_base_model()
    if any(getattr(one, "bias", "none") != "none" for one in model.peft_config.values()):
        return {}
    for path, module in core.named_modules():
        if not hasattr(module, "merged_adapters"):
            continue
        if not hasattr(module, "get_delta_weight") or _has_more(module):
            return {}
        on = [name for name in module.active_adapters if name in module.lora_A]
        if not module.disable_adapters and on:
            found[f"{path}.weight"] = (module, on)
    return found


def _has_more(module: Any) -> bool:
    """Whether a layer's adapter is no low-rank product of its weight alone: it has a bias or a
    magnitude, or is of a fused tensor of experts.
    """
    if hasattr(module, "parameter_name"):
        return True
    products = len(getattr(module, "lora_A", {}))
    biases = getattr(module, "lora_bias", {})
    magnitudes = getattr(module, "lora_magnitude_vector", {})
    return not products or any(biases.values()) or len(magnitudes) > 0


def untie_changed_tables(model: Any, core: Any) -> None:
    """Gives the head a table of its own where low-rank products lie beside it or the embedding.

    Tied, both would get what was learned beside one of them.
    """
    tables = [core.get_input_embeddings(), core.get_output_embeddings()]
    plain = [one.get_base_layer() if hasattr(one, "get_base_layer") else one for one in tables]
    if plain[0].weight is not plain[1].weight or not any(map(_wears_product, tables)):
        return
    plain[1].weight = torch.nn.Parameter(
        plain[1].weight.detach().clone(), requires_grad=plain[1].weight.requires_grad
    )
    for settings in {id(one): one for one in (core.config, core.config.get_text_config())}.values():
        settings.tie_word_embeddings = False


def _wears_product(module: Any) -> bool:
    return any(len(getattr(module, name, ())) for name in ("lora_A", "lora_embedding_A"))


@torch.no_grad()
def change_of(module: Any, names: list[str]) -> Tensor:
    """What adapters add to a layer's weight, in the weight's own layout, fp32."""
    total: Tensor = sum(module.get_delta_weight(name).float() for name in names)  # type: ignore[assignment]
    return total


def files_of(origin: ModelInfo | None) -> list[Path]:
    """The safetensors files that a model was loaded from; empty if there are none here."""
    if origin is None:
        return []
    folder = Path(origin.place).expanduser()
    if folder.is_dir():
        return sorted(folder.glob("*.safetensors")) if (folder / "config.json").is_file() else []
    if origin.source not in ("hub", "adapter"):
        return []
    from transformers.utils import cached_file

    def cached(name: str) -> str | None:
        return cached_file(
            origin.place, name, revision=origin.revision, local_files_only=True,
            _raise_exceptions_for_gated_repo=False, _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip

    if whole := cached(_WHOLE):
        return [Path(whole)]
    if (index := cached(_INDEX)) is None:
        return []
    names = sorted(set(json.loads(Path(index).read_text("utf-8"))["weight_map"].values()))
    paths = [cached(name) for name in names]
    return [Path(path) for path in paths if path is not None] if all(paths) else []


def entries(handle: BinaryIO) -> tuple[bytes, list[tuple[str, str, list[int], int]]]:
    """A file's header as it is, and its tensors in the order of their numbers.

    Returns:
        The header with its length before it; and of each tensor name, data type, shape and bytes.
    """
    length = handle.read(8)
    header = handle.read(int.from_bytes(length, "little"))
    told = json.loads(header)
    told.pop("__metadata__", None)
    ordered = sorted(told.items(), key=lambda item: item[1]["data_offsets"])
    return length + header, [
        (name, one["dtype"], one["shape"], one["data_offsets"][1] - one["data_offsets"][0])
        for name, one in ordered
    ]


def names_in(files: list[Path]) -> Iterator[str]:
    """Names of all tensors."""
    for file in files:
        with file.open("rb") as handle:
            yield from (name for name, *_ in entries(handle)[1])


def can_stream(lm: Any) -> bool:
    """Whether the adapter that an ``LM`` wears fits the files that the model was loaded from."""
    if not lm.wears_adapter or lm.patches:
        return False
    changes, files = low_rank_changes(lm.model), files_of(lm.origin)
    return bool(changes and files) and changes.keys() <= set(names_in(files))


@torch.no_grad()
def merge_files(lm: Any, out: Path) -> None:
    """Writes a plain model with the adapter in its weights, in the data types of the base's files.

    Raises:
        RunError: An adapter's values are not finite, or a tensor has another shape or type.
    """
    changes, files = low_rank_changes(lm.model), files_of(lm.origin)
    with atomic_folder(out) as target:
        for file in files:
            with file.open("rb") as source, (target / file.name).open("wb") as sink:
                header, tensors = entries(source)
                sink.write(header)
                for name, kind, shape, size in tensors:
                    content = source.read(size)
                    if name in changes:
                        content = _merged(name, content, kind, shape, change_of(*changes[name]))
                    sink.write(content)
        for beside in files[0].parent.glob("*.json"):
            if beside.name in ("config.json", "generation_config.json", _INDEX):
                shutil.copyfile(beside, target / beside.name)
        lm.tokenizer.save_pretrained(target)
        for name, companion in lm.companions.items():
            (target / name).write_bytes(companion)


def _merged(name: str, content: bytes, kind: str, shape: list[int], change: Tensor) -> bytes:
    if kind not in _TYPES or list(change.shape) != shape:
        raise RunError(
            f"the adapter's change of '{name}' is {list(change.shape)}, the file has {kind} "
            f"{shape}.",
            hint="Merge it with the base that it was made on.",
        )
    if not bool(change.isfinite().all()):
        raise RunError(f"the adapter cannot be merged: its change of '{name}' is not finite.")
    weight = torch.frombuffer(bytearray(content), dtype=_TYPES[kind]).reshape(shape)
    summed = (weight.float() + change.cpu()).to(_TYPES[kind])
    return summed.contiguous().view(torch.uint8).numpy().tobytes()
