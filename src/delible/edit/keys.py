"""What a model's down-projections read and its blocks write while it reads token ids: at every
position, or at the last token of a name.

A down-projection's input is the key under which its weights keep a value; closed-form editors
change what is written at some keys, and ask for those of a name in a context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from delible.errors import ModelError
from delible.lm.anatomy import unwrapped
from delible.lm.hooks import capture, truncated
from delible.system.asks import Prompt

if TYPE_CHECKING:
    from delible.lm.lm import LM

#: Positions of one forward pass, padding included.
BATCH_TOKENS = 2048
#: Stands for a name while a template is rendered.
MARK = "\u2063name\u2063"


@dataclass(frozen=True)
class DownProjection:
    """The matrix that writes a block's MLP output.

    Attributes:
        parameter: Its full name among ``lm.core.named_parameters()``.
        path: The module whose input is the key.
        width: Length of a key (the MLP's inner width).
        transposed: The weight is ``[width, hidden]`` (GPT-2) instead of ``[hidden, width]``.
    """

    parameter: str
    path: str
    width: int
    transposed: bool


def down_projection(lm: LM, layer: int) -> DownProjection:
    """The down-projection of a block.

    Raises:
        ModelError: There is no such block, the block is a mixture of experts, or the weight is
            packed (quantized), so that it has no rows and columns to edit.
    """
    names = lm.anatomy.mlp_out_parameters(layer)
    parameter = lm.core.get_parameter(names[0]) if len(names) == 1 else None
    if parameter is None or parameter.dim() == 3:
        raise ModelError(
            f"layer {layer} is a mixture of experts: it has no single down-projection to edit.",
            where=lm.anatomy.class_name,
            hint="Choose dense layers (layers=...) or a dense model.",
        )
    transposed = lm.anatomy.transposed
    hidden = lm.anatomy.hidden_size
    if (
        not parameter.is_floating_point()
        or parameter.dim() != 2
        or parameter.shape[1 if transposed else 0] != hidden
    ):
        raise ModelError(
            f"'{names[0]}' is {parameter.dtype} of shape {tuple(parameter.shape)}, not a plain "
            f"matrix that writes {hidden} values.",
            where=lm.anatomy.class_name,
            hint="Load the model without quantization.",
        )
    path = names[0].removesuffix(".weight").removesuffix(".base_layer")
    return DownProjection(names[0], path, int(parameter.shape[0 if transposed else 1]), transposed)


# ---- reading


@torch.no_grad()
def read_states(
    lm: LM, rows: Sequence[Sequence[int]], layers: Sequence[int], *, autocast: bool = False
) -> Iterator[tuple[list[int], dict[int, Tensor], Tensor]]:
    """Down-projection inputs and the last layer's output, batch by batch, shortest rows first.

    Only the blocks up to the highest layer run. Rows are padded on the right without a mask: in
    a causal model padding cannot reach a real position, so values do not depend on the batch.

    Args:
        rows: Token ids, each row at least one.
        layers: Indices of the blocks whose keys are read.
        autocast: Compute as the model answers (see ``LM.precision``); otherwise in the data type
            of the weights.

    Yields:
        Indices of the rows in the batch; keys by layer, each ``[batch, sequence, width]``; the
        output of the highest of the layers, ``[batch, sequence, hidden]``. Positions beyond a
        row's length are meaningless.
    """
    paths = {layer: down_projection(lm, layer).path for layer in layers}
    block = lm.anatomy.block_path(max(layers))
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    while order:
        size = 1
        while size < len(order) and (size + 1) * len(rows[order[size]]) <= BATCH_TOKENS:
            size += 1
        indices, order = order[:size], order[size:]
        ids = torch.full((size, len(rows[indices[-1]])), lm.pad_id)
        for place, index in enumerate(indices):
            ids[place, : len(rows[index])] = torch.tensor(rows[index])
        with (
            lm.evaluating(),
            truncated(lm.core, lm.anatomy, max(layers) + 1),
            capture(lm.core, paths.values(), which="input") as inputs,
            capture(lm.core, [block]) as outputs,
            lm.computing() if autocast else nullcontext(),
        ):
            backbone = unwrapped(lm.model).get_submodule(lm.anatomy.backbone)
            backbone(input_ids=ids.to(lm.device), use_cache=False)
        # Some families flatten batch and sequence before the MLP.
        shape = (size, ids.shape[1], -1)
        yield (
            indices,
            {layer: inputs[path].reshape(shape) for layer, path in paths.items()},
            outputs[block].reshape(shape),
        )


# ---- at a name


def cut_after_name(lm: LM, name: str, context: Callable[[str], Prompt]) -> list[int]:
    """Token ids of a context up to the last token of a name in it, and no further.

    What follows a token cannot change its state in a causal model, but it can change how the
    name is tokenized, so the whole context is tokenized and then cut.

    Args:
        name: The name.
        context: Puts a name into a prompt.

    Raises:
        ModelError: The chat template rewrites the name, or the tokenizer does not tell where it
            ends.
    """
    prompt = context(name)
    text = lm.template.render(prompt)
    before, marked, after = lm.template.render(context(MARK)).partition(MARK)
    if not marked or before + name + after != text:
        raise ModelError(
            f"the chat template does not keep the name '{name}' as it is.",
            hint="Use a tokenizer whose template puts the user's words in verbatim.",
        )
    ids = list(lm.template.prompt_ids(prompt))
    # As in Template: a chat template writes its own beginning-of-text token.
    special = prompt.text is not None or not lm.template.has_chat
    end = _token_at(lm, ids, text, len(before) + len(name) - 1, special)
    if end is None:
        raise ModelError(
            f"the tokenizer does not tell which token the name '{name}' ends with.",
            where=type(lm.tokenizer).__name__,
            hint="Write the name as the model would, or use the model's fast tokenizer.",
        )
    return ids[: end + 1]


def _token_at(lm: LM, ids: list[int], text: str, place: int, special: bool) -> int | None:
    """Index of the (last) token that covers the character at a place; None when unclear."""
    if getattr(lm.tokenizer, "is_fast", False):
        encoding = lm.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        covering = [
            index
            for index, (start, end) in enumerate(encoding["offset_mapping"])
            if start <= place < end
        ]  # several when a character has several bytes
        same = list(encoding["input_ids"])[: len(ids)] == ids
        return covering[-1] if same and covering and covering[-1] < len(ids) else None
    head = list(lm.tokenizer(text[: place + 1], add_special_tokens=special)["input_ids"])
    if special and head and head[-1] == lm.tokenizer.eos_token_id:
        head.pop()
    return len(head) - 1 if head and ids[: len(head)] == head else None


def last_states(
    lm: LM, rows: Sequence[Sequence[int]], layers: Sequence[int]
) -> tuple[dict[int, Float[Tensor, "rows width"]], Float[Tensor, "rows hidden"]]:
    """Keys by layer and outputs of the highest layer at the last token of each row, in float64."""
    keys: dict[int, dict[int, Tensor]] = {layer: {} for layer in layers}
    outputs: dict[int, Tensor] = {}
    for indices, found, output in read_states(lm, rows, layers):
        for place, index in enumerate(indices):
            last = len(rows[index]) - 1
            outputs[index] = output[place, last].double()
            for layer in layers:
                keys[layer][index] = found[layer][place, last].double()
    order = range(len(rows))
    return (
        {layer: torch.stack([keys[layer][index] for index in order]) for layer in layers},
        torch.stack([outputs[index] for index in order]),
    )
