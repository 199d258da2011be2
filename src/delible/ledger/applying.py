"""Carrying out the open requests of a model: one after the other, each on the result of the last.

A guard's entry is written first, so that nothing is said while weights are being changed. Then
memories forget, which needs no training and waits for none. Every
step is an event before and after it. Whoever is killed leaves at most a run without its last event:
the same run folder is found again, finished or not, so nothing is carried out twice.

The utility budget is spent over the whole chain: each run's share of the kept answers' probability
is measured, and the shares are multiplied (none counts for more than 1). A run that would take
more than is left is not taken: the chain goes on from the result before it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from delible.achieved import Achieved
from delible.errors import DataError, DelibleError
from delible.ledger.alone import alone
from delible.ledger.chain import canonical
from delible.ledger.evidence import numbers_of, run_facts
from delible.ledger.guarding import (
    Done,
    guard_instead,
    hold,
    take_guard_out,
    write_guard,
)
from delible.ledger.memories import forget_memories
from delible.ledger.policy import Policy, Rule
from delible.ledger.private import discreet, redacted, secrets_of
from delible.ledger.requests import Request, Texts, covers, requests_of, texts_of
from delible.ledger.results import chain_end, kept_by, kept_so_far
from delible.ledger.store import Draft, Ledger
from delible.loaders import read_records
from delible.method import Method
from delible.records import ForgetRequest, Record
from delible.resolving import resolve_method

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ways:
    """What applying calls for work: the library's own functions, unless a test dies in one.

    Attributes:
        unlearn: As :func:`delible.unlearn`.
        ask: Asks a person whether to go on; None: nobody is there.
        say: Takes a sentence.
    """

    unlearn: Callable[..., Any]
    ask: Callable[[str], bool] | None = None
    say: Callable[[str], None] = logger.info


def apply(
    ledger: Ledger,
    model: str,
    policy: Policy,
    ways: Ways,
    *,
    only: Sequence[str] = (),
    out: Path | None = None,
    show: bool = False,
    **options: Any,
) -> list[Done]:
    """Carries out what is open at a model.

    Args:
        only: Ids of the only requests to carry out.
        out: Folder of the runs; default: beside the ledger.
        show: Messages may tell what is forgotten.
        options: For every call of unlearn, such as ``seed``.

    Raises:
        RunError: Another process is at it, or the result of the last run is missing or changed.
        DataError: No such request.
    """
    for rule in policy.rules:
        if rule.method is not None:
            _method(rule)  # what makes no sense is told before any work
    with alone(ledger, model):
        return list(_applied(ledger, model, policy, ways, only, out, show, options))


def _applied(
    ledger: Ledger, model: str, policy: Policy, ways: Ways, only: Sequence[str],
    out: Path | None, show: bool, options: Mapping[str, Any],
) -> Iterator[Done]:  # fmt: skip
    due = _due(requests_of(ledger.events()), model, only)
    texts = {name: texts_of(ledger.texts(name).get(name, {})) for name in due}
    retain = _retain(policy)
    if policy.guard.at_once:
        for name in due:
            write_guard(ledger, model, policy, name, texts[name])
    for name in _to_forget(requests_of(ledger.events()), model, only):
        request = requests_of(ledger.events())[name]
        known = texts_of(ledger.texts(name).get(name, {}))
        yield from forget_memories(ledger, request, known, show=show)
    for name, one in requests_of(ledger.events()).items():
        if model in one.progress and one.progress[model].applied:  # killed, or was the last entry
            take_guard_out(ledger, model, policy, name)
    stopped = ""
    for name in due:
        everyone = requests_of(ledger.events())
        request, mine = everyone[name], texts[name]
        rule = policy.rule(request.basis, request.size)
        earlier = _covered(request, everyone.values(), model)
        if stopped:
            yield hold(ledger, model, name, stopped, everyone)
        elif mine is None:
            yield Done(name, "held", "its texts are gone: nothing can be done about it")
        elif earlier is not None:
            ledger.append(Draft("applied", name, model, _as(earlier, model)))
            take_guard_out(ledger, model, policy, name)
            yield Done(name, "covered", f"all that it holds was done for {earlier.id}")
        elif rule is None:
            yield hold(ledger, model, name, "no rule of the policy fits it", everyone)
        elif request.progress[model].final and not rule.guard and name not in only:
            yield Done(name, "guarded", "its weights took too much; --only tries them again")
        elif rule.guard:
            yield guard_instead(ledger, model, policy, name, mine, "a rule says so")
        else:
            job = _Job(ledger, model, policy, ways, out, show, options, retain, request, mine, rule)
            done = job.run(everyone)
            if done.what == "held" and policy.utility.when_spent == "stop":
                stopped = "the utility budget is spent"
            yield done


def _method(rule: Rule) -> Method:
    return resolve_method(
        str(rule.method), slots=rule.slots, options=rule.options, strength=rule.strength
    )


def _due(found: Mapping[str, Request], model: str, only: Sequence[str]) -> list[str]:
    """What is left to do at a model, by deadline."""
    for name in only:
        if name not in found or model not in found[name].progress:
            raise DataError(f"there is no request '{name}' for {model}.")
    states = ("applied", "withdrawn")
    return _by_deadline(found, model, only, lambda one: one.progress[model].state not in states)


def _to_forget(found: Mapping[str, Request], model: str, only: Sequence[str]) -> list[str]:
    """Those about a model with memories that are left to do, by deadline."""
    return _by_deadline(found, model, only, lambda one: one.memories_left)


def _by_deadline(
    found: Mapping[str, Request], model: str, only: Sequence[str],
    wanted: Callable[[Request], bool],
) -> list[str]:  # fmt: skip
    here = [
        one
        for one in found.values()
        if model in one.progress and wanted(one) and (not only or one.id in only)
    ]
    return [one.id for one in sorted(here, key=lambda one: (one.deadline, one.asked.sequence))]


def _covered(request: Request, everyone: Any, model: str) -> Request | None:
    """An earlier request with all that this one holds, carried out and not leaking since."""
    for one in everyone:
        progress = one.progress.get(model)
        done = progress is not None and progress.applied is not None and not progress.leaks
        if done and one.id != request.id and covers(one, request):
            return one
    return None


def _as(earlier: Request, model: str) -> dict[str, Any]:
    applied = earlier.progress[model].applied
    assert applied is not None
    return {**applied.body, "same_as": earlier.id}


def _retain(policy: Policy) -> tuple[Record, ...]:
    if policy.retain is not None:
        return tuple(read_records(policy.retain))
    return ()


@dataclass
class _Job:
    """One request, whose weights are to change."""

    ledger: Ledger
    model: str
    policy: Policy
    ways: Ways
    out: Path | None
    show: bool
    options: Mapping[str, Any]
    retain: tuple[Record, ...]
    request: Request
    texts: Texts
    rule: Rule

    def run(self, everyone: Mapping[str, Request]) -> Done:
        ledger, name = self.ledger, self.request.id
        start = chain_end(ledger, everyone, self.model)
        folder = self._folder(start)
        progress = self.request.progress[self.model]
        told = {"run": self._told(folder), "method": self.rule.method, "start": self._told(start)}
        if progress.started is None or progress.started.body != told:
            ledger.append(Draft("started", name, self.model, told))
        secrets = secrets_of(self.texts)
        self.ways.say(f"Request {name}: {self.rule.method} on {start} …")
        try:
            with discreet(secrets, show=self.show):
                result = self.ways.unlearn(
                    start, self._asked(), method=self.rule.method, out=folder,
                    slots=self.rule.slots or None, strength=self.rule.strength,
                    **{**self.rule.options, **self.options},
                )  # fmt: skip
        except Exception as error:  # one request that cannot be done must not stop the others
            kind = type(error).__name__
            ledger.append(Draft("failed", name, self.model, {"error": kind}))
            words = str(error) if isinstance(error, DelibleError) else f"{kind}: {error}"
            return Done(name, "failed", words if self.show else redacted(words, secrets))
        return self._taken(result, folder, kept_so_far(everyone, self.model))

    def _taken(self, result: Any, folder: Path, kept: float) -> Done:
        """Takes the result, unless it forgot nothing or took more than may be lost."""
        name, budget = self.request.id, self.policy.utility
        achieved: Achieved | None = result.achieved
        if achieved is not None and achieved.state == "nothing":
            self.ledger.append(Draft("failed", name, self.model, {"error": "nothing forgotten"}))
            return Done(name, "failed", "nothing was forgotten, so the result is not taken")
        share = kept_by(achieved)
        lost = 1 - kept * min(1.0, 1.0 if share is None else share)
        if lost > budget.budget:
            words = f"{lost:.0%} of what is kept would be lost, {budget.budget:.0%} may be"
            if not (budget.when_spent == "ask" and self._agreed(words)):
                if budget.when_spent == "guard":
                    return guard_instead(
                        self.ledger, self.model, self.policy, name, self.texts, words
                    )
                reason = {"reason": "utility budget", "lost": f"{lost:.6g}"}
                self.ledger.append(Draft("held", name, self.model, reason))
                return Done(name, "held", f"{words}: the result is not taken")
        body: dict[str, Any] = {
            **run_facts(folder), "run": self._told(folder), "method": self.rule.method,
            "achieved": numbers_of(achieved),
            "kept": None if share is None else f"{share:.6g}",
        }  # fmt: skip
        self.ledger.append(Draft("applied", name, self.model, body))
        guard = take_guard_out(self.ledger, self.model, self.policy, name)
        sentence = achieved.sentence() if achieved is not None else "it was not measured"
        unknown = "; what is kept was not measured" if share is None else ""
        return Done(name, "applied", f"{sentence.rstrip('.')}{unknown}{guard}")

    def _agreed(self, words: str) -> bool:
        return self.ways.ask is not None and self.ways.ask(f"{self.request.id}: {words}. Take it?")

    def _asked(self) -> ForgetRequest:
        """The request; kept questions are measured even where a method needs none."""
        if self.retain or "retain" in _method(self.rule).needs:
            return self.texts.request(self.retain)
        from delible.world import general

        return self.texts.request(general())

    def _folder(self, start: str) -> Path:
        """The same for the same request, start and rule, so that a killed run is found again."""
        content = [self.model, start, self.rule.model_dump_json(), sorted(map(str, self.options))]
        known = hashlib.sha256(canonical([str(one) for one in content])).hexdigest()[:8]
        return (self.out or self.ledger.runs) / f"{self.request.id}-{known}"

    def _told(self, place: Path | str) -> str:
        """A path as the ledger names it: from its own folder, so that both may be moved."""
        folder = self.ledger.path.parent.absolute()
        path = Path(place)
        if isinstance(place, str) and not path.exists():
            return place
        path = path.absolute()
        return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


__all__ = ["Done", "Ways", "apply"]
