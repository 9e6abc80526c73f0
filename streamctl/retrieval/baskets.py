"""Baskets of items compared by cosine through an inverted index, which new rows join in place."""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
import scipy.sparse

from streamctl.kernels import threads

_QUERIES = 64  # that one thread takes at a time
_TAIL = 4096  # appended rows that are kept apart, at least, before all rows are indexed again
_SHARE = 8  # ... and at least one in so many of all rows


@dataclass(frozen=True)
class Found:
    """The nearest rows of each query, best first.

    Attributes:
        rows: (B, k) int64, -1 where the memory has too few.
        cosine: (B, k) float32, -inf where there is no row.
    """

    rows: np.ndarray
    cosine: np.ndarray


@dataclass(frozen=True)
class Weighing:
    """How the items of a prefix become a basket.

    Attributes:
        age: weight of an item against the one taken after it.
        width: the latest items that count.
    """

    age: float
    width: int


class BasketIndex:
    """Which rows have which items, and with what weight.

    A basket is a vector over the items of length 1; an item weighs its rarity times `age` for
    every item taken after it. A search touches the rows that share an item with the question and
    no others, and is exact. Appended rows go to a short list of their own that is searched, too;
    when it has grown to a share of all rows the two become one, so that a row costs the same few
    microseconds however many there are.
    """

    def __init__(self, recent: np.ndarray, rarity: np.ndarray, weighing: Weighing):
        """Index the rows.

        Args:
            recent: (R, P) int, latest first, -1 where there is none.
            rarity: (items,) float, of each item known.
        """
        self.weighing, self.rarity = weighing, rarity
        self._recent = [recent[:, : weighing.width]]
        self._body = self._postings(self._recent[0], 0)
        self._tail = self._postings(self._recent[0][:0], 0)

    def __len__(self) -> int:
        return sum(len(part) for part in self._recent)

    @property
    def bytes(self) -> int:
        """What the lists take in memory."""
        return sum(array.nbytes for part in (self._body, self._tail) for array in part)

    def weigh(self, recent: np.ndarray) -> scipy.sparse.csr_matrix:
        """Baskets (B, items) float32 of histories (B, P), latest first, -1 for none.

        Items of no known rarity stay away.
        """
        recent = recent[:, : self.weighing.width]
        row, age = np.nonzero((recent >= 0) & (recent < len(self.rarity)))
        items = recent[row, age]
        weights = (self.weighing.age**age * self.rarity[items]).astype(np.float32)
        shape = (len(recent), len(self.rarity))
        return unit_rows(scipy.sparse.csr_matrix((weights, (row, items)), shape=shape))

    def _postings(self, recent: np.ndarray, first: int) -> tuple[np.ndarray, ...]:
        """Of each item: where its list starts, the rows that have it, their weights."""
        columns = self.weigh(recent).tocsc()
        rows = columns.indices.astype(np.int32) + np.int32(first)
        return columns.indptr.astype(np.int64), rows, columns.data

    def append(self, recent: np.ndarray, rarity: np.ndarray) -> None:
        """Add rows (A, P); `rarity` is as before, with new items at its end."""
        self.rarity = rarity
        self._recent.append(recent[:, : self.weighing.width])
        body = self._recent[0]
        tail = np.concatenate(self._recent[1:])
        if len(tail) > max(_TAIL, len(body) // _SHARE):
            self._recent = [np.concatenate([body, tail])]
            self._body = self._postings(self._recent[0], 0)
            tail = tail[:0]
        self._tail = self._postings(tail, len(self) - len(tail))

    def search(
        self,
        baskets: scipy.sparse.csr_matrix,
        k: int,
        owners: np.ndarray,
        *,
        users: np.ndarray | None = None,
        known: np.ndarray | None = None,
    ) -> Found:
        """The k rows of highest cosine, the lower row first among equals.

        Args:
            baskets: (B, items), of any length.
            owners: (R,) int64 user of each row.
            users: (B,) int64; rows of a query's own user are left out. None, or -1: strangers.
            known: (B, j) int64 rows to leave out, too; -1 is none.
        """
        baskets = unit_rows(baskets)
        count = baskets.shape[0]
        found = np.full((count, k), -1, np.int64)
        cosine = np.full((count, k), -np.inf, np.float32)
        users = np.full(count, -1, np.int64) if users is None else np.asarray(users, np.int64)
        known = np.empty((count, 0), np.int64) if known is None else known
        question = baskets.indptr.astype(np.int64), baskets.indices, baskets.data

        def run(first: int, last: int) -> None:
            _search(
                *question, users, known, *self._body, *self._tail, owners, first, last, found,
                cosine,
            )  # fmt: skip

        threads.over_ranges(run, count, _QUERIES)
        return Found(found, cosine)


def unit_rows(rows: scipy.sparse.csr_matrix) -> scipy.sparse.csr_matrix:
    """Rows of length 1, their items in order; a row of zeros stays."""
    length = np.sqrt(np.asarray(rows.multiply(rows).sum(axis=1)).ravel())
    rows = (scipy.sparse.diags(1 / np.maximum(length, 1e-12)) @ rows).astype(np.float32).tocsr()
    rows.sort_indices()
    return rows


@numba.njit(nogil=True, cache=True)
def _search(
    starts, items, weights, users, known, body_starts, body_rows, body_weights, tail_starts,
    tail_rows, tail_weights, owners, first, last, found, cosine,
):  # fmt: skip
    """Fill found and cosine (B, k) of the queries first..last."""
    scores = np.zeros(len(owners), np.float32)
    touched = np.empty(len(owners), np.int32)
    k = found.shape[1]
    for query in range(first, last):
        count = 0
        for place in range(starts[query], starts[query + 1]):
            item, weight = items[place], weights[place]
            if item < len(body_starts) - 1:
                for entry in range(body_starts[item], body_starts[item + 1]):
                    row = body_rows[entry]
                    if scores[row] == 0:
                        touched[count] = row
                        count += 1
                    scores[row] += weight * body_weights[entry]
            if item < len(tail_starts) - 1:
                for entry in range(tail_starts[item], tail_starts[item + 1]):
                    row = tail_rows[entry]
                    if scores[row] == 0:
                        touched[count] = row
                        count += 1
                    scores[row] += weight * tail_weights[entry]
        for row in known[query]:
            if row >= 0:
                scores[row] = 0
        user = users[query]
        kept = 0
        near = np.empty(count, np.float32)
        for place in range(count):
            row = touched[place]
            if scores[row] > 0 and (user < 0 or owners[row] != user):
                near[kept] = scores[row]
                kept += 1
        limit = np.float32(0)
        if kept > k:
            limit = np.partition(near[:kept], kept - k)[kept - k]
        above = np.empty(count, np.int32)
        equal = np.empty(count, np.int32)
        more, ties = 0, 0
        for place in range(count):
            row = touched[place]
            if scores[row] > 0 and (user < 0 or owners[row] != user):
                if scores[row] > limit:
                    above[more] = row
                    more += 1
                elif scores[row] == limit:
                    equal[ties] = row
                    ties += 1
        best = np.sort(above[:more])
        best = best[np.argsort(-scores[best], kind="mergesort")]
        ranked = np.sort(equal[:ties])
        for place in range(min(k, more + ties)):
            row = best[place] if place < more else ranked[place - more]
            found[query, place] = row
            cosine[query, place] = scores[row]
        for place in range(count):
            scores[touched[place]] = 0
