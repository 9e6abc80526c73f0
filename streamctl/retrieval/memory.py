"""kNN memory: other users' prefixes and what came next, for the hop *others* (session-kNN)."""

from __future__ import annotations

import numpy as np

from streamctl.retrieval.ragged import Ragged
from streamctl.retrieval.transitions import BLOCK, NEXT, RECENCY, UNIT, ends_of, occurrences

WIDTH = 10  # latest items of a prefix that count: the tenth weighs 1/512 of the last


class Memory:
    """An inverted index over a row for each training prefix.

    A row is a sparse vector over items, of length 1: an item weighs its IDF times RECENCY for
    every item after it. The latest rows of an item are kept, so that a search costs the same
    however long the log is.

    Attributes:
        postings: N rows of (row int32, weight float32): the rows that have item n.
        owners: (R,) int32, the user of each row.
        following: (R, 4) int32, what the user took next, -1 past the end.
        idf: (N,) float32. keep: the most rows of one item.
        worth: (R, 4) float32, what each of `following` is worth as an event, or (0, 4): all the
            same.
    """

    def __init__(
        self,
        postings: Ragged,
        owners: np.ndarray,
        following: np.ndarray,
        idf: np.ndarray,
        keep: int,
        worth: np.ndarray,
    ):
        self.postings, self.idf, self.keep, self.worth = postings, idf, keep, worth
        self._owners, self._following, self._size = owners, following, len(owners)

    @classmethod
    def index(
        cls, items: np.ndarray, offsets: np.ndarray, n_items: int, keep: int = 2048,
        idf: np.ndarray | None = None, worth: np.ndarray | None = None,
    ) -> Memory:  # fmt: skip
        """Index every prefix of every sequence, user by user.

        Args:
            items: int32 (T,) all sequences, one after the other, oldest first.
            offsets: int64 (U + 1,) where each begins.
            keep: the most rows kept of one item, the last ones.
            idf: (N,) float32; None: of these sequences.
            worth: int64 (T,) units that a vote for each event is worth; by default one.
        """
        lengths, ends = np.diff(offsets), ends_of(offsets)
        first = np.arange(len(items)) == np.repeat(offsets[:-1], lengths)  # no prefix before it
        # The row of the prefix before each place.
        number = np.arange(len(items), dtype=ends.dtype) - np.cumsum(first, dtype=ends.dtype)
        targets = np.flatnonzero(~first).astype(ends.dtype)
        owners = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)[targets]
        if idf is None:
            popularity = np.bincount(items, minlength=n_items)
            idf = np.log1p(len(lengths) / (1.0 + popularity)).astype(np.float32)

        norms = np.empty(len(targets))
        following = np.empty((len(targets), len(NEXT)), np.int32)
        votes = np.empty((0 if worth is None else len(targets), len(NEXT)), np.float32)
        for start in range(0, len(targets), BLOCK):
            part = slice(start, start + BLOCK)
            target = targets[part]
            before = target[:, None] - 1 - np.arange(WIDTH)
            inside = before >= offsets[owners[part]][:, None]
            _, norms[part] = _weigh(np.where(inside, items[np.maximum(before, 0)], -1), idf)
            later = target[:, None] + np.arange(len(NEXT))
            within = later < ends[target][:, None]
            later = np.minimum(later, len(items) - 1)
            following[part] = np.where(within, items[later], -1)
            if worth is not None:
                votes[part] = np.where(within, worth[later] / UNIT, 1)

        kept, bits = [], len(targets).bit_length()
        for lowest, starts, places in occurrences(items, n_items):
            item = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
            rows = np.minimum(WIDTH, ends[places] - 1 - places)  # prefixes that have it in reach
            through = np.concatenate([[0], np.cumsum(rows)])
            # An item that comes again soon is in some of the same prefixes: at most WIDTH ** 2.
            late = through[starts[item + 1]] - through[1:] < keep + WIDTH**2
            item, places, rows = item[late], places[late], rows[late]
            past = np.arange(rows.sum()) - np.repeat(np.cumsum(rows) - rows, rows)
            row = number[np.repeat(places, rows) + 1 + past]
            key = (np.repeat(item, rows) << bits | row) << 4 | WIDTH - 1 - past
            key.sort(kind="stable")  # it nearly is
            item, row, past = key >> 4 + bits, (key >> 4) & (1 << bits) - 1, WIDTH - 1 - (key & 15)
            bounds = np.searchsorted(item, np.arange(len(starts)))
            sizes = np.minimum(np.diff(bounds), keep)
            latest = np.repeat(bounds[1:] + np.cumsum(sizes) - sizes, sizes)
            latest = latest - 1 - np.arange(sizes.sum())
            item, row, past = item[latest] + lowest, row[latest], past[latest]
            weight = (idf[item] * RECENCY**past / norms[row]).astype(np.float32)
            kept.append((sizes, row.astype(np.int32), weight))
        return cls(Ragged.of_blocks(kept), owners, following, idf, keep, votes)

    def __len__(self) -> int:
        return self._size

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """The postings, owners, following, worth and idf, as compiled code takes them."""
        return *self.postings.arrays, self._owners, self._following, self.worth, self.idf

    @property
    def room(self) -> int:
        """Rows there is place for."""
        return len(self._owners)

    def add_items(self, count: int) -> None:
        """New items, which no row has yet; they weigh as the rarest of the others."""
        self.postings.add_rows(count)
        rarest = np.full(count, self.idf.max(initial=1.0), np.float32)
        self.idf = np.concatenate([self.idf, rarest])

    def add(self, owner: int, before: np.ndarray, item: int) -> int:
        """A row: `owner`, who had `before` (oldest first, one item or more), took `item`."""
        if self._size == self.room:
            more = max(1024, self.room // 4)
            self._owners = np.concatenate([self._owners, np.full(more, -1, np.int32)])
            empty = np.full((more, len(NEXT)), -1, np.int32)
            self._following = np.concatenate([self._following, empty])
            if len(self.worth):
                self.worth = np.concatenate([self.worth, np.ones(empty.shape, np.float32)])
        row = self._size
        self._owners[row], self._following[row, 0] = owner, item
        self._size += 1
        latest = before[::-1][:WIDTH]
        for past, weight in zip(latest, row_weights(latest[None], self.idf)[0], strict=True):
            rows, weights = self.postings.row(int(past))
            if len(rows) < self.keep:
                self.postings.append(int(past), row, weight)
            else:
                oldest = int(rows.argmin())
                rows[oldest], weights[oldest] = row, weight
        return row

    def takers(self, had: int, took: int) -> np.ndarray:
        """int32: owners of the kept rows that have one item and soon after took another."""
        rows, _ = self.postings.row(had)
        return self._owners[rows[(self._following[rows] == took).any(1)]]

    def forget(self, rows: list[int]) -> None:
        """Rows that have nothing to say any more."""
        self._following[rows] = -1

    def followed(self, row: int, step: int, item: int) -> None:
        """The owner of a row took `item` as the `step`-th after it (0: the next)."""
        self._following[row, step] = item


def row_weights(recent: np.ndarray, idf: np.ndarray) -> np.ndarray:
    """Weights (R, W) float32, of length 1 a row, of items (R, W), latest first, -1 for none."""
    weight, norm = _weigh(recent, idf)
    return (weight / norm[:, None]).astype(np.float32)


def _weigh(recent: np.ndarray, idf: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights (R, W) float64, and the length of each row (R,)."""
    weight = np.where(recent >= 0, idf[recent] * RECENCY ** np.arange(recent.shape[1]), 0)
    return weight, np.maximum(np.linalg.norm(weight, axis=1), 1e-12)
