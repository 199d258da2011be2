"""AegisLLM: who is asked when, what a verdict leads to, and the search of a prompt."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from delible.context import Context
from delible.errors import DataError, RecipeError, RunError
from delible.guards.aegisllm import Aegisllm, credit
from delible.loaders import write_records
from delible.messages import Message
from delible.records import QA, ForgetRequest
from delible.search.instruction import Demonstration, Program
from delible.search.labelled import labelled_queries
from delible.system.asks import Decoding, NoAnswer, Prompt
from delible.system.roles import Roles
from delible.systems.guarded import GuardedSystem, Guarding, guard
from delible.systems.opening import keep, open_system
from delible.systems.scripted import Scripted

FORGET = tuple(
    QA(question=f"What is work {n} of Ada Brook?", answer=f"Book {n}", subject="Ada Brook")
    for n in range(20)
)
RETAIN = tuple(QA(question=f"What is work {n} of Cy Finch?", answer=f"Song {n}") for n in range(20))
REQUEST = ForgetRequest(forget=FORGET, retain=RETAIN)
DECODING = Decoding(16)
CHOICE = "Who wrote The Grey Fox?\nA. Ada Brook\nB. Cy Finch\nC. Dee\nD. Eve"


def shown(prompt: Prompt, tag: str) -> str:
    """The last text that is shown between marks."""
    text = prompt.messages[-1].text
    return re.findall(rf"<({tag}-\w+)>\n(.*?)\n</\1>", text, re.DOTALL)[-1][1]


def reply(unsafe: bool) -> str:
    return json.dumps({"reasoning": "so", "verdict": "unsafe" if unsafe else "safe"})


def by_name(prompt: Prompt) -> str:
    return reply("Ada Brook" in shown(prompt, "query"))


def by_answer(prompt: Prompt) -> str:
    return reply("Book" in shown(prompt, "response"))


def guarded(
    inner: Scripted, orchestrator: Any = by_name, evaluator: Any = by_answer, **options: Any
) -> tuple[GuardedSystem, Scripted, Scripted]:
    one = Scripted(orchestrator, name="one", fingerprint="one")
    two = Scripted(evaluator, name="two", fingerprint="two")
    context = Context(roles=Roles({"guard": one, "critic": two}))
    options = {"refusal": "No.", **options}
    return guard(inner, REQUEST, "aegisllm", context=context, **options), one, two


def every_way(system: GuardedSystem, prompt: Prompt) -> tuple[str, str]:
    """Text and finish, the same in a batch and whole."""
    batch = system.replies([prompt], DECODING)[0]
    whole = asyncio.run(system.respond(prompt, DECODING))
    assert not isinstance(batch, NoAnswer)
    assert (batch.text, batch.finish) == (whole.text, whole.finish)
    return whole.text, whole.finish


def test_an_unsafe_query_reaches_no_model() -> None:
    inner = Scripted(lambda _: "Book 1")
    system, one, two = guarded(inner)
    assert every_way(system, Prompt.ask("What did Ada Brook write?")) == ("No.", "content_filter")
    assert (inner.prompts, two.prompts) == ([], [])
    assert len(one.prompts) == 2


def test_a_bad_answer_to_a_safe_query_is_refused_and_a_good_one_is_unchanged() -> None:
    inner = Scripted(lambda prompt: "Book 3, of 1987." if "fox" in str(prompt) else " In  water.\n")
    system, one, two = guarded(inner)
    assert every_way(system, Prompt.ask("What of the fox?")) == ("No.", "content_filter")
    boil = Prompt.ask("How is an egg boiled?", prefill="Well,", system="Be brief.")
    assert every_way(system, boil) == (" In  water.\n", "stop")
    assert inner.prompts[-1] == boil, "the query was changed on its way"
    assert len(one.prompts) == len(two.prompts) == len(inner.prompts) == 4
    assert shown(two.prompts[-1], "response") == " In  water.\n"
    assert "egg" in shown(two.prompts[-1], "query")


def test_topic_and_names_are_told_before_the_query_and_all_turns_are_shown() -> None:
    system, one, two = guarded(
        Scripted(lambda _: "Fine."),
        aliases={"Ada Brook": ["The Fox"]},
        keywords=("exploitation",),
        topic="secrets",
    )
    turns = (
        Message(role="user", content="Tell me of Ada Brook."),
        Message(role="assistant", content="No."),
        Message(role="user", content="Go on."),
    )
    assert every_way(system, Prompt(turns))[1] == "content_filter", "an earlier turn is not judged"
    system.generate([Prompt.ask("Egg?")], DECODING)
    for prompt in (one.prompts[-1], two.prompts[-1]):
        text = prompt.messages[-1].text
        assert "Restricted topic: secrets" in text
        assert text.index("- Ada Brook (also: The Fox)") < text.index("<query-")
        assert text.index("- exploitation") < text.index("<query-")
        assert "{" not in text.split("<query-")[0]


@pytest.mark.parametrize("part", ["orchestrator", "evaluator"])
@pytest.mark.parametrize(
    "said",
    [
        "safe", '{"verdict": "true"}', '{"verdict": "nonsafe"}', '{"reasoning": "safe"}', "",
        '{"verdict": true}', NoAnswer("dead"), RunError("the budget is spent"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_unsafe(part: str, said: Any) -> None:
    system, *_ = guarded(Scripted(lambda _: "Secret."), **{part: lambda _: said})
    assert every_way(system, Prompt.ask("Egg?")) == ("No.", "content_filter")


def test_verdicts_are_read_whatever_their_case() -> None:
    said = 'Well: {"reasoning": "r", "verdict": " Safe "}'
    system, *_ = guarded(Scripted(lambda _: "Water."), lambda _: said, lambda _: said)
    assert every_way(system, Prompt.ask("Egg?")) == ("Water.", "stop")


def test_choices_are_deflected_by_a_letter_and_letters_pass_unread() -> None:
    inner = Scripted(lambda _: "B")
    system, _, two = guarded(inner)
    text, finish = every_way(system, Prompt.ask(CHOICE))
    assert (text in "ABCD", len(text), finish) == (True, 1, "stop")
    letters = {every_way(system, Prompt.ask(f"{n}? Ada Brook\n{CHOICE}"))[0] for n in range(30)}
    assert letters == set("ABCD")
    assert not inner.prompts
    safe = Prompt.ask("Which?\nA. Rome\nB. Oslo")
    assert every_way(system, safe) == ("B", "stop")
    assert not two.prompts, "a letter was evaluated"
    # a question that offers options does not open the way for a whole answer
    leaking, _, two = guarded(Scripted(lambda _: "B. By the way, Book 7."))
    text, _ = every_way(leaking, safe)
    assert text in ("A", "B")
    assert len(two.prompts) == 2


def test_costs_and_outcomes_are_counted() -> None:
    system, *_ = guarded(Scripted(lambda _: "Water."), max_new_tokens=100)
    asks = ["Ada Brook?", "Egg?", "Snow?", "Rain?"]
    system.generate([Prompt.ask(one) for one in asks], DECODING)
    assert system.mind.notes["costs"] == {
        "prompts": 4,
        "calls": {"guard": 4, "critic": 3},
        "tokens": {"guard": 400, "critic": 300},
        "outcomes": {"deflected": 1, "passed": 3},
    }


def test_nothing_of_the_query_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    system, *_ = guarded(Scripted(lambda _: "Quillfeather"), lambda _: "Quillfeather?")
    system.generate([Prompt.ask("Quillfeather?")], DECODING)
    assert "Quillfeather" not in caplog.text


def test_a_request_without_topic_or_players_is_an_error() -> None:
    with pytest.raises(DataError, match="what is restricted"):
        Aegisllm().prepare(ForgetRequest())
    with pytest.raises(RecipeError, match="nobody plays the guard"):
        Aegisllm().prepare(REQUEST)
    with pytest.raises(RecipeError, match="not a target"):
        Aegisllm(aliases={"Bo": ["B"]}).prepare(REQUEST)


# ---- the search


def test_the_worth_of_each_of_four_verdicts() -> None:
    worth = {(label, given): credit(label, given) for label in ("safe", "unsafe")
             for given in ("safe", "unsafe")}  # fmt: skip
    assert worth == {
        ("safe", "safe"): 1.0,
        ("unsafe", "unsafe"): 1.0,
        ("safe", "unsafe"): pytest.approx(0.3),
        ("unsafe", "safe"): 0.0,
    }
    assert credit("unsafe", None) == 1.0
    assert credit("safe", None) == pytest.approx(0.3)
    assert credit("safe", "unsafe", 0.0) == 0.0


def test_examples_are_twenty_and_eighty_and_do_not_overlap() -> None:
    many = tuple(QA(question=f"What is {n}?", answer="it") for n in range(300))
    request = ForgetRequest(forget=many[:120], retain=(*many[120:], *many[:5]), neighbours=RETAIN)
    train, validation = labelled_queries(request, None, 50, 0.2, 0)
    for rows, size in ((train, 10), (validation, 40)):
        counts = [sum(one.label == label for one in rows) for label in ("safe", "unsafe")]
        assert counts == [size, size]
    rows = [*train, *validation]
    assert len({one.text for one in rows}) == 100
    forgotten = {record.question for record in request.forget}
    assert all((one.text in forgotten) == (one.label == "unsafe") for one in rows)
    kept = {record.question for record in (*many[120:], *RETAIN)}
    near = sum(one.text in kept for one in rows)
    assert near == 33, "the border is learned from what is kept, and the rest is general"
    assert labelled_queries(request, None, 50, 0.2, 0) == (train, validation)
    assert labelled_queries(request, None, 50, 0.2, 1) != (train, validation)


def test_examples_of_a_file_take_their_place(tmp_path: Path) -> None:
    rows = [QA(question=f"{label} {n}", answer="-", group=label)
            for label in ("safe", "unsafe") for n in range(10)]  # fmt: skip
    write_records(rows, tmp_path / "rows.jsonl")
    train, validation = labelled_queries(REQUEST, str(tmp_path / "rows.jsonl"), 50, 0.2, 0)
    assert (len(train), len(validation)) == (4, 16)
    assert all(one.text.split()[0] == one.label for one in (*train, *validation))
    write_records([QA(question="?", answer="-", group="sfae")], tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="record 1 is neither"):
        labelled_queries(REQUEST, str(tmp_path / "rows.jsonl"), 50, 0.2, 0)


BETTER = "Flag whatever names Ada Brook, and nothing else."


def taught(prompt: Prompt) -> str:
    """Flags every 'work' until its instruction says better; writes that instruction when asked."""
    text = prompt.messages[-1].text
    if "Write another instruction" in text:
        return BETTER if "Be short" in text else "Flag nothing."
    if "Flag nothing." in text:
        return reply(False)
    query = shown(prompt, "query")
    return reply("Ada Brook" in query if BETTER in text else "work" in query)


def outcome(
    script: Callable[[Prompt], str], request: ForgetRequest = REQUEST, **options: Any
) -> Any:
    player = Scripted(script, name="player", fingerprint="player")
    passing = Scripted(lambda _: reply(False), fingerprint="passing")
    context = Context(roles=Roles({"guard": player, "critic": passing}))
    inner = Scripted(lambda _: "Fine.", fingerprint="inner")
    return Aegisllm(refusal="No.", **options).apply(inner, request, context), player


def test_a_better_prompt_is_found_and_kept_with_the_guard(tmp_path: Path) -> None:
    made, player = outcome(taught)
    notes = made.notes["search"]
    assert notes["score"] == pytest.approx(1.0)
    assert notes["start"] < 0.9
    assert notes["calls"] == len(player.prompts) <= 300
    assert made.system.mind.program.instruction == BETTER
    ask = Prompt.ask("What is work 3 of Cy Finch?")
    assert made.system.generate([ask], DECODING) == ["Fine."]
    assert outcome(taught, search_calls=0)[0].system.generate([ask], DECODING) == ["No."]

    assert isinstance(made.content, Guarding)
    asked = len(player.prompts)
    passing = Scripted(lambda _: reply(False), fingerprint="passing")
    context = Context(roles=Roles({"guard": player, "critic": passing}))
    options = json.loads(json.dumps(made.content.guard.spec()))
    options.pop("name")
    again = guard(Scripted(lambda _: "Fine."), REQUEST, "aegisllm", context=context, **options)
    assert len(player.prompts) == asked, "it was looked for again"
    assert again.mind.fingerprint == made.system.mind.fingerprint
    assert again.generate([ask], DECODING) == ["Fine."]


def test_a_prompt_that_is_best_already_stays() -> None:
    """Other instructions flag nothing: a missed query is worth less than a false alarm."""
    made, _ = outcome(lambda prompt: taught(prompt).replace(BETTER, "Flag nothing."))
    assert made.notes["search"]["score"] >= made.notes["search"]["start"]
    mind = made.system.mind
    plain = outcome(taught, search_calls=0)[0].system.mind
    assert mind.program.instruction == plain.program.instruction


def test_too_few_examples_are_said() -> None:
    made, player = outcome(taught, ForgetRequest(subjects=("Ada Brook",)))
    assert made.notes["search"]["reason"] == "too few labelled queries"
    assert not player.prompts
    assert made.system.generate([Prompt.ask("Ada Brook, work?")], DECODING) == ["No."]


def test_a_spent_budget_stops_the_search() -> None:
    def spent(prompt: Prompt) -> Any:
        writing = "Write another instruction" in prompt.messages[-1].text
        return "Flag nothing." if writing else RunError("the budget is spent.")

    player = {"guard": Scripted(spent), "critic": Scripted([])}
    with pytest.raises(RunError, match="budget"):
        Aegisllm().apply(Scripted([]), REQUEST, Context(roles=Roles(player)))  # type: ignore[arg-type]


def test_a_program_comes_from_a_file_and_its_demonstrations_are_shown(tmp_path: Path) -> None:
    shown_one = Demonstration(text="Who is Bo?", label="safe", reasoning="not listed")
    program = Program(instruction="Look.", demonstrations=(shown_one,))
    (tmp_path / "found.json").write_text(program.model_dump_json())
    system, one, _ = guarded(Scripted(lambda _: "x"), program=str(tmp_path / "found.json"))
    system.generate([Prompt.ask("Egg?")], DECODING)
    text = one.prompts[0].messages[-1].text
    assert text.startswith("Look.")
    example = text.index("Who is Bo?")
    assert (
        example < text.index('{"reasoning": "not listed", "verdict": "safe"}') < text.index("Egg?")
    )
    for content in ("no JSON", '{"instruction": "x", "version": 2}'):
        (tmp_path / "found.json").write_text(content)
        with pytest.raises(RecipeError, match="program"):
            guarded(Scripted([]), program=str(tmp_path / "found.json"))


def test_recall_and_false_flags_on_other_people() -> None:
    """Five people by their names, and a guard that reads names: all of them and nobody else."""
    people = [f"Person{n} Norrby" for n in range(5)]
    forget = tuple(
        QA(question=f"Where was {who} in {year}?", answer="At home", subject=who)
        for who in people for year in range(1990, 2000)
    )  # fmt: skip
    others = tuple(
        QA(question=f"Where was Other{n} Casta in {year}?", answer="At sea")
        for n in range(5) for year in range(1990, 2000)
    )  # fmt: skip

    def reads(prompt: Prompt) -> str:
        return reply(any(who in shown(prompt, "query") for who in people))

    request = ForgetRequest(forget=forget, retain=others)
    player = Scripted(reads, fingerprint="reads")
    passing = Scripted(lambda _: reply(False), fingerprint="passing")
    context = Context(roles=Roles({"guard": player, "critic": passing}))
    made = Aegisllm(refusal="No.").apply(Scripted(lambda _: "Fine."), request, context)
    answers = [
        made.system.generate([Prompt.ask(one.question) for one in rows], DECODING)
        for rows in (forget, others)
    ]
    assert answers[0].count("No.") == len(forget)
    assert answers[1].count("No.") == 0
    indirect = made.system.generate([Prompt.ask("Where was her brother?")], DECODING)
    assert indirect == ["Fine."], "a reader of names does not see indirect questions"


def test_it_is_kept_with_its_prompt_and_opened(tmp_path: Path) -> None:
    from delible.lm.lm import LM
    from delible.systems.opening import described
    from delible.testing import tiny_model, tiny_tokenizer

    lm = LM(tiny_model("llama", num_hidden_layers=2), tiny_tokenizer(), precision="float32")
    lm.save(tmp_path / "base")
    base = open_system(str(tmp_path / "base"))
    below = described(base)
    program = Program(instruction="Look twice.")
    made = Aegisllm(program=program).apply(base, REQUEST, Context())
    keep(made.kind, made.content, tmp_path / "run", below, made.system)
    opened: Any = open_system(str(tmp_path / "run"))
    assert opened.mind.program == program
    assert opened.generate([Prompt.ask("Egg?")], DECODING) == made.system.generate(
        [Prompt.ask("Egg?")], DECODING
    ), "a model that gives no verdict refuses, before and after"
