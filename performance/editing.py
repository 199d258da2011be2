"""How much faster located editors are than the straightforward way of the field's toolkits.

Both sides write the same refusals for the same questions into the same layers of the same model,
with the same statistics, losses, steps and stops, in one process, in turn. The straightforward way
takes one question at a time: a search for its value alone, in which every text goes through the
whole model with logits at every position, and a change of the weights before the next question.

Run: python performance/editing.py [--model tiny] [--questions 20] [--methods rome,memit,alphaedit]
     [--json FILE] [--markdown docs/performance.md]     (minutes on the default model)
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import torch
from common import peak_gib, write_between
from torch import Tensor

from delible.component import build
from delible.edit import located
from delible.edit.requests import Edit, Text
from delible.edit.values import Settings, Values, clamped, frozen
from delible.intervene.sites import Site
from delible.lm.lm import LM
from delible.records import QA, ForgetRequest
from delible.world import World

METHODS = ("rome", "memit", "alphaedit")
#: Seconds that a method may take for 20 questions on the default model, on two quiet cores.
GOAL = 15.0
#: Nothing is refused: what is compared is time, not what an edit costs.
FREE = {"most_divergence": 1e9, "most_change": 1e9}
SIDES = ("ours", "straightforward")


def request_of(questions: int) -> ForgetRequest:
    """Questions about people of a world, whom the model need not know, and some that are kept."""
    split = World(people=40, seed=0).split(forget=8)
    forget = [record for record in split.records("forget") if isinstance(record, QA)]
    return ForgetRequest(
        forget=tuple(forget[:questions]), retain=tuple(split.records("retain")[:24])
    )


# ---- the straightforward way


def padded(texts: Sequence[Text], pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, attention mask, and labels (-100 outside the target), padded to the longest text."""
    longest = max(len(text.row.ids) for text in texts)
    ids = torch.full((len(texts), longest), pad_id)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, text in enumerate(texts):
        n, start = len(text.row.ids), text.row.start
        ids[row, :n] = torch.tensor(text.row.ids)
        mask[row, :n] = 1
        labels[row, start:n] = ids[row, start:n]
    return ids, mask, labels


def one_value(lm: LM, edit: Edit, site: Site, start: Tensor, s: Settings) -> tuple[Tensor, int]:
    """The vector of one edit, and its updates."""
    texts = [*edit.texts, edit.essence]
    ids, mask, labels = (one.to(lm.device) for one in padded(texts, lm.pad_id))
    labels[-1] = -100
    (place,) = site.places(lm)
    norm = start.norm().float()
    unit = norm / len(start) ** 0.5
    delta = torch.zeros(len(start), device=lm.device, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=s.learning_rate)
    before, steps = None, 0

    def add(module: object, given: object, output: Tensor | tuple[Tensor, ...]) -> object:
        old = output if torch.is_tensor(output) else output[0]
        new = old.clone()
        for row, text in enumerate(texts):
            for end in text.places:
                new[row, end] = new[row, end] + (delta * unit).to(new)
        return new if torch.is_tensor(output) else (new, *output[1:])

    for step in range(s.steps):
        handle = lm.core.get_submodule(place.path).register_forward_hook(add)
        with lm.computing():
            logits = lm.model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
        handle.remove()
        said = logits.log_softmax(-1)
        chosen = labels[:, 1:] != -100
        tokens = said[:, :-1].gather(2, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
        nll = -((tokens * chosen).sum(1) / chosen.sum(1).clamp(min=1))[:-1].mean()
        essence = said[-1, edit.essence.places[0]]
        before = essence.detach() if before is None else before
        kl = (essence.exp() * (essence - before)).sum()
        length = (delta * unit).square().sum().clamp(min=1e-30).sqrt()
        loss = nll + s.kl * kl + s.weight_decay * length / norm
        if float(loss.detach()) < s.enough or step == s.steps - 1:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        steps += 1
        with torch.no_grad():
            delta.copy_(clamped(delta[None], (norm / unit)[None], s.clamp)[0])
    return (delta * unit).detach().double(), steps


def one_by_one(
    lm: LM, edits: Sequence[Edit], site: Site, start: Tensor, settings: Settings
) -> Values:
    """As ``find_values``, edit by edit."""
    with frozen(lm), lm.evaluating():
        found = [one_value(lm, edit, site, z0, settings)
                 for edit, z0 in zip(edits, start, strict=True)]  # fmt: skip
    zeros = [0.0] * len(edits)
    return Values(torch.stack([one for one, _ in found]), zeros, [n for _, n in found], zeros)


# ---- both sides, timed


def run(lm: LM, method: str, side: str, request: ForgetRequest) -> tuple[float, float]:
    """Seconds of an edit, and how likely the refusals are afterwards; the edit is undone."""
    ours = side == "ours"
    editor = build("editor", {"name": method, **FREE, **({} if ours else {"batch": 1})})
    search = located.find_values if ours else one_by_one
    with patch.object(located, "find_values", search):
        began = time.perf_counter()
        edit = editor.edit(lm, request, seed=0)
        took = time.perf_counter() - began
    edit.undo(lm)
    return took, edit.notes["checked"]["target_after"]


def measure(lm: LM, method: str, request: ForgetRequest) -> dict[str, float]:
    """Seconds of both sides, the statistics kept before."""
    subjects = len({record.subject for record in request.forget})
    run(lm, method, "ours", request.model_copy(update={"forget": request.forget[:1]}))
    found: dict[str, float] = {"subjects": subjects, "questions": len(request.forget)}
    began = time.perf_counter()
    run(lm, method, "ours", request)  # reads the statistics of texts without these subjects
    first = time.perf_counter() - began
    for side in SIDES:
        seconds, likely = run(lm, method, side, request)
        found |= {side: seconds, f"{side}_target": likely, f"{side}_a_subject": seconds / subjects}
    return {**found, "ratio": found["straightforward"] / found["ours"],
            "statistics": max(0.0, first - found["ours"])}  # fmt: skip


def peak_memory(side: str, model: str, questions: int) -> dict[str, float]:
    """Peak resident memory of one side's MEMIT in a process of its own, and the weights, in GiB."""
    command = [
        sys.executable, __file__, "--memory", side, "--model", model,
        "--questions", str(questions),
    ]  # fmt: skip
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(answer.stdout.strip().splitlines()[-1])


def weights_gib(lm: LM) -> float:
    return sum(one.numel() * one.element_size() for one in lm.model.parameters()) / 2**30


def table(found: dict[str, dict[str, float]], memory: dict[str, dict[str, float]]) -> str:
    lines = ["| what | straightforward | delible | ratio |", "|---|---|---|---|"]
    for method, numbers in found.items():
        lines.append(
            f"| {method}, seconds for {numbers['questions']:.0f} questions about "
            f"{numbers['subjects']:.0f} subjects | {numbers['straightforward']:.1f} | "
            f"{numbers['ours']:.1f} | **{numbers['ratio']:.2f}x** |"
        )
        lines.append(
            f"| {method}, seconds per subject | {numbers['straightforward_a_subject']:.2f} | "
            f"{numbers['ours_a_subject']:.2f} | |"
        )
    if memory:
        peak = {side: one["peak"] / one["weights"] for side, one in memory.items()}
        lines.append(
            f"| memit, peak memory, times the weights | {peak['straightforward']:.2f} | "
            f"{peak['ours']:.2f} | |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="default")
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    parser.add_argument("--markdown", type=Path, help="replace the measured table in this page")
    parser.add_argument("--memory", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    lm = LM.load(arguments.model)
    request = request_of(arguments.questions)
    if arguments.memory:
        run(lm, "memit", arguments.memory, request)
        print(json.dumps({"peak": peak_gib(), "weights": weights_gib(lm)}))
        return
    found = {}
    for method in arguments.methods.split(","):
        found[method] = measure(lm, method, request)
        print(f"{method}: {json.dumps({k: round(v, 3) for k, v in found[method].items()})}")
    memory = {side: peak_memory(side, arguments.model, arguments.questions) for side in SIDES}
    text = table(found, memory)
    print(text)
    if arguments.json:
        numbers = {"model": arguments.model, "goal_seconds": GOAL, "methods": found,
                   "memory_gib": memory}  # fmt: skip
        arguments.json.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    if arguments.markdown:
        write_between(arguments.markdown, "editing", text)


if __name__ == "__main__":
    main()
