"""Every mistake is one message with exit code 2; nobody sees a traceback without --debug."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from delible.cli import main
from delible.cli.main import EXIT_BUG

BASE = ["unlearn", "MODEL", "--forget", "forget.jsonl", "--retain", "retain.jsonl"]


def one_message(done: Any, *parts: str) -> None:
    assert done.code == 2, done
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1, done.err
    assert "Traceback" not in done.err + done.out
    for part in parts:
        assert part in done.err


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["unlern"], ["unknown command 'unlern'. Did you mean 'unlearn'?"]),
        (["unlearn"], ["MODEL is missing", "delible unlearn --help"]),
        (["unlearn", "m"], ["nothing to forget", "--forget FILE"]),
        (["unlearn", "m", "--forget"], ["--forget has no value"]),
        (["unlearn", "m", "n", "--forget", "f"], ["'n' is one word too many"]),
        (["unlearn", "m", "--seed", "x", "--forget", "f"], ["'--seed' = 'x': a whole number"]),
        (["unlearn", "m", "--strength", "huge"], ["one of gentle, normal, strong"]),
        (["unlearn", "m", "--beta", "1", "--beta", "2"], ["'--beta' is given more than once"]),
        (["unlearn", "m", "--objective.beta"], ["--objective.beta has no value"]),
        (["report"], ["no run directory"]),
        (["report", "nowhere"], ["nowhere: is not a directory"]),
        (["audit", "m", "--metrics", "rouge"], ["unknown metric 'rouge'"]),
        (["audit", "m", "--attacks", "relern"], ["unknown attack 'relern'"]),
        (["audit", "m", "--guard", "nobody"], ["unknown guard 'nobody'"]),
        (["audit", "m", "--fail-if", "high"], ["this is no condition"]),
        (["audit", "m", "--fail-if", "forget.answer_probability>x"], ["this is no condition"]),
        (["audit", "m", "--fail-if", "forgot.answer_probability>1"], ["mean 'forget'?"]),
        (["audit", "m", "--fail-if", "forget.answer_probabilty>1"], ["mean 'answer_probability'?"]),
        (["audit", "m", "--fail-if", "verdict=incomplet"], ["mean 'incomplete'?"]),
    ],
)
def test_command_line(run: Any, words: list[str], parts: list[str]) -> None:
    one_message(run(*words), *parts)


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("missing.jsonl", None, ["missing.jsonl: no such file"]),
        ("broken.jsonl", '{"question": "a", "answer": "b"}\n{"question":\n', ["broken.jsonl:2:"]),
        ("noanswer.jsonl", '{"question": "a"}\n', ["noanswer.jsonl:1:", "missing: 'answer'"]),
        ("empty.jsonl", "", ["empty.jsonl: the file is empty"]),
    ],
)
def test_forget_file(run: Any, here: Path, name: str, content: Any, parts: list[str]) -> None:
    if content is not None:
        (here / name).write_text(content, encoding="utf-8")
    one_message(run("unlearn", "m", "--forget", name), *parts)


def test_overlap_of_forget_and_retain(run: Any) -> None:
    done = run("unlearn", "m", "--forget", "forget.jsonl", "--retain", "forget.jsonl")
    one_message(done, "3 rows are to be forgotten and also stand in retain", "--drop-overlap")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--method", "nppo"], ["unknown method 'nppo'. Did you mean 'npo'?"]),
        (["--method", "mine.yaml"], ["mine.yaml: no such recipe file"]),
        (["--betta", "1"], ["unknown option '--betta'. Did you mean '--beta'?"]),
        (["--strenght", "strong"], ["unknown option '--strenght'. Did you mean '--strength'?"]),
        (["--zzzzzz", "1"], ["unknown option '--zzzzzz'", "'delible show npo' lists them"]),
        (["--harden.beta", "1"], ["unknown option"]),
        (["--learning-rate", "7"], ["'learning_rate' = 7.0", "less than or equal to 1"]),
        (["--beta", "-1"], ["'beta' = -1"]),
        (["--harden", "sma"], ["unknown harden 'sma'. Did you mean 'sam'?"]),
        (["--with", "samm"], ["--with: unknown component 'samm'. Did you mean 'sam'?"]),
        (["--with", "all"], ["several slots", "--place all", "--select all"]),
        (["--with", "sam", "--harden", "none"], ["both are choices for the slot 'harden'"]),
        (["--strength", "strong", "--epochs", "3"], ["--strength sets epochs already"]),
        (["--column", "question"], ["'question' is no pair of columns"]),
        (["--refusals", "no.txt"], ["no.txt: no such file"]),
    ],
)
def test_method(run: Any, words: list[str], parts: list[str]) -> None:
    one_message(run(*BASE, *words), *parts)


def test_unreadable_models(run: Any, here: Path) -> None:
    (here / "MODEL").mkdir()
    (here / "MODEL" / "config.json").write_text("{}", encoding="utf-8")
    one_message(run(*BASE), "MODEL: the folder has a config.json but no weights")
    assert not (here / "runs").exists()


def test_audit_of_an_unfinished_run(run: Any, here: Path) -> None:
    (here / "half").mkdir()
    (here / "half" / "manifest.json").write_text('{"status": "running"}', encoding="utf-8")
    one_message(run("audit", "half"), "half: this run is not finished", "it resumes")
    (here / "half" / "manifest.json").write_text("{", encoding="utf-8")
    one_message(run("audit", "half"), "the manifest is broken")


def _fails_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("delible.loaders.build_request", fail)


def test_a_bug_is_one_line_and_debug_shows_where(run: Any, monkeypatch: Any) -> None:
    _fails_with(monkeypatch, ValueError("two\nlines"))
    done = run(*BASE)
    assert done.code == EXIT_BUG
    assert done.err.startswith("error: this is a bug in delible (ValueError: two lines).")
    assert done.err.count("\n") == 1
    assert "--debug" in done.err
    assert "Traceback" in run(*BASE, "--debug").err


def test_interrupted(run: Any, monkeypatch: Any) -> None:
    _fails_with(monkeypatch, KeyboardInterrupt())
    done = run(*BASE)
    assert (done.code, done.out.count("Traceback")) == (130, 0)
    assert "Run the same command again to resume." in done.err


def test_full_disk_and_memory_are_nobodys_bug(run: Any, monkeypatch: Any) -> None:
    _fails_with(monkeypatch, OSError(errno.ENOSPC, "No space left on device", "/x/model"))
    one_message(run(*BASE), "/x/model: the disk is full")
    for number, words in (
        (errno.EFBIG, "larger than this place allows"),
        (errno.EROFS, "read-only"),
    ):
        _fails_with(monkeypatch, OSError(number, "?", "/x/model"))
        one_message(run(*BASE), "/x/model: the fi", words)
        wrapped = ValueError("a library says so in its own way")
        wrapped.__cause__ = OSError(number, "?", "/x/model")
        _fails_with(monkeypatch, wrapped)
        one_message(run(*BASE), words)
    _fails_with(monkeypatch, MemoryError())
    one_message(run(*BASE), "the memory is not enough")
    _fails_with(monkeypatch, RuntimeError("DefaultCPUAllocator: can't allocate: out of memory"))
    one_message(run(*BASE), "the memory is not enough")


def test_markup_in_a_message_is_printed_as_it_is(run: Any) -> None:
    one_message(run("unlearn", "m", "--forget", "[bold]x[/bold].jsonl"), "[bold]x[/bold].jsonl")


def test_a_reader_that_leaves_is_no_error(process: Any) -> None:
    code = (
        "import subprocess, sys\n"
        "p = subprocess.Popen([sys.executable, '-m', 'delible', 'list', '--json'],"
        " stdout=subprocess.PIPE, stderr=subprocess.PIPE)\n"
        "p.stdout.read(1); p.stdout.close()\n"
        "print(p.wait(), p.stderr.read().decode())\n"
    )
    assert process(code=code).out.strip() == "0"


def test_output_that_knows_few_characters_shows_like_ones(
    process: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "from delible.cli import output; output.plain_where_needed()\n"
        "report = output.Reporter()\n"
        "report.say('Zoë says “3 – 4” … ≥ 漢')\n"
        "report.console.print(output.table(('a', 'b'), [('x…', 'y')]))\n"
        "output.complain('café …')\n"
    )
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = process(code=code)
    assert done.code == 0, done.err
    assert done.out.startswith('Zoe says "3 - 4" ... >= ?')
    assert "x..." in done.out
    assert done.err == "error: cafe ...\n"
    assert process("unlearn", "--help").code == 0
    done = process("unlearn", "m", "--forget", "missing–file.jsonl")
    one_message(done, "missing-file.jsonl", "no such file")


def test_errors_of_the_process_are_the_same(process: Any) -> None:
    one_message(process("unlearn", "m", "--forget", "missing.jsonl"), "no such file")


def test_main_takes_the_words_of_the_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["delible", "unlern"])
    assert main() == 2
    assert "unlern" in capsys.readouterr().err
