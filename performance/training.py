"""How much faster and smaller training is than the straightforward loop of the field.

Both sides get the same model, rows, losses, optimiser steps and batch composition, in the same
process, in turn. The straightforward loop does what published trainers do: a second, frozen copy
of the model is resident; forget and retain rows are padded to the longest row and go through the
model separately; logits are computed at every position; the default AdamW steps.

Run: python performance/training.py [--steps 4] [--rows 16] [--markdown docs/performance.md]

``--costs`` measures something else: see ``costs.py``.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from common import FORGET, LEARNING_RATE, RETAIN, peak_gib, prepare, recipe, write_between
from costs import costs
from torch import Tensor

from delible.context import Context
from delible.lm.lm import LM
from delible.precision import matmul_rate
from delible.train.engine import Trainer
from delible.train.estimate import body_parameters
from delible.train.plan import Plan, make_plan
from delible.train.recipe import Recipe
from delible.train.row import Row
from delible.train.rows import make_rows

METHODS = {
    "npo": ("NPO + NLL", 1.5),
    "graddiff_kl": ("GradDiff + KL", 2.5),
    "rmu": ("RMU", 4.0),
}


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


def ours(lm: LM, chosen: Recipe) -> tuple[list[float], float, dict[str, float]]:
    """Seconds per step, seconds before the first step, and counts."""
    times: list[float] = []
    last = time.perf_counter()
    began = last

    def progress(step: int, total: int, numbers: object) -> None:
        nonlocal last
        times.append(time.perf_counter() - last)
        last = time.perf_counter()

    result = Trainer(
        lm, chosen, {"forget": FORGET, "retain": RETAIN}, context=Context(steps=progress)
    ).train()
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


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--methods", help="names with commas; by default all that are compared")
    parser.add_argument("--model", default="default", help="of --costs")
    parser.add_argument("--costs", action="store_true", help="what each method's step costs")
    parser.add_argument("--markdown", type=Path, help="replace the measured table in this page")
    parser.add_argument("--memory", choices=["ours", "straightforward"], help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    prepare(arguments.rows)
    if arguments.memory:
        run_for_memory(arguments.memory, arguments.rows)
        return
    asked = arguments.methods.split(",") if arguments.methods else []
    if arguments.costs:
        text = costs(asked, arguments.model, arguments.steps, arguments.rows)
        name = "costs"
    else:
        found = {}
        for method in asked or METHODS:
            found[method] = measure(method, arguments.steps, arguments.rows)
            print(f"{method}: {json.dumps({k: round(v, 3) for k, v in found[method].items()})}")
        memory = {side: peak_memory(side, arguments.rows) for side in ("ours", "straightforward")}
        name, text = "training", table(found, memory)
    print(text)
    if arguments.markdown:
        write_between(arguments.markdown, name, text)


if __name__ == "__main__":
    main()
