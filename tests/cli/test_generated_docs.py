"""The generated pages are up to date, and --help prints them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from delible import registry
from delible.cli.commands import COMMANDS, GROUPS, PAGE_WIDTH
from delible.cli.docs import help_page, main, pages

DOCS = Path(__file__).parents[2] / "docs"
MADE = pages(DOCS)


@pytest.mark.parametrize("path", MADE, ids=lambda path: path.name)
def test_page_is_up_to_date(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == MADE[path], "run `make docs`"


def test_every_component_is_in_the_tables(tmp_path: Path) -> None:
    made = pages(tmp_path)
    text = made[tmp_path / "methods.md"]
    for card in registry.cards():
        if card.kind == "metric":
            assert f"### `{card.name}`: " in made[tmp_path / "metrics.md"], card.name
        elif card.kind == "benchmark":
            assert f"## `{card.name}`: " in made[tmp_path / "benchmarks.md"], card.name
        else:
            assert f"| `{card.name}` |" in text, f"{card.kind} {card.name}"
    lengths = [line.replace("\\|", "").count("|") for line in text.splitlines() if line[:1] == "|"]
    assert min(lengths) >= 3


def test_writing_goes_where_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("delible.cli.commands.PAGES", tmp_path / "help")
    main(tmp_path / "docs")
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == sorted(
        [
            *(f"{name.replace(' ', '-')}.txt" for name in ("delible", *COMMANDS, *GROUPS)),
            *(
                f"{name}.md"
                for name in ("benchmarks", "cli", "gateway-options", "methods", "metrics")
            ),
        ]
    )


@pytest.mark.parametrize("name", [*COMMANDS, *GROUPS])
def test_help_prints_the_stored_page(run: Any, name: str, monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert run(*name.split(), "--help").out == help_page(name)
    assert max(map(len, help_page(name).splitlines())) <= PAGE_WIDTH


def test_a_narrow_terminal_gets_a_narrow_page(run: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    lines = run("unlearn", "--help").out.splitlines()
    assert max(map(len, lines)) <= 60
    assert any("--learning-rate" in line for line in lines)
