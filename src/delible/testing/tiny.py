"""Random models of a few thousand weights, one per architecture family, and a tokenizer.

They are built in memory from configuration classes: no download, a few milliseconds each. A
component that works on every family here meets every layout delible knows: fused and separate
attention matrices, transposed matrices, blocks without an MLP module, projected embeddings and
mixtures of experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from delible.errors import ModelError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

PAD, END_OF_TEXT, TURN_START, TURN_END = "<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (PAD, END_OF_TEXT, TURN_START, TURN_END)

#: The 256 bytes and the special tokens: the vocabulary of :func:`tiny_tokenizer`.
VOCABULARY_SIZE = 256 + len(SPECIAL_TOKENS)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}

#: Family name -> (transformers model type, configuration).
_CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _COMMON),
    "mistral": ("mistral", {**_COMMON, "sliding_window": 64}),
    "qwen2": ("qwen2", _COMMON),
    "qwen3": ("qwen3", _COMMON),
    "gemma2": ("gemma2", {**_COMMON, "query_pre_attn_scalar": 8, "sliding_window": 64}),
    "gemma3": ("gemma3_text", {**_COMMON, "query_pre_attn_scalar": 8, "sliding_window": 64}),
    "phi3": ("phi3", _COMMON),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 512}),
    "gpt_neox": ("gpt_neox", _COMMON),
    "opt": ("opt", {**_COMMON, "ffn_dim": 48, "word_embed_proj_dim": 16}),
    "mixtral": ("mixtral", {**_COMMON, **_EXPERTS, "num_local_experts": 4}),
    "qwen2_moe": (
        "qwen2_moe",
        {**_COMMON, **_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 24},
    ),
    "qwen3_moe": ("qwen3_moe", {**_COMMON, **_EXPERTS, "num_experts": 4}),
}

#: Names that :func:`tiny_model` knows.
FAMILIES = tuple(_CONFIGURATIONS)


def tiny_model(
    family: str = "llama", seed: int = 0, vocab_size: int = VOCABULARY_SIZE, **changes: Any
) -> PreTrainedModel:
    """A random causal language model in evaluation mode: hidden size 32, three blocks, fp32.

    Args:
        family: One of :data:`FAMILIES`.
        seed: Seed of the weights; the global random state is left as it was.
        vocab_size: Number of tokens; the default is that of :func:`tiny_tokenizer`.
        changes: Fields of the family's configuration to set differently.

    Raises:
        ModelError: An unknown family.
    """
    if family not in _CONFIGURATIONS:
        raise ModelError(f"unknown family '{family}'.", hint=nearest(family, FAMILIES))
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, values = _CONFIGURATIONS[family]
    special: dict[str, int | None] = {
        "pad_token_id": 256 + SPECIAL_TOKENS.index(PAD),
        "bos_token_id": 256 + SPECIAL_TOKENS.index(TURN_START),
        "eos_token_id": 256 + SPECIAL_TOKENS.index(TURN_END),
    }
    if vocab_size < VOCABULARY_SIZE:
        special = dict.fromkeys(special)
    config = AutoConfig.for_model(
        model_type, **{**values, **special, "vocab_size": vocab_size, **changes}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            # The libraries' initial values (0.02 and zero biases) give nearly uniform answers;
            # a wider spread makes the tests of losses and of generation say something.
            for parameter in model.parameters():
                spread = 0.2 if parameter.dim() > 1 else 0.02
                parameter.add_(torch.randn_like(parameter) * spread)
    return model.eval()  # type: ignore[no-any-return]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, four special tokens and a chat template in the style of ChatML.

    Any text is encoded and decoded without loss. The end of a turn is the end-of-sequence token;
    padding has a token of its own.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=TURN_START,
        eos_token=TURN_END,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
