"""Greedy coordinate gradient: a suffix of tokens after which given answers become likely.

    s = argmin over token sequences of  mean over (q, a) of -log p(a | q + s)

The gradient at the one-hot tokens of s names the ``top_k`` most promising tokens per position,
``candidates`` random single substitutions among these are scored together, the best one is taken
if it lowers the loss. Suffixes of several questions start with one of them, and take in the next
as soon as every answer so far is the greedy one.

Paper: arXiv 2307.15043. Reference code: github.com/llm-attacks/llm-attacks. Deviations: the loss
never rises (the original keeps the best candidate, better or not, and remembers the best suffix
seen); a suffix must be read back as its own tokens inside every prompt; suffixes that say an
answer, or a word of it, are left out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from delible.lm.forward import Batch, Forward, map_logits, target_logprobs
from delible.lm.hooks import steer
from delible.lm.lm import LM
from delible.system.asks import Prompt

Tokens = tuple[int, ...]
#: A shared prefix shorter than this is not worth a call of its own.
SHORTEST_PREFIX = 8
#: Candidates are drawn at most this many times as often as they are wanted.
DRAWS = 8


def with_suffix(prompt: Prompt, suffix: str) -> Prompt:
    """The prompt with a suffix at the end of its last turn."""
    *earlier, last = prompt.messages
    joined = last.with_text(last.text + suffix)
    return replace(prompt, messages=(*earlier, joined))


def _plain(text: str) -> str:
    return "".join(letter for letter in text.casefold() if letter.isalnum())


def gives_away(suffix: str, answer: str) -> bool:
    """Whether a suffix says an answer, or one of its words of more than three letters.

    An answer of three letters or less counts where it is a word of the suffix.
    """
    said, whole = _plain(suffix), _plain(answer)
    parts = [whole, *(_plain(word) for word in answer.split())]
    if any(len(part) > 3 and part in said for part in parts):
        return True
    return bool(whole) and whole in [_plain(word) for word in suffix.split()]


@dataclass(frozen=True)
class Case:
    """A question with its answer as token ids, cut open where the suffix stands.

    Attributes:
        ended: Whether the answer must end after its last word, or may go on.
    """

    lm: LM
    prompt: Prompt
    answer: str
    before: Tokens
    after: Tokens
    target: Tokens
    ended: bool = True

    @classmethod
    def cut(
        cls, lm: LM, prompt: Prompt, answer: str, suffix: Tokens, ended: bool = True
    ) -> Case | None:
        """None where the suffix is not among the prompt's tokens, or the row is too long."""
        row = lm.template.encode(with_suffix(prompt, text_of(lm, suffix)), answer)
        asked, size = row.ids[: row.start], len(suffix)
        for at in range(0 if row.cut else len(asked) - size, 0, -1):
            if asked[at : at + size] == suffix:
                after = asked[at + size :]
                target = row.ids[row.start : len(row.ids) - (row.has_end and not ended)]
                return cls(lm, prompt, answer, asked[:at], after, target, ended)
        return None

    def row(self, suffix: Sequence[int]) -> Tokens:
        return (*self.before, *suffix, *self.after, *self.target)

    def reads(self, suffix: Sequence[int]) -> bool:
        """Whether the suffix's text inside the prompt is read as exactly these tokens."""
        asked = with_suffix(self.prompt, text_of(self.lm, suffix))
        row = self.lm.template.encode(asked, self.answer)
        return row.ids[: len(row.ids) - (row.has_end and not self.ended)] == self.row(suffix)

    def batch(self, suffixes: Sequence[Sequence[int]], prefix: int = 0) -> Batch:
        ids = torch.tensor([self.row(suffix) for suffix in suffixes], device=self.lm.device)
        lengths = torch.full((len(ids),), ids.shape[1], device=ids.device)
        return Batch(ids, lengths, lengths - len(self.target), prefix)


class Pull(Protocol):
    """What a search lowers beside -log p(answer): something about the states of one layer.

    Attributes:
        layer: The block whose output is read.
    """

    @property
    def layer(self) -> int: ...

    def __call__(
        self, case: Case, batch: Batch, states: Float[Tensor, "rows sequence hidden"]
    ) -> Float[Tensor, " rows"]:
        """The term of each row."""
        ...


def text_of(lm: LM, suffix: Sequence[int]) -> str:
    """A suffix as text, a space in front."""
    text = lm.tokenizer.decode(
        list(suffix), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return text if text[:1].isspace() else f" {text}"


def usable_tokens(lm: LM) -> Bool[Tensor, " vocab"]:
    """Tokens that a suffix may hold: printable ASCII with something to see, nothing special."""
    size = min(len(lm.tokenizer), lm.core.get_input_embeddings().weight.shape[0])
    texts = lm.tokenizer.batch_decode([[token] for token in range(size)])
    usable = [text.isascii() and text.isprintable() and bool(text.strip()) for text in texts]
    for token in (*lm.tokenizer.all_special_ids, *lm.tokenizer.added_tokens_decoder):
        if token < size:
            usable[token] = False
    return torch.tensor(usable)


def _scored(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p(target), and whether it is not the argmax, shape [tokens, 2]."""
    missed = (logits.argmax(dim=1) != targets).float()
    return torch.stack([-target_logprobs(logits, targets), missed], dim=1)


def _answer_values(lm: LM, batch: Batch) -> Float[Tensor, "rows two"]:
    """Per row the sums of what :func:`_scored` gives."""
    with lm.computing():
        states, _ = Forward(lm)(batch)
        assert states is not None
        values = map_logits(lm.head, states, batch.targets, _scored, lm.vocabulary)
    return values.reshape(len(batch.ids), -1, 2).sum(dim=1)


def _losses(case: Case, batch: Batch, pull: Pull | None) -> Float[Tensor, "rows two"]:
    """Per row its loss, and how many tokens of the answer are not the greedy ones."""
    lm = case.lm
    if pull is None:
        return _answer_values(lm, batch)
    with lm.computing():
        states, blocks = Forward(lm)(batch, (pull.layer,))
        assert states is not None
        values = map_logits(lm.head, states, batch.targets, _scored, lm.vocabulary)
    values = values.reshape(len(batch.ids), -1, 2).sum(dim=1)
    more = pull(case, batch, blocks[pull.layer].float())
    return torch.stack([values[:, 0] + more.to(values), values[:, 1]], dim=1)


def token_gradient(
    cases: Sequence[Case], suffix: Tokens, pull: Pull | None = None
) -> Float[Tensor, "suffix vocab"]:
    """Gradient of the summed losses at the one-hot tokens of the suffix."""
    lm = cases[0].lm
    found = torch.zeros(1)
    for case in cases:
        embedded: list[Tensor] = []

        def cut(values: Tensor, embedded: list[Tensor] = embedded) -> Tensor:
            embedded.append(values.detach().requires_grad_(True))
            return embedded[0]

        with steer(lm.core, lm.anatomy.embedding, cut):
            loss = _losses(case, case.batch([suffix]), pull)[0, 0]
        (gradient,) = torch.autograd.grad(loss, embedded)
        start = len(case.before)
        found = found.to(gradient) + gradient[0, start : start + len(suffix)]
    # through the module, which may scale what it looks up
    embedding = lm.core.get_submodule(lm.anatomy.embedding)
    with torch.no_grad():
        every = embedding(
            torch.arange(lm.core.get_input_embeddings().weight.shape[0]).to(lm.device)
        )
    return found @ every.to(found).T


@torch.no_grad()
def suffix_losses(
    cases: Sequence[Case], suffixes: Sequence[Tokens], pull: Pull | None = None
) -> tuple[Float[Tensor, " suffixes"], Bool[Tensor, " suffixes"]]:
    """Mean over cases of -log p(answer) and the pull; whether every answer is the greedy one."""
    lm, total = cases[0].lm, torch.zeros(len(suffixes), 2, dtype=torch.float64)
    for case in cases:
        shares = pull is None and lm.shares_prefix and len(case.before) >= SHORTEST_PREFIX
        prefix = len(case.before) if shares else 0
        size = max(1, lm.budget.tokens // (len(case.row(suffixes[0])) - prefix))
        parts = [suffixes[at : at + size] for at in range(0, len(suffixes), size)]
        total += torch.cat([_losses(case, case.batch(part, prefix), pull).cpu() for part in parts])
    return total[:, 0] / len(cases), total[:, 1] == 0


@dataclass
class Found:
    """What a search found.

    Attributes:
        losses: (questions taken in, their mean loss) at the start and after every step; within
            one number of questions the loss never rises.
        scored: Times that an answer was scored after a suffix.
        solved: Whether every answer is the greedy one.
    """

    suffix: Tokens
    losses: list[tuple[int, float]]
    scored: int
    solved: bool


def search(
    cases: Sequence[Case],
    start: Tokens,
    allowed: Bool[Tensor, " vocab"],
    *,
    steps: int,
    top_k: int,
    candidates: int,
    random: torch.Generator,
    pull: Pull | None = None,
    tick: Callable[[], None] = lambda: None,
) -> Found:
    """Greedy coordinate gradient from a starting suffix."""
    active = 1
    losses, solved = suffix_losses(cases[:active], [start], pull)
    found = Found(start, [(active, float(losses[0]))], active, bool(solved[0]))
    for _ in range(steps):
        tick()
        while found.solved and active < len(cases):
            active += 1
            losses, solved = suffix_losses(cases[:active], [found.suffix], pull)
            found.losses.append((active, float(losses[0])))
            found.scored, found.solved = found.scored + active, bool(solved[0])
        if found.solved:
            break
        gradient = token_gradient(cases[:active], found.suffix, pull).cpu()[:, : len(allowed)]
        gradient = gradient.masked_fill(~allowed, torch.inf)
        promising = (-gradient).topk(min(top_k, int(allowed.sum())), dim=1).indices
        pool = draw_candidates(cases, found.suffix, promising, candidates, random)
        loss = found.losses[-1][1]
        if pool:
            losses, solved = suffix_losses(cases[:active], pool, pull)
            found.scored += active * len(pool)
            place = _best_below(loss, cases, pool, losses)
            if place is not None:
                found.suffix, loss = pool[place], float(losses[place])
                found.solved = bool(solved[place])
        found.losses.append((active, loss))
    return found


def draw_candidates(
    cases: Sequence[Case],
    suffix: Tokens,
    promising: Int[Tensor, "suffix top"],
    count: int,
    random: torch.Generator,
) -> list[Tokens]:
    """Distinct substitutions of one token that give nothing away and that the first prompt reads
    back as they are; fewer than ``count`` where there are no more."""
    draws = count * DRAWS
    places = torch.randint(len(suffix), (draws,), generator=random).tolist()
    ranks = torch.randint(promising.shape[1], (draws,), generator=random).tolist()
    judged: dict[Tokens, bool] = {suffix: False}
    for place, rank in zip(places, ranks, strict=True):
        tried = (*suffix[:place], int(promising[place, rank]), *suffix[place + 1 :])
        if tried not in judged:
            text = text_of(cases[0].lm, tried)
            told = any(gives_away(text, case.answer) for case in cases)
            judged[tried] = not told and cases[0].reads(tried)
            if sum(judged.values()) == count:
                break
    return [tried for tried, good in judged.items() if good]


def _best_below(
    limit: float, cases: Sequence[Case], pool: Sequence[Tokens], losses: Tensor
) -> int | None:
    """The best candidate below the limit that every prompt reads back as it is."""
    for place in losses.argsort(stable=True).tolist():
        if float(losses[place]) >= limit:
            return None
        if all(case.reads(pool[place]) for case in cases[1:]):
            return int(place)
    return None


def tokens_of(lm: LM, text: str) -> Tokens:
    """A text's tokens, nothing added."""
    return tuple(lm.tokenizer(text, add_special_tokens=False)["input_ids"])


@contextmanager
def frozen(lm: LM) -> Iterator[LM]:
    """The model in evaluation mode, with a template whose counts are nobody's."""
    twin = copy.copy(lm)
    twin.template = copy.copy(lm.template)
    with lm.evaluating():
        yield twin
