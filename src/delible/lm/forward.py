"""One forward pass, only as much of it as is asked for.

Rows are padded on the right and no attention mask is passed: in a causal model padding on the
right cannot reach a real position, and attention keeps its fast path. The head is applied at
answer positions only, in chunks. The prefix that all rows of a batch share (a system prompt) is
computed once, through the key-value cache, gradients included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from delible.lm.attention import weights_read
from delible.lm.body import Body, shared_prefix
from delible.lm.cores import cores_of
from delible.lm.experts import router_path
from delible.lm.hooks import capture, truncated
from delible.lm.layout import beginning, padded_rows, told
from delible.lm.recompute import recomputed
from delible.lm.template import Encoded

#: Vocabulary entries that may be alive at once: answer positions x vocabulary.
HEAD_CHUNK_ELEMENTS = 64 * 1024 * 1024

#: Per-token values from logits: (logits [tokens, vocab] in fp32, targets [tokens]) -> [tokens]
TokenFunction = Callable[[Tensor, Tensor], Tensor]
#: What is read inside a block: its output (the block's index), what its MLP gives (``"mlp.3"``),
#: the logits of its router (``"router.3"``), or the weights of its attention (``"attention.3"``).
Inside = int | str


def block_of(what: Inside) -> int:
    """The block in which something is read."""
    return what if isinstance(what, int) else int(what.partition(".")[2])


@dataclass(frozen=True)
class Batch:
    """Rows as tensors, padded on the right.

    Attributes:
        ids: Token ids, shape [batch, sequence].
        lengths: Real tokens per row, shape [batch].
        starts: Index of the first answer token per row, shape [batch].
        prefix: Tokens at the start that all rows share and that precede every answer.
    """

    ids: Int[Tensor, "batch sequence"]
    lengths: Int[Tensor, " batch"]
    starts: Int[Tensor, " batch"]
    prefix: int

    @property
    def padding_share(self) -> float:
        """Share of the computed positions that are padding, in [0, 1]."""
        suffix = self.ids.shape[0] * (self.ids.shape[1] - self.prefix)
        real = int(self.lengths.sum()) - self.ids.shape[0] * self.prefix
        return 1.0 - real / max(suffix, 1)

    @property
    def answer_mask(self) -> Bool[Tensor, "batch answer"]:
        """Which entries of a [batch, answer] tensor are real answer tokens."""
        counts = self.lengths - self.starts
        return torch.arange(int(counts.max()), device=counts.device)[None] < counts[:, None]

    @property
    def position_mask(self) -> Bool[Tensor, "batch sequence"]:
        """Which positions are real tokens (prompt and answer)."""
        return torch.arange(self.ids.shape[1], device=self.ids.device)[None] < self.lengths[:, None]

    def predicting(
        self, states: Float[Tensor, "batch sequence hidden"], offset: int | None = None
    ) -> Float[Tensor, "tokens hidden"]:
        """States at the positions that predict an answer token.

        Args:
            offset: Position of the first state; None: they begin behind the prefix.
        """
        offset = self.prefix if offset is None else offset
        positions = torch.arange(offset, self.ids.shape[1], device=states.device)[None]
        wanted = (positions >= self.starts[:, None] - 1) & (positions < self.lengths[:, None] - 1)
        return states[wanted]

    def prompts(self) -> list[list[int]]:
        """Token ids before each answer."""
        rows = zip(self.ids.tolist(), self.starts.tolist(), strict=True)
        return [row[:start] for row, start in rows]

    @property
    def targets(self) -> Int[Tensor, " tokens"]:
        """Answer token ids of all rows, one after the other."""
        positions = torch.arange(self.ids.shape[1], device=self.ids.device)[None]
        return self.ids[(positions >= self.starts[:, None]) & (positions < self.lengths[:, None])]


def collate(rows: Sequence[Encoded], pad_id: int, device: torch.device | str) -> Batch:
    """Pads rows on the right and finds their shared prefix."""
    longest = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), longest), pad_id, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = torch.tensor(row.ids)
    # the answer's predecessor stays in the suffix
    prefix = shared_prefix([row.ids[: row.start] for row in rows])
    return Batch(
        ids.to(device),
        torch.tensor([len(row.ids) for row in rows], device=device),
        torch.tensor([row.start for row in rows], device=device),
        prefix,
    )


def prefix_cache(
    lm: Body, ids: Int[Tensor, "batch prefix"], prompt: Callable[[], Sequence[int]]
) -> Any:
    """The key-value cache of a prefix that all rows share, computed once, for every row.

    Args:
        ids: The prefix of each row.
        prompt: Gives the whole prompt of one of them.
    """
    cache: Any = empty_cache(lm.core)
    if ids.numel():
        fill_prefix(lm, cache, ids, prompt)
    return cache


def empty_cache(core: Any) -> DynamicCache:
    """A key-value cache with nothing in it; of several models as one: their layers in order."""
    cache, *others = (DynamicCache(config=one.config.get_text_config()) for one in cores_of(core))
    for other in others:
        cache.layers = [*cache.layers, *other.layers]
    return cache


def fill_prefix(
    lm: Body, cache: Any, ids: Int[Tensor, "batch prefix"], prompt: Callable[[], Sequence[int]]
) -> None:
    """Puts the keys and values of a prefix that all rows share into an empty cache."""
    backbone = lm.core.get_submodule(lm.anatomy.backbone)
    with told(lm, beginning(prompt, ids.device)):
        backbone(input_ids=ids[:1], use_cache=True, **{cache_argument(backbone): cache})
    cache.batch_repeat_interleave(ids.shape[0])


class Forward(nn.Module):
    """The model's body as one module, so that DDP and FSDP see every pass.

    Returns the final hidden states at the positions that predict answer tokens, shape
    [tokens, hidden], and what is read inside blocks: outputs of blocks and of their MLPs, each
    [batch, sequence, hidden], logits of routers [batch, sequence, experts], and weights of
    attention, each [batch, heads, sequence, sequence].
    """

    def __init__(self, lm: Body) -> None:
        super().__init__()
        self.model = lm.model
        self._lm = [lm]  # a list, so that the Body is not registered as a submodule

    def forward(
        self, batch: Batch, inside: tuple[Inside, ...] = (), final: bool = True
    ) -> tuple[Tensor | None, dict[Inside, Tensor]]:
        lm = self._lm[0]
        anatomy, core = lm.anatomy, lm.core
        backbone = core.get_submodule(anatomy.backbone)
        if not inside:
            batch = replace(batch, prefix=lm.alike(batch.prefix, batch.prompts))
            with recomputed(lm):
                return batch.predicting(_suffix_states(lm, backbone, batch)), {}
        weighed = [block_of(what) for what in inside if str(what).startswith("attention.")]
        paths = {
            what: anatomy.block_path(what)
            if isinstance(what, int)
            else anatomy.path(block_of(what), anatomy.mlp)
            if what.startswith("mlp.")
            else router_path(anatomy, block_of(what))
            for what in inside
            if isinstance(what, int) or what.startswith(("mlp.", "router."))
        }
        # hooks see the block's output before the final norm: the residual stream itself
        with (
            told(lm, padded_rows(batch.ids, batch.lengths, batch.starts)),
            nullcontext() if final else truncated(core, anatomy, max(map(block_of, inside)) + 1),
            capture(core, list(paths.values())) as seen,
            weights_read(lm, weighed) as weights,
            # another attention computes where its weights are read, for the time of the call alone
            nullcontext() if weighed else recomputed(lm),
        ):
            last = backbone(input_ids=batch.ids, use_cache=False).last_hidden_state
            # some families flatten batch and sequence before the MLP
            shape = (*batch.ids.shape, -1)
            states = {what: seen[path].reshape(shape) for what, path in paths.items()}
            states |= {f"attention.{layer}": weights[layer] for layer in weighed}
        if lm.sharded is not None:
            states = {
                what: lm.sharded.inside(value, anatomy.block(core, block_of(what)), last)
                if isinstance(what, str)
                else value
                for what, value in states.items()
            }
        return (batch.predicting(last, offset=0) if final else None), states


def _suffix_states(lm: Body, backbone: nn.Module, batch: Batch) -> Tensor:
    shared = batch.prefix if lm.shares_prefix else 0
    options: dict[str, Any] = {"use_cache": bool(shared)}
    if shared:
        options[cache_argument(backbone)] = prefix_cache(
            lm, batch.ids[:, :shared], lambda: batch.prompts()[0]
        )
    with told(lm, padded_rows(batch.ids, batch.lengths, batch.starts, shared)):
        states = backbone(input_ids=batch.ids[:, shared:], **options).last_hidden_state
    return states[:, batch.prefix - shared :]  # type: ignore[no-any-return]


def cache_argument(backbone: nn.Module) -> str:
    """What the installed transformers calls the argument that takes a key-value cache."""
    return "cache" if "cache" in arguments_of(backbone) else "past_key_values"


def arguments_of(backbone: nn.Module) -> Collection[str]:
    """What a backbone may be called with; of several models as one: what the first may."""
    kind: Any = type(getattr(backbone, "leading", backbone))
    return signature(kind.forward).parameters


def scatter(values: Tensor, mask: Bool[Tensor, "batch answer"]) -> Float[Tensor, "batch answer"]:
    """Per-token values [tokens] to [batch, answer], zero where there is no token."""
    out = values.new_zeros(mask.shape)
    out[mask] = values
    return out


def map_logits(
    head: Callable[[Tensor], Tensor],
    states: Float[Tensor, "tokens hidden"],
    targets: Int[Tensor, " tokens"],
    function: TokenFunction,
    vocabulary: int,
) -> Float[Tensor, " tokens"]:
    """Applies ``function`` to the logits of each token without keeping all of them.

    One chunk is computed as it is; several are recomputed in the backward pass, so that no more
    than one chunk of logits is ever alive.
    """

    def run(part: Tensor, wanted: Tensor) -> Tensor:
        return function(head(part).float(), wanted)

    size = max(1, HEAD_CHUNK_ELEMENTS // vocabulary)
    if len(states) <= size:
        return run(states, targets)
    pieces = zip(states.split(size), targets.split(size), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([run(part, wanted) for part, wanted in pieces])
    return torch.cat(
        [checkpoint(run, part, wanted, use_reentrant=False) for part, wanted in pieces]
    )


def target_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """log p(target), natural log, shape [tokens]."""
    return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(dim=1)


def complement_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """log(1 - p(target)), natural log, shape [tokens]; with all its digits wherever p lies.

    Above a half it is taken from the other tokens' logits: where p rounds to 1, log p has no
    digits left. Below, from log p: there the two sums would differ in their last digits only.
    """
    logprobs = target_logprobs(logits, targets)
    others = logits.scatter(1, targets[:, None], float("-inf")).logsumexp(dim=1)
    small = torch.log1p(-logprobs.clamp(max=-math.log(2)).exp())
    return torch.where(logprobs < -math.log(2), small, others - logits.logsumexp(dim=1))
