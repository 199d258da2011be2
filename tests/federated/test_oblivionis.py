"""The procedure through the whole of ``unlearn``: notes, artefact, faults, and going on."""

from __future__ import annotations

import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_clients import fact, held, plain, run, values, worn

import delible.federated.in_process as engine
from delible.api import unlearn
from delible.errors import DataError, RecipeError
from delible.federated import adapter as adapters
from delible.federated.local import work
from delible.federated.messages import Update
from delible.lm.lm import LM
from delible.procedures.oblivionis import Oblivionis
from delible.records import ForgetRequest
from delible.system import artefact as artefacts
from delible.systems.opening import open_lm, undo

REQUEST = ForgetRequest(
    forget=tuple(fact(n, "a") for n in range(2)),
    retain=tuple(fact(10 + n, "abc"[n % 3]) for n in range(9)),
)
QUICK: dict[str, Any] = {
    "rounds": 1, "epochs": 1, "batch_size": 4, "rank": 4, "unlearn_epochs": 1, "watched": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    plain().save(folder)
    return folder


def same(left: Any, right: Any) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(left[name], right[name]) for name in left
    )


def test_unlearn_keeps_an_adapter_and_says_what_the_clients_did(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    found = unlearn(str(base), REQUEST, method=Oblivionis(**QUICK), out=out, shown=1)
    notes = found.notes
    assert notes["clients"] == {
        "a": {"forget": 2, "retain": 3}, "b": {"forget": 0, "retain": 3},
        "c": {"forget": 0, "retain": 3},
    }  # fmt: skip
    assert [(one["phase"], one["round"]) for one in notes["curve"]] == [
        ("start", 0), ("unlearn", 1), ("recover", 1),
    ]  # fmt: skip
    assert all(0 <= one["forget"] <= 1 and 0 <= one["retain"] <= 1 for one in notes["curve"])
    assert notes["curve"][0]["forget"] != notes["curve"][1]["forget"]
    assert notes["bytes_down"] == notes["bytes_up"] == (1 + 3) * notes["adapter_bytes"]
    assert notes["left_out"] == {}
    assert list(notes["stages"]) == ["start", "unlearn-000", "recover-000"]
    assert artefacts.read(out).kind == "adapter"
    opened = open_lm(str(out))
    assert same(values(opened), values(found.model))
    undo(out)
    assert open_lm(str(out)).identity == LM.load(str(base)).identity


def test_going_on_with_an_adapter_it_stands_on_the_same_base(base: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    given: dict[str, Any] = {"shown": 0, "measured": False, "verify": False}
    unlearn(str(base), REQUEST, method=Oblivionis(**QUICK), out=first, **given)
    start = values(open_lm(str(first)))
    request = REQUEST.model_copy(update={"forget": (fact(11, "b"),)})
    found = unlearn(str(first), request, method=Oblivionis(**QUICK), out=second, **given)
    assert "undone" in found.notes
    assert artefacts.read(second).base == artefacts.read(first).base
    opened = open_lm(str(second))
    assert same(values(opened), values(found.model))
    assert values(opened).keys() == start.keys()
    assert not same(values(opened), start)


def test_a_client_that_sends_what_is_no_number_is_left_out_counted_and_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(lm: Any, client: str, *given: Any) -> Any:
        answer = work(lm, client, *given)
        if client == "b":
            assert isinstance(answer, Update)
            name = next(iter(answer.adapter))
            bad = answer.adapter[name].clone()
            bad.view(-1)[0] = math.nan
            return replace(answer, adapter={**answer.adapter, name: bad})
        return answer

    monkeypatch.setattr(engine, "work", broken)
    method = Oblivionis(**{**QUICK, "rounds": 2})
    found = unlearn(plain(), REQUEST, method=method, shown=0, measured=False)
    assert found.notes["left_out"] == {"b": {"not finite": 2}}
    assert any("client 'b' is left out" in one for one in caplog.messages)
    assert any("2 answers of clients were left out: b: not finite 2" in m for m in caplog.messages)
    assert all(bool(value.isfinite().all()) for value in values(found.model).values())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, to kill a process in its work")
@pytest.mark.parametrize("killed_at", [2, 6])
def test_killed_it_goes_on_to_the_same_bits(base: Path, tmp_path: Path, killed_at: int) -> None:
    method = Oblivionis(**{**QUICK, "rounds": 2, "watched": 0, "aggregation": "fedadam"})
    given: dict[str, Any] = {"method": method, "shown": 0, "measured": False, "verify": False}
    whole = unlearn(LM.load(str(base)), REQUEST, **given).model
    count = 0

    def kill(step: int, total: int, numbers: Any) -> None:
        nonlocal count
        count += 1
        if count == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        unlearn(str(base), REQUEST, out=tmp_path / "run", progress=kill, **given)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "it ended before it was killed"
    again = unlearn(str(base), REQUEST, out=tmp_path / "run", **given)
    assert same(values(again.model), values(whole))


def test_retraining_begins_from_nothing_and_needs_a_learned_adapter() -> None:
    method = Oblivionis(**QUICK, unlearn="retrain")
    with pytest.raises(RecipeError, match="must wear the adapter"):
        unlearn(plain(), REQUEST, method=method, shown=0, measured=False)
    ends = []
    for seed in (0, 1):  # two models that have learned different things
        lm = worn()
        learned = run(lm, held(), seed=seed, epochs=2).learn(values(lm), 1)
        adapters.put(lm, learned.adapter)
        found = unlearn(lm, REQUEST, method=method, shown=0, measured=False)
        ends.append(values(found.model))
        assert [one["phase"] for one in found.notes["curve"]] == ["start", "retrain"]
    assert same(*ends)  # are one that has never learned, and learns the same


def test_what_cannot_be_is_refused_before_anything_is_trained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine, "work", lambda *given: pytest.fail("it was trained"))
    nobodys = REQUEST.model_copy(update={"forget": (fact(1),)})
    for request, options, said in (
        (nobodys, {}, "1 of 10 records do not say whose they are"),
        (REQUEST, {"aggregation": "fedadam", "combine": "product"}, "moments"),
        (REQUEST, {"unlearn": "wagle"}, "place 'wagle'"),
        (REQUEST, {"unlearn": "npoo"}, "npoo"),
    ):  # fmt: skip
        with pytest.raises((RecipeError, DataError), match=said):
            unlearn(plain(), request, method=Oblivionis(**QUICK, **options), shown=0)  # type: ignore[arg-type]


def test_a_client_that_keeps_nothing_leaves(caplog: pytest.LogCaptureFixture) -> None:
    request = ForgetRequest(
        forget=tuple(fact(n, "z") for n in range(2)),
        retain=tuple(fact(9 + n, "ab"[n % 2]) for n in range(4)),
    )
    found = unlearn(plain(), request, method=Oblivionis(**QUICK), shown=0, measured=False)
    assert found.notes["left_wholly"] == ["z"]
    assert found.notes["without_retain_loss"] == ["z"]
    assert any("Client 'z' keeps nothing" in one for one in caplog.messages)


def test_rates_of_unlearning() -> None:
    from delible.train.recipe import Recipe

    npo, lora = Recipe.named("npo").training, Recipe.named("npo_lora").training
    found = Oblivionis().recipe().training
    assert found.learning_rate == pytest.approx(25 * npo.learning_rate) == lora.learning_rate
    assert found.learning_rate_width == npo.learning_rate_width
    assert Oblivionis(unlearn="npo_lora").recipe().training.learning_rate == lora.learning_rate
    chosen = Oblivionis(unlearn_learning_rate=1e-3, unlearn_epochs=3).recipe().training
    assert (chosen.learning_rate, chosen.epochs) == (1e-3, 3)
    for name in ("gradient_ascent", "graddiff", "npo", "simnpo", "dpo", "rmu"):
        Oblivionis().unlearning(Oblivionis(unlearn=name).recipe())


def test_a_search_looks_at_what_the_server_uses() -> None:
    plain_ranges = Oblivionis().ranges()
    assert set(plain_ranges) == {"learning_rate", "epochs"}
    assert (plain_ranges["epochs"].low, plain_ranges["epochs"].high) == (2, 10)
    assert plain_ranges["learning_rate"].low == pytest.approx(5e-5)
    assert "proximal" in Oblivionis(aggregation="fedprox").ranges()
    adaptive = Oblivionis(aggregation="fedyogi", unlearn_learning_rate=0.2).ranges()
    assert {"server_learning_rate", "tau", "unlearn_learning_rate"} <= set(adaptive)
    assert adaptive["unlearn_learning_rate"].high == pytest.approx(1.0)
    for name in adaptive:
        assert Oblivionis().takes(name)
