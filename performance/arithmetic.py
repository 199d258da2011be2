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

#: Beyond the share of its blocks and head.
MORE = 0.10


def assistant_costs(
    model: str = "default", layers: int = 8, *, rows: int = 16, tokens: int = 32, rounds: int = 3
) -> dict[str, float]:
    """Time of answers with an assistant as a share of those without, and what it may be.

    The adapter is a fresh one of rank 32 on every linear layer, as ULD trains it.

    Args:
        model: Name or folder.
        layers: Blocks of the assistant.
        rows: Questions that are answered together.
        tokens: Of each answer.
        rounds: Of both systems, in turn; the median counts.

    Returns:
        ``ratio``, ``share`` (of multiplications) and ``bound`` (1 + share + a tenth).
    """
    from peft import LoraConfig, get_peft_model
    from torch import nn

    lm = LM.load(model)
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="default")
    parser.add_argument("--layers", type=int, default=8)
    given = parser.parse_args()
    for name, value in assistant_costs(given.model, given.layers).items():
        print(f"{name} {value:.3f}")
