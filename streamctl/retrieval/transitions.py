"""Item-to-item counts: how often one item followed another in the training sequences."""

from __future__ import annotations

import numpy as np

from streamctl.retrieval.ragged import Ragged

# One count is UNIT: the weights are whole numbers, so that a user's own pairs can be taken out
# exactly, and nothing of them stays behind.
UNIT = 1024
NEXT = (1.0, 0.3, 0.1, 0.05)  # weight of the 1st, 2nd, ... item after a prefix
RECENCY = 0.5  # weight of an item of the prefix against the one after it
REACH = 10  # pairs further apart weigh less than 1/UNIT of one


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
        worth = np.empty(0, np.int64) if worth is None else worth
        first, second, counts = _sum(*_pairs(items, offsets, pair_weights(), worth), n_items)
        totals = np.bincount(first, counts, n_items).astype(np.int64)
        order = np.lexsort((second, -counts, first))
        first, second, counts = first[order], second[order], counts[order]
        kept = np.arange(len(first)) - np.searchsorted(first, first) < keep
        counts = np.minimum(counts[kept], np.iinfo(np.int32).max).astype(np.int32)
        followers = Ragged.sorted(first[kept], n_items, second[kept].astype(np.int32), counts)
        return cls(followers, totals, keep)

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


def _sum(first, second, weight, n_items):
    """Pairs (P,) in which one may occur again -> each pair once, with the sum of its weights."""
    order = np.argsort(first.astype(np.int64) * n_items + second, kind="stable")
    first, second, weight = first[order], second[order], weight[order]
    new = np.ones(len(first), bool)
    new[1:] = (first[1:] != first[:-1]) | (second[1:] != second[:-1])
    place = np.flatnonzero(new)
    counts = np.add.reduceat(weight, place) if len(place) else weight
    return first[place], second[place], counts


def _pairs(items, offsets, weights, worth):
    """All pairs within reach: first, second int32 (P,), weight int64 (P,)."""
    lengths = np.diff(offsets)
    ends = np.repeat(offsets[1:], lengths)
    count = sum(int(np.maximum(lengths - far, 0).sum()) for far in range(1, len(weights)))
    first, second, weight = (np.empty(count, kind) for kind in (np.int32, np.int32, np.int64))
    done = 0
    for distance in range(1, len(weights)):
        later = np.arange(distance, len(items))
        later = later[later < ends[: len(later)]]  # still the same user's
        part = slice(done, done := done + len(later))
        first[part], second[part] = items[later - distance], items[later]
        weight[part] = paid(weights[distance], worth[later]) if len(worth) else weights[distance]
    return first, second, weight
