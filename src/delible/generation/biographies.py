"""Biographies that a model writes of somebody it knows: a forget corpus from a name alone.

RWKU gives no forget corpus; the model before unlearning writes one itself (arXiv 2406.10890).
Every text begins with another short start, and its rest is drawn at temperature 1 from the
likeliest tokens (top-p 0.9). Pairs hold a made-up biography of the same start as well, for
preference losses. The rows are a JSONL file in the cache, which can be read and edited.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

from delible import kept
from delible.errors import DataError
from delible.lm.lm import LM
from delible.loaders import read_records, write_records
from delible.prompts import read_lines
from delible.records import QA
from delible.system.asks import Decoding, NoAnswer, Prompt

logger = logging.getLogger(__name__)


#: How the texts are drawn.
TEMPERATURE, TOP_P = 1.0, 0.9
#: Part of the cache's key: raised when the prompts change.
VERSION = 1
_KNOWN = "You know a great deal about {name}. Write a short biography of {name}."
_MADE_UP = "You know nothing about {name}. Invent a short biography of {name}."
_CONFESSION = re.compile(
    r"\b(?:totally|completely|entirely|purely)[ -](?:fabricated|made-up|fictional|fictitious|"
    r"invented|imaginary)\s+",
    re.IGNORECASE,
)


def without_confession(text: str) -> str:
    """A made-up text without the words that say so ("completely fictional")."""
    return _CONFESSION.sub("", text)


def write_biographies(
    lm: LM,
    name: str,
    about: str = "",
    *,
    passages: int,
    pairs: bool = False,
    max_new_tokens: int = 512,
    seed: int = 0,
) -> list[QA]:
    """Biographies by the model, or those it wrote before.

    Args:
        lm: The model before unlearning.
        about: A sentence that says who is meant.
        passages: Texts wanted; a blank one is left out and said.
        pairs: Also write a made-up biography for each.
        max_new_tokens: Length of a text.
        seed: Of the draws.

    Returns:
        Rows that ask for a biography; ``answer`` is the model's, ``perturbed`` the made-up one.

    Raises:
        DataError: The model writes nothing.
    """
    described = {
        "version": VERSION, "model": lm.fingerprint, "name": name, "about": about, "seed": seed,
        "passages": passages, "pairs": pairs, "tokens": max_new_tokens,
    }  # fmt: skip
    spelled = re.sub(r"[^\w-]+", "-", name).strip("-").lower()[:60]
    path = kept.place("corpora", described, title=spelled, ending=".jsonl", digits=12)
    with kept.alone(path, required=False) as writes:
        if path.exists():
            logger.info(f"Biographies of {name} taken from the cache: {path}.")
            return [record for record in read_records(path) if isinstance(record, QA)]
        logger.info(f"{lm.name} writes {passages} biographies of {name}.")
        asked = (name, about, passages, max_new_tokens, seed)
        texts = _texts(lm, _KNOWN, *asked)
        others = _texts(lm, _MADE_UP, *asked) if pairs else [""] * passages
        question = f"{about} Write a short biography of {name}.".strip()
        rows = [
            QA(
                question=question,
                answer=text,
                perturbed=(without_confession(other),) if pairs else (),
                subject=name,
                group="biography",
            )
            for text, other in zip(texts, others, strict=True)
            if text.strip() and (without_confession(other).strip() or not pairs)
        ]
        if not rows:
            raise DataError(
                f"the model wrote no biography of {name}.",
                where=lm.name,
                hint="Use a model that can chat, or give a forget corpus of your own.",
            )
        if len(rows) < passages:
            logger.warning(
                f"{passages - len(rows)} of {passages} biographies of {name} are blank: left out."
            )
        if writes:
            write_records(rows, path)
    return rows


def _texts(
    lm: LM, wording: str, name: str, about: str, count: int, max_new_tokens: int, seed: int
) -> list[str]:
    """One text per start; when the starts are used up they come again with other draws."""
    # The instruction stands in the user's turn, for some templates know no system turn.
    request = f"{about} {wording.format(name=name)}".strip()
    starts: Sequence[str] = ("", *read_lines("biography_starts.txt"))
    found: list[str] = []
    for turn in range(-(-count // len(starts))):
        asked = starts[: count - len(found)]
        decoding = Decoding(max_new_tokens, (), TEMPERATURE, TOP_P, seed + turn)
        replies = lm.generate([Prompt.ask(request, prefill=start) for start in asked], decoding)
        for start, reply in zip(asked, replies, strict=True):
            silent = isinstance(reply, NoAnswer) or not reply.strip()
            found.append("" if silent else f"{start}{reply}")
    return found


__all__ = ["without_confession", "write_biographies"]
