"""Several answers to one question as a tree of tokens, and several trees in one row.

Answers to the same question often begin alike (a right one and its perturbed forms). Question and
answers become one row in which every different beginning stands once:

    question --- The -- author -- is -- Ada
                                   \\-- Bo -- Lin

Each token sees itself and its ancestors only, and its position is its depth, so its hidden state
is the one that it has in the plain row (as long as that is no longer than a sliding window). What
all questions share (a system prompt) goes through the key-value cache before. Nothing is computed
twice, neither in the body nor in the head. Small trees stand beside each other in one row, so
that hardly any of it is padding.

Tokens of a row that do not see each other cost attention all the same. Per layer a token costs
about 12 d^2 multiplications in the matrices and 2 d for each token of its row (d: the width of
the hidden states); both limits below weigh the one against the other.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from delible.lm.forward import (
    HEAD_CHUNK_ELEMENTS,
    TokenFunction,
    cache_argument,
    prefix_cache,
    shared_prefix,
)

if TYPE_CHECKING:
    from delible.lm.lm import LM


@dataclass
class Tree:
    """A question and the beginnings of its answers, or several questions beside each other.

    Attributes:
        ids: Token of each node; parents stand before their children.
        parents: Index of each node's parent; -1 for the first of a question.
        predicting: For each answer, the node whose hidden state predicts each of its tokens.
        targets: For each answer, its tokens.
    """

    ids: list[int]
    parents: list[int]
    predicting: list[list[int]] = field(default_factory=list)
    targets: list[Sequence[int]] = field(default_factory=list)

    @classmethod
    def grow(cls, prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> Tree:
        """The tree of a prompt (at least one token) and answers (at least one token each)."""
        tree = cls(list(prompt), list(range(-1, len(prompt) - 1)))
        children: dict[tuple[int, int], int] = {}
        for answer in answers:
            node = len(prompt) - 1
            path = [node]
            for token in answer[:-1]:  # nothing follows the last one
                if (node, token) not in children:
                    children[node, token] = len(tree.ids)
                    tree.ids.append(token)
                    tree.parents.append(node)
                node = children[node, token]
                path.append(node)
            tree.predicting.append(path)
            tree.targets.append(answer)
        return tree

    @classmethod
    def beside(cls, trees: Sequence[Tree]) -> Tree:
        """One row of several trees, of which none sees another."""
        row = cls([], [])
        for tree in trees:
            before = len(row.ids)
            row.ids += tree.ids
            row.parents += [parent + before if parent >= 0 else -1 for parent in tree.parents]
            row.predicting += [[node + before for node in path] for path in tree.predicting]
            row.targets += tree.targets
        return row

    def sees(self) -> Bool[np.ndarray, "nodes nodes"]:
        """Which nodes each node attends to: itself and its ancestors."""
        seen = np.eye(len(self.ids), dtype=bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                seen[node] |= seen[parent]
        return seen

    def depths(self) -> list[int]:
        """Position of each node, from 0."""
        found: list[int] = []
        for parent in self.parents:
            found.append(0 if parent < 0 else found[parent] + 1)
        return found


def shared_by(question: int, answers: Sequence[int], width: int) -> list[list[int]]:
    """Which answers to a question share a tree: places in ``answers``, group by group.

    An answer joins as long as the question that it saves costs more than the attention between
    it and what is there already: 12 d^2 q >= 2 d * 2 n s for n tokens beside s. So a long
    question is shared by all of its answers, and passages after an empty one stay apart.

    Args:
        question: Tokens of the question.
        answers: Tokens of each answer.
        width: Of the hidden states (d).
    """
    groups: list[list[int]] = []
    size = 0
    for place, new in enumerate(answers):
        if not groups or new * size > 3 * width * question:
            groups.append([])
            size = question
        groups[-1].append(place)
        size += new
    return groups


def rows_of(sizes: Sequence[int], width: int) -> list[list[int]]:
    """Which trees stand in one row: places in ``sizes``, row by row, the widest rows first.

    First fit, largest first. A row takes d / 2 tokens, where attention costs a twelfth of the
    matrices, or one tree that is wider.

    Args:
        sizes: Nodes of each tree.
        width: Of the hidden states (d).
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        size = sizes[place]
        fitting = next((row for row, left in enumerate(room) if left >= size), None)
        if fitting is None:
            fitting = len(rows)
            rows.append([])
            room.append(max(size, width // 2))
        rows[fitting].append(place)
        room[fitting] -= size
    return sorted(rows, key=lambda row: -sum(sizes[place] for place in row))


class Prefix:
    """Tokens before every tree, computed once for all batches of a call.

    Args:
        ids: The tokens; may be none.
    """

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = list(ids)
        self._computed: Any = None

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]]) -> Prefix:
        """What all prompts start with, if it is worth sharing."""
        return cls(prompts[0][: shared_prefix(prompts)] if prompts else ())

    def cache(self, lm: LM, rows: int) -> Any:
        """A key-value cache of its own for so many rows."""
        if self._computed is None:
            self._computed = prefix_cache(lm, torch.tensor([self.ids], device=lm.device))
        found = copy.deepcopy(self._computed)
        found.batch_repeat_interleave(rows)
        return found


@torch.no_grad()
def node_states(
    lm: LM, prefix: Prefix, trees: Sequence[Tree]
) -> Float[Tensor, "trees nodes hidden"]:
    """Final hidden states of all nodes, shorter trees padded at the end.

    Args:
        prefix: What stands before every tree; may be empty.

    Raises:
        TypeError: The model cannot be told positions.
    """
    backbone = lm.core.get_submodule(lm.anatomy.backbone)
    if "position_ids" not in signature(type(backbone).forward).parameters:
        raise TypeError("the model takes no position_ids")
    width, before = max(len(tree.ids) for tree in trees), len(prefix.ids)
    ids = torch.full((len(trees), width), lm.pad_id)
    positions = torch.zeros_like(ids)
    sees = np.zeros((len(trees), 1, width, before + width), dtype=bool)
    sees[..., before:] |= np.eye(width, dtype=bool)  # padding sees itself, or softmax has no sum
    for row, tree in enumerate(trees):
        size = len(tree.ids)
        ids[row, :size] = torch.tensor(tree.ids)
        positions[row, :size] = torch.tensor(tree.depths())
        sees[row, 0, :size, :before] = True
        sees[row, 0, :size, before : before + size] = tree.sees()
    told = {cache_argument(backbone): prefix.cache(lm, len(trees))} if before else {}
    return backbone(  # type: ignore[no-any-return]
        input_ids=ids.to(lm.device),
        attention_mask=_mask(lm, torch.from_numpy(sees)),
        position_ids=(positions + before).to(lm.device),
        use_cache=bool(before),
        **told,
    ).last_hidden_state


def attention_window(lm: LM) -> float:
    """The longest row of which every token sees all before it: no layer has forgotten any."""
    config = lm.core.config.get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((window for window in windows if window), default=math.inf)


def _mask(lm: LM, sees: Bool[Tensor, "trees 1 nodes all"]) -> Tensor:
    """The mask in the form that the model's attention wants."""
    sees = sees.to(lm.device)
    if lm.core.config.get_text_config()._attn_implementation == "sdpa":
        return sees
    number = lm.core.dtype
    return torch.where(sees, 0.0, torch.finfo(number).min).to(number)


def tree_values(
    lm: LM, prefix: Prefix, trees: Sequence[Tree], function: TokenFunction
) -> Float[Tensor, "tokens values"]:
    """``function`` of the logits at every answer token: tree by tree, answer by answer."""
    states = node_states(lm, prefix, trees)
    width = states.shape[1]
    nodes = [
        row * width + node
        for row, tree in enumerate(trees)
        for path in tree.predicting
        for node in path
    ]
    targets = [token for tree in trees for answer in tree.targets for token in answer]
    needed, places = np.unique(nodes, return_inverse=True)
    wanted = states.flatten(0, 1)[torch.from_numpy(needed).to(lm.device)]
    return _values(lm, wanted, torch.from_numpy(places), torch.tensor(targets), function)


def _values(
    lm: LM,
    states: Float[Tensor, "nodes hidden"],
    places: Int[Tensor, " tokens"],
    targets: Int[Tensor, " tokens"],
    function: TokenFunction,
) -> Float[Tensor, "tokens values"]:
    """The function per token; a node's logits are computed once for all tokens after it.

    Tokens take turns, one per node at a time: the first turn has every node, and needs no copy.
    """
    turns = _turns(places)
    found: Tensor | None = None
    size = max(1, HEAD_CHUNK_ELEMENTS // lm.vocabulary)
    for start in range(0, len(states), size):
        logits = lm.head(states[start : start + size]).float()
        here = (places >= start) & (places < start + size)
        for turn in range(int(turns[here].max()) + 1):
            mine = (here & (turns == turn)).nonzero()[:, 0]
            mine = mine[places[mine].argsort()]
            nodes = (places[mine] - start).to(lm.device)
            rows = logits if len(nodes) == len(logits) else logits[nodes]
            values = function(rows, targets[mine].to(lm.device)).cpu()
            found = values.new_empty(len(places), *values.shape[1:]) if found is None else found
            found[mine] = values
    if found is None:
        raise ValueError("no answer tokens")
    return found


def _turns(places: Int[Tensor, " tokens"]) -> Int[Tensor, " tokens"]:
    """How many tokens before each one have the same place."""
    order = places.argsort(stable=True)
    ordered = places[order]
    firsts = torch.searchsorted(ordered, ordered)
    turns = torch.empty_like(places)
    turns[order] = torch.arange(len(places)) - firsts
    return turns
