"""ALU: answer first, clean afterwards, by agents that audit, erase, rate and compose.

    audit    t = the subjects that the answer gives away, or None            None: the answer passes
    erase    n rewrites of the answer without them
    critic   a rating s_k of 1 to 5 for each
    compose  one answer of the best j, if mean of their ratings >= theta     else a refusal

Paper: ALU (arXiv 2502.00406); code: respailab/agentic-llm-unlearning. The first answer is that of
what is guarded, which knows nothing of the subjects. A small auditor with large helpers (the
paper's local mode) is `--role guard=SMALL --role writer=LARGE --role critic=LARGE`. Differences,
on purpose: every answer is audited, in every mode (without a local auditor the code rewrites all);
a clean answer passes at once (`short_circuit`; the code sends copies of it through critic and
composer); the verdict is "None" or names of the list, exactly, and anything else is no verdict;
lists of more than `listed` subjects are cut to those that a text names or is closest to; what was
composed is audited again and looked through for names. Whatever cannot be read, and a rating too
many or too few, is a refusal: the first answer never comes out instead.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Generator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, Field

from delible.context import NO_CONTEXT, Context
from delible.errors import DataError
from delible.lm.encoder import Encoder
from delible.names import fold
from delible.records import ForgetRequest
from delible.registry import register
from delible.system.asks import Decoding, Prompt
from delible.system.forms import read_form
from delible.system.replies import Unanswered
from delible.system.role import Role, RoleName
from delible.systems.consulting import (
    Costs,
    conversation,
    fenced,
    filled,
    last_asked,
    letters_in,
    random_letter,
)
from delible.systems.encoding import EncodingGuard
from delible.systems.guarded import GuardMind
from delible.systems.judging import Consult, Decision, Judging, Say
from delible.systems.record_texts import names_of
from delible.systems.shortlist import Subjects
from delible.systems.thoughts import parted

#: Part of the fingerprint: goes up whenever the same options judge differently.
VERSION = 1
#: What the erasing agent writes where nothing sensible would be left.
NOTHING_LEFT = "I cannot help with that."
#: How often it is asked for rewrites until there are enough.
ATTEMPTS = 3

_NUMBERED = re.compile(r"^\s*(?:\(?\d{1,2}[.):]|[-*•])\s*(.+?)\s*$", re.MULTILINE)


class Rewrites(BaseModel):
    """What the erasing agent replies."""

    response_list: list[str]


class Ratings(BaseModel):
    """What the critic replies."""

    notes: list[str] = []
    ratings: list[int]


def read_verdict(reply: str, subjects: Sequence[str]) -> tuple[str, ...]:
    """The subjects that an auditor names; empty for None.

    Only the last line counts, as a whole or with ``;`` or ``,`` between names. Case, accents and
    quotation marks do not matter; a word more does.

    Raises:
        Unanswered: It is no verdict.
    """
    lines = [line for line in parted(reply)[1].splitlines() if line.strip()]
    if lines:
        said = re.sub(r"^\W*verdict\W+", "", lines[-1], flags=re.IGNORECASE).strip(" .*\"'“”`[]")
        if said.lower() == "none":
            return ()
        known = {fold(subject).letters: subject for subject in subjects}
        for parts in ([said], said.split(";"), re.split(r"[;,]", said)):
            found = [known.get(fold(part).letters) for part in parts if part.strip()]
            if found and None not in found:
                return tuple(dict.fromkeys(str(one) for one in found))
    raise Unanswered("the auditor gave no verdict.")


def read_rewrites(reply: str) -> list[str]:
    """Rewrites in a reply, as a JSON list or as numbered lines; blank ones and repeats are none."""
    said = parted(reply)[1]
    form = read_form(said, Rewrites)
    texts = _NUMBERED.findall(said) if isinstance(form, str) else form.response_list
    return list(dict.fromkeys(text.strip() for text in texts if text.strip()))


def best(candidates: Sequence[str], ratings: Sequence[int], kept: int) -> tuple[list[str], float]:
    """The highest rated candidates, earlier ones first among equals, and their mean rating.

    Raises:
        Unanswered: Not every candidate has one rating of 1 to 5.
    """
    if len(ratings) != len(candidates) or not all(1 <= one <= 5 for one in ratings):
        raise Unanswered("the critic did not rate every candidate from 1 to 5.")
    order = sorted(range(len(candidates)), key=lambda place: -ratings[place])[:kept]
    return [candidates[place] for place in order], sum(ratings[p] for p in order) / len(order)


class AluMind(GuardMind):
    """The agents, ready; made by :class:`Alu`."""

    reads = "whole"

    def __init__(
        self,
        options: Alu,
        subjects: Subjects,
        roles: Mapping[RoleName, Role],
        fingerprint: str,
    ) -> None:
        self.options, self.subjects, self.roles = options, subjects, roles
        self.consulted = tuple(roles.values())
        self.refusals, self._fingerprint = options.refusals, fingerprint
        self.threaded = subjects.likeness is not None
        self.costs = Costs(options.consults)
        self.notes = {"costs": self.costs.told, "subjects": len(subjects.targets)}

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def before(self, prompt: Prompt) -> Decision:
        self.costs.prompt()
        return None

    def after(self, prompt: Prompt, answer: str, since: int = 0) -> Judging:
        if not answer.strip():
            return None
        query = conversation(prompt)
        subjects = self.subjects.for_text(query, answer)
        given_away = yield from self.audit(query, answer, subjects)
        if given_away:
            letters = letters_in(last_asked(prompt)) if self.options.letters else ""
            if letters:
                self.costs.outcome("lettered")
                return Say(random_letter(letters, prompt, self.options.seed))
            candidates = yield from self.erase(query, answer, subjects)
        elif self.options.short_circuit:
            self.costs.outcome("passed")
            return None
        else:
            candidates = [answer] * self.options.rewrites
        kept, rating = yield from self.rate(query, candidates, subjects, given_away)
        if rating < self.options.threshold:
            self.costs.outcome("refused")
            return self.refuse(prompt)
        text = yield from self.compose(query, kept, subjects)
        shows = self.subjects.names.occur(text)
        if not shows and self.options.audit_again:
            shows = bool((yield from self.audit(query, text, subjects)))
        if shows or not text:
            self.costs.outcome("refused")
            return self.refuse(prompt)
        self.costs.outcome("rewritten")
        return Say(text)

    def audit(
        self, query: str, answer: str, subjects: Sequence[str]
    ) -> Generator[Consult, Any, tuple[str, ...]]:
        """Which subjects an answer gives away."""
        reply = yield from self._asked(
            "guard",
            Decoding(self.options.audit_tokens),
            "alu_audit.txt",
            subjects=self.subjects.listed(subjects),
            query=fenced(query, "query"),
            answer=fenced(answer, "answer"),
        )
        return read_verdict(reply, subjects)

    def erase(
        self, query: str, answer: str, subjects: Sequence[str]
    ) -> Generator[Consult, Any, list[str]]:
        """Rewrites of an answer; asked for again, with other draws, until there are enough."""
        found: list[str] = []
        for attempt in range(ATTEMPTS):
            reply = yield from self._asked(
                "writer",
                Decoding(
                    self.options.max_new_tokens,
                    temperature=self.options.temperature,
                    seed=self.options.seed + attempt,
                ),
                "alu_erase.txt",
                subjects=self.subjects.listed(subjects),
                count=self.options.rewrites,
                refusal=NOTHING_LEFT,
                query=fenced(query, "query"),
                answer=fenced(answer, "answer"),
            )
            found = list(dict.fromkeys([*found, *read_rewrites(reply)]))[: self.options.rewrites]
            if len(found) == self.options.rewrites or self.options.temperature == 0:
                break
        if len(found) < min(self.options.kept, self.options.rewrites):
            raise Unanswered("there are too few rewrites.")
        return found

    def rate(
        self,
        query: str,
        candidates: Sequence[str],
        subjects: Sequence[str],
        given_away: Sequence[str],
    ) -> Generator[Consult, Any, tuple[list[str], float]]:
        """The best candidates, and their mean rating."""
        reply = yield from self._asked(
            "critic",
            Decoding(self.options.max_new_tokens),
            "alu_critic.txt",
            subjects=self.subjects.listed(subjects),
            target="; ".join(given_away) or "None",
            count=len(candidates),
            query=fenced(query, "query"),
            candidates=_numbered(candidates),
        )
        form = read_form(parted(reply)[1], Ratings)
        if isinstance(form, str):
            raise Unanswered("the critic gave no ratings.")
        return best(candidates, form.ratings, self.options.kept)

    def compose(
        self, query: str, kept: Sequence[str], subjects: Sequence[str]
    ) -> Generator[Consult, Any, str]:
        """One answer of several."""
        reply = yield from self._asked(
            "writer",
            Decoding(self.options.max_new_tokens),
            "alu_compose.txt",
            subjects=self.subjects.listed(subjects),
            query=fenced(query, "query"),
            candidates=_numbered(kept),
        )
        return parted(reply)[1].strip()

    def _asked(
        self, part: RoleName, decoding: Decoding, file: str, **values: object
    ) -> Generator[Consult, Any, str]:
        prompt = Prompt.ask(filled(file, **values))
        reply: str = yield from self.costs.asks(part, Consult(self.roles[part], prompt, decoding))
        return reply


def _numbered(texts: Sequence[str]) -> str:
    return "\n\n".join(
        f"{number}.\n{fenced(text, 'candidate')}" for number, text in enumerate(texts, start=1)
    )


@register(
    kind="guard",
    name="alu",
    title="ALU",
    summary="Agents audit each answer, and rewrite one that gives a subject away.",
    paper="2502.00406",
    year=2025,
    family="Guard",
    intention="suppression",
    mechanism="output-guard",
    needs=("names", "model_at_inference"),
    changes="Nothing in the model; an answer that gives a subject away is rewritten, or refused.",
    reversible=True,
    retrain_goal=False,
    weakest="A fact asked for in pieces over several conversations, and whatever the auditor does "
    "not recognise.",
    capability="generate",
    badges=("variant",),
    variant="Every answer is audited, clean ones pass at once, long lists are cut to what is near, "
    "and what was composed is audited again.",
)
class Alu(EncodingGuard):
    """Options of the agents."""

    consults = ("guard", "writer", "critic")

    timeout_seconds: float = Field(
        120.0, gt=0, description="A judgement that takes longer is a refusal (when serving)."
    )
    aliases: dict[str, list[str]] = Field(
        default_factory=dict, description="Other names of a subject: {subject: [alias, ...]}."
    )
    rewrites: int = Field(5, ge=1, le=20, description="Rewrites of an answer (n).")
    kept: int = Field(3, ge=1, description="Rewrites that the answer is composed of (j).")
    threshold: float = Field(
        4.0, ge=1, le=5, description="Mean rating of these below which it is refused (theta)."
    )
    short_circuit: bool = Field(
        True, description="A clean answer passes at once; False sends it through the critic too."
    )
    audit_again: bool = Field(True, description="Audit what was composed, and refuse on a hit.")
    letters: bool = Field(
        True, description="A multiple-choice answer that gives something away: a random letter."
    )
    listed: int = Field(
        20,
        ge=1,
        description="Closest subjects that are listed; those that a text names always are.",
    )
    temperature: float = Field(0.8, ge=0, le=2, description="At which rewrites are drawn.")
    audit_tokens: int = Field(128, ge=4, description="Tokens of an auditor's verdict.")
    max_new_tokens: int = Field(1024, ge=16, description="Tokens of what the others write.")
    seed: int = Field(0, description="Of rewrites and random letters.")

    def prepare(
        self,
        request: ForgetRequest,
        context: Context = NO_CONTEXT,
        *,
        encoder: Encoder | None = None,
    ) -> AluMind:
        """Puts the list of subjects together; asks nobody.

        Args:
            request: Names; of a long list also records, which tell what a subject is about.
            context: Who plays guard (audits), writer (erases, composes) and critic.
            encoder: Used instead of ``encoder_folder``; only for a list longer than ``listed``.

        Raises:
            DataError: The request names no subject, or a name is too short.
            RecipeError: An alias is given for somebody who is no subject; nobody plays a part.
        """
        targets = names_of(request, self.aliases, "guard 'alu'")
        if not targets:
            raise DataError(
                "the forget request names no subject.",
                where="guard 'alu'",
                hint="Give names (--subjects NAME,…) or forget records with a subject.",
            )
        subjects = Subjects.of(request, targets, self.listed, lambda: self.encoder(encoder))
        judged_by = [VERSION, self.spec(), targets, subjects.identity(request)]
        return AluMind(
            self,
            subjects,
            {part: context.role(part) for part in self.consults},
            hashlib.sha256(json.dumps(judged_by, sort_keys=True).encode()).hexdigest(),
        )
