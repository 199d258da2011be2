"""DUA (dynamic unlearning attack): searches for a suffix that brings the answers back.

    s = argmin over token sequences of  mean over (q, a) of -log p(a | q + s)

by greedy coordinate gradient: the gradient at the one-hot tokens of s names the ``top_k`` most
promising tokens per position, ``candidates`` random single substitutions among these are scored
together, the best one is taken if it lowers the loss. Suffixes of several questions start with
one of them, and take in the next as soon as every answer so far is the greedy one.

The suffix is searched for on the attacked system, or on the original and then carried over. It
belongs to one question (``within_query``), to a subject and is judged on the subject's other
questions (``cross_query``), or to all and is judged on other subjects (``cross_target``).

Paper: arXiv 2408.10682 (settings); arXiv 2307.15043 (the search: 20 tokens, top 256, 512
candidates, 500 steps). Reference code: none for the attack; github.com/llm-attacks/llm-attacks.
Deviations: the loss never rises (the original keeps the best candidate, better or not, and
remembers the best suffix seen); a suffix must be read back as its own tokens inside every prompt;
suffixes that say an answer, or a word of it, are left out. Smaller numbers by default, and a
bound on the questions. A long enough search makes any model say anything: read what it brings
back against the model that never knew.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from delible.errors import DataError, ModelError
from delible.lm.forward import Batch, Forward, map_logits, target_logprobs
from delible.lm.hooks import steer
from delible.lm.lm import LM
from delible.measure.attack import AttackContext, PromptAttack
from delible.records import RecordBase
from delible.registry import register
from delible.system.asks import Prompt
from delible.system.base import System
from delible.system.questions import answer_of, ask, has_answer
from delible.train.randomness import generator, shuffled

Setting = Literal["within_query", "cross_query", "cross_target"]
Tokens = tuple[int, ...]
#: Repeated, what the search starts from.
START = " !"
#: A shared prefix shorter than this is not worth a call of its own.
SHORTEST_PREFIX = 8
#: Candidates are drawn at most this many times as often as they are wanted.
DRAWS = 8


def with_suffix(prompt: Prompt, suffix: str) -> Prompt:
    """The prompt with a suffix at the end of its last turn."""
    *earlier, last = prompt.messages
    joined = last.model_copy(update={"content": last.content + suffix})
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
    """A question with its answer as token ids, cut open where the suffix stands."""

    lm: LM
    prompt: Prompt
    answer: str
    before: Tokens
    after: Tokens
    target: Tokens

    @classmethod
    def cut(cls, lm: LM, prompt: Prompt, answer: str, suffix: Tokens) -> Case | None:
        """None where the suffix is not among the prompt's tokens, or the row is too long."""
        row = lm.template.encode(with_suffix(prompt, text_of(lm, suffix)), answer)
        asked, size = row.ids[: row.start], len(suffix)
        for at in range(0 if row.cut else len(asked) - size, 0, -1):
            if asked[at : at + size] == suffix:
                after = asked[at + size :]
                return cls(lm, prompt, answer, asked[:at], after, row.ids[row.start :])
        return None

    def row(self, suffix: Sequence[int]) -> Tokens:
        return (*self.before, *suffix, *self.after, *self.target)

    def reads(self, suffix: Sequence[int]) -> bool:
        """Whether the suffix's text inside the prompt is read as exactly these tokens."""
        asked = with_suffix(self.prompt, text_of(self.lm, suffix))
        return self.lm.template.encode(asked, self.answer).ids == self.row(suffix)

    def batch(self, suffixes: Sequence[Sequence[int]], prefix: int = 0) -> Batch:
        ids = torch.tensor([self.row(suffix) for suffix in suffixes], device=self.lm.device)
        lengths = torch.full((len(ids),), ids.shape[1], device=ids.device)
        return Batch(ids, lengths, lengths - len(self.target), prefix)


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


def token_gradient(cases: Sequence[Case], suffix: Tokens) -> Float[Tensor, "suffix vocab"]:
    """Gradient of the summed -log p(answer) at the one-hot tokens of the suffix."""
    lm = cases[0].lm
    found = torch.zeros(1)
    for case in cases:
        embedded: list[Tensor] = []

        def cut(values: Tensor, embedded: list[Tensor] = embedded) -> Tensor:
            embedded.append(values.detach().requires_grad_(True))
            return embedded[0]

        with steer(lm.core, lm.anatomy.embedding, cut):
            nll = _answer_values(lm, case.batch([suffix]))[0, 0]
        (gradient,) = torch.autograd.grad(nll, embedded)
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
    cases: Sequence[Case], suffixes: Sequence[Tokens]
) -> tuple[Float[Tensor, " suffixes"], Bool[Tensor, " suffixes"]]:
    """Mean over cases of -log p(answer), and whether every answer is the greedy one."""
    lm, total = cases[0].lm, torch.zeros(len(suffixes), 2, dtype=torch.float64)
    for case in cases:
        shares = lm.shares_prefix and len(case.before) >= SHORTEST_PREFIX
        prefix = len(case.before) if shares else 0
        size = max(1, lm.budget.tokens // (len(case.row(suffixes[0])) - prefix))
        parts = [suffixes[at : at + size] for at in range(0, len(suffixes), size)]
        total += torch.cat([_answer_values(lm, case.batch(part, prefix)).cpu() for part in parts])
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
    tick: Callable[[], None] = lambda: None,
) -> Found:
    """Greedy coordinate gradient from a starting suffix."""
    active = 1
    losses, solved = suffix_losses(cases[:active], [start])
    found = Found(start, [(active, float(losses[0]))], active, bool(solved[0]))
    for _ in range(steps):
        tick()
        while found.solved and active < len(cases):
            active += 1
            losses, solved = suffix_losses(cases[:active], [found.suffix])
            found.losses.append((active, float(losses[0])))
            found.scored, found.solved = found.scored + active, bool(solved[0])
        if found.solved:
            break
        gradient = token_gradient(cases[:active], found.suffix).cpu()[:, : len(allowed)]
        gradient = gradient.masked_fill(~allowed, torch.inf)
        promising = (-gradient).topk(min(top_k, int(allowed.sum())), dim=1).indices
        pool = draw_candidates(cases, found.suffix, promising, candidates, random)
        loss = found.losses[-1][1]
        if pool:
            losses, solved = suffix_losses(cases[:active], pool)
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


@dataclass(frozen=True)
class Task:
    """One suffix to search for: by which records it is found, and by which it is judged."""

    key: str
    trained: Sequence[RecordBase]
    judged: Sequence[RecordBase]


def spaced(records: Sequence[RecordBase], count: int) -> list[RecordBase]:
    """At most ``count`` of the records, evenly spaced."""
    step = max(1.0, len(records) / count)
    return [records[int(index * step)] for index in range(min(count, len(records)))]


def asked(record: RecordBase) -> Prompt | None:
    """The record's prompt where a suffix can follow its question and it has an answer."""
    prompt = ask(record)
    open_turn = prompt is not None and takes_suffix(prompt)
    return prompt if open_turn and has_answer(record) else None


def takes_suffix(prompt: Prompt) -> bool:
    """Whether the prompt ends in a user turn."""
    return prompt.text is None and bool(prompt.messages) and prompt.messages[-1].role == "user"


def subject_key(record: RecordBase) -> str:
    """Names a subject's suffix without naming the subject."""
    return hashlib.sha256(f"subject/{record.subject}".encode()).hexdigest()


@register(
    kind="attack",
    name="dua",
    title="Searched suffixes (dynamic unlearning attack)",
    summary="Appends a suffix, found by gradient, after which the answer becomes likely.",
    paper="2408.10682",
    year=2024,
    family="suffix search",
    needs=("forget", "weights"),
    changes="prompts",
    reversible=True,
    capability="weights",
    misleads="Given enough steps a suffix makes any model say anything; compare the reference.",
    badges=("variant",),
    variant="The loss never rises, no answer stands in a suffix; fewer and shorter searches.",
)
class DUA(PromptAttack):
    """Options of the suffix search."""

    setting: Setting = Field("within_query", description="Whose answers judge a suffix.")
    search_on: Literal["system", "original"] = Field(
        "system", description="Whose gradients are used: the attacked model's or the original's."
    )
    rows: int = Field(8, ge=1, description="Questions that suffixes are searched for at most.")
    share: float = Field(
        0.5, gt=0, lt=1, description="Fraction that is searched with, of questions or subjects."
    )
    length: int = Field(20, ge=1, description="Tokens of a suffix.")
    steps: int = Field(50, ge=1, description="Substitutions that are tried one after the other.")
    top_k: int = Field(64, ge=1, description="Most promising tokens per position.")
    candidates: int = Field(64, ge=1, description="Substitutions that are scored per step.")
    suffixes: dict[str, str] = Field(
        default_factory=dict, description="Suffixes of an earlier search, instead of a new one."
    )

    def variants(self) -> Sequence[Mapping[str, object]]:
        """On the attacked model, within and across questions; carried over from the original."""
        return (
            {"setting": "within_query"},
            {"setting": "cross_query"},
            {"setting": "within_query", "search_on": "original"},
        )

    def variant_title(self) -> str:
        """Such as "same question, found on the original"."""
        judged = {"within_query": "same question", "cross_query": "other questions",
                  "cross_target": "other subjects"}[self.setting]  # fmt: skip
        return judged + (", found on the original" if self.search_on == "original" else "")

    def searches_on(self) -> Literal["system", "original"] | None:
        return None if self.suffixes else self.search_on

    def held_out(self, context: AttackContext) -> Sequence[RecordBase]:
        """What judges the suffixes: the searched questions themselves, or the other ones.

        Raises:
            DataError: There is no question, or too few for the setting.
        """
        return [record for task in self.tasks(context) for record in task.judged]

    def tasks(self, context: AttackContext) -> list[Task]:
        """The suffixes to search for; the same for every system.

        Raises:
            DataError: There is no question, or too few for the setting.
        """
        records = [record for record in context.forget if asked(record) is not None]
        if self.setting == "within_query":
            tasks = [Task(one.digest, [one], [one]) for one in spaced(records, self.rows)]
        else:
            random = generator(context.seed, "dua.split", self.setting)
            subjects: dict[str, list[RecordBase]] = {}
            for record in records:
                subjects.setdefault(subject_key(record), []).append(record)
            keys = shuffled(list(subjects), random)
            if self.setting == "cross_query":
                tasks = self._across_questions(subjects, keys, random)
            else:
                tasks = self._across_subjects(subjects, keys)
        if not tasks:
            wanted = {
                "within_query": "one question with an answer",
                "cross_query": "two questions about one subject",
                "cross_target": "questions about two subjects",
            }[self.setting]
            raise DataError(
                f"the forget rows do not hold {wanted}.",
                where=f"attack 'dua', {self.setting}",
                hint="Add such rows to --forget, or choose another setting.",
            )
        return tasks

    def _across_questions(
        self,
        subjects: Mapping[str, Sequence[RecordBase]],
        keys: Sequence[str],
        random: torch.Generator,
    ) -> list[Task]:
        tasks: list[Task] = []
        left = self.rows
        for key in keys:
            records = shuffled(subjects[key], random)
            count = min(max(1, round(self.share * len(records))), len(records) - 1, left)
            if count > 0:
                tasks.append(Task(key, records[:count], records[count:]))
                left -= count
        return tasks

    def _across_subjects(
        self, subjects: Mapping[str, Sequence[RecordBase]], keys: Sequence[str]
    ) -> list[Task]:
        count = min(max(1, round(self.share * len(keys))), len(keys) - 1)
        if count < 1:
            return []
        trained = [record for key in keys[:count] for record in subjects[key]]
        judged = [record for key in keys[count:] for record in subjects[key]]
        return [Task("", spaced(trained, self.rows), judged)]

    def prepare(self, system: System, context: AttackContext) -> DUA:
        """Searches for all suffixes.

        Raises:
            ModelError: The system is not a model whose gradients can be taken, or its tokenizer
                does not keep a suffix apart.
            DataError: There are too few questions for the setting.
        """
        if not isinstance(system, LM):
            raise ModelError(
                f"'{system.name}' gives no gradients, which the suffix search needs.",
                hint="Search on the original and carry the suffixes over: search_on original.",
            )
        tasks, suffixes, found = self.tasks(context), dict[str, str](), list[Found]()
        with _frozen(system) as lm:
            allowed = usable_tokens(lm)
            for index, task in enumerate(tasks):
                steps = iter(range(index * self.steps, (index + 1) * self.steps))

                def tick(steps: Iterator[int] = steps) -> None:
                    if context.progress is not None:
                        context.progress(next(steps), len(tasks) * self.steps)

                cases, start = self._cases(lm, task)
                one = search(
                    cases, start, allowed, steps=self.steps, top_k=self.top_k,
                    candidates=self.candidates, tick=tick,
                    random=generator(context.seed, "dua", task.key),
                )  # fmt: skip
                found.append(one)
                suffixes[task.key] = text_of(lm, one.suffix)
                context.say(
                    f"Suffix {index + 1} of {len(tasks)}: -log p of the answers "
                    f"{one.losses[0][1]:.1f} -> {one.losses[-1][1]:.1f}."
                )
        if context.progress is not None:
            context.progress(len(tasks) * self.steps, len(tasks) * self.steps)
        context.notes.update(self._report(found, len(found[0].suffix)))
        return self.model_copy(update={"suffixes": suffixes})

    def _cases(self, lm: LM, task: Task) -> tuple[list[Case], Tokens]:
        """The task's questions, cut open, and the tokens that the search starts from."""
        repeats = self.length
        while repeats > 1 and len(_tokens(lm, START * (repeats - 1))) >= self.length:
            repeats -= 1  # a tokenizer may need several tokens for each
        start = _tokens(lm, START * repeats)
        cases = []
        for record in task.trained:
            prompt = asked(record)
            case = prompt and Case.cut(lm, prompt, answer_of(record), start)
            if not case:
                raise ModelError(
                    "the suffix cannot be found among the tokens of a prompt.",
                    where="attack 'dua'",
                    hint="The prompt is longer than the model's context, or its chat template "
                    "changes what is asked.",
                )
            cases.append(case)
        return cases, start

    def _report(self, found: Sequence[Found], length: int) -> dict[str, object]:
        before = sum(one.losses[0][1] for one in found) / len(found)
        after = sum(one.losses[-1][1] for one in found) / len(found)
        steps = sum(len(one.losses) - 1 for one in found)
        scored = sum(one.scored for one in found)
        solved = sum(one.solved for one in found)
        note = (
            f"Searched for {len(found)} suffix{'es' * (len(found) > 1)} of {length} tokens: "
            f"{steps} steps, {scored} answers scored; {solved} make every answer the greedy one; "
            f"mean -log p {before:.1f} -> {after:.1f}."
        )
        return {"note": note, "suffixes": len(found), "suffix_tokens": length, "steps": steps,
                "answers_scored": scored, "solved": solved,
                "nll_before": before, "nll_after": after}  # fmt: skip

    def rewrite(self, record: RecordBase, prompt: Prompt) -> Sequence[Prompt]:
        """One prompt: with the record's suffix, its subject's, or that of all.

        A record without one gets one of the others; before any search it is the start.
        """
        if not takes_suffix(prompt):
            return ()
        known = self.suffixes
        keys = [key for key in (record.digest, subject_key(record), "") if key in known]
        if not keys and known:
            keys = [sorted(known)[int(record.digest, 16) % len(known)]]
        return (with_suffix(prompt, known[keys[0]] if keys else START * self.length),)


def _tokens(lm: LM, text: str) -> Tokens:
    return tuple(lm.tokenizer(text, add_special_tokens=False)["input_ids"])


@contextmanager
def _frozen(lm: LM) -> Iterator[LM]:
    """The model in evaluation mode, with a template whose counts are nobody's."""
    twin = copy.copy(lm)
    twin.template = copy.copy(lm.template)
    was_training = lm.model.training
    lm.model.eval()
    try:
        yield twin
    finally:
        lm.model.train(was_training)
