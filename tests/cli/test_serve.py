"""``delible serve``: what is opened, guarded, and handed to the server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from delible.gateway import running
from delible.gateway.models import ServedModel
from delible.gateway.settings import GatewaySettings
from delible.lm.lm import LM
from delible.systems.guarded import GuardedSystem


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, GatewaySettings]]:
    """What would be served, and how."""
    found: list[tuple[Any, GatewaySettings]] = []

    def run(models: list[ServedModel], settings: GatewaySettings, began: Any) -> None:
        found.append((models[0], settings))
        began("http://127.0.0.1:1/v1")

    monkeypatch.setattr(running, "run", run)
    return found


def test_a_model_is_served_as_flags_and_file_say(
    run: Any, tiny: Path, here: Path, served: list[Any]
) -> None:
    (here / "gateway.yaml").write_text("port: 9000\nidle_seconds: 7\n")
    done = run("serve", tiny, "--config", "gateway.yaml", "--port", "9001", "--undisclosed")
    assert (done.code, done.out) == (0, "")
    assert "'tiny' answers at http://127.0.0.1:1/v1." in done.err
    model, settings = served[0]
    assert isinstance(model.system, LM)
    assert (settings.port, settings.undisclosed) == (9001, True)
    assert settings.idle_seconds == pytest.approx(7)
    assert "Anyone" not in done.err
    assert "Anyone who reaches this address" in run("serve", tiny, "--host", "0.0.0.0").err
    run("serve", tiny, "--name", "mine")
    assert served[-1][0].name == "mine"


def test_a_guard_stands_before_it(run: Any, tiny: Path, served: list[Any]) -> None:
    guard = "{name: target_detector, similarity: false}"
    done = run("serve", tiny, "--guard", guard, "--subjects", "Ada Brook")
    assert done.code == 0, done.err
    model = served[0][0]
    assert isinstance(model.system, GuardedSystem)
    assert (model.name, model.guarded) == ("tiny", True)


def test_a_key_is_shown_once(run: Any, here: Path) -> None:
    done = run("serve", "--new-key", "ada", "--keys", "keys.jsonl")
    assert done.code == 0
    assert done.out.startswith("dlb-")
    assert "shown this once" in done.err
    text = (here / "keys.jsonl").read_text()
    assert json.loads(text)["name"] == "ada"
    assert done.out.strip() not in text
    assert "Add --keys FILE" in run("serve", "--new-key", "ada").err


def test_what_is_wrong_is_told_before_anything_is_opened(
    run: Any, tiny: Path, here: Path, served: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for words, said in (
        (("--guard", "target_detectr", "--subjects", "Ada"), "target_detector"),
        (("--subjects", "Ada"), "without a guard"),
        (("--port", "70000"), "'port' = 70000"),
        (("--keys", "none.jsonl", "--guard", "{threshold: 1}"), "names no guard"),
    ):
        done = run("serve", "nowhere", *words)
        assert (done.code, said in done.err) == (2, True), done.err
    assert "nothing to go by" in run("serve", tiny, "--guard", "target_detector").err
    assert served == []

    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(running, "import_module", missing)
    done = run("serve", tiny)
    assert (done.code, "pip install 'delible[gateway]'" in done.err) == (2, True)


def test_an_address_that_is_taken(run: Any, tiny: Path) -> None:
    with running.listening(GatewaySettings(port=0)) as place:
        done = run("serve", tiny, "--port", str(place.getsockname()[1]))
    assert done.code == 2
    assert "nobody can listen there" in done.err
