"""Which components can train a model that is spread over processes: what the page says is so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import spread_components  # type: ignore[import-not-found]
import torch
from safetensors.torch import load_file

SCRIPT = str(Path(__file__).parent / "spread_components.py")


def test_the_page_lists_what_is_refused() -> None:
    page = spread_components.PAGE.read_text("utf-8")
    listed = page.partition(spread_components.BEGIN)[2].partition(spread_components.END)[0]
    assert listed.strip() == spread_components.table(), f"python {SCRIPT} --table"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_component_learns_on_shares_what_it_learns_on_the_whole(tmp_path: Path) -> None:
    environment = {
        **os.environ, "ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_FSDP": "true",
        "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for start in ([], launcher):
        command = [sys.executable, *start, SCRIPT, str(tmp_path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
    one, two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in (1, 2))
    weights, others = (load_file(tmp_path / f"{n}.safetensors") for n in (1, 2))
    refused = {name for name, told in two.items() if "refused" in told}
    assert refused == {
        spread_components.named(card)
        for card in spread_components.cards()
        if spread_components.component(card).needs_whole() is not None
    }
    apart = []
    for name in one.keys() - refused:
        for mine, yours in zip(one[name]["history"], two[name]["history"], strict=True):
            told = [[value for value in part if value is not None] for part in (mine, yours)]
            if told[0] != pytest.approx(told[1], abs=1e-4, rel=1e-4):
                apart.append((name, mine, yours))
    for name, value in others.items():
        if not torch.allclose(weights[name], value, atol=1e-4, rtol=0):
            apart.append((name, float((weights[name] - value).abs().max())))
    assert not apart
