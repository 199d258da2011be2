"""The file of targets: what is read, what is told of what cannot be, and what follows a change."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from delible.cli.main import main
from delible.errors import DataError
from delible.records import QA, Passage
from delible.system.asks import Decoding, Prompt
from delible.systems import targeted
from delible.systems.scripted import Scripted
from delible.systems.targeted import guard_by_targets
from delible.systems.targets import Reloading, Target, Targets, read_targets, write_targets

SENTINEL = "Zanzibar Quillfeather"
FULL = """# by hand
targets:
  - id: one
    names: [Ada Brook, Ada B. Brook]
    aliases: The Grey Fox
    description: She kept a lighthouse.
    records:
      - {question: "Where was Ada Brook born?", answer: Vellmar}
    asked_by: request 12
    until: 2030-01-31
  - id: two
    names: [Ben Orr]
"""


def written(folder: Path, text: str, name: str = "targets.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_says_everything(tmp_path: Path) -> None:
    found = read_targets(written(tmp_path, FULL))
    one, two = found.targets
    assert one.names == ("Ada Brook", "Ada B. Brook")
    assert (one.aliases, one.asked_by, one.until) == (
        ("The Grey Fox",), "request 12", date(2030, 1, 31)
    )  # fmt: skip
    assert one.records == (QA(question="Where was Ada Brook born?", answer="Vellmar"),)
    assert two == Target(id="two", names=("Ben Orr",))
    request = found.request()
    assert set(request.subjects) == {"Ada Brook", "Ada B. Brook", "The Grey Fox", "Ben Orr"}
    assert request.forget == (
        QA(question="Where was Ada Brook born?", answer="Vellmar", subject="Ada Brook"),
        Passage(text="She kept a lighthouse.", subject="Ada Brook"),
    )
    assert found.request(names=False).subjects == ("Ada Brook", "Ben Orr")
    assert found.aliases() == {"Ada Brook": ["Ada B. Brook", "The Grey Fox"]}


def test_the_last_day_counts() -> None:
    target = Target(id="one", names=("Ada",), until=date(2030, 1, 31))
    found = Targets(targets=(target,))
    assert [len(found.on(date(2030, month, day))) for month, day in ((1, 30), (1, 31), (2, 1))] == [
        1, 1, 0,
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["targets.yaml", "targets.jsonl"])
def test_what_is_written_is_read_again(tmp_path: Path, name: str) -> None:
    found = read_targets(written(tmp_path, FULL))
    write_targets(found, tmp_path / "again" / name)
    assert read_targets(tmp_path / "again" / name) == found


def test_records_may_lie_in_a_file_beside(tmp_path: Path) -> None:
    written(tmp_path, '{"question": "Where?", "answer": "There"}\n', "ada.jsonl")
    path = written(tmp_path, "- {id: one, names: [Ada], records: ada.jsonl}\n")
    assert read_targets(path).targets[0].records == (QA(question="Where?", answer="There"),)


@pytest.mark.parametrize(
    ("text", "name", "told"),
    [
        (
            "targets:\n- id: a\n  names: [Ada]\n- id: b\n  nmes: [S]\n",
            "t.yaml",
            "t.yaml:4: unknown",
        ),
        ("- id: a\n  names: [S]\n  until: S\n", "t.yaml", "t.yaml:1: 'until'"),
        ("- id: a\n  names: [S, '?']\n", "t.yaml", "t.yaml:1: 'names.2' has fewer"),
        ("- id: a\n  names: []\n", "t.yaml", "t.yaml:1: 'names'"),
        ("- id: a\n  names: [S]\n- id: a\n  names: [S]\n", "t.yaml", "t.yaml:3: the id of line 1"),
        ("- id: a\n  names: [S]\n  records: [{question: S}]\n", "t.yaml", "t.yaml:1: 'records'"),
        ("- S\n", "t.yaml", "t.yaml:1: is no target"),
        ("targets:\n- [\n", "t.yaml", "t.yaml:3: is no YAML"),
        ("S: 1\n", "t.yaml", "t.yaml:1: an unknown key"),
        ("S", "t.yaml", "no list of targets"),
        ("", "t.yaml", "holds no targets"),
        ('{"id": "a", "names": ["Ada"]}\n\n{"id": S\n', "t.jsonl", "t.jsonl:3: is no JSON"),
    ],
)
def test_what_is_wrong_is_told_by_place_and_not_by_content(
    tmp_path: Path, text: str, name: str, told: str
) -> None:
    path = written(tmp_path, text.replace("S", SENTINEL), name)
    with pytest.raises(DataError) as error:
        read_targets(path)
    assert told in str(error.value)
    assert SENTINEL not in str(error.value)
    assert error.value.__cause__ is None


def test_a_file_that_changes_is_read_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, days, used = written(tmp_path, FULL), [date(2030, 1, 31)], list[Any]()
    reloading = Reloading(path, len, used.append, lambda: days[-1])
    assert (used, reloading.poll()) == ([2], False)
    with caplog.at_level(logging.INFO):
        written(tmp_path, "")  # half of what is being written: nobody is let out
        assert not reloading.poll()
        written(tmp_path, "- {id: one, names: [Ada], aliases: [Fox]}\n")
        assert not reloading.poll()
        assert used == [2]
        assert reloading.poll()
        assert used == [2, 1]
        written(tmp_path, f"- id: one\n  nmes: [{SENTINEL}]\n")
        assert not reloading.poll()
        assert not reloading.poll()
        path.unlink()
        assert not reloading.poll()
    assert used == [2, 1]
    assert "the 1 old ones stay" in caplog.text
    assert "targets.yaml:1: unknown field 'nmes'" in caplog.text
    assert SENTINEL not in caplog.text
    written(tmp_path, FULL)
    assert not reloading.poll()
    assert reloading.poll()
    days.append(date(2030, 2, 1))
    assert reloading.poll()
    assert used == [2, 1, 2, 1]


def test_what_a_guard_says_of_its_targets_is_not_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def make(targets: Targets) -> None:
        if len(targets) == 1:
            raise DataError(f"cannot use {SENTINEL}")

    path = written(tmp_path, FULL)
    reloading = Reloading(path, make, lambda _: None)
    written(tmp_path, "- {id: one, names: [Ada]}\n")
    assert [reloading.poll() for _ in range(2)] == [False, False]
    assert "DataError" in caplog.text
    assert SENTINEL not in caplog.text


def test_no_request_is_dropped_while_targets_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targeted, "LOOK", 0.0)
    path = written(tmp_path, "- {id: one, names: [Ada Brook], aliases: [Grey Fox]}\n")
    inner = Scripted(lambda prompt: "Of course.")
    system = guard_by_targets(inner, path, similarity=False, refusal="No.")
    before = system.fingerprint, system.mind

    async def ask(text: str) -> str:
        return (await system.respond(Prompt.ask(text), Decoding(4))).text

    async def run() -> AsyncIterator[str]:
        yield await ask("Who is the grey fox?")
        yield await ask("Who is Ben Orr?")
        written(tmp_path, "- {id: two, names: [Ben Orr]}\n")
        asks = [asyncio.create_task(ask(f"How is weather {number}?")) for number in range(20)]
        assert set(await asyncio.gather(*asks)) == {"Of course."}
        while system.mind is before[1]:
            await ask("And now?")
            await asyncio.sleep(0.01)
        yield await ask("Who is the grey fox?")
        yield await ask("Who is Ben Orr?")

    async def every() -> list[str]:
        return [text async for text in run()]

    assert asyncio.run(every()) == ["No.", "Of course.", "Of course.", "No."]


def test_targets_change_while_it_serves_in_the_file_too(tmp_path: Path) -> None:
    path = written(tmp_path, FULL)
    system = guard_by_targets(
        Scripted(lambda _: "Of course."), path, similarity=False, refusal="No."
    )

    async def asked(text: str) -> str:
        return (await system.respond(Prompt.ask(text), Decoding(4))).text

    async def every() -> None:
        assert await system.change_targets([SENTINEL], ["the grey fox"]) == 2
        assert await asked(f"Who is {SENTINEL}?") == "No."
        assert await asked("Who is Ada Brook?") == "Of course."
        assert await system.change_targets([SENTINEL.upper()], []) == 2, "it is one already"
        kept = path.read_bytes()
        for add, remove, said in (
            (["Cy Umber"], ["Nobody Here"], "number 1 of those to remove is no target"),
            (["Cy Umber", "x"], [], "number 2 of those to add has fewer than two letters"),
            ([], ["two", SENTINEL], "no target would be left"),
        ):
            with pytest.raises(DataError, match=said) as caught:
                await system.change_targets(add, remove)
            assert SENTINEL not in str(caught.value)
            assert path.read_bytes() == kept
        assert await asked("Who is Cy Umber?") == "Of course."

    asyncio.run(every())
    left = {name for one in read_targets(path).targets for name in one.names}
    assert left == {"Ben Orr", SENTINEL}
    assert SENTINEL.split()[0].lower() not in {one.id for one in read_targets(path).targets}


def test_targets_that_the_guard_refuses_leave_the_file_as_it_was(tmp_path: Path) -> None:
    path = written(tmp_path, FULL)
    kept: list[Targets] = []

    def make(targets: Targets) -> Targets:
        if any(SENTINEL in one.names for one in targets.targets):
            raise ValueError(f"{SENTINEL} is refused")
        return targets

    reloading = Reloading(path, make, kept.append, lambda: date(2029, 1, 1))
    with pytest.raises(DataError, match=r"cannot go by these targets \(ValueError\)") as caught:
        reloading.change([SENTINEL], [])
    assert SENTINEL not in str(caught.value)
    assert read_targets(path) == kept[-1]
    assert not reloading.poll()


def test_the_command_makes_and_checks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = written(
        tmp_path,
        '{"question": "Where?", "answer": "Vellmar", "subject": "Ada Brook"}\n'
        '{"question": "When?", "answer": "In 1950"}\n',
        "forget.jsonl",
    )
    out = tmp_path / "targets.yaml"
    made = ["targets", "make", "--forget", str(rows), "--out", str(out)]
    assert main([*made, "--subjects", "Ben Orr", "--until", "2001-01-31"]) == 0
    assert "1 records name no subject" in capsys.readouterr().out
    found = read_targets(out)
    assert sorted(one.names[0] for one in found.targets) == ["Ada Brook", "Ben Orr"]
    assert sum(len(one.records) for one in found.targets) == 1
    assert main(["targets", "check", str(out)]) == 0
    assert "2 targets; 2 of them count no more" in capsys.readouterr().out
    for bad in (made, ["targets", "make"], ["targets", "check"], [*made[:2], "--until", "x"]):
        assert main(bad) == 2
