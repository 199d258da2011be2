"""How much faster and smaller training is than the straightforward loop of the field.

Both sides get the same model, rows, losses, optimiser steps and batch composition, in the same
process, in turn. The straightforward loop does what published trainers do: a second, frozen copy
of the model is resident; forget and retain rows are padded to the longest row and go through the
model separately; logits are computed at every position; the default AdamW steps.

Run: python benchmarks/training.py [--steps 4] [--rows 16] [--markdown docs/performance.md]

``--costs`` measures something else: what every method's optimiser step costs relative to plain
fine-tuning on as many tokens, and what it does before its first step (attribution, masks,
generated rows). Each method runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from memory import forget_peak, peak_gib
from torch import Tensor

from delible import registry
from delible.lm.lm import LM
from delible.lm.precision import matmul_rate
from delible.records import QA
from delible.train.engine import Plan, Trainer, make_plan
from delible.train.estimate import body_parameters
from delible.train.recipe import Recipe
from delible.train.rows import make_rows
from delible.train.slots import Context
from delible.train.step import Row
from delible.world import World

METHODS = {
    "npo": ("NPO + NLL", 1.5),
    "graddiff_kl": ("GradDiff + KL", 2.5),
    "rmu": ("RMU", 4.0),
}
LEARNING_RATE = 1e-5


def data(rows: int) -> tuple[list[QA], list[QA]]:
    """Forget and retain rows of mixed length from a world."""
    world = World(people=40, seed=0, answers="sentence")
    split = world.split(forget=4)
    forget, retain = split.records("forget"), split.records("retain")
    return list(forget[:rows]), list(retain[: 4 * rows])  # type: ignore[arg-type]


def recipe(method: str, steps: int, rows: int) -> Recipe:
    options = {
        "learning_rate": LEARNING_RATE,
        "epochs": steps,
        "max_steps": steps,
        "batch_size": rows,
        "weight_decay": 0.0,
    }
    return Recipe.named(method).changed({}, {f"training.{k}": v for k, v in options.items()})


# ---- the straightforward loop


def pad(rows: Sequence[Row], pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention mask and labels (-100 outside the answer), padded to the longest row."""
    longest = max(len(row.encoded.ids) for row in rows)
    ids = torch.full((len(rows), longest), pad_id)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        n, start = len(row.encoded.ids), row.encoded.start
        ids[i, :n] = torch.tensor(row.encoded.ids)
        mask[i, :n] = 1
        labels[i, start:n] = ids[i, start:n]
    return ids, mask, labels


def sequence_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed answer loss of each row, from full logits."""
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2).float(), labels[:, 1:], ignore_index=-100, reduction="none"
    )
    return loss.sum(1)


def mean_nll(logits: Tensor, labels: Tensor) -> Tensor:
    return sequence_nll(logits, labels).sum() / (labels[:, 1:] != -100).sum()


def straightforward(
    lm: LM, method: str, plan: Plan, forget: Sequence[Row], retain: Sequence[Row], chosen: Recipe
) -> Iterator[float]:
    """One optimiser step per item; yields the loss."""
    model = lm.model
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    objective = chosen.objective
    if method == "rmu":
        layer = objective.reads(lm)[0]
        names = set(
            chosen.place.apply(
                Trainer(lm, chosen, {"forget": FORGET, "retain": RETAIN}).rows()
            ).parameters
        )
        vector = torch.rand(lm.anatomy.hidden_size)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(
        [p for n, p in model.named_parameters() if method != "rmu" or n in names],
        lr=LEARNING_RATE, weight_decay=0.0,
    )  # fmt: skip
    for step in plan.steps:
        f_ids, f_mask, f_labels = pad([forget[i] for i, _ in step], lm.pad_id)
        r_ids, r_mask, r_labels = pad([retain[j] for _, j in step if j is not None], lm.pad_id)
        with lm.computing():
            if method == "rmu":
                own = model(f_ids, attention_mask=f_mask, output_hidden_states=True)
                states = own.hidden_states[layer + 1]
                loss = (states - vector).pow(2).mean(-1)[f_mask.bool()].mean()
                with torch.no_grad():
                    wanted = reference(r_ids, attention_mask=r_mask, output_hidden_states=True)
                kept = model(r_ids, attention_mask=r_mask, output_hidden_states=True)
                difference = kept.hidden_states[layer + 1] - wanted.hidden_states[layer + 1]
                loss = loss + difference.pow(2).mean(-1)[r_mask.bool()].mean()
            else:
                own = model(f_ids, attention_mask=f_mask, labels=f_labels)
                if method == "npo":
                    with torch.no_grad():
                        frozen = reference(f_ids, attention_mask=f_mask, labels=f_labels)
                    ratio = sequence_nll(own.logits, f_labels) - sequence_nll(
                        frozen.logits, f_labels
                    )
                    beta = objective.beta  # type: ignore[attr-defined]
                    loss = -(2 / beta) * torch.nn.functional.logsigmoid(beta * ratio).mean()
                    kept = model(r_ids, attention_mask=r_mask, labels=r_labels)
                    loss = loss + kept.loss
                else:
                    loss = -own.loss
                    kept = model(r_ids, attention_mask=r_mask)
                    with torch.no_grad():
                        wanted = reference(r_ids, attention_mask=r_mask)
                    here = torch.log_softmax(kept.logits.float(), -1)
                    there = torch.log_softmax(wanted.logits.float(), -1)
                    loss = loss + torch.nn.functional.kl_div(
                        here.flatten(0, 1),
                        there.flatten(0, 1),
                        log_target=True,
                        reduction="batchmean",
                    )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield float(loss.detach())


# ---- both sides, timed


FORGET: list[QA] = []
RETAIN: list[QA] = []


def prepare(rows: int) -> None:
    FORGET[:], RETAIN[:] = data(rows)


def ours(lm: LM, chosen: Recipe) -> tuple[list[float], float, dict[str, float]]:
    """Seconds per step, seconds before the first step, and counts."""
    times: list[float] = []
    last = time.perf_counter()
    began = last

    def progress(step: int, total: int, numbers: object) -> None:
        nonlocal last
        times.append(time.perf_counter() - last)
        last = time.perf_counter()

    result = Trainer(lm, chosen, {"forget": FORGET, "retain": RETAIN}, progress=progress).train()
    setup = time.perf_counter() - began - sum(times)
    return times, setup, {"tokens": result.tokens, "padding": result.padding_share}


def operations(lm: LM, plan: Plan, forget: Sequence[Row], retain: Sequence[Row]) -> float:
    """Floating-point operations of one NPO + NLL step: every row once, the shared prefix once."""
    total = 0.0
    for step in plan.steps:
        rows = [forget[i] for i, _ in step] + [retain[j] for _, j in step if j is not None]
        first = rows[0].encoded.ids
        limit = min(row.encoded.start for row in rows) - 1
        shared = 0
        while shared < limit and all(row.encoded.ids[shared] == first[shared] for row in rows):
            shared += 1
        tokens = shared + sum(len(row.encoded.ids) - shared for row in rows)
        answers = sum(row.encoded.answer_tokens for row in rows)
        head = lm.vocabulary * lm.anatomy.hidden_size
        total += 6.0 * (tokens * body_parameters(lm) + answers * head)
    return total / len(plan.steps)


def measure(method: str, steps: int, rows: int) -> dict[str, float]:
    """Median seconds per step of both sides, taking turns run by run."""
    lm = LM.load("default")
    chosen = recipe(method, steps, rows)
    forget, retain = make_rows(lm.template, FORGET), make_rows(lm.template, RETAIN)
    plan = make_plan(chosen, forget, retain, 0)
    start = {name: value.clone() for name, value in lm.model.state_dict().items()}
    fast, setup, counts = ours(lm, chosen)
    lm.model.load_state_dict(start)
    slow = []
    last = time.perf_counter()
    loop: Iterator[float] = straightforward(lm, method, plan, forget, retain, chosen)
    for _ in loop:
        slow.append(time.perf_counter() - last)
        last = time.perf_counter()
    # the first step of each side pays for its preparation (reference copy or cache): told apart
    body = sorted(fast[1:])[len(fast[1:]) // 2]
    naive = sorted(slow[1:])[len(slow[1:]) // 2]
    found = {
        "ours": body, "straightforward": naive, "ratio": naive / body,
        "setup": setup, "padding": counts["padding"],
        "whole_ratio": sum(slow) / (sum(fast) + setup),
    }  # fmt: skip
    if method == "npo":
        rate = matmul_rate(lm.precision)
        found["utilisation"] = operations(lm, plan, forget, retain) / body / rate
        found["matmul_rate"] = rate
    return found


def peak_memory(side: str, rows: int) -> float:
    """Peak resident memory of one side's NPO + NLL run in a process of its own, in GiB."""
    command = [sys.executable, __file__, "--memory", side, "--rows", str(rows)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(answer.stdout.strip().splitlines()[-1]))


def run_for_memory(side: str, rows: int) -> None:
    lm = LM.load("default")
    chosen = recipe("npo", 3, rows)
    if side == "ours":
        ours(lm, chosen)
    else:
        forget, retain = make_rows(lm.template, FORGET), make_rows(lm.template, RETAIN)
        plan = make_plan(chosen, forget, retain, 0)
        for _ in straightforward(lm, "npo", plan, forget, retain, chosen):
            gc.collect()
    print(json.dumps(peak_gib()))


# ---- what each method costs


def row_tokens(chosen: Recipe, plan: Plan, rows: Mapping[str, Sequence[Row]]) -> float:
    """Tokens of the rows of one step, each counted once, mean over steps."""
    total = 0
    for step in plan.steps:
        for forget, kept in step:
            total += sum(len(rows[role][forget].encoded.ids) for role in chosen.objective.roles)
            if kept is not None and chosen.keep.card.name != "none":
                total += len(rows["retain"][kept].encoded.ids)
    return total / len(plan.steps)


def run_for_cost(method: str, model: str, steps: int, rows: int) -> None:
    """Prints seconds before the first step, of a later step, its tokens, and memory in GiB."""
    lm = LM.load(model)
    loaded = forget_peak()
    weights = sum(p.numel() * p.element_size() for p in lm.model.parameters()) / 2**30
    chosen = recipe(method, steps, 2 * rows if method == "finetune" else rows)
    times: list[float] = []
    seen: list[Mapping[str, Sequence[Row]]] = []
    last = time.perf_counter()

    def progress(step: int, total: int, numbers: object) -> None:
        nonlocal last
        times.append(time.perf_counter() - last)
        last = time.perf_counter()

    trainer = Trainer(
        lm, chosen, {"forget": FORGET, "retain": RETAIN}, progress=progress,
        start=lambda: LM.load(model),
    )  # fmt: skip
    make = trainer.rows

    def rows_once() -> Context:
        context = make()
        seen.append(context.rows)
        return context

    trainer.rows = rows_once  # type: ignore[method-assign]
    trainer.train()
    plan = make_plan(chosen, seen[0]["forget"], seen[0]["retain"], 0)
    step = sorted(times[1:])[len(times[1:]) // 2]
    tokens = row_tokens(chosen, plan, seen[0])
    print(json.dumps({
        "setup": times[0] - step, "step": step, "tokens": tokens,
        "memory": (peak_gib() - loaded + weights) / weights,
    }))  # fmt: skip


def costs(methods: Sequence[str], arguments: argparse.Namespace, say: Callable[[str], None]) -> str:
    """The table of all methods' costs, relative to fine-tuning."""
    found: dict[str, dict[str, float]] = {}
    for method in ("finetune", *methods):
        command = [
            sys.executable, __file__, "--cost", method, "--model", arguments.model,
            "--rows", str(arguments.rows), "--steps", str(arguments.steps),
        ]  # fmt: skip
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.returncode:
            say(f"{method} failed: {answer.stderr.strip().splitlines()[-1]}")
            continue
        found[method] = json.loads(answer.stdout.strip().splitlines()[-1])
        say(f"{method}: {json.dumps({k: round(v, 3) for k, v in found[method].items()})}")
    each = found["finetune"]["step"] / found["finetune"]["tokens"]
    lines = [
        "| method | before the first step | a step | relative to fine-tuning | peak memory |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {method} | {n['setup']:.1f} s | {n['step']:.2f} s | "
        f"{n['step'] / n['tokens'] / each:.2f}x | {n['memory']:.1f}x |"
        for method, n in sorted(found.items(), key=lambda one: one[1]["step"] / one[1]["tokens"])
    ]
    return "\n".join(lines)


def write_between(page: Path, name: str, text: str) -> None:
    """Replaces the measured table of that name in a page."""
    start, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    head, _, rest = page.read_text(encoding="utf-8").partition(start)
    page.write_text(f"{head}{start}\n{text}\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def table(found: dict[str, dict[str, float]], memory: dict[str, float]) -> str:
    lines = [
        "| what | straightforward | delible | ratio | goal |",
        "|---|---|---|---|---|",
    ]
    for method, numbers in found.items():
        title, goal = METHODS[method]
        lines.append(
            f"| {title}, seconds per step | {numbers['straightforward']:.2f} | "
            f"{numbers['ours']:.2f} | **{numbers['ratio']:.2f}x** | >= {goal}x |"
        )
    share = memory["ours"] / memory["straightforward"]
    lines.append(
        f"| NPO + NLL, peak memory in GiB | {memory['straightforward']:.2f} | "
        f"{memory['ours']:.2f} | **{share:.2f}x** | <= 0.65x |"
    )
    npo = found.get("npo", {})
    if "utilisation" in npo:
        lines.append(
            f"| NPO + NLL, share of the measured matrix-product rate "
            f"({npo['matmul_rate'] / 1e9:.0f} GFLOP/s) | | {npo['utilisation']:.0%} | | >= 60 % |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None, say: Callable[[str], None] = print) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--methods", help="names with commas; by default all that are compared")
    parser.add_argument("--model", default="default", help="of --costs")
    parser.add_argument("--costs", action="store_true", help="what each method's step costs")
    parser.add_argument("--cost", help=argparse.SUPPRESS)
    parser.add_argument("--markdown", type=Path, help="replace the measured table in this page")
    parser.add_argument("--memory", choices=["ours", "straightforward"], help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    prepare(arguments.rows)
    if arguments.memory:
        run_for_memory(arguments.memory, arguments.rows)
        return
    if arguments.cost:
        run_for_cost(arguments.cost, arguments.model, arguments.steps, arguments.rows)
        return
    asked = arguments.methods.split(",") if arguments.methods else []
    if arguments.costs:
        every = [card.name for card in registry.cards("recipe") if card.name != "finetune"]
        name, text = "costs", costs(asked or every, arguments, say)
    else:
        found = {}
        for method in asked or METHODS:
            found[method] = measure(method, arguments.steps, arguments.rows)
            say(f"{method}: {json.dumps({k: round(v, 3) for k, v in found[method].items()})}")
        memory = {side: peak_memory(side, arguments.rows) for side in ("ours", "straightforward")}
        name, text = "training", table(found, memory)
    say(text)
    if arguments.markdown:
        write_between(arguments.markdown, name, text)


if __name__ == "__main__":
    main()
