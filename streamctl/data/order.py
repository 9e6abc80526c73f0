"""Numbers and order: the interactions that are left, by user and time, with dense indexes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from streamctl.config import DataConfig
from streamctl.data.columns import Column, chunks
from streamctl.data.core import Core
from streamctl.data.log import RANGE_ROWS, InteractionLog, ranges
from streamctl.data.sources.raw import RawLog
from streamctl.data.statistics import id_rank
from streamctl.device import derive_seed
from streamctl.errors import UsageError
from streamctl.progress import warn

MOST_RANGES = 500  # of users that are sorted by themselves: each has a file open for its rows


def number(raw: RawLog, core: Core, config: DataConfig) -> tuple[InteractionLog, list[str]]:
    """(the interactions left, in order and with dense indexes; external id of each item index).

    One pass over the source's columns deals the rows out to ranges of users; each range is then
    sorted by itself: memory holds one range, however long the log is.

    Raises:
        UsageError: a tie policy that does not fit the log.
    """
    if config.ties == "runs" and raw.timed:
        raise UsageError("--ties runs is for a log without times; this one takes --ties shuffle")
    if config.ties == "shuffle" and not raw.timed:
        warn("--ties shuffle has no effect: the source gives the order only, not times")
    user_rank, user_ids = _rank(core.users, raw.user_ids)
    item_rank, item_ids = _rank(core.items, raw.item_ids)
    if config.ties == "runs":
        by_value = id_rank(item_ids)[item_rank]  # 9 before 10
    names, dense = _number_items(raw, core, config)
    counts = np.zeros(len(user_ids), np.int64)
    left = core.users > 0
    counts[user_rank[left]] = core.users[left]
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    rng = np.random.default_rng(derive_seed(config.seed, "ties"))
    items, moments = Column(np.int32), Column(np.int64)
    for rows in deal(raw, user_rank, item_rank, offsets):
        users, codes = rows["user"], rows["item"]
        times = None if raw.times is None else rows["time"]
        if config.ties == "runs":
            order = _shuffle_runs(users, by_value[codes], rng)
        else:
            order = _order(users, times, rng if config.ties == "shuffle" and raw.timed else None)
        items.append(dense[codes[order]])
        if raw.timed:
            moments.append(times[order])
    log = InteractionLog(
        items=items.finish(),
        offsets=offsets,
        user_ids=user_ids,
        timestamps=moments.finish() if raw.timed else None,
    )
    return log, names


def deal(
    raw: RawLog, user_rank: np.ndarray, item_rank: np.ndarray, offsets: np.ndarray
) -> Iterator[np.ndarray]:
    """For each range of users, the rows that are left: user rank, raw item code, time if any.

    A range's rows are in input order. There are more ranges the longer the log is, up to
    MOST_RANGES; from there on they grow.
    """
    most = max(RANGE_ROWS, int(offsets[-1]) // MOST_RANGES)
    bounds = list(ranges(offsets, most))
    kinds = [("user", np.int32), ("item", np.int32)]
    if raw.times is not None:
        kinds.append(("time", np.int64))
    piles = [Column(kinds, sharing=len(bounds)) for _ in bounds]
    lasts = np.array([last for _, last in bounds])
    for part in chunks(len(raw.users), raw.users, raw.items, raw.times):
        ranks, codes = user_rank[raw.users[part]], raw.items[part]
        left = np.flatnonzero((ranks >= 0) & (item_rank[codes] >= 0))
        pile = np.searchsorted(lasts, ranks[left], side="right").astype(np.uint16)
        left = left[np.argsort(pile, kind="stable")]
        rows = np.empty(len(left), kinds)
        rows["user"], rows["item"] = ranks[left], codes[left]
        if raw.times is not None:
            rows["time"] = raw.times[part][left]
        ends = np.cumsum(np.bincount(pile, minlength=len(piles)))
        for number, rows_of_pile in enumerate(np.split(rows, ends[:-1])):
            piles[number].append(rows_of_pile)
    while piles:
        yield piles.pop(0).finish()


def _rank(counts: np.ndarray, names: Any) -> tuple[np.ndarray, list[str]]:
    """(int32 rank of each code's name among those that are left, -1 if gone; these, sorted)."""
    import pyarrow.compute as pc

    used = np.flatnonzero(counts)
    values = names.take(used)
    by_name = pc.sort_indices(values).to_numpy()
    ranks = np.full(len(names), -1, np.int32)
    ranks[used[by_name]] = np.arange(len(used))
    return ranks, values.take(by_name).to_pylist()


def _number_items(raw: RawLog, core: Core, config: DataConfig) -> tuple[list[str], np.ndarray]:
    """(external id of each dense index, int32 dense index of each raw code).

    The catalogue holds the items that occur in the filtered log; `--min-item 0` keeps those of
    the items file that nobody took, too. Numbers are a seeded permutation of the sorted ids, so
    that no model can read order or age from an id.
    """
    used = np.flatnonzero(core.items)
    names = raw.item_ids.take(used).to_pylist()
    if config.min_item == 0 and raw.catalogue is not None:
        names += sorted(set(raw.catalogue.ids).difference(names))
    by_name = sorted(range(len(names)), key=names.__getitem__)
    rng = np.random.default_rng(derive_seed(config.seed, "items"))
    place = np.empty(len(names), np.int32)
    place[by_name] = rng.permutation(len(names))
    dense = np.full(len(raw.item_ids), -1, np.int32)
    dense[used] = place[: len(used)]
    ordered = [""] * len(names)
    for name, index in zip(names, place.tolist(), strict=True):
        ordered[index] = name
    return ordered, dense


def _order(
    users: np.ndarray, times: np.ndarray | None, rng: np.random.Generator | None
) -> np.ndarray:
    """int64 (T,): rows by user, time, then input order, or a shuffle of equal times by `rng`."""
    if rng is not None:
        return np.lexsort((rng.random(len(users)), times, users))
    if times is None:
        return np.argsort(users, kind="stable")
    return np.lexsort((times, users))


def _shuffle_runs(users: np.ndarray, ranks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """int64 (T,): rows by user in input order, every run of ascending item ids shuffled.

    Public copies that give the order only have interactions of one time sorted by item id. Which
    runs are ties cannot be told, so this shuffles true order too: figures on it are a lower bound.

    Args:
        ranks: int32 (T,) rank of each row's item id, numbers by value.
    """
    order = np.argsort(users, kind="stable")
    starts = np.ones(len(order), bool)
    starts[1:] = (np.diff(users[order]) != 0) | (np.diff(ranks[order]) <= 0)
    return order[np.lexsort((rng.random(len(order)), np.cumsum(starts)))]
