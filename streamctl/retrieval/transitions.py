"""Item-to-item counts: how often one item followed another in the training sequences."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
import scipy.sparse

from streamctl.retrieval.ragged import Ragged

# One count is UNIT: the weights are whole numbers, so that a user's own pairs can be taken out
# exactly, and nothing of them stays behind.
UNIT = 1024
NEXT = (1.0, 0.3, 0.1, 0.05)  # weight of the 1st, 2nd, ... item after a prefix
RECENCY = 0.5  # weight of an item of the prefix against the one after it
REACH = 10  # pairs further apart weigh less than 1/UNIT of one
BLOCK = 2**17  # occurrences of items whose pairs, or rows of the memory, are made at once


@cache
def pair_weights() -> np.ndarray:
    """k(d) = sum_t RECENCY^(t-1) NEXT[d - t], in units: int64 (REACH + 1,), k(0) = 0.

    A pair at distance d is counted once for each prefix that ends at or after its first item and
    at most four items before its second.
    """
    weights = np.zeros(REACH + 1)
    for distance in range(1, REACH + 1):
        for step, share in enumerate(NEXT):
            if distance - step >= 1:
                weights[distance] += RECENCY ** (distance - step - 1) * share
    return np.round(weights * UNIT).astype(np.int64)


def paid(weight, worth):
    """A pair's weight where its later event is worth `worth` units: whole numbers in and out.

    The later one, because it is the answer that the pair speaks for: a purchase after a view is
    a purchase, and a view after a purchase a view.
    """
    return (weight * worth + UNIT // 2) // UNIT


class Transitions:
    """Counts of ordered pairs, the strongest of each item.

    Attributes:
        followers: N rows of (item int32, count int32 in units): what followed item n.
        totals: (N,) int64, the sum of all counts of an item, of those not kept too.
        keep: the most followers of one item.
    """

    def __init__(self, followers: Ragged, totals: np.ndarray, keep: int):
        self.followers, self.totals, self.keep = followers, totals, keep

    @classmethod
    def count(
        cls,
        items: np.ndarray,
        offsets: np.ndarray,
        n_items: int,
        keep: int = 1024,
        worth: np.ndarray | None = None,
    ) -> Transitions:
        """Count the pairs of every sequence.

        Args:
            items: int32 (T,) all sequences, one after the other, oldest first.
            offsets: int64 (U + 1,) where each begins.
            keep: the most pairs kept of one first item, the strongest.
            worth: int64 (T,) units that each event is worth; by default one count each.
        """
        totals, kept = np.zeros(n_items, np.int64), []
        for lowest, table in pair_counts(items, offsets, n_items, worth):
            totals[lowest : lowest + table.shape[0]] = table.sum(1)
            # Each row in the order of its counts, the lower item first among equals.
            most = table.data.max(initial=0)
            rank = (most - table.data) * n_items + table.indices
            shape = table.shape[0], (most + 1) * n_items
            ranked = scipy.sparse.csr_array((table.data, rank, table.indptr), shape=shape)
            ranked.sort_indices()
            sizes = np.diff(table.indptr)
            strong = np.arange(len(rank)) < np.repeat(table.indptr[:-1] + keep, sizes)
            counts = np.minimum(ranked.data[strong], np.iinfo(np.int32).max).astype(np.int32)
            second = (ranked.indices[strong] % n_items).astype(np.int32)
            kept.append((np.minimum(sizes, keep), second, counts))
        return cls(Ragged.of_blocks(kept), totals, keep)

    def add_items(self, count: int) -> None:
        """New items, which nothing followed yet."""
        self.followers.add_rows(count)
        self.totals = np.concatenate([self.totals, np.zeros(count, np.int64)])

    def add(self, before: np.ndarray, item: int, worth: int = UNIT) -> None:
        """A user who had `before` (oldest first) took `item`, which is worth so many units."""
        weights = paid(pair_weights(), worth)
        for distance in range(1, min(len(before), REACH) + 1):
            self._add(int(before[-distance]), item, int(weights[distance]))

    def remove(self, before: np.ndarray, item: int, worth: int = UNIT) -> None:
        """Take out what `add` counted."""
        weights = paid(pair_weights(), worth)
        for distance in range(1, min(len(before), REACH) + 1):
            first, weight = int(before[-distance]), int(weights[distance])
            self.totals[first] -= weight
            items, counts = self.followers.row(first)
            counts[items == item] -= weight

    def _add(self, first: int, second: int, weight: int) -> None:
        self.totals[first] += weight
        items, counts = self.followers.row(first)
        place = np.flatnonzero(items == second)
        if len(place):
            counts[place[0]] += weight
        elif len(items) < self.keep:
            self.followers.append(first, second, weight)
        elif counts[weakest := int(counts.argmin())] <= weight:
            items[weakest], counts[weakest] = second, weight


def pair_counts(
    items: np.ndarray, offsets: np.ndarray, n_items: int, worth: np.ndarray | None = None
) -> Iterator[tuple[int, scipy.sparse.csr_array]]:
    """How often every item followed every other, in units, some first items at a time.

    Args:
        items, offsets, worth: as `Transitions.count` takes them.

    Yields:
        the lowest first item, and int64 counts (F, n_items) of it and of those after it.
    """
    weights, ends = pair_weights(), ends_of(offsets)
    for lowest, starts, places in occurrences(items, n_items):
        room = np.minimum(REACH, ends[places] - 1 - places)  # later items within reach
        bounds = np.concatenate([[0], np.cumsum(room)])
        distance = np.arange(1, bounds[-1] + 1) - np.repeat(bounds[:-1], room)
        later = np.repeat(places, room) + distance
        weight = weights[distance]
        if worth is not None:
            weight = paid(weight, worth[later])
        shape = len(places), n_items
        after = scipy.sparse.csr_array((weight, items[later], bounds), shape=shape)
        once = np.ones(len(places), np.int64), np.arange(len(places)), starts
        yield lowest, scipy.sparse.csr_array(once, shape=(len(starts) - 1, len(places))) @ after


def ends_of(offsets: np.ndarray) -> np.ndarray:
    """(T,) where the sequence of each place ends: int32, if that can hold them."""
    kind = np.int32 if offsets[-1] < 2**31 else np.int64
    return np.repeat(offsets[1:].astype(kind), np.diff(offsets))


def occurrences(items: np.ndarray, n_items: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Where each item is, some items at a time: about BLOCK places, or those of one item.

    Yields:
        the lowest item; (F + 1,) where the places of it and of those after it begin among these;
        and the places, ascending for each item.
    """
    one = np.ones(len(items), np.bool_), items, np.arange(len(items) + 1)
    grouped = scipy.sparse.csr_array(one, shape=(len(items), n_items)).tocsc()  # a counting sort
    del one
    starts, lowest = grouped.indptr, 0
    while lowest < n_items:
        end = int(np.searchsorted(starts, int(starts[lowest]) + BLOCK, "right")) - 1
        end = max(end, lowest + 1)
        first, last = starts[lowest], starts[end]
        yield lowest, starts[lowest : end + 1] - first, grouped.indices[first:last]
        lowest = end
