"""Our systems as models of lm-evaluation-harness.

The harness is the extra ``utility``; nothing here imports it before it is used.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from delible.errors import MissingExtraError, RunError
from delible.measure.engine import Progress, measure
from delible.system.asks import (
    Decoding,
    Generate,
    NoAnswer,
    Prompt,
    Score,
)
from delible.system.base import System

if TYPE_CHECKING:
    from delible.measure.cache import Cache


EXTRA = "utility"


#: Length of a piece of a long text without a tokenizer, in characters.
PIECE = 2000


#: What the harness generates at most where a task does not say.
DEFAULT_NEW_TOKENS = 256


def required(part: str = "lm_eval") -> Any:
    """The harness, or a module of it.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        return importlib.import_module(part)
    except ImportError:
        raise MissingExtraError("Measuring with lm-evaluation-harness", EXTRA) from None


def harness_model(
    system: System,
    *,
    cache: Cache | None = None,
    progress: Progress | None = None,
) -> Any:
    """A system as a model of the harness; prompts are plain text, as its leaderboards have them.

    Texts go through :mod:`delible.measure`: equal ones are asked once, answers are cached.

    Raises:
        MissingExtraError: The harness is not installed.
    """
    base = required("lm_eval.api.model").LM
    unanswered: list[str] = []

    def answered(requests: Sequence[Any]) -> list[Any]:
        answers = measure(system, requests, cache=cache, progress=progress)
        return [answers[request] for request in requests]

    def scores(requests: Sequence[Score]) -> list[tuple[float, bool]]:
        if "score" not in system.capabilities:
            raise RunError(
                f"'{system.name}' gives no scores, and this task compares likelihoods.",
                where="lm-evaluation-harness",
                hint="Choose tasks that generate, such as gsm8k.",
            )
        found: list[tuple[float, bool]] = []
        for answer in answered(requests):
            if isinstance(answer, NoAnswer):
                unanswered.append(answer.reason)
                found.append((float("-inf"), False))
            else:
                found.append((float(answer.logprobs.sum()), bool(answer.hits.all())))
        return found

    class Bridge(base):  # type: ignore[misc, valid-type]
        """The system behind the harness's interface."""

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            return scores([_score(*one.args) for one in requests])

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            parts = [text_in_pieces(system, one.args[0]) for one in requests]
            found = iter(scores([one for part in parts for one in part]))
            return [sum(next(found)[0] for _ in part) for part in parts]

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            asked = [Generate(Prompt(text=one.args[0]), _decoding(one.args[1])) for one in requests]
            return [str(answer) for answer in answered(asked)]

    bridge = Bridge()
    bridge.unanswered = unanswered
    return bridge


def _score(context: str, continuation: str) -> Score:
    """White space between the two belongs to the continuation, as tokenizers split words."""
    bare = context.rstrip()
    return Score(Prompt(text=bare), context[len(bare) :] + continuation)


def _decoding(options: Mapping[str, Any]) -> Decoding:
    until = options.get("until") or ()
    temperature = float(options.get("temperature") or 0.0)
    return Decoding(
        int(options.get("max_gen_toks") or options.get("max_new_tokens") or DEFAULT_NEW_TOKENS),
        stop=(until,) if isinstance(until, str) else tuple(until),
        temperature=temperature if options.get("do_sample") else 0.0,
        top_p=float(options.get("top_p", 1.0)),
    )


def text_in_pieces(system: System, text: str) -> list[Score]:
    """A text as scores that together are its likelihood, each within the model's context.

    A piece is half a context long and is scored after the piece before it.
    """
    tokenizer, template = getattr(system, "tokenizer", None), getattr(system, "template", None)
    if tokenizer is None or template is None:
        cuts = list(range(PIECE, len(text), PIECE))
    else:
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        half = max(1, template.max_length // 2 - 2)
        starts = [start for start, _ in found["offset_mapping"]]
        # a character of several tokens is not cut
        cuts = sorted({place for place in starts[half::half] if place})
    edges = [0, *cuts, len(text)]
    pieces = [text[start:end] for start, end in pairwise(edges) if end > start]
    return [
        Score(Prompt(text=before), piece)
        for before, piece in zip(("", *pieces), pieces, strict=False)
    ]
