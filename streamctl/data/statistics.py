"""What a prepared log looks like, and what is suspicious about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from streamctl.config import DataConfig
from streamctl.data.catalog import Catalog
from streamctl.data.known import published
from streamctl.data.log import InteractionLog
from streamctl.data.sources.raw import RawLog
from streamctl.progress import warn

TIE_BIAS = 0.05  # from which P(test id > valid id) is no longer called one half
SORTED_SHARE = 0.95  # neighbours in ascending id order; order by time gives about one half


def describe(
    raw: RawLog, log: InteractionLog, catalog: Catalog, config: DataConfig
) -> dict[str, Any]:
    """Statistics of a prepared log, as statistics.json holds them.

    `test_id_above_valid_id` is P(external id of a user's test item > that of the valid item),
    equal ids left out: one half where the order has nothing to do with ids, more where ties in
    time were sorted by id. `ascending_ids` is the same over all neighbours in all sequences.
    """
    users, items, total = log.n_users, len(catalog), len(log)
    lengths = log.lengths
    rank = id_rank(catalog.ids)
    last = log.items[log.offsets[1:] - 1], log.items[log.offsets[1:] - 2]
    return {
        "source": Path(config.source).name,  # the name alone: the same data in another place
        "format": raw.format,
        "read": {
            "users": len(raw.user_ids),
            "items": len(raw.item_ids),
            "interactions": len(raw.users),
        },
        "users": users,
        "items": items,
        "items_taken": int(np.count_nonzero(np.bincount(log.items))),
        "interactions": total,
        "mean_length": round(total / users, 3),
        "median_length": float(np.median(lengths)),
        "longest": int(lengths.max()),
        "sparsity": round(1 - total / (users * items), 6),
        "train_prefixes": int((lengths - 3).sum()),
        "repeats": _repeats(log, items),
        "order": "time" if raw.timed else "position",
        "ties": config.ties,
        "tied_neighbours": _tied(log),
        "test_id_above_valid_id": _share(rank[last[0]] - rank[last[1]]),
        "ascending_ids": _share(np.diff(rank[log.items])[_same_user(log)]),
        "published": published(raw.format, raw.files),
    }


def _same_user(log: InteractionLog) -> np.ndarray:
    """bool (T - 1,): whether interaction t + 1 is by the user of interaction t."""
    same = np.ones(len(log) - 1, bool)
    same[log.offsets[1:-1] - 1] = False
    return same


def _repeats(log: InteractionLog, items: int) -> int:
    """Interactions with an item that their user took before."""
    pairs = np.repeat(np.arange(log.n_users, dtype=np.int64) * items, log.lengths)
    pairs += log.items
    pairs.sort()
    return int((pairs[1:] == pairs[:-1]).sum())


def _tied(log: InteractionLog) -> float | None:
    """Share of neighbours in a sequence with equal times."""
    if log.timestamps is None:
        return None
    tied = (log.timestamps[1:] == log.timestamps[:-1])[_same_user(log)]
    return round(float(tied.mean()), 4)


def is_sorted_by_id(facts: dict[str, Any]) -> bool:
    """Whether the sequences are in the order of item ids (or against it) end to end."""
    share = facts["ascending_ids"]
    enough = share is not None and facts["interactions"] >= 50
    return enough and not 1 - SORTED_SHARE < share < SORTED_SHARE


def is_tie_biased(facts: dict[str, Any]) -> bool:
    """Whether P(test id > valid id) is far from one half, chance (4 sigma) allowed for."""
    above = facts["test_id_above_valid_id"]
    if above is None:
        return False
    return abs(above - 0.5) > max(TIE_BIAS, 2 / facts["users"] ** 0.5)


def warn_about(facts: dict[str, Any]) -> None:
    """Warn on stderr about what would make numbers on this log wrong or hard to compare."""
    above = facts["test_id_above_valid_id"]
    if is_sorted_by_id(facts):
        warn(
            "THE SEQUENCES ARE SORTED BY ITEM ID, not by time "
            f"({facts['ascending_ids']:.0%} of neighbouring items have ascending ids; 50% is "
            "unbiased): every result on this data is meaningless. Get the log with its timestamps"
        )
    elif is_tie_biased(facts):
        remedy = "--ties shuffle" if facts["order"] == "time" else "--ties runs (a lower bound)"
        warn(
            f"P(id of the test item > id of the valid item) is {above:.2f}, 0.50 is unbiased: "
            "items taken at the same time were sorted by id, or ids follow the time. State it with "
            f"results, or use {remedy}"
        )
    missing = facts["items_without_text"]
    if missing:
        warn(f"{missing:,} of {facts['items']:,} items have no text; they get their id as title")
    known = facts["published"]
    if known is not None:
        names = [n for n in ("users", "items", "interactions") if known[n] != facts[n]]
        if names:
            found = ", ".join(f"{n} {facts[n]:,} (published {known[n]:,})" for n in names)
            warn(f"this is not {known['name']} as published in {known['source']}: {found}")


def _share(differences: np.ndarray) -> float | None:
    """Share of positive among non-zero differences; None if there are none."""
    up, down = int((differences > 0).sum()), int((differences < 0).sum())
    return round(up / (up + down), 4) if up + down else None


def id_rank(ids: list[str]) -> np.ndarray:
    """int32 (N,): rank of each external id, numbers by value and others as texts."""
    numeric = all(item.isascii() and item.isdigit() and len(item) < 19 for item in ids)
    names = pa.array(map(int, ids), pa.int64()) if numeric else pa.array(ids, pa.string())
    ranks = np.empty(len(ids), np.int32)
    ranks[pc.sort_indices(names).to_numpy()] = np.arange(len(ids))
    return ranks
