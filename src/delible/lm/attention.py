"""Attention where the model's own does more than it must; for the time of a call it is replaced.

**Several texts in one row.** Texts of different lengths in a batch are padded; one after the other
in one row they are not, and all matrices of the model see one row without holes. Only attention
must know where a text begins: it is the model's own, called once per text with that text's
queries, keys, values and mask. What stands before all of them (a shared prefix in the key-value
cache) is seen by each.

**One new token per row.** The fused kernel of a processor is made for many queries; for one it
takes longer than the two products that it consists of (3.3 against 2.4 ms a layer with 160 rows,
fp32). In bf16 the products would round what the kernel keeps in fp32, so there it stays.

**Weights that are read.** Fused kernels give no weights; the plain attention does, for as long as
somebody reads them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from delible.errors import ModelError
from delible.lm.body import Body, numbers
from delible.lm.cores import cores_of
from delible.lm.identity import only_reads

_TEXTS, _TOKEN = "delible_texts", "delible_token"


@dataclass(frozen=True)
class Text:
    """A part of a row.

    Attributes:
        start: Its first position, counted from the end of what all see.
        end: The position after its last.
        mask: Which of what all see, and then of its own positions, each position sees; in the
            form that the model's attention wants.
    """

    start: int
    end: int
    mask: Tensor


@dataclass(frozen=True)
class Texts:
    """The texts of a row, in order and without gaps.

    Attributes:
        parts: One after the other.
        attention: Name of the model's own attention.
    """

    parts: Sequence[Text]
    attention: str


def texts_of(lm: Body, sees: Sequence[Bool[Tensor, "size all"]]) -> Texts:
    """Texts by what their positions see: first what all see, then their own positions."""
    parts, start = [], 0
    for one in sees:
        parts.append(Text(start, start + len(one), _mask(lm, one[None, None])))
        start += len(one)
    return Texts(parts, _config(lm)._attn_implementation)


@contextmanager
def text_by_text(lm: Body, texts: Texts) -> Iterator[dict[str, Any]]:
    """Within it the model's attention goes text by text; gives arguments for the backbone."""
    with _replaced(lm, _TEXTS):
        yield {"texts": texts}


@contextmanager
def token_by_token(lm: Body) -> Iterator[None]:
    """Within it attention is fast for rows that get one new token at a time."""
    fused = _config(lm)._attn_implementation == "sdpa" and lm.device.type == "cpu"
    # a model that grows trees calls the attention that its configuration names
    replaced = fused and lm.grows_trees and lm.precision == "float32"
    with _replaced(lm, _TOKEN) if replaced else nullcontext():
        yield


@contextmanager
def weights_read(
    lm: Body, layers: Sequence[int]
) -> Iterator[dict[int, Float[Tensor, "rows heads query key"]]]:
    """Within it attention is the plain one; after a call the weights of blocks, with gradient.

    Rows of weights sum to 1 over the keys that a query sees. Memory: rows x heads x sequence^2
    values per block.

    Raises:
        ModelError: The attention of a block tells no weights.
    """
    seen: dict[int, Tensor] = {}

    def reading(layer: int) -> Callable[..., None]:
        def hook(module: torch.nn.Module, arguments: Any, output: Any) -> None:
            weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
            if not torch.is_tensor(weights):
                raise ModelError(
                    f"the attention of layer {layer} tells no weights.",
                    where=lm.anatomy.class_name,
                    hint="Choose a method that reads hidden states, such as rmu.",
                )
            seen[layer] = weights

        return only_reads(hook)  # type: ignore[no-any-return]

    with ExitStack() as stack:
        for layer in layers:
            module = lm.core.get_submodule(lm.anatomy.path(layer, lm.anatomy.attention))
            stack.callback(module.register_forward_hook(reading(layer)).remove)
        if layers:
            stack.enter_context(_replaced(lm, "eager"))
        yield seen


@contextmanager
def _replaced(lm: Body, name: str) -> Iterator[None]:
    configs = [core.config.get_text_config() for core in cores_of(lm.core)]
    own = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = name
        yield
    finally:
        for config, before in zip(configs, own, strict=True):
            config._attn_implementation = before


def attention_window(lm: Body) -> float:
    """The longest text of which every token sees all before it: no layer has forgotten any."""
    config = _config(lm)
    named = ("sliding_window", "attention_chunk_size")
    return min((one for name in named for one in numbers(config, name)), default=math.inf)


def _config(lm: Body) -> Any:
    return lm.core.config.get_text_config()


def _mask(lm: Body, sees: Bool[Tensor, "1 1 size all"]) -> Tensor:
    sees = sees.to(lm.device)
    if _config(lm)._attn_implementation == "sdpa":
        return sees
    number = lm.core.dtype
    return torch.where(sees, 0.0, torch.finfo(number).min).to(number)


def _attend_texts(
    module: torch.nn.Module,
    query: Float[Tensor, "1 heads new width"],
    key: Float[Tensor, "1 heads_kv all width"],
    value: Float[Tensor, "1 heads_kv all width"],
    attention_mask: object,
    *,
    texts: Texts,
    **options: Any,
) -> tuple[Float[Tensor, "1 new heads width"], None]:
    own = _own(module, texts.attention)
    before = key.shape[2] - query.shape[2]
    found = []
    for text in texts.parts:
        keys, values = (_seen(states, before, text) for states in (key, value))
        queries = query[:, :, text.start : text.end]
        found.append(own(module, queries, keys, values, text.mask, **options)[0])
    return torch.cat(found, dim=1), None


def _seen(states: Tensor, before: int, text: Text) -> Tensor:
    own = states[:, :, before + text.start : before + text.end]
    return torch.cat([states[:, :, :before], own], dim=2) if before else own


def _own(module: torch.nn.Module, name: str) -> Callable[..., Any]:
    """The attention function that the model would call itself."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return AttentionInterface().get_interface(name, eager)  # type: ignore[no-any-return]


def _attend_token(
    module: torch.nn.Module,
    query: Float[Tensor, "rows heads new width"],
    key: Float[Tensor, "rows heads_kv all width"],
    value: Float[Tensor, "rows heads_kv all width"],
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Float[Tensor, "rows new heads width"], None]:
    rows, heads, new, width = query.shape
    if new > 1 or any(options.get(name) is not None for name in ("position_bias", "softcap")):
        own = AttentionInterface()["sdpa"]
        return own(module, query, key, value, attention_mask, scaling=scaling, **options)  # type: ignore[no-any-return]
    scale = width**-0.5 if scaling is None else scaling
    queries = query.reshape(rows, key.shape[1], -1, width) * scale  # heads that share keys
    scores = queries @ key.transpose(2, 3)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores.masked_fill_(~attention_mask, -math.inf)
    elif attention_mask is not None:
        scores += attention_mask
    found = scores.softmax(dim=3) @ value
    return found.reshape(rows, 1, heads, value.shape[3]), None


AttentionInterface.register(_TEXTS, _attend_texts)
AttentionInterface.register(_TOKEN, _attend_token)
AttentionMaskInterface.register(_TOKEN, AttentionMaskInterface()["sdpa"])
