"""Rows of unequal length in flat arrays, which grow in place while others read them."""

from __future__ import annotations

import numpy as np

_SLACK = 4  # free places after a row that has moved, and a quarter of its length more


class Ragged:
    """N rows; a row's entries lie side by side, with the same places in every column.

    A reader that holds the arrays sees whole entries: a row that outgrows its place is copied to
    the end first, and then named.

    Attributes:
        starts, sizes: (N,) int64; row n is at starts[n]:starts[n] + sizes[n] of each column.
        columns: flat arrays.
    """

    def __init__(self, starts: np.ndarray, sizes: np.ndarray, *columns: np.ndarray):
        self.starts, self.sizes = starts.astype(np.int64), sizes.astype(np.int64)
        self.columns = list(columns)
        self._room = self.sizes.copy()
        self._used = len(columns[0])

    @classmethod
    def of_blocks(cls, blocks: list[tuple[np.ndarray, ...]]) -> Ragged:
        """From the rows' sizes and their columns, some rows at a time."""
        sizes, *columns = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
        return cls(np.cumsum(sizes) - sizes, sizes, *columns)

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """starts, sizes and the columns, as compiled code takes them."""
        return self.starts, self.sizes, *self.columns

    def row(self, number: int) -> list[np.ndarray]:
        """Views of one row's columns; writing to them changes it."""
        start, size = self.starts[number], self.sizes[number]
        return [column[start : start + size] for column in self.columns]

    def add_rows(self, count: int) -> None:
        """Empty rows at the end."""
        nothing = np.zeros(count, np.int64)
        self.starts = np.concatenate([self.starts, nothing])
        self._room = np.concatenate([self._room, nothing])
        self.sizes = np.concatenate([self.sizes, nothing])

    def append(self, number: int, *entry: float) -> None:
        """One more entry at the end of a row."""
        size = int(self.sizes[number])
        if size == self._room[number]:
            self._move(number, size + size // 4 + _SLACK)
        for column, value in zip(self.columns, entry, strict=True):
            column[self.starts[number] + size] = value
        self.sizes[number] = size + 1

    def _move(self, number: int, room: int) -> None:
        start, size, end = int(self.starts[number]), int(self.sizes[number]), self._used
        if end + room > len(self.columns[0]):
            more = max(room, len(self.columns[0]) // 4)
            self.columns = [np.concatenate([c, np.zeros(more, c.dtype)]) for c in self.columns]
        for column in self.columns:
            column[end : end + size] = column[start : start + size]
        self.starts[number], self._room[number] = end, room
        self._used = end + room
