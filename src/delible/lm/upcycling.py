"""A dense model as a mixture of experts: its MLP copied, behind a router that means nothing yet.

Every expert gives what the MLP gave, and the weights of the chosen ones sum to 1, so the mixture
answers as the dense model does, whatever the router says. Then experts can be taught different
things. (Komatsuzaki et al. 2022, arXiv 2212.05055; the form is Mixtral's.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from delible.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Spread of a new router's weights.
SPREAD = 0.02
#: Settings that both kinds of model have.
_SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps",
    "rope_parameters", "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip


def upcycled(model: PreTrainedModel, experts: int, top: int, seed: int) -> PreTrainedModel:
    """The mixture, fp32 on the CPU, in evaluation mode; the dense model stays as it is.

    Args:
        model: A Llama without biases.
        experts: Copies of each MLP, 2 or more.
        top: How many of them each token has.
        seed: Of the routers' weights.

    Raises:
        ModelError: Another kind of model.
    """
    from transformers import MixtralConfig, MixtralForCausalLM

    config: Any = model.config
    biased = [name for name, _ in model.named_parameters() if name.endswith(".bias")]
    if config.model_type != "llama" or biased:
        raise ModelError(
            f"only a Llama without biases can become a Mixtral, not a {config.model_type}.",
            where=type(model).__name__,
        )
    shared = {name: getattr(config, name) for name in _SHARED if hasattr(config, name)}
    wanted = MixtralConfig(
        **shared, num_local_experts=experts, num_experts_per_tok=top, sliding_window=None,
        router_aux_loss_coef=0.0, output_router_logits=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        mixture = MixtralForCausalLM(wanted).float()
        dense = dict(model.named_parameters())
        for name, value in mixture.named_parameters():
            if name.endswith(".mlp.gate.weight"):
                value.normal_(0.0, SPREAD)
            elif name.endswith(".experts.gate_up_proj"):
                parts = [dense[f"{name.removesuffix('experts.gate_up_proj')}{one}_proj.weight"]
                         for one in ("gate", "up")]  # fmt: skip
                value.copy_(torch.cat(parts).expand_as(value))
            elif name.endswith(".experts.down_proj"):
                source = f"{name.removesuffix('experts.down_proj')}down_proj.weight"
                value.copy_(dense[source].expand_as(value))
            else:
                value.copy_(dense[name])
    mixture.generation_config = model.generation_config
    return mixture.eval()


@torch.no_grad()
def difference(
    one: PreTrainedModel, other: PreTrainedModel, rows: Sequence[Sequence[int]]
) -> float:
    """Largest difference of two models' logits on some texts."""
    apart = 0.0
    for row in rows:
        ids = torch.tensor([list(row)])
        both = [model(input_ids=ids, use_cache=False).logits for model in (one, other)]
        apart = max(apart, float((both[0] - both[1]).abs().max()))
    return apart
