"""Instruction search: what is told, and which examples are shown, to sort texts by asking a model.

    program* = argmax over (instruction, demonstrations) of  mean over validation of credit(label)

1. The start runs over the training examples; those that it sorts rightly are demonstrations with
   the model's own reasoning, the others are ones without.
2. A model writes instructions anew, from examples, mistakes and a piece of advice each.
3. Trials: a pair of instruction and demonstrations is drawn and tried on a part of the validation
   examples. The draw favours what stood in the better third of the trials before it (a tree-Parzen
   estimate over two choices).
4. The best ones, and the start, run over all validation examples. The start stays unless another
   one is better there: what is found is never worse than the start on these examples.

Paper: MIPROv2 (arXiv 2406.11695), the optimiser of DSPy, as far as sorting needs it. Deviations:
one limit, the number of calls, instead of levels of effort; replies are kept, so that no text is
asked twice under one program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from delible import prompts
from delible.component import Config
from delible.system.asks import Decoding, NoAnswer, Prompt
from delible.system.base import System
from delible.systems.consulting import fenced, filled
from delible.systems.thoughts import parted

#: Validation examples of a trial.
BATCH = 25
#: Trials at most, and how many of the best are tried on all validation examples.
TRIALS, FINALISTS = 16, 3
#: Demonstrations of each kind in a set, and sets that are drawn.
SHOWN, SETS = 4, 5
#: Characters of an instruction that a model wrote; a longer one is no instruction.
LONGEST = 2000


class Labelled(NamedTuple):
    """A text, and how it should be sorted."""

    text: str
    label: str


class Demonstration(Config):
    """An example that is shown."""

    text: str = Field(description="What is sorted.")
    label: str = Field(description="How it should be.")
    reasoning: str = Field("", description="Why, in the words of a model that did.")


class Program(Config):
    """How texts are sorted."""

    instruction: Annotated[str, Field(min_length=1, description="What is told first.")]
    demonstrations: tuple[Demonstration, ...] = Field((), description="Examples that are shown.")
    version: Literal[1] = Field(1, description="Of this form.")

    @property
    def key(self) -> str:
        """The same for equal programs only."""
        return self.model_dump_json()


class Ruling(NamedTuple):
    """How a model sorted a text; ``label`` is None if it could not be read."""

    label: str | None
    reasoning: str = ""


#: Sorts texts by a program; one call each.
Sorter = Callable[[Program, Sequence[str]], Sequence[Ruling]]


@dataclass(frozen=True)
class Found:
    """What a search came to.

    Attributes:
        program: The best one, or the start.
        start: Mean credit of the start on the validation examples, [0, 1].
        score: That of what was found; at least ``start``.
        trials: Programs that were tried.
        calls: Texts that were sorted, and instructions that were written.
    """

    program: Program
    start: float
    score: float
    trials: int
    calls: int

    @property
    def told(self) -> dict[str, Any]:
        """As plain data, without the program."""
        return {
            "start": self.start, "score": self.score, "trials": self.trials, "calls": self.calls,
        }  # fmt: skip


class _Runs:
    """Programs at work, each text once, within a number of calls."""

    def __init__(self, sorter: Sorter, calls: int) -> None:
        self.sorter, self.limit, self.calls = sorter, calls, 0
        self._known: dict[tuple[str, str], Ruling] = {}

    def missing(self, program: Program, examples: Sequence[Labelled]) -> list[str]:
        texts = dict.fromkeys(one.text for one in examples)
        return [text for text in texts if (program.key, text) not in self._known]

    def affords(self, program: Program, examples: Sequence[Labelled], reserve: int = 0) -> bool:
        return self.calls + len(self.missing(program, examples)) + reserve <= self.limit

    def run(self, program: Program, examples: Sequence[Labelled]) -> list[Ruling]:
        missing = self.missing(program, examples)
        self.calls += len(missing)
        if missing:
            for text, found in zip(missing, self.sorter(program, missing), strict=True):
                self._known[program.key, text] = found
        return [self._known[program.key, one.text] for one in examples]


def demonstration_sets(
    examples: Sequence[Labelled], found: Sequence[Ruling], random: Random
) -> list[tuple[Demonstration, ...]]:
    """Sets of demonstrations.

    Args:
        examples: Training examples.
        found: How the start sorted them: right ones bring their reasoning along.
        random: Draws.

    Returns:
        Sets of up to :data:`SHOWN` with and :data:`SHOWN` without reasoning, as many of each label
        as there are, in mixed order.
    """
    right = [
        Demonstration(text=one.text, label=one.label, reasoning=ruled.reasoning)
        for one, ruled in zip(examples, found, strict=True)
        if ruled.label == one.label
    ]
    plain = [Demonstration(text=one.text, label=one.label) for one in examples]
    sets: dict[tuple[Demonstration, ...], None] = {}
    for _ in range(SETS):
        traced = _balanced(right, SHOWN, random)
        texts = {one.text for one in traced}
        rest = _balanced([one for one in plain if one.text not in texts], SHOWN, random)
        drawn = [*traced, *rest]
        random.shuffle(drawn)
        sets[tuple(drawn)] = None
    return list(sets)


def _balanced(pool: Sequence[Demonstration], count: int, random: Random) -> list[Demonstration]:
    """So many of a pool, labels in turn."""
    by_label: dict[str, list[Demonstration]] = {}
    for one in random.sample(list(pool), len(pool)):
        by_label.setdefault(one.label, []).append(one)
    taken: list[Demonstration] = []
    while len(taken) < count and any(by_label.values()):
        for left in by_label.values():
            if left and len(taken) < count:
                taken.append(left.pop())
    return taken


def drawn_pair(
    tried: Mapping[tuple[int, int], float], sizes: tuple[int, int], random: Random
) -> tuple[int, int] | None:
    """An untried pair of choices, the likelier the better its choices did; None: all are tried.

    Args:
        tried: Scores of the pairs before.
        sizes: How many choices each of the two has.
    """
    left = [
        (first, second)
        for first in range(sizes[0])
        for second in range(sizes[1])
        if (first, second) not in tried
    ]
    if not left:
        return None
    ranked = sorted(tried, key=lambda pair: -tried[pair])
    good = ranked[: max(1, len(ranked) // 3)]
    bad = ranked[len(good) :]

    def worth(pair: tuple[int, int]) -> float:
        value = 1.0
        for place, choice in enumerate(pair):
            better = 1 + sum(one[place] == choice for one in good)
            worse = 1 + sum(one[place] == choice for one in bad)
            size = sizes[place]
            value *= (better / (len(good) + size)) / (worse / (len(bad) + size))
        return value

    return random.choices(left, [worth(pair) for pair in left])[0]


def search(
    start: Program,
    train: Sequence[Labelled],
    validation: Sequence[Labelled],
    sorter: Sorter,
    propose: Callable[[Sequence[Labelled]], Sequence[str | None]],
    credit: Callable[[str, str | None], float],
    *,
    calls: int,
    seed: int = 0,
) -> Found:
    """Looks for a better program than the start.

    Args:
        start: What there is.
        train: Examples for demonstrations and for who writes instructions.
        validation: Other examples, by which programs are compared.
        sorter: Sorts texts by a program.
        propose: Writes instructions anew, with a call each (None: unusable); is told which training
            examples the start gets wrong.
        credit: For a label and how the text was sorted (None: unreadable), [0, 1].
        calls: In all, proposals included; the start alone takes all examples once.
        seed: Of the draws.

    Returns:
        The best program on the validation examples; the start itself if nothing is better, or if
        the calls do not suffice for more.
    """
    random = Random(f"{seed}/instruction")
    runs = _Runs(sorter, calls)

    def score(program: Program, examples: Sequence[Labelled]) -> float:
        found = runs.run(program, examples)
        return sum(
            credit(one.label, ruled.label) for one, ruled in zip(examples, found, strict=True)
        ) / len(examples)

    first = runs.run(start, train)
    best, best_score = start, score(start, validation)
    start_score, tried = best_score, dict[tuple[int, int], float]()
    if start_score < 1.0 and runs.calls < calls:
        wrong = [one for one, ruled in zip(train, first, strict=True) if ruled.label != one.label]
        written = propose(wrong)
        runs.calls += len(written)
        instructions = list(dict.fromkeys([start.instruction, *(one for one in written if one)]))
        sets = list(
            dict.fromkeys([start.demonstrations, *demonstration_sets(train, first, random)])
        )

        def program(pair: tuple[int, int]) -> Program:
            return Program(instruction=instructions[pair[0]], demonstrations=sets[pair[1]])

        part = random.sample(list(validation), min(BATCH, len(validation)))
        tried[0, 0] = score(start, part)
        rest = len(validation) - len(part)
        while len(tried) <= TRIALS:
            pair = drawn_pair(tried, (len(instructions), len(sets)), random)
            if pair is None or not runs.affords(program(pair), part, reserve=rest):
                break
            tried[pair] = score(program(pair), part)
        finalists = sorted((one for one in tried if one != (0, 0)), key=lambda pair: -tried[pair])
        for pair in finalists[:FINALISTS]:
            if runs.affords(program(pair), validation):
                found = score(program(pair), validation)
                if found > best_score:
                    best, best_score = program(pair), found
    return Found(best, start_score, best_score, max(0, len(tried) - 1), runs.calls)


def proposed(
    system: System, start: Program, train: Sequence[Labelled], wrong: Sequence[Labelled], seed: int
) -> list[str | None]:
    """Instructions that a model writes anew, one per piece of advice; None for unusable ones.

    Args:
        system: Who writes.
        start: What there is.
        train: Examples, of which some are shown.
        wrong: Those that the start gets wrong.
        seed: Of what is drawn.
    """

    def listed(rows: Sequence[Labelled]) -> str:
        return "\n".join(f"- {one.label}: {fenced(one.text, 'text')}" for one in rows)

    mistakes = f"These it sorts wrongly:\n{listed(wrong[:SHOWN])}" if wrong else ""
    asks = [
        Prompt.ask(
            filled(
                "search_instruction.txt",
                instruction=start.instruction,
                examples=listed(train[: 2 * SHOWN]),
                mistakes=mistakes,
                advice=advice,
            )
        )
        for advice in prompts.read_lines("search_advice.txt")
    ]
    decoding = Decoding(512, temperature=0.7, top_p=0.95, seed=seed)
    replies = system.generate(asks, decoding)
    texts = ["" if isinstance(one, NoAnswer) else parted(one)[1].strip() for one in replies]
    return [text if 0 < len(text) <= LONGEST else None for text in texts]


__all__ = [
    "Demonstration",
    "Found",
    "Labelled",
    "Program",
    "Ruling",
    "demonstration_sets",
    "drawn_pair",
    "proposed",
    "search",
]
