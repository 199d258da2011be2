"""The report as text: what is on the page, what is escaped, what is read from a directory."""

from __future__ import annotations

import json
import re
import runpy
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from delible.audit.result import AuditResult, Example, Measurement, VerdictResult
from delible.errors import RunError
from delible.report import (
    ReportData,
    charts,
    key,
    matrix,
    pictures,
    read_run,
    read_runs,
    render,
    write,
)
from delible.report import words as wording

EXAMPLE = runpy.run_path(str(Path(__file__).with_name("example.py")))
SECTIONS = [
    "verdict",
    "story",
    "key-numbers",
    "answers",
    "trade-off",
    "outcomes",
    "attacks",
    "utility",
    "relearning",
    "training",
    "measurements",
    "config",
    "not-tested",
    "glossary",
    "reproduce",
]
VOID = {"meta", "link", "br", "input", "img", "hr"}
SVG_SHAPES = {"line", "rect", "circle", "path"}


class Checker(HTMLParser):
    """Collects what a test asks about and refuses tags that are not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.identifiers: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        if values.get("id"):
            self.identifiers.append(str(values["id"]))
        self.addresses += [str(values[key]) for key in ("href", "src", "action") if key in values]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert tag in SVG_SHAPES, f"<{tag}/> closes itself"

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1:] == [tag], f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()


def check(text: str) -> Checker:
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert checker.open == []
    assert len(set(checker.identifiers)) == len(checker.identifiers)
    return checker


def visible(text: str) -> str:
    """The words of a page: no style, no script, no tags."""
    text = re.sub(r"<(style|script)>.*?</\1>", " ", text, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", text))


@pytest.fixture(scope="module")
def rich_page() -> str:
    return render(EXAMPLE["rich"]())


def test_sections_come_in_order(rich_page: str) -> None:
    assert re.findall(r'<section id="([a-z-]+)"', rich_page) == SECTIONS
    for target in re.findall(r'href="#([^"]+)"', rich_page):
        assert f'id="{target}"' in rich_page


@pytest.mark.parametrize("name", ["rich", "minimal", "several"])
def test_page_is_well_formed_self_contained_and_deterministic(name: str) -> None:
    text = render(EXAMPLE[name]())
    checker = check(text)
    assert all(address.startswith("#") for address in checker.addresses)
    assert "http://" not in text
    assert "https://" not in text
    assert not {"link", "img", "iframe", "object", "base"} & set(checker.tags)
    assert "url(" not in text
    assert "@import" not in text
    assert text == render(EXAMPLE[name]())
    assert len(text) < 250_000


def test_the_verdict_is_told_in_plain_words_and_removed_is_never_said(rich_page: str) -> None:
    words = visible(rich_page)
    assert "Suppression: the answers are hidden" in words
    assert "What this does not mean" in words
    assert "removed" not in words.lower()


@pytest.mark.parametrize(
    "label", ["incomplete", "destructive", "suppression", "removal-consistent", "undetermined"]
)
def test_every_verdict_has_words(label: Any) -> None:
    data = EXAMPLE["minimal"]()
    data.audit.verdict = VerdictResult(
        label=label, reasons=[], thresholds={}, without_reference=True
    )
    words = visible(render(data))
    assert f"Verdict: {label}" in words
    assert "What this means" in words
    assert "No reference model." in words
    assert "removed" not in words.lower()
    if label == "removal-consistent":
        assert "not proof" in words


def test_key_numbers(rich_page: str) -> None:
    numbers = key.key_numbers(EXAMPLE["rich"]())
    assert numbers.metric == "answer_probability"
    assert numbers.kept == pytest.approx(100 * 0.79 / 0.84)
    # relearning on the forget rows, ROUGE-L: 1 - (0.85 - 0.44) / (0.93 - 0.44)
    assert numbers.weakest == pytest.approx(1 - 0.41 / 0.49)
    assert numbers.weakest_title == "Relearning (forget rows, 50 steps), ROUGE-L recall"
    assert numbers.seconds == 372.4
    assert "6 min 12 s" in rich_page
    assert "0.073" in rich_page


def test_time_comes_from_start_and_end_without_a_cost() -> None:
    manifest = {"started": "2026-01-05T10:00:00+00:00", "ended": "2026-01-05T11:02:03+00:00"}
    assert key.key_numbers(ReportData(title="t", manifest=manifest)).seconds == 3723
    assert wording.duration(3723) == "1 h 02 min"
    assert key.key_numbers(ReportData(title="t", manifest={"started": "soon"})).seconds is None


def test_leak_cells_show_scores_of_every_system_and_words(rich_page: str) -> None:
    table = rich_page.split('<table class="matrix">')[1].split("</table>")[0]
    row = next(part for part in table.split("<tr>") if "unrelated rows" in part)
    cell = visible(row.split("<td")[1].split(">", 1)[1])
    # e = 1 - (0.58 - 0.07) / (0.86 - 0.07)
    assert cell.split() == ["0.35", "leaks", "O", "0.86", "U", "0.58", "R", "0.07"]
    assert 'class="e1"' in row
    # the cell's own axis, from 0 at 5 to 1 at 131: the circle is the unlearned system
    assert 'class="mark unlearned" cx="78.1"' in row
    assert "this measure was not taken under this attack" in table


def test_intervals_rows_without_power_and_the_worst_places_are_shown(rich_page: str) -> None:
    table = rich_page.split('<table class="matrix">')[1].split("</table>")[0]
    rows = {name: next(part for part in table.split("<tr>") if name in part)
            for name in ("Plain question", "Paraphrased question", "Answer begun")}  # fmt: skip
    assert "95 %: 0.31 to 0.40" in visible(rows["Paraphrased question"])
    begun = visible(rows["Answer begun"])
    assert "no power (no power: here the original knows hardly more" in " ".join(begun.split())
    assert "worst form: no. 2, e = 0.66 (ROUGE-L recall)" in begun
    asked = visible(rows["Plain question"])
    assert "worst subject: Mara Velt, e = 0.12, 4 of 5 facts as before" in asked
    assert "4 of 38 facts as before" in asked


def test_what_is_left_of_the_rest_is_shown(rich_page: str) -> None:
    section = visible(rich_page.split('<section id="utility"')[1].split("</section>")[0])
    words = " ".join(section.split())
    assert "retain ROUGE-L recall 0.880 0.810 0.870 92.0 89.0 95.0 160" in words
    assert "the original itself hardly knows more here" in words
    assert "one and the same answer" in words
    assert 'href="#utility"' in rich_page


@pytest.mark.parametrize(
    ("erased", "step"),
    [(0.0, 0), (0.25, 1), (0.499, 1), (0.5, 2), (0.8, 3), (1.0, 4), (None, None)],
)
def test_colour_steps_are_cut_where_the_verdict_cuts(
    erased: float | None, step: int | None
) -> None:
    assert matrix.step(erased) == step


def test_hostile_text_is_escaped_everywhere() -> None:
    hostile = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"
    data = EXAMPLE["rich"]()
    audit = data.audit
    data.title = hostile
    data.story = data.notes = [hostile]
    data.manifest = {
        "command": hostile,
        "run": {hostile: hostile},
        "hardware": hostile,
        "seed": hostile,
        "versions": {hostile: hostile},
        "cost": {hostile: 3},
    }
    audit.examples = [
        Example(
            split=hostile,
            question=hostile * 9,
            expected=hostile,
            answers={"unlearned": hostile, "original": hostile * 9},
            outcomes={"unlearned": hostile},
        )
    ]
    audit.leaks = [
        leak.model_copy(update={"title": hostile, "variant": hostile, "note": hostile})
        for leak in audit.leaks
    ]
    audit.leaks[1] = audit.leaks[1].model_copy(
        update={"knowledge": {hostile: {"unlearned": 0.1}}, "erased": {hostile: None}}
    )
    audit.curves = [
        curve.model_copy(update={"variant": hostile, "metric": hostile}) for curve in audit.curves
    ]
    audit.outcomes = {"unlearned": {hostile: {hostile: 1.0}}}
    audit.measurements.append(
        Measurement(
            system="unlearned",
            split=hostile,
            metric=hostile,
            variant=hostile,
            value=None,
            skipped=1,
            reason=hostile,
        )
    )
    audit.not_tested = [hostile]
    audit.verdict.reasons.append(hostile)
    text = render(data)
    checker = check(text)
    assert checker.tags.count("script") == 1
    assert "img" not in checker.tags
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)" in text


def test_missing_parts_leave_dashes_with_reasons() -> None:
    text = render(EXAMPLE["minimal"]())
    assert 'title="the endpoint refused every call"' in text
    assert 'title="no reference model in this audit"' in text
    sections = re.findall(r'<section id="([a-z-]+)"', text)
    assert "attacks" not in sections
    assert "training" not in sections
    assert "not-tested" in sections
    assert "None" not in visible(text)
    assert "nan" not in visible(text).split()


def test_without_an_audit_the_page_says_that_nothing_is_known() -> None:
    text = render(ReportData(title="only trained", events=EXAMPLE["events"]()))
    assert "Not audited" in text
    assert 'id="training"' in text


def test_without_a_reference_the_page_names_none() -> None:
    data = EXAMPLE["rich"]()
    audit = data.audit
    del audit.systems["reference"]
    for leak in audit.leaks:
        for scores in [*leak.knowledge.values(), *leak.retain.values()]:
            scores.pop("reference", None)
    audit.measurements = [row for row in audit.measurements if row.system != "reference"]
    text = render(data)
    matrix = text.split('<table class="matrix">')[1].split("</table>")[0]
    assert "as reference" not in matrix
    assert "no leak seen" in matrix
    assert '<abbr title="reference">' not in matrix


def test_glossary_explains_only_words_of_the_page(rich_page: str) -> None:
    def terms(text: str) -> list[str]:
        return re.findall(r"<dt>([^<]*)</dt>", text.split('id="glossary"')[1].split("</dl>")[0])

    assert terms(rich_page) == [
        "answer probability",
        "ROUGE-L recall",
        "extraction strength",
        "exact memorisation",
        "truth ratio",
        "forget quality",
        "model utility",
        "relearning",
        "quantization",
        "prefill",
        "reference model",
        "e (share erased)",
        "outcome classes",
    ]
    assert terms(render(EXAMPLE["minimal"]())) == ["ROUGE-L recall"]


def test_values_that_are_not_finite_leave_gaps(rich_page: str) -> None:
    assert "1 recorded loss value was not finite" in visible(rich_page)
    chart = rich_page.split('aria-labelledby="training-forget_loss-title')[1].split("</svg>")[0]
    path = re.search(r'class="lines"><path d="([^"]+)" stroke="var\(--forget\)"', chart)
    assert path is not None
    assert path[1].count("M") == 2
    assert "nan" not in path[1]
    assert (
        charts.lines(
            [charts.Line("a", "a", [1, 2], [None, float("inf")])],
            identifier="a",
            title="a",
            description="",
            x_label="",
            y_label="",
        )
        is None
    )


def test_thinning_keeps_spikes_and_the_last_point() -> None:
    values: list[float | None] = [0.5] * 10_000
    values[7_777], values[1_234] = 9.0, None
    thinned = charts.thin(charts.Line("loss", "plain", list(range(10_000)), values))
    assert len(thinned.xs) <= 401
    assert 9.0 in thinned.ys
    assert thinned.xs[-1] == 9_999


@pytest.mark.parametrize(("step", "halves"), [(1.0, False), (1.5, True)])
def test_what_is_counted_has_whole_ticks(step: float, halves: bool) -> None:
    line = charts.Line("npo", "series0", [1.0, 1 + step, 4.0], [0.2, 0.3, 0.4])
    drawn = charts.lines(
        [line], identifier="c", title="t", description="d", x_label="requests", y_label="y"
    )
    assert drawn is not None
    assert (">1.5<" in drawn) is halves
    assert (">3.0<" if halves else ">3<") in drawn


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (float("nan"), "–"),
        (0.0, "0"),
        (0.12345, "0.123"),
        (3.1e-9, "3.1 × 10⁻⁹"),
        (12345.6, "12,346"),
        (123.45, "123.5"),
        (-0.5, "-0.500"),
    ],
)
def test_numbers_for_reading(value: float | None, text: str) -> None:
    assert wording.number(value) == text


def test_several_runs_become_one_table() -> None:
    text = render(EXAMPLE["several"]())
    assert re.findall(r'<section id="([a-z-]+)"', text)[0] == "runs"
    table = text.split('id="runs-table"')[1].split("</table>")[0]
    assert table.count("<tr>") == 4
    assert "task_vector" in table
    assert "suppression" in table
    assert "incomplete" in table


# --- directories ---------------------------------------------------------------------------


def make_run(folder: Path) -> Path:
    data = EXAMPLE["rich"]()
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps(data.manifest))
    (folder / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data.events))
    (folder / "metrics.json").write_text(data.audit.model_dump_json())
    return folder


def test_read_run(tmp_path: Path) -> None:
    data = read_run(make_run(tmp_path / "run"))
    assert data.title == "npo on smollm2-135m-world"
    assert len(data.events) == 121
    assert isinstance(data.audit, AuditResult)
    assert len(data.audit.leaks) == 8
    assert "Training took 120 steps." in data.story
    assert "It then tried to bring the knowledge back in 7 ways." in data.story
    assert data.notes == []


def test_a_half_written_last_event_is_tolerated(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    with (folder / "events.jsonl").open("ab") as stream:
        stream.write('{"step": 121, "forget_loss": 0.0, "text": "caf\u00e9'.encode()[:-1])
    assert len(read_run(folder).events) == 121


def test_a_broken_event_in_the_middle_is_an_error(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    rows = (folder / "events.jsonl").read_text().splitlines()
    rows[4] = rows[4][:-3]
    (folder / "events.jsonl").write_text("\n".join(rows) + "\n")
    with pytest.raises(RunError, match=r"events\.jsonl:5: is not a JSON object"):
        read_run(folder)


def test_a_resumed_run_may_hold_one_broken_line_per_interruption(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    rows = (folder / "events.jsonl").read_text().splitlines()
    rows[60] = rows[60][:-9] + rows[50]
    rows[61:61] = [json.dumps({"step": 59, "forget_loss": 0.125})]
    (folder / "events.jsonl").write_text("\n".join(rows) + "\n")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "resumed": ["2026-01-05"]}))
    data = read_run(folder)
    assert data.notes == [
        "The run was interrupted: 1 half-written line of its log could not be read."
    ]
    training = pictures.training(data.events)
    assert training is not None
    path = re.search(r'class="lines"><path d="([^"]+)"', training["panels"][0]["svg"])
    assert path is not None
    places = [float(pair.split(",")[0]) for pair in re.split("[ML]", path[1])[1:]]
    assert len(places) == 119  # all steps but the broken one
    assert places == sorted(places)


def test_steps_are_counted_on_through_stages() -> None:
    events = [
        {"step": step, "stage": stage, "forget_loss": loss}
        for stage, losses in (("first", (4.0, 3.0)), ("second", (2.0, 1.0)))
        for step, loss in enumerate(losses, start=1)
    ]
    training = pictures.training([*events[:1], *events])  # the first step was repeated
    assert training is not None
    path = re.search(r'class="lines"><path d="([^"]+)"', training["panels"][0]["svg"])
    assert path is not None
    places = [float(pair.split(",")[0]) for pair in re.split("[ML]", path[1])[1:]]
    assert len(places) == 4
    assert places == sorted(set(places))


def test_a_run_without_an_audit_shows_the_answers_it_kept(tmp_path: Path) -> None:
    manifest = {
        "run": {"method": {"name": "npo"}, "model": "tiny", "seed": 3},
        "stopped": "the loss is not finite",
        "examples": [
            {
                "split": "forget",
                "question": "Who?",
                "expected": "Ann",
                "before": "Ann it was",
                "after": "Bob it was",
            }
        ],
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    data = read_run(tmp_path)
    assert data.title == "npo on tiny"
    words = visible(render(data))
    assert "Ann it was" in words
    assert "Bob it was" in words
    assert "stopped early: the loss is not finite" in words


def test_labels_of_the_scatter_belong_to_their_marks(rich_page: str) -> None:
    chart = rich_page.split('aria-labelledby="trade-title')[1].split("</svg>")[0]
    names = chart.split('class="names"')[1].split("</g>")[0]
    named = re.findall(r'fill="var\(--(\w+)\)">(\w+)</text>', names)
    assert sorted(named) == [(name, name) for name in ("original", "reference", "unlearned")]
    badges = re.findall(r">(\d+)</text>", chart.split('class="numbers"')[1].split("</g>")[0])
    assert badges == [str(number) for number in range(1, 8)]


def test_events_and_audit_may_be_missing(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "events.jsonl").unlink()
    (folder / "metrics.json").unlink()
    data = read_run(folder)
    assert data.events == []
    assert data.audit is None
    assert f"delible audit {folder}" in data.notes[0]
    check(render(data))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("manifest.json", None, "does not exist"),
        ("manifest.json", '{"a": 1', r"manifest\.json:1: is not valid JSON"),
        ("manifest.json", "[]", "is not a JSON object"),
        ("metrics.json", "{", "is not valid JSON"),
        ("metrics.json", '{"systems": {}}', "is not an audit result: 'splits'"),
        ("metrics.json", b"\xff\xfe", "is not UTF-8"),
    ],
)
def test_broken_files_name_the_file_and_the_way_out(
    tmp_path: Path, name: str, content: str | bytes | None, message: str
) -> None:
    folder = make_run(tmp_path / "run")
    target = folder / name
    target.unlink()
    if content is not None:
        target.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(RunError, match=message) as caught:
        read_run(folder)
    assert str(target) in str(caught.value)
    assert "delible" in (caught.value.hint or "")


def test_no_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a directory"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(RunError, match="no run directory given"):
        read_runs([])


def test_read_runs_compares(tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two")
    assert read_runs([one]).runs == []
    both = read_runs([one, two])
    assert both.title == "2 runs compared"
    assert len(both.runs) == 2
    check(render(both))


def test_write_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "report.html"
    target.write_text("old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", fail)
        with pytest.raises(RunError, match="No space left"):
            write(EXAMPLE["minimal"](), target)
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert write(EXAMPLE["minimal"](), target) == target
    assert target.read_text().startswith("<!doctype html>")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(RunError, match="cannot be written"):
        write(EXAMPLE["minimal"](), tmp_path / "no" / "report.html")
