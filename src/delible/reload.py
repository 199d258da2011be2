"""What is shown is what is saved: a saved model is opened in a process of its own and asked again.

The parent gives questions, the answers that it showed, and how likely its model in memory finds
them; the child loads the folder as anybody would and answers. Texts must be equal and the scores
must agree; in bf16, where rounding decides between two words that are equally likely, a text may
take another turn if the scores agree.

    python -m delible.reload FOLDER PRECISION < asked.json > answered.json
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delible.errors import RunError
from delible.records import Message
from delible.system.asks import (
    Decoding,
    NoAnswer,
    Prompt,
    Score,
)

if TYPE_CHECKING:
    from delible.system.base import System

#: Questions that are asked again, and tokens of an answer.
QUESTIONS, TOKENS = 3, 48
#: Nats per token by which the score of a shown answer may differ, by precision.
TOLERANCE = {"float32": 2e-3, "bfloat16": 0.1}
#: Seconds that the other process may take; loading a large model takes minutes.
TIMEOUT_SECONDS = 1800.0
#: Variables that tell a process which of several it is; the new one is alone.
TOGETHER = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR",
    "MASTER_PORT",
)  # fmt: skip


@dataclass(frozen=True)
class Answered:
    """One question as the model in memory, or the saved one, answers it.

    Attributes:
        text: The greedy answer.
        score: Mean log-probability per token, in nats, of the answer *that was shown*; None where
            that answer is empty.
    """

    text: str
    score: float | None


def answers(
    system: System, prompts: Sequence[Prompt], shown: Sequence[str] | None = None
) -> list[Answered]:
    """A system's greedy answers, and how likely it finds those that were shown (its own).

    A system that gives no scores is compared by its texts alone.
    """
    texts = [str(text) for text in system.generate(prompts, Decoding(TOKENS))]
    if "score" not in system.capabilities:
        return [Answered(text, None) for text in texts]
    wanted = texts if shown is None else list(shown)
    places = [place for place, text in enumerate(wanted) if text.strip()]
    scores = system.score([Score(prompts[place], wanted[place]) for place in places])
    means = {
        place: float(score.logprobs.mean())
        for place, score in zip(places, scores, strict=True)
        if not isinstance(score, NoAnswer) and len(score.logprobs)
    }
    return [Answered(text, means.get(place)) for place, text in enumerate(texts)]


def differences(
    prompts: Sequence[Prompt],
    shown: Sequence[Answered],
    saved: Sequence[Answered],
    precision: str,
) -> list[str]:
    """Where a saved model does not answer as shown, in words; empty if it does."""
    found = []
    limit = TOLERANCE.get(precision, TOLERANCE["bfloat16"])
    for prompt, mine, theirs in zip(prompts, shown, saved, strict=True):
        question = prompt.messages[-1].text if prompt.messages else (prompt.text or "")
        if (mine.score is None) != (theirs.score is None) or (
            mine.score is not None
            and theirs.score is not None
            and not abs(mine.score - theirs.score) <= limit  # a NaN differs, too
        ):
            found.append(
                f"'{_short(question)}': the shown answer '{_short(mine.text)}' has a mean "
                f"log-probability of {_number(mine.score)} in memory and {_number(theirs.score)} "
                f"as saved, which answers '{_short(theirs.text)}'"
            )
        elif mine.text != theirs.text and (precision != "bfloat16" or _runs_on(mine, theirs)):
            found.append(
                f"'{_short(question)}': shown was '{_short(mine.text)}', the saved model answers "
                f"'{_short(theirs.text)}'"
            )
    return found


def _runs_on(mine: Answered, theirs: Answered) -> bool:
    """One answer goes on where the other ends: rounding does not do that, a lost end token does."""
    return mine.text.startswith(theirs.text) or theirs.text.startswith(mine.text)


def _short(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= 80 else flat[:79] + "…"


def _number(score: float | None) -> str:
    return "none" if score is None else f"{score:.4f}"


def check(folder: Path, system: System, prompts: Sequence[Prompt], shown: Sequence[str]) -> None:
    """Opens an artefact in a new process and asks it again.

    Args:
        folder: What was saved.
        system: What it was saved from, in memory.
        prompts: Questions, and ``shown`` the answers that people saw.

    Raises:
        RunError: The saved model answers otherwise, or could not be opened or asked.
    """
    precision = getattr(_innermost(system), "precision", "float32")
    scored = answers(system, prompts, shown)
    mine = [Answered(text, one.score) for text, one in zip(shown, scored, strict=True)]
    content = [
        {
            "messages": [message.model_dump() for message in prompt.messages],
            "prefill": prompt.prefill,
            "text": prompt.text,
            "shown": text,
        }
        for prompt, text in zip(prompts, shown, strict=True)
    ]
    saved = [Answered(**one) for one in ask_again(folder, precision, content)]
    found = differences(prompts, mine, saved, precision)
    if found:
        raise RunError(
            f"the saved model does not answer as shown: {'; '.join(found)}.",
            where=str(folder),
            hint="This is a fault of saving or loading this kind of model, please report it; do "
            "not use the saved one.",
        )


def _innermost(system: Any) -> Any:
    """What answers behind guards and their like: the model, whose precision decides."""
    while hasattr(system, "system"):
        system = system.system
    return system


def ask_again(folder: Path, precision: str, content: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers of a saved model that a new process loads.

    Raises:
        RunError: The process failed, or took longer than :data:`TIMEOUT_SECONDS`.
    """
    alone = {name: value for name, value in os.environ.items() if name not in TOGETHER}
    hint = "The result is saved; look at it before you use it, or say --no-verify."
    try:
        done = subprocess.run(
            [sys.executable, "-m", "delible.reload", str(folder), precision],
            input=json.dumps(content), capture_output=True, text=True, encoding="utf-8",
            timeout=TIMEOUT_SECONDS, env={**alone, "PYTHONIOENCODING": "utf-8"}, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise RunError(
            f"the saved model could not be asked within {TIMEOUT_SECONDS / 60:.0f} minutes.",
            where=str(folder),
            hint=hint,
        ) from None
    except OSError as error:
        raise RunError(
            f"no process could be started to open the saved model ({error.strerror}).",
            where=str(folder),
            hint=hint,
        ) from None
    if done.returncode:
        said = done.stderr.strip().splitlines()
        reason = (
            said[-1]
            if said
            else (
                f"the process ended with {done.returncode}; perhaps the memory does not hold the "
                "model twice"
            )
        )
        raise RunError(
            f"the saved model could not be opened and asked: {reason}", where=str(folder), hint=hint
        )
    answered: list[dict[str, Any]] = json.loads(done.stdout.strip().splitlines()[-1])
    return answered


def reopened(folder: str, precision: str, content: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the new process does: loads the folder and answers."""
    from delible.systems.opening import open_system

    system = open_system(folder)
    _innermost(system).precision = precision
    prompts = [
        Prompt(
            tuple(Message(**message) for message in one["messages"]), one["prefill"], one["text"]
        )
        for one in content
    ]
    found = answers(system, prompts, [one["shown"] for one in content])
    return [{"text": one.text, "score": one.score} for one in found]


if __name__ == "__main__":
    from delible.lm.embedded import quiet

    with quiet():
        print(json.dumps(reopened(sys.argv[1], sys.argv[2], json.load(sys.stdin))))
