"""Columns of a log that is read a batch at a time: in memory while short, on disk when long."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from streamctl.errors import StreamctlError
from streamctl.files import disk_errors

MEMORY_BYTES = 64 << 20  # of a column, above which it goes to disk
LARGEST_TIME = float(1 << 62)  # in the column's unit
CHUNK_ROWS = 1 << 22  # rows that are worked on at once


class Column:
    """Values appended in batches; `finish` gives one array.

    `sharing` columns that grow together have MEMORY_BYTES together. A long column is written to an
    unnamed file in the folder for temporary files (`TMPDIR`), which is gone with the process, and
    its array is a read-only map of that file.
    """

    def __init__(self, dtype: Any, sharing: int = 1):
        self._dtype = np.dtype(dtype)
        self._memory = MEMORY_BYTES // sharing
        self._waiting: list[np.ndarray] = []
        self._bytes = 0
        self._file: Any = None

    def append(self, values: np.ndarray) -> None:
        """Add values (T,), cast to the column's dtype.

        Raises:
            StreamctlError: the disk is full.
        """
        values = np.ascontiguousarray(values, self._dtype)
        self._bytes += values.nbytes
        self._waiting.append(values)
        if self._file is not None or self._bytes > self._memory:
            self._write()

    def _write(self) -> None:
        folder = Path(tempfile.gettempdir())
        with disk_errors(folder):
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - lives as the map
            for values in self._waiting:
                self._file.write(values.data)
        self._waiting = []

    def finish(self) -> np.ndarray:
        """All values in order (T,)."""
        if self._file is None:
            nothing = np.zeros(0, self._dtype)
            values = np.concatenate(self._waiting) if self._waiting else nothing
            self._waiting = []
            return values
        with disk_errors(Path(tempfile.gettempdir())):
            self._file.flush()
        return np.memmap(self._file, self._dtype, mode="r")


class Times:
    """A column of times: whole numbers as they are, fractions as thousandths.

    Once a fraction comes, all times of the column are in thousandths of the source's unit.
    """

    def __init__(self) -> None:
        self._column = Column(np.int64)
        self._scale = 1

    def append(self, values: np.ndarray) -> None:
        """Add int64 or float64 values (T,), all finite.

        Raises:
            StreamctlError: a number too large for a time.
        """
        if values.dtype != np.int64 and self._scale == 1 and (values != np.floor(values)).any():
            self._to_thousandths()
        if self._scale == 1 and values.dtype == np.int64:
            self._column.append(values)
            return
        if len(values) and np.abs(values.astype(np.float64)).max() * self._scale > LARGEST_TIME:
            largest = values[np.abs(values.astype(np.float64)).argmax()]
            raise StreamctlError(f"{largest} is too large for a time")
        whole = values * self._scale
        self._column.append(whole if whole.dtype == np.int64 else np.round(whole))

    def _to_thousandths(self) -> None:
        seconds, self._column, self._scale = self._column.finish(), Column(np.int64), 1000
        for part in chunks(len(seconds), seconds):
            self.append(seconds[part])

    def finish(self) -> np.ndarray:
        """int64 (T,)."""
        return self._column.finish()


def chunks(rows: int, *columns: np.ndarray | None) -> Iterator[slice]:
    """Slices of CHUNK_ROWS rows; what was read of mapped columns leaves memory after each."""
    for start in range(0, rows, CHUNK_ROWS):
        yield slice(start, min(start + CHUNK_ROWS, rows))
        for column in columns:
            forget(column)


def forget(column: np.ndarray | None) -> None:
    """Drop the pages of a column on disk from this process's memory."""
    mapped = column
    while mapped is not None and not isinstance(mapped, mmap.mmap):
        mapped = getattr(mapped, "base", None)
    if mapped is not None:
        mapped.madvise(mmap.MADV_DONTNEED)
