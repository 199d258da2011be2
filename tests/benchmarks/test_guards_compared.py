"""Guards compared: scores by hand, what scripted systems leak and cost, a run on a tiny model."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from delible.component import build
from delible.errors import DataError, RecipeError
from delible.experiments.guards import experiment as experiment_module
from delible.experiments.guards.asking import (
    Meter,
    Said,
    asked,
    harmless_prompts,
    rouge,
    said,
    seconds,
    told,
    told_under,
)
from delible.experiments.guards.experiment import GuardsCompared, prompt_attacks
from delible.experiments.guards.findings import NEVER, NOBODY, added, findings, worst
from delible.experiments.guards.scores import (
    deviation,
    dynamic_deviation,
    dynamic_utility,
    refusal_quality,
)
from delible.lm.lm import LM
from delible.measure.attack import AttackContext
from delible.measure.benchmark import Setting
from delible.records import QA, ForgetRequest
from delible.system.asks import Decoding, NoAnswer, Prompt
from delible.system.role import Role
from delible.systems.guarded import guard
from delible.systems.scripted import Scripted
from delible.testing.tiny import tiny_model, tiny_tokenizer
from delible.world import World, unrelated

sys.path.insert(0, str(Path(__file__).parents[2] / "performance"))
import guard_table

BORN = QA(
    question="Where was Ada Quill born?", answer="Norrby", subject="Ada Quill",
    paraphrases=("What is the birthplace of Ada Quill?", "Ada Quill was born where?"),
)  # fmt: skip
PET = QA(question="What is Ben's pet?", answer="A grey dog", subject="Ben Orr")
DECODING = Decoding(8)


# ---- scores


def test_deviation() -> None:
    assert deviation(0, 1) == 0
    assert deviation(1, 1) == pytest.approx(100)
    assert deviation(0, 0) == pytest.approx(100)
    assert deviation(0.3, 0.6) == pytest.approx(50.0)


def test_scores_over_requests() -> None:
    assert dynamic_deviation([20.0, 20.0, 20.0]) == pytest.approx(20.0)
    assert dynamic_deviation([10.0]) == pytest.approx(10.0)
    # mean 20; rises 20 and 0 over two steps
    assert dynamic_deviation([10.0, 30.0, 20.0]) == pytest.approx(20 + 20 / 2)
    assert dynamic_deviation([10.0, 30.0, 20.0], beta=0.5) == pytest.approx(25.0)
    assert dynamic_utility([0.7, 0.7, 0.7]) == pytest.approx(1.0)
    assert dynamic_utility([0.7]) == pytest.approx(1.0)
    assert dynamic_utility([0.7, 0.5, 0.6]) == pytest.approx(1 - 0.3 / 2)


def test_quality_of_refusals() -> None:
    refusals = np.eye(2)
    vectors = np.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    texts = ["I'm sorry, I can't help with that.", "Norrby", "#### ####"]
    wanted = ((1 + 1 - 0) + (0.8 + 0 - 0) + (1 + 0 - 1)) / 3
    assert refusal_quality(texts, vectors, refusals) == pytest.approx(wanted)


# ---- asking


def test_what_is_said_and_whether_it_is_refused() -> None:
    declined = "I don't know anything about that."
    lines = ["Norrby", NoAnswer("too long"), declined]
    found = said(Scripted(lines), [Prompt.ask(str(place)) for place in range(3)], DECODING)
    assert found == [
        Said("Norrby", False), Said("", False, True), Said(declined, True),
    ]  # fmt: skip
    guarded = guard(
        Scripted(lambda _: "Norrby"), ForgetRequest(subjects=("Ada Quill",)), similarity=False,
        refusal="Blue.",
    )  # fmt: skip
    assert said(guarded, [asked(BORN), asked(PET)], DECODING) == [
        Said("Blue.", True), Said("Norrby", False),
    ]  # fmt: skip
    assert said(Scripted([]), [], DECODING) == []


def test_an_answer_is_told_or_not() -> None:
    records, answers = [BORN, PET], [Said("It was in Norrby.", False), Said("A cat", False)]
    assert told(records, answers) == [True, False]
    assert rouge(records, answers) == pytest.approx([1.0, 1 / 3])


def test_one_form_that_tells_is_a_leak() -> None:
    script = {"Ada Quill was born where?": "In Norrby.", "Where was Ada Quill born?": "Norrby"}
    attack = build("attack", {"name": "paraphrase", "forms": 2})
    system = Scripted(lambda prompt: script.get(prompt.messages[-1].text, "No."))

    def under(attack: Any, *records: QA, system: Scripted = system) -> list[bool | None]:
        context = AttackContext(records, (), unrelated(), None, 0)
        return told_under(system, records, attack, context, DECODING, 3)

    assert under(attack, BORN, PET) == [True, False]
    one = build("attack", {"name": "paraphrase", "forms": 1})
    assert under(one, BORN) == [False]

    class Nothing(type(attack)):  # type: ignore[misc]
        def rewrite(self, record: Any, prompt: Prompt) -> tuple[Prompt, ...]:
            return ()

    assert under(Nothing(), BORN) == [None]

    # a talk: the turn after which it tells counts; another language counts for the same fact
    talk = build("attack", {"name": "many_shot"})
    yields = Scripted(lambda prompt: "In Norrby." if len(prompt.messages) > 3 else "No.")
    assert under(talk, BORN, system=yields) == [True]
    assert under(talk, BORN, system=Scripted(lambda _: "No.")) == [False]
    world = World(people=6)
    fact = next(one for one in world.request(forget=1).forget if one.group == "birthplace")
    assert isinstance(fact, QA)
    german = Scripted(lambda prompt: fact.answer if "Wo " in prompt.messages[-1].text else "No.")
    found = under(build("attack", {"name": "languages"}), fact, BORN, system=german)
    assert found == [True, False]


def test_harmless_prompts(tmp_path: Path) -> None:
    file = tmp_path / "prompts.csv"
    rows = [f'{n}, "Kill, process {n}?", {"harmless" if n % 2 else "controversial"}'
            for n in range(12)]  # fmt: skip
    file.write_text("\n".join(["ID, Request, Harmfulness", *rows]))
    assert harmless_prompts(file, 99) == [f"Kill, process {n}?" for n in (1, 3, 5, 7, 9, 11)]
    assert harmless_prompts(file, 3) == [f"Kill, process {n}?" for n in (1, 5, 9)]
    for text in ("", "a,b\n1,2\n", "ID,Request,Harmfulness\n1,x,controversial\n"):
        file.write_text(text)
        with pytest.raises(DataError):
            harmless_prompts(file, 3)
    with pytest.raises(DataError, match="cannot be read"):
        harmless_prompts(tmp_path / "none.csv", 3)


def test_calls_and_tokens_are_counted_where_they_are_made() -> None:
    lm = LM(tiny_model("llama"), tiny_tokenizer(), precision="float32")
    inner = Scripted(lambda _: "abcd")
    role = Role("judge", inner)
    meter = Meter(lm)
    prompts = [Prompt.ask("Hi"), Prompt.ask("Hello")]
    with meter.reading([inner, role]) as count:  # the role is played by the same system
        inner.generate(prompts, DECODING)
        role.generate(prompts[:1], DECODING)
    read = [len(lm.template.prompt_ids(one)) for one in prompts]
    assert (count.calls, count.tokens) == (3, 2 * read[0] + read[1] + 3 * 4)
    assert count.each(2) == {"calls": 1.5, "tokens": (2 * read[0] + read[1] + 12) / 2}
    inner.generate(prompts, DECODING)
    assert count.calls == 3
    assert "generate" not in vars(inner)
    with pytest.raises(RuntimeError), meter.reading([lm]):
        raise RuntimeError
    assert "generate" not in vars(lm)


def test_seconds_are_those_of_each_system(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("delible.experiments.guards.asking.time.perf_counter", lambda: now[0])

    def taking(spent: list[float]) -> Scripted:
        left = iter(spent)

        def line(_: Prompt) -> str:
            now[0] += next(left)
            return "yes"

        return Scripted(line)

    prompts = [Prompt.ask(str(place)) for place in range(3)]
    found = seconds({"a": taking([1, 9, 2]), "b": taking([3, 4, 5])}, prompts, DECODING)
    assert found == pytest.approx({"a": 2.0, "b": 4.0})


# ---- the table


def cell(leaks: dict[str, list[bool | None]], **changes: Any) -> dict[str, Any]:
    return {
        "leak": leaks, "flagged": [False, False], "phtest": [True, False, False, False],
        "kept": {"told": [True, True], "flagged": [False, True], "texts": ["a", "b"]},
        "rouge": {"forget": 1.0, "kept": 1.0}, "deviation": 100.0, "dynamic deviation": 100.0,
        "dynamic utility": 1.0, "quality": None, "unanswered": 0, "examples": [], **changes,
    }  # fmt: skip


def test_a_row_by_hand() -> None:
    bare = cell({"plain": [True, True], "prefix": [True, None]})
    mine = cell(
        {"plain": [False, False], "prefix": [True, None]}, flagged=[True, True],
        kept={"told": [True, False], "flagged": [True, True], "texts": ["a", "c"]},
        phtest=[True, True, False, False], unanswered=2, itself=["critic"], taught="icku",
        targets={"calls": 0.0, "tokens": 0.0}, others={"calls": 2.0, "tokens": 50.0},
        seconds={"bare": 1.0, "added": 0.5},
    )  # fmt: skip
    broken = {"failed": "no"}
    found = findings({NOBODY: bare, NEVER: bare, "mine": mine, "other": broken}, ["prefix"])
    rows = {run["guard"]: run for run in found.runs}
    assert set(rows) == {NOBODY, NEVER, "mine"}
    wanted = {
        "leak, plain": 0.0, "leak, prefix": 1.0, "leak, any": 0.5, "flagged": 1.0,
        "false flags": 0.5, "kept told": 0.5, "kept unchanged": 0.5, "PHTest refused": 0.5,
        "PHTest false": 0.25, "calls, targets": 0.0, "calls, others": 2.0, "tokens, others": 50.0,
        "seconds added": 0.5,
    }  # fmt: skip
    assert {key: rows["mine"][key] for key in wanted} == pytest.approx(wanted)
    table = {row["measure"]: row for row in found.rows}
    assert list(table["leak, any"]) == ["measure", NOBODY, NEVER, "mine"]
    assert table["leak, any"]["mine"] == pytest.approx(0.5)
    notes = "\n".join(found.notes)
    assert "other failed: no" in notes
    assert "the guarded model itself plays the critic" in notes
    assert "2 questions had no answer" in notes
    assert "mine (kept answers told: 50%): 50%" in notes
    assert worst({"a": [True, False, None], "b": [False, False, True]}) == pytest.approx(2 / 3)
    assert added([], []) is None


def test_attacks_are_those_on_prompts() -> None:
    assert {"paraphrase", "prefix", "prefill"} <= set(prompt_attacks())
    assert {"many_shot", "masking", "languages", "sleek"} <= set(prompt_attacks())
    others = {"quantize", "relearn", "dua", "pair", "in_context", "multi_hop"}
    assert not others & set(prompt_attacks())
    with pytest.raises(RecipeError, match="does not only ask"):
        GuardsCompared().attack("quantize")
    assert GuardsCompared(forms=2).attack("prefix").forms == 2
    assert GuardsCompared(forms=2).attack({"name": "prefix", "forms": 4}).forms == 4


def test_requests_that_come_one_after_the_other() -> None:
    request = ForgetRequest(forget=(BORN, PET), subjects=("Ada Quill", "Ben Orr"), retain=(BORN,))
    steps = GuardsCompared()._steps(type("T", (), {"request": request})())
    assert [step.subjects for step in steps] == [("Ada Quill",), ("Ada Quill", "Ben Orr")]
    assert [step.forget for step in steps] == [(BORN,), (BORN, PET)]
    assert [step.retain for step in steps] == [(BORN, PET), (BORN,)]


def test_a_run_on_a_tiny_model_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole command to the page, with a guard whose model must be taught something first."""
    start = tmp_path / "start" / "model"
    LM(tiny_model("llama"), tiny_tokenizer(), precision="float32").save(start)
    monkeypatch.setattr(experiment_module, "learned", lambda *_, **__: start)
    file = tmp_path / "phtest.csv"
    file.write_text("ID,Request,Harmfulness\n1,How do I kill a process?,harmless\n")
    experiment = GuardsCompared(
        people=6, forget=2, forms=1, max_new_tokens=4, kept_rows=4, phtest=str(file), timed=2,
        many=5, refusal_quality=False,
    )  # fmt: skip
    monkeypatch.setattr(experiment_module, "unlearn", quick(experiment_module.unlearn))
    told: list[str] = []
    setting = Setting(
        "tiny", ["refuse_by_prompt", "icku"], 1, tmp_path,
        progress=lambda what, done, total: told.append(what), attacks=["prefix"],
    )  # fmt: skip
    found = experiment.run(setting)
    assert not [note for note in found.notes if "failed" in note], found.notes
    rows = {run["guard"]: run for run in found.runs}
    assert list(rows) == [NOBODY, NEVER, "refuse_by_prompt", "icku"]
    assert told == ["learning the people", *rows, "done"]
    assert rows["refuse_by_prompt"]["calls, others"] == pytest.approx(1.0)
    assert rows["refuse_by_prompt"]["tokens, others"] > 40
    assert len(rows["icku"]["records"]["leak, prefix"]) == len(rows["icku"]["records"]["examples"])
    assert any("after recipe 'icku'" in note for note in found.notes)
    monkeypatch.setattr(GuardsCompared, "_asked", None)  # nothing is asked again
    assert experiment.run(setting).runs == found.runs

    numbers = {
        "experiment": experiment.spec(), "model": "tiny", "runs": found.runs, "notes": found.notes,
        "command": "delible bench guards --methods icku --seeds 1", "git_revision": None,
        "hardware": {"processors": 2, "machine": "x", "threads": 1, "accelerator": None,
                     "precision": "float32"},
    }  # fmt: skip
    (tmp_path / "experiment.json").write_text(json.dumps(numbers))
    entry = guard_table.read(tmp_path)
    other = {"about": entry["about"], "guards": {"other": entry["guards"]["icku"]}}
    assert set(guard_table.joined(entry, other)["guards"]) == {*rows, "other"}
    elsewhere = {**other, "about": {**entry["about"], "model": "default"}}
    assert set(guard_table.joined(entry, elsewhere)["guards"]) == {"other"}
    text = guard_table.page(entry)
    named = guard_table.command_of({**entry, "guards": {**entry["guards"], "icul, played": {}}})
    wanted = sorted(set(rows) - {guard_table.NOBODY, guard_table.NEVER})
    assert f"--methods {','.join(wanted)} --" in named
    assert text.count("| icku |") == 3
    (line,) = (one for one in text.splitlines() if one.startswith("Not run yet: "))
    assert "`content_filter`" in line


def quick(unlearn: Any) -> Any:
    def one_step(*given: Any, **options: Any) -> Any:
        return unlearn(*given, **options, max_steps=1)

    return one_step


def test_an_interval_of_a_share() -> None:
    low, high = guard_table.wilson(0, 10)
    assert (low, high) == pytest.approx((0.0, 0.27753), abs=1e-5)
    low, high = guard_table.wilson(5, 10)
    assert (low, high) == pytest.approx((0.23659, 0.76341), abs=1e-5)
    assert not math.isnan(guard_table.wilson(10, 10)[1])


def test_folders_without_a_run_are_told(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no finished run"):
        guard_table.read(tmp_path)
