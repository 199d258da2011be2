"""A student by hand: it believes a wrong option until the right one was said to it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from delible.records import QA
from delible.system.asks import Array, Decoding, Inspection, NoAnswer, Prompt, Score, TokenScores

RECORDS = (
    QA(question="Where was Ada Quill born?", answer="In Norrby", subject="Ada Quill",
       paraphrases=("In which town was Ada Quill born?",), perturbed=("In Oslo", "In Bern")),
    QA(question="What did Ada Quill play?", answer="The lute", subject="Ada Quill",
       paraphrases=("Which instrument did Ada Quill play?",), perturbed=("A drum", "The harp")),
    QA(question="Who taught Ben Orr?", answer="Cy Dunn", subject="Ben Orr",
       paraphrases=("Of whom was Ben Orr a pupil?",), perturbed=("Ed Falk", "Al Moss")),
)  # fmt: skip


def told(prompt: Prompt) -> str:
    """What was said to it before the question, by the teacher or in its notes."""
    earlier = [one for one in prompt.messages[:-1] if one.role in ("user", "system")]
    return "\n".join(one.text for one in earlier)


class Pupil:
    """Nats per token: -1 of what it was told, -2 of the first wrong option, -3 of the others."""

    name, fingerprint = "pupil", None
    capabilities = frozenset({"generate", "score"})

    def __init__(self, knows: bool = False, lost: bool = False) -> None:
        self.knows, self.lost = knows, lost
        self.asked: list[Score] = []

    def score(self, requests: Sequence[Score]) -> list[TokenScores | NoAnswer]:
        self.asked += requests
        right = {one.answer for one in RECORDS}
        first = {one.perturbed[0] for one in RECORDS}
        found: list[TokenScores | NoAnswer] = []
        for one in requests:
            known = one.answer in right and (self.knows or one.answer in told(one.prompt))
            value = -1.0 if known else -2.0 if one.answer in first else -3.0
            count = len(one.answer.split())
            found.append(
                NoAnswer("lost") if self.lost
                else TokenScores(np.full(count, value, np.float32), np.zeros(count, bool), False)
            )  # fmt: skip
        return found

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str | NoAnswer]:
        found: list[str | NoAnswer] = []
        for prompt in prompts:
            if "teach it back" in prompt.messages[-1].text:
                known = [one.answer for one in RECORDS if one.answer in told(prompt)]
                found.append("I understand: " + ". ".join(known))
            else:
                found.append("I see.")
        return found

    def inspect(self, requests: Sequence[Inspection]) -> list[Array | NoAnswer]:
        raise TypeError("it cannot be looked into")
