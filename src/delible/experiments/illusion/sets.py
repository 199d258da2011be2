"""The sets of texts that numbers are read on, filtered, matched and described."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from delible.errors import DataError
from delible.experiments.illusion.findings import (
    FORGET,
    PARAPHRASE,
    SURROGATE,
    UNRELATED,
    UNSEEN,
)
from delible.experiments.illusion.making import alike
from delible.experiments.illusion.readings import items
from delible.search.illusion import accepted, limits, reasons
from delible.search.surrogate import Judge, losses
from delible.system.role import Role


@dataclass(frozen=True)
class Texts:
    """The sentences of a world.

    Attributes:
        forget: With whom each is about.
        paraphrase: One of each forget text.
        kept: About others whom the original knows.
        unseen: About people whom no model saw.
    """

    forget: dict[str, str]
    paraphrase: list[str]
    kept: list[str]
    unseen: list[str]


def sets(
    judge: Judge,
    texts: Texts,
    rewritten: Sequence[str],
    writer: Role | None = None,
    *,
    most_loss: float | None,
) -> Mapping[str, Any]:
    """All sets, each text as it is asked about, and what the search says of them.

    Args:
        rewritten: The surrogates that the search made.
        writer: Writes the questions.
        most_loss: Of a surrogate by the original, as a multiple of the mean loss of unseen texts;
            None takes the forget texts themselves as surrogates.

    Raises:
        DataError: No surrogate keeps to all limits.
    """
    forget = list(texts.forget)
    limit, dropped, kept = None, Counter[str](), forget
    if most_loss is not None:
        most = most_loss * float(losses(judge.original, texts.unseen).mean())
        limit = limits(judge([*texts.kept, *texts.unseen]), most)
        why = reasons(rewritten, judge(rewritten), forget, limit) if rewritten else []
        dropped = Counter(one for one in why if one)
        kept = [text for text, one in zip(rewritten, why, strict=True) if not one]
        if not kept:
            told = ", ".join(f"{reason}: {count}" for reason, count in dropped.items())
            raise DataError(
                f"none of {len(rewritten)} surrogates keeps to all limits ({told}).",
                hint="Give more --rounds, --candidates or --steps, a larger --most-loss, or "
                "somebody who writes: --role writer=MODEL.",
            )
        assert accepted(kept, judge(kept), forget, limit).all()
    told_of = list(zip(forget, losses(judge.original, forget), strict=True))
    found = {
        FORGET: forget,
        SURROGATE: kept,
        PARAPHRASE: texts.paraphrase,
        UNRELATED: alike(texts.kept, list(losses(judge.original, texts.kept)), told_of),
        UNSEEN: texts.unseen,
    }
    scores = {name: judge(row) for name, row in found.items()}
    pool = [*found[UNRELATED], *texts.unseen]
    mine = scores[SURROGATE]
    return {
        "sets": found,
        "items": {name: [one.plain() for one in items(row, pool, writer)]
                  for name, row in found.items()},
        "limits": asdict(limit) if limit is not None else None,
        "dropped": dict(dropped),
        "about": {
            name: {"texts": len(found[name]), "gain": float(one.gain.mean()),
                   "loss": float(one.loss.mean()),
                   "distance": float(one.least_distance.mean())}
            for name, one in scores.items()
        },
        "gains": mine.gain.tolist(), "losses": mine.loss.tolist(),
        "distances": mine.least_distance.tolist(),
    }  # fmt: skip
