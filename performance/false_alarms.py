"""How often the target detector refuses what it should not: ``python performance/false_alarms.py``.

The detector is made ready as a user would have it: for the given records, with a fitted threshold.
Then it is asked what has nothing to do with them: the prompts of PHTest (harmless ones and
controversial ones), general questions that no threshold was fitted on, the records to keep; and, so
that the rates mean something, the forgotten questions themselves, and paraphrases of them. Names
and likeness are told apart. The general questions that come with delible fit the threshold, so
others are asked.

Run: python performance/false_alarms.py --forget forget10_perturbed.json --retain retain90.json \
       --phtest phtest_v0.1.csv --questions truthfulqa.csv triviaqa.jsonl
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

from delible.guards.target_detector import TargetDetector, TargetDetectorMind
from delible.loaders import read_records
from delible.records import QA, ForgetRequest

#: Rows of each group; more would only take longer.
MOST = 1000


def column(path: Path, names: Sequence[str]) -> list[dict[str, str]]:
    """Rows of a table or of JSON lines that have one of these columns, as ``text``."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".csv":
            rows = list(csv.DictReader(file))
        else:
            rows = [json.loads(line) for line in file if line.strip()]
    name = next(one for one in names if one in rows[0])
    return [{**row, "text": str(row[name])} for row in rows]


def spread(texts: Sequence[str]) -> list[str]:
    different = list(dict.fromkeys(texts))
    return different[:: max(1, math.ceil(len(different) / MOST))]


def interval(hits: int, count: int) -> tuple[float, float]:
    """Wilson's interval of a share, 95 %."""
    z, share = 1.96, hits / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + (z / 2 / count) ** 2)
    return max(0.0, middle - half), min(1.0, middle + half)


def told(name: str, mind: TargetDetectorMind, texts: Sequence[str]) -> None:
    texts = spread(texts)
    assert mind.likeness is not None
    named = [mind.names.occur(text) for text in texts]
    alike = [mind.resembles(text) for text in texts]
    hits = sum(a or b for a, b in zip(named, alike, strict=True))
    low, high = interval(hits, len(texts))
    print(
        f"| {name} | {len(texts)} | {sum(named) / len(texts):.2%} | {sum(alike) / len(texts):.2%} "
        f"| {hits / len(texts):.2%} ({low:.2%} to {high:.2%}) |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--forget", required=True)
    parser.add_argument("--retain")
    parser.add_argument("--phtest", type=Path, required=True)
    parser.add_argument("--questions", type=Path, nargs="*", default=())
    parser.add_argument("--rate", type=float, default=0.01)
    options = parser.parse_args()
    known = read_records(options.forget)
    # paraphrases are asked, so the detector must not know them
    forget = [
        one.model_copy(update={"paraphrases": ()}) if isinstance(one, QA) else one for one in known
    ]
    retain = read_records(options.retain) if options.retain else ()
    # the records to keep that fit the threshold are not those that are asked afterwards
    request = ForgetRequest(forget=tuple(forget), retain=tuple(retain[::2]))
    began = time.perf_counter()
    mind = TargetDetector(false_alarm_rate=options.rate).prepare(request)
    print(
        f"{len(forget)} records to forget; a threshold of {mind.threshold:.3f} for a rate of "
        f"{options.rate:.0%}, fitted in {time.perf_counter() - began:.0f} s\n"
    )
    print("| asked | texts | by name | by likeness | refused (95 %) |\n|---|---|---|---|---|")
    for kind in ("harmless", "controversial"):
        rows = column(options.phtest, ["Request"])
        told(f"PHTest, {kind}", mind, [one["text"] for one in rows if one["Harmfulness"] == kind])
    for path in options.questions:
        told(path.stem, mind, [one["text"] for one in column(path, ["Question", "question"])])
    if retain:
        told("to keep", mind, [one.question for one in retain[1::2] if isinstance(one, QA)])
    asked = [one for one in known if isinstance(one, QA)]
    told("forgotten", mind, [one.question for one in asked])
    told("forgotten, paraphrased", mind, [text for one in asked for text in one.paraphrases])


if __name__ == "__main__":
    main()
