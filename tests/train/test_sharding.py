"""A model that is spread over processes (FSDP2) learns and says what the whole one does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import spread_runs  # type: ignore[import-not-found]
import torch
from safetensors.torch import load_file
from tiny_runs import make  # type: ignore[import-not-found]

from delible.errors import ModelError, RecipeError, RunError
from delible.lm.body import Budget
from delible.train.engine import Trainer
from delible.train.processes import open_processes
from delible.train.recipe import Recipe
from delible.train.sharding import check_shares, explain_loss

SCRIPT = str(Path(__file__).parent / "spread_runs.py")
SPREAD = {"ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_FSDP": "true", "OMP_NUM_THREADS": "1"}


def started(folder: Path, processes: int, *tasks: str) -> list[subprocess.Popen[str]]:
    """Processes that train together, without torchrun, which takes seconds and ends them itself."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = str(place.getsockname()[1])
    shared = {
        **os.environ, **SPREAD, "PYTHONPATH": os.pathsep.join(sys.path), "MASTER_PORT": port,
        "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(folder), *tasks],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(processes)
    ]  # fmt: skip


def together(folder: Path, processes: int, *tasks: str) -> None:
    running = started(folder, processes, *tasks)
    try:
        for one in running:
            _, said = one.communicate(timeout=900)
            assert one.returncode == 0, said[-6000:]
    finally:
        for one in running:
            one.kill()


def found(folder: Path, name: str) -> dict[str, Any]:
    numbers: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return numbers


def same(folder: Path, one: str, other: str) -> None:
    """Losses, norms and weights within 1e-4, and the same greedy answers."""
    left, right = found(folder, one), found(folder, other)
    assert len(left["history"]) == len(right["history"]) > 3
    for mine, yours in zip(left["history"], right["history"], strict=True):
        assert mine == pytest.approx(yours, abs=1e-4, rel=1e-4), other
    assert left["history"][0] != pytest.approx(left["history"][-1], abs=1e-2), one
    weights, others = (load_file(folder / f"{name}.safetensors") for name in (one, other))
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        torch.testing.assert_close(others[name], value, atol=1e-4, rtol=0, msg=f"{other}: {name}")
    assert left["answers"] == right["answers"]


def whole_again(folder: Path, name: str) -> None:
    """What was gathered is the model that was trained: its identity, and what it says."""
    told = found(folder, name)
    assert told["gathered"] == told["identity"]
    assert told["again"] == told["answers"]


def test_two_processes_share_a_model(tmp_path: Path) -> None:
    """Masked weights; adapters, gone on with by more and by fewer processes."""
    spread_runs.do(tmp_path, "stop")
    together(tmp_path, 2, "masked", "resume-1", "stop")
    for task in ("masked", "resume-2", "whole"):
        spread_runs.do(tmp_path, task)
    same(tmp_path, "masked-1", "masked-2")
    same(tmp_path, "whole-1", "resume-1-2")
    same(tmp_path, "whole-1", "resume-2-1")
    for name in ("masked-2", "resume-1-2"):
        whole_again(tmp_path, name)
    pieces = ("trainable", "optimizer", "memory")
    expected = {f"{kind}-0000{n}-of-00002.safetensors" for kind in pieces for n in (1, 2)}
    last = tmp_path / "of-2" / "checkpoint" / "last"
    assert {path.name for path in last.iterdir()} == {"state.json", *expected}
    halves = [load_file(last / f"trainable-0000{n}-of-00002.safetensors") for n in (1, 2)]
    sizes = [sum(value.numel() for value in half.values()) for half in halves]
    assert max(sizes) < 0.52 * sum(sizes)  # each has about a half


@pytest.mark.slow
def test_four_processes_go_on_from_two_and_back(tmp_path: Path) -> None:
    together(tmp_path, 2, "stop")
    together(tmp_path, 4, "full", "lora", "refused", "resume-2", "stop")
    together(tmp_path, 2, "full", "resume-4", "inside", "recomputed", "bf16", "unlearn")
    for task in ("full", "lora", "inside", "recomputed", "whole", "bf16", "unlearn"):
        spread_runs.do(tmp_path, task)
    runs = (("full", 2), ("full", 4), ("lora", 4), ("inside", 2), ("recomputed", 2))
    for task, processes in runs:
        same(tmp_path, f"{task}-1", f"{task}-{processes}")
        whole_again(tmp_path, f"{task}-{processes}")
    same(tmp_path, "whole-1", "resume-2-4")
    same(tmp_path, "whole-1", "resume-4-2")
    whole_again(tmp_path, "bf16-2")  # to the last bit also where weights are cast
    assert "harden 'curvature'" in found(tmp_path, "refused-4")["error"]
    one, two = found(tmp_path, "unlearn-1"), found(tmp_path, "unlearn-2")
    for mine, yours in zip(one["history"], two["history"], strict=True):
        assert mine == pytest.approx(yours, abs=1e-4, rel=1e-4)
    assert one["answers"] == two["answers"]
    saved = [load_file(tmp_path / f"npo_lora-{n}" / "model" / "model.safetensors") for n in (1, 2)]
    assert saved[0].keys() == saved[1].keys()
    for name, value in saved[0].items():
        torch.testing.assert_close(saved[1][name], value, atol=1e-4, rtol=0, msg=name)


@pytest.mark.slow
def test_a_lost_process_ends_the_run_with_one_message(tmp_path: Path) -> None:
    first, second = started(tmp_path, 2, "slow")
    assert second.stdout is not None
    for line in second.stdout:
        if line.strip() == "step 4":
            break
    began = time.monotonic()
    second.kill()
    _, said = first.communicate(timeout=120)
    assert time.monotonic() - began < 120
    assert first.returncode == 1
    assert "RunError" in said
    assert "another process of this run is gone" in said
    for task in ("resume-killed", "whole"):
        spread_runs.do(tmp_path, task)
    same(tmp_path, "whole-1", "resume-killed-1")


# ---- in one process


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("WORLD_SIZE", "2")


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize(
    ("slots", "options", "named"),
    [
        ({"harden": "gradient_penalty"}, {}, "harden 'gradient_penalty'"),
        ({"harden": "tar"}, {}, "harden 'tar'"),
        ({"finish": "calibrate"}, {}, "finish 'calibrate'"),
        ({"place": {"name": "sure", "every_step": True}}, {}, "place 'sure'"),
        ({"weigh": {"name": "attribution", "refresh_every": 1}}, {}, "weigh 'attribution'"),
        ({"place": "lora"}, {"base_precision": "int8"}, "packed in int8"),
        ({}, {"optimizer": "adamw_8bit"}, "adamw_8bit"),
        ({}, {"offload_activations": True}, "offload_activations"),
    ],
)
def test_what_needs_the_whole_model_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, slots: dict[str, Any], options: dict[str, Any], named: str
) -> None:
    def work(self: object) -> None:
        raise AssertionError("it began")

    monkeypatch.setattr(Trainer, "_train", work)
    recipe = Recipe.named("npo").changed(slots, options)
    with pytest.raises(RecipeError, match=named):
        Trainer(make(), recipe, spread_runs.RECORDS).train()


@pytest.mark.usefixtures("asked")
def test_the_same_components_are_taken_with_other_options() -> None:
    slots = {"place": {"name": "sure"}, "weigh": {"name": "attribution"}}
    check_shares(Recipe.named("npo").changed(slots, {}))


@pytest.mark.usefixtures("asked")
def test_what_trains_several_models_is_refused(tmp_path: Path) -> None:
    from delible.bench.run import bench
    from delible.sequence.run import unlearn_sequence

    with pytest.raises(RunError, match="a sequence of requests trains whole models"):
        unlearn_sequence("tiny", [], out=tmp_path)
    with pytest.raises(RunError, match="a benchmark trains whole models"):
        bench("tofu", methods=["npo"], model="tiny")


def test_one_process_refuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    check_shares(Recipe.named("npo").changed({"harden": "tar"}, {}))


def test_deepspeed_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(RunError, match=r"DeepSpeed.*--use_fsdp"):
        open_processes()


def test_other_versions_elsewhere_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from delible.train import processes

    def both(items: list[dict[str, str]], world: int) -> list[dict[str, str]]:
        return [*items, {**items[0], "torch": "1.0"}]

    monkeypatch.setattr(processes, "gathered", both)
    with pytest.raises(RunError, match=r"different versions of torch:.*process 1 has \['1.0'\]"):
        open_processes()


def test_only_what_a_backend_says_is_a_lost_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(RunError, match="another process of this run is gone"), explain_loss():
        raise RuntimeError("Connection closed by peer [127.0.0.1]:29920")
    with pytest.raises(RuntimeError, match="shape"), explain_loss():
        raise RuntimeError("a wrong shape")


def test_a_spread_model_is_not_copied_or_saved(tmp_path: Path) -> None:
    lm = make()
    lm.sharded = object()
    for attempt in (lm.copy, lambda: lm.save(tmp_path / "model")):
        with pytest.raises(ModelError, match=r"Call gather\(\)"):
            attempt()


def test_the_least_of_all_budgets_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    from delible.lm import sharded

    def gather(found: list[Any], mine: Budget) -> None:
        found[:] = [mine, Budget(tokens=100, cached_tokens=900, rows=3)]

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    assert sharded.agreed(Budget(200, 800, 4)) == Budget(100, 800, 3)
