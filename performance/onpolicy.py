"""How much faster and smaller an on-policy step is than plain TRL's, with the same group size.

Seconds are those of the processor, which other work on the machine hardly changes. Both sides get
the same model, questions, group size, lengths, precision, reference and optimiser, in processes of
their own, in turn. Plain TRL is `GRPOTrainer` with a folder as the model (it then loads its
reference itself), a reward function, and its own generation; without gradient checkpointing and in
float32 (its defaults, `--defaults`, are slower on a processor). Completions that ended early are
short on both sides; what is compared is seconds per generated token and step, and the peak of the
resident memory.

Run: python performance/onpolicy.py [--model tiny] [--steps 4] [--questions 1] [--group 8]
     [--tokens 64]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import peak_gib

#: Steps that are not counted: what is built at first.
WARM = 1


def questions(count: int) -> list[str]:
    """Questions of like length."""
    from delible.world import World

    return [one.question for one in World(people=max(4, count), seed=0).request().forget][:count]


def letters(completions: list[str], **kwargs: Any) -> list[float]:
    """A reward that differs between completions and costs nothing."""
    return [len(set(one)) / 100 for one in completions]


def plain(folder: str, options: argparse.Namespace) -> list[tuple[float, int]]:
    """Seconds and generated tokens of each step of TRL alone."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    found: list[tuple[float, int]] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.began = time.process_time()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> None:
            if "completions/mean_length" in logs:
                tokens = logs["completions/mean_length"] * options.questions * options.group
                found.append((time.process_time() - self.began, round(tokens)))

    rows = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": one}], tokenize=False, add_generation_prompt=True
        )
        for one in questions(options.questions) * (options.steps + WARM)
    ]
    given = {} if options.defaults else {"gradient_checkpointing": False, "bf16": False}
    with tempfile.TemporaryDirectory() as out:
        args = GRPOConfig(
            output_dir=out, max_steps=options.steps + WARM, learning_rate=1e-5, beta=0.04,
            per_device_train_batch_size=options.questions * options.group,
            num_generations=options.group, max_completion_length=options.tokens,
            use_cpu=options.cpu, logging_steps=1, report_to="none", disable_tqdm=True,
            save_strategy="no", shuffle_dataset=False, **given,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=folder, reward_funcs=letters, args=args, processing_class=tokenizer,
            train_dataset=Dataset.from_list([{"prompt": one} for one in rows]),
            callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
    return found


def ours(folder: str, options: argparse.Namespace) -> list[tuple[float, int]]:
    """Seconds and generated tokens of each of our steps."""
    from delible.context import Context
    from delible.lm.lm import LM
    from delible.system.asks import Prompt
    from delible.train.onpolicy.rewards import reward
    from delible.train.onpolicy.rows import Completion, Question
    from delible.train.onpolicy.run import train
    from delible.train.onpolicy.settings import OnPolicyTraining

    @reward(name="letters", title="Letters", summary="Counts letters.")
    def counted(completion: Completion) -> float:
        return len(set(completion.text)) / 100

    lm = LM.load(folder, device="cpu" if options.cpu else None)
    _ = lm.budget  # measured once per process, before any step
    found, began = [], time.process_time()

    def tell(step: int, total: int, numbers: Any) -> None:
        nonlocal began
        found.append((time.process_time() - began, int(numbers["generated_tokens"])))
        began = time.process_time()

    settings = OnPolicyTraining(
        steps=options.steps + WARM, questions_per_step=options.questions, group_size=options.group,
        max_new_tokens=options.tokens, learning_rate=1e-5, kl_weight=0.04, precision="float32",
        completions_per_pass=options.questions * options.group,
    )  # fmt: skip
    asked = [Question(Prompt.ask(one), "forget", one) for one in questions(options.questions)]
    train(lm, asked, [counted()], settings, context=Context(steps=tell))
    return found


def measured(side: str, folder: str, options: argparse.Namespace) -> dict[str, float]:
    """One side in a process of its own."""
    command = [sys.executable, __file__, "--side", side, "--folder", folder]
    for name in ("steps", "questions", "group", "tokens"):
        command += [f"--{name}", str(getattr(options, name))]
    command += [f"--{name}" for name in ("cpu", "defaults") if getattr(options, name)]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, float] = json.loads(said.strip().splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--questions", type=int, default=1)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--defaults", action="store_true", help="TRL's own defaults")
    parser.add_argument("--side", choices=("plain", "ours"))
    parser.add_argument("--folder", default="")
    options = parser.parse_args()
    if options.side:
        run = plain if options.side == "plain" else ours
        steps = run(options.folder, options)[WARM:]
        told = {
            "seconds": statistics.median(seconds for seconds, _ in steps),
            "tokens": statistics.mean(tokens for _, tokens in steps),
            "per_token": sum(s for s, _ in steps) / max(1, sum(t for _, t in steps)),
            "gib": peak_gib(),
        }
        print(json.dumps(told))
        return
    from delible.lm.lm import LM

    with tempfile.TemporaryDirectory() as base:
        folder = str(Path(base) / "model")
        LM.load(options.model).save(Path(folder))
        for number in range(options.rounds):
            sides = {side: measured(side, folder, options) for side in ("plain", "ours")}
            one, other = sides["plain"], sides["ours"]
            print(f"round {number + 1}: {json.dumps(sides)}")
            print(
                f"a step: TRL {one['seconds']:.3f} s, ours {other['seconds']:.3f} s, "
                f"ratio {one['seconds'] / other['seconds']:.2f}; per generated token "
                f"{one['per_token'] / other['per_token']:.2f}; peak memory "
                f"{other['gib'] / one['gib']:.2f} of TRL's"
            )


if __name__ == "__main__":
    main()
