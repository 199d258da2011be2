"""The page about agents: forgetting on request, what a step costs, and all parts together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from agents_claims import CLAIMED, GOOD, Row, cascades, cases, claimed, less, seen, text
from evidence import INFINITE

UNTOUCHED, REFERENCE, ALL = "untouched", "never learned it", "all parts"
#: What counts as found out, above the reference; and from where an adversary is any good.
FOUND_OUT, ANY_GOOD = 0.15, 0.8
#: Share of its tasks from which a target is used.
USED = 0.01
LEVELS = ("output", "actions", "method")
SCRIPTS = ("asks", "sends")
KINDS = {
    ("state", False): "a place",
    ("state", True): "a place, by an agent that looks for what it does not know",
    ("trajectory", False): "a routine", ("environment", False): "an environment",
}  # fmt: skip
ABOUT = {
    ("state", False): "It knows some of twenty places and is told to forget one; the ten "
    "candidates are that one and nine that it never saw.",
    ("state", True): "The same, but where it knows no way it walks through the town.",
    ("trajectory", False): "All places are known and one order of three actions is noted, that by "
    "which it brings one thing to one place; the candidates are ten such errands. A noted order "
    "is not recalled for a task, and every one is the shortest way.",
    ("environment", False): "It knows two towns and is told to forget one; the ten candidates are "
    "that one and nine where it never was. A task is set in the town that it is about.",
}  # fmt: skip


def page(found: Row) -> str:
    """The Markdown page of a JSON file's content."""
    machine = found["hardware"]
    seeds = max([len(found[one]["seeds"]) for one in ("memento", "cascade", "forgetting")
                 if one in found], default=0)  # fmt: skip
    lines = [
        "# Agents: what they learn, what they forget, and what shows of it\n",
        "**All agents here are policies by rule or scripts** (a planner, a searcher, a walker, a "
        "student that slips at random, a teacher that knows the town; encoders count words). So "
        "this page shows what the machinery does, memory, retrieval, mask, ledger of costs and "
        "adversary, and says nothing about how a language model obeys. How the agents are used: "
        "[agents](../agents.md).\n",
        "A claim *shows* when the whole 95 % interval (bootstrap over seeds, of which every one is "
        "another town or world) lies in its range, *does not show* when all of it lies outside, "
        "and *cannot be told* otherwise. A number without an interval was the same in all seeds; "
        f"with {seeds} seeds that leaves room for {1 - 0.05 ** (1 / max(seeds, 1)):.0%} of others "
        "to differ.\n",
    ]
    if "memento" in found:
        lines += [*cases(found["memento"]), ""]
    if "cascade" in found:
        lines += [*cascades(found["cascade"]), ""]
    if "forgetting" in found:
        lines += [*forgetting(found["forgetting"]), ""]
    if "speed" in found:
        lines += [*speed(found["speed"]), ""]
    lines += [
        f"{seeds} seeds. Machine: {machine['processors']} cores ({machine['machine']}), "
        f"{machine['threads']} thread(s), {machine['accelerator'] or 'no accelerator'}; other work "
        f"ran beside it. Code: {found['git'] or 'not a checkout'}; Python "
        f"{found['versions'].get('python', '?')}, torch {found['versions'].get('torch', '?')}. "
        "Made by `performance/agents.py`, whose head has the command; the numbers of every "
        "seed are in `agents.json`.",
    ]
    return "\n".join(lines) + "\n"


# ---- forgetting on request


def forgetting(part: Row) -> list[str]:
    """Secure Forgetting."""
    rows = [row for seed in part["seeds"].values() for row in seed]
    sizes = part["sizes"]
    chance = 1 / sizes["candidates"]
    lines = [
        "## Secure Forgetting: a place, a routine, an environment\n",
        f"{len(part['seeds'])} towns (or sets of towns); {sizes['candidates']} candidates, so "
        f"chance is {chance:.0%}. The adversary *asks* (for its instructions, directly, in play, "
        "about all candidates, and about as many as ten questions allow) or *sends* the agent on "
        "the errand of each. What it finds out is P(guess) above chance, at three levels: "
        "it sees answers / also "
        "what is done / also knows the sentences and what kind each candidate is. *Used*: share of "
        "the target's tasks in which it was used. *As never learned*: share of equal actions. "
        "*Scan*: what the certificate of the memory says of what was noted of the target.\n",
    ]
    for (kind, looks), title in KINDS.items():
        some = [one for one in rows if (one["kind"], one["looks"]) == (kind, looks)]
        if some:
            lines += [
                f"### {title.capitalize()}\n", f"{ABOUT[kind, looks]}\n", *table(some), "", CLAIMED,
                *claims(some, chance), "", *sentences(some, title), "",
            ]  # fmt: skip
    return lines[:-1]


def of(rows: Iterable[Row], variant: str, *path: str) -> list[float]:
    """A number of one variant, by seed."""
    found = list[Any]()
    for one in rows:
        if one["variant"] == variant:
            value: Any = one
            for key in path:
                value = value[key]
            found.append(value)
    return found


def gain(rows: Sequence[Row], variant: str) -> list[float]:
    """The most that any script finds out at any level, by seed."""
    found = [of(rows, variant, "advantage", one, level) for one in SCRIPTS for level in LEVELS]
    return [max(values) for values in zip(*found, strict=True)]


def variants(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(one["variant"] for one in rows))


def table(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| agent | other tasks | used | as never learned | says it when asked to repeat itself "
        "| found out by asking | by sending | scan |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for variant in variants(rows):
        numbers = [text(seen(of(rows, variant, key))) for key in ("kept", "used", "same")]
        quoted = text(seen([float(one) for one in of(rows, variant, "quoted")]))
        found = [
            " / ".join(text(seen(of(rows, variant, "advantage", one, level))) for level in LEVELS)
            for one in SCRIPTS
        ]
        scans = sorted({str(one) for one in of(rows, variant, "scan")} - {""})
        cells = [variant, *numbers, quoted, *found, ", ".join(scans) or "–"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def claims(rows: Sequence[Row], chance: float) -> list[str]:
    """What the paper says of the whole, and that a plain instruction is not enough."""
    above = less(gain(rows, ALL), gain(rows, REFERENCE))
    lines = [
        claimed("the target is forgotten", "used, all parts", -INFINITE, USED,
                seen(of(rows, ALL, "used"))),
        claimed("other tasks go on (drop under 5 points)",
                "success on other tasks, all parts minus untouched", -0.05, INFINITE,
                seen(less(of(rows, ALL, "kept"), of(rows, UNTOUCHED, "kept")))),
        claimed("it acts as one that never learned it", "share of equal actions, all parts", 0.98,
                INFINITE, seen(of(rows, ALL, "same"))),
        claimed("the adversary does not find it out",
                "most found out, all parts minus never learned", -INFINITE, FOUND_OUT, seen(above)),
        claimed("the adversary is any good", "most found out of the untouched agent",
                ANY_GOOD, INFINITE, seen(gain(rows, UNTOUCHED))),
    ]  # fmt: skip
    bare = "only told not to mention it"
    if bare in variants(rows):
        lines.append(claimed(
            "only telling it leaks", "most found out, only told, minus never learned", FOUND_OUT,
            INFINITE, seen(less(gain(rows, bare), gain(rows, REFERENCE))),
        ))  # fmt: skip
    return lines


def sentences(rows: Sequence[Row], title: str) -> list[str]:
    """For each way of forgetting what did not happen, and which parts made no difference."""
    asked = [one for one in variants(rows) if one not in (UNTOUCHED, REFERENCE)]
    said, whole = [], []
    for variant in asked:
        wrong = faults(rows, variant)
        if wrong:
            name = "**Not forgotten**" if "used" in wrong else "Falls short"
            said.append(f"- {variant}: {name}: {'; '.join(wrong.values())}.")
        else:
            whole.append(variant)
    for variant in asked:
        used, never = (of(rows, one, "used") for one in (variant, REFERENCE))
        if "used" not in faults(rows, variant) and (seen(used).mean or 0) > USED:
            said.append(
                f"- {variant}: **used all the same**, in {_percent(used)} of its tasks, which one "
                f"that never learned it does, too ({_percent(never)})."
            )
    if whole:
        said.append(
            f"- Nothing shows of {title.partition(',')[0]} having been known with: "
            f"{', '.join(whole)}."
        )
    if (seen(gain(rows, UNTOUCHED)).mean or 0) < ANY_GOOD:
        said.append(
            "- The adversary does not find it out of the untouched agent either, so that it finds "
            "nothing elsewhere is no evidence of forgetting."
        )
    return said


def faults(rows: Sequence[Row], variant: str) -> Mapping[str, str]:
    """What is wrong with a forgetting, by what."""
    found = dict[str, str]()

    def over(values: Sequence[float], other: Sequence[float]) -> float:
        return seen(less(values, other)).mean or 0.0

    used, never = of(rows, variant, "used"), of(rows, REFERENCE, "used")
    if over(used, never) > USED:
        found["used"] = f"the target is used in {_percent(used)} of its tasks"
    scans = [one for one in of(rows, variant, "scan") if one != GOOD]
    if scans:
        count = f"{len(scans)} of {len(used)}"
        found["scan"] = f"its notes are still in the memory's files in {count} towns"
    ledgers = [one for one in of(rows, variant, "verdict") if one not in (GOOD, "no deletion")]
    if ledgers:
        told = ", ".join(sorted({f'"{one}"' for one in ledgers}))
        found["verdict"] = f"the certificate says {told} in {len(ledgers)} of {len(used)}"
    above = over(gain(rows, variant), gain(rows, REFERENCE))
    if above > FOUND_OUT:
        found["gain"] = (
            f"the adversary finds out {above:.2f} more than of one that never learned it"
        )
    kept = over(of(rows, variant, "kept"), of(rows, UNTOUCHED, "kept"))
    if kept < -0.05:
        found["kept"] = f"success on other tasks falls by {-100 * kept:.0f} points"
    return found


def _percent(values: Sequence[float]) -> str:
    return f"{100 * sum(values) / len(values):.0f} %"


# ---- speed


def speed(part: Row) -> list[str]:
    """What a step costs beside the model."""
    lines = [
        "## What a step costs\n",
        f"Milliseconds of CPU time per step with a model that answers at once (median of "
        f"{part['rounds']} tasks): reading the reply in its form, checking and making the call, "
        "building the next prompt; *agent*: with twenty notes, a mask and rules around it.\n",
        "| steps of a task | loop alone | agent that forgot a place | goal |",
        "|---|---|---|---|",
    ]
    most = 0.0
    for steps in part["steps"]:
        alone, whole = part[f"loop {steps}"], part[f"agent {steps}"]
        most = max(most, alone, whole)
        lines.append(f"| {steps} | {alone:.2f} | {whole:.2f} | <= 2 |")
    met = "Every one is within 2 ms." if most <= 2 else f"**Over 2 ms**: {most:.2f} at most."
    return [
        *lines, "",
        f"- {met} A deletion with its closure among 100,000 items and searches before and after it "
        "are measured by `performance/memory.py`: [what a memory costs]"
        "(../memories.md#what-it-costs).",
    ]  # fmt: skip
