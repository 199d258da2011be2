"""A model that wears a saved PEFT adapter."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delible.errors import ModelError
from delible.lm import embedded
from delible.lm.load_errors import (
    first_line,
    read_json,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def with_adapter(model: Any, folder: Path, base: str, name: str = "default") -> Any:
    """A model that wears a saved PEFT adapter, beside those that it wears already.

    Raises:
        ModelError: It does not fit the model, or changes no weights.
    """
    from peft import PeftModel

    _make_room(model, folder / "adapter_model.safetensors")
    try:
        with embedded.quiet(), warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            if isinstance(model, PeftModel):
                model.load_adapter(str(folder), adapter_name=name, local_files_only=True)
                worn: Any = model
            else:
                worn = PeftModel.from_pretrained(
                    model, str(folder), adapter_name=name, local_files_only=True
                )
    except Exception as error:  # peft raises whatever its parsers meet
        raise ModelError(
            f"the adapter does not fit its base model: {first_line(error)}",
            where=f"{folder} (base {base})",
            hint="Check base_model_name_or_path in adapter_config.json.",
        ) from error
    if not hasattr(worn, "merge_and_unload"):
        kind = read_json(folder / "adapter_config.json").get("peft_type")
        raise ModelError(
            f"an adapter of the kind {kind} changes no weights and cannot be merged into them.",
            where=str(folder),
            hint="Adapters that can be merged work: LoRA, DoRA, IA3 and their like.",
        )
    return worn.eval()


def _make_room(model: PreTrainedModel, weights: Path) -> None:
    """Gives the base as many embedding rows as the adapter brings (tokens added for it).

    The new rows are the adapter's; nothing is resized for an adapter that brings none.
    """
    from safetensors import safe_open

    rows = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    tables = {
        path.rpartition(".")[2]
        for path, module in model.named_modules()
        if module in (model.get_input_embeddings(), model.get_output_embeddings())
    }
    try:
        with safe_open(weights, framework="pt") as kept:
            brought = [
                kept.get_slice(name).get_shape()[0]
                for name in kept.keys()  # noqa: SIM118 (no mapping)
                if name.rpartition(".")[2] == "weight"
                and name.rpartition(".")[0].removesuffix(".base_layer").rpartition(".")[2] in tables
            ]
    except Exception:  # a damaged file: told when it is loaded
        return
    if brought and max(brought) > rows:
        with embedded.quiet():
            model.resize_token_embeddings(max(brought), mean_resizing=False)
