"""RAG unlearning: entries of a retrieval store that make the model keep silent about a target.

    entry    P_i + Q       P: a description of the target, or a question; Q: a clause that forbids
    found    max_k 0.5 minmax bm25(q, k) + 0.5 minmax cos(e(q), e(k)), if either reaches its floor
    asked    system: go by the item;  user: the original input + the item found

Paper: When Machine Unlearning Meets Retrieval-Augmented Generation (arXiv 2410.15267); no public
code. Differences, on purpose: the floors are fitted, since min-max fusion finds something for every
query, and a conversation for which nothing is found goes through as it came, so deleting an entry
restores everything byte for byte; every text and sentence of a conversation is a query, and one
that names a target finds its entry; Q is tried out together with P, as it will be used. The answer
is looked through too, since a clause is obeyed or not: names of the target, and the words in which
its answers lie. The entries lie in the store in clear, and `show="clause"` keeps P out of prompts.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from pydantic import Field

from delible.context import NO_CONTEXT, Context
from delible.errors import DataError, RecipeError, nearest
from delible.lm.encoder import Encoder
from delible.names import Names
from delible.prompts import read_lines
from delible.records import ForgetRequest
from delible.registry import register
from delible.system.asks import Prompt
from delible.systems.crafting import Crafted, Target, crafted, described, template, with_item
from delible.systems.encoding import EncodingGuard
from delible.systems.forbidden import Forbidden, common_words, forbidden_words
from delible.systems.guarded import GuardMind
from delible.systems.judged_text import texts_of
from delible.systems.judging import Forward, Judged
from delible.systems.likeness import alarms, harmless, least_above, pieces_of
from delible.systems.record_texts import kept_by, questions_of
from delible.systems.retrieval import Entry, Found, Store

#: Part of the fingerprint: goes up whenever the same options judge differently.
VERSION = 1
#: Questions with which a clause is tried out.
TRIED = 3
#: Words of a passage, or a question, that stand for a target without a name.
SHOWN_WORDS = 20


class RagUnlearningMind(GuardMind):
    """The store, ready; made by :class:`RagUnlearning`."""

    reads = "sentences"

    def __init__(
        self,
        options: RagUnlearning,
        store: Store,
        targets: Mapping[str, Target],
        names: Mapping[str, Sequence[str]],
        floors: tuple[float, float],
        judged_by: Mapping[str, Any],
        notes: Mapping[str, Any],
    ) -> None:
        self.options, self.targets, self.floors = options, targets, floors
        self._owners: dict[str, list[str]] = {}
        for target, given in names.items():
            for name in given:
                self._owners.setdefault(name, []).append(target)
        self._names = Names(self._owners)
        self.refusals, self.notes, self._judged_by = options.refusals, notes, judged_by
        self._injections = re.compile("|".join(read_lines("rag_injections.txt")), re.IGNORECASE)
        self._use(store)

    def _use(self, store: Store) -> None:
        self.store = store
        self._by_target: dict[str, list[Entry]] = {}
        for one in store.entries:
            self._by_target.setdefault(one.target, []).append(one)
        self._found = lru_cache(256)(self._retrieved)
        every = self._by_target if self.options.gate == "always" else ()
        self._all = Forbidden(word for one in every for word in self.targets[one].forbidden.words)

    @property
    def fingerprint(self) -> str:
        entries = [[one.key, one.text, one.target, one.request] for one in self.store.entries]
        content = json.dumps([self._judged_by, entries], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def delete(self, *, target: str | None = None, request: str | None = None) -> int:
        """Takes the entries of a target, or of a request, out of the store; returns how many.

        Raises:
            RecipeError: Neither is given, or there are no such entries.
        """
        known = {one.target if target is not None else one.request for one in self.store.entries}
        wanted = request if target is None else target
        if wanted is None or wanted not in known:
            raise RecipeError(
                "the store holds no such entries.",
                where="guard 'rag_unlearning'",
                hint="Give a target or a request of which there are some.",
            )
        before = len(self.store)
        self._use(self.store.without(target=target, request=request))
        return before - len(self.store)

    def retrieved(self, prompt: Prompt) -> list[Entry]:
        """The entries that a conversation finds, the best of each target, the best target first."""
        return self._found(prompt)

    def _retrieved(self, prompt: Prompt) -> list[Entry]:
        queries = pieces_of(prompt)
        found = self.store.find(queries, self.options.top)
        counting = [one for of_query in found for one in of_query if self._counts(one)]
        counting.sort(key=lambda one: -one.cosine)
        chosen = {one.entry.target: one.entry for one in reversed(counting)}
        order = [one.entry.target for one in counting]
        text = "\n".join(texts_of(prompt))
        for match in self._names.find(text):  # who is named is found, whatever the floor
            for target in self._owners[match.name]:
                if target in self._by_target and target not in chosen:
                    chosen[target] = self._by_target[target][0]
                    order.append(target)
        return [chosen[target] for target in dict.fromkeys(order)]

    def _counts(self, found: Found) -> bool:
        return found.lexical >= self.floors[0] or found.cosine >= self.floors[1]

    def before(self, prompt: Prompt) -> Judged:
        entries = self.retrieved(prompt)
        if not entries:
            return None
        if self.options.refuse_injections and self._injections.search("\n".join(texts_of(prompt))):
            return self.refuse(prompt)
        item = "\n".join(one.text for one in entries[: self.options.top])
        return Forward(with_item(prompt, item, in_system=self.options.in_system))

    def after(self, prompt: Prompt, answer: str, since: int = 0) -> Judged:
        if self.options.gate == "never":
            return None
        concerned = [self._all]
        if self.options.gate == "retrieved":
            concerned = [self.targets[one.target].forbidden for one in self.retrieved(prompt)]
        lead = prompt.prefill or prompt.text or ""
        held = any(one.holds(lead + answer, len(lead)) for one in concerned)
        return self.refuse(prompt) if held else None


@register(
    kind="guard",
    name="rag_unlearning",
    title="RAG unlearning",
    summary="Retrieves a clause that forbids a target, shows it to the model, checks the answer.",
    paper="2410.15267",
    year=2024,
    family="Guard",
    intention="suppression",
    mechanism="input",
    needs=("names", "encoder"),
    changes="Nothing in the model; a question about a target gets a clause that forbids to answer.",
    reversible=True,
    retrain_goal=False,
    weakest="A question that finds no entry; an order to ignore the clause, without the gate.",
    capability="generate",
    badges=("variant",),
    variant="Floors are fitted and a conversation that finds nothing stays as it is; the answer is "
    "looked through; every sentence is a query.",
)
class RagUnlearning(EncodingGuard):
    """Options of the store."""

    consults = ("writer",)

    aliases: dict[str, list[str]] = Field(
        default_factory=dict, description="Other names of a subject: {subject: [alias, ...]}."
    )
    clauses: Literal["written", "built_in"] = Field(
        "written",
        description="Clauses are written by the role 'writer' and tried out; or one text.",
    )
    descriptions: Literal["model", "keywords"] = Field(
        "model", description="Targets are found by what the guarded model says of them, or by name."
    )
    show: Literal["item", "clause"] = Field(
        "item", description="What a model sees of an entry: all of it, or the clause alone."
    )
    in_system: bool = Field(
        False, description="The entry stands in the system turn; False: beside the question."
    )
    aspects: int = Field(5, ge=1, le=50, description="Parts of a target's description.")
    clause_words: int = Field(80, ge=8, description="Words of a clause, or of a part, at most.")
    tries: int = Field(3, ge=1, le=20, description="Times that a clause is written at most.")
    top: int = Field(1, ge=1, description="Entries that a question finds at most.")
    weights: tuple[float, float] = Field(
        (0.5, 0.5), description="Weights of words and of meaning when entries are ranked."
    )
    lexical_floor: float | None = Field(
        None, ge=0, description="BM25 from which an entry is found; None fits it."
    )
    cosine_floor: float | None = Field(
        None, ge=-1, le=1, description="Cosine from which an entry is found; None fits it."
    )
    false_alarm_rate: float = Field(
        0.01, ge=0, lt=0.5, description="Share of harmless questions that may find something."
    )
    harmless: str | None = Field(
        None, description="Records whose questions should pass too, for fitting (a file)."
    )
    gate: Literal["retrieved", "always", "never"] = Field(
        "retrieved", description="Which answers are looked through: those that found an entry, all."
    )
    refuse_injections: bool = Field(
        True, description="Refuse a question about a target that tries to override instructions."
    )

    def prepare(
        self,
        request: ForgetRequest,
        context: Context = NO_CONTEXT,
        *,
        encoder: Encoder | None = None,
    ) -> RagUnlearningMind:
        """Writes the entries, tries the clauses out, and fits the floors.

        Args:
            request: Names, or forget records, or both.
            context: The model that is guarded, and who writes.
            encoder: Used instead of ``encoder_folder``.

        Raises:
            DataError: There is nothing to forget.
            RecipeError: Nobody describes or writes, or an alias is nobody's.
        """
        names = self._names(request)
        targets = self._targets(request, names)
        if not targets:
            raise DataError(
                "the forget request names nothing and holds no record.",
                where="guard 'rag_unlearning'",
                hint="Give names (--subjects NAME,…) or forget records (--forget FILE).",
            )
        encoder = self.encoder(encoder)
        parts = self._parts(targets, names, context)
        clauses = self._clauses(targets, parts, context)
        entries = [
            Entry(
                part,
                self._item(part, clauses[name].clause),
                name,
                request.id,
            )
            for name in targets
            for part in parts[name]
        ]
        store = Store(encoder, entries, self.weights)
        floors, false_alarms = self._floors(store, request)
        judged_by = {
            "version": VERSION,
            "options": self.spec(),
            "request": request.id,
            "encoder": encoder.identity,
            "floors": floors,
            "refusals": self.refusals,
        }
        notes = {
            "entries": len(entries),
            "lexical_floor": floors[0],
            "cosine_floor": floors[1],
            "false_alarms": false_alarms,
            "tries": sum(one.tries for one in clauses.values()),
            "clauses_not_obeyed": sum(one.tries > 0 and not one.obeyed for one in clauses.values()),
        }
        return RagUnlearningMind(self, store, targets, names, floors, judged_by, notes)

    def _names(self, request: ForgetRequest) -> dict[str, list[str]]:
        named = (record.subject for record in request.forget if record.subject)
        found = {name: [name] for name in (*request.subjects, *named)}
        for subject, aliases in self.aliases.items():
            if subject not in found:
                raise RecipeError(
                    "aliases are given for somebody who is not a target.",
                    where="guard 'rag_unlearning'",
                    hint=nearest(subject, found) if found else "The request names nobody.",
                )
            found[subject] += aliases
        return found

    def _targets(
        self, request: ForgetRequest, names: Mapping[str, Sequence[str]]
    ) -> dict[str, Target]:
        """Whoever is named, and each record about nobody in particular."""
        common = common_words([*request.forget, *kept_by(request)])
        asked: dict[str, list[str]] = {name: [] for name in names}
        words: dict[str, list[str]] = {name: list(given) for name, given in names.items()}
        for record in request.forget:
            questions = questions_of(record)
            if not questions:
                continue
            name = record.subject or " ".join(questions[0].split()[:SHOWN_WORDS])
            asked.setdefault(name, []).extend(questions)
            words.setdefault(name, []).extend(forbidden_words(record, common))
        return {
            name: Target(name, tuple(dict.fromkeys(asked[name])), Forbidden(words[name]))
            for name in asked
        }

    def _parts(
        self,
        targets: Mapping[str, Target],
        names: Mapping[str, Sequence[str]],
        context: Context,
    ) -> dict[str, list[str]]:
        """What each target's entries are found by: descriptions or names, and its questions."""
        found = {name: [", ".join(names[name])] if name in names else [] for name in targets}
        if self.descriptions == "model":
            model = self._model(context)
            concepts = [targets[name] for name in names]
            said = described(model, concepts, self.aspects, self.clause_words)
            for target, parts in zip(concepts, said, strict=True):
                found[target.name] = [f"{target.name}: {part}" for part in parts] or found[
                    target.name
                ]
        return {
            name: list(dict.fromkeys([*parts, *targets[name].questions]))
            for name, parts in found.items()
        }

    def _clauses(
        self, targets: Mapping[str, Target], parts: Mapping[str, Sequence[str]], context: Context
    ) -> dict[str, Crafted]:
        if self.clauses == "built_in":
            line = template("rag_clause.txt")
            return {name: Crafted(line.format(target=name), 0, False) for name in targets}
        lines = read_lines("rag_questions.txt")
        tried = [
            replace(
                one, questions=one.questions[:TRIED] or tuple(q.format(target=name) for q in lines)
            )
            for name, one in targets.items()
        ]
        found = crafted(
            tried,
            [parts[name][0] for name in targets],
            context.role("writer"),
            self._model(context),
            lambda prompt, part, clause: with_item(
                prompt, self._item(part, clause), in_system=self.in_system
            ),
            words=self.clause_words,
            tries=self.tries,
        )
        return dict(zip(targets, found, strict=True))

    def _item(self, part: str, clause: str) -> str:
        return clause if self.show == "clause" else f"{part}\n{clause}"

    def _model(self, context: Context) -> Any:
        if context.itself is None:
            raise RecipeError(
                "no model is given that describes the targets and tries the clauses out.",
                where="guard 'rag_unlearning'",
                hint="Put it before a model, or set clauses=built_in and descriptions=keywords.",
            )
        return context.itself

    def _floors(
        self, store: Store, request: ForgetRequest
    ) -> tuple[tuple[float, float], dict[str, Any]]:
        """From which on an entry is found; half of the false alarms are each one's."""
        scores: dict[str, dict[str, np.ndarray]] = {"lexical": {}, "cosine": {}}
        for group, texts in harmless(request, self.harmless).items():
            best = [one[0] for one in store.find(texts)]
            scores["lexical"][group] = np.array([one.lexical for one in best])
            scores["cosine"][group] = np.array([one.cosine for one in best])
        rate, found = self.false_alarm_rate / 2, list[float]()
        for kind, given in (("lexical", self.lexical_floor), ("cosine", self.cosine_floor)):
            fitted = max(least_above(values, rate) for values in scores[kind].values())
            found.append(fitted if given is None else given)
        told = {
            kind: alarms(scores[kind], floor, rate)
            for kind, floor in zip(scores, found, strict=True)
        }
        return (found[0], found[1]), told
