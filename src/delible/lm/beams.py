"""Beam search in which somebody judges every candidate before the best ones stay.

    s(beam + v) = log p(beam) + log p(v | beam) - penalty(beam + v)

It is the library's own ``generate``: caches are reordered with the beams, sums of log-probabilities
are divided by the length, and one batch holds several prompts, each with beams of its own. A
penalty of infinity drops a candidate; a prompt all of whose beams are dropped ends with nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessorList

from delible.lm.body import Body
from delible.lm.decode import plain_settings
from delible.lm.layout import Layout, beside_padding, one_more, told, turn

#: Penalties of candidates: (which prompt, the tokens said so far, the candidates) -> one for each.
Judge = Callable[[int, Sequence[int], Sequence[int]], Sequence[float]]


def beam_search(
    lm: Body,
    prompts: Sequence[Sequence[int]],
    judge: Judge,
    *,
    beams: int,
    max_new_tokens: int,
    candidates: int | None = None,
) -> list[list[list[int]] | None]:
    """What each prompt's beams say, the best first.

    Between two tokens the model is free for others, unless interventions or a named adapter are on.

    Args:
        lm: The model.
        prompts: Token ids; they go through the model as one batch.
        judge: Gives penalties >= 0; called with the candidates of one beam.
        beams: Beams per prompt, at least 2.
        max_new_tokens: Tokens at most; the context of the model may take fewer.
        candidates: Likeliest next tokens of a beam that are judged; all others are dropped. None:
            as many as the search itself would look at.

    Returns:
        For each prompt the tokens of its beams without the one that ends an answer; nothing if all
        were dropped; None if the logits were no numbers.
    """
    groups = [[place] for place in range(len(prompts))]
    if lm.road != "plain":
        groups = [list(range(len(prompts)))]
    found: dict[int, list[list[int]] | None] = {}
    for places in groups:
        rows = [prompts[place] for place in places]
        searching = _Searching(lm, rows, judge, places, beams, candidates)
        found.update(zip(places, searching.spoken(max_new_tokens), strict=True))
    return [found[place] for place in range(len(prompts))]


class _Searching:
    """One batch under way; between two tokens it judges the candidates."""

    def __init__(
        self,
        lm: Body,
        prompts: Sequence[Sequence[int]],
        judge: Judge,
        places: Sequence[int],
        beams: int,
        candidates: int | None,
    ) -> None:
        self.lm, self.prompts, self.judge, self.places = lm, prompts, judge, places
        self.beams = beams
        self.candidates = candidates or max(2, 1 + len(lm.ends)) * beams
        self.broken: set[int] = set()
        self.width = self.steps = 0

    @torch.inference_mode()
    def spoken(self, max_new_tokens: int) -> list[list[list[int]] | None]:
        ids, mask, _ = self.lm.padded(self.prompts, sharing=False)
        self.width = ids.shape[1]
        most = min(max_new_tokens, self.lm.context - self.width)
        rows = [prompt for prompt in self.prompts for _ in range(self.beams)]
        first = beside_padding(rows, mask.repeat_interleave(self.beams, dim=0), self.width)
        later = one_more(lambda: rows, lambda: [self.steps] * len(rows), self.lm.device)

        def layout(tokens: int) -> Layout:
            return later(tokens) if self.steps else first(tokens)

        with plain_settings(self.lm), told(self.lm, layout, lambda: self.steps):
            made = self.lm.core.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=most,
                num_beams=self.beams,
                num_return_sequences=self.beams,
                do_sample=False,
                length_penalty=1.0,
                eos_token_id=sorted(self.lm.ends),
                pad_token_id=self.lm.pad_id,
                logits_processor=LogitsProcessorList([self]),
                return_dict_in_generate=True,
            )
        lengths = (made.beam_indices >= 0).sum(dim=1).tolist()
        said = made.sequences[:, self.width :].tolist()
        found: list[list[list[int]] | None] = []
        for place in range(len(self.prompts)):
            own = range(place * self.beams, (place + 1) * self.beams)
            answers = [said[one][: lengths[one]] for one in own if lengths[one]]
            # where too few beams came to an end, the library fills up with some that did not
            whole = [one for one in answers if self._ended(one) or len(one) == most]
            spoken = [one[:-1] if self._ended(one) else one for one in whole]
            found.append(None if place in self.broken else spoken)
        return found

    def _ended(self, tokens: Sequence[int]) -> bool:
        return tokens[-1] in self.lm.ends

    def __call__(
        self, ids: Int[Tensor, "rows sequence"], scores: Float[Tensor, "rows vocab"]
    ) -> Float[Tensor, "rows vocab"]:
        """The log-probabilities of the candidates less their penalties; of others: minus infinity.

        While it judges, the model is not needed, and others may use it.
        """
        values, tokens = scores.topk(min(self.candidates, scores.shape[1]), dim=1)
        lock = turn(self.lm.core) if self.lm.interveners is None else None
        if lock is not None:
            lock.release()
        try:
            penalties = self._penalties(ids, values, tokens)
        finally:
            if lock is not None:
                lock.acquire()
        self.steps += 1
        kept = torch.full_like(scores, -math.inf)
        return kept.scatter_(1, tokens, values - penalties)

    def _penalties(
        self,
        ids: Int[Tensor, "rows sequence"],
        values: Float[Tensor, "rows candidate"],
        tokens: Int[Tensor, "rows candidate"],
    ) -> Float[Tensor, "rows candidate"]:
        finite = values.isfinite().all(dim=1).tolist()
        known: dict[tuple[int, ...], Sequence[float]] = {}  # at first all beams are one
        found: list[Sequence[float]] = []
        for row, (said, chosen) in enumerate(
            zip(ids[:, self.width :].tolist(), tokens.tolist(), strict=True)
        ):
            place = row // self.beams
            if not finite[row]:
                self.broken.add(place)
            if place in self.broken:
                found.append([math.inf] * len(chosen))
                continue
            key = (place, *said)
            if key not in known:
                known[key] = self.judge(self.places[place], said, chosen)
            found.append(known[key])
        return torch.tensor(found, dtype=values.dtype, device=values.device)


__all__ = ["Judge", "beam_search"]
