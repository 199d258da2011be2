"""A model that may not say everything: each answer is searched past what it must not hold.

Next tokens that end a forbidden word are dropped, or cost something, while the answer is found; a
finished answer is looked through once more, since the last word of one that was cut off has no end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from delible.lm.beams import beam_search
from delible.lm.lm import LM
from delible.lm.speaker import said_by
from delible.system.asks import Decoding, NoAnswer, Prompt
from delible.system.base import BlackBox
from delible.systems.forbidden import Forbidden


class Restricted(BlackBox):
    """A model whose answers are found by beam search past forbidden words.

    Temperature and ``top_p`` mean nothing to it. The best beam that holds nothing forbidden is the
    answer; if there is none, a refusal.

    Args:
        lm: The model.
        forbids: What an answer to a prompt must not hold.
        refuse: What is said where nothing else can be.
        beams: Beams of each search.
        candidates: Next tokens of a beam that are looked at; None: those the search looks at.
    """

    #: Answers belong to whoever decides what is forbidden, and are kept under that one's name.
    fingerprint = None

    def __init__(
        self,
        lm: LM,
        forbids: Callable[[Prompt], Forbidden],
        refuse: Callable[[Prompt], str],
        *,
        beams: int,
        candidates: int | None = None,
    ) -> None:
        self.lm, self.forbids, self.refuse = lm, forbids, refuse
        self.beams, self.candidates, self.name = beams, candidates, f"{lm.name}, restricted"

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str | NoAnswer]:
        return self.lm.by_adapter(prompts, lambda mine: self._generate(mine, decoding))

    def _generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str | NoAnswer]:
        if decoding.max_new_tokens < 1:
            return [""] * len(prompts)
        lm, beams = self.lm, self.beams
        ids = [lm.template.prompt_ids(prompt) for prompt in prompts]
        room = lm.template.max_length - 1
        found: dict[int, str | NoAnswer] = {}
        fitting = [place for place, row in enumerate(ids) if len(row) <= room]
        order = sorted(fitting, key=lambda place: len(ids[place]), reverse=True)
        lengths = [len(row) + decoding.max_new_tokens for row in ids]
        budget = lm.budget
        limits = (budget.cached_tokens // beams, max(1, budget.rows // beams))
        with lm.evaluating(), lm.computing():
            for places in lm.batches(order, lengths, *limits):
                rows = [ids[place] for place in places]
                asked = [prompts[place] for place in places]
                answers = self._searched(asked, rows, decoding)
                found.update(zip(places, answers, strict=True))
        late = NoAnswer(f"the prompt is longer than {room} tokens")
        return [found.get(place, late) for place in range(len(ids))]

    def _searched(
        self, prompts: Sequence[Prompt], rows: Sequence[Sequence[int]], decoding: Decoding
    ) -> list[str | NoAnswer]:
        lm = self.lm
        leads = [prompt.prefill or prompt.text or "" for prompt in prompts]
        forbidden = [self.forbids(prompt) for prompt in prompts]

        def judge(place: int, said: Sequence[int], chosen: Sequence[int]) -> Sequence[float]:
            lead = leads[place]
            ended = [token in lm.ends for token in chosen]
            longer = [
                lead + said_by(lm, said if end else [*said, token], stripped=False)
                for token, end in zip(chosen, ended, strict=True)
            ]
            text = lead + said_by(lm, said, stripped=False)
            return forbidden[place].penalties(text, longer, ended, len(lead))

        searched = beam_search(
            lm,
            rows,
            judge,
            beams=self.beams,
            max_new_tokens=decoding.max_new_tokens,
            candidates=self.candidates,
        )
        answers: list[str | NoAnswer] = []
        for prompt, lead, words, spoken in zip(prompts, leads, forbidden, searched, strict=True):
            if spoken is None:
                answers.append(NoAnswer("the model gives values that are not finite numbers"))
                continue
            texts = (said_by(lm, one, decoding.stop, stripped=False) for one in spoken)
            passing = (one.strip() for one in texts if not words.holds(lead + one, len(lead)))
            answers.append(next(passing, self.refuse(prompt)))
        return answers


__all__ = ["Restricted"]
