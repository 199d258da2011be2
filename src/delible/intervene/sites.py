"""Where in a model an intervention acts: at which modules, in which layers, at which tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal

import torch
from jaxtyping import Bool
from pydantic import Field, StrictFloat, StrictInt, model_validator
from torch import Tensor, nn

from delible.component import Config
from delible.errors import ModelError
from delible.lm.body import Body
from delible.lm.gates import gate_of
from delible.lm.layout import Layout
from delible.lm.pictures import without_pictures

What = Literal[
    "block_input", "block", "attention", "mlp_gate", "mlp_inner", "mlp_out", "mlp", "embedding",
    "norm", "vision",
]  # fmt: skip
#: What a model has once, whatever its layers.
_ONCE = ("embedding", "norm")


class Site(Config):
    """Modules of a model; found by its anatomy, never by their names."""

    what: What = Field(
        "block",
        description="block_input, block (its output: the residual stream), attention and mlp "
        "(what they add to it), mlp_inner and mlp_out (what the down projection reads and "
        "gives), embedding, norm (the "
        "final one's output), vision (a block of the tower for images).",
    )
    layers: tuple[StrictInt | StrictFloat, ...] = Field(
        (),
        description="Indices (from the end if negative) or depths (0.0 the first, 1.0 the last); "
        "empty: every layer.",
    )

    @model_validator(mode="after")
    def _has_layers(self) -> Site:
        if self.what in _ONCE and self.layers:
            raise ValueError(f"a model has one '{self.what}', which is in no layer")
        return self

    def places(self, lm: Body) -> list[Place]:
        """The modules, in the order of the layers.

        Raises:
            ModelError: The model has no such part or no such layer.
        """
        if self.what in _ONCE:
            path = lm.anatomy.embedding if self.what == "embedding" else lm.anatomy.norm
            if path is None:
                raise _without(lm, "norm after its last block")
            return [Place(path, self.what, None)]
        blocks = vision_blocks(lm) if self.what == "vision" else lm.anatomy.blocks
        count = len(lm.core.get_submodule(blocks))
        wanted = self.layers or tuple(range(count))
        layers = sorted({_index(one, count, type(lm.core).__name__) for one in wanted})
        if self.what == "mlp_gate":
            gates = [(layer, gate_of(lm.core, lm.anatomy, layer)) for layer in layers]
            return [
                Place(gate.path, self.what, layer, (gate.first, gate.width))
                for layer, gate in gates
            ]
        return [Place(self._path(lm, blocks, layer), self.what, layer) for layer in layers]

    def _path(self, lm: Body, blocks: str, layer: int) -> str:
        block = f"{blocks}.{layer}"
        if self.what == "attention":
            return f"{block}.{lm.anatomy.attention}"
        if self.what == "mlp":
            return f"{block}.{lm.anatomy.mlp}"
        if self.what in ("mlp_inner", "mlp_out"):
            matrices = lm.anatomy.parameter_names(layer, "mlp_out")
            owners = {re.sub(r"(\.base_layer)?\.weight$", "", name) for name in matrices}
            if len(owners) != 1 or not next(iter(owners)).startswith(f"{block}."):
                raise _without(lm, f"single down projection in layer {layer} (experts have many)")
            owner = next(iter(owners))
            if lm.anatomy.experts and owner.startswith(f"{block}.{lm.anatomy.experts}"):
                raise _without(lm, f"single down projection in layer {layer} (experts have many)")
            return owner
        return block


@dataclass(frozen=True)
class Place:
    """One module at which something is read or changed.

    Attributes:
        path: Of the module, for ``get_submodule``.
        what: See :class:`Site`.
        layer: Its layer; None for what a model has once.
        columns: First of them and how many, where only some of what the module gives is meant.
    """

    path: str
    what: What
    layer: int | None
    columns: tuple[int, int] | None = None

    @property
    def at_input(self) -> bool:
        """Whether it is what the module receives, not what it gives."""
        return self.what in ("block_input", "mlp_inner")


class Positions(Config):
    """Tokens at which something is read or changed."""

    kind: Literal["all", "answer", "prompt_end", "spans"] = Field(
        "all",
        description="all; answer: where a token of the answer is predicted, and every generated "
        "token; prompt_end: the last token of the prompt; spans: the tokens of given texts in the "
        "prompt.",
    )
    texts: tuple[str, ...] = Field(
        (), description="For spans: what is looked for, whole words in any case."
    )

    @model_validator(mode="after")
    def _has_texts(self) -> Positions:
        if (self.kind == "spans") != bool(self.texts):
            raise ValueError("'texts' belong to the kind 'spans', which needs at least one")
        if any(not one.strip() for one in self.texts):
            raise ValueError("one of 'texts' is empty")
        return self

    def chosen(self, lm: Body, layout: Layout) -> Bool[Tensor, "rows new"]:
        """Which tokens of a call of the backbone are meant."""
        if self not in layout.known:
            layout.known[self] = self._chosen(lm, layout)
        return layout.known[self]  # type: ignore[no-any-return]

    def _chosen(self, lm: Body, layout: Layout) -> Bool[Tensor, "rows new"]:
        if self.kind == "all":
            return layout.real
        if self.kind == "answer":
            return layout.real & layout.predicts
        if self.kind == "prompt_end":
            return layout.ends_prompt
        marks = [self.marked(lm, prompt) for prompt in layout.prompts]
        width = max(len(one) for one in marks) + 1  # behind the longest prompt nothing is marked
        table = torch.zeros(len(marks), width, dtype=torch.bool)
        for row, one in zip(table, marks, strict=True):
            row[: len(one)] = torch.tensor(one)
        places = layout.place.clamp(min=0, max=width - 1)
        return layout.real & table.to(places.device)[layout.text, places]

    def marked(self, lm: Body, prompt: Sequence[int]) -> tuple[bool, ...]:
        """Which tokens of a prompt touch one of the texts."""
        return marked(lm.tokenizer, self.texts, tuple(prompt))


@lru_cache(maxsize=512)
def marked(tokenizer: Any, texts: tuple[str, ...], ids: tuple[int, ...]) -> tuple[bool, ...]:
    """Which of some tokens touch one of the texts, as whole words in any case."""
    text, spans = _spans(tokenizer, ids)
    found = [False] * len(ids)
    for match in _pattern(texts).finditer(text):
        for place, (start, end) in enumerate(spans):
            # a token that ends inside of a character may have no width
            if start < match.end() and max(end, start + 1) > match.start():
                found[place] = True
    return tuple(found)


@lru_cache(maxsize=64)
def _pattern(texts: tuple[str, ...]) -> re.Pattern[str]:
    parts = [r"\s+".join(map(re.escape, one.split())) for one in texts]
    longest_first = sorted(parts, key=len, reverse=True)
    return re.compile(rf"(?<!\w)(?:{'|'.join(longest_first)})(?!\w)", re.IGNORECASE)


def _spans(tokenizer: Any, ids: tuple[int, ...]) -> tuple[str, list[tuple[int, int]]]:
    """The text of tokens, and where in it each of them begins and ends."""
    ids = tuple(without_pictures(ids, tokenizer))
    text = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
    if tokenizer.is_fast:
        again = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        if tuple(again["input_ids"]) == ids:
            return text, list(again["offset_mapping"])
    # tokens that the text does not give again: by what is there after each of them
    parts = [
        str(tokenizer.decode(ids[: count + 1], clean_up_tokenization_spaces=False))
        for count in range(len(ids))
    ]
    return text, list(pairwise((0, *(len(one.rstrip("\ufffd")) for one in parts))))


def vision_blocks(lm: Body) -> str:
    """Path of the list of blocks of a model's tower for images: the largest outside the language.

    Raises:
        ModelError: It has no tower.
    """
    language = f"{lm.anatomy.backbone}."
    sizes = {
        path: sum(one.numel() for one in module.parameters())
        for path, module in lm.core.named_modules()
        if isinstance(module, nn.ModuleList)
        and not f"{path}.".startswith(language)
        and len({type(child) for child in module}) == 1
    }
    if not sizes:
        raise _without(lm, "tower for images")
    return max(sizes, key=lambda path: sizes[path])


def _index(layer: int | float, count: int, name: str) -> int:
    if isinstance(layer, float):
        if not 0 <= layer <= 1:
            raise ModelError(f"depth {layer} is outside 0…1.", where=name)
        return int(layer * (count - 1) + 0.5)
    if not -count <= layer < count:
        raise ModelError(f"there is no layer {layer}.", where=name, hint=f"It has {count}.")
    return layer % count


def _without(lm: Body, part: str) -> ModelError:
    return ModelError(f"it has no {part}.", where=type(lm.core).__name__)
