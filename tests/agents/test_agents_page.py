"""The walk on the page about agents does what the page says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "agents.md"


def test_the_walk_prints_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    walk = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[0]
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(walk, str(PAGE), "exec"), names)
    said = capsys.readouterr().out.splitlines()
    told = re.findall(r"^print\(.*\)  # (.*)$", walk, re.MULTILINE)
    assert len(told) == 6
    rules = [one for one in told if "what it is told" in one]
    assert len(rules) == 1
    place = told.index(rules[0])
    after = len(said) - (len(told) - place - 1)
    prompt = "\n".join(said[place:after])
    assert len(said[place:after]) == 4
    target = str(names["target"])
    assert not any(word in prompt for word in target.split())
    shown = [*said[:place], *said[after:]]
    expected = [re.split(r"[:,] ", one)[0] for one in told if one not in rules]
    assert [re.sub(r"^(-?\d+\.\d+)$", lambda m: f"{abs(float(m[1])):.1f}", one) for one in shown] \
        == expected  # fmt: skip
    assert len(names["seen"]) == 9  # type: ignore[arg-type]
    assert len(names["candidates"]) == 12  # type: ignore[arg-type]


def test_the_walk_of_the_first_page_prints_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = PAGE.parents[1] / "README.md"
    part = page.read_text(encoding="utf-8").partition("\n## An agent that forgets\n")[2]
    (walk,) = re.findall(r"```python\n(.*?)```", part.partition("\n## ")[0], re.DOTALL)
    assert len([line for line in walk.splitlines() if line.strip()]) <= 20
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(walk, str(page), "exec"), names)
    told = re.findall(r"^print\(.*\)  # (.*)$", walk, re.MULTILINE)
    assert len(told) == walk.count("print(") == 4
    assert capsys.readouterr().out.splitlines() == [one.split(": ")[0] for one in told]
    assert len(names["others"]) == 9  # type: ignore[arg-type]
    notes = names["Memory"]("notes").items("entry")  # type: ignore[operator]
    assert notes == []
