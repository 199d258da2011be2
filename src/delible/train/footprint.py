"""Bytes of a training run by part: sums over tensors, and what one pass holds.

Weights, gradients, moments and reference values are sums over tensors; the pass is followed on
tensors without numbers (:mod:`delible.train.simulated`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from delible.lm.body import widest
from delible.lm.held import held_bytes, is_packed
from delible.lm.lm import LM
from delible.lm.template import Encoded
from delible.train.optimizers import BLOCK, LEAST_PACKED
from delible.train.recipe import Recipe, Training
from delible.train.row import Row

#: What a processor keeps of each different matrix product in bf16, for which oneDNN compiles a
#: kernel: measured as what resident memory loses without its cache, by kernel (AMX, oneDNN 3).
KERNEL_BYTES = 2**19
#: Kernels that it keeps (ONEDNN_PRIMITIVE_CACHE_CAPACITY).
KERNELS = 1024
#: What AdamW in 8 bits holds for each weight of a tensor while it is updated without a compiler:
#: indices of 8 bytes into the table of levels, and values beside them. Measured (torchao 0.18).
UPDATE_BYTES = 53


@dataclass(frozen=True)
class Memory:
    """Bytes by part.

    Attributes:
        weights: The model with its adapter, and copies of it that a finisher needs.
        gradients: Of all that moves.
        optimiser: Moments.
        activations: What one pass keeps for its backward pass, weights in bf16 included where
            they are converted.
        reference: Values of the reference model, with a frozen head where one is needed.
        masks: One byte per weight that is masked.
        cache: Keys and values while answers are generated, before and after training.
        kernels: Compiled products, on a processor that computes in bf16.
        passing: The most that one pass holds at one time, with the gradients that are there then.
        update: The most that the optimiser holds for its update beside gradients and moments.
    """

    weights: int
    gradients: int
    optimiser: int
    activations: int
    reference: int
    masks: int
    cache: int
    kernels: int
    passing: int
    update: int

    @property
    def peak(self) -> int:
        """The most at one time: in a pass, in the optimiser's update, or while answering."""
        kept = self.optimiser + self.reference + self.masks
        training = kept + max(self.passing, self.gradients + self.update)
        return self.weights + self.kernels + max(training, self.cache)

    def parts(self) -> dict[str, int]:
        """The parts that people are shown, by name."""
        shown = [one.name for one in fields(self) if one.name not in ("passing", "update")]
        return {name: getattr(self, name) for name in shown}


def reference_bytes(lm: LM, rows: Mapping[str, Sequence[Row]], kinds: Mapping[str, Any]) -> int:
    """Bytes of the reference values of rows, by role, and of the frozen head.

    Args:
        kinds: Kinds of values by role, as a loss names them (:class:`Reference`).
    """
    sizes: dict[str, int] = {}
    head = False
    for role, wanted in kinds.items():
        for kind in set(wanted):
            plain, _, context = kind.partition("@")
            head |= plain == "answers"
            for row in rows.get(role, ()):
                read = row.behind(context)
                if read is not None:
                    sizes[f"{kind}/{row.key}"] = _value_bytes(lm, plain, read)
    frozen = lm.core.get_output_embeddings()
    own = sum(one.numel() * one.element_size() for one in frozen.parameters()) if head else 0
    return sum(sizes.values()) + own


def _value_bytes(lm: LM, kind: str, row: Encoded) -> int:
    tokens, width = len(row.ids), lm.anatomy.hidden_size
    if kind == "logprobs":
        return 4 * row.answer_tokens
    if kind == "answers":
        return 4 * row.answer_tokens * width
    if kind.startswith("attention."):
        heads = widest(_settings(lm), "num_attention_heads") or 1
        return 2 * heads * (tokens * (tokens + 1) // 2)
    return 4 * tokens * width


def cache_bytes(lm: LM, rows: int, tokens: int) -> int:
    """Bytes of keys and values of so many rows of so many tokens."""
    settings = _settings(lm)
    heads = widest(settings, "num_attention_heads") or 1
    key_heads = widest(settings, "num_key_value_heads") or heads
    width = widest(settings, "head_dim") or lm.anatomy.hidden_size // heads
    each = 2 if lm.precision == "bfloat16" else 4
    return 2 * each * lm.anatomy.layers * key_heads * width * rows * tokens


def optimiser_bytes(recipe: Recipe, moving: Iterable[Tensor]) -> int:
    """Bytes of the moments on the device, and of a count for each tensor."""
    if recipe.training.optimizer == "sgd":
        return 0
    resting = recipe.training.offload_optimizer
    return sum(4 + (0 if resting else _moments(recipe.training, one)) for one in moving)


def update_bytes(recipe: Recipe, moving: Iterable[Tensor], device_type: str) -> int:
    """Bytes that come on top while the largest tensor is updated.

    AdamW is fused and needs none; one in 8 bits that no compiler has fused makes some; moments
    that rest elsewhere come for their update.
    """
    training, largest = recipe.training, max(moving, key=lambda one: one.numel())
    if training.optimizer == "sgd":
        return 4 * largest.numel()
    found = _moments(training, largest) if training.offload_optimizer else 0
    if training.optimizer == "adamw_8bit" and device_type == "cpu":
        found += UPDATE_BYTES * largest.numel()
    return found


def _moments(training: Training, one: Tensor) -> int:
    """Bytes of both moments: fp32, or a byte each with a scale for each block and two tables."""
    count = one.numel()
    packs = training.optimizer == "adamw_8bit" and count >= LEAST_PACKED and not count % BLOCK
    return 2 * (count + 4 * (count // BLOCK) + 4 * 256) if packs else 8 * count


def weights_bytes(lm: LM, recipe: Recipe) -> int:
    """Bytes of the model as it is held, and of a second one where a finisher needs it."""
    held = recipe.training.base_precision
    packed = any(is_packed(one) for one in lm.model.parameters())
    own = held_bytes(lm.model, lm.core, lm.anatomy, "float32" if packed else held)
    if recipe.finish.needs_start:
        return 2 * own
    if recipe.finish.card.changes == "weights" and held != "float32":
        return 4 * sum(one.numel() for one in lm.core.parameters())  # merged in fp32
    return own


def _settings(lm: LM) -> Any:
    return lm.core.config.get_text_config()
