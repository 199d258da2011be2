"""Links of the documentation lead somewhere, on the site and where the pages are read as files."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
FENCE = re.compile(r"^( *)(```+).*?^\1\2", re.M | re.S)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """Ids of a page's headings, as GitHub and the site's builder make them."""
    text = FENCE.sub("", page.read_text("utf-8"))
    found = set()
    for heading in re.findall(r"^#+ +(.+?) *$", text, re.M):
        plain = re.sub(r"[^\w\- ]", "", heading.lower())
        found.add(plain.replace(" ", "-"))
    return found


def broken(page: Path, within: Path) -> list[str]:
    """Links of a page that lead nowhere, or out of a folder."""
    found = []
    for link in LINK.findall(FENCE.sub("", page.read_text("utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page.resolve()
        if (
            not target.exists()
            or not target.is_relative_to(within.resolve())
            or (anchor and target.suffix == ".md" and anchor not in anchors(target))
        ):
            found.append(link)
    return found


@pytest.mark.parametrize("page", [str(one.relative_to(DOCS)) for one in DOCS.rglob("*.md")])
def test_links_of_a_page_lead_somewhere_on_the_site(page: str) -> None:
    assert broken(DOCS / page, DOCS) == []


@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_links_of_other_pages_lead_somewhere(page: str) -> None:
    assert broken(ROOT / page, ROOT) == []


def test_links_that_lead_nowhere_are_found(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "outside.md").write_text("# Out\n")
    (tmp_path / "site" / "there.md").write_text("# What is *there*, now?\n")
    page = tmp_path / "site" / "page.md"
    page.write_text(
        "[a](there.md) [b](there.md#what-is-there-now) [c](https://x.org/y) [d](nowhere.md)\n"
        "[e](there.md#no) [f](../outside.md) [g](#none)\n```\n[h](not-a-link.md)\n```\n"
    )
    expected = ["nowhere.md", "there.md#no", "../outside.md", "#none"]
    assert broken(page, tmp_path / "site") == expected


def test_every_page_is_in_the_contents_of_the_site() -> None:
    content = tomllib.loads((ROOT / "zensical.toml").read_text("utf-8"))["project"]
    listed = set()
    for entry in content["nav"]:
        for value in entry.values():
            listed |= {value} if isinstance(value, str) else set(value)
    assert listed - {"components/index.md"} == {
        str(page.relative_to(DOCS).as_posix()) for page in DOCS.rglob("*.md")
    }
    assert content["theme"]["font"] is False, "no web fonts"


def test_the_builders_are_pinned_and_the_site_is_not_committed() -> None:
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["dependency-groups"]
    assert all("==" in one for one in (*groups["docs"], *groups["sbom"]))
    assert "/build/" in (ROOT / ".gitignore").read_text("utf-8").split()


def test_the_shim_of_the_offline_search_is_our_own() -> None:
    """Without one the builder's plugin puts a script of somebody's server into every page."""
    content = tomllib.loads((ROOT / "zensical.toml").read_text("utf-8"))["project"]
    shims = [path for path in content["extra"]["polyfills"] if "iframe-worker" in path]
    assert len(shims) == 1
    assert (DOCS / shims[0]).is_file()
