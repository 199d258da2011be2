"""Peak resident memory of this process, read so that loading a model can be left out."""

from __future__ import annotations

import resource
from pathlib import Path

import psutil


def forget_peak() -> float:
    """Starts the count of the peak anew (Linux); returns the resident memory now, in GiB."""
    references = Path("/proc/self/clear_refs")
    if references.exists():
        references.write_text("5")
    return float(psutil.Process().memory_info().rss / 2**30)


def peak_gib() -> float:
    """Peak resident memory of this process since it started, or since :func:`forget_peak`.

    Linux hands the parent's peak on to ``ru_maxrss`` of a new program, so its own is read.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30
