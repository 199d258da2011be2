"""What runs of many stages cost, as ratios measured in one run.

Every part is a function that returns rows: what was measured, the ratio, and the limit that it is
held to. Parts whose methods are not there yet are left out, and said to be.

    requests    time and peak memory of the last ten of many requests over those of the first ten:
                flat, at most 1.15
    routing     a closed gate over the bare model (at most 1.05, the gate's look at each question
                included), and a batch of rows with four adapters over one with one (at most 1.15)
    assistant   time of answers with ULD's assistant over those without: at most its share of the
                model's multiplications, and a tenth

Run: python performance/procedures.py [--model tiny] [--requests 50] [--method fit]
     [--parts requests] [--json FILE] [--markdown docs/performance.md]
     (some minutes on a tiny model; on the default model a minute or two per request)
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

# oneDNN keeps a compiled kernel for every shape it has met, up to 1024 of them: some MiB for each
# request until it is full, whoever runs. Small here, so that what delible itself keeps would show.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
os.environ.setdefault("LRU_CACHE_CAPACITY", "16")

import numpy as np
import torch
from arithmetic import as_wide_as_default, assistant_costs
from common import write_between

from delible import registry
from delible.lm.decode import Speaking
from delible.lm.lm import LM
from delible.lm.speaker import Row
from delible.loaders.requests import Named
from delible.records import QA, ForgetRequest
from delible.routed.detector import Detector, DetectorOptions
from delible.routed.features import EncoderFeatures
from delible.routed.low_rank import LowRank
from delible.routed.requests import Member, RequestRouter
from delible.routed.system import routed
from delible.sequence.result import SequenceResult, Step
from delible.sequence.run import unlearn_sequence
from delible.system.asks import Decoding, Prompt
from delible.world import World

#: Adapters, rows and tokens of a batch that is routed.
ADAPTERS, ROWS, TOKENS = 4, 8, 24
#: Requests at the beginning and at the end that are compared; the very first warms up.
PART = 10


@dataclass(frozen=True)
class Ratio:
    """One thing that was measured.

    Attributes:
        ratio: Of two measurements of this run; None where it could not be measured.
        limit: It should not be above.
        told: The two measurements in words.
    """

    what: str
    ratio: float | None
    limit: float
    told: str

    @property
    def kept(self) -> str:
        """Whether the limit is kept, in a word."""
        return "–" if self.ratio is None else "yes" if self.ratio <= self.limit else "no"


@dataclass(frozen=True)
class Setting:
    """What the parts may use."""

    model: str
    requests: int
    method: str
    folder: Path


def flat(result: SequenceResult, value: Callable[[Step], float | None]) -> tuple[float, float]:
    """Medians over the first and the last requests that were done, without the very first."""
    steps = [step for step in result.steps[1:] if step.what == "done"][1:]
    part = min(PART, len(steps) // 2)
    known = [[one for step in steps[s] if (one := value(step)) is not None]
             for s in (slice(part), slice(-part, None))]  # fmt: skip
    return median(known[0]), median(known[1])


def requests(setting: Setting) -> list[Ratio]:
    """Fifty requests: time and memory of each do not grow with those before."""
    world = World(people=setting.requests + 8, seed=0, relations=2)
    split = world.split(forget=setting.requests, holdout=1)
    people: dict[str, list[QA]] = {}
    for record in split.records("forget"):
        if isinstance(record, QA) and record.subject:
            people.setdefault(record.subject, []).append(record)
    named = [
        Named(f"{number:03d}", ForgetRequest(forget=tuple(rows)))
        for number, rows in enumerate(people.values(), start=1)
    ]
    known = {"epochs": 1} if setting.method == "fit" else {"max_steps": 8}
    result = unlearn_sequence(
        setting.model, named, method=setting.method, out=setting.folder / "requests",
        retain=split.records("retain")[:64], rows=2, verify=False, done=_tell, **known,
    )  # fmt: skip
    seconds = flat(result, lambda step: step.seconds)
    memory = flat(result, lambda step: step.peak_bytes)
    gib = [one / 2**30 for one in memory]
    name = f"{len(named)} requests one after another, {setting.method}"
    return [
        Ratio(f"{name}: seconds", seconds[1] / seconds[0], 1.15,
              f"{seconds[0]:.2f} s each at first, {seconds[1]:.2f} s at the end"),
        Ratio(f"{name}: peak memory", memory[1] / memory[0], 1.15,
              f"{gib[0]:.2f} GiB at first, {gib[1]:.2f} GiB at the end"),
    ]  # fmt: skip


def _tell(step: Step) -> None:
    print(f"request {step.number}: {step.seconds:.2f} s", file=sys.stderr, flush=True)


def routing(setting: Setting) -> list[Ratio]:
    """What adapters behind gates cost: while they are shut, and while a batch uses several."""
    lm, rounds = LM.load(setting.model), 5
    world = World(people=24, seed=0)
    split = world.split(forget=ADAPTERS, holdout=1)
    people: dict[str, list[str]] = {}
    for record in split.records("forget"):
        if isinstance(record, QA) and record.subject:
            people.setdefault(record.subject, []).append(record.question)
    encoder, options = EncoderFeatures.of(None), DetectorOptions()
    parts = []
    for place, (name, texts) in enumerate(people.items()):
        draws = torch.Generator().manual_seed(place)
        found = Detector.fit(texts, encoder, options, draws)
        parts.append(Member(name, _adapter(lm, draws), found))
    model = routed(lm, RequestRouter(parts, "own", lm.identity))
    asked = [one.question for one in split.records("retain") if isinstance(one, QA)]
    prompts = [Prompt.ask(text) for text in asked]
    acting: Any = model.acting
    ids = [lm.template.prompt_ids(one) for one in prompts]
    shut = acting.weights(ids).sum(axis=1) == 0
    kept = [one for one, closed in zip(prompts, shut, strict=True) if closed][:ROWS]
    names = [one.request for one in parts]
    rows = [tuple(lm.template.prompt_ids(prompt)) for prompt in kept]
    chosen = np.eye(len(names))
    #: What the gate says of each row; None: it is asked, and has not seen the questions before.
    gates: dict[str, Any] = {
        "shut": None, "one": [chosen[0] for _ in rows],
        "several": [chosen[place % len(names)] for place in range(len(rows))],
    }  # fmt: skip
    decoding = Decoding(TOKENS)

    clock = time.process_time if lm.device_type == "cpu" else time.perf_counter

    def timed(kind: str) -> float:
        acting._weights.clear()
        if gates.get(kind) is not None:
            acting._weights.update(zip(rows, gates[kind], strict=True))
        began = clock()
        _generated(lm if kind == "bare" else model, kept, decoding)
        return clock() - began

    seconds: dict[str, list[float]] = {kind: [] for kind in ("bare", *gates)}
    for round_ in range(rounds + 1):
        for kind in seconds:
            took = timed(kind)
            if round_:
                seconds[kind].append(took)
    # the least of each: what else the machine does only adds
    least = {kind: min(values) for kind, values in seconds.items()}
    told = f"{len(kept)} questions, {TOKENS} tokens each: "
    return [
        Ratio("a closed gate over the bare model", least["shut"] / least["bare"], 1.05,
              f"{told}{least['bare']:.2f} s bare, {least['shut']:.2f} s with {len(names)} gates"),
        Ratio(f"rows with {len(names)} adapters over one adapter",
              least["several"] / least["one"], 1.15,
              f"{told}{least['one']:.2f} s with one, {least['several']:.2f} s mixed"),
    ]  # fmt: skip


def _generated(system: LM, prompts: Sequence[Prompt], decoding: Decoding) -> None:
    """All rows in one batch, which speak to the end: no row leaves early."""
    with torch.inference_mode(), system.evaluating(), system.computing():
        speaking = Speaking(system, lambda logits, _: [5] * len(logits))
        ids = [system.template.prompt_ids(one) for one in prompts]
        speaking.join([Row(decoding) for _ in prompts], ids)
        while speaking.goes_on:
            speaking.step()


def _adapter(lm: LM, draws: torch.Generator) -> LowRank:
    """A random adapter of rank 8 on all linear layers of the blocks."""
    pairs = {}
    for path, module in lm.core.named_modules():
        if path.startswith(f"{lm.anatomy.blocks}.") and isinstance(module, torch.nn.Linear):
            pairs[path] = (
                torch.randn(8, module.in_features, generator=draws) * 0.01,
                torch.randn(module.out_features, 8, generator=draws) * 0.01,
            )
    return LowRank(pairs, 2.0)


def assistant(setting: Setting) -> list[Ratio]:
    """Answers with an assistant take its share of the multiplications longer, and a tenth.

    On a random model as wide as the default one: in a tiny one calls cost more than numbers.
    """
    costs = assistant_costs(as_wide_as_default(12), 3)
    return [
        Ratio("answers with an assistant of 3 of 12 blocks, uld", costs["ratio"], costs["bound"],
              f"{costs['share']:.2f} of the model's multiplications"),
    ]  # fmt: skip


#: Parts by name, with the methods that they need. Add a function and a line.
PARTS: dict[str, tuple[Callable[[Setting], list[Ratio]], tuple[str, ...]]] = {
    "requests": (requests, ()),
    "routing": (routing, ("o3",)),
    "assistant": (assistant, ("uld",)),
}


def table(ratios: Sequence[Ratio], setting: Setting) -> str:
    """The rows as Markdown."""
    lines = ["| what | ratio | at most | kept | measured |", "|---|---|---|---|---|"]
    for one in ratios:
        ratio = "–" if one.ratio is None else f"{one.ratio:.2f}"
        lines.append(f"| {one.what} | {ratio} | {one.limit:.2f} | {one.kept} | {one.told} |")
    return "\n".join([*lines, "", f"Model: {setting.model}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--requests", type=int, default=50)
    parser.add_argument("--method", default="fit")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="procedures-"))
    setting = Setting(given.model, given.requests, given.method, folder)
    known = {card.name for card in registry.cards()}
    ratios: list[Ratio] = []
    try:
        for name in given.parts.split(","):
            part, needed = PARTS[name]
            if missing := [one for one in needed if one not in known]:
                print(f"{name}: left out, {', '.join(missing)} is not there", file=sys.stderr)
                continue
            ratios += part(setting)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    text = table(ratios, setting)
    print(text)
    if given.json:
        given.json.write_text(json.dumps([asdict(one) for one in ratios], indent=2), "utf-8")
    if given.markdown:
        write_between(given.markdown, "procedures", text)


if __name__ == "__main__":
    main()
