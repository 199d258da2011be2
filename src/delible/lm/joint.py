"""Several models that read the same tokens, as one: one pass, one key-value cache, one loop.

    states = [h_1 | h_2 | ...]        final states side by side, each of a model of its own
    logits = combine(head_1(h_1), [head_2(h_2), ...])

All that computes over a model (batches, trees, prefixes, decoding, serving, gradients) works on it
as on any other: its cache is the models' layers one after the other, its last hidden state their
states side by side, and its head the only thing that knows of more than one. Answers are asked of
it through the engine alone; the library's own ``generate`` is refused, not answered by one model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from delible.errors import ModelError
from delible.lm.anatomy import Anatomy
from delible.lm.body import AfterHead, Body, head_logits
from delible.lm.forward import cache_argument, empty_cache

#: (the first model's logits [tokens, vocab] in fp32, those of the others) -> logits.
Combine = Callable[[Tensor, Sequence[Tensor]], Tensor]
#: Path of the first model in a :class:`Joint`, and of what calls them all.
FIRST, TOGETHER, HEAD = "leading", "backbone", "head"


class _Backbones(nn.Module):
    """The models' bodies; each sees its own layers of the cache.

    Attributes:
        leading: The first one, which says what arguments there are.
    """

    def __init__(self, backbones: Sequence[nn.Module], layers: Sequence[int]) -> None:
        super().__init__()
        # in a list: they are modules of the models already
        self._backbones, self._layers = list(backbones), list(layers)

    @property
    def leading(self) -> nn.Module:
        return self._backbones[0]

    def forward(self, **given: Any) -> BaseModelOutput:
        name, first, states = cache_argument(self), 0, list[Tensor]()
        cache = given.pop(name, None)
        for backbone, count in zip(self._backbones, self._layers, strict=True):
            own = {}
            if cache is not None:
                own[name] = copy.copy(cache)
                own[name].layers = cache.layers[first : first + count]
            states.append(backbone(**given, **own).last_hidden_state)
            first += count
        return BaseModelOutput(last_hidden_state=torch.cat(states, dim=-1))


class _Heads(nn.Module):
    """The models' heads, and what is made of their logits."""

    def __init__(
        self, heads: Sequence[nn.Module], after: Sequence[AfterHead], combine: Combine
    ) -> None:
        super().__init__()
        self._heads, self._after, self._combine = list(heads), list(after), combine

    @property
    def weight(self) -> Tensor:
        """That of the first model."""
        return self._heads[0].weight  # type: ignore[return-value]

    def forward(self, states: Float[Tensor, "tokens all_hidden"]) -> Float[Tensor, "tokens vocab"]:
        parts = states.chunk(len(self._heads), dim=-1)
        first, *others = (
            after(head_logits(head, part.contiguous())).float()
            for head, after, part in zip(self._heads, self._after, parts, strict=True)
        )
        return self._combine(first, others)


class Joint(nn.Module):
    """Models as one; see above.

    Weights that models share are shared still. The settings are those of the first one.

    Args:
        models: The first leads; all have one tokenizer and states of one width.
        combine: What is made of their logits.

    Raises:
        ModelError: They do not fit each other.
    """

    def __init__(self, models: Sequence[Body], combine: Combine) -> None:
        super().__init__()
        first, *others = models
        for other in others:
            check_fits(first, other)
        self.leading = first.core
        self.others = nn.ModuleList([other.core for other in others])
        cores = [one.core for one in models]
        self.backbone = _Backbones(
            [
                core.get_submodule(one.anatomy.backbone)
                for one, core in zip(models, cores, strict=True)
            ],
            [len(empty_cache(core).layers) for core in cores],
        )
        self.head = _Heads(
            [core.get_output_embeddings() for core in cores],
            [one.after_head for one in models], combine,
        )  # fmt: skip
        self.generation_config = self.leading.generation_config
        self.train(self.leading.training)

    @property
    def models(self) -> tuple[Any, ...]:
        """The models, each by itself (see :func:`delible.lm.cores.cores_of`)."""
        return (self.leading, *self.others)

    @property
    def config(self) -> Any:
        return self.leading.config

    @property
    def dtype(self) -> torch.dtype:
        return self.leading.dtype  # type: ignore[no-any-return]

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def get_input_embeddings(self) -> nn.Module:
        return self.leading.get_input_embeddings()  # type: ignore[no-any-return]

    def prepare_inputs_for_generation(self, *given: Any, **named: Any) -> NoReturn:
        self.generate()

    def generate(self, *given: Any, **named: Any) -> NoReturn:
        """Refused: one of the models would answer for all.

        Raises:
            ModelError: Always.
        """
        raise ModelError(
            "several models that answer as one cannot be searched by the library's own generation.",
            hint="Ask for plain answers, or take what searches (beams) off.",
        )


def joint_anatomy(anatomy: Anatomy) -> Anatomy:
    """The anatomy of a :class:`Joint` whose first model has this one: blocks are that model's."""
    inside = f"{FIRST}."
    return replace(
        anatomy,
        backbone=TOGETHER,
        head=HEAD,
        blocks=inside + anatomy.blocks,
        norm=None if anatomy.norm is None else inside + anatomy.norm,
        embedding=inside + anatomy.embedding,
        parameters=tuple(
            {role: tuple(inside + name for name in names) for role, names in layer.items()}
            for layer in anatomy.parameters
        ),
    )


def check_fits(first: Body, other: Body) -> None:
    """Refuses models that do not read and say the same tokens.

    Raises:
        ModelError: Says what differs.
    """
    names = [getattr(one, "name", type(one.core).__name__) for one in (first, other)]
    where = f"{names[1]} beside {names[0]}"
    if first.vocabulary != other.vocabulary:
        raise ModelError(
            f"their vocabularies differ: {other.vocabulary} tokens beside {first.vocabulary}, so "
            "that their logits cannot be subtracted token by token.",
            where=where,
            hint="Both must be made of one model, with the same tokenizer and the same tokens "
            "added to it.",
        )
    words, others = first.tokenizer.get_vocab(), other.tokenizer.get_vocab()
    if words != others:
        apart = sorted(set(words.items()) ^ set(others.items()))[0]
        raise ModelError(
            f"their tokenizers differ (token {apart[1]}, {apart[0]!r}), so that logits of unlike "
            "tokens would be subtracted.",
            where=where,
            hint="Both must be made of one model, with the same tokenizer.",
        )
    if first.anatomy.hidden_size != other.anatomy.hidden_size:
        raise ModelError(
            f"their states differ in width: {other.anatomy.hidden_size} beside "
            f"{first.anatomy.hidden_size}.",
            where=where,
            hint="The second must be made of the first one's blocks.",
        )
    if "plain" in (first.road, other.road):
        raise ModelError(
            "the model does not answer in batches as it answers alone, and two such models cannot "
            "be asked as one.",
            where=where,
            hint="Choose a method that changes weights, or a guard.",
        )


__all__ = ["Combine", "Joint", "check_fits", "joint_anatomy"]
