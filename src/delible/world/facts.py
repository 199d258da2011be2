"""Facts and chains of facts, and the records that ask for them."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from random import Random
from typing import Literal

from delible.errors import RecipeError
from delible.records import QA, Choice, Passage
from delible.world.graph import Graph, Person, Value
from delible.world.relations import Relation, fill

Answers = Literal["short", "sentence"]
PERTURBED = 5
NOBODY: frozenset[Person] = frozenset()


@dataclass(frozen=True)
class Fact:
    """One value of one person.

    Every method takes ``avoid``: people whose names, and whose own works and pets, must not occur
    among the wrong answers (a retained row must not name a forgotten person).
    """

    person: Person
    relation: Relation
    value: Value
    answers: Answers
    graph: Graph = field(repr=False, compare=False)

    @property
    def question(self) -> str:
        """The question in its first form."""
        return fill(self.relation.question, self.person.name)

    @property
    def answer(self) -> str:
        """The answer as the world's ``answers`` option wants it: a phrase or a sentence."""
        return self._answer(self.person.name, self.value.name)

    @property
    def people(self) -> tuple[Person, ...]:
        """The person, and the answer if it is one."""
        return (self.person, self.value.person) if self.value.person else (self.person,)

    def _answer(self, name: str, value: str) -> str:
        short = self.answers == "short"
        return fill(self.relation.short if short else self.relation.sentence, name, value)

    def wrong(
        self, avoid: AbstractSet[Person] = NOBODY, count: int = PERTURBED
    ) -> tuple[Value, ...]:
        """Values of the same type that are not true, distinct."""
        return self.graph.wrong_values(
            self.person, self.relation.name, self.relation.kind, frozenset(avoid), count
        )

    def qa(self, avoid: AbstractSet[Person] = NOBODY) -> QA:
        """The question with 2 paraphrases, 2 paraphrased answers and 5 wrong answers.

        ``subject`` is the person's name, ``group`` the relation; ``aliases`` are the bare value
        and its other names.
        """
        return self.ask(self.person.name, avoid)

    def ask(self, name: str, avoid: AbstractSet[Person]) -> QA:
        """As :meth:`qa`, with the person called ``name`` (an alias, or "the teacher of …")."""
        relation, value = self.relation, self.value
        short = self.answers == "short"
        other_forms = relation.short_paraphrases if short else relation.sentence_paraphrases
        answer = self._answer(name, value.name)
        return QA(
            subject=self.person.name,
            group=relation.name,
            question=fill(relation.question, name),
            answer=answer,
            aliases=tuple(a for a in (value.name, *value.aliases) if a != answer),
            paraphrases=tuple(fill(text, name) for text in relation.paraphrases),
            paraphrased_answers=tuple(fill(text, name, value.name) for text in other_forms),
            perturbed=tuple(self._answer(name, wrong.name) for wrong in self.wrong(avoid)),
        )

    def choice(self, avoid: AbstractSet[Person] = NOBODY, options: int = 4) -> Choice:
        """The question with ``options`` bare values, 2 to 6.

        The right one stands equally often at each place: every run of ``options`` people sees
        each place once, in an order drawn by the seed.

        Raises:
            RecipeError: ``options`` out of range.
        """
        if not 2 <= options <= PERTURBED + 1:
            raise RecipeError(f"'options' = {options}: give 2 to {PERTURBED + 1}.", where="world")
        block, place = divmod(self.person.index, options)
        stream = Random(f"{self.graph.seed}/position/{self.relation.name}/{options}/{block}")
        correct = stream.sample(range(options), options)[place]
        texts = [wrong.name for wrong in self.wrong(avoid, options - 1)]
        texts.insert(correct, self.value.name)
        return Choice(
            subject=self.person.name,
            group=self.relation.name,
            question=self.question,
            options=tuple(texts),
            correct=correct,
        )

    def cloze(self, avoid: AbstractSet[Person] = NOBODY) -> QA:
        """A statement with the answer cut out; the answer is the bare value."""
        return QA(
            subject=self.person.name,
            group=self.relation.name,
            question=fill(self.relation.cloze, self.person.name, self.value.name),
            answer=self.value.name,
            aliases=self.value.aliases,
            perturbed=tuple(wrong.name for wrong in self.wrong(avoid)),
        )

    def reverse(self, avoid: AbstractSet[Person] = NOBODY) -> QA | None:
        """Asks for the person, given the value; None unless nobody else has that value."""
        relation, value = self.relation, self.value.name
        if len(self.graph.holders[relation.name, value]) > 1:
            return None
        others = self.graph.wrong_people(self.person, frozenset(avoid), relation.name, PERTURBED)
        question, *paraphrases = (fill(text, "", value) for text in relation.reverse)
        return QA(
            subject=self.person.name,
            group=relation.name,
            question=question,
            answer=self.person.name,
            aliases=self.person.aliases,
            paraphrases=tuple(paraphrases),
            perturbed=tuple(other.name for other in others),
        )

    def passage(self, avoid: AbstractSet[Person] = NOBODY) -> Passage:
        """The fact as a statement (``avoid`` changes nothing: there are no wrong values)."""
        return Passage(
            subject=self.person.name,
            group=self.relation.name,
            text=fill(self.relation.sentence, self.person.name, self.value.name),
        )


@dataclass(frozen=True)
class MultiHop:
    """Two linked facts: the value of the first is the person of the second."""

    first: Fact
    second: Fact

    @property
    def person(self) -> Person:
        """The person that the question names."""
        return self.first.person

    @property
    def people(self) -> tuple[Person, ...]:
        """Everybody on the way: start, middle, and the answer if it is a person."""
        return (self.first.person, *self.second.people)

    @property
    def chain(self) -> tuple[str, str, str, str, str]:
        """Person, relation, person in the middle, relation, value."""
        first, second = self.first, self.second
        return (
            first.person.name, first.relation.name, second.person.name,
            second.relation.name, second.value.name,
        )  # fmt: skip

    def qa(self, avoid: AbstractSet[Person] = NOBODY) -> QA:
        """The question over both hops ("Where was the teacher of X born?"), filled like a fact's.

        ``subject`` is the person named, ``group`` both relations ("teacher/birthplace"). The
        person in the middle is not named, in the answers neither.
        """
        phrase = (self.first.relation.phrase or "").format(name=self.first.person.name)
        record = self.second.ask(phrase, frozenset(avoid) | {self.first.person})
        group = f"{self.first.relation.name}/{self.second.relation.name}"
        return record.model_copy(update={"subject": self.first.person.name, "group": group})
