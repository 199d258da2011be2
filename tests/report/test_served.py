"""Runs side by side, served: filters by subject and attack, answers between start and result."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from page_opening import open_page

import delible
from delible.api import unlearn
from delible.cli.main import main
from delible.errors import DelibleError, RecipeError, RunError
from delible.files import write_json
from delible.ledger.private import _scrub
from delible.lm.between import interpolated, move_between
from delible.lm.lm import LM
from delible.loaders import write_records
from delible.records import QA, ForgetRequest
from delible.report.line import Line
from delible.report.served import Run, page, serve
from delible.report.side_by_side import Row, choices, compared, read_rows
from delible.system.artefact import Artefact, Base, write
from delible.testing.tiny import tiny_model, tiny_tokenizer

ROWS = [
    QA(question=f"Town of person {n}?", answer=f"Town {n}.", subject=f"Person {n // 2}")
    for n in range(6)
]
REQUEST = ForgetRequest(forget=tuple(ROWS[:4]), retain=tuple(ROWS[4:]))
QUICK: dict[str, Any] = {
    "method": "graddiff", "max_steps": 3, "learning_rate": 1e-2, "precision": "float32",
}  # fmt: skip


def row(system: str, value: float, **changed: Any) -> Row:
    about = {"attack": "none", "variant": "", "metric": "m", "subject": "Ada", **changed}
    return Row(system=system, value=value, **about)  # type: ignore[arg-type]


# ---- what is compared


def test_means_are_of_the_chosen_subject_attack_and_measure() -> None:
    first = [
        row("unlearned", 0.2), row("unlearned", 0.4), row("unlearned", 0.9, subject="Ben"),
        row("original", 1.0), row("unlearned", 0.7, attack="prefill", variant="Sure"),
        row("unlearned", 0.01, metric="other"),
    ]  # fmt: skip
    second = [row("unlearned", 0.6)]
    can = choices([first, second])
    assert can.subjects == ["Ada", "Ben"]
    assert can.attacks == ["none", "prefill"]
    assert can.metrics == ["m", "other"]

    found = compared([first, second], "m", "Ada", None)
    assert [way for way, _ in found] == [("none", ""), ("prefill", "Sure")]
    plain, others = found[0][1]
    assert plain.means == {"unlearned": pytest.approx(0.3), "original": 1.0}
    assert plain.records == 2
    assert others.means == {"unlearned": pytest.approx(0.6)}
    assert found[1][1][1].means == {}

    everybody = compared([first, second], "m", None, "none")
    assert [way for way, _ in everybody] == [("none", "")]
    assert everybody[0][1][0].means["unlearned"] == pytest.approx(0.5)


def test_a_damaged_file_is_told_and_a_missing_one_is_no_rows(tmp_path: Path) -> None:
    assert read_rows(tmp_path) == []
    (tmp_path / "items.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(RunError, match="cannot be read"):
        read_rows(tmp_path)


# ---- the line of weights


def test_a_third_model_is_moved_between_two() -> None:
    first, second = (
        LM(tiny_model("llama", seed=seed), tiny_tokenizer(), precision="float32") for seed in (1, 2)
    )
    third = first.copy()
    for share in (0.0, 0.25, 1.0):
        before = third.fingerprint
        move_between(third, first, second, share)
        assert (third.fingerprint == before) == (share == 0.0)
        for name, value in third.model.named_parameters():
            ends = [dict(lm.model.named_parameters())[name].double() for lm in (first, second)]
            expected = (1 - share) * ends[0] + share * ends[1]
            torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-6)
    other = LM(tiny_model("gpt2"), tiny_tokenizer(), precision="float32")
    with pytest.raises(RecipeError, match="same parameters"):
        interpolated(first, other, 0.5)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs from one saved model, the first one audited."""
    folder = tmp_path_factory.mktemp("served")
    LM(tiny_model("llama"), tiny_tokenizer(), precision="float32").save(folder / "start")
    made = []
    for name, method in (("first", "graddiff"), ("second", "npo_lora")):
        lm = LM.load(str(folder / "start"), precision="float32")
        options = {**QUICK, "method": method}
        unlearn(lm, REQUEST, out=folder / name, measured=False, shown=0, **options)
        made.append(folder / name)
    delible.audit(
        str(made[0]), REQUEST, before=str(folder / "start"), attacks=["prefill"], out=made[0],
        metrics=["answer_probability"],
    )  # fmt: skip
    return made


@pytest.fixture(scope="module")
def address(runs: list[Path]) -> Iterator[str]:
    """Where both are served, by a server of its own."""
    told: list[str] = []
    ready = threading.Event()

    def began(where: str) -> None:
        told.append(where)
        ready.set()

    import uvicorn

    servers: list[uvicorn.Server] = []
    original = uvicorn.Server.run

    def kept(self: uvicorn.Server, **options: Any) -> None:
        servers.append(self)
        original(self, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uvicorn.Server, "run", kept)
        thread = threading.Thread(target=serve, args=(runs, 0, began), daemon=True)
        thread.start()
        assert ready.wait(60)
        yield told[0].rstrip("/")
        servers[0].should_exit = True
        thread.join(20)
    assert not thread.is_alive()


def test_texts_that_went_from_a_run_go_from_its_page(tmp_path: Path) -> None:
    run_directory = tmp_path / "run"
    write_records(ROWS[:2], run_directory / "data" / "forget.jsonl")
    write_json(run_directory / "manifest.json", {"status": "done", "examples": []})
    (run_directory / "weights").write_bytes(b"numbers")
    made = Artefact(kind="model", base=Base(name="m"), parts={"w": "weights"})
    write(made, run_directory)  # what can be asked shows its questions
    run = Run(run_directory)
    assert ROWS[0].question in page([run], {})
    assert run.content is run.content, "read once"
    _scrub(run_directory, [ROWS[0].question])
    assert ROWS[0].question not in page([run], {})
    assert run.content.known == {}
    (run_directory / "manifest.json").unlink()
    with pytest.raises(RunError, match=r"manifest\.json"):
        page([run], {})


def test_answers_are_those_of_the_models_on_the_line(runs: list[Path], address: str) -> None:
    question = ROWS[0].question
    said = {
        share: httpx2.post(
            f"{address}/answers", json={"run": 1, "share": share, "question": question}, timeout=60
        ).json()
        for share in (0.0, 0.5, 1.0)
    }
    assert said[0.0]["expected"] == ROWS[0].answer
    for share, end in ((0.0, "start"), (1.0, "result")):
        assert said[share]["between"]["text"] == said[share][end]["text"]
        assert said[share]["between"]["probability"] == pytest.approx(
            said[share][end]["probability"], abs=1e-6
        )
    halves = said[0.5]
    assert halves["start"]["probability"] != pytest.approx(halves["result"]["probability"], rel=0.1)
    line = Line(runs[0])
    half = interpolated(line.start, line.result, 0.5)
    from delible.train.monitor import answer_probability

    assert halves["between"]["probability"] == pytest.approx(
        answer_probability(half, ROWS[:1]), abs=1e-6
    )
    unknown = httpx2.post(
        f"{address}/answers", json={"run": 2, "share": 1, "question": "Who?"}, timeout=60
    ).json()
    assert unknown["expected"] is None
    assert unknown["result"]["probability"] is None


def test_the_page_filters_without_a_script(address: str) -> None:
    whole = httpx2.get(address, timeout=60).text
    for part in ("1. graddiff", "2. npo_lora", "Person 0", "Person 1", "Prefilled answers"):
        assert part in whole
    asked = {"subject": "Person 1", "attack": "none", "metric": "answer_probability"}
    one = httpx2.get(address, params=asked, timeout=60).text
    assert "of the records about Person 1" in one
    body = one.split('id="knowledge-table"')[1].split("</table>")[0]
    assert "Prefilled" not in body
    assert '<option value="Person 1" selected>' in one
    strange = httpx2.get(address, params={"subject": "<script>alert(1)</script>"}, timeout=60).text
    assert "alert(1)" not in strange
    report = httpx2.get(f"{address}/runs/2", timeout=60)
    assert report.status_code == 200
    assert "Not audited" in report.text


@pytest.mark.parametrize(
    ("path", "options", "status"),
    [
        ("/answers", {"json": {"run": 9, "share": 0, "question": "Q"}}, 404),
        ("/answers", {"json": {"run": 1, "share": 2, "question": "Q"}}, 422),
        ("/answers", {"json": {"run": 1, "share": 0, "question": ""}}, 422),
        ("/answers", {"content": b"{", "headers": {"content-type": "application/json"}}, 422),
        ("/answers", {"data": {"run": 1, "share": 0, "question": "Q"}}, 415),
    ],
)
def test_what_cannot_be_asked_is_told(
    address: str, path: str, options: dict[str, Any], status: int
) -> None:
    reply = httpx2.post(f"{address}{path}", timeout=60, **options)
    assert reply.status_code == status
    assert reply.json()["error"]


def test_only_this_machine_is_answered(address: str) -> None:
    """A name that somebody else's server gave this address to (DNS rebinding) is refused."""
    assert httpx2.get(address, headers={"Host": "example.org"}, timeout=60).status_code == 400
    assert httpx2.get(f"{address}/runs/7", timeout=60).status_code == 404


def test_a_guard_has_no_line(tmp_path: Path) -> None:
    LM(tiny_model("llama"), tiny_tokenizer(), precision="float32").save(tmp_path / "start")
    lm = LM.load(str(tmp_path / "start"), precision="float32")
    unlearn(lm, REQUEST, method="refuse_by_prompt", out=tmp_path / "run", measured=False, shown=0)
    with pytest.raises(DelibleError, match="no part of the weights"):
        Line(tmp_path / "run")


def test_bad_command_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path), "--port", "1"]) == 2
    assert "--serve" in capsys.readouterr().err
    assert main(["report", str(tmp_path), "--serve", "--out", "x.html"]) == 2
    assert main(["report", str(tmp_path / "none"), "--serve"]) == 2
    assert "is not a directory" in capsys.readouterr().err


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
def test_in_a_browser_by_keyboard(browser: Any, address: str, width: int, scheme: str) -> None:
    """Every field has a name, the slider moves by arrow keys, and what it brings is announced."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    open_page(browser, f"{address}/", width, scheme)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    fields = browser.find_elements(By.CSS_SELECTOR, "select, input, button")
    assert len(fields) >= 8
    assert [one.get_attribute("outerHTML") for one in fields if not one.accessible_name] == []

    def told() -> str:
        return str(browser.find_element(By.ID, "answers").text)

    def waits(share: str) -> None:
        WebDriverWait(browser, 60).until(
            lambda _: (
                f"In between, {share}\u202f%" in told()
                and browser.find_element(By.ID, "answers").get_attribute("aria-busy") == "false"
            )
        )

    browser.find_element(By.NAME, "question").send_keys(Keys.ENTER)
    waits("50")
    assert "probability of the expected answer" in told()
    slider = browser.find_element(By.NAME, "share")
    assert slider.accessible_name.startswith("Share of the way")
    slider.send_keys(Keys.ARROW_LEFT)
    waits("45")
    slider.send_keys(Keys.HOME)
    waits("0")
    place = browser.find_element(By.ID, "answers")
    assert place.aria_role == "status"
    assert place.get_attribute("aria-live") == "polite"
    assert browser.get_log("browser") == []
    outside = browser.execute_script(
        "return [...document.querySelectorAll('main *')].filter(e =>"
        " !e.closest('.scroll, .hidden, svg') && e.getBoundingClientRect().right > innerWidth + 1)"
        ".map(e => e.outerHTML.slice(0, 80))"
    )
    assert outside == []
