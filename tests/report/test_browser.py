"""The report in a real browser: no errors, no overflow, tables that sort (needs chromium)."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
from page_opening import open_page

from delible.bench.table import tabulate
from delible.report import write
from delible.report.findings import write_findings
from delible.report.leaderboard import write_page

EXAMPLE = runpy.run_path(str(Path(__file__).with_name("example.py")))
BENCH = runpy.run_path(str(Path(__file__).with_name("leaderboard_example.py")))
PAGES = ["rich", "minimal", "several", "leaderboard", "experiment"]
pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("pages")
    found = {
        name: write(EXAMPLE[name](), folder / f"{name}.html").as_uri()
        for name in ("rich", "minimal", "several")
    }
    benchmark, cells = BENCH["Example"](), BENCH["cells"]()
    table, target = tabulate(benchmark, cells), folder / "leaderboard.html"
    found["leaderboard"] = write_page(target, benchmark, table, cells, BENCH["common"]()).as_uri()
    described = {"model": "default", "methods": ["npo"]}
    found["experiment"] = write_findings(
        folder, BENCH["Question"](), BENCH["findings"](), described
    ).as_uri()
    return found


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("width", [1280, 400])
def test_no_errors_no_overflow_every_section_visible(
    browser: Any, pages: dict[str, str], name: str, width: int
) -> None:
    open_page(browser, pages[name], width)
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    # nothing sticks out that is not inside its own scrolling box
    outside = browser.execute_script(
        "return [...document.querySelectorAll('main *')].filter(e =>"
        " !e.closest('.scroll, .hidden, svg') && e.getBoundingClientRect().right > innerWidth + 1)"
        ".map(e => e.outerHTML.slice(0, 80))"
    )
    assert outside == []
    sizes = browser.execute_script(
        "return [...document.querySelectorAll('section')].map(s =>"
        " [s.id, s.getBoundingClientRect().width, s.getBoundingClientRect().height])"
    )
    assert sizes
    assert [entry for entry in sizes if entry[1] < 300 or entry[2] < 40] == []


@pytest.mark.parametrize("name", PAGES)
def test_no_request_leaves_the_page(browser: Any, pages: dict[str, str], name: str) -> None:
    open_page(browser, pages[name], 1280)
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0


def test_the_policy_runs_only_the_own_script(browser: Any, pages: dict[str, str]) -> None:
    open_page(browser, pages["rich"], 1280)
    assert browser.execute_script("return document.documentElement.className") == "scripted"
    browser.execute_script(
        "const s = document.createElement('script'); s.textContent = 'window.intruder = 1';"
        "document.body.append(s)"
    )
    assert browser.execute_script("return window.intruder === undefined")
    assert "Content Security Policy" in browser.get_log("browser")[0]["message"]


def test_the_measurements_sort_and_filter(browser: Any, pages: dict[str, str]) -> None:
    open_page(browser, pages["rich"], 1280)
    table = "document.getElementById('measurements-table')"
    browser.execute_script(f"{table}.closest('details').open = true")

    def column(index: int) -> list[str]:
        script = (
            f"return [...{table}.tBodies[0].rows].filter(r => !r.hidden)"
            f".map(r => r.cells[{index}].dataset.value)"
        )
        return list(browser.execute_script(script))

    def click(index: int) -> str:
        script = (
            f"const h = {table}.tHead.rows[0].cells[{index}]; h.querySelector('button').click();"
            "return h.getAttribute('aria-sort')"
        )
        return str(browser.execute_script(script))

    before = column(5)
    assert click(5) == "ascending"
    numbers = [float(value) for value in column(5) if value]
    assert numbers == sorted(numbers)
    assert numbers != [float(v) for v in before if v]
    assert column(5)[-1] == ""  # a missing value comes last, in both directions
    assert click(5) == "descending"
    numbers = [float(value) for value in column(5) if value]
    assert numbers == sorted(numbers, reverse=True)
    assert column(5)[-1] == ""
    assert click(0) == "ascending"
    assert column(0) == sorted(column(0))
    assert len(set(column(0))) == 3

    filter_box = browser.find_element("css selector", "input.filter")
    filter_box.send_keys("unlearned truth")
    assert column(4) == ["truth_ratio"]
    assert column(0) == ["unlearned"]


def test_the_leaderboard_sorts_by_number_and_scrolls_inside_its_box(
    browser: Any, pages: dict[str, str]
) -> None:
    open_page(browser, pages["leaderboard"], 400)
    table = "document.getElementById('leaderboard')"

    def column(index: int) -> list[str]:
        script = f"return [...{table}.tBodies[0].rows].map(r => r.cells[{index}].dataset.value)"
        return list(browser.execute_script(script))

    browser.execute_script(f"{table}.tHead.rows[0].cells[9].querySelector('button').click()")
    values = column(9)
    assert values[-1] == ""  # a guard that no weight attack can be run on
    numbers = [float(value) for value in values[:-1]]
    assert len(numbers) == 13
    assert numbers == sorted(numbers)
    # the methods' names stay in sight while the numbers move under them
    script = (
        f"const box = {table}.parentElement; box.scrollLeft = 300;"
        f"const name = {table}.tBodies[0].rows[3].cells[0].getBoundingClientRect();"
        "return [box.scrollWidth > box.clientWidth, box.scrollLeft, name.left >= 0, name.width]"
    )
    wider, moved, seen, width = browser.execute_script(script)
    assert wider
    assert moved == 300
    assert seen
    assert 80 < width < 180


@pytest.mark.parametrize("width", [1280, 400])
def test_one_of_the_two_drawings_of_the_leaderboard_is_seen(
    browser: Any, pages: dict[str, str], width: int
) -> None:
    open_page(browser, pages["leaderboard"], width)
    seen = browser.execute_script(
        "return [...document.querySelectorAll('#trade-off figure svg')]"
        ".filter(e => e.getClientRects().length).map(e => e.querySelector('title').id)"
    )
    assert seen == ["trade-wide-title" if width > 640 else "trade-narrow-title"]
    covered = browser.execute_script(
        "const texts = [...document.querySelectorAll('#trade-off svg text')]"
        ".map(e => [e.lastChild.textContent, e.getBoundingClientRect()]).filter(e => e[1].width);"
        "return texts.flatMap(([a, p], i) => texts.slice(0, i).filter(([b, q]) =>"
        " p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 4"
        " && q.top < p.bottom - 4).map(([b]) => a + ' / ' + b))"
    )
    assert covered == []


@pytest.mark.parametrize("name", ["rich", "leaderboard", "experiment"])
def test_dark_and_light_differ_and_are_readable(
    browser: Any, pages: dict[str, str], name: str
) -> None:
    def contrast() -> tuple[str, float]:
        script = """
        const parts = c => c.match(/[\\d.]+/g).slice(0, 3).map(Number);
        const light = c => { const [r, g, b] = parts(c).map(v => { v /= 255;
          return v <= 0.03928 ? v / 12.92 : Math.pow((v + 0.055) / 1.055, 2.4); });
          return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
        const ratio = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
          return (x + 0.05) / (y + 0.05); };
        const paper = getComputedStyle(document.body).backgroundColor;
        const back = e => { for (; e; e = e.parentElement) {
          const c = getComputedStyle(e).backgroundColor;
          if (!/, 0\\)$/.test(c)) { return c; } } return paper; };
        let worst = 99;
        document.querySelectorAll('main p, main li, main td, main th, main span, main small, ' +
          'main dt, main dd, main h1, main h2, main h3, main abbr').forEach(e => {
          if (e.textContent.trim() && e.getClientRects().length && !e.closest('.hidden')) {
            worst = Math.min(worst, ratio(getComputedStyle(e).color, back(e))); } });
        document.querySelectorAll('svg text').forEach(e => {
          if (!e.closest('.inside')) {
            worst = Math.min(worst, ratio(getComputedStyle(e).fill, back(e.closest('svg')))); } });
        return [paper, worst];
        """
        paper, worst = browser.execute_script(script)
        return str(paper), float(worst)

    open_page(browser, pages[name], 1280, "light")
    light, worst_light = contrast()
    open_page(browser, pages[name], 1280, "dark")
    dark, worst_dark = contrast()
    assert light != dark
    assert min(worst_light, worst_dark) >= 4.5, (worst_light, worst_dark)


@pytest.mark.parametrize("name", ["rich", "leaderboard", "experiment"])
def test_nothing_in_a_chart_leaves_a_narrow_screen(
    browser: Any, pages: dict[str, str], name: str
) -> None:
    open_page(browser, pages[name], 390)
    script = """
    const parts = [...document.querySelectorAll('svg.chart text, svg.chart path, svg.chart line')]
      .filter(e => e.getClientRects().length);
    const outside = parts.filter(e => { const box = e.getBoundingClientRect();
      return box.left < -1 || box.right > innerWidth + 1; });
    return [parts.length, outside.map(e => e.outerHTML.slice(0, 90))];
    """
    count, outside = browser.execute_script(script)
    assert count > 30
    assert outside == []


@pytest.mark.parametrize("name", ["rich", "leaderboard", "experiment"])
def test_marks_follow_the_theme_and_can_be_seen(
    browser: Any, pages: dict[str, str], name: str
) -> None:
    script = """
    const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).slice(0, 3).map(Number).map(v => {
      v /= 255; return v <= 0.03928 ? v / 12.92 : Math.pow((v + 0.055) / 1.055, 2.4); });
      return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
    const paper = light(getComputedStyle(document.body).backgroundColor);
    const ratio = c => (Math.max(light(c), paper) + 0.05) / (Math.min(light(c), paper) + 0.05);
    return [...document.querySelectorAll('svg.chart .points path, svg.chart .lines path')]
      .filter(e => e.getClientRects().length).map(e => { const style = getComputedStyle(e);
        const seen = [style.fill, style.stroke].filter(c => c.startsWith('rgb'));
        return [seen.join(' '), Math.max(...seen.map(ratio))]; });
    """
    found = {}
    for scheme in ("light", "dark"):
        open_page(browser, pages[name], 1280, scheme)
        found[scheme] = browser.execute_script(script)
    assert len(found["light"]) == len(found["dark"]) > 10
    assert all(one[0] != other[0] for one, other in zip(found["light"], found["dark"], strict=True))
    assert min(ratio for _, ratio in [*found["light"], *found["dark"]]) >= 3.0


@pytest.mark.parametrize("scope", ["#trade-off", "#outcomes", "#relearning"])
def test_what_one_points_at_has_a_value(browser: Any, pages: dict[str, str], scope: str) -> None:
    open_page(browser, pages["rich"], 1280)
    script = """
    const scope = document.querySelector(arguments[0]);
    scope.scrollIntoView();
    return [...scope.querySelectorAll('.points path, .shares path')].map(e => {
      const box = e.getBoundingClientRect();
      const at = document.elementFromPoint(box.left + box.width / 2, box.top + box.height / 2);
      return at && at.closest('svg.chart') && at.querySelector('title')
        ? at.querySelector('title').textContent : null; }).filter(told => told);
    """
    told = browser.execute_script(script, scope)
    assert len(told) > 8
    assert all(any(letter.isdigit() for letter in text) for text in told)
