"""A column that is filled a batch at a time: in memory while short, on disk when long."""

from __future__ import annotations

import mmap
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from streamctl.files import disk_errors

MEMORY_BYTES = 64 << 20  # of a column, above which it goes to disk


class Column:
    """`rows` values; a long column is a map of an unnamed file in the folder for temporary files
    (`TMPDIR`), which is gone with the process.

    Raises:
        StreamctlError: the disk is full.
    """

    def __init__(self, dtype: Any, rows: int):
        self._dtype, self._rows, self._at = np.dtype(dtype), rows, 0
        self._file = self._values = None
        if rows * self._dtype.itemsize > MEMORY_BYTES:
            with disk_errors(Path(tempfile.gettempdir())):
                self._file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as the map
        else:
            self._values = np.empty(rows, self._dtype)

    def append(self, values: np.ndarray) -> None:
        """Put values behind those that are there."""
        if self._file is None:
            self._values[self._at : self._at + len(values)] = values
        else:
            with disk_errors(Path(tempfile.gettempdir())):
                self._file.write(np.ascontiguousarray(values, self._dtype).data)
        self._at += len(values)

    def finish(self) -> np.ndarray:
        """All values in order (T,)."""
        if self._file is None:
            return self._values
        with disk_errors(Path(tempfile.gettempdir())):
            self._file.flush()
        return np.memmap(self._file, self._dtype, mode="r+", shape=(self._rows,))


def forget(column: np.ndarray | None) -> None:
    """Drop the pages of a column on disk from this process's memory."""
    mapped = column
    while mapped is not None and not isinstance(mapped, mmap.mmap):
        mapped = getattr(mapped, "base", None)
    if mapped is not None:
        mapped.flush()
        mapped.madvise(mmap.MADV_DONTNEED)
