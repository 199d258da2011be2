"""``delible unlearn`` on a tiny model: what it prints, what it leaves, what it refuses."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from delible import watching
from delible.cli import output, tables
from delible.cli.data import _columns
from delible.cli.options import chosen_slots, option_value

QUICK = ("--max-steps", "2", "--batch-size", "2", "--learning-rate", "1e-3")


@pytest.fixture
def words(tiny: Path) -> list[str]:
    return ["unlearn", str(tiny), "--forget", "forget.jsonl", "--retain", "retain.jsonl", *QUICK]


def the_run(here: Path) -> Path:
    (folder,) = (here / "runs").iterdir()
    return folder


def test_end_to_end_and_again(run: Any, here: Path, words: list[str], tiny: Path) -> None:
    done = run(*words, "--objective.beta", "0.2", "--with", "sam", "--npo-unused=1")
    assert done.code == 2
    assert "--npo-unused" in done.err
    assert not (here / "runs").exists()

    command = [*words, "--objective.beta", "0.2", "--with", "sam", "--seed", "3"]
    done = run(*command)
    assert (done.code, done.err) == (0, "")
    folder = the_run(here)
    for part in (
        "3 forget rows, 5 retain rows", "npo (objective npo, keep nll, harden sam)",
        "2 steps at most, learning rate 0.001", "step 2/2  forget ", "tokens/s", "before",
        "Town of person 0?", "parameters were trained, 2 steps", f"delible audit {folder.name}",
    ):  # fmt: skip
        assert part in done.out.replace("runs/", ""), part
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["run"]["method"]["objective"] == {"name": "npo", "beta": 0.2}
    assert manifest["run"]["seed"] == 3
    assert list((folder / "model").glob("*.safetensors"))

    from transformers import AutoModelForCausalLM

    found = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    start = AutoModelForCausalLM.from_pretrained(tiny).state_dict()
    assert any(not value.equal(start[name]) for name, value in found.items())

    again = run(*command)
    assert again.code == 0
    assert "holds this run already" in again.out
    assert "step 1/2" not in again.out
    assert the_run(here) == folder, "the same command has the same folder"


def test_of_several_processes_only_the_first_keeps_and_tells(
    run: Any, here: Path, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    done = run(*words, "--out", "run")
    assert (done.code, done.err) == (0, "")
    assert "The result lies in" not in done.out
    assert not (here / "run" / "artefact.yaml").exists()


def test_another_run_in_the_same_folder_is_refused(run: Any, here: Path, words: list[str]) -> None:
    assert run(*words, "--out", "mine").code == 0
    before = (here / "mine" / "manifest.json").read_bytes()
    done = run(*words, "--out", "mine", "--seed", "1")
    assert done.code == 2
    assert "mine: this folder holds another run (different: seed)" in done.err
    assert (here / "mine" / "manifest.json").read_bytes() == before
    (here / "taken").mkdir()
    (here / "taken" / "file").touch()
    done = run(*words, "--out", "taken")
    assert done.code == 2
    assert "taken: this path exists and is not a run directory" in done.err


def test_a_second_writer_of_the_same_folder_is_refused(
    run: Any, process: Any, here: Path, words: list[str]
) -> None:
    import filelock

    (here / "mine").mkdir()
    with filelock.FileLock(here / "mine" / ".lock"):
        done = process(*words, "--out", "mine")
    assert done.code == 2
    assert "mine: another process is writing this run. Wait until it ends" in done.err
    assert [path.name for path in (here / "mine").iterdir()] == [".lock"]
    assert run(*words, "--out", "mine").code == 0
    assert not (here / "mine" / ".lock").exists()


def test_dry_run_prints_a_recipe_that_can_be_given_back(
    run: Any, here: Path, words: list[str]
) -> None:
    done = run(*words, "--dry-run", "--beta", "0.3", "--place", "lora")
    assert done.code == 0
    recipe = yaml.safe_load(done.out)
    assert recipe["objective"] == {"name": "npo", "beta": 0.3}
    assert recipe["place"]["name"] == "lora"
    assert recipe["training"]["max_steps"] == 2
    for part in ("steps ", "trainable", "memory", "time", "Nothing was trained"):
        assert part in done.err
    told = [line for line in done.err.splitlines() if line.endswith((" GiB", " 2", "at most"))]
    assert {"steps", "memory", "activations"} <= {line.split()[0] for line in told}
    assert len({len(re.match(r" *\S+ +", line)[0]) for line in told}) == 1, told  # type: ignore[index]
    assert not (here / "runs").exists()
    (here / "mine.yaml").write_text(done.out, encoding="utf-8")
    again = run(*words[:6], "--method", "mine.yaml", "--dry-run")
    assert yaml.safe_load(again.out) == recipe


def test_the_folder_follows_data_and_options(run: Any, here: Path, words: list[str]) -> None:
    from delible.cli.unlearn import _folder
    from delible.loaders import build_request
    from delible.resolving import resolve_method

    request = build_request(forget="forget.jsonl")
    spec = resolve_method("npo").spec()

    def folder(**other: Any) -> Path:
        told = {
            "spec": spec, "model": "m", "request": request, "seed": 0, "anchor": None,
            "reference": None, "refusals": None, "generator": None, "generated": None,
            "roles": None,
        }  # fmt: skip
        return _folder(**{**told, **other})

    first = folder()
    assert first == folder(request=build_request(forget="forget.jsonl"))
    assert first.name.startswith("npo-")
    others = {
        folder(model="n"),
        folder(seed=1),
        folder(reference="r"),
        folder(anchor="r"),
        folder(refusals=["No."]),
        folder(request=build_request(forget="retain.jsonl")),
        folder(spec=resolve_method("npo", options={"beta": 0.2}).spec()),
        folder(generator="self"),
        folder(generated=Path("rows")),
    }
    assert len(others - {first}) == 9


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.2", 0.2), ("1e-5", 1e-5), ("-3", -3), ("true", True), ("null", None), ("full", "full"),
        ("[1, 2]", [1, 2]), ("a: b: c", "a: b: c"), ("0.5,1", "0.5,1"),
    ],
)  # fmt: skip
def test_values_are_read_as_yaml(text: str, value: object) -> None:
    found = option_value(text)
    assert found == value
    assert type(found) is type(value)


def test_components_find_their_slot() -> None:
    assert chosen_slots({"keep": "kl", "place": None}, ["sam,wagle"]) == {
        "keep": "kl", "harden": "sam", "place": "wagle"
    }  # fmt: skip
    assert chosen_slots({"objective": "{name: npo, beta: 0.4}"}, []) == {
        "objective": {"name": "npo", "beta": 0.4}
    }


def test_columns_are_known_then_theirs() -> None:
    assert _columns(["question = prompt", "answer=a=b"]) == {"question": "prompt", "answer": "a=b"}


def test_a_bar_on_a_terminal_shows_losses_speed_and_steps() -> None:
    from rich.console import Console

    reporter = output.Reporter()
    screen = io.StringIO()
    reporter.console = Console(file=screen, force_terminal=True, width=120, color_system=None)
    report = reporter.progress("learning")
    for step in range(1, 5):
        report(step, 4, {"forget_loss": 1.5, "keep_loss": 0.25, "tokens_per_second": 1234.0})
        if step == 2:
            reporter.say("a sentence between")
    shown = screen.getvalue()
    for part in ("learning", "4/4", "forget 1.500", "keep 0.250", "1,234 tokens/s", "a sentence"):
        assert part in shown
    assert reporter._bar is None


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the time is, in a list of one."""
    now = [100.0]
    monkeypatch.setattr(watching.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_a_stage_is_told_every_twenty_seconds(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    reporter = output.Reporter()
    for done in range(40, 101):  # 40 answers were there before
        reporter.stage("measuring", done, 100)
        clock[0] += 5
    assert capsys.readouterr().out.splitlines() == [
        "  measuring",
        *(
            f"  measuring  {done}/100  {watching.duration(5 * (100 - done))} left"
            for done in range(44, 100, 4)
        ),
    ]


def test_a_stage_that_begins_to_count_anew_is_timed_anew(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    reporter = output.Reporter()
    for step in range(1, 21):  # an attack that trains ...
        clock[0] += 10
        reporter.stage("relearning", step, 20)
    trained = capsys.readouterr().out.splitlines()
    assert trained[0] == "  relearning"
    assert trained[1] == "  relearning  3/20  3 min left"
    for done in range(0, 300, 30):  # ... and is then measured
        reporter.stage("relearning", done, 300)
        clock[0] += 15
    assert capsys.readouterr().out.splitlines() == [
        f"  relearning  {done}/300  {watching.duration((300 - done) / 2)} left"
        for done in (60, 120, 180, 240)
    ]


def test_without_a_terminal_slow_steps_are_told_one_by_one(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    report = output.Reporter().progress("learning")
    for step in range(1, 201):
        report(step, 200, {"forget_loss": 1.5})
        clock[0] += 12 if step < 20 else 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "learning  step 1/200  forget 1.500",
        "learning  step 3/200  forget 1.500  39 min left",
        "learning  step 5/200  forget 1.500  39 min left",
    ]
    assert len(lines) == 1 + 9 + 10


def test_work_that_is_over_soon_is_not_told(clock: list[float]) -> None:
    told: list[tuple[str, int, int]] = []

    def stage(*what: Any) -> None:
        told.append(what)

    for part in watching.watched([[1, 2], [3, 4], [5]], "quick", 5, stage):
        clock[0] += 1.5
        assert part
    assert told == []
    for _ in watching.watched([[1, 2], [3, 4], [5]], "slow", 5, stage):
        clock[0] += 4
    assert told == [("slow", 4, 5), ("slow", 5, 5)]


def test_what_was_there_before_says_nothing_about_the_time_left(clock: list[float]) -> None:
    remaining = watching.Remaining()
    assert remaining.after(4, 6) == ""
    clock[0] += 120
    assert remaining.after(1, 5) == "; 10 min left"
    clock[0] += 60
    assert remaining.after(2, 3) == "; 3 min left"
    clock[0] += 60
    assert remaining.after(3, 0) == ""


def test_a_bar_ends_when_other_work_begins() -> None:
    from rich.console import Console

    reporter = output.Reporter()
    screen = io.StringIO()
    reporter.console = Console(file=screen, force_terminal=True, width=120, color_system=None)
    report = reporter.progress("learning")
    reporter.stage("gradients", 3, 9)
    report(1, 4, {"forget_loss": 1.5})
    reporter.finish_bar()
    assert "gradients" in screen.getvalue()
    assert "learning" in screen.getvalue()
    assert "forget 1.500" in screen.getvalue()


def test_without_a_terminal_long_runs_are_told_in_few_lines(
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = output.Reporter().progress("learning")
    for step in range(1, 1001):
        report(step, 1000, {"forget_loss": 1.5})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11
    assert lines[-1] == "learning  step 1000/1000  forget 1.500"
    assert lines[5].endswith(" left")


def test_answers_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from delible.finishing import BeforeAfter

    said = "\x1b[2Jgone [red]not markup[/red]"
    reporter = output.Reporter()
    reporter.console.print(tables.before_after([BeforeAfter("forget", "q?", "a", said, "z" * 999)]))
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "[red]not markup[/red]" in " ".join(shown.split())
    assert shown.count("z") == tables.ANSWER_CHARACTERS - 1


def test_only_the_first_process_speaks(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setenv("RANK", "1")
    output.Reporter().say("hello")
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    output.Reporter().say("hello")
    assert capsys.readouterr().out == "hello\n"


def test_an_editor_in_a_file_is_a_method(tmp_path: Path) -> None:
    from delible.resolving import resolve_method

    path = tmp_path / "winner.yaml"
    path.write_text("editor: {name: rocr, tokens: 256}\n")
    editor = resolve_method(path)
    assert editor.card.name == "rocr"
    assert editor.spec()["tokens"] == 256
    assert resolve_method(path, options={"tokens": 512}).spec()["tokens"] == 512
