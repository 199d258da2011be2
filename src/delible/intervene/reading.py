"""Reading activations at a site: of given texts, or while a model is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor

from delible.intervene.sites import Positions, Site
from delible.intervene.taps import Tap, Taps, Where
from delible.lm.forward import collate
from delible.lm.hooks import truncated
from delible.lm.layout import current_layout, padded_rows, told
from delible.lm.lm import LM
from delible.lm.template import Encoded

#: What is told of each piece of states [token, width] that passes a site.
Observer = Callable[[Float[Tensor, "token width"], Where], None]


@torch.no_grad()
def read(
    lm: LM, rows: Sequence[Encoded], site: Site, positions: Positions | None = None
) -> Iterator[tuple[int, dict[int | None, Float[Tensor, "token width"]]]]:
    """The states of texts at a site, text by text, in fp32 on the model's device.

    Interventions on the model act; no text shares a computation with another.

    Args:
        lm: The model.
        rows: Prompts with their answers, tokenized (``lm.template.encode``). Prompts without
            answers are rows whose answer is the end alone.
        site: Where.
        positions: Of which tokens, in their order; None: all.

    Yields:
        Place in ``rows``, and by layer (None for what a model has once) the states. The longest
        texts come first.

    Raises:
        ModelError: The model lacks the site.
    """
    positions = positions or Positions()
    places = site.places(lm)
    deepest = max((place.layer for place in places if place.layer is not None), default=None)
    whole = site.what == "norm" or deepest is None
    backbone = lm.core.get_submodule(lm.anatomy.backbone)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].ids), reverse=True)
    for indices in lm.batches(order, [len(row.ids) for row in rows]):
        batch = collate([rows[index] for index in indices], lm.pad_id, lm.device)
        seen: dict[int | None, Tensor] = {}
        chosen = torch.empty(0)

        def keep(states: Tensor, where: Where, seen: dict[int | None, Tensor] = seen) -> None:
            seen[where.layer] = states.float().clone()

        # made before blocks are cut off: a depth is one of the whole model
        taps = Taps(lm, [Tap(site, Positions(), keep)])
        with (
            lm.evaluating(),
            lm.computing(),
            told(lm, padded_rows(batch.ids, batch.lengths, batch.starts)),
            nullcontext() if whole else truncated(lm.core, lm.anatomy, (deepest or 0) + 1),
            taps.on(first=False),
        ):
            backbone(input_ids=batch.ids, use_cache=False)
            layout = current_layout(batch.ids.numel())
            if layout is not None:
                chosen = positions.chosen(lm, layout)
        shape = (*batch.ids.shape, -1)
        for row, index in enumerate(indices):
            yield (
                index,
                {layer: states.reshape(shape)[row][chosen[row]] for layer, states in seen.items()},
            )


@contextmanager
def watching(
    lm: LM, site: Site, observer: Observer, positions: Positions | None = None
) -> Iterator[None]:
    """Within it an observer sees what passes a site, on whatever road the model is asked.

    Tokens that texts share (a beginning, the nodes of a tree) are seen once; ``where.text`` and
    ``where.layout.prompts`` say whose they are. It sees what interventions have made of them.

    Args:
        lm: The model; nobody else should ask it meanwhile.
        site: Where.
        observer: Called with the states, which it must leave as they are.
        positions: Of which tokens; None: all (padding among them).
    """
    with Taps(lm, [Tap(site, positions or Positions(), observer)]).on(first=False):
        yield
