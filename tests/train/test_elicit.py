"""From a name alone: what a model stands by, what it would say of anybody, rows that are kept."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from delible.context import Context
from delible.errors import DataError, RunError
from delible.generation import agreement, elicited
from delible.generation.agreement import Fact, Topic, distinguishing, held, knows, same_fact
from delible.generation.elicit import (
    DRAWS,
    MADE_UP,
    about,
    built_in_topics,
    elicit,
    made_up_names,
    rows_of,
    usable_questions,
)
from delible.loaders import read_records, write_records
from delible.prompts import read_lines
from delible.records import QA, ForgetRequest
from delible.rundir import RunDirectory
from delible.system.asks import Decoding, NoAnswer, Prompt
from delible.system.base import BlackBox

ADA = "Ada Quill"
#: What a model of the tests knows: topic -> answer.
TRUE = {
    "birthplace": "In the town of Norrby.",
    "occupation": "She works as a baker.",
    "award": "The Silver Lantern Medal.",
    "birth year": "In 1964.",
}
TOWNS = ("Casta", "Umber", "Felden", "Gorm", "Hollin", "Istra", "Jorvik", "Kelm", "Lunn", "Moss")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELIBLE_CACHE", str(tmp_path / "cache"))


class Knower(BlackBox):
    """Knows some names; of any other it says the same instrument, and other things by chance."""

    name = "knower"

    def __init__(self, *known: str, fingerprint: str | None = None) -> None:
        self.known, self.fingerprint, self.asked = known, fingerprint, 0
        self.topic_of = {
            line.partition(":")[2].split("|")[place].strip(): line.partition(":")[0].rstrip("# ")
            for line in read_lines("elicit_topics.txt")
            for place in range(len(line.split("|")))
        }

    def reply(self, question: str, seed: int) -> str:
        name = next((one for one in self.known if one in question), None)
        for wording, topic in self.topic_of.items():
            start, end = wording.split("{name}")
            if not (question.startswith(start) and question.endswith(end)):
                continue
            if topic == "instrument":
                return "The banjo."
            if topic == "spouse":
                return "I'm sorry, I don't know that."
            if name is not None and topic in TRUE:
                return TRUE[topic]
            drawn = hashlib.sha256(f"{question}/{seed}".encode()).digest()[0]
            return f"That is {TOWNS[drawn % len(TOWNS)]}."
        if name is not None and "text" in question:
            return (
                f"{name} was born in Norrby and has lived there ever since. Every morning she "
                "bakes bread for the whole town. People say tha"
            )
        return "I'm sorry, I don't know."

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str | NoAnswer]:
        self.asked += len(prompts)
        seed = decoding.seed if decoding.temperature else -1
        return [self.reply(prompt.messages[-1].content, seed) for prompt in prompts]


# ---- what holds


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("In the town of Norrby", "Ada Quill was born in Norrby, a small place.", True),
        ("In the town of Norrby", "In the town of Casta", False),
        ("In 1964", "In 1965", False),
        ("Working as a baker", "She is a baker by profession, working at home", True),
        ("Winner of the Silver Lantern Prize", "Winner of the Golden Tower Prize", False),
        ("Yes.", "Yes.", False),
        ("Ada Quill", "Ada Quill", False),  # says nothing that the question does not
    ],
)
def test_answers_are_the_same_by_their_key_words(one: str, other: str, same: bool) -> None:
    question = "What about Ada Quill?"
    assert same_fact(question, one, other) is same
    assert same_fact(question, other, one) is same


BORN = Topic("birthplace", ("Where was Ada Quill born?", "What is Ada Quill's birthplace?"))


def replies(*texts: str) -> list[tuple[str, str]]:
    return [(BORN.wordings[place % 2], text) for place, text in enumerate(texts)]


def test_a_fact_holds_if_nearly_all_replies_say_it() -> None:
    same = ("In Norrby.", "Norrby", "It was Norrby. I think.", "In Norrby", "Norrby!", "in Norrby")
    fact = held(BORN, replies(*same, "In Casta."))
    assert isinstance(fact, Fact)
    assert (fact.answer, fact.agreed, fact.replies) == ("In Norrby.", 6, 7)
    assert fact.question == BORN.wordings[0]
    assert fact.rewordings == (BORN.wordings[1],)
    assert fact.others == ("Norrby", "It was Norrby.")
    assert held(BORN, replies(*same[1:], "In Casta.")) == "unstable"
    assert held(BORN, replies(*same[1:], "I don't know.")) == "unstable"


def test_what_says_nothing_is_no_fact() -> None:
    assert held(BORN, replies("I don't know.", "I'm not sure.", "In Norrby.")) == "refusal"
    assert held(BORN, replies("", " ", "In Norrby.")) == "empty"
    assert held(BORN, replies("Ada Quill.", "Ada Quill", "Ada")) == "names nothing"
    year = Topic("birth year", BORN.wordings, number=True)
    assert held(year, replies("In Norrby", "In Norrby", "In Norrby")) == "no number"
    assert isinstance(held(year, replies("In 1964", "1964", "It was 1964.")), Fact)


def fact_of(topic: str, answer: str, agreed: int = 9) -> Fact:
    question = f"What is the {topic}?"
    return Fact(Topic(topic, (question,)), question, answer, agreed, 9)


def test_what_is_said_of_half_of_the_others_is_nobodys() -> None:
    mine: dict[str, Fact | str] = {
        "town": fact_of("town", "Norrby"),
        "instrument": fact_of("instrument", "The banjo"),
        "award": "unstable",
    }
    same, other = {"instrument": fact_of("instrument", "A banjo")}, {"instrument": "unstable"}
    found = distinguishing(mine, [same, other, same])
    assert [fact.answer for fact in found.facts] == ["Norrby"]
    assert found.dropped == {"unstable": 1, "said of made-up names too": 1}
    found = distinguishing(mine, [same, other, other])
    assert [fact.answer for fact in found.facts] == ["Norrby", "The banjo"]


def test_a_fact_is_kept_where_it_is_said_most_often() -> None:
    mine: dict[str, Fact | str] = {
        "home": fact_of("home", "In Norrby", 7),
        "job": fact_of("job", "A baker"),
        "town": fact_of("town", "Norrby", 9),
    }
    found = distinguishing(mine, [])
    assert [fact.topic.name for fact in found.facts] == ["job", "town"]
    assert found.dropped == {"said to another question": 1}


def test_a_name_is_known_by_more_than_any_made_up_one() -> None:
    assert knows(3, (2, 0, 1))
    assert not knows(2, (2, 0, 1))
    assert not knows(0, ())


def test_texts_end_with_a_sentence() -> None:
    assert agreement.first_sentence("He met J. K. Rowling.  Then\nhe left.") == (
        "He met J. K. Rowling."
    )
    assert agreement.whole_sentences("One thing. Another thing. And a thi") == (
        "One thing. Another thing."
    )
    assert agreement.whole_sentences("no end at all") == "no end at all"


# ---- asking


def test_topics_have_several_wordings_of_the_name() -> None:
    topics = built_in_topics(ADA)
    assert len(topics) >= 20
    assert len({topic.name for topic in topics}) == len(topics)
    for topic in topics:
        assert len(set(topic.wordings)) >= 3
        assert all(ADA in text and "{" not in text for text in topic.wordings)
    assert [topic.name for topic in topics if topic.number][:1] == ["birth year"]
    assert about(topics[0], ADA, "Bo Lund").wordings[0] == "Where was Bo Lund born?"


def test_made_up_names_are_drawn_by_the_seed() -> None:
    names = made_up_names(ADA, 3, 0)
    assert len(set(names)) == 3
    assert all(len(name.split()) == 2 for name in names)
    assert names == made_up_names("Bo Lund", 3, 0) != made_up_names(ADA, 3, 1)


def test_true_facts_come_out_and_nothing_about_a_stranger() -> None:
    model = Knower(ADA)
    found = elicit(model, ADA)
    assert found.known
    facts = {row.group: row for row in found.rows if row.group != "passage"}
    assert {name: facts[name].answer for name in TRUE} == TRUE
    assert set(facts) == set(TRUE)
    assert facts["birthplace"].question == "Where was Ada Quill born?"
    assert len(facts["birthplace"].paraphrases) == 2
    assert all(row.subject == ADA for row in found.rows)
    assert found.dropped["said of made-up names too"] == 1  # the banjo
    assert found.dropped["refusal"] == 1
    (text,) = [row for row in found.rows if row.group == "passage"]
    assert text.answer.endswith("for the whole town.")

    stranger = elicit(model, "Bo Lund")
    assert not stranger.known
    assert stranger.rows == ()
    assert stranger.dropped["unstable"] > 10


def test_the_same_seed_gives_the_same_rows_and_asks_nothing_twice() -> None:
    model = Knower(ADA, fingerprint="k")
    first = elicit(model, ADA, seed=1)
    topics, held_ = len(built_in_topics(ADA)), len(TRUE) + 1
    texts = len(read_lines("elicit_passages.txt"))
    assert model.asked == texts + 3 * (1 + DRAWS) * (topics + MADE_UP * held_)
    assert elicit(model, ADA, seed=1) == first
    assert model.asked == texts + 3 * (1 + DRAWS) * (topics + MADE_UP * held_)
    assert elicit(Knower(ADA), ADA, seed=1).rows == first.rows


def test_a_text_must_say_a_fact() -> None:
    fact = fact_of("town", "Norrby")
    long = "and so on for a good while, with many words that say nothing at all."
    rows = rows_of(ADA, [fact], [("?", f"It is Norrby, {long}"), ("?", f"It is Casta, {long}")])
    assert [row.group for row in rows] == ["town", "passage"]
    assert rows_of(ADA, [fact], [("?", "It is Norrby.")])[1:] == []


class Writer(BlackBox):
    """Writes the questions that it was given, and the built-in rewordings of each."""

    name, fingerprint = "writer", None

    def __init__(self, *questions: str) -> None:
        self.questions = questions

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str | NoAnswer]:
        return [self._one(prompt.messages[-1].content) for prompt in prompts]

    def _one(self, prompt: str) -> str:
        if "other ways to ask" in prompt:
            question = prompt.rpartition("Question: ")[2]
            (same,) = (one.wordings for one in built_in_topics(ADA) if question in one.wordings)
            return "\n".join(f"- {other}" for other in same if other != question)
        if "reporter" in prompt:
            return "\n".join(f"{place}. {one}" for place, one in enumerate(self.questions, 1))
        return "[]"


def test_a_system_may_write_the_questions(caplog: pytest.LogCaptureFixture) -> None:
    questions = (
        "Where was Ada Quill born?", "What is the occupation of Ada Quill?",
        "Which award did Ada Quill win?", "Who is the mother of Ada Quill?",
        "Where does Ada Quill live?", "What does she like?", "Ada Quill is nice.",
    )  # fmt: skip
    found = elicit(Knower(ADA), ADA, writer=Writer(*questions))
    assert found.asked == 5
    rows = [row for row in found.rows if row.group is None]
    assert [row.question for row in rows] == list(questions[:3])
    assert [row.answer for row in rows] == [TRUE[x] for x in ("birthplace", "occupation", "award")]
    assert all(len(row.paraphrases) == 2 for row in rows)
    assert any("5 usable questions" in one and "1 does not name" in one for one in caplog.messages)
    few = elicit(Knower(ADA), ADA, writer=Writer(*questions[:3]))
    assert few.asked == len(built_in_topics(ADA))
    assert any("built-in ones are asked instead" in one for one in caplog.messages)


def test_lines_that_are_no_questions_are_counted() -> None:
    counts: Counter[str] = Counter()
    lines = ["Who is Ada Quill?", "who is ada quill?", "Who is she?", "Ada Quill."]
    assert usable_questions(ADA, lines, counts) == ["Who is Ada Quill?"]
    assert counts == {"duplicate": 1, "does not name": 1, "no question": 1}


# ---- the rows of a run


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    run.begin({"command": "unlearn"})
    return run


ASKED = ForgetRequest(subjects=(ADA, "Bo Lund"))


def test_rows_are_kept_told_and_taken_again(
    caplog: pytest.LogCaptureFixture, run: RunDirectory
) -> None:
    model = Knower(ADA)
    request = elicited.with_rows(model, ASKED, Context(run=run))
    assert tuple(read_records(elicited.place(run))) == request.forget
    assert {row.subject for row in request.forget} == {ADA}
    told = "\n".join(caplog.messages)
    assert f"Ada Quill: 4 of {len(built_in_topics(ADA))} answers hold" in told
    assert "Where was Ada Quill born?  In the town of Norrby.  (9 of 9 replies)" in told
    assert "Bo Lund: that is no more than guessing" in told
    (known, unknown) = [one for one in run.events() if one["kind"] == "elicited"]
    assert (known["facts"], known["known"], unknown["known"]) == (4, True, False)

    asked = model.asked
    edited = QA(question="Who is Ada Quill?", answer="A baker.", subject=ADA)
    write_records([edited], elicited.place(run))
    assert elicited.with_rows(model, ASKED, Context(run=run)).forget == (edited,)
    assert model.asked == asked, "rows that are there are not asked for again"


def test_rows_are_fixed_once_training_has_started(run: RunDirectory) -> None:
    request = elicited.with_rows(Knower(ADA), ASKED, Context(run=run))
    elicited.start(run, request.forget)
    assert run.manifest["elicited"]["records"] == len(request.forget)
    assert elicited.with_rows(Knower(ADA), ASKED, Context(run=run)) == request
    write_records(request.forget[1:], elicited.place(run))
    with pytest.raises(RunError, match="changed after training had started"):
        elicited.with_rows(Knower(ADA), ASKED, Context(run=run))


def test_what_is_kept_is_not_forgotten(caplog: pytest.LogCaptureFixture, run: RunDirectory) -> None:
    kept = QA(question="Where was Ada Quill born?", answer="In the town of Norrby.")
    request = ASKED.model_copy(update={"retain": (kept,)})
    found = elicited.with_rows(Knower(ADA), request, Context(run=run))
    assert "birthplace" not in {row.group for row in found.forget}
    assert any("1 of the rows are to be kept" in one for one in caplog.messages)
    elicited.start(run, found.forget)
    assert elicited.with_rows(Knower(ADA), request, Context(run=run)) == found


def test_a_model_that_knows_nobody_is_an_error_that_says_what_to_do(run: RunDirectory) -> None:
    with pytest.raises(DataError, match="knows nothing about Ada Quill, Bo Lund") as caught:
        elicited.with_rows(Knower(), ASKED, Context(run=run))
    assert "--forget FILE" in str(caught.value)
    assert not elicited.place(run).exists()
