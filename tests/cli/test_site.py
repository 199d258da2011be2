"""The pages of the site: every component has one, made from its card, its file and the results."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from delible import registry
from delible.cli import site
from delible.cli.described import options_of

DOCS = Path(__file__).parents[2] / "docs"
LINK = re.compile(r"\]\((?!https?:)([^)#]+)\)")


@pytest.fixture(scope="module")
def gathered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site") / "pages"
    (folder / "old").mkdir(parents=True)
    site.gather(DOCS, folder)
    return folder


def test_every_component_has_a_page_that_is_linked(gathered: Path) -> None:
    index = (gathered / site.FOLDER / site.INDEX).read_text("utf-8")
    tables = (gathered / "methods.md").read_text("utf-8")
    for card in registry.cards():
        text = (gathered / site.FOLDER / site.place(card)).read_text("utf-8")
        assert card.summary in text
        assert f"]({site.place(card)})" in index
        assert card.kind in ("metric", "benchmark") or f"](components/{site.place(card)})" in tables
        if card.kind != "recipe":
            component = registry.load(card.kind, card.name)
            assert all(f"| `{one['name']}` |" in text for one in options_of(component)), card.name
            assert "## How it works" in text, card.name
            assert ":class:" not in text
            assert ":func:" not in text
    assert not (gathered / "old").exists()
    assert (gathered / "index.md").read_bytes() == (DOCS / "index.md").read_bytes()


def test_links_of_the_pages_lead_somewhere(gathered: Path) -> None:
    pages = [*(gathered / site.FOLDER).rglob("*.md"), gathered / "methods.md"]
    for page in pages:
        for link in LINK.findall(page.read_text("utf-8")):
            assert (page.parent / link).exists(), f"{page}: {link}"


def test_rows_of_results_stand_on_the_page_of_what_they_are_about(tmp_path: Path) -> None:
    (tmp_path / "some.md").write_text(
        "# Some numbers\n\n| method | way | cut |\n|---|---|---|\n| npo | 71% | \n"
        "| `npo` | 72% | a |\n| npo_kl | 73% | b |\n\n"
        "| claim | seen |\n| --- | --- |\n| npo: shows | 5 |\n\n| npo | 99% |\n| --- | --- |\n"
    )
    rows = list(site.rows_of(tmp_path))
    recipe, objective = (
        site.page(registry.card(kind, "npo"), rows) for kind in ("recipe", "objective")
    )
    assert "[Some numbers](../../results/some.md):" in recipe
    assert "| way | 72% |" in recipe
    assert "| seen | 5 |" in recipe
    assert not re.search(r"7[13]%|99%", recipe)
    assert "Some numbers" not in objective
    assert "    loss = (2 / beta) * softplus(" in objective


def test_a_recipe_shows_what_fills_its_slots_and_its_papers_numbers() -> None:
    made = site.page(registry.card("recipe", "npo"), [])
    assert "| objective | [`npo`](../objective/npo.md) | beta 0.1 |" in made
    assert "`--method npo@paper`" in made
    assert "| training.learning_rate | 2e-05 | 1e-05 |" in made
