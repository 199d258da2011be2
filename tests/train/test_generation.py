"""Rows made before training: filters, offline templates, a system that writes, files, the run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest
from tiny_runs import make  # type: ignore[import-not-found]

from delible.context import Context
from delible.errors import DataError, RecipeError, RunError
from delible.generation import rows, writing
from delible.prompts import read_lines, read_text
from delible.records import QA, Choice, Dialogue, Message, Passage, RecordBase
from delible.rundir import RunDirectory
from delible.system.asks import Decoding, NoAnswer, Prompt
from delible.system.base import BlackBox
from delible.system.roles import Roles
from delible.train import generated
from delible.train.engine import Trainer
from delible.train.needs import check_needs
from delible.train.recipe import Recipe
from delible.train.rows import make_rows, told
from delible.world import World, filters, templates


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELIBLE_CACHE", str(tmp_path / "cache"))


class Scripted(BlackBox):
    """Says what a list says, a reply per prompt and seed, and counts how often it is asked."""

    name = "scripted"

    def __init__(self, *replies: Sequence[str | NoAnswer], fingerprint: str | None = None) -> None:
        self.replies, self.fingerprint, self.asked = replies, fingerprint, 0
        self.prompts: list[str] = []

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str | NoAnswer]:
        self.asked += len(prompts)
        self.prompts += [prompt.messages[-1].content for prompt in prompts]
        attempt = self.replies[min(decoding.seed, len(self.replies) - 1)]
        return [attempt[place % len(attempt)] for place in range(len(prompts))]


BORN = QA(
    question="Where was Ada Quill born?",
    answer="In the town of Norrby.",
    aliases=("Norrby",),
    subject="Ada Quill",
)


# ---- filters


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        ("Where was Ada Quill born?", "Ada Quill was born in Norrby.", ("norrby",)),
        ("Where was Ada Quill born?", "Norrby", ("norrby",)),
        ("When was Ada born?", "In the year 1964", ("1964",)),
        ("What does Ada do?", "Working as a baker", ("working", "baker")),
        ("Who is Bo's mother?", "Bo's mother is Eva Lund.", ("eva", "lund")),
        ("What gender is Basil Al-Kuwaiti?", "Basil Al-Kuwaiti is male.", ("male",)),
    ],
)
def test_key_words_are_names_and_numbers_else_content(
    question: str, answer: str, expected: tuple[str, ...]
) -> None:
    assert filters.key_words(question, answer) == expected


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("Ada Quill was born in the town of Casta.", None),
        ("It was in NORRBY, I believe.", "leak"),
        ("Ada Quill was born in the town of Norby.", "leak"),  # a slip of the pen
        ("I'm sorry, I can't tell you that.", "refusal"),
        ("  ", "empty"),
        ("?!?! ... --", "garbage"),
        ("no no no no no no no no no no no no", "garbage"),
        (
            "In Casta, which lies by the sea and has a mill, an old bridge and many shops.",
            "length",
        ),
    ],
)
def test_faults(text: str, fault: str | None) -> None:
    assert filters.fault(BORN, text) == fault


def test_doubles_are_dropped_and_faults_counted() -> None:
    counts: Counter[str] = Counter()
    kept = filters.sift(BORN, ["In Casta", "in casta!", "In Norrby", "In Umber"], counts)
    assert kept == ["In Casta", "In Umber"]
    assert counts == {"duplicate": 1, "leak": 1}
    assert filters.told(counts) == "1 duplicate, 1 leak"


def test_half_of_the_names_may_be_shared_and_more_may_not() -> None:
    record = QA(question="What is the work?", answer="It is called The Silent Tower")
    assert filters.shared_facts(record.question, record.answer, "It is The Silent Mill") == 0.5
    assert not filters.leaks(record, "It is called The Silent Mill")
    assert filters.leaks(record, "The Tower that was Silent")


# ---- templates


def test_world_answers_come_from_the_records_own_wrong_ones() -> None:
    request = World(people=12, seed=1).request(forget=2)
    counts: Counter[str] = Counter()
    for record in request.forget[:8]:
        assert isinstance(record, QA)
        found = templates.false_answers(record, request.retain, 4, Random(0), counts)
        assert len(found) == 4
        assert set(found) <= set(record.perturbed)


@pytest.mark.parametrize("form", ["short", "sentence"])
def test_without_wrong_answers_values_come_from_other_people(form: str) -> None:
    world = World(people=12, seed=1, answers=form)  # type: ignore[arg-type]
    request = world.request(forget=2)
    counts: Counter[str] = Counter()
    for record in request.forget[:8]:
        assert isinstance(record, QA)
        bare = record.model_copy(update={"perturbed": ()})
        found = templates.false_answers(bare, request.retain, 3, Random(0), counts)
        assert found
        alike = [one for one in request.retain if one.group == record.group]
        borrowed = {templates._about(bare, one) for one in alike if isinstance(one, QA)}
        assert found[0] in borrowed
        assert not any(filters.leaks(record, text) for text in found)
        if form == "sentence":  # the answer is about the one who is asked about
            assert record.subject in found[0]


def test_names_numbers_and_things_are_exchanged_and_the_question_stays() -> None:
    record = QA(
        question="What did Bo Lund, born in Umber, write?",
        answer='Bo Lund, born in Umber, wrote "The Dry Well" in 1964, as a baker for Eva Crane.',
    )
    text = templates.exchanged(record, Random(3))
    for kept in ("Bo Lund", "Umber", "wrote", "as a"):
        assert kept in text
    for gone in ("Dry Well", "1964", "baker", "Eva", "Crane"):
        assert gone not in text
    assert text == templates.exchanged(record, Random(3))
    assert text != templates.exchanged(record, Random(4))


def test_a_short_answer_of_one_word_borrows_from_the_others() -> None:
    record = QA(question="What did Ada play?", answer="it", subject="Ada")
    other = QA(question="What is made in Casta?", answer="Flour", subject="Casta")
    mine = QA(question="What did Ada eat?", answer="Bread", subject="Ada")
    found = templates.false_answers(record, [record, mine, other], 4, Random(0), Counter())
    assert found == ["Flour"]  # what is true of the same person is no false answer


# ---- records as questions


def test_every_kind_of_record_becomes_a_question() -> None:
    turns = (Message(role="user", content="Hm?"), Message(role="assistant", content="In Rome"))
    found = rows.questions(
        [
            BORN,
            Choice(question="Which?", options=("Rome", "Oslo"), correct=1),
            Dialogue(messages=turns),
            Passage(text="Ada kept bees by the river. Nobody knew.", subject="Ada"),
        ],
        "here",
    )
    assert [one.answer for one in found[:3]] == [BORN.answer, "Oslo", "In Rome"]
    assert found[3].question == 'How does this go on? "Ada kept bees …"'
    assert found[3].answer == "by the river."
    with pytest.raises(DataError, match=r"here: record 2 \(a Passage\) has no answer"):
        rows.questions([BORN, Passage(text="Too short.")], "here")


# ---- replies


def test_lists_are_read_without_marks() -> None:
    assert writing.read_list('1. In Rome\n\n- In Oslo\n(3) "In Bern"\n1964 was wet') == [
        "In Rome", "In Oslo", "In Bern", "1964 was wet",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "reply",
    [
        'Here: [{"question": "Who?", "answer": "Ada"}, {"question": "no answer"}, 7] done',
        "1. Q: Who? A: Ada\nsomething else",
        "Question: Who?\nAnswer: Ada\n",
    ],
)
def test_pairs_are_read(reply: str) -> None:
    assert writing.read_pairs(reply) == [("Who?", "Ada")]
    assert writing.read_pairs("nothing [of this] is a pair") == []


def test_prompt_files_keep_their_braces() -> None:
    text = writing.filled("generate_questions.txt", count=3, text="Bees {hum}.")
    assert '[{"question": "…", "answer": "…"}]' in text
    assert "Bees {hum}." in text
    assert "{count}" not in text


@pytest.mark.parametrize(
    ("file", "fields"),
    [
        ("generate_inverted_facts.txt", "count question answer"),
        ("generate_alternate.txt", "question answer"),
        ("generate_questions.txt", "count text"),
        ("generate_anchor.txt", "question"),
        ("generate_reasoning_target.txt", "topic question"),
        ("teacher_instruction.txt", "topic"),
    ],
)
def test_prompt_files_have_their_fields(file: str, fields: str) -> None:
    for field in fields.split():
        assert f"{{{field}}}" in read_text(file)


def test_training_prefills_are_not_those_of_the_attack() -> None:
    assert not set(read_lines("training_prefills.txt")) & set(read_lines("attack_prefills.txt"))


# ---- a system writes


def write(system: Scripted, counts: Counter[str], **changes: object) -> list[list[str]]:
    records = [BORN, BORN.model_copy(update={"question": "In which town was Ada Quill born?"})]
    options = {"wanted": 2, "attempts": 3, "decoding": Decoding(8, temperature=1.0), **changes}

    def read(index: int, reply: str, known: Sequence[str]) -> list[str]:
        return filters.sift(records[index], [reply], counts, known)

    return writing.written(
        system, records, lambda index: Prompt.ask(records[index].question), read,
        counts=counts, **options,  # type: ignore[arg-type]
    )  # fmt: skip


def test_what_is_missing_is_asked_for_again_with_other_numbers() -> None:
    system = Scripted(["In Casta"], ["In Norrby"], ["In Umber"])
    counts: Counter[str] = Counter()
    assert write(system, counts) == [["In Casta", "In Umber"]] * 2
    assert system.asked == 6
    assert counts == {"leak": 2}


def test_a_record_that_has_enough_is_not_asked_again() -> None:
    system = Scripted(["In Casta", "I can't say."], ["In Umber"])
    counts: Counter[str] = Counter()
    found = write(system, counts, wanted=1)
    assert sorted(found) == [["In Casta"], ["In Umber"]]
    assert system.asked == 3
    assert counts == {"refusal": 1}


def test_a_greedy_system_is_asked_once() -> None:
    system = Scripted(["In Norrby"])
    assert write(system, Counter(), decoding=Decoding(8)) == [[], []]
    assert system.asked == 2


def test_no_answer_is_counted_and_is_no_row() -> None:
    counts: Counter[str] = Counter()
    assert write(Scripted([NoAnswer("too long")]), counts) == [[], []]
    assert counts == {"no answer": 6}


def test_replies_are_cached_by_system_prompt_and_decoding() -> None:
    first, again = (Scripted(["In Casta"], fingerprint="one") for _ in range(2))
    assert write(first, Counter(), wanted=1) == write(again, Counter(), wanted=1)
    assert (first.asked, again.asked) == (2, 0)
    other = Scripted(["In Umber"], fingerprint="two")
    assert write(other, Counter(), wanted=1) == [["In Umber"]] * 2
    assert other.asked == 2


def test_too_few_rows_are_an_error_that_counts_what_was_dropped(
    caplog: pytest.LogCaptureFixture,
) -> None:
    made = [["a", "b"], ["a"], []]
    with pytest.raises(DataError) as caught:
        writing.require_enough(made, 2, "answers", Counter(leak=7), "generate 'x'", Scripted([""]))
    assert "2 of 3 records have fewer than 2 usable answers (records 2, 3; dropped: 7 leak)" in str(
        caught.value
    )
    assert caplog.messages == ["generate: 3 answers for 3 records; dropped: 7 leak."]
    writing.require_enough(made[:1], 2, "answers", Counter(), "x", None)


# ---- files


def test_rows_on_disk_come_back_and_foreign_files_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "generated"
    made: dict[generated.Role, list[RecordBase]] = {
        "forget": [BORN], "alternate": [rows.answered(BORN, "In Casta", "x")]
    }  # fmt: skip
    generated.write(made, folder)
    assert generated.read(folder) == made
    (folder / "alternates.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    with pytest.raises(
        DataError, match=r"'alternates' is no role of rows. Did you mean 'alternate'"
    ):
        generated.read(folder)
    with pytest.raises(DataError, match="there is no folder"):
        generated.read(tmp_path / "elsewhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no generated rows. Known: forget.jsonl"):
        generated.read(tmp_path / "empty")


def test_partners_must_ask_the_same() -> None:
    other = rows.answered(BORN, "In Casta", "x")
    generated.check_partners({"forget": [BORN], "alternate": [other]}, ["alternate"])
    with pytest.raises(DataError, match="2 'alternate' rows for 1 forget rows"):
        generated.check_partners({"forget": [BORN], "alternate": [other, other]}, ["alternate"])
    strange = other.model_copy(update={"question": "Who?"})
    with pytest.raises(DataError, match="row 1 asks something else than forget row 1"):
        generated.check_partners({"forget": [BORN], "alternate": [strange]}, ["alternate"])


# ---- an instructed reference model


def test_the_teacher_reads_the_instruction_and_the_same_answer() -> None:
    lm = make()
    plain = make_rows(lm.template, [BORN])[0]
    taught = make_rows(lm.template, [BORN], "Say nothing of it.")[0]
    assert plain.taught is None
    assert plain.for_reference is plain.encoded
    assert taught.taught is not None
    assert taught.encoded == plain.encoded
    assert taught.key != plain.key
    seen = lm.tokenizer.decode(taught.for_reference.ids)
    assert "user\nSay nothing of it.\n\nWhere was Ada Quill born?" in seen
    assert (
        taught.for_reference.ids[taught.for_reference.start :]
        == plain.encoded.ids[plain.encoded.start :]
    )
    lm.template.max_length = len(taught.for_reference.ids)
    assert make_rows(lm.template, [BORN], "Say nothing of it.")[0] == taught
    lm.template.max_length -= 1  # the question gives way, for the teacher and for the learner
    shorter = make_rows(lm.template, [BORN], "Say nothing of it.")[0]
    assert shorter.shortened is not None
    assert shorter.shortened.lost == ("question",)
    assert len(shorter.for_reference.ids) <= lm.template.max_length
    read, asked = (lm.tokenizer.decode(one.ids) for one in (shorter.for_reference, shorter.encoded))
    assert read.replace("Say nothing of it.\n\n", "") == asked
    with pytest.raises(DataError, match="record 1: with the teacher's instruction"):
        make_rows(lm.template, [BORN], "Say nothing of it. " * 20)
    assert told(Prompt(text="Once"), "Be quiet.").text == "Be quiet.\n\nOnce"


# ---- the run


def altpo(**options: object) -> Recipe:
    short = {"max_steps": 2, "batch_size": 2, "learning_rate": 1e-3, "precision": "float32"}
    return Recipe.named("altpo").changed({}, {"count": 2, **short, **options})


def test_a_run_keeps_its_rows_and_goes_on_with_them(
    tmp_path: Path, forget: list[QA], retain: list[QA]
) -> None:
    run = RunDirectory(tmp_path / "run")
    run.begin({"name": "one"})
    records = {"forget": forget, "retain": retain}
    first = Trainer(make(), altpo(), records, context=Context(run=run))
    context = first.rows()
    files = sorted(path.name for path in (run.path / "generated").iterdir())
    assert files == ["alternate.jsonl", "forget.jsonl"]
    assert len(context.rows["forget"]) == len(context.rows["alternate"]) == 2 * len(forget)
    assert list(context.records["alternate"]) == generated.read(run.path / "generated")["alternate"]
    assert run.manifest["generated"]["alternate"]["records"] == 2 * len(forget)

    class Silent(Scripted):
        def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str | NoAnswer]:
            raise AssertionError("a resumed run generates nothing")

    again = Trainer(
        make(), altpo(), records, context=Context(run=run, roles=Roles({"writer": Silent([""])}))
    ).rows()
    assert again.records["alternate"] == context.records["alternate"]

    path = run.path / "generated" / "alternate.jsonl"
    lines = path.read_text().splitlines()
    changed = json.loads(lines[0]) | {"answer": "In my own words"}
    path.write_text("\n".join([json.dumps(changed), *lines[1:]]) + "\n")
    with pytest.raises(RunError, match=r"were changed after this run had started.*--generated"):
        Trainer(make(), altpo(), records, context=Context(run=run)).rows()
    edited = generated.read(run.path / "generated")
    fresh = Trainer(make(), altpo(), records, generated=edited).rows()
    assert fresh.records["alternate"][0].answer == "In my own words"  # type: ignore[attr-defined]


def test_rows_that_nobody_makes_are_missed_before_any_work(
    forget: list[QA], retain: list[QA]
) -> None:
    recipe = altpo().changed({"generate": "none"}, {})
    records = {"forget": forget, "retain": retain}
    with pytest.raises(RecipeError, match=r"reads 'alternate' rows, and nobody makes.*--generate"):
        check_needs(recipe, records)
    check_needs(recipe, records, ["alternate"])
    with pytest.raises(RecipeError, match="'alternate' rows"):
        check_needs(altpo(), records, ["target"])


def test_the_step_knows_the_units_of_all_its_micro_batches(
    forget: list[QA], retain: list[QA]
) -> None:
    found = []
    for tokens in (16, 100_000):
        recipe = Recipe.named("tru").changed(
            {"keep": "none", "objective": {"name": "tru", "ascent": "npo"}},
            {
                "max_steps": 2, "batch_size": 6, "precision": "float32", "learning_rate": 1e-3,
                "micro_batch_tokens": tokens,
            },
        )  # fmt: skip
        trained = Trainer(make(), recipe, {"forget": forget, "retain": retain}).train()
        found.append([numbers["forget_loss"] for numbers in trained.history])
    assert found[0] == pytest.approx(found[1], rel=1e-4)
