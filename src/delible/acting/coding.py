"""Programs against hidden tests: a system tries out and hands in code until it is accepted.

    problem -> reply -> execute_python_code -> output -> reply -> submit_final_answer -> accepted?

Code runs in the sandbox only, one process for each test. A test's input is all of it that a
process sees; what is wanted stays here. Whoever hands in what is not accepted is told why it fails,
never what would not; whoever calls no tool is reminded. Attempts go on side by side, so what is
asked in one round is one batch.

Source: unlearn-and-reinvent, arXiv 2604.05716, part D.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from pydantic import Field

from delible.acting import sandbox
from delible.acting.loop import Action, trimmed
from delible.acting.sandbox import Limits, Ran
from delible.component import Config
from delible.errors import RunError
from delible.messages import Message
from delible.prompts import read_text
from delible.system.asks import Decoding, NoAnswer, Prompt
from delible.system.base import System
from delible.system.forms import read_form
from delible.system.role import Role

ToolName = Literal["execute_python_code", "submit_final_answer"]
TRY: Final = "execute_python_code"
SUBMIT: Final = "submit_final_answer"
Status = Literal[
    "accepted", "wrong output", "no output", "too slow", "raised an error", "forbidden",
    "too much memory", "too much output", "crashed",
]  # fmt: skip
_STATUS: dict[str, Status] = {
    "time": "too slow", "raised": "raised an error", "forbidden": "forbidden",
    "memory": "too much memory", "output": "too much output", "crashed": "crashed",
}  # fmt: skip
#: Told to whoever called no tool.
REMINDER = (
    f"You have not handed anything in. Call {SUBMIT} with a function solve, or {TRY} to try one."
)
#: How a verifier's words are drawn.
VERIFYING = Decoding(max_new_tokens=256, temperature=0.2)
#: Letters of a program's output, or of its errors, that are told.
TOLD_LETTERS = 2000
#: So many words of the solution in a row, in a verifier's text, give it away.
GIVEN_AWAY_WORDS = 6
#: A test may take so many times what the reference solution takes, and at least so long.
SLOWER, LEAST_SECONDS = 8.0, 0.5

_BLOCK = re.compile(r"```([^\n`]*)\n(.*?)(?:```|\Z)", re.DOTALL)
_WORDS = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Hidden:
    """A test that no process and no system sees: its input, and what must come out."""

    given: str
    wanted: str = field(repr=False)


@dataclass(frozen=True)
class HiddenTests:
    """What decides about a program.

    Attributes:
        before: Stands before what is handed in.
        after: Stands after it: reads the input, calls ``solve`` and prints.
        limits: Of each test.
    """

    cases: tuple[Hidden, ...]
    before: str = ""
    after: str = ""
    limits: Limits = field(default_factory=Limits)

    def program(self, code: str) -> str:
        """What runs."""
        return f"{self.before}\n{code}\n{self.after}\n"


@dataclass(frozen=True)
class Verdict:
    """What tests say.

    Attributes:
        passed: HiddenTests before the first that failed.
        seconds: Processor seconds of the slowest test that was run.
    """

    status: Status
    passed: int
    seconds: float
    errors: str = field(default="", repr=False)

    def told(self) -> str:
        """For whoever handed it in: nothing of the test itself."""
        if self.status == "raised an error":
            last = self.errors.strip().splitlines()[-1:] or ["no message"]
            return f"a hidden test {self.status}: {last[0][:200]}"
        return f"a hidden test: {self.status}"


def status_of(ran: Ran, wanted: str) -> Status:
    """What one run says; outputs are compared line by line, without spaces at their ends."""
    if ran.ended != "finished":
        return _STATUS[ran.ended]
    said, right = _lines(ran.output), _lines(wanted)
    if said == right:
        return "accepted"
    return "wrong output" if said else "no output"


def judged(code: str, tests: HiddenTests) -> Verdict:
    """Runs what was handed in on every hidden test, up to the first that fails.

    Raises:
        RunError: This machine cannot confine a program; nothing was run.
    """
    slowest = 0.0
    for passed, case in enumerate(tests.cases):
        ran = sandbox.run(tests.program(code), case.given, tests.limits)
        slowest = max(slowest, ran.seconds)
        status = status_of(ran, case.wanted)
        if status != "accepted":
            return Verdict(status, passed, slowest, ran.errors)
    return Verdict("accepted", len(tests.cases), slowest)


def calibrated(reference: str, inputs: Sequence[str], tests: HiddenTests) -> HiddenTests:
    """The tests with wanted outputs and a time limit, both from a solution that is known.

    The limit is what starting takes here plus several times what the solution takes on its slowest
    input, so that a slower machine gives more time and a slower way to solve it does not pass.

    Raises:
        RunError: The reference solution fails, or this machine cannot confine a program.
    """
    start = min(sandbox.run("").seconds for _ in range(2))
    slowest, cases = 0.0, []
    roomy = tests.limits.model_copy(update={"seconds": 60.0})
    for given in inputs:
        ran = sandbox.run(tests.program(reference), given, roomy)
        if ran.ended != "finished" or not ran.output.strip():
            raise RunError(
                f"the reference solution fails on its tests ({ran.ended}: {ran.errors[-200:]}).",
                where="hidden tests",
            )
        slowest = max(slowest, ran.seconds - start)
        cases.append(Hidden(given, ran.output))
    seconds = start + max(LEAST_SECONDS, SLOWER * slowest)
    limits = tests.limits.model_copy(update={"seconds": seconds})
    return replace(tests, cases=tuple(cases), limits=limits)


# ---- what a system says


@dataclass(frozen=True)
class Call:
    """A call of a tool, as it was read from a reply."""

    tool: ToolName
    code: str
    given: str = ""


def read_call(reply: str) -> Call | None:
    """The last call in a reply: a block of code that names its tool, or JSON; None: there is none.

    A block of code that names no tool counts as handed in, if it defines ``solve``.
    """
    found: Call | None = None
    for match in _BLOCK.finditer(reply):
        head, body = match.group(1).split(), match.group(2).strip("\n")
        if "input" in head:
            if found is not None and found.tool == TRY:
                found = replace(found, given=f"{body}\n")
        elif TRY in head:
            found = Call(TRY, body)
        elif SUBMIT in head or (head[:1] in ([], ["python"], ["py"]) and "def solve" in body):
            found = Call(SUBMIT, body)
    if found is not None:
        return found
    action = read_form(reply, Action)
    if isinstance(action, str) or action.tool not in (TRY, SUBMIT):
        return None
    code, given = action.arguments.get("code"), action.arguments.get("input", "")
    if not isinstance(code, str) or not isinstance(given, str):
        return None
    return Call(TRY if action.tool == TRY else SUBMIT, code, given)


def without_solution(text: str, reference: str) -> str | None:
    """A verifier's words; None where they hold code, or a piece of the reference solution."""
    if "```" in text or re.search(r"\bdef \w+\(", text):
        return None
    said, right = _WORDS.findall(text), _WORDS.findall(reference)
    runs = {tuple(said[at : at + GIVEN_AWAY_WORDS]) for at in range(len(said))}
    for at in range(len(right) - GIVEN_AWAY_WORDS + 1):
        if tuple(right[at : at + GIVEN_AWAY_WORDS]) in runs:
            return None
    return text.strip() or None


def verifier_prompt(problem: str, verdict: Verdict, code: str) -> Prompt:
    """What a verifier is asked: the problem, the status and the code, and nothing else."""
    given = {"{problem}": problem, "{status}": verdict.told(), "{code}": code}
    words = read_text("agent_code_verifier.txt")
    return Prompt.ask(re.sub("|".join(given), lambda found: given[found.group()], words))


# ---- attempts


class Effort(Config):
    """What one attempt may cost."""

    turns: int = Field(30, ge=1, description="Replies of one attempt at most.")
    turn_tokens: int = Field(1024, ge=1, description="Tokens of one reply at most.")
    context_letters: int = Field(
        48_000, ge=500, description="Letters of the conversation; the oldest turns go first."
    )
    temperature: float = Field(1.0, ge=0, description="Of the draws; 0: greedy.")
    top_p: float = Field(0.9, gt=0, le=1, description="Of the draws.")
    tries: Limits = Field(Limits(), description="What a program that is tried may use.")


@dataclass
class Attempt:
    """One system at one problem.

    Attributes:
        name: Of what is attempted.
        problem: As it is told.
        reference: A solution, that nobody may be told; empty: none is known.
        verdicts: Of what was handed in, in order.
        reason: Why it ended without a reply, where one could not be had.
    """

    name: str
    problem: str
    tests: HiddenTests
    reference: str = field(default="", repr=False)
    turns: list[Message] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    replies: int = 0
    tried: int = 0
    reminded: int = 0
    withheld: int = 0
    reason: str = ""

    def __post_init__(self) -> None:
        self.turns = [
            Message(role="system", content=read_text("agent_code.txt").strip()),
            Message(role="user", content=self.problem),
        ]

    @property
    def solved(self) -> bool:
        """Whether something that was handed in was accepted."""
        return any(one.status == "accepted" for one in self.verdicts)

    @property
    def repeated(self) -> float | None:
        """Share of replies that say what an earlier one said, [0, 1]; thought that collapses."""
        said = [one.text for one in self.turns if one.role == "assistant"]
        return None if not said else 1 - len(set(said)) / len(said)

    @property
    def ended(self) -> str:
        """How: the last verdict, or why there is none."""
        if self.solved:
            return "accepted"
        if self.verdicts:
            return self.verdicts[-1].status
        return "no answer" if self.reason else "nothing handed in"


def attempted(
    system: System, attempts: Sequence[Attempt], effort: Effort, *, seed: int = 0,
    verifier: Role | None = None,
) -> None:  # fmt: skip
    """Lets a system work on all attempts, each until it is accepted or has spent its turns.

    Args:
        verifier: Says why what was handed in fails; None: the tests' own words do.

    Raises:
        RunError: This machine cannot confine a program.
    """
    for turn in range(effort.turns):
        open_ = [one for one in attempts if not one.solved and not one.reason]
        if not open_:
            return
        decoding = Decoding(
            effort.turn_tokens, temperature=effort.temperature, top_p=effort.top_p,
            seed=seed * effort.turns + turn,
        )  # fmt: skip
        prompts = [Prompt(trimmed(one.turns, effort.context_letters)) for one in open_]
        failed: list[tuple[Attempt, Call]] = []
        for one, reply in zip(open_, system.generate(prompts, decoding), strict=True):
            if isinstance(reply, NoAnswer):
                one.reason = reply.reason
                continue
            call = _heard(one, reply, effort)
            if call is not None:
                failed.append((one, call))
        _explained(failed, verifier)


def _heard(attempt: Attempt, reply: str, effort: Effort) -> Call | None:
    """Does what a reply asks for; the call, if it handed in what was not accepted."""
    attempt.replies += 1
    attempt.turns.append(Message(role="assistant", content=reply or "(nothing)"))
    call = read_call(reply)
    if call is None:
        attempt.reminded += 1
        _tell(attempt, REMINDER)
    elif call.tool == TRY:
        attempt.tried += 1
        _tell(attempt, _shown(sandbox.run(call.code, call.given, effort.tries)))
    else:
        verdict = judged(call.code, attempt.tests)
        attempt.verdicts.append(verdict)
        if verdict.status != "accepted":
            return call
    return None


def _explained(failed: Sequence[tuple[Attempt, Call]], verifier: Role | None) -> None:
    """Tells each attempt why what it handed in fails."""
    words: list[str | NoAnswer] = [NoAnswer("nobody explains")] * len(failed)
    if verifier is not None and failed:
        prompts = [
            verifier_prompt(one.problem, one.verdicts[-1], call.code) for one, call in failed
        ]
        words = verifier.generate(prompts, VERIFYING)
    for (attempt, _), said in zip(failed, words, strict=True):
        told = f"Not accepted: {attempt.verdicts[-1].told()}."
        if isinstance(said, str):
            why = without_solution(said, attempt.reference)
            attempt.withheld += why is None
            told += f"\n{why}" if why else ""
        _tell(attempt, told)


def _tell(attempt: Attempt, text: str) -> None:
    attempt.turns.append(Message(role="user", content=text))


def _shown(ran: Ran) -> str:
    parts = [f"It {'ended' if ran.ended == 'finished' else 'failed: ' + ran.ended}."]
    parts += [f"Output:\n{ran.output[:TOLD_LETTERS]}"] if ran.output else ["It printed nothing."]
    parts += [f"Errors:\n{ran.errors[-TOLD_LETTERS:]}"] if ran.errors else []
    return "\n".join(parts)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


__all__ = [
    "REMINDER",
    "SUBMIT",
    "TRY",
    "Attempt",
    "Call",
    "Effort",
    "Hidden",
    "HiddenTests",
    "Status",
    "Verdict",
    "attempted",
    "calibrated",
    "judged",
    "read_call",
    "status_of",
    "verifier_prompt",
    "without_solution",
]  # fmt: skip
