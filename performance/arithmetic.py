"""What an assistant adds to the time of an answer: `python performance/arithmetic.py`.

Both systems answer the same questions in turn, in one run; the share that the assistant's blocks
and head have of the model's multiplications is what it may add, and a tenth more.
"""

from __future__ import annotations

import argparse
import statistics
import time

from delible.lm.lm import LM
from delible.lm.shortened import shortened
from delible.system.asks import Decoding, Prompt
from delible.system.base import System
from delible.systems.arithmetic import Assistant, Subtraction, cost_share, together
from delible.testing.tiny import tiny_model, tiny_tokenizer

#: Beyond the share of its blocks and head.
MORE = 0.10


def assistant_costs(
    lm: LM, layers: int = 8, *, rows: int = 16, tokens: int = 16, rounds: int = 3
) -> dict[str, float]:
    """Time of answers with an assistant as a share of those without, and what it may be.

    The adapter is a fresh one of rank 32 on every linear layer, as ULD trains it.

    Args:
        lm: The model.
        layers: Blocks of the assistant.
        rows: Questions that are answered together.
        tokens: Of each answer.
        rounds: Of both systems, in turn; the median counts.

    Returns:
        ``ratio``, ``share`` (of multiplications) and ``bound`` (1 + share + a tenth).
    """
    from peft import LoraConfig, get_peft_model
    from torch import nn

    small = shortened(lm, layers, "assistant")
    inside = f"{small.anatomy.blocks}."
    paths = [
        name for name, module in small.core.named_modules()
        if name.startswith(inside) and isinstance(module, nn.Linear)
    ]  # fmt: skip
    settings = LoraConfig(r=32, lora_alpha=32, target_modules=paths, task_type="CAUSAL_LM")
    small.wear(get_peft_model(small.core, settings).eval())
    joint = together(lm, [Assistant(small, Subtraction())])
    prompts = [Prompt.ask(f"Tell me something about the number {place}.") for place in range(rows)]

    def seconds(system: System) -> float:
        began = time.perf_counter()
        system.generate(prompts, Decoding(tokens))
        return time.perf_counter() - began

    for system in (lm, joint):
        system.generate(prompts[:2], Decoding(2))
    taken = [(seconds(lm), seconds(joint)) for _ in range(rounds)]
    ratio = statistics.median(with_it / plain for plain, with_it in taken)
    share = cost_share(lm, layers)
    return {"ratio": ratio, "share": share, "bound": 1 + share + MORE}


def as_wide_as_default(blocks: int = 12) -> LM:
    """A random model with the width, heads and vocabulary of the default one."""
    model = tiny_model(
        "llama", vocab_size=49152, hidden_size=576, intermediate_size=1536,
        num_hidden_layers=blocks, num_attention_heads=9, num_key_value_heads=3, head_dim=64,
    )  # fmt: skip
    return LM(model, tiny_tokenizer(), precision="float32")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="default: a random one, as wide as 'default', of 12 blocks")
    parser.add_argument("--layers", type=int, default=3)
    given = parser.parse_args()
    chosen = LM.load(given.model) if given.model else as_wide_as_default()
    for name, value in assistant_costs(chosen, given.layers).items():
        print(f"{name} {value:.3f}")
