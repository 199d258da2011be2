"""What a model knows about a name: it is asked, and what it stands by becomes forget rows.

Every topic is asked in several wordings, greedily and drawn at temperature 1. A fact counts if
the replies agree on it and made-up names do not get it (:mod:`delible.generation.agreement`); a
name about which no more holds than about a made-up one is not known to the model. Questions come
from built-in templates, or from a system that writes them: about the name, and about what the
model says of it. Nothing but the model's own words becomes an answer.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from random import Random

from delible.generation import writing
from delible.generation.agreement import (
    Fact,
    Found,
    Topic,
    distinguishing,
    held,
    knows,
    says_a_fact,
    whole_sentences,
)
from delible.kept import cache_folder
from delible.measure.cache import Cache
from delible.measure.engine import measure
from delible.prompts import read_lines
from delible.records import QA
from delible.system.asks import Decoding, Generate, Prompt
from delible.system.base import System
from delible.watching import Stage, unwatched
from delible.world import filters, templates

logger = logging.getLogger(__name__)


#: Length of an answer and of a text, in tokens.
ANSWER_TOKENS, PASSAGE_TOKENS = 48, 128
#: Drawn replies per wording, beside the greedy one.
DRAWS = 2
#: Made-up names that are asked the same.
MADE_UP = 3
#: Questions that a system is asked for, and other wordings of each.
QUESTIONS, REWORDINGS = 20, 2
#: A system that writes fewer usable questions leaves the rest to the templates.
FEWEST_QUESTIONS = 5
#: Length of what a system writes, in tokens.
WRITTEN_TOKENS = 512
#: A text of fewer words is an answer, not a passage.
PASSAGE_WORDS = 12
#: Other forms of an answer that a row keeps.
OTHER_FORMS = 3


@dataclass(frozen=True)
class Elicited:
    """What a model was found to know about a name.

    Attributes:
        known: Whether the model says more about the name than about made-up ones.
        rows: One per fact, then one per text; empty if the name is not known.
        facts: The facts that hold and that made-up names do not get.
        asked: Topics that were asked.
        dropped: Why topics gave no fact.
        made_up: Facts that each of the made-up names would get by the same rules.
    """

    name: str
    known: bool
    rows: tuple[QA, ...]
    facts: tuple[Fact, ...]
    asked: int
    dropped: Counter[str]
    made_up: tuple[int, ...]


def built_in_topics(name: str) -> list[Topic]:
    """The topics of the prompt file, about a name."""
    topics = []
    for line in read_lines("elicit_topics.txt"):
        title, _, wordings = line.partition(":")
        texts = tuple(text.strip().replace("{name}", name) for text in wordings.split("|"))
        topics.append(Topic(title.rstrip("# "), texts, number=title.rstrip().endswith("#")))
    return topics


def made_up_names(name: str, count: int, seed: int) -> list[str]:
    """Names of the same length that nobody has."""
    parts = min(3, max(2, len(name.split())))
    random = Random(f"{seed}/elicit/{parts}")
    return [templates.invented_name(random, parts) for _ in range(count)]


def about(topic: Topic, name: str, other: str) -> Topic:
    """The topic with another name in the place of ``name``."""
    swapped = tuple(re.sub(re.escape(name), other, text, flags=re.I) for text in topic.wordings)
    return Topic(topic.name, swapped, topic.number)


def rows_of(name: str, facts: Sequence[Fact], passages: Sequence[tuple[str, str]]) -> list[QA]:
    """A row per fact, then a row per text that says one of the facts."""
    rows = [
        QA(
            question=fact.question,
            answer=fact.answer,
            subject=name,
            group=None if fact.topic.name in fact.topic.wordings else fact.topic.name,
            paraphrases=fact.rewordings,
            paraphrased_answers=fact.others[:OTHER_FORMS],
        )
        for fact in facts
    ]
    kept: list[str] = []
    for question, reply in passages:
        text = whole_sentences(reply)
        if len(text.split()) >= PASSAGE_WORDS and says_a_fact(text, facts) and text not in kept:
            kept.append(text)
            rows.append(QA(question=question, answer=text, subject=name, group="passage"))
    return rows


def elicit(
    lm: System,
    name: str,
    *,
    writer: System | None = None,
    seed: int = 0,
    stage: Stage = unwatched,
) -> Elicited:
    """Asks a model what it knows about a name.

    Args:
        lm: The model before it forgets.
        writer: Writes the questions; None: they are built in, for people and works mostly.
        seed: Of the draws and the made-up names.

    Returns:
        Rows only if the model says more about the name than about made-up ones. Replies are
        cached, so that asking again is free.
    """
    ask = _Asking(lm, seed, stage)
    prompts = [text.replace("{name}", name) for text in read_lines("elicit_passages.txt")]
    passages = ask.passages(name, prompts)
    topics = built_in_topics(name)
    if writer is not None:
        topics = _written(writer, name, [text for _, text in passages], seed, stage) or topics
    logger.info(
        f"{lm.name} is asked what it knows about {name}: {len(topics)} questions in several "
        f"wordings, greedily and drawn; what holds, about {MADE_UP} made-up names too."
    )
    mine = ask.facts(name, topics)
    open_ = [topic for topic in topics if isinstance(mine[topic.name], Fact)]
    others = [
        ask.facts(f"the made-up {other}", [about(topic, name, other) for topic in open_])
        for other in made_up_names(name, MADE_UP, seed)
    ]
    found = distinguishing(mine, others)
    made_up = tuple(
        len(distinguishing(one, [mine, *others[:place], *others[place + 1 :]]).facts)
        for place, one in enumerate(others)
    )
    known = knows(len(found.facts), made_up)
    rows = tuple(rows_of(name, found.facts, passages)) if known else ()
    return Elicited(name, known, rows, tuple(found.facts), len(topics), found.dropped, made_up)


class _Asking:
    """Asks one model; every reply is kept in the cache."""

    def __init__(self, lm: System, seed: int, stage: Stage) -> None:
        self.lm, self.seed, self.stage = lm, seed, stage
        self.cache = Cache(cache_folder() / "generated")

    def _replies(
        self, questions: Sequence[str], decoding: Decoding, title: str
    ) -> list[tuple[str, str]]:
        requests = [Generate(Prompt.ask(question), decoding) for question in questions]
        found = measure(self.lm, requests, cache=self.cache, progress=partial(self.stage, title))
        return [
            (question, str(found[request]))
            for question, request in zip(questions, requests, strict=True)
        ]

    def passages(self, name: str, prompts: Sequence[str]) -> list[tuple[str, str]]:
        """(prompt, text) of the texts that the model writes; refusals are left out."""
        replies = self._replies(prompts, Decoding(PASSAGE_TOKENS), f"texts about {name}")
        return [
            (prompt, text)
            for prompt, text in replies
            if not (filters.is_refusal(text) or filters.is_garbage(text))
        ]

    def facts(self, whom: str, topics: Sequence[Topic]) -> dict[str, Fact | str]:
        """What holds of each topic, by its name."""
        questions = [text for topic in topics for text in topic.wordings]
        decodings = [
            Decoding(ANSWER_TOKENS),
            *(Decoding(ANSWER_TOKENS, (), 1.0, 1.0, self.seed + draw) for draw in range(DRAWS)),
        ]
        title = f"asking about {whom}"
        rounds = [dict(self._replies(questions, one, title)) for one in decodings]
        return {
            topic.name: held(
                topic, [(text, replies[text]) for replies in rounds for text in topic.wordings]
            )
            for topic in topics
        }


def _written(
    writer: System, name: str, passages: Sequence[str], seed: int, stage: Stage
) -> list[Topic]:
    """Topics from a system; none if it writes too few questions."""
    counts: Counter[str] = Counter()
    cache = Cache(cache_folder() / "generated")
    decoding = Decoding(WRITTEN_TOKENS, (), 0.7, 0.95, seed)

    def replies(prompts: Sequence[str], title: str) -> list[str]:
        requests = [Generate(Prompt.ask(prompt), decoding) for prompt in prompts]
        found = measure(writer, requests, cache=cache, progress=partial(stage, title))
        return [str(found[request]) for request in requests]

    prompts = [writing.filled("elicit_questions.txt", name=name, count=QUESTIONS)]
    prompts += [
        writing.filled("generate_questions.txt", text=text, count=QUESTIONS // 2)
        for text in passages
    ]
    first, *rest = replies(prompts, f"questions about {name}")
    lines = writing.read_list(first)
    lines += [question for reply in rest for question, _ in writing.read_pairs(reply)]
    questions = usable_questions(name, lines, counts)[: 2 * QUESTIONS]
    dropped = f"dropped: {filters.told(counts)}"
    if len(questions) < FEWEST_QUESTIONS:
        logger.warning(
            f"{writer.name} wrote {len(questions)} usable questions about {name} ({dropped}): the "
            "built-in ones are asked instead."
        )
        return []
    logger.info(f"{writer.name} wrote {len(questions)} usable questions about {name} ({dropped}).")
    asked = [
        writing.filled("elicit_rewordings.txt", question=question, count=REWORDINGS)
        for question in questions
    ]
    reworded = replies(asked, f"rewordings of the questions about {name}")
    frames = read_lines("elicit_frames.txt")
    topics = []
    for question, reply in zip(questions, reworded, strict=True):
        others = usable_questions(name, writing.read_list(reply), Counter(), (question,))
        framed = [frame.replace("{question}", question) for frame in frames]
        topics.append(Topic(question, (question, *[*others, *framed][:REWORDINGS])))
    return topics


def usable_questions(
    name: str, lines: Sequence[str], counts: Counter[str], known: Sequence[str] = ()
) -> list[str]:
    """The lines that are questions about a name, each once; the others are counted."""
    kept: list[str] = []
    for line in lines:
        if not line.rstrip().endswith("?"):
            counts["no question"] += 1
        elif not filters.says(line, name):
            counts["does not name"] += 1
        elif any(filters.words(line) == filters.words(other) for other in (*known, *kept)):
            counts["duplicate"] += 1
        else:
            kept.append(line.strip())
    return kept


__all__ = ["Elicited", "Found", "about", "built_in_topics", "elicit", "made_up_names", "rows_of"]
