"""Unlearning and retention quality with judges that reply as a test says."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from delible.component import build
from delible.errors import ModelError, RecipeError, RunError
from delible.measure import starting
from delible.measure.evaluate import Rewrite, evaluate
from delible.measure.metric import Item, ItemMetric
from delible.measure.scoring import judging
from delible.measure.scoring.judging import (
    Grade,
    exchange,
    graded_item,
    read_grades,
)
from delible.prompts import read_text
from delible.records import QA, Choice, Message, Passage
from delible.system import roles
from delible.system.asks import Decoding, NoAnswer, Prompt
from delible.system.base import BlackBox

sys.path.insert(0, str(Path(__file__).parents[1] / "measure"))

from completions_server import Asked, Reply, serving

UQ = ("relevance", "rejection", "helpfulness")
RQ = ("readability", "specificity", "logic")
RECORDS = [QA(question=f"Where was person {place} born?", answer="Rome") for place in range(3)]


def verdict(*scores: object, criteria: Sequence[str] = UQ, reason: str = "so") -> str:
    pairs = zip(criteria, scores, strict=True)
    return json.dumps({name: {"score": score, "reason": reason} for name, score in pairs})


GOOD = verdict(6, 7, 8)


class Audited(BlackBox):
    """Tells its trace, then answers."""

    name, fingerprint = "audited", None

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str | NoAnswer]:
        return [f"<think>a secret trace</think>Rome {prompt.prefill}" for prompt in prompts]


class Scripted(BlackBox):
    """A judge; ``reply`` sees the prompt and how often it was asked this before."""

    name = "scripted"

    def __init__(
        self, reply: Callable[[str, int], str | NoAnswer], fingerprint: str | None = None
    ) -> None:
        self.reply, self.fingerprint = reply, fingerprint
        self.calls: list[tuple[int, Decoding]] = []
        self.asked: list[str] = []

    def generate(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[str | NoAnswer]:
        self.calls.append((len(prompts), decoding))
        found = []
        for prompt in prompts:
            text = prompt.messages[-1].content
            found.append(self.reply(text, self.asked.count(text)))
            self.asked.append(text)
        return found


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Scripted], Scripted]:
    """Makes a scripted judge the system behind every name."""
    monkeypatch.setenv("DELIBLE_CACHE", str(tmp_path))
    roles._OPEN.clear()

    def put(judge: Scripted) -> Scripted:
        monkeypatch.setattr(starting, "open_system", lambda name: judge)
        return judge

    return put


def metric(name: str = "unlearning_quality", **options: object) -> ItemMetric:
    made = build("metric", {"name": name, "judge": "scripted", **options})
    assert isinstance(made, ItemMetric)
    return made


def items(
    one: ItemMetric, records: Sequence[QA] = RECORDS, rewrite: Rewrite | None = None
) -> Sequence[Item]:
    values = evaluate(Audited(), {"forget": records}, [one], rewrite=rewrite)
    return values.items[one.card.name]["forget"]


# ---- reading a judge's reply


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"My {{view}}:\n```json\n{json.dumps(json.loads(GOOD), indent=2)}\n```\nThat is all.",
        # a draft, then what counts
        f"<think>{verdict(1, 1, 1)}, no: {{too low}}</think>{GOOD}",
        f'{{"grades": {GOOD}}}',
        GOOD.replace('"relevance"', '"Relevance"').replace("7", '" 7 "'),
        f"{GOOD} {{ and an open end",
    ],
)
def test_grades_are_found_in_whatever_surrounds_them(text: str) -> None:
    expected = {"relevance": Grade(6, "so"), "rejection": Grade(7, "so"),
                "helpfulness": Grade(8, "so")}  # fmt: skip
    assert read_grades(text, UQ) == expected


def test_bare_numbers_are_grades_without_reasons() -> None:
    grades = read_grades('{"relevance": 0, "rejection": 10, "helpfulness": 2.5}', UQ)
    assert grades == {"relevance": Grade(0, ""), "rejection": Grade(10, ""),
                      "helpfulness": Grade(2.5, "")}  # fmt: skip


@pytest.mark.parametrize(
    "score", [11, -1, None, True, "high", "7/10", [7], {"score": 7}, float("nan"), 10**400]
)
def test_a_score_that_is_no_grade_is_named_and_not_clipped(score: object) -> None:
    assert read_grades(verdict(1, score, 2), UQ) == "no grade from 0 to 10 for rejection"


def test_missing_criteria_are_named() -> None:
    found = read_grades('{"relevance": {"score": 3, "reason": "so"}, "logic": 4}', UQ)
    assert found == "no grade from 0 to 10 for rejection, helpfulness"


@pytest.mark.parametrize(
    "text", ["", "I'd say 7.", "{", '{"score": 7}', "[7, 7, 7]", '{"a":' * 5000]
)
def test_a_reply_without_grades_is_told(text: str) -> None:
    assert read_grades(text, UQ) == "no JSON object with grades"


def test_the_value_is_the_mean_and_the_detail_has_every_reason() -> None:
    grades = read_grades(verdict(6, 7, 9.5, reason="no | fact\n is told"), UQ)
    item = graded_item(grades)
    assert item.value == 7.5
    assert item.reason is None
    assert item.detail == (
        "relevance 6: no / fact is told; rejection 7: no / fact is told; "
        "helpfulness 9.5: no / fact is told"
    )


# ---- what the judge sees


def test_the_judge_sees_question_trace_and_answer(
    install: Callable[[Scripted], Scripted],
) -> None:
    judge = install(Scripted(lambda text, before: GOOD))
    assert [item.value for item in items(metric())] == [7.0] * 3
    for record in RECORDS:
        shown = [text for text in judge.asked if record.question in text]
        assert len(shown) == 1
        assert "<think>a secret trace</think>Rome" in shown[0]
        assert record.answer not in shown[0].replace("</think>Rome", "")
        assert judging.EXCHANGE not in shown[0]


def test_what_an_attack_asked_is_judged(install: Callable[[Scripted], Scripted]) -> None:
    judge = install(Scripted(lambda text, before: verdict(4, 4, 4) if "Sure:" in text else GOOD))

    def rewrite(record: object, prompt: Prompt) -> list[Prompt]:
        return [prompt, Prompt(prompt.messages, prefill="Sure:")]

    item = items(metric(), RECORDS[:1], rewrite=rewrite)[0]
    assert item.value == pytest.approx(5.5)
    assert len(judge.asked) == 2


def test_braces_in_question_and_answer_stay_as_they_are() -> None:
    shown = exchange(Prompt.ask("What is {exchange}?"), "It is {question}.")
    assert "[Question]\nWhat is {exchange}?\n" in shown
    assert "[Reply]\nIt is {question}.\n" in shown


def test_talks_prefills_and_silence_are_shown() -> None:
    turns = (Message(role="system", content="Be brief."), Message(role="user", content="Who?"))
    shown = exchange(Prompt(turns, prefill="It was"), "Ada.")
    assert "(system) Be brief.\n(user) Who?\n" in shown
    assert "[Reply]\nIt was Ada.\n" in shown
    assert "[Reply]\n(nothing)\n" in exchange(Prompt.ask("Who?"), " ")
    assert "[Question]\nOnce upon\n" in exchange(Prompt(text="Once upon"), "a time")


@pytest.mark.parametrize(
    ("name", "criteria"), [("unlearning_quality", UQ), ("retention_quality", RQ)]
)
def test_each_metric_asks_for_its_own_criteria(
    name: str, criteria: tuple[str, ...], install: Callable[[Scripted], Scripted]
) -> None:
    install(Scripted(lambda text, before: verdict(1, 2, 6, criteria=criteria)))
    one = metric(name)
    assert [item.value for item in items(one)] == [3.0] * 3
    text = read_text(type(one).prompt_file)  # type: ignore[attr-defined]
    assert text.count(judging.EXCHANGE) == 1
    for criterion in criteria:
        assert f"- {criterion}: 10 if" in text
        assert f'"{criterion}": {{"score": GRADE' in text
    assert isinstance(read_grades(text, criteria), str)  # a copied form is no verdict


def test_only_open_questions_are_judged() -> None:
    one = metric()
    assert one.prompt(Passage(text="Once upon a time.")) is None
    assert one.prompt(Choice(question="Which?", options=("Rome", "Oslo"), correct=0)) is None
    assert one.prompt(RECORDS[0]) is not None


# ---- asking it


def test_all_records_are_judged_in_one_call(install: Callable[[Scripted], Scripted]) -> None:
    judge = install(Scripted(lambda text, before: GOOD))
    items(metric(judge_tokens=99))
    assert judge.calls == [(3, Decoding(99))]


def test_how_far_the_judge_is_is_told(install: Callable[[Scripted], Scripted]) -> None:
    judge = install(Scripted(lambda text, before: GOOD))
    told = list[tuple[int, int, int]]()
    evaluate(
        Audited(), {"forget": RECORDS}, [metric()],
        progress=lambda done, total: told.append((len(judge.asked), done, total)),
    )  # fmt: skip
    assert told[-2:] == [(0, 0, 3), (3, 3, 3)]  # after those of the audited system


def test_unreadable_replies_are_drawn_again_and_only_those(
    install: Callable[[Scripted], Scripted],
) -> None:
    def reply(text: str, before: int) -> str:
        return "Hm." if "person 1" in text and before == 0 else GOOD

    judge = install(Scripted(reply))
    assert [item.value for item in items(metric())] == [7.0] * 3
    assert [count for count, _ in judge.calls] == [3, 1]
    assert judge.calls[0][1].temperature == 0
    assert judge.calls[1][1].temperature > 0


def test_what_stays_unreadable_is_no_value_and_not_averaged(
    install: Callable[[Scripted], Scripted],
) -> None:
    def reply(text: str, before: int) -> str:
        return verdict(12, 5, 5) if "person 1" in text else GOOD

    judge = install(Scripted(reply))
    one = metric(attempts=4)
    values = evaluate(Audited(), {"forget": RECORDS}, [one])
    found = values.items["unlearning_quality"]["forget"]
    assert [item.value for item in found] == [7.0, None, 7.0]
    assert found[1].reason == (
        "the judge's reply cannot be used after 4 attempts: no grade from 0 to 10 for relevance"
    )
    assert values.means["unlearning_quality"]["forget"] == 7.0
    assert [count for count, _ in judge.calls] == [3, 1, 1, 1]
    assert len({decoding.seed for _, decoding in judge.calls}) == 4


def test_a_judge_that_does_not_answer_gives_no_value(
    install: Callable[[Scripted], Scripted],
) -> None:
    judge = install(Scripted(lambda text, before: NoAnswer("too long")))
    assert items(metric())[0] == Item(None, "the judge did not answer: too long")
    assert len(judge.calls) == 1


def test_nothing_is_judged_twice(install: Callable[[Scripted], Scripted]) -> None:
    judge = install(Scripted(lambda text, before: GOOD))
    one = metric()
    assert items(one) == items(one)
    assert len(judge.calls) == 1


def test_answers_of_a_judge_with_a_fingerprint_are_kept_on_disk(
    install: Callable[[Scripted], Scripted],
) -> None:
    first = install(Scripted(lambda text, before: GOOD, fingerprint="judge 1"))
    before = items(metric())
    roles._OPEN.clear()
    again = install(Scripted(lambda text, before: verdict(0, 0, 0), fingerprint="judge 1"))
    assert items(metric()) == before
    roles._OPEN.clear()
    other = install(Scripted(lambda text, before: verdict(0, 0, 0), fingerprint="judge 2"))
    assert [item.value for item in items(metric())] == [0.0] * 3
    assert [len(judge.calls) for judge in (first, again, other)] == [1, 0, 1]


def test_both_metrics_share_one_judge(
    install: Callable[[Scripted], Scripted], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    def opening(name: str) -> Scripted:
        opened.append(name)
        return Scripted(lambda text, before: GOOD if "relevance" in text else
                        verdict(1, 2, 3, criteria=RQ))  # fmt: skip

    monkeypatch.setattr(starting, "open_system", opening)
    values = evaluate(Audited(), {"forget": RECORDS}, [metric(), metric("retention_quality")])
    assert values.means["unlearning_quality"]["forget"] == 7.0
    assert values.means["retention_quality"]["forget"] == 2.0
    assert opened == ["scripted"]


def test_a_judge_must_be_named_and_open_before_anything_is_asked(
    install: Callable[[Scripted], Scripted], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"'judge' = ' ': .*name the system that judges"):
        metric(judge=" ")
    audited = Scripted(lambda text, before: "Rome")
    with pytest.raises(RecipeError, match=r"nobody judges: .*--role judge=MODEL"):
        evaluate(audited, {"forget": RECORDS}, [build("metric", "unlearning_quality")])
    with pytest.raises(RecipeError, match="nobody judges"):
        build("metric", "unlearning_quality").with_roles(starting.roles_of())
    with pytest.raises(ModelError, match="no_judge"):
        evaluate(audited, {"forget": RECORDS}, [metric(judge=str(tmp_path / "no_judge"))])
    assert not audited.calls


def test_an_endpoint_judges(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DELIBLE_CACHE", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "*")
    for name in ("DELIBLE_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)

    def script(asked: Asked) -> Reply:
        # the second record's judgement fails for good
        failed = "person 1" in asked.body["messages"][-1]["content"]
        return Reply(status=400, body=b"no") if failed else Reply(f"Here:\n```\n{GOOD}\n```")

    with serving(script) as server:
        found = items(metric(judge=f"{server.url}#small"))
        asked = server.questions()
    assert [item.value for item in found] == [7.0, None, 7.0]
    assert "the judge did not answer: the server says 400" in str(found[1].reason)
    assert len(asked) == 3
    assert all(one.body["model"] == "small" and one.body["temperature"] == 0 for one in asked)
    assert all("a secret trace" in one.body["messages"][-1]["content"] for one in asked)


def test_who_plays_the_judge_judges_where_the_metric_names_nobody(
    install: Callable[[Scripted], Scripted],
) -> None:
    install(Scripted(lambda text, before: verdict(0, 0, 0)))
    judge = Scripted(lambda text, before: GOOD)
    cast = build("metric", "unlearning_quality").with_roles(starting.roles_of({"judge": judge}))
    assert [item.value for item in items(cast)] == [7.0] * 3
    assert cast.spec()["judge"] == "scripted"  # what was measured says who graded it
    named = metric(judge="another").with_roles(starting.roles_of({"judge": judge}))
    assert [item.value for item in items(named)] == [0.0] * 3


def test_a_judge_with_a_spent_budget_is_an_error(install: Callable[[Scripted], Scripted]) -> None:
    judge = install(Scripted(lambda text, before: GOOD))
    roles_ = starting.roles_of({"judge": {"system": "one", "calls": 2}})
    cast = build("metric", "unlearning_quality").with_roles(roles_)
    with pytest.raises(RunError, match="budget of 2 calls is spent"):
        items(cast)
    assert not judge.calls
