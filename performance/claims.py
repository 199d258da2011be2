"""The claims of papers that ``experiments.py`` looks for, each as a number and a range.

What is ours (a threshold, a control) is said in the claim's own words. The numbers take the runs
of an experiment as ``experiment.json`` has them; see :mod:`evidence` for intervals and the rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from evidence import INFINITE, Claim, Entry, Pick, area, over_records, over_seeds, shares_apart

from delible.bench.table import Number

#: What each experiment is about, in the page's order.
DESCRIBED = {
    "path": "The same stages in another order, then the same unlearning of one stage.",
    "path_depth": "Three kinds of answer learned in any order; gradient ascent on one of them "
    "(U). *Deep*: the other willing answer (C) falls below the refusal too.",
    "coreset": "Unlearning on 5 % of the forget rows, at as many updates as with all of them.",
    "calibrated": "Results mixed with the model before until all keep alike.",
    "meta": "Models that know the forget facts and models that never saw them; a metric is good "
    "if it tells them apart.",
    "novice": "Unlearning to a level of knowledge, then lessons; multiple-choice accuracy.",
    "illusion": "Numbers read on forget texts and on surrogates: texts far from all of them that "
    "the model likes because it learned them. 0 = original, 1 = retrained.",
    "rwku": "Famous people forgotten through passages about them, then asked in other ways. On "
    "models that have not heard of them: made-up people, taught before.",
    "ort": "The same facts in four forms (blank, question, choice, spelled); what is left is the "
    "probability after unlearning as a share of that before.",
}
#: The question of each experiment, which the page answers first.
QUESTIONS = {
    "path": "Does the order of stages show after the same unlearning?",
    "path_depth": "Does the order decide how deep the forgetting goes?",
    "coreset": "Do 5 % of the rows do what all do, where one theme is repeated?",
    "calibrated": "Does a calibrated comparison change the ranking?",
    "meta": "Which metrics tell pools of models apart?",
    "novice": "Does unlearning make a novice who can learn again?",
    "illusion": "Do numbers say 'forgotten' of what is still known in other words?",
    "rwku": "Do blanks and attacks leak what plain questions no longer tell?",
    "ort": "Does forgetting depend on the form, and redirecting a name not?",
}
#: How each experiment is run where it has not been yet; small enough for two cores.
COMMANDS = {
    "path": "delible bench path --model {model} --seeds {seeds} --people 6 --strangers 8 "
    "--limit 6 --every 6 --learned 0.5",
    "path_depth": "delible bench path_depth --model {model} --seeds {seeds} --people 16 "
    "--stage-epochs 10 --epochs 10 --limit 16",
    "coreset": "delible bench coreset --model {model} --seeds {seeds} --rows 40 --fractions 0.05",
    "calibrated": "delible bench calibrated --model {model} --seeds {seeds} "
    "--methods graddiff,npo,simnpo,idk --records 60",
    "meta": "delible bench meta --model {model} --people 8 --forget 2 --pool-seeds {seeds} "
    "--methods npo",
    "novice": "delible bench novice --model {model} --seeds {seeds} --people 8",
    "illusion": "delible bench illusion --model {model} --seeds {seeds} "
    "--methods gradient_ascent,npo,simnpo,idk --epochs 10 --light-rate 5e-4",
    "rwku": "python performance/probes.py rwku runs/rwku-{model} --model {model} --seeds {seeds}",
    "ort": "python performance/probes.py ort runs/ort-{model} --model {model} --seeds {seeds}",
}
#: Runs that the page should have: seeds by model.
WANTED = {"tiny": 3, "default": 1}
#: A difference of extraction strength that counts, in the calibrated comparison.
APART = 0.02


def _less(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _mean(values: np.ndarray) -> float:  # type: ignore[type-arg]
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


# ---- path


def _paths(entry: Entry, seed: int, method: str, title: str) -> dict[str, float]:
    return {
        run["refusals learned"]: run[title] for run in entry.runs
        if run["method"] == method and run["seed"] == seed and run[title] is not None
    }  # fmt: skip


def slowest_last(method: str) -> Callable[[Entry], Number]:
    """How much less the stage is forgotten that was learned last than any other, in nats."""

    def value(entry: Entry, seed: int) -> float | None:
        scores = _paths(entry, seed, method, "forget score")
        last = scores.pop("last", None)
        return None if last is None or not scores else min(scores.values()) - last

    return over_seeds(value)


def moved_apart(method: str) -> Callable[[Entry], Number]:
    """Rise of the mean divergence between paths by unlearning, in nats."""

    def value(entry: Entry, seed: int) -> float | None:
        ends = [
            _paths(entry, seed, method, f"KL to the other paths {when}")
            for when in ("before", "after")
        ]
        if not all(ends):
            return None
        before, after = (sum(end.values()) / len(end) for end in ends)
        return after - before

    return over_seeds(value)


def away_from_retrained(method: str) -> Callable[[Entry], Number]:
    """Of the path for which it is largest: change of the distance to the retrained model."""

    def value(entry: Entry, seed: int) -> float | None:
        before, after = (
            _paths(entry, seed, method, f"KL to retrained {when}") for when in ("before", "after")
        )
        return max((after[place] - before[place] for place in before), default=None)

    return over_seeds(value)


PATH = [
    claim
    for method in ("gradient_ascent", "npo", "simnpo")
    for claim in (
        Claim(
            f"{method}: what was learned last is forgotten slowest",
            "forget score of the slowest other path minus that of the last, nats",
            0, INFINITE, slowest_last(method),
        ),
        Claim(
            f"{method}: the same unlearning drives the histories apart",
            "KL between paths, after minus before, nats",
            0, INFINITE, moved_apart(method),
        ),
        Claim(
            f"{method}: some history ends farther from the retrained model than it began",
            "largest change of KL to the retrained model, nats",
            0, INFINITE, away_from_retrained(method),
        ),
    )
]  # fmt: skip


# ---- path_depth


def _first_or_not(
    value: Callable[[dict[str, object]], float | None],
) -> Callable[[Entry], Number]:
    """Mean over orders that learned U first, minus that over the others."""

    def difference(entry: Entry, seed: int) -> float | None:
        groups: dict[bool, list[float]] = {True: [], False: []}
        for run in entry.runs:
            found = value(dict(run)) if run["seed"] == seed else None
            if found is not None:
                groups[run["order"].startswith("U")].append(found)
        first, others = (groups[which] for which in (True, False))
        if not first or not others:
            return None
        return sum(first) / len(first) - sum(others) / len(others)

    return over_seeds(difference)


def deep_if_first(entry: Entry) -> Number:
    """Share of deep results where U was first, minus that elsewhere.

    Only of runs in which C was likelier than the refusal before: elsewhere it is below from the
    start, and forgetting need not do anything to be called deep.
    """
    groups: dict[bool, list[bool]] = {True: [], False: []}
    for run in entry.runs:
        if run["C before"] is not None and run["C before"] > run["R before"]:
            groups[run["order"].startswith("U")].append(run["depth"] == "deep")
    return shares_apart(groups[True], groups[False])


DEPTH = [
    Claim(
        "orders that begin with U forget deeply, the others superficially",
        "share of deep results, U first minus the others, where C was above R before",
        0, INFINITE, deep_if_first,
    ),
    Claim(
        "where U was first, C falls with it",
        "fall of log p(C), U first minus the others, nats",
        0, INFINITE,
        _first_or_not(lambda run: _less(run["C before"], run["C after"])),  # type: ignore[arg-type]
        1,
    ),
]  # fmt: skip


# ---- coreset


def share_of_effect(
    data: str, selector: str, *, unseen: bool = False
) -> Callable[[Entry, int, Pick], float | None]:
    """(p before - p part) / (p before - p full) of all forget rows, or of those not chosen."""

    def value(entry: Entry, seed: int, pick: Pick) -> float | None:
        start = entry.one(data=data, selector="start")
        full = entry.one(seed, data=data, selector="all")
        part = entry.one(seed, data=data, selector=selector, fraction=0.05)
        if start is None or full is None or part is None:
            return None
        chosen = set(part["chosen"]) if unseen else set()
        rows = [
            [None if place in chosen else one for place, one in enumerate(run["forget_values"])]
            for run in (start, full, part)
        ]
        before, after, mine = (_mean(pick(row)) for row in rows)
        # nothing forgotten by all rows: there is no effect to have a share of
        return (before - mine) / (before - after) if before - after > 0.01 else None

    return value


def _better_than_random(selector: str) -> Callable[[Entry], Number]:
    chosen, random = (share_of_effect("one theme", name) for name in (selector, "random_coreset"))
    return over_records(lambda entry, seed, pick: _less(
        chosen(entry, seed, pick), random(entry, seed, pick)
    ))  # fmt: skip


CORESET = [
    Claim(
        "one theme in many wordings: a random 5 % does what all rows do",
        "share of the effect of all rows",
        0.9, INFINITE, over_records(share_of_effect("one theme", "random_coreset")),
    ),
    Claim(
        "one theme: so it does for the rows that were not chosen (ours)",
        "share of the effect, of rows that were not chosen",
        0.9, INFINITE, over_records(share_of_effect("one theme", "random_coreset", unseen=True)),
    ),
    *(
        Claim(
            f"one theme: choosing by {name} is little better than at random",
            "share of the effect, minus that of random rows",
            -INFINITE, 0.1, _better_than_random(name),
        )
        for name in ("grand", "moderate", "min_k")
    ),
    Claim(
        "independent facts: 5 % does not do it, for the others stay known (ours)",
        "share of the effect, of rows that were not chosen",
        -INFINITE, 0.9,
        over_records(share_of_effect("independent facts", "random_coreset", unseen=True)),
    ),
]  # fmt: skip


# ---- calibrated


def _extraction(entry: Entry, seed: int, method: str, stage: str, pick: Pick) -> float | None:
    run = entry.one(seed, method=method)
    return None if run is None else _mean(pick(run[f"forget, {stage}"]))


def _methods(entry: Entry) -> list[str]:
    names = dict.fromkeys(run["method"] for run in entry.runs)
    return [name for name in names if name not in ("original", "reference")]


def swapped(entry: Entry, seed: int, pick: Pick) -> float | None:
    """Share of pairs of methods that change places, by more than ``APART`` both ways."""
    pairs = list(combinations(_methods(entry), 2))
    if not pairs:
        return None
    count = 0
    for pair in pairs:
        before, after = (
            _less(*(_extraction(entry, seed, name, stage, pick) for name in pair))
            for stage in ("as trained", "calibrated")
        )
        if before is None or after is None:
            return None
        count += before * after < 0 and min(abs(before), abs(after)) > APART
    return count / len(pairs)


def _stronger(method: str, than: str, stage: str) -> Callable[[Entry], Number]:
    return over_records(lambda entry, seed, pick: _less(
        _extraction(entry, seed, than, stage, pick), _extraction(entry, seed, method, stage, pick)
    ))  # fmt: skip


CALIBRATED = [
    Claim(
        "at equal retention methods rank otherwise than as trained",
        f"share of pairs that change places, by more than {APART:g} both ways",
        0, INFINITE, over_records(swapped),
    ),
    *(
        Claim(
            f"calibrated, gradient difference is as strong as {other} or stronger",
            f"forget extraction strength, {other} minus gradient difference",
            -APART, INFINITE, _stronger("graddiff", other, "calibrated"),
        )
        for other in ("npo", "simnpo", "idk")
    ),
]  # fmt: skip


# ---- meta

#: Area between the pools in an independent replication (Llama-3.2-1B, ten learning rates and
#: epochs each; gnueaj/unlearning-depth-score).
REPLICATED = {
    "knowledge_truth_ratio": 0.947, "min_k": 0.907, "loss_attack": 0.902,
    "extraction_strength": 0.891, "zlib_attack": 0.867, "exact_memorisation": 0.817,
    "answer_probability": 0.816, "min_k_plus_plus": 0.816, "rouge_l_recall": 0.722,
    "paraphrase_probability": 0.707,
}  # fmt: skip
TELLS = 0.8


def _faithful(metric: str) -> Callable[[Entry], Number]:
    def number(entry: Entry) -> Number:
        pools = ([run.get(metric) for run in entry.runs if run["pool"] == name] for name in "PN")
        return area(*pools)

    return number


META = [
    Claim(
        f"{metric} tells models that know from others (replication: {seen:g})",
        "area under the curve",
        TELLS, INFINITE, _faithful(metric),
    )
    for metric, seen in REPLICATED.items()
]  # fmt: skip


# ---- novice

TOLD = "told to be a novice"


def more_novice(entry: Entry, seed: int, pick: Pick) -> float | None:
    """Accuracy of the model that is told to be a novice minus that of the unlearned one."""
    told = entry.one(student=TOLD, lesson="none")
    mine = entry.one(seed, student="novice", lesson="none")
    if told is None or mine is None:
        return None
    return _mean(pick(told["answers"])) - _mean(pick(mine["answers"]))


def _recovered(lesson: str) -> Callable[[Entry], Number]:
    def value(entry: Entry, seed: int, pick: Pick) -> float | None:
        before, after = (
            entry.one(seed, student="novice", lesson=kind) for kind in ("none", lesson)
        )
        if before is None or after is None:
            return None
        original, start, end = (
            _mean(pick(row)) for row in (before["original answers"], before["answers"],
                                         after["answers"])
        )  # fmt: skip
        return (end - start) / (original - start) if original - start > 0.02 else None

    return over_records(value)


NOVICE = [
    Claim(
        "unlearning makes more of a novice than being told to be one",
        "accuracy on forgotten people, told minus unlearned",
        0, INFINITE, over_records(more_novice),
    ),
    Claim(
        "a heard lesson brings part of the knowledge back",
        "recovery", 0.1, INFINITE, _recovered("heard"),
    ),
    Claim(
        "a studied lesson brings part of the knowledge back",
        "recovery", 0.1, INFINITE, _recovered("studied"),
    ),
    Claim(
        "a studied lesson about something else does not (ours: it was not only suppressed)",
        "recovery", -INFINITE, 0.1, _recovered("studied, unrelated"),
    ),
]  # fmt: skip


# ---- the erasure illusion


def _of_methods(entry: Entry, seed: int) -> list[Mapping[str, Any]]:
    return [run for run in entry.runs if run.get("seed") == seed and "metric" in run
            and run["method"] not in ("original", "retrained")]  # fmt: skip


def mean_gap(entry: Entry, seed: int) -> float | None:
    """Share forgotten of the forget texts minus that of surrogates, mean of numbers and methods."""
    gaps = [run["gap"] for run in _of_methods(entry, seed) if run["gap"] is not None]
    return sum(gaps) / len(gaps) if gaps else None


def illusions(entry: Entry, seed: int) -> float | None:
    """Of what says "forgotten" of the forget texts, the share that is an illusion."""
    marks = [run["illusion"] for run in _of_methods(entry, seed)
             if run["illusion"] is not None and run["forget"] >= 0.8]  # fmt: skip
    return sum(marks) / len(marks) if marks else None


def surrogates_known(entry: Entry, seed: int, pick: Pick) -> float | None:
    """Extraction strength of surrogates, original minus retrained model."""
    found = [
        entry.one(0, method=method, metric="extraction") for method in ("original", "retrained")
    ]
    if any(run is None for run in found):
        return None
    known, never = (pick(run["surrogate, values"]) for run in found if run is not None)
    return _less(_mean(known), _mean(never))


ILLUSION = [
    Claim(
        "numbers say more is forgotten of the forget texts than of surrogates",
        "gap of shares forgotten, mean over numbers and methods",
        0, INFINITE, over_seeds(mean_gap),
    ),
    Claim(
        "many that say 'forgotten' are illusions",
        "share of numbers that say 'forgotten' while surrogates are known",
        0.2, INFINITE, over_seeds(illusions),
    ),
    Claim(
        "surrogates are known because of the forget texts (control)",
        "extraction strength of surrogates, original minus retrained",
        0, INFINITE, over_records(surrogates_known),
    ),
]  # fmt: skip

# ---- rwku and ort: what is left of each form


def _left(entry: Entry, seed: int, method: str, split: str, pick: Pick) -> float | None:
    """Value after unlearning as a share of that before, over all targets."""
    tasks = dict.fromkeys(run["task"] for run in entry.runs)
    before: list[float] = []
    after: list[float] = []
    for task in tasks:
        original = entry.one(method="original", task=task)
        mine = entry.one(seed, method=method, task=task)
        if original is None or mine is None or split not in original or split not in mine:
            return None
        before.append(_mean(pick(original[split])))
        after.append(_mean(pick(mine[split])))
    start = sum(before)
    return sum(after) / start if start > 0.02 * len(before) else None


def leaks_more(method: str, split: str) -> Callable[[Entry], Number]:
    """What is left of a way to ask, minus what is left of plain questions."""
    return over_records(lambda entry, seed, pick: _less(
        _left(entry, seed, method, split, pick),
        _left(entry, seed, method, "forget_question", pick),
    ))  # fmt: skip


RWKU = [
    claim
    for method in ("gradient_ascent", "npo")
    for claim in (
        Claim(
            f"{method}: blanks leak more than questions",
            "share of ROUGE-L left, blanks minus questions",
            0, INFINITE, leaks_more(method, "forget_blank"),
        ),
        Claim(
            f"{method}: attacking questions leak more than questions",
            "share of ROUGE-L left, attacks minus questions",
            0, INFINITE, leaks_more(method, "forget_attack"),
        ),
    )
]  # fmt: skip
FORMS = ("blank", "question", "choice", "spelled")


def _forms(entry: Entry, seed: int, method: str, pick: Pick) -> list[float] | None:
    found = [_left(entry, seed, method, f"forget_{form}", pick) for form in FORMS]
    known = [value for value in found if value is not None]
    return known if len(known) > 1 else None


def gap(method: str) -> Callable[[Entry, int, Pick], float | None]:
    """Share left of the form that is forgotten least, minus that of the one forgotten most."""

    def value(entry: Entry, seed: int, pick: Pick) -> float | None:
        left = _forms(entry, seed, method, pick)
        return None if left is None else max(left) - min(left)

    return value


def least_gone(method: str) -> Callable[[Entry, int, Pick], float | None]:
    """Share that is gone of the form that is forgotten least."""

    def value(entry: Entry, seed: int, pick: Pick) -> float | None:
        left = _forms(entry, seed, method, pick)
        return None if left is None else 1 - max(left)

    return value


def _narrower(method: str, than: str) -> Callable[[Entry], Number]:
    mine, theirs = gap(method), gap(than)
    return over_records(lambda entry, seed, pick: _less(
        theirs(entry, seed, pick), mine(entry, seed, pick)
    ))  # fmt: skip


ORT: Sequence[Claim] = [
    *(
        Claim(
            f"{method} depends on the form: some are forgotten, others not",
            "share left, of the form kept best minus that kept worst",
            0.2, INFINITE, over_records(gap(method)),
        )
        for method in ("gradient_ascent", "npo")
    ),
    Claim(
        "rocr forgets in every form",
        "share that is gone of the form kept best",
        0.5, INFINITE, over_records(least_gone("rocr")),
    ),
    Claim(
        "rocr depends less on the form than npo",
        "gap between forms, npo minus rocr",
        0, INFINITE, _narrower("rocr", "npo"),
    ),
]  # fmt: skip

CLAIMS: dict[str, Sequence[Claim]] = {
    "path": PATH, "path_depth": DEPTH, "coreset": CORESET, "calibrated": CALIBRATED,
    "meta": META, "novice": NOVICE, "illusion": ILLUSION, "rwku": RWKU, "ort": ORT,
}  # fmt: skip
