"""Several answers to one question as a tree of tokens, and several trees in one row.

Answers to the same question often begin alike (a right one and its perturbed forms). Question and
answers become one text in which every different beginning stands once:

    question --- The -- author -- is -- Ada
                                   \\-- Bo -- Lin

Each token sees itself and its ancestors only, and its position is its depth, so its hidden state
is the one that it has in the plain row (as long as that is no longer than a sliding window). What
all questions share (a system prompt) goes through the key-value cache before. Nothing is computed
twice, neither in the body nor in the head, and trees stand one after the other in one row, each
with its own attention: nothing is padding.

Tokens of a tree that do not see each other cost attention all the same. Per layer a token costs
about 12 d^2 multiplications in the matrices and 2 d for each token of its tree (d: the width of
the hidden states); the limit below weighs the one against the other.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from delible.lm.attention import text_by_text, texts_of
from delible.lm.body import FEW_TOKENS, Body, shared_prefix
from delible.lm.forward import HEAD_CHUNK_ELEMENTS, arguments_of, cache_argument, prefix_cache
from delible.lm.layout import packed, told

#: Values of answer tokens from the logits that predict them: (logits [nodes, vocab] in fp32, which
#: it may overwrite, the node before each token [tokens], targets [tokens]) -> [tokens, ...].
NodeFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass
class Tree:
    """A question and the beginnings of its answers.

    Attributes:
        ids: Token of each node; parents stand before their children.
        parents: Index of each node's parent; -1 for the first.
        predicting: For each answer, the node whose hidden state predicts each of its tokens.
        targets: For each answer, its tokens.
        question: How many nodes, the first ones, are the question's; not given: all of them.
    """

    ids: list[int]
    parents: list[int]
    predicting: list[list[int]] = field(default_factory=list)
    targets: list[Sequence[int]] = field(default_factory=list)
    question: int = -1

    def __post_init__(self) -> None:
        if self.question < 0:
            self.question = len(self.ids)

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

    def sees(self, before: int = 0) -> Bool[np.ndarray, "nodes all"]:
        """Which nodes each node attends to: itself, its ancestors, and all that stand before."""
        seen = np.eye(len(self.ids), dtype=bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                seen[node] |= seen[parent]
        return np.pad(seen, ((0, 0), (before, 0)), constant_values=True)

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


class Prefix:
    """Tokens before every tree, computed once for all batches of a call.

    Args:
        ids: The tokens; may be none.
        prompt: One of the prompts that begin with them, whole.
    """

    def __init__(self, ids: Sequence[int], prompt: Sequence[int] | None = None) -> None:
        self.ids = list(ids)
        self.prompt = self.ids if prompt is None else prompt
        self._computed: Any = None

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], lm: Body | None = None) -> Prefix:
        """What all prompts start with, if it is worth sharing (and a model may share it)."""
        shared = shared_prefix(prompts)
        if lm is not None:
            shared = lm.alike(shared, lambda: prompts)
        return cls(prompts[0][:shared], prompts[0]) if prompts else cls(())

    def cache(self, lm: Body) -> Any:
        """A key-value cache with the prefix in it, to be filled on."""
        if self._computed is None:
            ids = torch.tensor([self.ids], dtype=torch.long, device=lm.device)
            self._computed = prefix_cache(lm, ids, lambda: self.prompt)
        return copy.deepcopy(self._computed)


@torch.no_grad()
def node_states(
    lm: Body, prefix: Prefix, trees: Sequence[Tree], cache: Any = None
) -> Float[Tensor, "nodes hidden"]:
    """Final hidden states of all nodes, tree after tree.

    Args:
        prefix: What stands before every tree; may be empty.
        cache: With the prefix in it, to be filled with the nodes' keys and values, tree after
            tree; without one they are not kept.

    Raises:
        TypeError: The model cannot be told positions.
    """
    backbone = lm.core.get_submodule(lm.anatomy.backbone)
    if "position_ids" not in arguments_of(backbone):
        raise TypeError("the model takes no position_ids")
    before = len(prefix.ids)
    ids = torch.tensor([[token for tree in trees for token in tree.ids]])
    depths = [tree.depths() for tree in trees]
    positions = torch.tensor([[depth for one in depths for depth in one]]) + before
    if cache is None and before:
        cache = prefix.cache(lm)
    cached = {} if cache is None else {cache_argument(backbone): cache}
    prompts = [[*prefix.ids, *tree.ids[: tree.question]] for tree in trees]
    with told(lm, packed(prompts, depths, before, lm.device)):
        texts = texts_of(lm, [torch.from_numpy(tree.sees(before)) for tree in trees])
        with text_by_text(lm, texts) as attending:
            return backbone(  # type: ignore[no-any-return]
                input_ids=ids.to(lm.device),
                position_ids=positions.to(lm.device),
                use_cache=cache is not None,
                **cached,
                **attending,
            ).last_hidden_state[0]


def tree_values(
    lm: Body, prefix: Prefix, trees: Sequence[Tree], function: NodeFunction
) -> Float[Tensor, "tokens values"]:
    """``function`` of the logits at every answer token: tree by tree, answer by answer.

    A node's logits are computed once for all tokens that follow it.
    """
    states = node_states(lm, prefix, trees)
    nodes, first = list[int](), 0
    for tree in trees:
        nodes += [first + node for path in tree.predicting for node in path]
        first += len(tree.ids)
    targets = torch.tensor([token for tree in trees for answer in tree.targets for token in answer])
    needed, places = (torch.from_numpy(one) for one in np.unique(nodes, return_inverse=True))
    states = states[needed.to(lm.device)]
    found, start = list[Tensor](), 0
    order = places.argsort(stable=True)  # tokens of a piece of nodes stand together
    size = max(1, min(FEW_TOKENS, HEAD_CHUNK_ELEMENTS // lm.vocabulary))
    for part in states.tensor_split(math.ceil(len(states) / size)):  # pieces of like size
        logits = lm.head(part).float()
        here = order[(places[order] >= start) & (places[order] < start + len(part))]
        nodes_here, targets_here = places[here] - start, targets[here]
        found.append(function(logits, nodes_here.to(lm.device), targets_here.to(lm.device)).cpu())
        start += len(part)
    return torch.cat(found)[order.argsort()]
