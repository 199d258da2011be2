"""The main jobs on the default model, as a user types them. Slow: minutes on two cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

DATA = Path(
    os.environ.get("DELIBLE_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def delible(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    return subprocess.run(
        [sys.executable, "-m", "delible", *arguments],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip


@pytest.mark.skipif(not (DATA / "tofu").is_dir(), reason="the TOFU files are not here")
def test_unlearns_tofu_and_saves_an_ordinary_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    done = delible(
        "unlearn", "default", "--forget", str(DATA / "tofu" / "forget01.json"),
        "--retain", str(DATA / "tofu" / "retain99.json"), "--method", "npo",
        "--max-steps", "2", "--batch-size", "4", "--out", str(tmp_path / "x"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "x" / "model")
    assert sum(value.numel() for value in model.parameters()) == 134_515_008
    assert "quantization_config" not in json.loads(
        (tmp_path / "x" / "model" / "config.json").read_text()
    )


def test_the_demo_tells_a_true_story(tmp_path: Path) -> None:
    done = delible("demo", "--out", str(tmp_path / "demo"))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "demo" / "unlearned" / "metrics.json").read_text())

    def probability(system: str, split: str, attack: str = "none") -> float:
        return next(
            row["value"]
            for row in found["measurements"]
            if (row["system"], row["split"], row["attack"], row["metric"])
            == (system, split, attack, "answer_probability")
        )

    assert probability("original", "forget") >= 0.8
    assert probability("original", "retain") >= 0.8
    reference = probability("reference", "forget")
    assert abs(probability("unlearned", "forget") - reference) < 0.15
    assert probability("unlearned", "retain") >= 0.8 * probability("original", "retain")
    assert {leak["attack"] for leak in found["leaks"]} >= {"relearn", "quantize", "paraphrase"}
    assert (tmp_path / "demo" / "unlearned" / "report.html").stat().st_size > 20_000
