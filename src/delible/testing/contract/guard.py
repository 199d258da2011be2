"""Guards: refuse what is forgotten, give no scores, fail closed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast
from unittest import mock

from delible.records import ForgetRequest
from delible.system.asks import (
    Decoding,
    NoAnswer,
    Prompt,
    Score,
    TokenScores,
)
from delible.system.base import BlackBox
from delible.systems.guarded import Guard, GuardedSystem, GuardMind
from delible.testing.contract.trial import FORGET, REQUEST, ContractError, Trial, require

_SPOKEN = "The model has spoken."


class _Speaker(BlackBox):
    """A system that says one sentence and counts how often it was asked."""

    name, fingerprint = "speaker", "speaker"
    capabilities = frozenset({"generate", "score"})

    def __init__(self) -> None:
        self.asked = 0

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str | NoAnswer]:
        self.asked += len(prompts)
        return [_SPOKEN for _ in prompts]

    def score(self, requests: Sequence[Score]) -> list[TokenScores | NoAnswer]:
        raise ContractError("the guarded system was asked for scores")


def _mind(trial: Trial, request: ForgetRequest = REQUEST) -> GuardMind:
    return cast(Guard, trial.component).prepare(request)


def guard_refuses_what_is_forgotten(trial: Trial) -> None:
    """Each forget question or its answer is caught; small talk is not. The same every time."""
    mind, other = _mind(trial), _mind(trial)
    for record in FORGET:
        prompt = Prompt.ask(record.question)
        before = mind.before(prompt)
        caught = mind.after(prompt, record.answer) if before is None else before
        require(caught, f"neither '{record.question}' nor its answer is caught")
        require(record.answer not in str(caught), "the refusal tells the answer")
        require(before == other.before(prompt), "two minds of one request judge differently")
    small_talk = Prompt.ask("How do I boil an egg?")
    passes = mind.before(small_talk) is None and mind.after(small_talk, "In hot water.") is None
    require(passes, "small talk is refused")
    for odd in (Prompt(), Prompt(text=""), Prompt.ask("?" * 5000), Prompt.ask("\u200b\ud7ff")):
        mind.before(odd), mind.after(odd, "")


def guard_gives_no_scores(trial: Trial) -> None:
    """Behind a guard nothing white-box is left, and a refused prompt reaches no system."""
    speaker = _Speaker()
    guarded = GuardedSystem(speaker, _mind(trial), "guarded")
    require(guarded.capabilities == {"generate"}, "the guarded system has more than 'generate'")
    prompts = [Prompt.ask(record.question) for record in FORGET]
    try:
        guarded.score([Score(prompts[0], "Norrby")])
    except TypeError:
        pass
    else:
        raise ContractError("the guarded system gives scores")
    replies = guarded.generate(prompts, Decoding(4))
    refused = sum(guarded.mind.before(prompt) is not None for prompt in prompts)
    require(len(replies) == len(prompts), "answers are missing")
    require(speaker.asked == len(prompts) - refused, "a refused prompt reached the system")


def guard_fails_closed(trial: Trial) -> None:
    """Where a judgement breaks down, the system's answer is not let through."""
    mind = _mind(trial)
    for verb in ("before", "after"):
        speaker = _Speaker()
        with mock.patch.object(type(mind), verb, side_effect=RuntimeError("broken")):
            try:
                replies = GuardedSystem(speaker, mind, "guarded").generate(
                    [Prompt.ask("How do I boil an egg?")], Decoding(4)
                )
            except RuntimeError:
                continue
        require(_SPOKEN not in replies, f"with a broken '{verb}' the answer comes through")


def guard_changes_the_fingerprint(trial: Trial) -> None:
    """Cached answers belong to one guard and one request."""
    mine, again = _mind(trial).fingerprint, _mind(trial).fingerprint
    require(mine == again, "two minds of one request have two fingerprints")
    smaller = REQUEST.model_copy(update={"forget": FORGET[2:], "subjects": ("Ben Orr",)})
    require(mine != _mind(trial, smaller).fingerprint, "another request has the same fingerprint")
    guarded = GuardedSystem(_Speaker(), _mind(trial), "guarded").fingerprint
    require(guarded not in (None, "speaker"), "the guarded system is cached as the bare one")
