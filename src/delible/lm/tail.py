"""What a model says of any hidden state: its own final norm and head on it (the logit lens).

The state goes in where the last block's output does, and the model's own code does the rest, so
that whatever stands between the last block and the head (a norm, a projection, a limit) is there.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from delible.lm.body import Body
from delible.lm.forward import HEAD_CHUNK_ELEMENTS
from delible.lm.hooks import steer, truncated
from delible.lm.layout import padded_rows, told

#: States that go through the end of a model at once.
TOGETHER = 128


@torch.no_grad()
def lens_logits(
    lm: Body, states: Float[Tensor, "token hidden"]
) -> Iterator[Float[Tensor, "part vocab"]]:
    """The model's logits, in fp32 on its device, for states of the residual stream; in parts."""
    lm = lm.leading  # an assistant beside it reads texts, not states
    anatomy = lm.anatomy
    backbone = lm.core.get_submodule(anatomy.backbone)
    size = max(1, min(TOGETHER, lm.template.max_length, HEAD_CHUNK_ELEMENTS // lm.vocabulary))
    for part in states.split(size):
        ids = torch.zeros(1, len(part), dtype=torch.long, device=lm.device)
        length = torch.tensor([len(part)], device=lm.device)

        def instead(old: Tensor, part: Tensor = part) -> Tensor:
            return part[None].to(old)

        with (
            lm.evaluating(),
            told(lm, padded_rows(ids, length, length)),
            truncated(lm.core, anatomy, 1),
            steer(lm.core, anatomy.block_path(0), instead),
        ):
            final = backbone(input_ids=ids, use_cache=False).last_hidden_state[0]
        yield lm.head(final).float()


def lens_logprobs(
    lm: Body, states: Float[Tensor, "token hidden"], targets: Int[Tensor, " token"]
) -> Float[Tensor, " token"]:
    """log p(target) that the model reads from each state, natural log, on the CPU."""
    found, start = [], 0
    for logits in lens_logits(lm, states):
        wanted = targets[start : start + len(logits)].to(logits.device)
        found.append((logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(dim=1)).cpu())
        start += len(logits)
    return torch.cat(found) if found else torch.zeros(0)
