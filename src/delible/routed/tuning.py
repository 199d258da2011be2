"""A text encoder made more sensitive to one request, without an example of anything else (O3).

    L = sum_l mean_i ( - sum_j D_l[i, j] log D_l[i, j] ) + L_MLM
    D_l[i, j] = softmax_j( f_l(x*_i) . g_l(x_j) )

x* is a text in which 15 % of the tokens are masked, f the encoder that is trained (a low-rank
adapter on its queries, keys and values), g the encoder as it was, both the mean over the tokens of
the states of layer l. Minimising the entropy makes each masked text like few others.

Paper: arXiv 2407.10223. Deviations: padding is not averaged over (the released code pads every
text to the full length and averages it in, so that its features measure length); sentence encoders
come without the head of their masked-token training, so a token's score is the product of its state
with the embedding of the word; no dropout, so that a seed gives the same bits. ``contrast:
"positives"`` takes the row's own text for the right one (InfoNCE): the entropy alone does not say
which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from delible.errors import ModelError

Contrast = Literal["entropy", "positives"]
#: Share of the tokens that are hidden, and of these those that are masked or replaced.
HIDDEN, MASKED, REPLACED = 0.15, 0.8, 0.1
#: Last part of the names of the modules that make queries, keys and values in encoders.
_ATTENTION = ("query", "key", "value", "q_lin", "k_lin", "v_lin", "q_proj", "k_proj", "v_proj")

Tensors = Mapping[str, Tensor]


def contrastive_entropy(
    trained: Float[Tensor, "layer text hidden"], known: Float[Tensor, "layer text hidden"]
) -> Float[Tensor, ""]:
    """Sum over layers of the mean entropy of a text's likeness to all, in nats; at least 0."""
    logs = (trained @ known.transpose(1, 2)).log_softmax(dim=2)
    return -(logs.exp() * logs).sum(dim=2).mean(dim=1).sum()


def contrast_with_positives(
    trained: Float[Tensor, "layer text hidden"], known: Float[Tensor, "layer text hidden"]
) -> Float[Tensor, ""]:
    """The same with each text's own unmasked form as the right one (InfoNCE)."""
    logs = (trained @ known.transpose(1, 2)).log_softmax(dim=2)
    return -logs.diagonal(dim1=1, dim2=2).mean(dim=1).sum()


@dataclass(frozen=True)
class TunedBy:
    """How an encoder is tuned.

    Attributes:
        scale: alpha / rank.
    """

    epochs: int
    learning_rate: float
    rank: int
    scale: float
    batch_size: int
    contrast: Contrast
    warmup: float = 0.06
    weight_decay: float = 0.01


def hidden_tokens(
    ids: Int[Tensor, "text token"],
    may: Bool[Tensor, "text token"],
    mask_id: int,
    vocabulary: int,
    generator: torch.Generator,
) -> tuple[Int[Tensor, "text token"], Bool[Tensor, "text token"]]:
    """Texts with 15 % of their tokens hidden (80 % masked, 10 % another word), and which they are.

    At least one token of each text that may be hidden is.
    """
    draws = torch.rand(ids.shape, generator=generator).masked_fill(~may, 2.0)
    hidden = (draws < HIDDEN) | (draws == draws.min(dim=1, keepdim=True).values)
    hidden &= may
    kind = torch.rand(ids.shape, generator=generator)
    words = torch.randint(vocabulary, ids.shape, generator=generator)
    changed = torch.where(hidden & (kind < MASKED), torch.full_like(ids, mask_id), ids)
    swapped = hidden & (kind >= MASKED) & (kind < MASKED + REPLACED)
    return torch.where(swapped, words, changed), hidden


def attention_inputs(encoder: nn.Module) -> list[str]:
    """Paths of the linear layers that make queries, keys and values.

    Raises:
        ModelError: There are none of a known name.
    """
    found = [
        path
        for path, module in encoder.named_modules()
        if isinstance(module, nn.Linear) and path.rpartition(".")[2] in _ATTENTION
    ]
    if not found:
        raise ModelError(
            "its queries, keys and values cannot be found, so it cannot be tuned.",
            where=type(encoder).__name__,
            hint="Use it as it is (encoder_epochs=0).",
        )
    return found


@contextmanager
def wearing(encoder: nn.Module, tensors: Tensors, scale: float) -> Iterator[None]:
    """Within it an encoder has low-rank products: ``PATH.A`` and ``PATH.B`` by name."""
    handles = []

    def beside(path: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, given: tuple[Any, ...], output: Tensor) -> Tensor:
            down, up = tensors[f"{path}.A"], tensors[f"{path}.B"]
            return output + scale * (given[0] @ down.T @ up.T)

        return hook

    try:
        for path in dict.fromkeys(name.rpartition(".")[0] for name in tensors):
            handles.append(encoder.get_submodule(path).register_forward_hook(beside(path)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def pooled(
    states: Sequence[Float[Tensor, "text token hidden"]], mask: Int[Tensor, "text token"]
) -> Float[Tensor, "layer text hidden"]:
    """The mean over each text's own tokens of the states behind each layer, without padding."""
    weights = mask.unsqueeze(-1).float()
    sums = torch.stack([(one.float() * weights).sum(dim=1) for one in states])
    return sums / weights.sum(dim=1).clamp(min=1)


def tune(
    tokenizer: Any, encoder: nn.Module, texts: Sequence[str], longest: int, how: TunedBy,
    generator: torch.Generator,
) -> dict[str, Tensor]:  # fmt: skip
    """Low-rank products for an encoder, trained on the texts of a request alone.

    Args:
        texts: In their order; a last batch that is not full is left out, unless it is the only one.
        longest: Tokens that the encoder reads of a text.
        generator: Of all random numbers, on the CPU.
    """
    tensors = dict[str, Tensor]()
    for path in attention_inputs(encoder):
        outer, inner = encoder.get_submodule(path).weight.shape  # type: ignore[misc]
        bound = inner**-0.5  # as PEFT draws it
        drawn = torch.rand(how.rank, inner, generator=generator)  # type: ignore[arg-type]
        tensors[f"{path}.A"] = ((2 * drawn - 1) * bound).requires_grad_()
        tensors[f"{path}.B"] = torch.zeros(outer, how.rank, requires_grad=True)  # type: ignore[arg-type]
    full = max(1, len(texts) // how.batch_size)
    batches = [
        texts[start * how.batch_size : (start + 1) * how.batch_size] for start in range(full)
    ]
    total = full * how.epochs
    optimizer = torch.optim.AdamW(
        list(tensors.values()), lr=how.learning_rate, weight_decay=how.weight_decay
    )
    warm = max(1, round(how.warmup * total))
    contrast = contrastive_entropy if how.contrast == "entropy" else contrast_with_positives
    words = encoder.get_input_embeddings().weight.detach()  # type: ignore[operator]
    for step in range(total):
        chosen = list(batches[step % full])
        batch = tokenizer(
            chosen, truncation=True, max_length=longest, padding=True, return_tensors="pt",
            return_special_tokens_mask=True,
        )  # fmt: skip
        special = batch.pop("special_tokens_mask").bool()
        mask = batch["attention_mask"]
        may = mask.bool() & ~special
        changed, hidden = hidden_tokens(
            batch["input_ids"], may, _mask_id(tokenizer), len(tokenizer), generator
        )
        with torch.no_grad():
            known = pooled(_states(encoder, batch), mask)
        with wearing(encoder, tensors, how.scale):
            states = _states(encoder, {**batch, "input_ids": changed})
        loss = contrast(pooled(states, mask), known)
        if bool(hidden.any()):
            scores = states[-1][hidden] @ words.T
            loss = loss + nn.functional.cross_entropy(scores, batch["input_ids"][hidden])
        for group in optimizer.param_groups:
            rest = (total - step) / max(1, total - warm)
            group["lr"] = how.learning_rate * min((step + 1) / warm, rest, 1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: one.detach().contiguous() for name, one in tensors.items()}


def _states(encoder: nn.Module, batch: Mapping[str, Tensor]) -> Sequence[Tensor]:
    found: Sequence[Tensor] = encoder(**batch, output_hidden_states=True).hidden_states
    return found


def _mask_id(tokenizer: Any) -> int:
    if tokenizer.mask_token_id is None:
        raise ModelError(
            "its tokenizer has no token for what is masked, so it cannot be tuned.",
            where="the sentence encoder",
            hint="Use it as it is (encoder_epochs=0).",
        )
    return int(tokenizer.mask_token_id)


__all__ = ["TunedBy", "contrast_with_positives", "contrastive_entropy", "pooled", "tune", "wearing"]
