"""What a piece of work costs: seconds and peak memory."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from types import TracebackType

import psutil
import torch

#: Seconds between two looks at the memory.
INTERVAL = 0.05


@dataclass
class Cost:
    """Measures the block it surrounds: ``with Cost() as cost: …``.

    Attributes:
        seconds: Wall-clock time.
        peak_bytes: Most memory of the process during the block (of the GPU, if one is used).
    """

    seconds: float = 0.0
    peak_bytes: int = 0

    def __enter__(self) -> Cost:
        self._cuda = torch.cuda.is_available()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._began = time.perf_counter()
        self._watcher.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.seconds = time.perf_counter() - self._began
        self._done.set()
        self._watcher.join()
        if self._cuda:
            self.peak_bytes = torch.cuda.max_memory_allocated()

    def _watch(self) -> None:
        process = psutil.Process()
        while True:
            self.peak_bytes = max(self.peak_bytes, process.memory_info().rss)
            if self._done.wait(INTERVAL):
                return
