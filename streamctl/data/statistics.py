"""What a prepared log looks like, and what is suspicious about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from streamctl.config import DataConfig
from streamctl.data.catalog import Catalog
from streamctl.data.known import published
from streamctl.data.log import InteractionLog, forget, ranges
from streamctl.data.sources.raw import RawLog
from streamctl.data.split import Split
from streamctl.errors import count_of
from streamctl.progress import say, warn

Level = Literal["good", "note", "warning", "error"]
TIE_BIAS = 0.05  # from which P(test id > valid id) is no longer called one half
SORTED = 0.95  # neighbours in ascending id order; order by time gives about one half


@dataclass(frozen=True)
class Finding:
    """One thing examined: how bad it is, what was seen, and what to do about it."""

    topic: str
    level: Level
    what: str
    remedy: str = ""
    lines: list[str] = field(default_factory=list)


def describe(
    raw: RawLog, read: dict[str, int], log: InteractionLog, catalog: Catalog, config: DataConfig
) -> dict[str, Any]:
    """Statistics of a prepared log, as statistics.json holds them.

    Args:
        read: users, items and interactions of the source.

    `test_id_above_valid_id` is P(external id of a user's test item > that of the valid item),
    equal ids left out: one half where the order has nothing to do with ids, more where ties in
    time were sorted by id. `ascending_ids` is the same over all neighbours in all sequences.
    """
    users, items, total = log.n_users, len(catalog), len(log)
    lengths, split = log.lengths, Split(log, config.history, len(catalog))
    counts = _count(log, id_rank(catalog.ids))
    tied = round(counts["tied"] / max(counts["neighbours"], 1), 4)
    return {
        "source": Path(config.source).name,  # the name alone: the same data in another place
        "format": raw.format,
        "read": read,
        "users": users,
        "items": items,
        "items_taken": counts["items"],
        "interactions": total,
        "mean_length": round(total / users, 3),
        "median_length": float(np.median(lengths)),
        "longest": int(lengths.max()),
        "sparsity": round(1 - (total - counts["repeats"]) / (users * items), 6),
        "train_prefixes": split.count(log.offsets[:-1], split.valid_from),
        "valid_targets": split.count(split.valid_from, split.test_from),
        "test_targets": split.count(split.test_from, log.offsets[1:]),
        "split": config.split if log.cuts is not None else "leave-one-out",
        "repeats": counts["repeats"],
        "order": "time" if raw.timed else "position",
        "ties": config.ties,
        "tied_neighbours": tied if raw.timed else None,
        "test_id_above_valid_id": _share(counts["last steps up"], counts["last steps down"]),
        "ascending_ids": _share(counts["steps up"], counts["steps down"]),
        "published": published(raw.format, raw.files),
        "unread": raw.unread,
    }


def _count(log: InteractionLog, rank: np.ndarray) -> Counter[str]:
    """Counts over all sequences, a range of users at a time.

    Args:
        rank: int32 (N,) rank of each item's external id.
    """
    found: Counter[str] = Counter()
    taken = np.zeros(len(rank), bool)
    for first, last in ranges(log.offsets):
        part = slice(log.offsets[first], log.offsets[last])
        items, starts = log.items[part], log.offsets[first:last] - part.start
        ends = log.offsets[first + 1 : last + 1] - part.start - 1
        taken[items] = True
        same = np.ones(len(items), bool)  # whose neighbour before is of the same user
        same[starts] = False
        found["neighbours"] += int(same.sum())
        for steps, kind in (
            (np.diff(rank[items])[same[1:]], "steps"),
            (rank[items[ends]] - rank[items[ends - 1]], "last steps"),
        ):
            found[f"{kind} up"] += int((steps > 0).sum())
            found[f"{kind} down"] += int((steps < 0).sum())
        if log.timestamps is not None:
            found["tied"] += int((np.diff(log.timestamps[part]) == 0)[same[1:]].sum())
        pairs = user_items(log, first, last, len(rank))
        pairs.sort()
        found["repeats"] += int((pairs[1:] == pairs[:-1]).sum())
        forget(log.items)
        forget(log.timestamps)
    found["items"] = int(taken.sum())
    return found


def user_items(log: InteractionLog, first: int, last: int, n_items: int) -> np.ndarray:
    """int64: a number for each interaction of some users, equal for equal user and item."""
    users = np.repeat(np.arange(last - first, dtype=np.int64), log.lengths[first:last])
    return users * n_items + log.items[log.offsets[first] : log.offsets[last]]


def _share(part: int, rest: int) -> float | None:
    """part / (part + rest); None if there are none."""
    return round(part / (part + rest), 4) if part + rest else None


def findings(facts: dict[str, Any]) -> Iterator[Finding]:
    """What the statistics say about a log, good and bad."""
    for role, column in facts["unread"].items():
        what = f"column {column!r} is not used: every row counts alike"
        options = {"rating": "--min-rating N keeps what was liked", "event": "--events KIND,KIND"}
        yield Finding("files", "note", what, options[role])
    yield _order(facts)
    if (known := facts["published"]) is None:
        return
    different = ", ".join(
        f"{name} {facts[name]:,} (published {known[name]:,})"
        for name in ("users", "items", "interactions")
        if known[name] != facts[name]
    )
    if different:
        yield Finding(
            "published",
            "warning",
            f"not {known['name']} as in {known['source']}: {different}",
            "check the copy and the filters before comparing with published results",
        )
    else:
        yield Finding("published", "good", f"as {known['name']} in {known['source']}")


def _order(facts: dict[str, Any]) -> Finding:
    """Whether the order of the sequences has to do with item ids."""
    share, above = facts["ascending_ids"], facts["test_id_above_valid_id"]
    timed, tied = facts["order"] == "time", facts["tied_neighbours"]
    harmless = "nothing here: `data prepare` numbers items at random; other tools may not"
    if share is not None and facts["interactions"] >= 50 and not 1 - SORTED < share < SORTED:
        sure = f"({share:.0%} of neighbouring items have ascending ids; 50% is unbiased)"
        if not timed:
            return Finding(
                "order",
                "error",
                f"the sequences are sorted by item id, not by time {sure}: every result on them is "
                "meaningless",
                "get the log with its timestamps, or --ties runs (a lower bound)",
            )
        if tied < 0.5:
            what = f"item ids follow the times {sure}: later items have higher ids"
            return Finding("order", "note", what, harmless)
        return Finding(
            "order",
            "error",
            f"the sequences are sorted by item id {sure}: most times are equal, and what is "
            "taken at the same time is in the order of ids",
            "--ties shuffle, or times that are finer",
        )
    # Chance (4 sigma) is allowed for.
    if above is None or abs(above - 0.5) <= max(TIE_BIAS, 2 / facts["users"] ** 0.5):
        return Finding("order", "good", "the order of items has nothing to do with their ids")
    chance = f"P(id of the test item > id of the valid item) is {above:.2f}"
    if timed and not tied:
        what = f"item ids follow the times: {chance}, and no times are equal"
        return Finding("order", "note", what, harmless)
    return Finding(
        "order",
        "warning",
        f"{chance}, 0.50 is unbiased: items taken at the same time were sorted by id, or ids "
        "follow the time",
        f"--ties {'shuffle' if timed else 'runs (a lower bound)'}, or state it with results",
    )


def warn_about(facts: dict[str, Any]) -> None:
    """Say on stderr what would make numbers on this log wrong or hard to compare."""
    for finding in findings(facts):
        if finding.level in ("warning", "error"):
            warn(f"{finding.what}. Next: {finding.remedy}")
        elif finding.topic == "files":
            say(f"{finding.what}; {finding.remedy}")
    removed = facts["removed"]
    if removed["users"] > facts["users"]:
        user, item = removed["min_user"], removed["min_item"]
        lower = f"--min-user {min(user, 3)} --min-item {min(item, 1)}"
        if user <= 3 and item <= 1:
            lower = "--split-at 80%,90% --min-user 1"
        warn(
            f"{removed['users']:,} of {removed['users'] + facts['users']:,} users are left out: a "
            f"user needs {count_of(user, 'interaction')}, an item {item}. Next: {lower} keeps more"
        )
    if missing := facts["items_without_text"]:
        warn(f"no text: {count_of(missing, 'item')} of {facts['items']:,}, shown by their id")


def id_rank(ids: list[str]) -> np.ndarray:
    """int32 (N,): rank of each external id, numbers by value and others as texts."""
    numeric = all(item.isascii() and item.isdigit() and len(item) < 19 for item in ids)
    names = pa.array(map(int, ids), pa.int64()) if numeric else pa.array(ids, pa.string())
    ranks = np.empty(len(ids), np.int32)
    ranks[pc.sort_indices(names).to_numpy()] = np.arange(len(ids))
    return ranks
