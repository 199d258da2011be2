"""Two processes share a measurement: all get all answers, and they are those of one process."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

from every_kind import every_kind, require_equal, tiny

from delible.measure.cache import Cache
from delible.measure.engine import measure

SCRIPT = """
import pickle, sys
from datetime import timedelta
from pathlib import Path
import torch.distributed as processes
sys.path.insert(0, sys.argv[1])
from every_kind import every_kind, tiny
from delible.measure import engine
from delible.measure.cache import Cache

processes.init_process_group("gloo", timeout=timedelta(seconds=120))
assert processes.get_world_size() == 2, processes.get_world_size()
rank, folder = processes.get_rank(), Path(sys.argv[2])
engine.CHUNK = 4
asked = []
ask = engine._ask
engine._ask = lambda system, chunk: asked.extend(chunk) or ask(system, chunk)

lm, requests = tiny(), every_kind()
# What is on disk is read by both, even if only one of them sees it.
plain = engine.measure(lm, requests)
counts = [len(asked)]
mine = Cache(folder / f"cache-{rank}")
if rank == 0:
    mine.write(lm.fingerprint, {request: plain[request] for request in requests[:20]})
half = engine.measure(lm, requests[::-1] if rank else requests, cache=mine)
counts.append(len(asked))
shared = Cache(folder / "cache")
engine.measure(lm, requests, cache=shared)
counts.append(len(asked))
processes.barrier()
again = engine.measure(lm, requests, cache=shared)
counts.append(len(asked))
(folder / f"{rank}.pickle").write_bytes(
    pickle.dumps((dict(plain), dict(half), dict(again), plain.report, half.report, again.report,
                  counts))
)
processes.destroy_process_group()
"""


def test_two_processes_give_the_answers_of_one(tmp_path: Path) -> None:
    script = tmp_path / "measure.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
            "--standalone", str(script), str(Path(__file__).parent),
            str(tmp_path),
        ],
        env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]

    requests, lm = every_kind(), tiny()
    alone = measure(lm, requests)
    told = [pickle.loads((tmp_path / f"{rank}.pickle").read_bytes()) for rank in (0, 1)]
    for plain, half, again, *_ in told:
        for found in (plain, half, again):
            require_equal(found, alone, requests)
    reports = [part[3:6] for part in told]
    assert reports[0] == reports[1]
    plain_report, half_report, again_report = reports[0]
    assert plain_report == alone.report
    stored = half_report.cached
    assert 10 < stored < len(requests)
    # Whole distributions are never stored.
    assert again_report.unique - again_report.cached == 8

    # Each did its part, and both together did everything once.
    counts = [part[6] for part in told]
    done_by = [[count[0], count[1] - count[0], count[2] - count[1]] for count in counts]
    wanted = [plain_report.unique, plain_report.unique - stored, plain_report.unique]
    for mine, other, whole in zip(*done_by, wanted, strict=True):
        assert mine + other == whole
        assert min(mine, other) > 0.25 * whole
    assert sum(count[3] - count[2] for count in counts) == 8
    # What both wrote is what one process finds.
    cached = measure(lm, requests, cache=Cache(tmp_path / "cache"))
    require_equal(cached, alone, requests)
    assert cached.report == again_report
