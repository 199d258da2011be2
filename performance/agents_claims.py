"""What cases and cascades show: tables, claims and sentences from the numbers alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from evidence import INFINITE, Claim, interval, verdict

from delible.acting.cost import break_even
from delible.bench.table import Number
from delible.measure.evaluate import bootstrap_interval

Row = Mapping[str, Any]
#: An output token costs so many input tokens; a teacher's token so many of a student's.
OUTPUT, PRICES, PRICE = 5, (3, 10, 30, 100), 10
#: A share is as another one within so much.
ALIKE = 0.02
GOOD = "nothing found"
WAYS = {
    "student": "student alone", "shown": "student with demonstrations", "cascade": "cascade",
    "larger": "cascade, two samples more, twice the demonstrations", "teacher": "teacher alone",
}  # fmt: skip
CLAIMED = "| claim | number | range | seen | |\n|---|---|---|---|---|"


def seen(values: Iterable[float | None]) -> Number:
    """The mean over seeds with its bootstrap interval; a point where all seeds are alike."""
    known = [one for one in values if one is not None]
    if len(known) < 2:
        return Number(known[0] if known else None, runs=len(known))
    low, high = bootstrap_interval(known, 0)
    return Number(sum(known) / len(known), low, high, len(known))


def text(number: Number, digits: int = 2) -> str:
    """A number, with its interval where seeds differ."""
    if number.low is None or number.high is None or math.isclose(number.low, number.high):
        return interval(Number(number.mean), digits)
    return interval(number, digits)


def claimed(says: str, measured: str, low: float, high: float, number: Number, digits: int = 2
            ) -> str:  # fmt: skip
    """A row of claims: what is said, the number, where it would lie, and whether it does."""
    claim = Claim(says, measured, low, high, lambda _: number, digits)
    told = [says, measured, claim.range_text(), text(number, digits), verdict(claim, number)]
    return f"| {' | '.join(told)} |"


# ---- cases


def cases(part: Row) -> list[str]:
    """Memento."""
    rows = list(part["seeds"].values())
    sizes = part["sizes"]

    def of(way: str, *path: str) -> list[float]:
        return [_at(one["ways"][way], path) for one in rows]

    bare = [one["without"] for one in rows]
    lines = [
        "## Memento: which case a planner is shown\n",
        f"{len(rows)} made-up worlds of {rows[0]['questions']} questions, of which "
        f"{rows[0]['held_out']} are held out; the others are gone through {sizes['passes']} times. "
        "There are three ways to search, the right one depends on the kind of question, and some "
        "questions none answers (*best possible*). Then one person is forgotten; the reference is "
        "an agent that lived the same without any question about this person.\n",
        "| success | held out | about the person: before | after | never learned "
        "| about others: before | after | never learned |",
        "|---|---|---|---|---|---|---|---|",
        f"| no memory | {text(seen(bare))} |" + " |" * 6,
    ]
    for way in ("likeness", "learned"):
        cells = [text(seen(of(way, "held_out")))] + [
            text(seen(of(way, time, who, "success")))
            for who in ("theirs", "others") for time in ("before", "after", "never")
        ]  # fmt: skip
        lines.append(f"| {way} | {' | '.join(cells)} |")
    lines += [
        f"| best possible | {text(seen(one['ceiling'] for one in rows))} |" + " |" * 6, "", CLAIMED,
    ]  # fmt: skip
    for way, low in (
        ("likeness", bare),
        ("learned", bare),
        ("learned", of("likeness", "held_out")),
    ):
        other = "no memory" if low is bare else "likeness"
        says = ("cases help with questions never met" if low is bare
                else "a learned choice is better than likeness")  # fmt: skip
        lines.append(claimed(
            f"{says} ({way})", f"held-out success, {way} minus {other}", 0, INFINITE,
            seen(less(of(way, "held_out"), low)),
        ))  # fmt: skip
    for way in ("likeness", "learned"):
        lines += [
            claimed(
                f"the person's tasks go as if never learned ({way})",
                "success, forgotten minus never learned", -ALIKE, ALIKE,
                seen(less(of(way, "after", "theirs", "success"),
                           of(way, "never", "theirs", "success"))),
            ),
            claimed(
                f"others' tasks stay ({way})", "success, after minus before", -ALIKE, ALIKE,
                seen(less(of(way, "after", "others", "success"),
                           of(way, "before", "others", "success"))),
            ),
            claimed(
                f"every answer is as if never learned ({way})",
                "share of equal answers, forgotten and never learned", 1 - ALIKE, INFINITE,
                seen([(one["ways"][way]["same"]["theirs"] + one["ways"][way]["same"]["others"]) / 2
                      for one in rows]),
            ),
        ]  # fmt: skip
    return [*lines, "", *case_sentences(rows)]


def case_sentences(rows: Sequence[Row]) -> list[str]:
    """What of a person is left, and what became of the learned choice."""
    said = [f"- {verdicts([one['verdict'] for one in rows], 'world')}"]
    for way in ("likeness", "learned"):
        times = {time: seen(_at(one["ways"][way], (time, "theirs", "retrieved")) for one in rows)
                 for time in ("before", "after")}  # fmt: skip
        before, after = (f"{100 * (times[time].mean or 0):.0f} %" for time in ("before", "after"))
        still = "" if not times["after"].mean else "**Still retrieved.** "
        said.append(
            f"- {still}Of the cases retrieved ({way}) for questions about the person {before} name "
            f"them before, {after} after."
        )
    shown = sum(one["ways"][way]["after"][who]["shown"] for one in rows
                for way in ("likeness", "learned") for who in ("theirs", "others"))  # fmt: skip
    if shown:
        said.append("- **The name still stands in cases that the planner is shown.**")
    refused = sum(one["stale"] for one in rows)
    apart = max(one["scorers_apart"] for one in rows)
    said.append(
        f"- The scorer that was trained on what went was refused in {refused} of {len(rows)} "
        f"worlds until it was trained anew; then it differs from one that is trained on a bank "
        f"of what is left by {apart:g} in its largest weight."
    )
    again, anew = ([one for row in rows for one in row[name]]
                   for name in ("learned_again", "learned_anew"))  # fmt: skip
    said.append(
        f"- Asked once more, {sum(again)} of {len(again)} questions that were forgotten were "
        f"learned again; of questions about the person that were never asked before, "
        f"{sum(anew)} of {len(anew)} (a tombstone knows what it was, not whom it was about)."
    )
    return said


# ---- cascades


def cost(row: Row, price: float) -> float:
    """Of an episode, in input tokens of the student."""
    of = {who: row[who]["in"] + OUTPUT * row[who]["out"] for who in ("student", "teacher")}
    return (of["student"] + price * of["teacher"]) / row["episodes"]


def pays(row: Row, price: float, way: str) -> float:
    """Episodes after which the demonstrations are paid."""
    shown = price * (row["demonstrations"]["in"] + OUTPUT * row["demonstrations"]["out"])
    return break_even(shown, cost(row["ways"]["teacher"], price), cost(row["ways"][way], price))


def cheaper_from(row: Row, way: str) -> float:
    """From which price of a teacher's token, in student's, a way is cheaper than the teacher."""
    own = cost({**row["ways"][way], "teacher": {"in": 0, "out": 0}}, 0)
    saved = cost(row["ways"]["teacher"], 1) - (cost(row["ways"][way], 1) - own)
    return own / saved if saved > 0 else math.inf


def cascades(part: Row) -> list[str]:
    """In-context distillation."""
    rows, sizes = list(part["seeds"].values()), part["sizes"]

    def of(way: str, what: Callable[[Row], float]) -> list[float]:
        return [what(one["ways"][way]) for one in rows]

    lines = [
        "## In-context distillation: a student, its teacher, and both\n",
        f"{len(rows)} towns, {sizes['asked']} goals each that no demonstration has; "
        f"{sizes['shown']} demonstrations by a teacher that knows the town. The student knows what "
        f"it is shown, and {sizes['slips']:.0%} of its samples are slips. N = {sizes['samples']}, "
        f"k = {sizes['demonstrations']}. Tokens are words and signs, of an episode; a prompt that "
        "is drawn from several times is counted once. Costs: a token of the teacher costs "
        f"{PRICE} of the student's, an output token {OUTPUT} input tokens.\n",
        "| who | success | steps by the teacher | student's tokens | teacher's tokens "
        f"| cost against the teacher alone {' | '.join(f'at {one}:1' for one in PRICES)} |",
        "|---" * (5 + len(PRICES)) + "|",
    ]
    for way, name in WAYS.items():
        counts = [
            seen(of(way, lambda row, who=who: sum(row[who].values()) / row["episodes"]))
            for who in ("student", "teacher")
        ]
        ratios = [
            seen(cost(one["ways"][way], price) / cost(one["ways"]["teacher"], price)
                 for one in rows) for price in PRICES
        ]  # fmt: skip
        share = "" if way == "teacher" else text(seen(of(way, lambda row: row["escalated"])))
        cells = [text(seen(of(way, lambda row: row["success"]))), share,
                 *(text(one, 0) for one in counts), *(text(one) for one in ratios)]  # fmt: skip
        lines.append(f"| {name} | {' | '.join(cells)} |")

    def gap(one: str, other: str) -> Number:
        return seen(less(of(one, lambda r: r["success"]), of(other, lambda r: r["success"])))

    def ratio(way: str) -> Number:
        return seen(cost(one["ways"]["teacher"], PRICE) / cost(one["ways"][way], PRICE)
                    for one in rows)  # fmt: skip

    forgotten = [one["forgotten"] for one in rows]
    lines += ["", CLAIMED,
        claimed("demonstrations make a student act like its teacher",
                "success, shown minus alone", 0, INFINITE, gap("shown", "student")),
        claimed("asking the teacher where samples disagree helps", "success, cascade minus shown",
                0, INFINITE, gap("cascade", "shown")),
        claimed("few steps need the teacher (3.9 % and 22.2 % in the paper)",
                "share of steps by the teacher", -INFINITE, 0.25,
                seen(of("cascade", lambda row: row["escalated"]))),
    ]  # fmt: skip
    for way in ("cascade", "larger"):
        lines += [
            claimed("as good as the teacher", f"success, {WAYS[way]} minus teacher", -0.05,
                    INFINITE, gap(way, "teacher")),
            claimed("at less cost (2.5 and 2 times in the paper)",
                    f"cost of the teacher over that of the {WAYS[way]}, at {PRICE}:1", 1, INFINITE,
                    ratio(way)),
        ]  # fmt: skip
    lines += [
        claimed("a forgotten thing's tasks go as if it was never shown",
                "success, forgotten minus never shown", -ALIKE, ALIKE,
                seen(less([o["after"]["theirs"] for o in forgotten],
                          [o["never"]["theirs"] for o in forgotten]))),
        claimed("other goals keep their success", "success, after minus before", -ALIKE, INFINITE,
                seen(less([o["after"]["others"] for o in forgotten],
                           [o["before"]["others"] for o in forgotten]))),
        claimed("every episode is as if never shown", "share of equal episodes", 1 - ALIKE,
                INFINITE, seen(one["same"] for one in forgotten)),
    ]  # fmt: skip
    return [*lines, "", *cascade_sentences(rows)]


def equally(gap: Number) -> str:
    """How a success compares with another one, from their difference."""
    low, high = (gap.mean if end is None else end for end in (gap.low, gap.high))
    if low is None or high is None:
        return "not compared with"
    if low > -0.05:
        return "as good as"
    return "**not as good as**" if high <= -0.05 else "cannot be told to be as good as"


def cascade_sentences(rows: Sequence[Row]) -> list[str]:
    """Where it pays, and what forgetting a thing's demonstrations did."""
    said = []
    for way in ("cascade", "larger"):
        gap = seen(one["ways"][way]["success"] - one["ways"]["teacher"]["success"] for one in rows)
        episodes = [pays(one, PRICE, way) for one in rows]
        never = sum(map(math.isinf, episodes))
        some = [one for one in episodes if not math.isinf(one)]
        paid = f"paid after {text(seen(some), 0)} episodes" if some else "never paid"
        prices = seen(one for one in (cheaper_from(row, way) for row in rows) if one < math.inf)
        said.append(
            f"- {WAYS[way]}: {equally(gap)} the teacher within "
            f"5 points ({text(gap)}); its demonstrations are {paid} at {PRICE}:1"
            f"{f', never in {never} of {len(rows)} towns' if never and some else ''}; it is "
            f"cheaper than the teacher from a price of {text(prices, 1)}:1 on."
        )
    forgotten = [one["forgotten"] for one in rows]
    said.append(f"- {verdicts([one['verdict'] for one in forgotten], 'town')}")
    left = sum(one["retrieved"] or 0 for one in forgotten)
    count = sum(one["demonstrations"] for one in forgotten) / len(rows)
    before = sum(one["demonstrations"]["count"] for one in rows) / len(rows)
    parts = {time: seen(one[time]["theirs"] for one in forgotten) for time in ("before", "after")}
    said.append(
        f"- {'**Still retrieved.** ' if left else ''}Forgetting the thing takes {count:.1f} of "
        f"{before:.0f} demonstrations with it (those that name it); "
        f"{'some' if left else 'none'} of what is retrieved names it afterwards. Success on goals "
        f"about it falls from {text(parts['before'])} to {text(parts['after'])}, and the share of "
        f"steps by the teacher goes from {text(seen(o['escalated']['before'] for o in forgotten))} "
        f"(all goals) to {text(seen(o['escalated']['after'] for o in forgotten))} (other goals)."
    )
    return said


# ---- helpers


def verdicts(found: Sequence[str], what: str) -> str:
    bad = [one for one in found if one != GOOD]
    if not bad:
        return f'The certificate says "{GOOD}" in all {len(found)} {what}s.'
    told = ", ".join(sorted({f'"{one}"' for one in bad}))
    return f"**Not forgotten** in {len(bad)} of {len(found)} {what}s: the certificate says {told}."


def less(one: Sequence[float | None], other: Sequence[float | None]) -> list[float | None]:
    return [None if a is None or b is None else a - b for a, b in zip(one, other, strict=True)]


def _at(found: Row, path: Sequence[str]) -> Any:
    for key in path:
        found = found[key]
    return found
