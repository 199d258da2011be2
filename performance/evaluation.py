"""How much faster evaluation is than the straightforward evaluator of the field.

Both sides get the same model, rows and metrics, in the same process, after a warm-up, in turn:
delible, the straightforward evaluator, and delible again, whose two times are averaged. The
straightforward evaluator does what published tool kits do: every metric makes its own pass, every
answer is a row of its own with its question, batches of 32 rows in file order, padded to the
longest, logits at every position; generation runs in the same batches until the longest answer is
done. Values must agree to 1e-4, or the benchmark fails.

The metrics are those of the TOFU suite: probabilities, truth ratios, extraction strength, exact
memorisation, six membership attacks, ROUGE-L.

Run: python performance/evaluation.py --data FOLDER [--split forget01] [--rows 40]
     [--markdown docs/performance.md]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar
from unittest import mock

import numpy as np
import torch
from common import forget_peak, peak_gib, write_between
from straight import FORGET, HOLDOUT, KEPT, NEW_TOKENS, Splits, Straight, Tokens
from torch import Tensor

from delible.benchmarks.tofu import TOFU
from delible.component import build
from delible.lm.body import Body, shared_prefix
from delible.lm.lm import LM
from delible.lm.template import Encoded
from delible.lm.tree import NodeFunction, Prefix, Tree
from delible.measure.benchmark import Data
from delible.measure.cache import Cache
from delible.measure.engine import measure
from delible.measure.evaluate import Ask, evaluate
from delible.records import QA

T = TypeVar("T")

#: Speed against the straightforward evaluator that is aimed at.
GOALS = {"teacher-forced": 6.0, "generation": 2.5, "repeated": 100.0}


def asks() -> dict[str, list[Ask]]:
    """Our side's metrics, by the part whose time is taken."""
    both = (FORGET, HOLDOUT)
    return {
        "teacher-forced": [
            Ask(build("metric", "answer_probability"), (FORGET, "retain")),
            Ask(build("metric", "normalised_probability"), KEPT[1:]),
            Ask(build("metric", "truth_ratio"), (FORGET, *KEPT)),
            Ask(build("metric", "extraction_strength"), (FORGET,)),
            Ask(build("metric", "exact_memorisation"), (FORGET,)),
            *(
                Ask(build("metric", name), both)
                for name in ("loss_attack", "zlib_attack", "min_k", "min_k_plus_plus")
            ),
        ],
        "gradient norms": [Ask(build("metric", "gradient_norm"), both)],
        "generation": [
            Ask(
                build("metric", {"name": "rouge_l_recall", "max_new_tokens": NEW_TOKENS}),
                (FORGET, *KEPT),
            )
        ],
    }


# ---- the comparison


def load(arguments: argparse.Namespace) -> tuple[LM, Splits]:
    lm = LM.load(arguments.model, precision="float32")
    task = TOFU(split=arguments.split, limit=arguments.rows).tasks(Data(arguments.data))[0]
    rows = arguments.rows
    return lm, {name: list(records)[:rows] for name, records in task.splits.items()}  # type: ignore[misc]


def differences(ours: dict[str, list[float]], theirs: dict[str, list[float]]) -> dict[str, float]:
    """Largest relative difference (absolute below 1) of each metric and split."""
    if ours.keys() != theirs.keys():
        raise SystemExit(f"not the same metrics: {sorted(ours.keys() ^ theirs.keys())}")
    return {
        key: max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(ours[key], theirs[key], strict=True))
        for key in ours
    }


class Positions:
    """Token positions that went through a model's body: whichever side asked, counted alike."""

    def __init__(self, lm: LM) -> None:
        self._count = 0
        backbone = lm.core.get_submodule(lm.anatomy.backbone)
        backbone.register_forward_pre_hook(self._seen, with_kwargs=True)

    def _seen(self, module: object, arguments: object, named: dict[str, Tensor]) -> None:
        self._count += named["input_ids"].numel()

    def since_last(self) -> int:
        count, self._count = self._count, 0
        return count


def timed(run: Callable[[], T]) -> tuple[T, float]:
    """What comes back, and the seconds that it took."""
    began = time.perf_counter()
    return run(), time.perf_counter() - began


def compare(arguments: argparse.Namespace) -> list[dict[str, object]]:
    lm, splits = load(arguments)
    straight, rows, positions = Straight(lm), [], Positions(lm)
    with tempfile.TemporaryDirectory() as folder:
        for part, wanted in asks().items():
            few = {name: records[:2] for name, records in splits.items()}
            straight.run(part, few)  # both sides are warm
            evaluate(lm, few, wanted)
            positions.since_last()
            values, first = timed(partial(evaluate, lm, splits, wanted, cache=Cache(folder)))
            ours_positions = positions.since_last()
            theirs, theirs_seconds = timed(partial(straight.run, part, splits))
            theirs_positions = positions.since_last()
            with tempfile.TemporaryDirectory() as other:
                _, second = timed(partial(evaluate, lm, splits, wanted, cache=Cache(other)))
            seconds = (first + second) / 2  # a machine that others use drifts
            ours = {
                f"{metric}/{split}": [float(item.value or 0.0) for item in items]
                for metric, by_split in values.items.items()
                for split, items in by_split.items()
            }
            apart = differences(ours, theirs)
            rows.append({
                "part": part, "ours": seconds, "first": first, "second": second,
                "straight": theirs_seconds, "ratio": theirs_seconds / seconds,
                "positions": (theirs_positions, ours_positions), "apart": max(apart.values()),
                "worst": max(apart, key=apart.__getitem__), "unique": values.measured["unique"],
                "asked": values.measured["asked"],
            })  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
        everything = [one for part in asks().values() for one in part]
        again, seconds = timed(partial(evaluate, lm, splits, everything, cache=Cache(folder)))
        assert again.measured["scored"] == again.measured["generated"] == 0
        total = sum(float(row["ours"]) for row in rows)  # type: ignore[arg-type]
        straight_total = sum(float(row["straight"]) for row in rows)  # type: ignore[arg-type]
        rows.append({
            "part": "repeated", "ours": seconds, "straight": straight_total,
            "ratio": straight_total / seconds, "apart": 0.0, "worst": "", "own": total / seconds,
        })  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    bad = [row for row in rows if float(row["apart"]) > 1e-4]  # type: ignore[arg-type]
    if bad:
        raise SystemExit(f"values differ by more than 1e-4: {bad}")
    return rows


def peak(arguments: argparse.Namespace, side: str) -> float:
    """GiB of one teacher-forced metric of the forget rows, in a process of its own."""
    command = [
        sys.executable, __file__, "--data", str(arguments.data), "--model", arguments.model,
        "--split", arguments.split, "--rows", str(arguments.rows), "--only", side,
    ]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def only(arguments: argparse.Namespace) -> None:
    lm, splits = load(arguments)
    before = forget_peak()
    if arguments.only == "ours":
        evaluate(lm, splits, [Ask(build("metric", "min_k_plus_plus"), (FORGET,))])
    else:
        Straight(lm).forced([(row, row.answer) for row in splits[FORGET]], moments=True)
    print(peak_gib() - before)


class Counting(Straight):
    """Counts the positions that would be computed."""

    def forced(self, rows: Sequence[tuple[QA, str]], moments: bool = False) -> list[Tokens]:
        for batch in self._batches(rows):
            self.positions += len(batch) * max(len(row.ids) for row in batch)
        one = np.zeros(2)
        return [Tokens(one, one > 0, one) for _ in rows]


@contextmanager
def counting_positions() -> Iterator[list[int]]:
    """Scores are not computed; the positions that would be, padding included, are listed."""
    positions = list[int]()

    def by_length(
        lm: Body, rows: Sequence[Encoded], among: Sequence[int], function: NodeFunction
    ) -> Iterator[tuple[list[int], Tensor]]:
        order = sorted(among, key=lambda index: len(rows[index].ids), reverse=True)
        for indices in lm.batches(order, [len(row.ids) for row in rows]):
            longest = len(rows[indices[0]].ids)
            shared = shared_prefix([rows[index].ids[: rows[index].start] for index in indices])
            positions.append(shared + len(indices) * (longest - shared))
            yield indices, torch.zeros(sum(rows[index].answer_tokens for index in indices), 4)

    prefixes = list[Prefix]()

    def values(lm: Body, prefix: Prefix, trees: Sequence[Tree], _: NodeFunction) -> Tensor:
        positions.append(sum(len(tree.ids) for tree in trees))
        if not any(prefix is known for known in prefixes):
            positions.append(len(prefix.ids))
            prefixes.append(prefix)
        return torch.zeros(sum(len(one) for tree in trees for one in tree.targets), 4)

    with mock.patch.multiple("delible.lm.scoring", by_length=by_length, tree_values=values):
        yield positions


def computed_positions(model: str, splits: Splits) -> int:
    """Positions that go through the model's body for the teacher-forced work, on our side."""
    requests = [
        request
        for one in asks()["teacher-forced"]
        for name in one.splits or ()
        for record in splits[name]
        for request in one.metric.requests(record, one.metric.prompt(record))  # type: ignore[union-attr,arg-type]
    ]
    with counting_positions() as positions:
        measure(LM.load(model), requests)
    return sum(positions)


def counted(arguments: argparse.Namespace) -> str:
    """How the work grows with the benchmark, in positions that go through the model."""
    lines = []
    for split in ("forget01", "forget10"):
        lm, splits = load(argparse.Namespace(**{**vars(arguments), "split": split, "rows": None}))
        straight = Counting(lm)
        straight.run("teacher-forced", splits)
        ours = computed_positions(arguments.model, splits)
        lines.append(
            f"{split}: {straight.positions:,} positions straightforward, {ours:,} here, "
            f"{straight.positions / ours:.1f}x"
        )
    return "\n".join(lines)


def markdown(rows: list[dict[str, object]], memory: tuple[float, float]) -> str:
    lines = [
        "| part | straightforward | delible | ratio | goal | positions | largest difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        goal, counted = GOALS.get(str(row["part"])), row.get("positions")
        through = "{:,} / {:,}".format(*counted) if isinstance(counted, tuple) else "–"
        lines.append(
            f"| {row['part']} | {row['straight']:.1f} s | {row['ours']:.1f} s | "
            f"{row['ratio']:.1f}x | {f'{goal:g}x' if goal else '–'} | {through} | "
            f"{row['apart']:.0e} |"
        )
    lines.append(
        f"| memory of one teacher-forced metric | {memory[1]:.2f} GiB | {memory[0]:.2f} GiB | "
        f"{memory[1] / max(memory[0], 1e-6):.1f}x | – | – | |"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=None)
    parser.add_argument("--model", default="default")
    parser.add_argument("--split", default="forget01")
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--only", choices=("ours", "straight"))
    parser.add_argument("--count", action="store_true", help="only count positions")
    parser.add_argument("--markdown", type=Path, help="file whose table is replaced")
    arguments = parser.parse_args()
    if arguments.only:
        only(arguments)
        return
    if arguments.count:
        print(counted(arguments))
        return
    rows = compare(arguments)
    table = markdown(rows, (peak(arguments, "ours"), peak(arguments, "straight")))
    print(table)
    if arguments.markdown:
        write_between(arguments.markdown, "evaluation", table)


if __name__ == "__main__":
    main()
