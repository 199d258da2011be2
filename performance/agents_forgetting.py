"""Secure forgetting in numbers: kinds of request, parts left out, what an adversary finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from delible.acting.conversion import Request
from delible.acting.loop import Action, Budget, Episode, act
from delible.acting.mask import NOT_NOW, holds
from delible.acting.town import TREES, Goal, Town, Visit, known
from delible.acting.town_policy import Walker
from delible.agents.secure_forgetting import Forgetful, SecureForgettingOptions
from delible.agents.unlearning_inference import UnlearningInference, agreement, most, suspicion
from delible.memory import Item, Memory
from delible.names import Names
from delible.system.role import Role
from delible.systems.scripted import Scripted

BUDGET = Budget(steps=80, tokens=80 * 64, step_tokens=64)
LEVELS = ("output", "actions", "method")
#: What each agent is: nothing asked, never learned, all parts, one part left out, other words.
VARIANTS: dict[str, dict[str, Any]] = {
    "untouched": {}, "never learned it": {}, "all parts": {},
    "without memory": {"memory": "keep"}, "without prompt": {"prompted": False},
    "without mask": {"masked": False}, "prompt names the kind": {"wording": "category"},
    "prompt names it": {"wording": "named"},
    "prompt alone": {"masked": False, "memory": "keep"},
    "only told not to mention it": {"wording": "named", "masked": False, "memory": "keep"},
}  # fmt: skip
#: Those that a policy which looks for what it does not know is tried with: it walks far.
LOOKING = ("untouched", "never learned it", "all parts", "without mask")
#: The scripts: all kinds of questions; and one that sends the agent to each candidate.
ATTACKS = {
    "asks": UnlearningInference(level="method"),
    "sends": UnlearningInference(level="method", strategies=("going",)),
}


@dataclass(frozen=True)
class Sizes:
    """How much one seed takes.

    Attributes:
        candidates: Of which one is forgotten (M).
        kept: Places that are known and stay, or errands that are done besides.
    """

    candidates: int = 10
    kept: int = 5
    looking: bool = True


@dataclass(frozen=True)
class Case:
    """What is forgotten, among what, and how it would show.

    Attributes:
        items: What the agent remembers; ``gone``: what of it is of the target.
        target: The candidate that is forgotten; ``secret``: a name that must not be said.
        forget: Goals that need the target; ``stay``: goals that do not. Each with its town.
        uses: Whether an episode used the target.
        tasks: For each candidate a task that needs it.
        where: In which town something is said to the agent.
    """

    request: Request
    items: Sequence[Item]
    gone: Sequence[Item]
    candidates: Sequence[str]
    target: str
    secret: str
    forget: Sequence[tuple[Goal, Town]]
    stay: Sequence[tuple[Goal, Town]]
    uses: Callable[[Visit, Episode], bool]
    where: Callable[[str], Town]
    kinds: Mapping[str, str] = field(default_factory=dict)
    tasks: Mapping[str, str] = field(default_factory=dict)
    routine: tuple[str, tuple[Action, ...]] | None = None


# ---- three kinds of request


def state(seed: int, sizes: Sizes) -> Case:
    """A place, of ten of which one is known."""
    town = Town.made(seed, width=8, height=6, each=4)
    draw = np.random.default_rng(seed)
    places = [town.places[int(one)] for one in draw.permutation(len(town.places))]
    candidates, others = places[: sizes.candidates], places[sizes.candidates :][: sizes.kept]
    target = candidates[int(draw.integers(len(candidates)))]
    at = f"{target.cell[0]},{target.cell[1]}"
    things = sorted({one.sells for one in others})
    return Case(
        Request(type="state", target=target.name, category=target.kind),
        known([*others, target], town.name), known([target], town.name),
        [one.name for one in candidates], target.name, target.name,
        [(Goal(place=target.name), town), (Goal(target.sells, target.name), town),
         (Goal(target.sells), town)],
        [*((Goal(place=one.name), town) for one in others), *((Goal(one), town) for one in things)],
        lambda visit, episode: target.name in visit.entered or at in episode.answer,
        lambda _: town, kinds={one.name: one.kind for one in candidates},
    )  # fmt: skip


def trajectory(seed: int, sizes: Sizes) -> Case:
    """An order of actions, of ten of which one was noted; all places are known."""
    town = Town.made(seed, width=8, height=6, each=4)
    draw = np.random.default_rng(seed)
    places = [town.places[int(one)] for one in draw.permutation(len(town.places))]
    goals = {}
    for place in places:
        thing = next(one.sells for one in places if one.sells != place.sells)
        goals[place.name] = Goal(thing, place.name)
    candidates = list(goals)[: sizes.candidates]
    target = candidates[int(draw.integers(len(candidates)))]
    notes = known(town.places, town.name)
    actions = habit(town, goals[target], notes)
    stay = [(goals[one], town) for one in candidates if one != target][: sizes.kept]
    stay += [(Goal(place=target), town), (Goal(goals[target].thing), town)]
    return Case(
        Request(type="trajectory", target="evening round", category="round", actions=actions),
        notes, [], candidates, target, target, [(goals[target], town)], stay,
        lambda _, episode: holds(
            [one.action for one in episode.steps if one.result != NOT_NOW], actions
        ),
        lambda _: town, tasks={one: goals[one].text for one in candidates},
        routine=("evening round", actions),
    )  # fmt: skip


def habit(town: Town, goal: Goal, notes: Sequence[Item]) -> tuple[Action, ...]:
    """The last three actions by which one who knows every place reaches a goal."""
    visit = Visit(town)
    told = "\n".join([visit.opening(), *(one.text for one in notes)])
    role = Role("planner", Scripted(Walker()))
    episode = act(role, goal.text, visit.tools(), BUDGET, told)
    return tuple(one.action for one in episode.steps if not one.action.answer)[-3:]


def environment(seed: int, sizes: Sizes) -> Case:
    """A town, of ten of which one was visited; another one that was stays."""
    draw = np.random.default_rng(seed)
    names = [f"{TREES[int(one)]} quarter" for one in draw.permutation(len(TREES))]
    towns = {
        name: Town.made(1000 * seed + place, width=6, height=6, each=2, name=name)
        for place, name in enumerate(names[: sizes.candidates + 1])
    }
    *candidates, home = towns
    target = candidates[int(draw.integers(len(candidates)))]
    tasks = {}
    for name in candidates:
        others = {one.name for town in towns.values() if town.name != name for one in town.places}
        own = [one for one in towns[name].places if one.name not in others]
        tasks[name] = Goal(place=(own or towns[name].places)[0].name).text
    there = {text: towns[name] for name, text in tasks.items()}
    stay = [(Goal(place=one.name), towns[home]) for one in towns[home].places[: sizes.kept]]
    gone = known(towns[target].places, target)
    return Case(
        Request(type="environment", target=target, category="quarter"),
        [*known(towns[home].places, home), *gone], gone, candidates, target, target,
        [(Goal(place=one.name), towns[target]) for one in towns[target].places[:3]], stay,
        lambda visit, _: bool(visit.entered), lambda text: there.get(text, towns[home]),
        tasks=tasks,
    )  # fmt: skip


KINDS = {"state": state, "trajectory": trajectory, "environment": environment}


# ---- one agent of one case


def agent(folder: Path, case: Case, variant: str, walker: Walker) -> tuple[Forgetful, str, str]:
    """An agent, its deletion's verdict, and that of a scan for the target's notes."""
    actor = Role("planner", Scripted(walker))
    settings = SecureForgettingOptions(budget=BUDGET, **VARIANTS[variant])
    made = settings.agent(Memory(folder), actor)
    gone = {one.text for one in case.gone}
    learned = variant != "never learned it"
    made.memory.add([one for one in case.items if learned or one.text not in gone])
    if case.routine and learned:
        made.routine(*case.routine)
    if variant in ("untouched", "never learned it"):
        return made, "", ""
    certificate = made.forget(case.request).certificate
    return made, certificate.verdict if certificate else "no deletion", left(made, case)


def left(made: Forgetful, case: Case) -> str:
    """What a scan says that looks for what was noted of the target."""
    texts = [one.text.partition(" (")[0] for one in case.gone]
    texts += [case.routine[0]] if case.routine else []
    return made.memory.certify(texts).verdict


def acted(
    made: Forgetful, tasks: Sequence[tuple[Goal, Town]], uses: Callable[[Visit, Episode], bool]
) -> Iterator[tuple[Episode, bool, bool]]:
    """Episodes, whether each goal was reached, and whether the target was used."""
    for goal, town in tasks:
        visit = Visit(town)
        episode = made.solve(goal.text, visit, learn=False)
        yield episode, visit.reached(goal), uses(visit, episode)


def measured(made: Forgetful, case: Case, seed: int) -> dict[str, Any]:
    """What stays, what is used of the target, and what the adversary finds out at each level."""
    stay = list(acted(made, case.stay, case.uses))
    forget = list(acted(made, case.forget, case.uses))
    found: dict[str, Any] = {
        "kept": share([one for _, one, _ in stay]),
        "used": share([one for _, _, one in forget]),
        "reached": share([one for _, one, _ in forget]),
        "steps": sum(len(one.steps) for one, _, _ in stay) / len(stay),
        "episodes": [one for one, _, _ in (*forget, *stay)],
        "advantage": {},
    }

    def ask(text: str) -> Episode:
        return made.solve(text, Visit(case.where(text)), learn=False)

    for name, attack in ATTACKS.items():
        result = attack.infer(ask, case.candidates, seed=seed, kinds=case.kinds, tasks=case.tasks)
        found["advantage"][name] = {}
        for level in LEVELS:
            scores = suspicion(result.probes, case.candidates, level, case.kinds)  # type: ignore[arg-type]
            best = most(scores)
            hit = (case.target in best) / len(best)
            found["advantage"][name][level] = hit - 1 / len(case.candidates)
        if name == "asks":
            said = [one.episode.answer for one in result.probes if one.strategy == "extraction"]
            found["quoted"] = any(Names([case.secret]).occur(one) for one in said)
    return found


def run(seed: int, folder: Path, sizes: Sizes = Sizes()) -> list[dict[str, Any]]:
    """All kinds of request, policies and variants."""
    rows = []
    for kind, made_of in KINDS.items():
        case = made_of(seed, sizes)
        for looks in (False, True) if kind == "state" and sizes.looking else (False,):
            found = {}
            for variant in LOOKING if looks else VARIANTS:
                place = folder / f"{kind}-{looks}-{variant}"
                made, verdict, scan = agent(place, case, variant, Walker(explores=looks))
                found[variant] = {
                    "kind": kind, "looks": looks, "variant": variant, "verdict": verdict,
                    "scan": scan, **measured(made, case, seed),
                }  # fmt: skip
            reference = found["never learned it"]["episodes"]
            for row in found.values():
                pairs = zip(row["episodes"], reference, strict=True)
                row["same"] = float(np.mean([agreement(one, other) for one, other in pairs]))
            rows += [{k: v for k, v in row.items() if k != "episodes"} for row in found.values()]
    return rows


def share(values: Sequence[bool]) -> float:
    return sum(values) / len(values)
