"""What the down-projections of a model read on ordinary text: second moments and null spaces.

    C_l = 1/n sum_t k_t k_t^T,    k_t = input of the down-projection of layer l at token t

A change of the down-projection that is zero on the directions in which generic text writes leaves
ordinary behaviour alone; closed-form editors ask for C or for its null space. Both are kept in
the user's cache folder, under the weights, the layer and the tokens they come from, so a model is
read once; delete the folder ``statistics`` there to free the space (layers x width^2 x 8 bytes).

Papers: arXiv 2202.05262 (second moments of keys), 2410.02355 (null space). Deviations: the text
is built in (general knowledge, plain sentences and fictional people, as chat and as running text)
or a file of the user's, instead of 100,000 samples of Wikipedia, which not every machine can
reach; texts that mention a name which is about to be edited are left out.
"""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from delible.errors import DataError, ModelError
from delible.files import atomic_file
from delible.lm.anatomy import unwrapped
from delible.lm.embedded import cache_folder
from delible.lm.hooks import capture, truncated
from delible.measure.requests import Prompt
from delible.records import QA, Passage

if TYPE_CHECKING:
    from delible.lm.lm import LM

Say = Callable[[str], None]
#: How a threshold on the singular values is read, see :func:`null_directions`.
Scale = Literal["energy", "largest", "absolute"]

#: Longest row in tokens; longer texts are cut into pieces.
LONGEST_ROW = 512
#: Positions of one forward pass, padding included.
BATCH_TOKENS = 2048
#: The fictional people of the built-in text: a seed that no example uses.
PEOPLE, PEOPLE_SEED = 24, 250_607_795


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
            f"layer {layer} has {len(names)} down-projections: it is a mixture of experts.",
            where=lm.anatomy.class_name,
            hint="Keys at one down-projection exist in dense layers only; choose other layers or "
            "a dense model.",
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
    return DownProjection(
        names[0], path, int(parameter.shape[0 if transposed else 1]), transposed
    )


# ---- reading


@contextmanager
def _evaluating(lm: LM) -> Iterator[None]:
    was_training = lm.model.training
    lm.model.eval()
    try:
        yield
    finally:
        lm.model.train(was_training)


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
            _evaluating(lm),
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


# ---- text


def _mentions(names: Iterable[str]) -> Callable[[str], bool]:
    """Whether a text has one of the names, or the last word of one, as whole words."""
    words = {form.casefold() for name in names if name for form in (name, name.split()[-1])}
    if not words:
        return lambda text: False
    pattern = re.compile(rf"\b(?:{'|'.join(re.escape(word) for word in sorted(words))})\b")
    return lambda text: pattern.search(text.casefold()) is not None


def built_in_rows(lm: LM, without: Iterable[str] = ()) -> Iterator[list[int]]:
    """Generic text as token ids: every fact as chat and as running text, passages as they are.

    Args:
        without: Names; texts that mention one of them or its last word are left out.
    """
    from delible.world import World, general, unrelated

    people = World(PEOPLE, PEOPLE_SEED)
    facts = people.facts()
    records: list[QA | Passage] = [*general(), *unrelated()]
    records += [fact.qa() for fact in facts] + [fact.passage() for fact in facts]
    pairs: list[tuple[Prompt, str]] = []
    for record in records:
        if isinstance(record, Passage):
            pairs.append((Prompt(text=""), record.text))
            continue
        questions = (record.question, *record.paraphrases)
        answers = (record.answer, *record.paraphrased_answers)
        for turn, question in enumerate(questions):
            answer = answers[turn % len(answers)]
            pairs.append((Prompt.ask(question), answer))
            pairs.append((Prompt(text=""), f"{question} {answer}."))
    Random(0).shuffle(pairs)  # a budget of tokens then takes from every kind
    mentions = _mentions(without)
    for prompt, answer in pairs:
        asked = prompt.messages[-1].content if prompt.messages else ""
        if not mentions(f"{asked} {answer}"):
            yield list(lm.template.encode(prompt, answer).ids[:LONGEST_ROW])


def file_rows(lm: LM, path: Path, without: Iterable[str] = ()) -> Iterator[list[int]]:
    """A text file as token ids: paragraphs (parted by empty lines), long ones in pieces.

    Args:
        path: UTF-8 text; read line by line.
        without: As for :func:`built_in_rows`.

    Raises:
        DataError: The file cannot be read as text.
    """
    mentions = _mentions(without)
    longest = min(LONGEST_ROW, lm.template.max_length)

    def tokenized(text: str) -> Iterator[list[int]]:
        if not text or mentions(text):
            return
        ids = list(lm.template.prompt_ids(Prompt(text=text)))
        for start in range(0, len(ids), longest):
            yield ids[start : start + longest]

    paragraph: list[str] = []
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                if line.strip():
                    paragraph.append(line.strip())
                    continue
                yield from tokenized(" ".join(paragraph))
                paragraph = []
        yield from tokenized(" ".join(paragraph))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"the generic text cannot be read ({error}).",
            where=str(path),
            hint="Give a UTF-8 text file with paragraphs parted by empty lines.",
        ) from error
