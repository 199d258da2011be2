"""Unit vectors in one file: row after row of float32, without a header.

    cosine(q, v) = sum_i q_i v_i      rounded once: the same whatever stands beside v in the file

A search multiplies all rows in float32 and counts the few that could be among the best exactly, so
its order is that of exact arithmetic. Which row belongs to which item is the database's to say; a
file that is longer than it says ends with what a killed process left.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from math import fsum
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from delible.errors import RunError
from delible.memory import steps

#: The file.
VECTORS = "vectors.f32"
#: Rows that are multiplied at a time.
BLOCK = 16_384
#: Rounding of a float32 dot product of two unit vectors is below this, times their width.
ROUNDING = 2.0**-22


class Vectors:
    """A file of rows.

    Args:
        path: The file; it need not be there.
        width: Numbers in a row.
    """

    def __init__(self, path: Path, width: int) -> None:
        self.path, self.width = path, width
        self._mapped: Float[np.ndarray, "row width"] | None = None

    @property
    def row_bytes(self) -> int:
        return 4 * self.width

    def size(self) -> int:
        """Bytes of the file."""
        return self.path.stat().st_size if self.path.exists() else 0

    def fits(self, rows: int) -> bool:
        """Whether the file is as long as so many rows are."""
        return self.size() == rows * self.row_bytes

    def read(self, slots: list[int]) -> Float[np.ndarray, "slot width"]:
        """Some rows, in the given order."""
        if not slots:
            return np.zeros((0, self.width), dtype=np.float32)
        return np.array(self._rows(max(slots) + 1)[slots])

    def write(self, rows: Mapping[int, bytes]) -> None:
        """Puts rows into their slots, at the end or in the middle; they are on disk afterwards."""
        if not rows:
            return
        steps.reached("vectors: open")
        with os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
            for slot, row in sorted(rows.items()):
                steps.reached("vectors: write a row")
                file.seek(slot * self.row_bytes)
                file.write(row)
            file.flush()
            steps.reached("vectors: sync")
            os.fsync(file.fileno())

    def shorten(self, rows: int) -> None:
        """Ends the file after so many rows; what stood behind is overwritten with zeros first."""
        end = rows * self.row_bytes
        left = self.size() - end
        if left < 0:
            raise RunError(
                f"has {self.size():,} bytes where {end:,} are expected.",
                where=str(self.path),
                hint="Vectors are missing: bring the file back from where it was copied to.",
            )
        if left == 0:
            return
        self._mapped = None
        with self.path.open("r+b") as file:
            file.seek(end)
            steps.reached("vectors: zero the end")
            while left > 0:
                left -= file.write(bytes(min(left, 1 << 20)))
            file.flush()
            os.fsync(file.fileno())
            steps.reached("vectors: shorten")
            file.truncate(end)
            os.fsync(file.fileno())
            steps.reached("vectors: shortened")

    def closest(
        self,
        query: Float[np.ndarray, width],
        rows: int,
        count: int,
        among: Int[np.ndarray, slot] | None = None,
    ) -> dict[int, float]:
        """Slots that may be among the best, with their exact cosines to a unit vector.

        Args:
            query: float32, of length 1 (or 0).
            rows: How many rows count.
            count: How many best ones are wanted; ties with the last of them are all there.
            among: Only these slots; None: all.
        """
        chosen = np.arange(rows) if among is None else np.sort(among)
        if count < 1 or not len(chosen):
            return {}
        everything = self._rows(rows)
        rough = np.empty(rows, dtype=np.float32)
        for start in range(0, rows, BLOCK):
            np.matmul(everything[start : start + BLOCK], query, out=rough[start : start + BLOCK])
        rough = rough if among is None else rough[chosen]
        if len(rough) > count:
            least = np.partition(rough, len(rough) - count)[len(rough) - count]
            chosen = chosen[rough >= least - 2 * ROUNDING * self.width]
        wanted, known = query.astype(np.float64), dict[bytes, float]()
        found: dict[int, float] = {}
        for slot, row in zip(chosen.tolist(), everything[chosen], strict=True):
            same = row.tobytes()
            if same not in known:  # products of two float32 are exact in float64
                known[same] = fsum((row.astype(np.float64) * wanted).tolist())
            found[slot] = known[same]
        return found

    def _rows(self, rows: int) -> Float[np.ndarray, "row width"]:
        """The file as an array; mapped once while it keeps its length, which saves page faults."""
        held, there = self._mapped, self.size() // self.row_bytes
        if held is None or len(held) != there:
            held = np.memmap(self.path, dtype="<f4", mode="r", shape=(there, self.width))
            self._mapped = held
        return held[:rows]


__all__ = ["VECTORS", "Vectors"]
